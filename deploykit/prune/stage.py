"""The pruning stage: a candidate becomes a smaller one and wins its accuracy back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deploykit.artifacts import Candidate, JsonDict
from deploykit.cost import count_macs, count_parameters
from deploykit.prune.channels import narrowed, prune_channels
from deploykit.prune.notes import PruneNotes
from deploykit.recipe.sections import PruneSection
from deploykit.seeds import stable_seed
from deploykit.structure import example_input
from deploykit.targets import Target
from deploykit.widths import changed_widths, read_widths

if TYPE_CHECKING:
    from deploykit.train import Training

TAYLOR_SAMPLES = 512
TAYLOR_BATCH = 64


def prune(
    candidate: Candidate, training: Training, section: PruneSection, *, target: Target
) -> Candidate:
    """Remove channels in ``section.steps`` steps, each followed by recovery training.

    Args:
        candidate: a float candidate; left as it is.
        training: data and plan for the recovery.
        section: how much, by which measure, in how many steps.
        target: where the model will run; says of what widths are multiples.

    Returns:
        The smaller candidate. ``notes["prune"]`` is `PruneNotes` over all steps,
        ``notes["recovery"]`` the course of each step's training.

    Raises:
        CompressionError: a pattern fits no module, or the pruned model does not run.
    """
    from deploykit.train import fit, recovery_plan

    module = candidate.module
    initial = read_widths(module)
    plan = recovery_plan(training.plan, section)
    recovery: list[JsonDict] = []
    steps: list[PruneNotes] = []
    for step in range(1, section.steps + 1):
        module, notes = prune_channels(
            module,
            example_input(candidate, batch=2),
            channel_ratio=section.channel_ratio * step / section.steps,
            importance=section.importance,
            scope=section.scope,
            channel_multiple=section.channel_multiple or target.channel_multiple,
            protect=section.protect,
            gradients=loss_gradients(module, training) if section.importance == "taylor" else None,
            initial_widths=initial,
        )
        steps.append(notes)
        if section.epochs:
            recovery.append(fit(module, training, stage=f"prune-{step}", plan=plan).to_json())
    return Candidate(
        module=module,
        signature=candidate.signature,
        structure=_structure(candidate, module),
        stage="prune",
        notes={"prune": _summary(candidate, module, steps).to_json(), "recovery": recovery},
    )


def loss_gradients(module: nn.Module, training: Training) -> dict[str, Tensor]:
    """Return the gradient of the loss on a few hundred training samples, by parameter name."""
    from deploykit.data.pixels import normalize

    split = training.dataset.train
    generator = np.random.default_rng(stable_seed(training.seed, "prune", "taylor"))
    chosen = generator.permutation(len(split))[:TAYLOR_SAMPLES]
    copied = copy.deepcopy(module).cpu().eval().requires_grad_(True)
    for start in range(0, len(chosen), TAYLOR_BATCH):
        rows = np.sort(chosen[start : start + TAYLOR_BATCH])
        inputs = normalize(torch.from_numpy(split.load(rows)), training.dataset.preprocess)
        labels = torch.from_numpy(split.labels[rows])
        loss = cross_entropy(copied(inputs), labels, reduction="sum") / len(chosen)
        torch.autograd.backward(loss)
    return {
        name: parameter.grad
        for name, parameter in copied.named_parameters()
        if parameter.grad is not None
    }


def _structure(candidate: Candidate, module: nn.Module) -> JsonDict:
    changed = changed_widths(read_widths(candidate.module), read_widths(module))
    widths = {**candidate.structure.get("widths", {}), **changed}
    return {**candidate.structure, "widths": widths}


def _summary(candidate: Candidate, module: nn.Module, steps: list[PruneNotes]) -> PruneNotes:
    """Draw the steps together: ratios and reasons of the last, sizes from first to last."""
    example = example_input(candidate, batch=2)
    return PruneNotes(
        channel_ratio=steps[-1].channel_ratio,
        achieved_ratio=steps[-1].achieved_ratio,
        widths=narrowed(read_widths(candidate.module), read_widths(module)),
        left_alone=steps[-1].left_alone,
        macs=(count_macs(candidate.module, example), count_macs(module, example)),
        parameters=(count_parameters(candidate.module), count_parameters(module)),
    )
