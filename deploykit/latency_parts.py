"""Where the latency of a model goes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deploykit.artifacts import OnnxModel
from deploykit.fusion import FLOAT_LAYERS, INTEGER_LAYERS, written_names
from deploykit.measure.profile import profile_nodes


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


def latency_parts(
    model: OnnxModel, layers: Iterable[str], *, threads: int, measured_ms: float
) -> tuple[Part, ...]:
    """Give every executed node to the layer that decides what it takes.

    The profiler's own time, the same for each node, is taken off; what a call costs beside its
    nodes is spread over them.

    Args:
        model: any model that ONNX Runtime opens on the CPU.
        layers: names of its convolutions and linear layers.
        threads: threads inside an operator.
        measured_ms: its latency at batch 1, which the parts add up to; milliseconds.

    Raises:
        ModelError: ONNX Runtime cannot open it.
    """
    nodes = profile_nodes(model, threads=threads)
    names = written_names(model, [node.name for node in nodes], threads)
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


def latency_by_layer(
    model: OnnxModel, layers: Iterable[str], *, threads: int, measured_ms: float
) -> dict[str, float]:
    """Return what each layer takes with all that follows it; milliseconds at batch 1.

    ``""`` is what no layer decides; see `latency_parts` for the arguments.
    """
    spent: dict[str, float] = {}
    for part in latency_parts(model, layers, threads=threads, measured_ms=measured_ms):
        spent[part.layer] = spent.get(part.layer, 0.0) + part.ms
    return spent
