"""Labels as they are written become class numbers, the same ones in every split."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from deploykit.data.table import Table, refuse_rows
from deploykit.errors import DataError

_INTEGER = re.compile(r"[+-]?[0-9]+")


def choose_classes(
    train: Table, others: Sequence[Table], given: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the class names in label order.

    The recipe's word counts first, then what the data state, then what the training
    labels show: their names in alphabetical order, or their numbers from 0.

    Raises:
        DataError: names repeat, the tables state different classes, or there are
            fewer than two.
    """
    classes = given if given is not None else _stated_classes(train, others)
    if classes is None and train.has_names:
        classes = tuple(sorted({str(label) for label in train.labels}))
    elif classes is None:
        classes = _numbered_classes(train)
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if repeated:
        raise DataError(f"data.classes: expected distinct names, got {repeated[0]!r} twice")
    if unwritable := [name for name in classes if any("\ud800" <= one <= "\udfff" for one in name)]:
        raise DataError(
            f"{train.name}: expected names of classes in UTF-8, got {unwritable[0]!a}; rename it"
        )
    if len(classes) < 2:
        raise DataError(
            f"{train.name}: expected at least 2 classes, got {len(classes)}; "
            "there is nothing to tell apart"
        )
    return classes


def _numbered_classes(train: Table) -> tuple[str, ...]:
    numbers = np.asarray(train.labels)
    # A class needs a sample, so no honest number reaches the count of rows.
    strange = np.flatnonzero((numbers < 0) | (numbers >= max(len(train), 2)))
    if len(strange):
        got = int(numbers[strange[0]])
        problem = f"label: expected classes numbered from 0, got {got} among {len(train)} rows"
        refuse_rows(train.origin, strange, f"{problem}; renumber them or name data.classes")
    return tuple(str(number) for number in range(int(numbers.max(initial=-1)) + 1))


def _stated_classes(train: Table, others: Sequence[Table]) -> tuple[str, ...] | None:
    for other in others:
        if train.classes and other.classes and other.classes != train.classes:
            raise DataError(
                f"{other.name}: expected the classes of {train.name} "
                f"({', '.join(train.classes)}), got {', '.join(other.classes)}; "
                "set data.classes to say which order holds"
            )
    return train.classes


def encode_labels(table: Table, classes: tuple[str, ...]) -> np.ndarray:
    """Return the class numbers of a table, int64 ``(n,)``.

    Raises:
        DataError: a label is not one of the classes; the first such row is named.
    """
    if isinstance(table.labels, tuple):
        numbers = {name: number for number, name in enumerate(classes)}
        encoded = np.array([numbers.get(name, -1) for name in table.labels], dtype=np.int64)
        expected = f"one of {_abridge(classes)}"
    else:
        encoded = table.labels
        expected = f"0 to {len(classes) - 1}"
    bad = np.flatnonzero((encoded < 0) | (encoded >= len(classes)))
    if len(bad):
        got = table.labels[int(bad[0])]
        shown = repr(got) if isinstance(got, str) else str(int(got))
        refuse_rows(table.origin, bad, f"label: expected {expected}, got {shown}")
    return encoded


def refuse_absent_classes(split: str, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """Check that every class has a sample in the split.

    Raises:
        DataError: the split is empty or a class is absent.
    """
    if len(labels) == 0:
        raise DataError(f"{split}: expected samples, got none; the split is empty")
    counts = np.bincount(labels, minlength=len(classes))
    absent = [classes[number] for number in np.flatnonzero(counts == 0)]
    if absent:
        more = f" (and {len(absent) - 1} more of {len(classes)} classes)" if absent[1:] else ""
        raise DataError(
            f"{split}: expected a sample of every class, got none of {absent[0]!r}{more}; "
            "add samples or take the class out of data.classes"
        )


def parse_text_labels(
    texts: Sequence[str], classes: tuple[str, ...] | None
) -> np.ndarray | tuple[str, ...]:
    """Read labels of a text file: numbers if all are, and no class is called like them."""
    named = set(classes or ())
    if all(text in named for text in texts) or not all(map(_INTEGER.fullmatch, texts)):
        return tuple(texts)
    # Text may hold an integer of any length; what int64 cannot hold is out of range anyway.
    limit = 2**62
    return np.array([max(-limit, min(limit, int(text))) for text in texts], dtype=np.int64)


def _abridge(names: tuple[str, ...], shown: int = 5) -> str:
    text = ", ".join(names[:shown])
    return text if len(names) <= shown else f"{text}, ... ({len(names)} classes)"
