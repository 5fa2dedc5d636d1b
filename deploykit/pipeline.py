"""The order of the stages: from a recipe to a run with a verified model and its report."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from deploykit.artifacts import Candidate, JsonDict, Report
from deploykit.bundle_files import Golden, golden_files
from deploykit.data import Dataset
from deploykit.decisions import ptq_decision, stage_decision
from deploykit.errors import BudgetError, DataError
from deploykit.interrupt import raise_if_stopped
from deploykit.progress import Progress
from deploykit.prune import prune
from deploykit.publish import publish_folder
from deploykit.quantize import calibrate, calibration_rows, train_quantized
from deploykit.recipe.sections import Recipe, TrainSection
from deploykit.report import write_report
from deploykit.run_folder import RunFolder
from deploykit.run_report import make_report
from deploykit.runtime import open_session, run_model
from deploykit.stages import Stage, measure_stages, prove
from deploykit.targets import resolve_target
from deploykit.train import Training, fit

GOLDEN_SAMPLES = 16
DEFAULT_MAX_DROP = 0.01  # what ptq may cost in mode auto where no budget says so


@dataclass(frozen=True)
class Work:
    """What all stages of one run share."""

    recipe: Recipe
    run: RunFolder
    dataset: Dataset
    training: Training

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
    replay: Mapping[str, JsonDict] | None = None,
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
        replay: measurements to decide by in place of new ones, by stage.
        commands: lines that reproduce the run, for the report.

    Returns:
        The report, as written to ``report.json`` and ``report.html``.

    Raises:
        BudgetError: everything was written, but a budget does not hold.
    """
    _keep_splits(run, dataset)
    # Training, calibration and proof normalize as the deployed model will.
    dataset = replace(dataset, preprocess=start.signature.preprocess)
    training = Training(
        dataset,
        plan=recipe.train or TrainSection(),
        augment=recipe.data.augment,
        seed=recipe.seed,
        checkpoints=run.checkpoints,
        progress=progress,
    )
    work = Work(recipe, run, dataset, training)
    stages, reasons = _make_stages(work, start)
    raise_if_stopped("measuring")
    work.say("measuring latency")
    measured = measure_stages(stages, recipe, run, replay)
    decisions = [
        stage_decision(before, after, measured, reasons.get(after.name, ""))
        for before, after in pairwise(stages)
    ]
    _keep_golden(work, stages[-1])
    report = make_report(recipe, dataset, stages, measured, decisions=decisions, commands=commands)
    write_report(report, run.path)
    if not report.budget["passed"]:
        failed = "; ".join(check["why"] for check in report.budget["checks"] if not check["passed"])
        raise BudgetError(f"budget: {failed}; see {run.path / 'report.html'}")
    return report


def _make_stages(work: Work, start: Candidate) -> tuple[list[Stage], dict[str, str]]:
    """Return the stages in order, and what was decided within one, by its name."""
    recipe: Recipe = work.recipe
    reasons: dict[str, str] = {}
    stages = [_proved(work, time.monotonic(), lambda: train(start, work))]
    if recipe.prune is not None:
        section, target = recipe.prune, resolve_target(recipe.target)
        stages.append(
            _proved(
                work,
                time.monotonic(),
                lambda: prune(stages[0].candidate, work.training, section, target=target),
            )
        )
    if recipe.quantize is not None:
        stage, reasons["quantize"] = _quantize(work, stages[-1], stages[0])
        stages.append(stage)
    return stages, reasons


def _proved(work: Work, started: float, make: Callable[[], Candidate]) -> Stage:
    candidate = make()
    work.run.save_candidate(candidate)
    stage = prove(candidate, work.recipe, work.run, work.dataset, started=started)
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
    module = copy.deepcopy(candidate.module)
    result = fit(module, work.training, stage="train")
    notes = {**candidate.notes, "fit": result.to_json()}
    return replace(candidate, module=module, notes=notes)


def _quantize(work: Work, before: Stage, baseline: Stage) -> tuple[Stage, str]:
    """Calibrate or train, as the mode says; ``auto`` trains only where calibrating costs more."""
    recipe, section = work.recipe, work.recipe.quantize
    assert section is not None
    target, started = resolve_target(recipe.target), time.monotonic()
    rows = calibration_rows(len(work.dataset.train), section, recipe.seed)
    samples = work.run.save_calibration(work.dataset.train.load, rows)
    why = f"the recipe asks for {section.mode}"
    if section.mode != "qat":
        stage = _proved(
            work,
            started,
            lambda: calibrate(
                before.candidate, samples, target=target, keep_float=section.keep_float
            ),
        )
        if section.mode == "ptq":
            return stage, why
        decision = ptq_decision(baseline, stage, recipe.budget, DEFAULT_MAX_DROP)
        if decision.kept:
            return stage, decision.why
        why = decision.why
    stage = _proved(
        work,
        started,
        lambda: train_quantized(
            before.candidate,
            work.training,
            section,
            target=target,
            keep_float=section.keep_float,
        ),
    )
    return stage, f"qat: {why}"


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
