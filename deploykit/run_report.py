"""From the stages of a run to its Report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from deploykit.artifacts import JsonDict, Report
from deploykit.data import Dataset
from deploykit.decisions import Decision, check_budget, validation_drop
from deploykit.environment import environment
from deploykit.measure import Evaluation, evaluate_onnx
from deploykit.precision import precision_of
from deploykit.recipe.sections import Recipe
from deploykit.stages import Stage, describe, fusion_of
from deploykit.statistics import paired_drop
from deploykit.targets import resolve_target


def make_report(
    recipe: Recipe,
    dataset: Dataset,
    stages: Sequence[Stage],
    measured: Mapping[str, JsonDict],
    *,
    final: Stage,
    decisions: Sequence[Decision],
    commands: Sequence[str],
    trials: Sequence[JsonDict] = (),
    rounding: JsonDict | None = None,
) -> Report:
    """Draw everything together; reads the test split, for the first and the final stage only."""
    baseline = stages[0]
    budget = check_budget(recipe.budget, baseline, final, measured)
    records = {stage.name: describe(stage, measured[stage.name]) for stage in stages}
    test = [
        evaluate_onnx(stage.model, dataset.test, threads=recipe.threads)
        for stage in (baseline, final)
    ]
    drop, interval = paired_drop(test[0].correct, test[1].correct)
    seen, seen_interval = validation_drop(baseline, final)
    return Report(
        name=recipe.name,
        seed=recipe.seed,
        target=recipe.target,
        threads=recipe.threads,
        environment=environment(),
        stages=tuple(records.values()),
        baseline={**records[baseline.name], "accuracy": test[0].accuracy},
        final={**records[final.name], "accuracy": test[1].accuracy},
        drop={
            "value": drop,
            "interval": list(interval),
            "validation": {"value": seen, "interval": list(seen_interval)},
        },
        budget=budget,
        decisions=tuple(decision.to_json() for decision in decisions),
        details={
            **_details(recipe, dataset, stages, measured, final, test, commands),
            "trials": list(trials),
            "rounding": rounding,
        },
    )


def _details(
    recipe: Recipe,
    dataset: Dataset,
    stages: Sequence[Stage],
    measured: Mapping[str, JsonDict],
    final: Stage,
    test: Sequence[Evaluation],
    commands: Sequence[str],
) -> JsonDict:
    fits = {fit["stage"]: fit for stage in stages for fit in stage.fits}
    pruned = [stage.candidate.notes["prune"] for stage in stages if stage.name == "prune"]
    before, after = (evaluation.class_accuracy for evaluation in test)
    fusion = fusion_of(final, recipe.threads)
    details: JsonDict = {
        "curves": {name: fit["history"] for name, fit in fits.items()},
        "trained": {name: fit["trained"] for name, fit in fits.items()},
        "latency": {stage.name: measured[stage.name]["latency"] for stage in stages},
        "measured_on": measured[final.name].get("measured_on"),
        "labels": list(dataset.classes),
        "confusion": {
            "baseline": test[0].confusion.tolist(),
            "final": test[1].confusion.tolist(),
        },
        "per_class": [
            {"label": label, "baseline": one, "final": other}
            for label, one, other in zip(dataset.classes, before, after, strict=True)
        ],
        "parity": {stage.name: stage.parity.to_json() for stage in stages},
        "model": _shipped(final, recipe),
        "input": dict(final.candidate.structure["input"]),
        "normalization": measured[final.name].get("normalization"),
        "layers_ms": _layers_ms(measured[stages[0].name], measured[final.name]),
        "warnings": [*dataset.warnings, *_floats(fusion)],
        "commands": list(commands),
    }
    for notes in pruned:
        details["widths"] = [
            {"layer": layer, "before": old, "after": new}
            for layer, (old, new) in notes["widths"].items()
        ]
        details["left_alone"] = [
            {"layer": layer, "why": why} for layer, why in notes["left_alone"].items()
        ]
        details["pruning"] = {
            key: notes[key] for key in ("removed", "bounds", "sensitivity") if key in notes
        }
    for stage in stages:
        if stage.name in {"surgery", "sparsify", "cluster"}:
            details[stage.name] = stage.candidate.notes[stage.name]
    if fusion is not None:
        details["fusion"] = fusion
    return details


def _layers_ms(before: JsonDict, after: JsonDict) -> list[JsonDict]:
    """Set what each layer takes at batch 1 before and after beside each other."""
    old, new = before.get("layers_ms", {}), after.get("layers_ms", {})
    return [
        {"layer": layer, "before": old.get(layer), "after": new.get(layer)}
        for layer in sorted(
            {**old, **new}, key=lambda layer: (not layer, [*old, *new].index(layer))
        )
    ]


def _shipped(final: Stage, recipe: Recipe) -> JsonDict:
    """Say what ``export`` needs to know of the model that was measured."""
    quantization = final.candidate.structure.get("quantization") or {}
    return {
        "sha256": hashlib.sha256(final.model.path.read_bytes()).hexdigest(),
        "signature": final.model.signature.to_json(),
        "opset": final.model.opset,
        "target": resolve_target(recipe.target).name,
        "integers": quantization.get("target"),
        "quantized": bool(quantization),
        "precision": precision_of(final.candidate),
        "mode": quantization.get("mode"),
    }


def _floats(fusion: JsonDict | None) -> list[str]:
    """Name the layers of a quantized model that stayed in float."""
    layers = [] if fusion is None else fusion["float"]
    return [f"{one['name']} ({one['operator']}) runs in float: {one['why']}" for one in layers]
