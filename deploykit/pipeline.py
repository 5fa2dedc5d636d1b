"""The order of the stages: from a recipe to a run with a verified model and its report."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from deploykit.artifacts import Candidate, JsonDict, Report
from deploykit.attempts import (
    Attempt,
    Trial,
    adopt,
    outcome_of,
    try_until_it_holds,
    what_fell_short,
)
from deploykit.bundle_files import Golden, golden_files
from deploykit.cluster import cluster
from deploykit.course import Course
from deploykit.data import Dataset
from deploykit.decisions import FASTER, ptq_decision, stage_decision, validation_drop
from deploykit.distill import distill
from deploykit.environment import cache_folder
from deploykit.errors import BudgetError, CompressionError, DataError, VerificationError
from deploykit.interrupt import raise_if_stopped
from deploykit.latency_model import LatencyCost
from deploykit.measure import Latency
from deploykit.measure.layer_times import LayerTimes
from deploykit.mixed_precision import Mixture, fastest_mixture
from deploykit.models.normalization import renormalized
from deploykit.precision import convert
from deploykit.progress import Progress
from deploykit.prune import align_widths, prune
from deploykit.publish import publish_folder
from deploykit.quantization.deployable import leave_recurrence_in_float
from deploykit.quantize import calibrate, calibration_rows, train_quantized
from deploykit.recipe.sections import Judged, Recipe, SurgerySection, TrainSection
from deploykit.report import write_report
from deploykit.run_folder import RunFolder
from deploykit.run_report import make_report
from deploykit.runtime import open_session, run_model
from deploykit.sensitivity import Sensitivity, layers_to_keep_float, quantization_sensitivity
from deploykit.sparsify import sparsify
from deploykit.stages import Stage, is_quantized, measure_stages, prove
from deploykit.start import student_candidate, teacher_candidate
from deploykit.surgery import operate
from deploykit.targets import can_be_profiled, resolve_target
from deploykit.train import Training, distillation, fit
from deploykit.trials import Outcome, best_trial, described, may_try_again

GOLDEN_SAMPLES = 16
JUDGED = 32  # samples that tell which layers integers harm
NOISE_STEP = 3.0  # dB that a trial with more layers in float is to gain
DEFAULT_MAX_DROP = 0.01  # what ptq may cost in mode auto where no budget says so


@dataclass(frozen=True)
class Work:
    """What all stages of one run, or of one trial within it, share.

    Attributes:
        recipe: the run's, or as the trial has it.
        run: where the stages are written.
        home: the run's own folder.
        dataset: the samples.
        training: data and plan of every training.
    """

    recipe: Recipe
    run: RunFolder
    home: RunFolder
    dataset: Dataset
    training: Training
    teacher: Candidate | None = None
    student: Candidate | None = None

    def fed_as(self, candidate: Candidate) -> Work:
        """Return the work with pixels normalized as ``candidate`` takes them."""
        dataset = replace(self.dataset, preprocess=candidate.signature.preprocess)
        return replace(self, dataset=dataset, training=replace(self.training, dataset=dataset))

    def say(self, text: str) -> None:
        """Tell the person who waits, and the log."""
        self.training.progress.message(text)


def run_stages(
    recipe: Recipe,
    run: RunFolder,
    dataset: Dataset,
    *,
    start: Candidate,
    progress: Progress,
    replay: Sequence[Mapping[str, JsonDict]] | None = None,
    commands: Sequence[str] = (),
) -> Report:
    """Run every stage that ``recipe`` names, and write all that belongs to the run.

    A stage that was finished before is taken from its checkpoint, so that calling this again
    on an interrupted run ends in the same bytes as an uninterrupted one.

    Args:
        recipe: with absolute paths.
        run: an existing folder that this process holds.
        dataset: the recipe's, loaded.
        start: the float model that the run begins with, see `deploykit.start`.
        progress: who is told how far it is.
        replay: measurements to decide by in place of new ones: for each trial, by stage.
        commands: lines that reproduce the run, for the report.

    Returns:
        The report, as written to ``report.json`` and ``report.html``.

    Raises:
        BudgetError: everything was written, but a budget does not hold.
    """
    _keep_splits(run, dataset)
    teacher, student = teacher_candidate(recipe, dataset), student_candidate(recipe, dataset)
    # Training, calibration and proof normalize as the deployed model will.
    dataset = replace(dataset, preprocess=start.signature.preprocess)
    training = Training(
        dataset,
        plan=recipe.train or TrainSection(),
        augment=recipe.data.augment,
        seed=recipe.seed,
        checkpoints=run.checkpoints,
        progress=progress,
        answers=run.checkpoints / "answers.sqlite" if may_try_again(recipe) else None,
    )
    work = Work(recipe, run, run, dataset, training, teacher, student)
    base = Course([_proved(work, time.monotonic(), lambda: train(start, work))])
    if recipe.distill is not None:
        _distill(work, base)
        work = work.fed_as(base.final.candidate)
    if recipe.surgery is not None:
        _operate(work, base, recipe.surgery)
    most = None if replay is None else len(replay)
    trials = try_until_it_holds(recipe, run, _attempt(work, base, replay), most)
    best = best_trial([trial.outcome for trial in trials])
    chosen = adopt(trials, best, run)
    course, measured = chosen.course, chosen.measured
    decisions = [
        stage_decision(
            course.origin[stage.name],
            stage,
            measured,
            course.reasons.get(stage.name, ""),
            kept=stage.name not in course.refused,
        )
        for stage in course.stages[1:]
    ]
    _keep_golden(work, course.final)
    rounding = _sensitivity(work, course.final.candidate) if is_quantized(course.final) else None
    report = make_report(
        recipe,
        dataset,
        course.stages,
        measured,
        final=course.final,
        decisions=decisions,
        commands=commands,
        trials=[
            {**trial.to_json(), "number": number, "chosen": trial is trials[best]}
            for number, trial in enumerate(trials, start=1)
        ],
        rounding=None if rounding is None else rounding.to_json(),
    )
    write_report(report, run.path)
    if not report.budget["passed"]:
        raise BudgetError(f"budget: {what_fell_short(trials, best)}; see {run.path}/report.html")
    return report


def _attempt(work: Work, base: Course, replay: Sequence[Mapping[str, JsonDict]] | None) -> Attempt:
    """Return what makes and measures every stage after ``base`` once, as a trial's recipe says."""

    def attempt(recipe: Recipe, folder: RunFolder, number: int) -> Trial:
        one = replace(work, recipe=recipe, run=folder)
        if number > 1:
            one = replace(one, training=one.training.in_folder(f"trial-{number}"))
            work.say(f"trial {number}: {described(recipe)}")
        try:
            course = _make_stages(one, base)
        except (CompressionError, VerificationError) as error:
            if number == 1:  # the recipe itself asks for what cannot be
                raise
            kept = () if recipe.quantize is None else recipe.quantize.keep_float
            outcome = Outcome(recipe.prune, keep_float=kept, failed=str(error))
            return Trial(folder, base, {}, outcome)
        raise_if_stopped("measuring")
        work.say("measuring latency")
        known = None if replay is None else replay[number - 1]
        measured = measure_stages(course.stages, recipe, folder, known)
        _judge_quantized(course, recipe, measured)
        outcome = outcome_of(recipe, course, measured)
        if not outcome.holds("max_drop") and is_quantized(course.final):
            outcome = replace(outcome, sensitive=_rather_in_float(one, course.final.candidate))
        return Trial(folder, course, measured, outcome)

    return attempt


