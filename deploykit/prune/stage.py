"""The pruning stage: a candidate becomes a smaller one and wins its accuracy back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deploykit.artifacts import Candidate, JsonDict
from deploykit.cost import count_macs, count_parameters
from deploykit.prune.bounded import prune_to_bound
from deploykit.prune.channels import narrowed, prune_channels
from deploykit.prune.cost import Cost, MacsCost
from deploykit.prune.landscape import Rules, survey
from deploykit.prune.notes import PruneNotes
from deploykit.recipe.sections import PruneSection
from deploykit.seeds import stable_seed
from deploykit.structure import example_input
from deploykit.targets import Target
from deploykit.widths import changed_widths, read_widths

if TYPE_CHECKING:
    from deploykit.train import Training

TAYLOR_SAMPLES = 512
SURVEY_SAMPLES = 256  # of the validation split
BATCH = 64


@dataclass
class _Course:
    """What has been done to the module so far."""

    module: nn.Module
    removed: tuple[str, ...] = ()
    steps: list[PruneNotes] = field(default_factory=list)
    recovery: list[JsonDict] = field(default_factory=list)
    bounds: list[JsonDict] = field(default_factory=list)
    sensitivity: JsonDict | None = None


def prune(
    candidate: Candidate,
    training: Training,
    section: PruneSection,
    *,
    target: Target,
    latency: Cost | None = None,
) -> Candidate:
    """Remove channels and blocks in ``section.steps`` steps, each followed by recovery training.

    Args:
        candidate: a float candidate; left as it is.
        training: data and plan for the recovery.
        section: how much, by which measure, in how many steps.
        target: where the model will run; says of what widths are multiples.
        latency: of ``candidate`` and what comes of it; needed where the section asks for a
            speed-up or a latency.

    Returns:
        The smaller candidate. ``notes["prune"]`` is `PruneNotes` over all steps, with the
        measured sensitivities and the bound of each step where there was one;
        ``notes["recovery"]`` is the course of each step's training.

    Raises:
        CompressionError: a pattern fits no module, the bound cannot be held, or the pruned
            model does not run.
    """
    from deploykit.train import distillation, fit, recovery_plan

    if section.how_much[0] in {"speedup", "latency_ms"} and latency is None:
        raise ValueError(f"prune.{section.how_much[0]} needs a latency to hold to its bound")
    plan = recovery_plan(training.plan, section)
    loss = None
    if section.distill:
        loss = distillation(candidate.module, training, plan, section)
    course = _Course(candidate.module)
    for step in range(1, section.steps + 1):
        if section.how_much[0] == "channel_ratio":
            _by_ratio(course, candidate, training, section, target, step / section.steps)
        else:
            macs = MacsCost.of(candidate.module, example_input(candidate, batch=2))
            cost = macs if section.how_much[0] == "macs" or latency is None else latency
            _to_bound(course, candidate, training, section, target, cost, step / section.steps)
        if section.epochs:
            result = fit(course.module, training, stage=f"prune-{step}", plan=plan, loss=loss)
            course.recovery.append(result.to_json())
    notes = _summary(candidate, course).to_json()
    if course.bounds:
        notes |= {"bounds": course.bounds, "sensitivity": course.sensitivity}
    return Candidate(
        module=course.module,
        signature=candidate.signature,
        structure=_structure(candidate, course),
        stage="prune",
        notes={"prune": notes, "recovery": course.recovery},
    )


def _by_ratio(
    course: _Course,
    candidate: Candidate,
    training: Training,
    section: PruneSection,
    target: Target,
    share: float,
) -> None:
    """Remove a share of what the section asks for, counted from the first module's channels."""
    taylor = section.importance == "taylor"
    course.module, notes = prune_channels(
        course.module,
        example_input(candidate, batch=2),
        channel_ratio=section.how_much[1] * share,
        importance=section.importance,
        scope=section.scope,
        channel_multiple=section.channel_multiple or target.channel_multiple,
        protect=section.protect,
        gradients=loss_gradients(course.module, training) if taylor else None,
        initial_widths=read_widths(candidate.module),
    )
    course.steps.append(notes)


