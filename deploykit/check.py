"""What a recipe would do, without doing it: ``deploykit compress --check``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deploykit.artifacts import Candidate, JsonDict
from deploykit.data import Dataset
from deploykit.data.pixels import normalize
from deploykit.errors import ModelError
from deploykit.job import check_latencies, read_data
from deploykit.recipe.sections import Recipe
from deploykit.start import initial_candidate, student_candidate
from deploykit.targets import resolve_target
from deploykit.trials import may_try_again

TIMED_STEPS = 3
TEACHING_COST = 1 / 3  # of a step of the teacher: it only answers
QAT_COST = 2.0  # steps of quantization-aware training take about twice as long
PROOF_SECONDS = 15.0  # export, verification and measurement of a stage


def check_recipe(
    recipe: Recipe, replay: Sequence[Mapping[str, JsonDict]] | None = None
) -> list[str]:
    """Read the data, build and trace the model, and say what a run would do.

    Args:
        recipe: with absolute paths.
        replay: latencies from elsewhere, for each trial, by stage.

    Returns:
        Sentences for the reader, the last one with an estimate of the time.

    Raises:
        DeploykitError: whatever the run itself would raise before it trains.
    """
    check_latencies(recipe, replay)
    target = resolve_target(recipe.target)
    dataset = read_data(recipe)
    candidate = initial_candidate(recipe, dataset, None)
    sizes = ", ".join(f"{split.name} {len(split)}" for split in dataset.splits)
    parameters = sum(parameter.numel() for parameter in candidate.module.parameters())
    lines = [
        f"data: {recipe.data.source}: {sizes} samples of {len(dataset.classes)} classes",
        *(f"warning: {warning}" for warning in dataset.warnings),
        f"model: {recipe.model.name}, {parameters:,} parameters",
        f"target: {target.name}",
        *_plan(recipe),
    ]
    seconds = _estimate(recipe, candidate, dataset)
    return [*lines, f"it will take about {_spoken(seconds)} on this machine"]


def _plan(recipe: Recipe) -> list[str]:
    lines = []
    if recipe.train is not None:
        teacher = recipe.train.teacher
        taught = "" if teacher is None else f", learning from {teacher.name} as well"
        lines.append(f"train: {recipe.train.epochs} epochs{taught}")
    if recipe.distill is not None:
        student = recipe.distill.student.name
        lines.append(f"distill: {student} takes its place, {recipe.distill.epochs} epochs")
    if recipe.surgery is not None:
        operated = recipe.surgery
        lines.append(f"surgery: slow operators replaced, {operated.epochs} epochs")
    if recipe.prune is not None:
        prune = recipe.prune
        lines.append(
            f"prune: {_amount(*prune.how_much)} in {prune.steps} step(s), "
            f"{prune.epochs} epochs of recovery each"
        )
    if recipe.sparsify is not None:
        zeros = recipe.sparsify
        lines.append(f"sparsify: {zeros.ratio:.0%} of the weights, {zeros.epochs} epochs, for size")
    if recipe.cluster is not None:
        few = recipe.cluster
        lines.append(f"cluster: {2**few.bits} values a layer, {few.epochs} epochs, for size")
    if recipe.quantize is not None:
        epochs = "" if recipe.quantize.mode == "ptq" else f", {recipe.quantize.epochs} epochs"
        lines.append(f"quantize: {recipe.quantize.mode}{epochs}")
    if recipe.budget is not None and may_try_again(recipe):
        lines.append(
            f"budget: up to {recipe.budget.trials} trials until it holds; the time below is of one"
        )
    return lines


def _amount(key: str, value: float) -> str:
    """Say how much is pruned."""
    return {
        "speedup": f"{value:g}x the speed at batch 1",
        "latency_ms": f"to {value:g} ms at batch 1",
        "macs": f"{value:g}x fewer multiply-accumulates",
        "channel_ratio": f"{value:.0%} of the channels",
    }[key]


def _estimate(recipe: Recipe, candidate: Candidate, dataset: Dataset) -> float:
    """Time a few steps, if any training is asked for, and multiply."""
    whole = recipe.train.epochs if recipe.train else 0
    later = recipe.prune.steps * recipe.prune.epochs if recipe.prune else 0
    later += sum(one.epochs for one in (recipe.surgery, recipe.sparsify, recipe.cluster) if one)
    rounded = recipe.quantize.epochs if recipe.quantize and recipe.quantize.mode != "ptq" else 0
    seconds = (1 + len(recipe.compressors)) * PROOF_SECONDS
    if not (whole or later or rounded or recipe.distill):
        return seconds
    batch_size = recipe.train.batch_size if recipe.train else 128
    steps = len(dataset.train) / batch_size
    epoch = _step_seconds(candidate, dataset, batch_size) * steps
    seconds += whole * epoch
    student = student_candidate(recipe, dataset)
    if recipe.distill is not None and student is not None:
        taught = epoch * TEACHING_COST
        epoch = _step_seconds(student, dataset, batch_size) * steps
        seconds += recipe.distill.epochs * (epoch + taught)
    return seconds + (later + QAT_COST * rounded) * epoch


def _step_seconds(candidate: Candidate, dataset: Dataset, batch_size: int) -> float:
    rows = np.arange(min(batch_size, len(dataset.train)))
    module = candidate.module.train()
    best = float("inf")
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        inputs = normalize(
            torch.from_numpy(dataset.train.load(rows)), candidate.signature.preprocess
        )
        outputs = module(inputs)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"model: {candidate.structure['model']['name']}: expected logits in training as "
                f"well, got {type(outputs).__name__}; let forward return them alone"
            )
        loss = cross_entropy(outputs, torch.from_numpy(dataset.train.labels[rows]))
        if loss.requires_grad:  # nothing learns in a model that is frozen or has no weights
            torch.autograd.backward(loss)
        best = min(best, time.perf_counter() - start)
    return best * batch_size / len(rows)


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
