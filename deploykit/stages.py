"""What every stage of a run has to show: its ONNX file, its parity, its measurements."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploykit.artifacts import Candidate, JsonDict, OnnxModel
from deploykit.data import Dataset
from deploykit.environment import environment
from deploykit.errors import UsageError
from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.latency_parts import latency_by_layer
from deploykit.layer_shapes import layers_of
from deploykit.measure import (
    Evaluation,
    Latency,
    count_macs,
    count_parameters,
    evaluate_onnx,
    measure_latency,
    measure_normalization,
    peak_memory_bytes,
    size_bytes,
)
from deploykit.recipe.sections import Recipe
from deploykit.run_folder import RunFolder
from deploykit.structure import example_input
from deploykit.targets import CPU, resolve_target, why_not_here
from deploykit.verify import Parity, verify_onnx

BATCHES = ("1", "32")  # samples a run, as keys of the measurements


@dataclass(frozen=True)
class Stage:
    """A candidate and the model that was written, verified and evaluated for it.

    Attributes:
        candidate: what the stage made.
        model: the very file that is measured and, if it is the last, ships.
        parity: ONNX Runtime against torch.
        validation: answers of ``model`` to the validation split.
        seconds: what this process took for the stage, training and proof.
    """

    candidate: Candidate
    model: OnnxModel
    parity: Parity
    validation: Evaluation
    seconds: float

    @property
    def name(self) -> str:
        """The stage's word, such as ``train`` or ``quantize``."""
        return self.candidate.stage

    @property
    def fits(self) -> list[JsonDict]:
        """The trainings of the stage in their order, as `FitResult.to_json` gives them."""
        notes = self.candidate.notes
        return [*([notes["fit"]] if "fit" in notes else []), *notes.get("recovery", [])]


def prove(
    candidate: Candidate, recipe: Recipe, run: RunFolder, dataset: Dataset, *, started: float
) -> Stage:
    """Write ``candidate`` as ONNX, verify it against torch and evaluate it.

    Raises:
        ExportError: it cannot be written.
        VerificationError: ONNX Runtime does not answer what torch answers.
    """
    path = run.onnx(candidate.stage)
    path.parent.mkdir(exist_ok=True)
    model = export_onnx(candidate, path, name=recipe.name)
    parity = verify_onnx(
        candidate, model, dataset.validation, recipe.verify, threads=recipe.threads
    )
    validation = evaluate_onnx(model, dataset.validation, threads=recipe.threads)
    return Stage(candidate, model, parity, validation, time.monotonic() - started)


def measure_stages(
    stages: list[Stage], recipe: Recipe, run: RunFolder, replay: Mapping[str, JsonDict] | None
) -> dict[str, JsonDict]:
    """Return latency and memory of every stage, measured together or read back.

    What was measured is written before anyone reads it, so that a resumed run decides by the
    same numbers.

    Args:
        stages: the first one is the baseline.
        recipe: threads of the measurement.
        run: keeps ``measurements.json``.
        replay: measurements of an earlier run to use instead, by stage.
    """
    written = {stage.name: _sha256(stage.model) for stage in stages}
    known = run.read_json("measurements.json")
    if known is not None and known.get("models") == written:
        kept: dict[str, JsonDict] = known["stages"]
        return kept
    if replay is None:
        measured = _measured(stages, recipe)
    else:
        measured = {stage.name: _replayed(stage.name, replay) for stage in stages}
    run.write_json(
        "measurements.json",
        {"schema": 1, "models": written, "threads": recipe.threads, "stages": measured},
    )
    return measured


def _replayed(stage: str, replay: Mapping[str, JsonDict]) -> JsonDict:
    if stage not in replay:
        raise UsageError(
            f"--latency-table: expected measurements of {stage} in this trial, got only those of "
            f"{', '.join(replay)}; take the measurements.json of this recipe, or --resume without"
        )
    return replay[stage]


