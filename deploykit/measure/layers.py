"""Where the time of a model goes, layer by layer, as ONNX Runtime's own profiler says."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from deploykit.artifacts import OnnxModel
from deploykit.measure.profile import WARM_UP_RUNS, Profiler

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
# What ONNX Runtime appends to the name of a node, or of its output, that it made another one of.
SUFFIX = re.compile(r"(_token_\d+|_nchwc|_quant|/.*)$")


def measure_layers(
    models: Mapping[str, OnnxModel], *, threads: int, rounds: int = 30
) -> dict[str, dict[str, float]]:
    """Return the milliseconds of every layer at batch 1, by model and by the layer's name.

    Models take turns, run by run. What follows a layer up to the next one (activations, sums,
    conversions) counts as its own, so that a layer in integers can be compared with the same
    one in float. A median of single runs under a profiler ranks layers; whether a model is
    faster `measure_latency` says.

    Args:
        models: name -> model.
        threads: threads inside an operator.
        rounds: runs of each model.

    Raises:
        ModelError: ONNX Runtime cannot open a model.
    """
    profilers = {name: Profiler.of(model, threads=threads) for name, model in models.items()}
    for _ in range(WARM_UP_RUNS + rounds):
        for profiler in profilers.values():
            profiler.run(1)
    return {name: _by_layer(_medians(profilers[name]), models[name]) for name in models}


def _medians(profiler: Profiler) -> dict[str, float]:
    """Return the median milliseconds of every node, in the order in which they ran."""
    return {
        name: float(np.median(durations[WARM_UP_RUNS:])) / 1000
        for (name, _), durations in profiler.finish().items()
    }


def _by_layer(nodes: Mapping[str, float], model: OnnxModel) -> dict[str, float]:
    import onnx

    owners = _owners(onnx.load(model.path, load_external_data=False).graph)
    layers: dict[str, float] = defaultdict(float)
    last = ""
    for name, milliseconds in nodes.items():
        last = next((owners[word] for word in _words(name) if word in owners), last)
        layers[last] += milliseconds
    return {name: round(milliseconds, 6) for name, milliseconds in layers.items()}


def _owners(graph: Any) -> dict[str, str]:
    """Return the layer that each node and each tensor belongs to, "" before the first."""
    owners: dict[str, str] = {}
    for node in graph.node:
        computed = [owners[tensor] for tensor in node.input if tensor in owners]
        layer = node.name if node.op_type in LAYERS else next(filter(None, computed), "")
        owners.update(dict.fromkeys([node.name, *node.output], layer))
    return owners


def _words(name: str) -> Iterator[str]:
    """Yield the name, then what is left of it without one suffix after the other."""
    yield name
    while (shorter := SUFFIX.sub("", name)) != name:
        yield shorter
        name = shorter
