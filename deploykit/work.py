"""What all stages of a run share, and how each of them is proven and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from deploykit.artifacts import Candidate
from deploykit.data import Dataset
from deploykit.environment import cache_folder
from deploykit.errors import VerificationError
from deploykit.interrupt import raise_if_stopped
from deploykit.latency_model import LatencyCost
from deploykit.measure.layer_times import LayerTimes
from deploykit.models.normalization import renormalized
from deploykit.quantization.deployable import leave_recurrence_in_float
from deploykit.recipe.sections import Recipe
from deploykit.run_folder import RunFolder
from deploykit.stages import Stage, prove
from deploykit.targets import resolve_target
from deploykit.train import Training


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


def proved(work: Work, started: float, make: Callable[[], Candidate]) -> Stage:
    """Make a candidate, keep it, and have it exported, compared with torch and evaluated.

    Raises:
        VerificationError: the proof fails, also with LSTM layers in float.
    """
    candidate = make()
    work.run.save_candidate(candidate)
    try:
        stage = prove(candidate, work.recipe, work.run, work.dataset, started=started)
    except VerificationError as error:
        if (calmer := leave_recurrence_in_float(candidate)) is None:
            raise
        work.say(f"{error}; LSTM layers stay in float")
        return proved(work, started, lambda: calmer)
    work.say(
        f"{stage.name}: validation accuracy {stage.validation.accuracy:.4f} in ONNX Runtime, "
        f"{stage.parity.agreement:.1%} agreement with torch"
    )
    raise_if_stopped(stage.name)
    return stage


def latency_of(work: Work, candidate: Candidate, stage: str) -> LatencyCost:
    """Return what measures what ``stage`` makes of a candidate, in the precision that ships."""
    recipe, target = work.recipe, resolve_target(work.recipe.target)
    keep_float = () if recipe.quantize is None else recipe.quantize.keep_float
    return LatencyCost(
        candidate,
        target,
        recipe.precision_on(target),
        times=LayerTimes.open(cache_folder(), recipe.threads),
        keep_float=keep_float,
        # What trials measure of the one model that they prune is the same for all of them, so
        # long as the same of its layers ship in float.
        record=(work.home if stage == "prune" else work.run).latencies(stage, keep_float),
    )


def as_fed(teacher: Candidate, learner: Candidate) -> nn.Module:
    """Return a teacher's module that takes what the learner's takes."""
    takes, given = teacher.signature.preprocess, learner.signature.preprocess
    return renormalized(teacher.module, takes=takes, given=given)
