"""Samples, split once and for all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deploykit.artifacts import JsonDict


class Samples(Protocol):
    """Samples of one table, by row."""

    @property
    def digests(self) -> tuple[bytes, ...]:
        """A digest of each row's values."""

    def origin(self, row: int, /) -> str:
        """Name a row for people."""

    def load(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of ``rows``."""

    def raw(self, row: int) -> bytes:
        """Return a row as a client has it."""


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of one purpose: ``train``, ``validation`` or ``test``.

    Attributes:
        name: the purpose.
        file: the file or folder that the samples come from.
        labels: class numbers, int64 ``(n,)``.
        samples: the table that holds the samples.
        rows: their rows in that table, int64 ``(n,)``, rising.
    """

    name: str
    file: str
    labels: np.ndarray
    samples: Samples
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return samples by their place in the split.

        Args:
            indices: integers ``(m,)`` in ``[0, len(self))``.

        Returns:
            uint8 ``(m, H, W, C)`` pixels of the model's size, or float32 ``(m, ...)``
            features; a copy.
        """
        return self.samples.load(self.rows[indices])

    def origin(self, index: int) -> str:
        """Return where a sample comes from, such as ``train.parquet, row 3``."""
        return self.samples.origin(int(self.rows[index]))

    def raw(self, index: int) -> bytes:
        """Return a sample as a client has it: a PNG, JPEG or .npy file's bytes."""
        return self.samples.raw(int(self.rows[index]))

    def digests(self) -> list[bytes]:
        """Return a digest of each sample's values, as decoded."""
        return [self.samples.digests[row] for row in self.rows]

    def describe(self, classes: tuple[str, ...]) -> JsonDict:
        """Return what tells this split from any other; JSON."""
        counts = np.bincount(self.labels, minlength=len(classes))
        whole = hashlib.sha256(b"".join(self.digests()))
        whole.update(self.labels.astype("<i8").tobytes())
        return {
            "file": self.file,
            "count": len(self),
            "classes": {name: int(count) for name, count in zip(classes, counts, strict=True)},
            "rows": row_ranges(self.rows),
            "digest": whole.hexdigest(),
        }


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits that know the same classes.

    Attributes:
        train: what the weights learn from.
        validation: what every decision reads.
        test: read once, after the last decision.
        classes: class names in label order.
        preprocess: how an image file becomes pixels; ``None`` where arrays are fed.
        sample_shape: ``(H, W, C)`` of images, else the shape of one array.
        warnings: sentences about the data that a person should read.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    preprocess: Mapping[str, Any] | None
    sample_shape: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """The three splits, in the order of their purpose."""
        return self.train, self.validation, self.test

    def describe(self) -> JsonDict:
        """Return the content of ``splits.json``; equal data give equal JSON."""
        return {
            "classes": list(self.classes),
            "sample_shape": list(self.sample_shape),
            "preprocess": None if self.preprocess is None else dict(self.preprocess),
            "warnings": list(self.warnings),
            "splits": {split.name: split.describe(self.classes) for split in self.splits},
        }


def row_ranges(rows: np.ndarray) -> str:
    """Write rising rows in short: ``0-3,5,9-20``."""
    if len(rows) == 0:
        return ""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    firsts = rows[np.concatenate([[0], breaks + 1])]
    lasts = rows[np.concatenate([breaks, [len(rows) - 1]])]
    return ",".join(
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
    )
