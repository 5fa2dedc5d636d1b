"""What a training is made of, and what comes out of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deploykit.artifacts import JsonDict
from deploykit.progress import Progress, SilentProgress
from deploykit.recipe.sections import AugmentSection, RecoverySection, TrainSection
from deploykit.train.freeze import Groups

if TYPE_CHECKING:
    from deploykit.data.dataset import Dataset

# Recovery after pruning or quantization starts from good weights: share of the peak rate.
RECOVERY_RATE = 0.1


@dataclass(frozen=True)
class Training:
    """Everything that the stages of a run share when they train.

    Attributes:
        dataset: training and validation samples.
        plan: how to train, where a stage brings no plan of its own.
        augment: random changes of the training images.
        seed: of the run; with stage, epoch and step it decides all randomness.
        checkpoints: folder with a subfolder for each stage; None keeps no checkpoints.
        progress: who is told how far it is.
        answers: file of a teacher's answers, where the same batches may come again.
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
    """

    dataset: Dataset
    plan: TrainSection = field(default_factory=TrainSection)
    augment: tuple[AugmentSection, ...] = ()
    seed: int = 0
    checkpoints: Path | None = None
    progress: Progress = field(default_factory=SilentProgress)
    answers: Path | None = None
    device: str = "auto"

    def in_folder(self, name: str) -> Training:
        """Return the same training with its checkpoints in a folder of their own."""
        checkpoints = None if self.checkpoints is None else self.checkpoints / name
        return replace(self, checkpoints=checkpoints)


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch brought; accuracies are torch's, 0 to 1.

    ``loss`` and ``train_accuracy`` are means over the epoch's steps, on augmented samples;
    ``lr`` is the rate of its last step, before a group's factor.
    """

    epoch: int
    loss: float
    train_accuracy: float
    validation_accuracy: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class TrainedSpan:
    """The parameters that learned from ``first_epoch`` to ``last_epoch``, both included."""

    first_epoch: int
    last_epoch: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class FitResult:
    """The course of a stage.

    Attributes:
        stage: its name.
        history: one record an epoch.
        kept_epoch: the epoch whose weights the module holds; None if none was trained.
        trained: which parameters learned when.
        stopped_early: whether the plan's early stopping ended it.
    """

    stage: str
    history: tuple[EpochRecord, ...]
    kept_epoch: int | None
    trained: tuple[TrainedSpan, ...]
    stopped_early: bool

    @property
    def torch_accuracy(self) -> float | None:
        """Validation accuracy of the kept weights as torch computes it, 0 to 1."""
        return (
            None if self.kept_epoch is None else self.history[self.kept_epoch].validation_accuracy
        )

    def to_json(self) -> JsonDict:
        """Return plain JSON for the report."""
        return {**asdict(self), "torch_accuracy": self.torch_accuracy}


def kept_epoch(history: Sequence[EpochRecord], plan: TrainSection) -> int | None:
    """Return the epoch whose weights are kept: the first best one, or the last."""
    if not history:
        return None
    if plan.keep == "last":
        return len(history) - 1
    accuracies = [record.validation_accuracy for record in history]
    return accuracies.index(max(accuracies))


def recovery_plan(train: TrainSection | None, section: RecoverySection) -> TrainSection:
    """Return how a stage that altered the model wins its accuracy back.

    It trains as ``train`` did, with the section's epochs, rate and schedule: all parameters,
    since all have been disturbed, and without early stopping or averages, since it is short.
    """
    base = train or TrainSection()
    lr = section.lr or base.optimizer.lr * RECOVERY_RATE
    return base.model_copy(
        update={
            "epochs": section.epochs,
            "optimizer": base.optimizer.model_copy(update={"lr": lr}),
            "schedule": section.schedule,
            "groups": (),
            "early_stopping": None,
            "average": None,
        }
    )


def trained_spans(module: nn.Module, groups: Groups, epochs: int) -> tuple[TrainedSpan, ...]:
    """Return which parameters learned when, epochs of equal names drawn together."""
    names = [groups.trained(module, epoch) for epoch in range(epochs)]
    spans, first = [], 0
    for epoch in range(epochs):
        if epoch + 1 == epochs or names[epoch + 1] != names[epoch]:
            spans.append(TrainedSpan(first, epoch, names[epoch]))
            first = epoch + 1
    return tuple(spans)


def identity(training: Training, stage: str, plan: TrainSection, module: nn.Module) -> JsonDict:
    """Return all that the course of a training depends on, but for weights and pixels.

    A checkpoint keeps it, and another training does not take that checkpoint up.
    """
    shapes = [(name, list(p.shape)) for name, p in module.named_parameters()]
    dataset = training.dataset
    return {
        "stage": stage,
        "seed": training.seed,
        "plan": plan.model_dump(mode="json"),
        "augment": [section.model_dump(mode="json") for section in training.augment],
        "model": _sha256(json.dumps(shapes).encode()),
        "data": {
            split.name: _sha256(split.labels.tobytes())
            for split in (dataset.train, dataset.validation)
        },
        "torch": str(torch.__version__),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
