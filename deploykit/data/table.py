"""What a source gives before anything is split or decoded."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from deploykit.errors import DataError

Origin = Callable[[int], str]
Encoded = Callable[[int], bytes]


@dataclass(frozen=True, eq=False)
class Table:
    """Labelled samples of one file or folder, in the order of their rows.

    Attributes:
        name: the file or folder as the recipe calls it.
        labels: class numbers, int64 ``(n,)``, or class names, one a row.
        content: pixels or features ``(n, ...)``, or a function that gives the encoded
            image of a row.
        origin: where a row comes from, for people: ``train.parquet, row 3``.
        classes: class names in label order, where the data state them.
    """

    name: str
    labels: np.ndarray | tuple[str, ...]
    content: np.ndarray | Encoded
    origin: Origin
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_names(self) -> bool:
        """Whether the labels are names rather than class numbers."""
        return isinstance(self.labels, tuple)

    def take(self, rows: np.ndarray) -> Table:
        """Return the table that holds only ``rows``, int64 ``(m,)``; origins stay true."""
        labels, content, origin = self.labels, self.content, self.origin
        return Table(
            name=self.name,
            labels=tuple(labels[row] for row in rows)
            if isinstance(labels, tuple)
            else labels[rows],
            content=content[rows]
            if isinstance(content, np.ndarray)
            else lambda row: content(int(rows[row])),
            origin=lambda row: origin(int(rows[row])),
            classes=self.classes,
        )


def rows_of(name: str) -> Origin:
    """Return the origin of rows that have no better name than their number, from 0."""
    return lambda row: f"{name}, row {row}"


def refuse_rows(origin: Origin, rows: Sequence[int] | np.ndarray, problem: str) -> None:
    """Raise for the bad rows, if any: the first is named, the others are counted.

    Raises:
        DataError: there is a bad row.
    """
    if len(rows) == 0:
        return
    others = len(rows) - 1
    more = f" (and {others} more {'row' if others == 1 else 'rows'})" if others else ""
    raise DataError(f"{origin(int(rows[0]))}: {problem}{more}")


def digest(array: np.ndarray) -> bytes:
    """Return a digest of the values of one sample."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()


def concatenate(name: str, tables: Sequence[Table]) -> Table:
    """Join tables of encoded images that lie in several files of one folder.

    Raises:
        DataError: the files disagree about their classes or their kind of label.
    """
    first = tables[0]
    for table in tables[1:]:
        if table.has_names != first.has_names or table.classes != first.classes:
            raise DataError(
                f"{table.name}: expected the labels and classes of {first.name}; "
                "files of one folder must agree"
            )
    ends = list(accumulate(len(table) for table in tables))

    def locate(row: int) -> tuple[Table, int]:
        index = bisect.bisect_right(ends, row)
        return tables[index], row - (ends[index] - len(tables[index]))

    def encoded(row: int) -> bytes:
        table, inner = locate(row)
        return bytes(table.content(inner)) if callable(table.content) else b""

    def origin(row: int) -> str:
        table, inner = locate(row)
        return table.origin(inner)

    return Table(name, _join_labels(tables), encoded, origin, first.classes)


def _join_labels(tables: Sequence[Table]) -> np.ndarray | tuple[str, ...]:
    if tables[0].has_names:
        return tuple(str(label) for table in tables for label in table.labels)
    return np.concatenate([np.asarray(table.labels) for table in tables])
