"""The stages after training, made as often as a budget allows; each time in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deploykit.artifacts import JsonDict
from deploykit.course import Course
from deploykit.decisions import check_budget, validation_drop
from deploykit.errors import DeploykitError
from deploykit.interrupt import raise_if_stopped
from deploykit.measure import Latency
from deploykit.recipe.sections import QuantizeSection, Recipe
from deploykit.run_folder import RunFolder
from deploykit.trials import Outcome, may_try_again, next_trial

MADE = ("final", "validation_accuracy", "size_bytes")  # what a trial tells of its model


@dataclass(frozen=True)
class Trial:
    """One try to hold the budget: where its stages lie, and what they showed."""

    folder: RunFolder
    course: Course
    measured: Mapping[str, JsonDict]
    outcome: Outcome

    def to_json(self) -> JsonDict:
        """Return plain JSON for the report."""
        if self.outcome.failed:
            return {**self.outcome.to_json(), **dict.fromkeys(MADE), "latency_ms": {}}
        final = self.course.final
        latency = self.measured[final.name]["latency"]
        return {
            **self.outcome.to_json(),
            "final": final.name,
            "validation_accuracy": final.validation.accuracy,
            "latency_ms": {batch: one and one["median_ms"] for batch, one in latency.items()},
            "size_bytes": final.model.path.stat().st_size,
        }


Attempt = Callable[[Recipe, RunFolder, int], Trial]


def try_until_it_holds(
    recipe: Recipe, home: RunFolder, attempt: Attempt, most: int | None = None
) -> list[Trial]:
    """Make trials until one holds the budget, or nothing is left to try.

    Args:
        recipe: as the user wrote it.
        home: the run's folder; where there can be but one trial, it is made right there.
        attempt: makes one, of a recipe, in a folder; the third argument counts from 1.
        most: trials that may be made, beside what the budget says.
    """
    trials: list[Trial] = []
    while most is None or len(trials) < most:
        tried = next_trial(recipe, [trial.outcome for trial in trials])
        if tried is None:
            break
        number = len(trials) + 1
        folder = home.trial(number) if may_try_again(recipe) else home
        trials.append(attempt(tried, folder, number))
        raise_if_stopped(f"trial {number}")
    return trials


def outcome_of(recipe: Recipe, course: Course, measured: Mapping[str, JsonDict]) -> Outcome:
    """Say what a trial of ``recipe`` showed."""
    final = measured[course.final.name]["latency"]["1"]
    bounds = [stage.candidate.notes.get("prune", {}).get("bounds") for stage in course.stages]
    unpruned = [float(found[0]["before"]) for found in bounds if found]
    last, rounding_drop = course.final, 0.0
    if last.name == "quantize":
        rounding_drop, _ = validation_drop(course.origin[last.name], last)
    return Outcome(
        recipe.prune,
        pruned_speedup=course.speedups.get("prune"),
        speedup=None if final is None else Latency.from_json(final).ratio,
        checks=check_budget(recipe.budget, course.stages[0], course.final, measured)["checks"],
        keep_float=() if recipe.quantize is None else recipe.quantize.keep_float,
        rounding_drop=rounding_drop,
        drop=validation_drop(course.stages[0], last)[0],
        unpruned_ms=unpruned[0] if unpruned else None,
        mix=recipe.quantize is not None and recipe.quantize.mix,
    )


def failed_outcome(recipe: Recipe, error: DeploykitError) -> Outcome:
    """Say why a trial of ``recipe`` brought no model."""
    integers = recipe.quantize or QuantizeSection()
    return Outcome(
        recipe.prune, keep_float=integers.keep_float, mix=integers.mix, failed=str(error)
    )


def adopt(trials: Sequence[Trial], best: int, home: RunFolder) -> Trial:
    """Put what the best trial made where a run has it, and return it from there."""
    chosen = trials[best]
    if chosen.folder == home:
        return chosen
    stages = chosen.course.stages
    own = [one.name for one in stages if one.model.path == chosen.folder.onnx(one.name)]
    home.adopt(chosen.folder, own, {"trials": [dict(trial.measured) for trial in trials]})
    moved = {
        stage.name: replace(stage, model=replace(stage.model, path=home.onnx(stage.name)))
        for stage in stages
    }
    return replace(chosen, folder=home, course=chosen.course.moved(moved))


def what_fell_short(trials: Sequence[Trial], best: int) -> str:
    """Say which limits the best trial misses, and what the others reached."""
    missed = "; ".join(one["why"] for one in trials[best].outcome.checks if not one["passed"])
    if len(trials) == 1:
        return missed
    reached = "; ".join(
        f"trial {number}: {trial.outcome.told}" for number, trial in enumerate(trials, start=1)
    )
    return f"{missed}, and that is the nearest of {len(trials)} trials ({reached})"
