"""How a run backs off until its budget holds: what each trial showed decides the next.

The recipe as it stands is the first trial. Where accuracy is missing, the next one backs off in
what cost the most of it: it prunes less, just enough to be as fast as the budget asks (or half as
much where it asks for no speed), or leaves the layers in float that integers harm most. Where
speed is missing, it prunes more; where that is no way, layers stay in float that are faster there.
Such a search needs few trials, because the latency of each was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploykit.artifacts import JsonDict
from deploykit.recipe.sections import PruneSection, Recipe

MARGIN = 1.03  # asked of the next trial beyond the budget's speed: predictions err by a few percent
SAME = 0.02  # strengths of pruning nearer than this part of each other make the same model
LEAST = 0.01  # strengths below it leave the model whole
MOST_CHANNELS = 0.95


@dataclass(frozen=True)
class Outcome:
    """What one trial showed, on the validation split.

    Attributes:
        section: how it pruned; None if it did not.
        pruned_speedup: what pruning alone brought at batch 1, in the precision that ships; None
            where that cannot be measured here.
        speedup: of the final model over the float one at batch 1; None as above.
        checks: limits of the budget, as `check_budget` returns them.
        keep_float: ``quantize.keep_float`` as it was.
        mix: ``quantize.mix`` as it was.
        rounding_drop: accuracy that quantization lost, 0 to 1; 0 where there was none.
        drop: accuracy that the whole trial lost.
        sensitive: layers to leave in float next, by module; empty where that is no way out.
        unpruned_ms: latency that ``latency_ms`` counts from, in ms; None for other keys.
        failed: why the trial brought no model at all.
    """

    section: PruneSection | None
    pruned_speedup: float | None = None
    speedup: float | None = None
    checks: Sequence[JsonDict] = ()
    keep_float: tuple[str, ...] = ()
    rounding_drop: float = 0.0
    drop: float = 0.0
    sensitive: tuple[str, ...] = ()
    unpruned_ms: float | None = None
    failed: str = ""
    mix: bool = False

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return not self.failed and all(check["passed"] for check in self.checks)

    def holds(self, name: str) -> bool:
        """Whether the limit of this name holds, or is not set."""
        return all(check["passed"] for check in self.checks if check["name"] == name)

    @property
    def told(self) -> str:
        """What it reached, in a few words."""
        if self.failed:
            return self.failed
        reached = {"max_drop": "a drop of {:.2%}", "min_speedup": "{:.2f}x"}
        return " at ".join(reached[check["name"]].format(check["value"]) for check in self.checks)

    def to_json(self) -> JsonDict:
        """Return plain JSON for the report."""
        key, value = self.section.how_much if self.section else ("", 0.0)
        return {
            "pruned": {key: value} if key else None,
            "keep_float": list(self.keep_float),
            "mix": self.mix,
            "pruned_speedup": self.pruned_speedup,
            "speedup": self.speedup,
            "checks": [dict(check) for check in self.checks],
            "passed": self.passed,
            "failed": self.failed,
            "told": self.told,
        }

    @property
    def shortfall(self) -> float:
        """How far it is from the budget, each limit as a share of itself; 0 if it holds."""
        if self.failed:
            return math.inf
        return sum(_shortfall(check) for check in self.checks)

    @property
    def strength(self) -> float:
        """How much was pruned, on a scale that is 0 for nothing and even in its effect."""
        return 0.0 if self.section is None else _strength(self.section, self.unpruned_ms)


def _shortfall(check: JsonDict) -> float:
    if check["passed"]:
        return 0.0
    limit, value = check["limit"], check["value"]
    return float(abs(value - limit) / max(abs(limit), 1e-3))


def may_try_again(recipe: Recipe) -> bool:
    """Whether there is a budget, and something to vary until it holds."""
    varied = recipe.prune is not None or recipe.quantize is not None
    return varied and recipe.budget is not None and recipe.budget.trials > 1


def described(recipe: Recipe) -> str:
    """Say what a trial tries."""
    parts = []
    if recipe.prune is not None:
        key, value = recipe.prune.how_much
        parts.append(f"prune.{key} {value:g}")
    if recipe.quantize is not None and recipe.quantize.keep_float:
        parts.append(f"in float: {', '.join(recipe.quantize.keep_float)}")
    if recipe.quantize is not None and recipe.quantize.mix:
        parts.append("in float what is faster there")
    return "; ".join(parts) or "without pruning"


def next_trial(recipe: Recipe, outcomes: Sequence[Outcome]) -> Recipe | None:
    """Return what to try after ``outcomes``, or None where nothing is left to try.

    Args:
        recipe: as the user wrote it.
        outcomes: of the trials so far, in order.
    """
    if not outcomes:
        return recipe
    budget, last = recipe.budget, outcomes[-1]
    if budget is None or last.passed or len(outcomes) >= budget.trials:
        return None
    ways = [_prune_otherwise, _leave_more_in_float]
    if last.rounding_drop > last.drop / 2:
        ways.reverse()
    for way in [*ways, _mix]:
        tried = way(recipe, outcomes)
        if tried is not None:
            return _shortened(tried)
    return None


def _leave_more_in_float(recipe: Recipe, outcomes: Sequence[Outcome]) -> Recipe | None:
    """Take the layers out of the integers that lose the most accuracy there."""
    last = outcomes[-1]
    way_out = not last.holds("max_drop") and last.holds("min_speedup") and last.sensitive
    if not way_out or set(last.sensitive) <= set(last.keep_float):
        return None
    return _as(recipe, last.section, last.sensitive, mix=last.mix)


def _mix(recipe: Recipe, outcomes: Sequence[Outcome]) -> Recipe | None:
    """Leave the layers in float that integers make no faster."""
    last = outcomes[-1]
    missing = last.holds("max_drop") and not last.holds("min_speedup")
    if recipe.quantize is None or last.mix or last.failed or not missing:
        return None
    return _as(recipe, last.section, last.keep_float, mix=True)


def _prune_otherwise(recipe: Recipe, outcomes: Sequence[Outcome]) -> Recipe | None:
    """Move the strength of pruning to where both limits may hold."""
    last, budget = outcomes[-1], recipe.budget
    if recipe.prune is None or budget is None:
        return None
    # The whole model is the same in all trials, those that brought no model included.
    unpruned_ms = next((one.unpruned_ms for one in outcomes if one.unpruned_ms), None)
    comparable = [
        replace(one, unpruned_ms=unpruned_ms)
        for one in outcomes
        if (one.keep_float, one.mix) == (last.keep_float, last.mix)
    ]
    left = budget.trials - len(outcomes)
    strength = _next_strength(budget.min_speedup, left, comparable)
    if strength is not None and recipe.prune.how_much[0] == "channel_ratio":
        strength = min(strength, MOST_CHANNELS)
    if strength is None or any(_alike(strength, one.strength) for one in comparable):
        return None
    section = _section(recipe.prune, strength, unpruned_ms)
    return _as(recipe, section, last.keep_float, mix=last.mix)


def _as(
    recipe: Recipe, prune: PruneSection | None, keep_float: tuple[str, ...], *, mix: bool
) -> Recipe:
    """Return the user's recipe with another strength of pruning and other layers in float."""
    if recipe.prune is not None and prune is not None:  # epochs are the user's again
        key, value = prune.how_much
        prune = recipe.prune.model_copy(update={key: value})
    update: JsonDict = {"prune": prune}
    if recipe.quantize is not None:
        update["quantize"] = recipe.quantize.model_copy(
            update={"keep_float": keep_float, "mix": mix}
        )
    return recipe.model_copy(update=update)


