"""The order of the stages: from a recipe to a run with a verified model and its report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deploykit.artifacts import Candidate, JsonDict, Report, Signature, TensorSpec
from deploykit.bundle_files import Golden, golden_files
from deploykit.data import Dataset
from deploykit.decisions import Decision, ptq_decision, stage_decision
from deploykit.errors import BudgetError, DataError
from deploykit.interrupt import raise_if_stopped
from deploykit.models.build import build_model
from deploykit.models.normalization import fold_normalization
from deploykit.progress import Progress
from deploykit.prune import prune
from deploykit.publish import publish_folder
from deploykit.quantize import calibrate, calibration_rows, train_quantized
from deploykit.recipe.sections import Recipe, TrainSection
from deploykit.report import write_report
from deploykit.run_folder import RunFolder
from deploykit.run_report import make_report
from deploykit.runtime import open_session, run_model
from deploykit.seeds import stable_seed
from deploykit.stages import Stage, measure_stages, prove
from deploykit.structure import example_input
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
        start: the float model that the run begins with, see `initial_candidate`.
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
    stages, decisions = _make_stages(work, start)
    raise_if_stopped("measuring")
    work.say("measuring latency")
    measured = measure_stages(stages, recipe, run, replay)
    decisions += [stage_decision(before, after, measured) for before, after in pairwise(stages)]
    _keep_golden(work, stages[-1])
    report = make_report(recipe, dataset, stages, measured, decisions=decisions, commands=commands)
    write_report(report, run.path)
    if not report.budget["passed"]:
        failed = "; ".join(check["why"] for check in report.budget["checks"] if not check["passed"])
        raise BudgetError(f"budget: {failed}; see {run.path / 'report.html'}")
    return report


def _make_stages(work: Work, start: Candidate) -> tuple[list[Stage], list[Decision]]:
    recipe: Recipe = work.recipe
    decisions: list[Decision] = []
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
        stage, decision = _quantize(work, stages[-1], stages[0])
        stages.append(stage)
        decisions.append(decision)
    return stages, decisions


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


def initial_candidate(recipe: Recipe, dataset: Dataset, module: nn.Module | None) -> Candidate:
    """Build the recipe's model, with one mean and one std where that can be."""
    classes = len(dataset.classes)
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(stable_seed(recipe.seed, "weights"))
            module = build_model(
                recipe.model, classes=classes, sample_shape=dataset.sample_shape, base=Path()
            )
    signature = Signature(
        inputs=(_input_spec(dataset),),
        outputs=(TensorSpec("logits", "float32", (-1, classes)),),
        labels=dataset.classes,
        preprocess=dataset.preprocess,
    )
    structure: JsonDict = {
        "model": {"name": recipe.model.name, "arguments": recipe.model.arguments},
        "classes": classes,
        "sample_shape": list(dataset.sample_shape),
    }
    plain = Candidate(module, signature, structure, stage="train")
    folded, preprocess, note = fold_normalization(
        module, dataset.preprocess, example_input(plain, batch=2)
    )
    return replace(
        plain,
        module=folded,
        signature=replace(signature, preprocess=preprocess),
        structure={**structure, "input": note},
        notes={"input": note},
    )


def _input_spec(dataset: Dataset) -> TensorSpec:
    if dataset.preprocess is None:
        return TensorSpec("features", "float32", (-1, *dataset.sample_shape))
    return TensorSpec("image", "uint8", (-1, *dataset.sample_shape))


def _quantize(work: Work, before: Stage, baseline: Stage) -> tuple[Stage, Decision]:
    """Calibrate or train, as the mode says; ``auto`` trains only where calibrating costs more."""
    recipe, section = work.recipe, work.recipe.quantize
    assert section is not None
    target, started = resolve_target(recipe.target), time.monotonic()
    rows = calibration_rows(len(work.dataset.train), section, recipe.seed)
    samples = work.dataset.train.load(rows)
    work.run.save_calibration(samples)
    why = f"the recipe asks for {section.mode}"
    if section.mode != "qat":
        stage = _proved(work, started, lambda: calibrate(before.candidate, samples, target=target))
        if section.mode == "ptq":
            return stage, Decision("quantize", kept=True, why=why)
        decision = ptq_decision(baseline, stage, recipe.budget, DEFAULT_MAX_DROP)
        if decision.kept:
            return stage, decision
        why = decision.why
    stage = _proved(
        work,
        started,
        lambda: train_quantized(before.candidate, work.training, section, target=target),
    )
    return stage, Decision("quantize", kept=True, why=f"qat: {why}")


def _keep_splits(run: RunFolder, dataset: Dataset) -> None:
    """Write the splits, or make sure that a resumed run has the same ones.

    Raises:
        DataError: the data have changed since the run began.
    """
    splits, written = dataset.describe(), run.read_json("splits.json")
    if written is None:
        run.write_json("splits.json", splits)
    elif written != splits:
        changed = [
            name for name, split in splits["splits"].items() if written["splits"][name] != split
        ]
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
    with publish_folder(work.run.golden, force=True) as staging:
        for name, data in golden_files(golden).items():
            (staging / Path(name).name).write_bytes(data)


def _turn(labels: np.ndarray) -> np.ndarray:
    """Number the samples of each class: 0 for its first one, 1 for its second, and so on."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return turn