def _sensitivity(work: Work, candidate: Candidate) -> Sensitivity:
    """Measure what integers cost in each layer of a quantized candidate."""
    samples = np.load(work.home.calibration, mmap_mode="r", allow_pickle=False)[:JUDGED]
    return quantization_sensitivity(candidate, np.array(samples), seed=work.recipe.seed)


def _rather_in_float(work: Work, candidate: Candidate) -> tuple[str, ...]:
    """Return the layers without whose integers the logits would be a step less noisy."""
    found = _sensitivity(work, candidate)
    wanted = found.decibels(found.noise) + NOISE_STEP
    layers = layers_to_keep_float(candidate, found, wanted_db=wanted)
    return () if found.weights.keys() <= set(layers) else layers


def _make_stages(work: Work, base: Course) -> Course:
    """Make every stage that the recipe names after ``base``, each from the last one kept."""
    recipe: Recipe = work.recipe
    course = base.copy()
    if recipe.prune is not None:
        latency = _latency(work, course.final.candidate, "prune")
        before, started = course.final, time.monotonic()
        stage = _proved(work, started, lambda: _prune(before.candidate, work, latency))
        course.add(stage)
        judged = recipe.prune.unless_it_pays != "keep"
        if latency.is_here and (judged or may_try_again(recipe)):
            removed = stage.candidate.structure.get("removed", ())
            speedup = latency.speedup(stage.candidate.module, removed)
            course.judge(stage, recipe.prune, speedup)
    if recipe.sparsify is not None:
        zeros = recipe.sparsify
        _compress(work, course, zeros, lambda before: sparsify(before, work.training, zeros))
    if recipe.cluster is not None:
        few = recipe.cluster
        _compress(work, course, few, lambda before: cluster(before, work.training, few))
    if recipe.quantize is not None:
        stage, reason = _quantize(work, course.final, course.stages[0])
        course.reasons["quantize"] = reason
        course.add(stage)
    precision = recipe.precision_on(resolve_target(recipe.target))
    if precision not in {"int8", "fp32"}:
        whole = course.final.candidate
        course.add(_proved(work, time.monotonic(), lambda: convert(whole, precision)))
        course.reasons["convert"] = precision
    return course