def _measured(stages: list[Stage], recipe: Recipe) -> dict[str, JsonDict]:
    """Measure on the target; what this machine cannot take is None, never borrowed."""
    target = resolve_target(recipe.target)
    on_cpu = target.providers == (CPU,)
    if why_not_here(target) is not None:
        unknown = {"latency": dict.fromkeys(BATCHES), "peak_memory_bytes": None}
        return {stage.name: dict(unknown) for stage in stages}
    latency = measure_latency(
        {stage.name: stage.model for stage in stages},
        threads=recipe.threads,
        baseline=stages[0].name,
        target=target,
    )
    taken = {"target": target.name, "measured_on": environment()}
    measured: dict[str, JsonDict] = {
        stage.name: {
            **taken,
            "latency": {batch: one.to_json() for batch, one in latency[stage.name].items()},
            "peak_memory_bytes": peak_memory_bytes(stage.model, recipe.threads) if on_cpu else None,
        }
        for stage in stages
    }
    for stage in stages if on_cpu else ():
        measured[stage.name]["layers_ms"] = latency_by_layer(
            stage.model,
            layers_of(stage.candidate.module),
            threads=recipe.threads,
            measured_ms=latency[stage.name]["1"].median_ms,
        )
    for stage in stages:
        if stage.model.signature.takes_images and on_cpu:
            measured[stage.name]["normalization"] = measure_normalization(
                stage.model, threads=recipe.threads
            )
    return measured


def read_measurements(path: Path) -> list[dict[str, JsonDict]]:
    """Return the stages of each trial in a ``measurements.json``, to decide by them again.

    Raises:
        UsageError: it is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        trials: list[dict[str, JsonDict]] = content.get("trials") or [content["stages"]]
        for measured in [one for stages in trials for one in stages.values()]:
            if measured["peak_memory_bytes"] is not None:  # as on a GPU
                int(measured["peak_memory_bytes"])
            dict(measured.get("measured_on") or {})
            for batch in BATCHES:
                Latency.from_json(measured["latency"][batch])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"--latency-table: {path}: expected the measurements.json of a run, got "
            f"{type(error).__name__}: {error}; name one"
        ) from error
    return trials


def describe(stage: Stage, measured: JsonDict) -> JsonDict:
    """Return a stage's fields of ``report.json``."""
    candidate = stage.candidate
    example = example_input(candidate, batch=2)
    latency = {
        batch: None if one is None else Latency.from_json(one)
        for batch, one in measured["latency"].items()
    }
    return {
        "name": stage.name,
        "validation_accuracy": stage.validation.accuracy,
        "torch_accuracy": stage.fits[-1]["torch_accuracy"] if stage.fits else None,
        "latency_ms": {batch: one and one.median_ms for batch, one in latency.items()},
        "latency_p90_ms": {batch: one and one.p90_ms for batch, one in latency.items()},
        "speedup": {batch: one and one.ratio for batch, one in latency.items()},
        "speedup_interval": {batch: one and list(one.interval) for batch, one in latency.items()},
        "size_bytes": size_bytes(stage.model),
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "macs": count_macs(candidate.module, example),
        "parameters": count_parameters(candidate.module),
        "seconds": round(max(stage.seconds, _trained_seconds(stage)), 3),
    }


def _trained_seconds(stage: Stage) -> float:
    """Return what the epochs of a stage took, also those before an interruption."""
    return sum((epoch["seconds"] for fit in stage.fits for epoch in fit["history"]), 0.0)


def is_quantized(stage: Stage) -> bool:
    """Whether a stage has activations in integers; recurrent layers alone have none."""
    return bool(stage.candidate.structure.get("quantization", {}).get("parameters"))


def fusion_of(stage: Stage, threads: int) -> JsonDict | None:
    """Say which layers of a quantized stage run in integers; None where the CPU's do not ship."""
    quantization = stage.candidate.structure.get("quantization")
    if not quantization or resolve_target(quantization["target"]).providers != (CPU,):
        return None
    return fused_operators(stage.model, threads).to_json()


def _sha256(model: OnnxModel) -> str:
    return hashlib.sha256(model.path.read_bytes()).hexdigest()
