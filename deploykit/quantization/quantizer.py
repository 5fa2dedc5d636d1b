"""A PT2E quantizer written to ONNX Runtime's fusion rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
)

from deploykit.quantization.layers import tensor_of
from deploykit.quantization.operators import WEIGHTED
from deploykit.quantization.rules import (
    Parameters,
    QuantizedTensor,
    align,
    integer_kernels,
    least_scale,
    quantized_tensors,
)
from deploykit.targets import Target

Exact = Mapping[str, Parameters]

# Smallest scale: keeps a channel of zeros from dividing by nothing.
EPS = 2.0**-24


class FusionQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates the tensors that :func:`rules.quantized_tensors` names.

    Args:
        activation: makes the specification of a tensor: an observer, a fake quantizer, or fixed
            parameters.
        weight: makes the specification of a weight.
        exact: specifications of tensors that hold integers on their grid already, such as
            pixels, by key; a pair stands only where they were moved.
        keep_float: names of modules whose layers stay in float.
        known: parameters of activations, by key, where they are known by now; a weight's scales
            are then large enough for the integers of its bias.
        moved: whether values that were only moved get pairs too. The integer graph needs them
            to stay in integers; elsewhere they lie on the grid already, and quantizing them
            again would only take time.
    """

    def __init__(
        self,
        activation: Callable[[QuantizedTensor], QuantizationSpecBase],
        weight: QuantizationSpecBase,
        exact: Mapping[str, QuantizationSpecBase],
        keep_float: frozenset[str],
        *,
        known: Exact | None = None,
        moved: bool = False,
    ) -> None:
        super().__init__()
        self._activation = activation
        self._weight = weight
        self._exact = exact
        self._keep_float = keep_float
        self._known = known
        self._moved = moved
        self._tensors: dict[int, QuantizedTensor] = {}
        self._keys: dict[Node, str] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark in ``model`` what is quantized and how."""
        for tensor in quantized_tensors(model.graph, self._keep_float):
            self._keys[tensor.node] = tensor.key
            if tensor.node is tensor.root:
                if tensor.key not in self._exact:
                    annotation = _annotation(tensor.node)
                    annotation.output_qspec = self._activation(tensor)
                    self._tensors[id(annotation)] = tensor
            elif self._moved:
                exact = self._exact.get(tensor.key)
                _annotation(tensor.node).output_qspec = exact or self._activation(tensor)
        for kernel in integer_kernels(model.graph, self._keep_float):
            if kernel.target in WEIGHTED:
                source, weight = kernel.all_input_nodes[:2]
                # The library's convolution patterns expect input and weight in this order; the
                # input is already quantized where it was made.
                _annotation(kernel).input_qspec_map = {source: None, weight: self._weight}
        return model

    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]
    ) -> None:
        """Write its key on every observer: their own names are numbers in graph order.

        A weight's learns how small its scales may be.
        """
        for place, observer in edge_or_node_to_obs_or_fq.items():
            if isinstance(place, Node):
                tensor = self._tensors.get(id(place.meta.get("quantization_annotation")))
                if tensor is not None:
                    observer.tensor_key, observer.aligned = tensor.key, tensor.aligned
            elif self._known is not None and observer is not None:
                least = self._least_scales(model, place[1], self._known)
                observer.eps = torch.maximum(observer.eps, least)

    def _least_scales(self, model: GraphModule, kernel: Node, known: Exact) -> Tensor:
        """Return the least scale of a weight, or one a channel, that its bias allows."""
        source, _weight, *rest = kernel.all_input_nodes
        if not rest or rest[0].op != "get_attr":
            return torch.zeros(1)
        while source not in self._keys:  # behind a dropout, or a hard sigmoid of integers
            source = source.all_input_nodes[0]
        scale, _ = known[self._keys[source]]
        return least_scale(tensor_of(model, rest[0]), scale)

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the rules annotate only what they know."""


def _annotation(node: Node) -> QuantizationAnnotation:
    annotation = node.meta.setdefault("quantization_annotation", QuantizationAnnotation())
    annotation._annotated = True
    return annotation


class AlignedObserver(MovingAverageMinMaxObserver):  # type: ignore[misc]
    """Gives integers on which a hard sigmoid can be computed, see `rules.align`."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        scale, zero_point = super().calculate_qparams()
        aligned = align(scale.item(), int(zero_point.item()), self.quant_min, self.quant_max)
        return scale.new_tensor(aligned[:1]), zero_point.new_tensor(aligned[1:])


def training_quantizer(target: Target, exact: Exact, keep_float: frozenset[str]) -> FusionQuantizer:
    """Return a quantizer that fakes integers and learns the ranges of activations."""
    unsigned = target.activation_dtype == "uint8"
    settings = {"averaging_constant": 0.01, "eps": EPS}
    learned = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, **settings
    )
    aligned = FakeQuantize.with_args(observer=AlignedObserver, **settings)
    return FusionQuantizer(
        lambda tensor: _observed(target, aligned if tensor.aligned and unsigned else learned),
        # averaging_constant 1: always the present weight, as in the model that ships. Not fused:
        # the fused kernel divides by 127.5 where all others divide by 127.
        _weight(
            target,
            FakeQuantize.with_args(
                observer=MovingAveragePerChannelMinMaxObserver,
                averaging_constant=1.0,
                eps=EPS,
                ch_axis=0,  # the library hands it on to observers only
            ),
        ),
        _exact(target, exact),
        keep_float,
    )


def calibration_quantizer(
    target: Target, exact: Exact, keep_float: frozenset[str]
) -> FusionQuantizer:
    """Return a quantizer that only watches; its memory does not grow with the samples."""
    return FusionQuantizer(
        lambda tensor: _observed(target, HistogramObserver.with_args(eps=EPS)),
        _weight(target, PerChannelMinMaxObserver.with_args(eps=EPS)),
        _exact(target, exact),
        keep_float,
    )


def integer_quantizer(
    target: Target,
    parameters: Mapping[str, Parameters],
    exact: Exact,
    keep_float: frozenset[str],
    *,
    moved: bool,
) -> FusionQuantizer:
    """Return a quantizer that gives every tensor its known parameters.

    Raises:
        KeyError: while annotating a tensor that has none.
    """
    return FusionQuantizer(
        lambda tensor: _fixed(target, *parameters[tensor.key]),
        _weight(target, PerChannelMinMaxObserver.with_args(eps=EPS)),
        _exact(target, exact),
        keep_float,
        known={**parameters, **exact},
        moved=moved,
    )


def _activation_range(target: Target) -> tuple[int, int, torch.dtype]:
    return (0, 255, torch.uint8) if target.activation_dtype == "uint8" else (-128, 127, torch.int8)


def _observed(target: Target, observer: Callable[..., object]) -> QuantizationSpecBase:
    low, high, dtype = _activation_range(target)
    return QuantizationSpec(
        dtype=dtype,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if target.symmetric else torch.per_tensor_affine,
        observer_or_fake_quant_ctr=observer,
    )


def _fixed(target: Target, scale: float, zero_point: int) -> QuantizationSpecBase:
    low, high, dtype = _activation_range(target)
    return FixedQParamsQuantizationSpec(
        dtype=dtype,
        scale=scale,
        zero_point=zero_point,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_affine,
    )


def _exact(target: Target, exact: Exact) -> dict[str, QuantizationSpecBase]:
    return {key: _fixed(target, *parameters) for key, parameters in exact.items()}


def _weight(target: Target, observer: Callable[..., object]) -> QuantizationSpecBase:
    limit = 2 ** (target.weight_bits - 1) - 1
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-limit,
        quant_max=limit,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=observer,
    )