def best_trial(outcomes: Sequence[Outcome]) -> int:
    """Return the index of the trial that holds the budget, or comes nearest to it."""
    return min(range(len(outcomes)), key=lambda index: outcomes[index].shortfall)


def _next_strength(
    min_speedup: float | None, left: int, outcomes: Sequence[Outcome]
) -> float | None:
    """Return how strongly to prune; ``left`` trials may still be made."""
    last = outcomes[-1]
    accurate, fast = last.holds("max_drop"), last.holds("min_speedup")
    if last.failed:  # the bound could not be held: between here and the weaker trials
        weaker = [one.strength for one in outcomes if one.strength < last.strength]
        return (max(weaker, default=0.0) + last.strength) / 2
    if not accurate and not fast:
        return None  # less pruning is slower still, more of it less accurate
    if min_speedup is None:
        return last.strength / 2 if left > 1 else 0.0
    # Between what was too slow and what was not accurate.
    low = max((one.strength for one in outcomes if not one.holds("min_speedup")), default=-1.0)
    too_strong = [one.strength for one in outcomes if one.failed or not one.holds("max_drop")]
    high = min(too_strong, default=math.inf)
    for margin in (MARGIN, 1.0):
        wanted = _for_speed(min_speedup * margin, last)
        if wanted is None or low >= high:
            return None
        if wanted <= low:
            return low * 1.25 if high == math.inf else (low + high) / 2
        if wanted < high * (1 - SAME):
            return wanted
    return None  # what is fast enough is known not to be accurate


def _for_speed(wanted: float, outcome: Outcome) -> float | None:
    """Return the strength that makes the final model ``wanted`` times as fast as the float one.

    The speed-up of pruning is exponential in its strength.
    """
    if outcome.speedup is None or outcome.pruned_speedup is None:
        return None
    missing = math.log(wanted / outcome.speedup)
    if outcome.section is None or outcome.strength < LEAST:
        return None if missing > 0 else 0.0
    slope = math.log(outcome.pruned_speedup) / outcome.strength
    if slope < LEAST:  # it brought nothing so far
        return 2 * outcome.strength if missing > 0 else 0.0
    return max(0.0, outcome.strength + missing / slope)


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= max(SAME * max(one, other), LEAST / 2)


def _strength(section: PruneSection, unpruned_ms: float | None) -> float:
    key, value = section.how_much
    if key == "channel_ratio":
        return value
    if key == "latency_ms":
        return 0.0 if unpruned_ms is None else max(0.0, math.log(unpruned_ms / value))
    return math.log(value)


def _section(
    section: PruneSection, strength: float, unpruned_ms: float | None
) -> PruneSection | None:
    """Return the section with another strength; None where nothing is to be pruned."""
    if strength < LEAST:
        return None
    key = section.how_much[0]
    if key == "channel_ratio":
        value = strength
    elif key == "latency_ms":
        if unpruned_ms is None:
            return None
        value = unpruned_ms / math.exp(strength)
    else:
        value = math.exp(strength)
    return section.model_copy(update={key: round(value, 4)})


def _shortened(recipe: Recipe) -> Recipe:
    """Let recovery take at most ``budget.trial_epochs``, its stages in their proportion."""
    assert recipe.budget is not None
    most, prune, quantize = recipe.budget.trial_epochs, recipe.prune, recipe.quantize
    qat = 0 if quantize is None or quantize.mode == "ptq" else quantize.epochs
    pruning = 0 if prune is None else prune.steps * prune.epochs
    if most is None or pruning + qat <= most:
        return recipe
    qat_share = min(qat, max(1, most * qat // (pruning + qat)) if qat else 0)
    update: JsonDict = {}
    if quantize is not None and qat:
        update["quantize"] = quantize.model_copy(update={"epochs": qat_share})
    if prune is not None:
        epochs = min(prune.epochs, (most - qat_share) // prune.steps)
        update["prune"] = prune.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update=update)
