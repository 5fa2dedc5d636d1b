"""The module that ships: raw inputs in, logits out, in the precision of the candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from deploykit.artifacts import Candidate
from deploykit.quantization.graphs import integer_graph, trace
from deploykit.quantization.layers import module_of
from deploykit.quantization.recurrent import integer_recurrence, round_recurrent
from deploykit.quantization.rules import Parameters
from deploykit.runtime import zero_point_and_scale
from deploykit.structure import example_input
from deploykit.targets import CPU, Target, resolve_target

PIXELS = "input:0"  # the key of the first input's quantization parameters


class FromPixels(nn.Module):
    """Feeds raw pixels to a graph: uint8 ``(N, H, W, C)`` in, what the graph returns out.

    Normalization is written as the dequantization of the pixels, which are the first integers
    of the model: an integer kernel reads them as they are, a float one after one operator.
    TensorRT knows no uint8 but a cast right behind the input, and no zero point but 0; for it
    (and for halves, which GPUs compute) normalization is arithmetic, and what comes out of it
    is quantized like any other value.

    Args:
        graph: takes normalized floats.
        preprocess: holds ``mean`` and ``std``.
        dequantize: whether pixels are the first integers.
    """

    zero_points: Tensor
    scales: Tensor

    def __init__(
        self, graph: nn.Module, preprocess: Mapping[str, Any], *, dequantize: bool = True
    ) -> None:
        super().__init__()
        self.from_integers = dequantize
        self.inner = graph  # not "graph": that is the name of a GraphModule's own attribute
        zero_point, scale = zero_point_and_scale(preprocess)
        self.shared = len(scale) == 1
        self.zero_point, self.scale = int(zero_point[0]), float(scale[0])
        self.register_buffer("zero_points", torch.from_numpy(zero_point), persistent=False)
        self.register_buffer("scales", torch.from_numpy(scale), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Normalize and answer."""
        values = self._dequantized(image) if self.from_integers else self._computed(image)
        answer: Tensor = self.inner(values)
        return answer

    def _computed(self, image: Tensor) -> Tensor:
        pixels = _channels_first(image.float())
        return (pixels - self.zero_points.view(1, -1, 1, 1)) * self.scales.view(1, -1, 1, 1)

    def _dequantized(self, image: Tensor) -> Tensor:
        pixels = _channels_first(image)
        integers = torch.ops.quantized_decomposed
        if self.shared:
            normalized: Tensor = integers.dequantize_per_tensor(
                pixels, self.scale, self.zero_point, 0, 255, torch.uint8
            )
        else:
            normalized = integers.dequantize_per_channel(
                pixels, self.scales, self.zero_points, 1, 0, 255, torch.uint8
            )
        return normalized


def _channels_first(image: Tensor) -> Tensor:
    """Turn ``(N, H, W, C)`` to ``(N, C, H, W)`` with the strides that training has.

    Others would fail a view, those of one channel among them; a clone exports as nothing.
    """
    return image.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def exact_inputs(candidate: Candidate, target: Target) -> dict[str, Parameters]:
    """Return scale and zero point of inputs that are integers on one grid as they come, by key."""
    preprocess = candidate.signature.preprocess
    if preprocess is None or target.activation_dtype != "uint8":
        return {}
    zero_point, scale = zero_point_and_scale(preprocess)
    return {PIXELS: (float(scale[0]), int(zero_point[0]))} if len(scale) == 1 else {}


def candidate_graph(candidate: Candidate) -> GraphModule:
    """Return the graph of a candidate: integer if it is quantized, else float.

    It takes what the candidate's module takes.

    Raises:
        ModelError: the module cannot be traced.
        CompressionError: the quantization parameters do not fit the module.
    """
    if not candidate.structure.get("quantization"):
        return trace(candidate.module, example_input(candidate, batch=2))
    arguments = quantized_with(candidate)
    graph, (_, _, target, *_, keep_float) = integer_graph(*arguments), arguments
    if target.providers != (CPU,):
        return graph
    return round_recurrent(graph, keep_float, target.weight_bits)


def quantized_with(
    candidate: Candidate,
) -> tuple[nn.Module, Tensor, Target, dict[str, Parameters], dict[str, Parameters], frozenset[str]]:
    """Return what makes the graphs of a quantized candidate: the arguments of `integer_graph`."""
    quantization = candidate.structure["quantization"]
    target = resolve_target(quantization["target"])
    return (
        candidate.module,
        example_input(candidate, batch=2),
        target,
        {key: (scale, zero) for key, (scale, zero) in quantization["parameters"].items()},
        exact_inputs(candidate, target),
        frozenset(quantization.get("keep_float", ())),
    )


def leave_recurrence_in_float(candidate: Candidate) -> Candidate | None:
    """Return ``candidate`` with its LSTM layers in float, None where none is in integers.

    Torch cannot foresee the integers that ONNX Runtime finds at run time: proof alone tells
    whether a model bears them.
    """
    quantization = candidate.structure.get("quantization")
    if not quantization or resolve_target(quantization["target"]).providers != (CPU,):
        return None
    graph = trace(candidate.module, example_input(candidate, batch=2)).graph
    kept = frozenset(quantization.get("keep_float", ()))
    found = {module_of(node) for node in integer_recurrence(graph, kept)}
    if not found:
        return None
    quantization = {**quantization, "keep_float": sorted(kept | found)}
    return replace(candidate, structure={**candidate.structure, "quantization": quantization})


def deployable(candidate: Candidate, graph: nn.Module) -> nn.Module:
    """Return the module that takes what a client sends."""
    preprocess, structure = candidate.signature.preprocess, candidate.structure
    if preprocess is None:
        return graph
    quantization, halves = structure.get("quantization"), structure.get("precision") == "fp16"
    symmetric = quantization is not None and resolve_target(quantization["target"]).symmetric
    return FromPixels(graph, preprocess, dequantize=not (halves or symmetric))


def raw_example(candidate: Candidate, batch: int) -> Tensor:
    """Return an example of what a client sends, zeros of the signature's dtype and shape."""
    spec = candidate.signature.inputs[0]
    return torch.zeros(batch, *spec.shape[1:], dtype=getattr(torch, spec.dtype))