def _judge_quantized(course: Course, recipe: Recipe, measured: Mapping[str, JsonDict]) -> None:
    """Compare integers with the floats that they were made from, in the same rounds."""
    stage = course.stages[-1]
    if recipe.quantize is None or measured[stage.name]["latency"]["1"] is None:
        return
    after, before = (
        Latency.from_json(measured[one.name]["latency"]["1"]).ratio
        for one in (stage, course.origin[stage.name])
    )
    course.judge(stage, recipe.quantize, after / before)


def _proved(work: Work, started: float, make: Callable[[], Candidate]) -> Stage:
    candidate = make()
    work.run.save_candidate(candidate)
    try:
        stage = prove(candidate, work.recipe, work.run, work.dataset, started=started)
    except VerificationError as error:
        if (calmer := leave_recurrence_in_float(candidate)) is None:
            raise
        work.say(f"{error}; LSTM layers stay in float")
        return _proved(work, started, lambda: calmer)
    work.say(
        f"{stage.name}: validation accuracy {stage.validation.accuracy:.4f} in ONNX Runtime, "
        f"{stage.parity.agreement:.1%} agreement with torch"
    )
    raise_if_stopped(stage.name)
    return stage


def train(candidate: Candidate, work: Work) -> Candidate:
    """Train the float model, if the recipe says so."""
    if work.recipe.train is None or work.recipe.train.epochs == 0:
        return candidate
    module, training = copy.deepcopy(candidate.module), work.training
    loss = None
    if work.teacher is not None and work.recipe.train.teacher is not None:
        knowing = _as_fed(work.teacher, candidate)
        loss = distillation(knowing, training, training.plan, work.recipe.train.teacher)
    result = fit(module, training, stage="train", loss=loss)
    notes = {**candidate.notes, "fit": result.to_json()}
    return replace(candidate, module=module, notes=notes)


def _as_fed(teacher: Candidate, learner: Candidate) -> nn.Module:
    """Return a teacher's module that takes what the learner's takes."""
    takes, given = teacher.signature.preprocess, learner.signature.preprocess
    return renormalized(teacher.module, takes=takes, given=given)


def _distill(work: Work, course: Course) -> None:
    """Let the student take the place of the trained model, if that pays."""
    section, student = work.recipe.distill, work.student
    assert section is not None
    assert student is not None
    _compress(
        work, course, section, lambda before: distill(before, student, work.training, section)
    )


def _operate(work: Work, course: Course, section: SurgerySection) -> None:
    """Replace what integers run slowly, if that pays and is within what accuracy may be lost."""
    _compress(work, course, section, lambda before: operate(before, work.training, section))
    stage, budget = course.stages[-1], work.recipe.budget
    allowed = None if budget is None else budget.max_drop
    drop, _ = validation_drop(course.origin[stage.name], stage)
    if allowed is not None and drop > allowed and stage.name not in course.refused:
        course.refuse(stage, section, f"a drop of {drop:.2%}, {allowed:.2%} allowed")


def _compress(
    work: Work, course: Course, section: Judged, make: Callable[[Candidate], Candidate]
) -> None:
    """Make a stage from the last one kept, and keep it if it pays."""
    before = course.final.candidate
    stage = _proved(work, time.monotonic(), lambda: make(before))
    course.reasons[stage.name] = stage.candidate.notes["why"]
    course.add(stage)
    _judge(work, course, stage, section)


def _judge(work: Work, course: Course, stage: Stage, section: Judged) -> None:
    """Time a stage as it would ship beside the one before, where this machine is the target."""
    latency = _latency(work, course.origin[stage.name].candidate, stage.name)
    if section.unless_it_pays != "keep" and latency.is_here:
        course.judge(stage, section, latency.compare(stage.candidate))


def _latency(work: Work, candidate: Candidate, stage: str) -> LatencyCost:
    """Return what measures what ``stage`` makes of a candidate, in the precision that ships."""
    recipe = work.recipe
    return LatencyCost(
        candidate,
        resolve_target(recipe.target),
        quantized=recipe.quantize is not None,
        times=LayerTimes.open(cache_folder(), recipe.threads),
        # What trials measure of the one model that they prune is the same for all of them.
        record=(work.home if stage == "prune" else work.run).latencies(stage),
    )