def _to_bound(
    course: _Course,
    candidate: Candidate,
    training: Training,
    section: PruneSection,
    target: Target,
    cost: Cost,
    share: float,
) -> None:
    """Go a share of the way to the bound, by equal factors."""
    example = example_input(candidate, batch=2)
    rules = Rules(
        importance=_norm(section),
        protect=section.protect,
        channel_multiple=section.channel_multiple or target.channel_multiple,
        depth=section.depth,
    )
    whole = cost.measure(candidate.module)
    kind, asked = section.how_much
    final = asked if kind == "latency_ms" else whole / asked
    bound = whole * (final / whole) ** share if final < whole else final
    training.progress.message("prune: measuring what each group and each block matters")
    module = copy.deepcopy(course.module).cpu()
    landscape = survey(module, example, _validation_batches(training), rules)
    shrunk = prune_to_bound(
        module,
        example,
        landscape,
        cost=cost,
        bound=bound,
        rules=rules,
        removed=course.removed,
    )
    training.progress.message(
        f"prune: {whole / shrunk.measured:.2f}x less {_unit(kind)} than unpruned; "
        f"{len(shrunk.removed)} blocks and {len(shrunk.notes.widths)} widths changed"
    )
    course.module, course.removed = shrunk.module, shrunk.removed
    course.steps.append(shrunk.notes)
    course.sensitivity = course.sensitivity or landscape.to_json()
    course.bounds.append(
        {
            "unit": _unit(kind),
            "before": whole,
            "bound": bound,
            "predicted": shrunk.predicted,
            "measured": shrunk.measured,
        }
    )


def _norm(section: PruneSection) -> Literal["l1", "l2"]:
    return "l1" if section.importance == "l1" else "l2"


def _unit(kind: str) -> str:
    return "multiply-accumulates" if kind == "macs" else "ms at batch 1"


def _validation_batches(training: Training) -> list[Tensor]:
    """Return the first validation samples as the module takes them."""
    from deploykit.data.pixels import normalize

    split = training.dataset.validation
    count = min(SURVEY_SAMPLES, len(split))
    return [
        normalize(
            torch.from_numpy(split.load(np.arange(start, min(start + BATCH, count)))),
            training.dataset.preprocess,
        )
        for start in range(0, count, BATCH)
    ]


def loss_gradients(module: nn.Module, training: Training) -> dict[str, Tensor]:
    """Return the gradient of the loss on a few hundred training samples, by parameter name."""
    from deploykit.data.pixels import normalize

    split = training.dataset.train
    generator = np.random.default_rng(stable_seed(training.seed, "prune", "taylor"))
    chosen = generator.permutation(len(split))[:TAYLOR_SAMPLES]
    copied = copy.deepcopy(module).cpu().eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for start in range(0, len(chosen), BATCH):
        rows = np.sort(chosen[start : start + BATCH])
        inputs = normalize(torch.from_numpy(split.load(rows)), training.dataset.preprocess)
        labels = torch.from_numpy(split.labels[rows])
        loss = cross_entropy(copied(inputs), labels, reduction="sum") / len(chosen)
        torch.autograd.backward(loss)
    return {
        name: parameter.grad
        for name, parameter in copied.named_parameters()
        if parameter.grad is not None
    }


def _structure(candidate: Candidate, course: _Course) -> JsonDict:
    changed = changed_widths(read_widths(candidate.module), read_widths(course.module))
    structure = {
        **candidate.structure,
        "widths": {**candidate.structure.get("widths", {}), **changed},
    }
    removed = [*candidate.structure.get("removed", []), *course.removed]
    return {**structure, "removed": removed} if removed else structure


def _summary(candidate: Candidate, course: _Course) -> PruneNotes:
    """Draw the steps together: ratios and reasons of the last, sizes from first to last."""
    example, steps = example_input(candidate, batch=2), course.steps
    before, after = read_widths(candidate.module), read_widths(course.module)
    return PruneNotes(
        channel_ratio=steps[-1].channel_ratio,
        achieved_ratio=steps[-1].achieved_ratio,
        widths=narrowed(before, after),
        left_alone=steps[-1].left_alone,
        macs=(count_macs(candidate.module, example), count_macs(course.module, example)),
        parameters=(count_parameters(candidate.module), count_parameters(course.module)),
        removed=course.removed,
    )
