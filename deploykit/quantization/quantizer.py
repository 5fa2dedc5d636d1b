"""A PT2E quantizer written to ONNX Runtime's fusion rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
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
    SharedQuantizationSpec,
)

from deploykit.quantization.rules import TRANSPOSED, kernels, quantized_tensors
from deploykit.targets import Target

Parameters = tuple[float, int]
Exact = Mapping[str, Parameters]

# Smallest scale: keeps a channel of zeros from dividing by nothing.
EPS = 2.0**-24


class FusionQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates the tensors that :func:`rules.quantized_tensors` names.

    Args:
        activation: makes the specification of a tensor from its key: an observer, a fake
            quantizer, or fixed parameters.
        weight: makes the specification of a weight from its channel axis.
        exact: specifications of tensors that hold integers on their grid already, such as
            pixels, by key; a pair stands only where they were moved.
        moved: whether values that were only moved get pairs too. The integer graph needs them
            to stay in integers; elsewhere they lie on the grid already, and quantizing them
            again would only take time.
    """

    def __init__(
        self,
        activation: Callable[[str], QuantizationSpecBase],
        weight: Callable[[int], QuantizationSpecBase],
        exact: Mapping[str, QuantizationSpecBase],
        *,
        moved: bool = False,
    ) -> None:
        super().__init__()
        self._activation = activation
        self._weight = weight
        self._exact = exact
        self._moved = moved
        self._keys: dict[int, str] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark in ``model`` what is quantized and how."""
        for tensor in quantized_tensors(model.graph):
            if tensor.node is not tensor.root and not self._moved:
                continue
            if tensor.key in self._exact:
                if tensor.node is not tensor.root:
                    _annotation(tensor.node).output_qspec = self._exact[tensor.key]
                continue
            annotation = _annotation(tensor.node)
            if tensor.node is tensor.root:
                annotation.output_qspec = self._activation(tensor.key)
                self._keys[id(annotation)] = tensor.key
            else:
                annotation.output_qspec = SharedQuantizationSpec(tensor.root)
        for kernel in kernels(model.graph):
            source, weight = kernel.all_input_nodes[:2]
            # The library's convolution patterns expect input and weight in this order; the
            # input is already quantized where it was made.
            _annotation(kernel).input_qspec_map = {
                source: None,
                weight: self._weight(1 if kernel.target in TRANSPOSED else 0),
            }
        return model

    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]
    ) -> None:
        """Write its key on every observer: their own names are numbers in graph order."""
        for place, observer in edge_or_node_to_obs_or_fq.items():
            if isinstance(place, Node):
                key = self._keys.get(id(place.meta.get("quantization_annotation")))
                if key is not None:
                    observer.tensor_key = key

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the rules annotate only what they know."""


def _annotation(node: Node) -> QuantizationAnnotation:
    annotation = node.meta.setdefault("quantization_annotation", QuantizationAnnotation())
    annotation._annotated = True
    return annotation


def training_quantizer(target: Target, exact: Exact) -> FusionQuantizer:
    """Return a quantizer that fakes integers and learns the ranges of activations."""
    observe = FusedMovingAvgObsFakeQuantize.with_args
    return FusionQuantizer(
        lambda key: _observed(
            target, observe(observer=MovingAverageMinMaxObserver, averaging_constant=0.01, eps=EPS)
        ),
        # averaging_constant 1: always the present weight, as in the model that ships. Not fused:
        # the fused kernel divides by 127.5 where all others divide by 127.
        lambda axis: _weight(
            target,
            axis,
            FakeQuantize.with_args(
                observer=MovingAveragePerChannelMinMaxObserver,
                averaging_constant=1.0,
                eps=EPS,
                ch_axis=axis,  # the library hands it on to observers only
            ),
        ),
        _exact(target, exact),
    )


def calibration_quantizer(target: Target, exact: Exact) -> FusionQuantizer:
    """Return a quantizer that only watches; its memory does not grow with the samples."""
    return FusionQuantizer(
        lambda key: _observed(target, HistogramObserver.with_args(eps=EPS)),
        lambda axis: _weight(target, axis, PerChannelMinMaxObserver.with_args(eps=EPS)),
        _exact(target, exact),
    )


def integer_quantizer(
    target: Target, parameters: Mapping[str, Parameters], exact: Exact
) -> FusionQuantizer:
    """Return a quantizer that gives every tensor its known parameters.

    Raises:
        KeyError: while annotating a tensor that has none.
    """
    return FusionQuantizer(
        lambda key: _fixed(target, *parameters[key]),
        lambda axis: _weight(target, axis, PerChannelMinMaxObserver.with_args(eps=EPS)),
        _exact(target, exact),
        moved=True,
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


def _weight(target: Target, axis: int, observer: Callable[..., object]) -> QuantizationSpecBase:
    limit = 2 ** (target.weight_bits - 1) - 1
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-limit,
        quant_max=limit,
        qscheme=torch.per_channel_symmetric,
        ch_axis=axis,
        observer_or_fake_quant_ctr=observer,
    )