def _prune(candidate: Candidate, work: Work, latency: LatencyCost) -> Candidate:
    """Prune as the recipe says."""
    recipe = work.recipe
    assert recipe.prune is not None
    target = resolve_target(recipe.target)
    return prune(candidate, work.training, recipe.prune, target=target, latency=latency)


def _quantize(work: Work, before: Stage, baseline: Stage) -> tuple[Stage, str]:
    """Calibrate or train, as the mode says; ``auto`` trains only where calibrating costs more."""
    recipe, section = work.recipe, work.recipe.quantize
    assert section is not None
    target, started = resolve_target(recipe.target), time.monotonic()
    rows = calibration_rows(len(work.dataset.train), section, recipe.seed)
    samples = work.home.save_calibration(work.dataset.train.load, rows)
    why = f"the recipe asks for {section.mode}"
    whole, rounder = _aligned(work, before.candidate)
    mixture = _mixture(work, whole)
    told, keep_float = rounder + mixture.told, (*section.keep_float, *mixture.keep_float)
    if section.mode != "qat":
        stage = _proved(
            work,
            started,
            lambda: calibrate(
                whole,
                samples,
                target=target,
                keep_float=keep_float,
                min_sqnr=section.min_sqnr,
            ),
        )
        if section.mode == "ptq":
            return stage, why + told
        decision = ptq_decision(baseline, stage, recipe.budget, DEFAULT_MAX_DROP)
        if decision.kept:
            return stage, decision.why + told
        why = decision.why
    stage = _proved(
        work,
        started,
        lambda: train_quantized(
            whole,
            work.training,
            section,
            target=target,
            teacher=_as_fed(baseline.candidate, whole) if section.distill else None,
            keep_float=keep_float,
        ),
    )
    return stage, f"qat: {why}{told}"


def _aligned(work: Work, candidate: Candidate) -> tuple[Candidate, str]:
    """Widen depthwise layers to full blocks of the kernels, where that is measured to be faster."""
    section, target = work.recipe.quantize, resolve_target(work.recipe.target)
    if section is None or not section.align or not can_be_profiled(target):
        return candidate, ""
    wider = align_widths(candidate, target.channel_multiple)
    if wider is None:
        return candidate, ""
    speedup = _latency(work, candidate, "align").compare(wider)
    if speedup < FASTER:
        return candidate, ""
    return wider, f"; depthwise layers in full blocks of channels, {speedup:.2f}x faster for it"


def _mixture(work: Work, candidate: Candidate) -> Mixture:
    """Find the layers that integers make no faster, where this machine is the target."""
    recipe, target = work.recipe, resolve_target(work.recipe.target)
    assert recipe.quantize is not None
    if not recipe.quantize.mix or not can_be_profiled(target):
        return Mixture()
    return fastest_mixture(
        candidate,
        target=target,
        threads=recipe.threads,
        keep_float=recipe.quantize.keep_float,
        record=work.run.latencies("quantize"),
    )


def _keep_splits(run: RunFolder, dataset: Dataset) -> None:
    """Write the splits, or make sure that a resumed run has the same ones.

    Raises:
        DataError: the data have changed since the run began.
    """
    splits, written = dataset.describe(), run.read_json("splits.json")
    if written is None:
        run.write_json("splits.json", splits)
    elif written != splits:
        before = written.get("splits", {})
        changed = [name for name, split in splits["splits"].items() if before.get(name) != split]
        raise DataError(
            f"data: the {', '.join(changed) or 'preprocessing'} changed since the run began; "
            "restore the data, or start anew with --force"
        )


def _keep_golden(work: Work, final: Stage) -> None:
    """Keep some validation samples, classes in turn, with the final model's answers."""
    split = work.dataset.validation
    order = np.lexsort((np.arange(len(split)), _turn(split.labels)))
    chosen = np.sort(order[:GOLDEN_SAMPLES])
    inputs = split.load(chosen)
    session = open_session(final.model.path.read_bytes(), work.recipe.threads)
    golden = Golden([split.raw(int(i)) for i in chosen], inputs, run_model(session, inputs))
    shutil.rmtree(work.run.golden, ignore_errors=True)  # of this run, before it was resumed
    with publish_folder(work.run.golden) as staging:
        for name, data in golden_files(golden).items():
            (staging / Path(name).name).write_bytes(data)


def _turn(labels: np.ndarray) -> np.ndarray:
    """Number the samples of each class: 0 for its first one, 1 for its second, and so on."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return turn
