"""The latency of a model at widths that were never built, predicted from its layers.

A model is profiled once, in the precision that ships. Of each convolution and linear layer the
cost at other widths comes from a table of layers timed alone; what stands between the layers
(additions, poolings, changes of layout) follows the channels that it moves. Shen et al., "HALP:
Hardware-Aware Latency Pruning", https://arxiv.org/abs/2110.10811, and Yang et al., "NetAdapt",
https://arxiv.org/abs/1804.03230, rest on tables of this kind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.artifacts import Candidate
from deploykit.exporter import export_onnx
from deploykit.fusion import FLOAT_LAYERS, INTEGER_LAYERS, fused_operators, written_names
from deploykit.measure import measure_latency
from deploykit.measure.layers import LayerShape, LayerTimes
from deploykit.measure.profile import NodeTime, profile_nodes
from deploykit.models.modes import evaluating
from deploykit.quantize import calibrate
from deploykit.structure import example_input
from deploykit.targets import Target
from deploykit.widths import output_width, read_widths

Widths = Mapping[str, Mapping[str, int]]
SECONDS = 2.0  # to time the whole model


@dataclass(frozen=True)
class Part:
    """A share of the model's latency that one layer decides.

    Attributes:
        layer: name of the module; "" where no layer decides.
        ms: what it takes in the model as it is.
        moved: the part of ``ms`` that follows the layer's output channels; the rest of what
            is no kernel stays for as long as the layer does.
        kernel: whether it is the layer itself, whose cost the table tells.
    """

    layer: str
    ms: float
    moved: float
    kernel: bool


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the latency at batch 1 of a model whose layers have other widths.

    Attributes:
        measured_ms: latency of the model as it is.
        parts: where that time goes; they add up to ``measured_ms``.
        shapes: each layer as it is.
        widths: of each layer as it is, see `read_widths`.
        times: the table of layers.
    """

    measured_ms: float
    parts: tuple[Part, ...]
    shapes: Mapping[str, LayerShape]
    widths: Widths
    times: LayerTimes

    def predict(self, widths: Widths, removed: Collection[str] = ()) -> float:
        """Return the latency in milliseconds.

        Args:
            widths: of the layers that differ.
            removed: names of modules that are gone, with all that is in them.
        """
        return sum(self.layer_ms(widths, removed).values())

    def layer_ms(self, widths: Widths, removed: Collection[str] = ()) -> dict[str, float]:
        """Return what each layer takes with all that follows it; ``""`` is what stays."""
        gone = {layer for layer in self.shapes if _inside(layer, removed)}
        kept = [part for part in self.parts if part.layer not in gone]
        shapes = {layer: self._shape(layer, widths) for layer in self.shapes.keys() - gone}
        costs = self.times.ask([*shapes.values(), *self.shapes.values()])
        spent = dict.fromkeys([part.layer for part in kept], 0.0)
        for part in kept:
            spent[part.layer] += self._ms(part, shapes, widths, costs)
        return spent

    def _ms(
        self,
        part: Part,
        shapes: Mapping[str, LayerShape],
        widths: Widths,
        costs: Mapping[LayerShape, float],
    ) -> float:
        if not part.layer:
            return part.ms
        if part.kernel:
            return part.ms * costs[shapes[part.layer]] / costs[self.shapes[part.layer]]
        before = output_width(self.widths[part.layer])
        after = output_width(widths.get(part.layer, self.widths[part.layer]))
        return part.ms + part.moved * (after / before - 1)

    def _shape(self, layer: str, widths: Widths) -> LayerShape:
        shape, found = self.shapes[layer], widths.get(layer)
        if found is None:
            return shape
        inputs = found.get("in_channels", found.get("in_features", 0))
        return replace(
            shape, inputs=inputs, outputs=output_width(found), groups=found.get("groups", 1)
        )


def _inside(layer: str, modules: Collection[str]) -> bool:
    return any(layer == module or layer.startswith(f"{module}.") for module in modules)


