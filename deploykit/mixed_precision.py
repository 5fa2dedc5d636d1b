"""Which layers are not faster in integers on the target, and stay in float: found by measurement.

An integer kernel can be slower than its float twin: a first layer of three channels, a depthwise
convolution of an odd width. Alone such a layer gains nothing in float, because the changes of
type and layout at its borders cost more; a run of neighbouring layers can.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.artifacts import Candidate, JsonDict, OnnxModel
from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.latency_parts import latency_by_layer
from deploykit.layer_shapes import layer_shapes
from deploykit.measure import measure_latency
from deploykit.publish import write_json
from deploykit.quantize import calibrate, random_samples
from deploykit.structure import example_input
from deploykit.targets import Target

BORDERS = (0.0, 0.005, 0.01, 0.02, 0.04)  # what a border may cost, as a share of the latency
# Of a speed-up that counts: integers are smaller, and what is less than this noise may decide.
WORTH = 1.05
SECONDS = 2.0  # to time a model


@dataclass(frozen=True)
class Mixture:
    """Layers in float, and what that was measured to bring.

    Attributes:
        keep_float: names of modules.
        speedup: at batch 1 over all layers in integers that can be.
        tried: the speed-up of every set of layers that was timed, by their names.
    """

    keep_float: tuple[str, ...] = ()
    speedup: float = 1.0
    tried: Mapping[str, float] | None = None

    @property
    def told(self) -> str:
        """Say what stays in float, and what for, to end a sentence; nothing where nothing does."""
        if not self.keep_float:
            return ""
        return f"; {', '.join(self.keep_float)} in float, {self.speedup:.2f}x faster for it"

    def to_json(self) -> JsonDict:
        """Return plain JSON."""
        return {
            "schema": 1,
            "keep_float": list(self.keep_float),
            "speedup": self.speedup,
            "tried": dict(self.tried or {}),
        }


def fastest_mixture(
    candidate: Candidate,
    *,
    target: Target,
    threads: int,
    keep_float: Sequence[str] = (),
    record: Path | None = None,
) -> Mixture:
    """Find the layers that are better left in float for the sake of speed at batch 1.

    Both models are profiled, and each layer's times compared. Where the integers of a layer are
    slower, runs of neighbouring layers are chosen under several prices of a border between types;
    each choice is built and timed beside the others, and the fastest counts.

    Args:
        candidate: a float one; ranges do not change the latency, so random samples set them.
        target: this machine.
        threads: threads inside an operator.
        keep_float: shell patterns of layers that stay in float anyway.
        record: file of what was measured, written before anyone decides by it; read in place of
            a measurement where it exists.
    """
    if record is not None and record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        return Mixture(tuple(found["keep_float"]), found["speedup"], found["tried"])
    mixture = _measured(candidate, target, threads, keep_float)
    if record is not None:
        write_json(record, mixture.to_json())
    return mixture


def _measured(
    candidate: Candidate, target: Target, threads: int, keep_float: Sequence[str]
) -> Mixture:
    samples = random_samples(candidate)
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:

        def ship(kept: Iterable[str], name: str) -> OnnxModel:
            quantized = calibrate(
                candidate, samples, target=target, keep_float=[*keep_float, *kept]
            )
            return export_onnx(quantized, Path(folder) / f"{name}.onnx", name="model")

        models = {
            "float": export_onnx(candidate, Path(folder) / "float.onnx", name="model"),
            "integer": ship((), "integer"),
        }
        gains = _gains(candidate, models, threads)
        choices = [kept for kept in layers_to_try(gains) if set(kept) < gains.keys()]
        if not choices:
            return Mixture()
        models |= {str(place): ship(kept, str(place)) for place, kept in enumerate(choices)}
        measured = measure_latency(
            models, threads=threads, baseline="integer", batch_sizes=(1,), seconds_per_model=SECONDS
        )
    speeds = [measured[str(place)]["1"] for place in range(len(choices))]
    tried = {", ".join(kept): one.ratio for kept, one in zip(choices, speeds, strict=True)}
    best = max(range(len(choices)), key=lambda place: speeds[place].ratio)
    if speeds[best].interval[0] < WORTH:
        return Mixture(tried=tried)
    return Mixture(choices[best], speeds[best].ratio, tried)


def _gains(candidate: Candidate, models: Mapping[str, OnnxModel], threads: int) -> dict[str, float]:
    """Return what each integer layer would gain in float, as a share of the model's latency."""
    layers = layer_shapes(candidate.module, example_input(candidate, batch=2))
    latencies = measure_latency(
        models, threads=threads, baseline="integer", batch_sizes=(1,), seconds_per_model=SECONDS
    )
    whole = {name: latency["1"].median_ms for name, latency in latencies.items()}
    spent = {
        name: latency_by_layer(model, layers, threads=threads, measured_ms=whole[name])
        for name, model in models.items()
    }
    integer = set(fused_operators(models["integer"], threads).integer)
    return {
        layer: (spent["integer"].get(layer, 0.0) - spent["float"].get(layer, 0.0))
        / whole["integer"]
        for layer in layers
        if layer in integer
    }


def layers_to_try(gains: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return sets of layers that may be faster in float, for several prices of a border.

    Args:
        gains: what each layer gains in float, in the order of execution; 1 is the whole latency.
    """
    found = [_cheapest(gains, border) for border in BORDERS]
    return [kept for place, kept in enumerate(found) if kept and kept not in found[:place]]


def _cheapest(gains: Mapping[str, float], border: float) -> tuple[str, ...]:
    """Choose float or integer for each layer of a chain, so that gains less borders are most.

    The model takes integers and its last layer gives floats: only the first border has a price
    at the ends (Viterbi 1967, with two states).
    """
    best: dict[bool, tuple[float, tuple[str, ...]]] = {False: (0.0, ()), True: (-border, ())}
    for layer, gain in gains.items():
        stay, leave = best[False], best[True]
        integer = max(stay, (leave[0] - border, leave[1]), key=lambda one: one[0])
        floating = max(leave, (stay[0] - border, stay[1]), key=lambda one: one[0])
        best = {False: integer, True: (floating[0] + gain, (*floating[1], layer))}
    return max(best.values(), key=lambda one: one[0])[1]
