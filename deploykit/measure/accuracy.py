"""Accuracy of an exported model, as ONNX Runtime computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deploykit import runtime
from deploykit.artifacts import JsonDict, OnnxModel
from deploykit.errors import DataError, VerificationError
from deploykit.measure.session import open_model
from deploykit.statistics import Interval, wilson_interval


class LabelledSamples(Protocol):
    """What a `deploykit.data.Split` offers to an evaluation."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def labels(self) -> np.ndarray: ...  # noqa: D102

    def __len__(self) -> int: ...

    def load(self, indices: np.ndarray) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's answers to one split.

    Attributes:
        predictions: class numbers, int64 ``(n,)``.
        correct: bool ``(n,)``.
        confusion: int64 ``(classes, classes)``; row: label, column: prediction.
    """

    predictions: np.ndarray
    correct: np.ndarray
    confusion: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1."""
        return float(self.correct.mean())

    @property
    def interval(self) -> Interval:
        """95% interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))

    @property
    def class_accuracy(self) -> tuple[float | None, ...]:
        """Share of each class's samples that were recognized; None where it has no sample."""
        totals = self.confusion.sum(axis=1)
        return tuple(
            float(hits / total) if total else None
            for hits, total in zip(self.confusion.diagonal(), totals, strict=True)
        )

    def to_json(self) -> JsonDict:
        """Return everything but the single answers."""
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "samples": len(self.correct),
            "class_accuracy": list(self.class_accuracy),
            "confusion": self.confusion.tolist(),
        }


def evaluate_onnx(
    model: OnnxModel, split: LabelledSamples, *, threads: int, batch_size: int = 64
) -> Evaluation:
    """Classify a whole split by ONNX Runtime, a batch at a time.

    Args:
        model: takes one input and returns logits ``(N, classes)`` first.
        split: samples as the model's signature takes them, with labels.
        threads: threads inside an operator.
        batch_size: samples held in memory at once.

    Returns:
        Every prediction, and what follows from them.

    Raises:
        ModelError: ONNX Runtime cannot open the model.
        DataError: the split is empty or has a label that the model does not know.
        VerificationError: the model returns NaN or infinity.

    Example:
        >>> evaluate_onnx(model, dataset.validation, threads=1).accuracy
        0.985
    """
    from sklearn.metrics import confusion_matrix

    classes = model.signature.outputs[0].shape[-1]
    labels = _check_labels(split, classes)
    session = open_model(model, threads)
    predictions = np.empty(len(split), dtype=np.int64)
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, min(start + batch_size, len(split)))
        try:
            logits = runtime.run_model(session, split.load(indices))
        except runtime.SelftestError as error:
            raise VerificationError(
                f"{model.path}: {split.name} samples {start} to {indices[-1]}: {error}"
            ) from error
        predictions[indices] = logits.argmax(axis=-1)
    confusion = confusion_matrix(labels, predictions, labels=np.arange(classes))
    return Evaluation(predictions, predictions == labels, np.asarray(confusion, dtype=np.int64))


def _check_labels(split: LabelledSamples, classes: int) -> np.ndarray:
    if len(split) == 0:
        raise DataError(f"{split.name}: expected at least one sample, got none")
    unknown = np.flatnonzero((split.labels < 0) | (split.labels >= classes))
    if len(unknown):
        raise DataError(
            f"{split.name}, sample {unknown[0]}: expected a label below {classes}, the model's "
            f"classes, got {split.labels[unknown[0]]}; the model was made for other data"
        )
    return split.labels
