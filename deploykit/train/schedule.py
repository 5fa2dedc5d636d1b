"""The learning rate as a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deploykit.recipe.sections import ScheduleSection

# Smith and Topin, "Super-Convergence" (https://arxiv.org/abs/1708.07120): the rate rises over
# this share of the steps, from this share of the peak.
ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25


def rate_factor(section: ScheduleSection, step: int, total: int, reductions: int = 0) -> float:
    """Return the learning rate of a step as a share of the peak.

    Args:
        section: which curve.
        step: optimizer steps of the stage done before, from 0.
        total: optimizer steps of the whole stage.
        reductions: how often the rate has fallen; only plateau, see `plateau_reductions`.

    Returns:
        A number from 0 to 1.
    """
    rising = round(_rise(section) * total)
    if step < rising:
        return _warm_up(section, (step + 1) / rising)
    done = (step - rising) / max(1, total - rising)
    match section.name:
        case "constant":
            return 1.0
        case "step":
            passed = sum(step >= milestone * total for milestone in section.milestones)
            return float(section.factor**passed)
        case "plateau":
            return float(section.factor**reductions)
        case "cosine" | "one-cycle":
            return section.final + (1 - section.final) * _half_cosine(done)


def _rise(section: ScheduleSection) -> float:
    default = ONE_CYCLE_RISE if section.name == "one-cycle" else 0.0
    return section.warmup or default


def _warm_up(section: ScheduleSection, done: float) -> float:
    if section.name != "one-cycle":
        return done
    return 1 - (1 - ONE_CYCLE_START) * _half_cosine(done)


def _half_cosine(done: float) -> float:
    """Fall from 1 to 0 while ``done`` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def plateau_reductions(accuracies: Sequence[float], patience: int) -> int:
    """Count how often ``patience`` epochs in a row brought no new best accuracy.

    Args:
        accuracies: validation accuracy of every epoch until now.
        patience: epochs without gain before the rate falls; the count then starts anew.
    """
    reductions, stalled, best = 0, 0, -math.inf
    for accuracy in accuracies:
        stalled = 0 if accuracy > best else stalled + 1
        best = max(best, accuracy)
        if stalled == patience:
            reductions, stalled = reductions + 1, 0
    return reductions


def epochs_without_gain(accuracies: Sequence[float], min_delta: float = 0.0) -> int:
    """Count the epochs since the accuracy last rose by more than ``min_delta``."""
    stalled, best = 0, -math.inf
    for accuracy in accuracies:
        if accuracy > best + min_delta:
            stalled, best = 0, accuracy
        else:
            stalled += 1
    return stalled
