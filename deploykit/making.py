"""Every stage of a run, each made from the last one kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from deploykit.artifacts import Candidate, JsonDict
from deploykit.cluster import cluster
from deploykit.course import Course
from deploykit.decisions import judged_drop
from deploykit.distill import distill
from deploykit.integers import quantize_stage
from deploykit.latency_model import LatencyCost
from deploykit.measure import Latency
from deploykit.precision import convert
from deploykit.prune import prune
from deploykit.recipe.sections import DistillSection, Judged, Recipe, SurgerySection
from deploykit.sparsify import sparsify
from deploykit.stages import Stage
from deploykit.surgery import operate
from deploykit.targets import resolve_target
from deploykit.train import distillation, fit
from deploykit.trials import may_try_again
from deploykit.work import Work, as_fed, latency_of, proved


def shared_stages(work: Work, start: Candidate) -> tuple[Work, Course]:
    """Make the stages that all trials share.

    Returns:
        The work, fed as the last of them takes its samples, and the stages.
    """
    recipe = work.recipe
    base = Course([proved(work, time.monotonic(), lambda: train_stage(start, work))])
    if recipe.distill is not None:
        _distill(work, base, recipe.distill)
        work = work.fed_as(base.final.candidate)
    if recipe.surgery is not None:
        _operate(work, base, recipe.surgery)
    return work, base


def make_stages(work: Work, base: Course) -> Course:
    """Make every stage that the recipe names after ``base``, each from the last one kept."""
    recipe: Recipe = work.recipe
    course = base.copy()
    if recipe.prune is not None:
        latency = latency_of(work, course.final.candidate, "prune")
        before, started = course.final, time.monotonic()
        stage = proved(work, started, lambda: _prune(before.candidate, work, latency))
        course.add(stage)
        judged = recipe.prune.unless_it_pays != "keep"
        if latency.is_here and (judged or may_try_again(recipe)):
            course.judge(stage, recipe.prune, latency.compare(stage.candidate))
    if recipe.sparsify is not None:
        zeros = recipe.sparsify
        _compress(work, course, zeros, lambda before: sparsify(before, work.training, zeros))
    if recipe.cluster is not None:
        few = recipe.cluster
        _compress(work, course, few, lambda before: cluster(before, work.training, few))
    if recipe.quantize is not None:
        stage, reason = quantize_stage(work, course.final, course.stages[0])
        course.reasons["quantize"] = reason
        course.add(stage)
    precision = recipe.precision_on(resolve_target(recipe.target))
    if precision not in {"int8", "fp32"}:
        whole = course.final.candidate
        course.add(proved(work, time.monotonic(), lambda: convert(whole, precision)))
        course.reasons["convert"] = precision
    return course


def train_stage(candidate: Candidate, work: Work) -> Candidate:
    """Train the float model, if the recipe says so."""
    if work.recipe.train is None or work.recipe.train.epochs == 0:
        return candidate
    module, training = copy.deepcopy(candidate.module), work.training
    loss = None
    if work.teacher is not None and work.recipe.train.teacher is not None:
        knowing = as_fed(work.teacher, candidate)
        loss = distillation(knowing, training, training.plan, work.recipe.train.teacher)
    result = fit(module, training, stage="train", loss=loss)
    notes = {**candidate.notes, "fit": result.to_json()}
    return replace(candidate, module=module, notes=notes)


def _distill(work: Work, course: Course, section: DistillSection) -> None:
    """Let the student take the place of the trained model, if that pays."""
    student = work.student
    assert student is not None
    _compress(
        work, course, section, lambda before: distill(before, student, work.training, section)
    )


def _operate(work: Work, course: Course, section: SurgerySection) -> None:
    """Replace what integers run slowly, if that pays and is within what accuracy may be lost."""
    _compress(work, course, section, lambda before: operate(before, work.training, section))
    stage, budget = course.stages[-1], work.recipe.budget
    allowed = None if budget is None else budget.max_drop
    drop = judged_drop(budget, course.origin[stage.name].validation, stage.validation)
    if allowed is not None and drop > allowed and stage.name not in course.refused:
        course.refuse(stage, section, f"a drop of {drop:.2%}, {allowed:.2%} allowed")


def _compress(
    work: Work, course: Course, section: Judged, make: Callable[[Candidate], Candidate]
) -> None:
    """Make a stage from the last one kept, and keep it if it pays."""
    before = course.final.candidate
    stage = proved(work, time.monotonic(), lambda: make(before))
    course.reasons[stage.name] = stage.candidate.notes["why"]
    course.add(stage)
    _judge(work, course, stage, section)


def _judge(work: Work, course: Course, stage: Stage, section: Judged) -> None:
    """Time a stage as it would ship beside the one before, where this machine is the target."""
    latency = latency_of(work, course.origin[stage.name].candidate, stage.name)
    if section.unless_it_pays != "keep" and latency.is_here:
        course.judge(stage, section, latency.compare(stage.candidate))


def _prune(candidate: Candidate, work: Work, latency: LatencyCost) -> Candidate:
    """Prune as the recipe says."""
    recipe = work.recipe
    assert recipe.prune is not None
    target = resolve_target(recipe.target)
    return prune(candidate, work.training, recipe.prune, target=target, latency=latency)


def judge_precision(course: Course, recipe: Recipe, measured: Mapping[str, JsonDict]) -> None:
    """Compare the last stage, integers or halves, with the floats that it was made from.

    Raises:
        BudgetError: integers do not pay, and the recipe demands that they do.
    """
    stage = course.stages[-1]
    known = measured[stage.name]["latency"]["1"] is not None
    if not known or stage.name not in {"quantize", "convert"}:
        return
    after, before = (
        Latency.from_json(measured[one.name]["latency"]["1"])
        for one in (stage, course.origin[stage.name])
    )
    (low, high), (least, most) = after.interval, before.interval
    between = replace(after, ratio=after.ratio / before.ratio, interval=(low / most, high / least))
    if recipe.quantize is not None and stage.name == "quantize":
        course.judge(stage, recipe.quantize, between.decided)
    elif between.verdict == "slower":
        course.reasons[stage.name] += ", as the recipe asks, though it is slower here"
