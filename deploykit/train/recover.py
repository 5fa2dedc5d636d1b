"""Winning accuracy back after a stage has altered the weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from deploykit.artifacts import JsonDict
from deploykit.held_weights import Projection
from deploykit.recipe.sections import RecoverySection
from deploykit.train.distill import distillation
from deploykit.train.loop import fit
from deploykit.train.plan import Training, recovery_plan


def recover(
    module: nn.Module,
    training: Training,
    section: RecoverySection,
    *,
    stage: str,
    teacher: nn.Module,
    hold: Mapping[str, Projection],
) -> list[JsonDict]:
    """Train ``module`` in place as the section says; return the course, if there was one.

    Args:
        module: what was altered.
        training: data and plan.
        section: epochs, rate, and whether the teacher is asked.
        stage: names the checkpoint.
        teacher: the module before it was altered.
        hold: what the training must keep, see `fit`.
    """
    if section.epochs == 0:
        return []
    plan = recovery_plan(training.plan, section)
    loss = distillation(teacher, training, plan, section) if section.distill else None
    return [fit(module, training, stage=stage, plan=plan, loss=loss, hold=hold).to_json()]
