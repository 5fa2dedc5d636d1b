"""A whole run: from a recipe to a verified model and its report, in as many trials as it takes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploykit.artifacts import Candidate, JsonDict, Report
from deploykit.attempts import (
    Attempt,
    Trial,
    adopt,
    failed_outcome,
    outcome_of,
    try_until_it_holds,
    what_fell_short,
)
from deploykit.bundle_files import Golden, golden_files
from deploykit.course import Course
from deploykit.data import Dataset
from deploykit.decisions import stage_decision
from deploykit.errors import BudgetError, DataError, ModelError, VerificationError
from deploykit.interrupt import raise_if_stopped
from deploykit.making import judge_precision, make_stages, shared_stages
from deploykit.progress import Progress
from deploykit.publish import publish_folder
from deploykit.recipe.sections import Recipe, TrainSection
from deploykit.report import write_report
from deploykit.run_folder import RunFolder
from deploykit.run_report import make_report
from deploykit.runtime import open_session, run_model
from deploykit.sensitivity import Sensitivity, layers_to_keep_float, quantization_sensitivity
from deploykit.stages import Stage, is_quantized, measure_stages
from deploykit.start import student_candidate, teacher_candidate
from deploykit.train import Training
from deploykit.trials import best_trial, described, may_try_again
from deploykit.work import Work

GOLDEN_SAMPLES = 16
JUDGED = 32  # samples that tell which layers integers harm
NOISE_STEP = 3.0  # dB that a trial with more layers in float is to gain


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
    work, base = shared_stages(work, start)
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
        known = None if replay is None else replay[number - 1]
        measured: Mapping[str, JsonDict] = {}
        try:
            course = make_stages(one, base)
            raise_if_stopped("measuring")
            work.say("measuring latency")
            measured = measure_stages(course.stages, recipe, folder, known)
            judge_precision(course, recipe, measured)
        except (BudgetError, ModelError, VerificationError) as error:
            if number == 1:  # the recipe itself asks for what cannot be
                raise
            return Trial(folder, base, measured, failed_outcome(recipe, error))
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