def measure_latency_model(
    candidate: Candidate,
    times: LayerTimes,
    *,
    target: Target,
    quantized: bool,
    samples: np.ndarray | None = None,
) -> LatencyModel:
    """Export, profile and time a candidate as it will ship.

    Args:
        candidate: a float one.
        times: the table of layers, which grows.
        target: this machine's, or one whose kernels it has.
        quantized: whether it ships in integers; ranges do not change the latency, so some
            samples are enough.
        samples: for the ranges, as `calibrate` takes them; random ones by default.
    """
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        if quantized:
            if samples is None:
                samples = _random_samples(candidate)
            candidate = calibrate(candidate, samples, target=target)
        model = export_onnx(candidate, Path(folder) / "model.onnx", name="model")
        latency = measure_latency(
            {"model": model},
            threads=times.threads,
            baseline="model",
            batch_sizes=(1,),
            seconds_per_model=SECONDS,
        )["model"]["1"]
        nodes = profile_nodes(model, threads=times.threads)
        integer = set(fused_operators(model, times.threads).integer) if quantized else set()
        names = written_names(model, [node.name for node in nodes], times.threads)
    shapes = layer_shapes(candidate.module, example_input(candidate, batch=2))
    precision = target.activation_dtype
    shapes = {
        layer: replace(shape, precision=precision) if layer in integer else shape
        for layer, shape in shapes.items()
    }
    parts = _parts(nodes, names, shapes, latency.median_ms)
    return LatencyModel(latency.median_ms, parts, shapes, read_widths(candidate.module), times)


def _random_samples(candidate: Candidate) -> np.ndarray:
    generator, spec = np.random.default_rng(0), candidate.signature.inputs[0]
    shape = (32, *spec.shape[1:])
    if spec.dtype == "uint8":
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape).astype(spec.dtype)


def layer_shapes(module: nn.Module, example: Tensor) -> dict[str, LayerShape]:
    """Return the shape of each convolution and linear layer that a forward pass calls."""
    shapes: dict[str, LayerShape] = {}
    hooks = [
        layer.register_forward_hook(_note_shape(name, shapes))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
    ]
    try:
        with torch.no_grad(), evaluating(module):
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _note_shape(name: str, shapes: dict[str, LayerShape]) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        size = tuple(inputs[0].shape[1:])
        if isinstance(layer, nn.Linear):
            shapes[name] = LayerShape("linear", layer.in_features, layer.out_features, size[:-1])
            return
        padding = layer.padding if isinstance(layer.padding, tuple) else _same_padding(layer)
        shapes[name] = LayerShape(
            "transposed" if layer.transposed else "conv",
            layer.in_channels,
            layer.out_channels,
            size[1:],
            layer.groups,
            tuple(layer.kernel_size),
            tuple(layer.stride),
            tuple(padding),
            tuple(layer.dilation),
        )

    return hook


def _same_padding(layer: Any) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    pairs = zip(layer.kernel_size, layer.dilation, strict=True)
    return tuple(step * (size - 1) // 2 for size, step in pairs)


def _parts(
    nodes: Sequence[NodeTime],
    names: Mapping[str, str],
    layers: Iterable[str],
    measured_ms: float,
) -> tuple[Part, ...]:
    """Give every executed node to the layer that decides what it takes.

    The profiler's own time, the same for each node, is taken off; what a call costs beside its
    nodes is spread over them.
    """
    known = set(layers)
    overhead = max(0.0, sum(n.microseconds for n in nodes) - 1000 * measured_ms) / len(nodes)
    least = min(node.microseconds for node in nodes) / 2
    net = {node.name: max(least, node.microseconds - overhead) for node in nodes}
    scale = measured_ms / sum(net.values())
    smallest = min(net.values())
    deciding: dict[str, str] = {}
    order: dict[str, int] = {}
    parts = []
    for place, node in enumerate(nodes):
        kernel = node.operator in INTEGER_LAYERS | FLOAT_LAYERS
        layer = names.get(node.name, "") if kernel else ""
        if layer not in known:
            kernel = False
            before = [deciding[name] for name in node.reads if deciding.get(name)]
            layer = max(before, key=lambda name: order[name], default="")
        if layer:
            deciding[node.name] = layer
            order.setdefault(layer, place)
        ms = scale * net[node.name]
        parts.append(Part(layer, ms, 0.0 if kernel else ms - scale * smallest, kernel))
    return tuple(parts)
