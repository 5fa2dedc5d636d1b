"""The latency of a model at widths that were never built, predicted from its layers.

A model is profiled once, in the precision that ships. Of each convolution and linear layer the
cost at other widths comes from a table of layers timed alone; what stands between the layers
(additions, poolings, changes of layout) follows the channels that it moves. Shen et al., "HALP:
Hardware-Aware Latency Pruning", https://arxiv.org/abs/2110.10811, and Yang et al., "NetAdapt",
https://arxiv.org/abs/1804.03230, rest on tables of this kind.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from torch import nn

from deploykit.artifacts import Candidate, OnnxModel
from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.latency_parts import Part, latency_parts
from deploykit.layer_shapes import LayerShape, is_inside, layer_shapes
from deploykit.measure import Latency, measure_latency
from deploykit.measure.layer_times import LayerTimes
from deploykit.precision import convert
from deploykit.publish import write_json
from deploykit.quantize import calibrate, random_samples
from deploykit.structure import example_input
from deploykit.targets import Target, can_be_profiled
from deploykit.widths import Widths, output_width, read_widths

SECONDS, PRECISION = 2.0, 0.02  # to time a model
# What gives up weights is judged by the least that the rounds allow: their doubt must be smaller
# than the margin that is judged by.
JUDGED_PRECISION = 0.01


@dataclass(frozen=True)
class Profile:
    """A model as it was timed: its latency, where that goes, and its layers in integers."""

    measured_ms: float
    parts: tuple[Part, ...]
    integer: frozenset[str]


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
        gone = {layer for layer in self.shapes if is_inside(layer, removed)}
        kept = [part for part in self.parts if part.layer not in gone]
        shapes = {
            layer: shape.with_widths(widths.get(layer, self.widths[layer]))
            for layer, shape in self.shapes.items()
            if layer not in gone
        }
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


@dataclass
class LatencyCost:
    """The latency of a candidate as it ships, and of what pruning makes of it.

    What is measured is kept in ``record`` before anyone decides by it, so that a run that is
    resumed decides the same.

    Attributes:
        candidate: a float one, whole.
        target: this machine's, or one whose kernels it has.
        precision: in which it ships: int8, or a recipe's floats. Ranges of integers do not change
            the latency, so that a few random samples are enough to set them.
        times: the table of layers.
        keep_float: shell patterns of layers that ship in float beside integers.
        record: file of the run; None keeps nothing.
    """

    candidate: Candidate
    target: Target
    precision: str
    times: LayerTimes
    keep_float: Sequence[str] = ()
    record: Path | None = None
    _known: bool = False
    _profile: Profile | None = None
    _model: LatencyModel | None = None
    _speedups: dict[str, float] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        """Whether this machine is the target, and one whose nodes can be timed."""
        return can_be_profiled(self.target)

    def predict(self, widths: Widths, removed: Collection[str] = ()) -> float:
        """Return the predicted latency at batch 1; milliseconds."""
        return self.model.predict(widths, removed)

    def measure(self, module: nn.Module, removed: Collection[str] = ()) -> float:
        """Return the latency at batch 1 of a pruned module, by its ratio to the whole model.

        Args:
            module: the pruned module.
            removed: blocks that are gone from it.
        """
        whole = self.model.measured_ms
        if module is self.candidate.module:
            return whole
        return whole / self.speedup(module, removed)

    def speedup(self, module: nn.Module, removed: Collection[str] = ()) -> float:
        """Return how many times faster than the whole model a pruned one is, as they ship."""
        structure = {**self.candidate.structure, "removed": sorted(removed)}
        pruned = replace(self.candidate, module=module, structure=structure)
        return self._speedup(_shape_key(pruned), lambda: self._beside(pruned).ratio)

    def compare(self, candidate: Candidate) -> float:
        """Return how many times faster than the whole model another candidate is shown to be.

        As they ship; where the rounds leave that undecided it is the least that they allow.
        """
        key = f"{candidate.stage} {_shape_key(candidate)}"
        return self._speedup(key, lambda: self._beside(candidate, JUDGED_PRECISION).shown)

    def _speedup(self, key: str, measure: Callable[[], float]) -> float:
        self._read()
        if key not in self._speedups:
            self._speedups[key] = measure()
            self._keep()
        return self._speedups[key]

    def _beside(self, candidate: Candidate, precision: float = PRECISION) -> Latency:
        with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
            models = {
                "whole": self._ship(self.candidate, Path(folder) / "whole.onnx"),
                "other": self._ship(candidate, Path(folder) / "other.onnx"),
            }
            return _batch_one(models, self.times.threads, precision)["other"]

    @property
    def model(self) -> LatencyModel:
        """The whole model's latency, profiled on first use or read from the record."""
        self._read()
        if self._profile is None:
            self._profile = self._measured()
        if self._model is None:
            shapes = layer_shapes(self.candidate.module, example_input(self.candidate, batch=2))
            precision = self.target.activation_dtype
            shapes = {
                layer: replace(shape, precision=precision)
                if layer in self._profile.integer
                else shape
                for layer, shape in shapes.items()
            }
            widths = read_widths(self.candidate.module)
            profile = self._profile
            self._model = LatencyModel(
                profile.measured_ms, profile.parts, shapes, widths, self.times
            )
        return self._model

    def _measured(self) -> Profile:
        threads = self.times.threads
        layers = layer_shapes(self.candidate.module, example_input(self.candidate, batch=2))
        with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
            model = self._ship(self.candidate, Path(folder) / "whole.onnx")
            measured_ms = _batch_one({"whole": model}, threads)["whole"].median_ms
            parts = latency_parts(model, layers, threads=threads, measured_ms=measured_ms)
            integer = fused_operators(model, threads).integer
        return Profile(measured_ms, parts, frozenset(integer))

    def _ship(self, candidate: Candidate, path: Path) -> OnnxModel:
        if self.precision == "int8":
            candidate = calibrate(
                candidate,
                random_samples(candidate),
                target=self.target,
                keep_float=self.keep_float,
            )
        elif self.precision != "fp32":
            candidate = convert(candidate, self.precision)
        return export_onnx(candidate, path, name="model")

    def _keep(self) -> None:
        """Write what was measured, before anyone decides by it."""
        if self.record is None:
            return
        profile = self._profile
        write_json(
            self.record,
            {
                "schema": 1,
                "profile": None
                if profile is None
                else {
                    "measured_ms": profile.measured_ms,
                    "parts": [asdict(part) for part in profile.parts],
                    "integer": sorted(profile.integer),
                },
                "layers": {key: self.times.costs[key] for key in sorted(self.times.asked)},
                "speedups": self._speedups,
            },
        )

    def _read(self) -> None:
        """Take up the record, once."""
        if self._known:
            return
        self._known = True
        if self.record is None or not self.record.exists():
            return
        found = json.loads(self.record.read_text(encoding="utf-8"))
        self.times.costs.update(found["layers"])
        self.times.asked.update(found["layers"])
        self._speedups.update(found["speedups"])
        if (profile := found["profile"]) is not None:
            parts = tuple(Part(**part) for part in profile["parts"])
            self._profile = Profile(profile["measured_ms"], parts, frozenset(profile["integer"]))


def _shape_key(candidate: Candidate) -> str:
    removed = sorted(candidate.structure.get("removed", ()))
    told = json.dumps([read_widths(candidate.module), removed], sort_keys=True)
    return sha256(told.encode()).hexdigest()


def _batch_one(
    models: Mapping[str, OnnxModel], threads: int, precision: float = PRECISION
) -> dict[str, Latency]:
    measured = measure_latency(
        models,
        threads=threads,
        baseline="whole",
        batch_sizes=(1,),
        precision=precision,
        seconds_per_model=SECONDS * (PRECISION / precision) ** 2,  # as a median narrows
    )
    return {name: latency["1"] for name, latency in measured.items()}
