"""From labelled tables to the splits of a Dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.data.arrays import array_samples, image_content
from deploykit.data.dataset import Dataset, Samples, Split
from deploykit.data.images import decode_table, make_preprocess
from deploykit.data.labels import choose_classes, encode_labels, refuse_absent_classes
from deploykit.data.splits import cut_stratified, find_duplicates, limit_rows
from deploykit.data.table import Table
from deploykit.errors import DataError

if TYPE_CHECKING:
    from deploykit.recipe.sections import DataSection

IMAGE_TASK = "image-classification"


@dataclass(frozen=True)
class _Part:
    """A table with its class numbers and the rows of each split that it feeds."""

    table: Table
    labels: np.ndarray
    rows: Mapping[str, np.ndarray]


def build_dataset(
    tables: Mapping[str, Table],
    section: DataSection,
    *,
    task: str,
    seed: int,
    halve: str | None = None,
) -> Dataset:
    """Check, cut and read the samples of one table a split, or fewer.

    Args:
        tables: ``train``, and the splits that have a table of their own.
        section: the recipe's data section.
        task: ``image-classification`` or ``classification``.
        seed: the recipe's.
        halve: the table of which the test split is a half; else the absent splits are cut
            from ``train`` by the section's fractions.

    Raises:
        DataError: anything is wrong with the data.
    """
    for table in tables.values():
        if len(table) == 0:
            raise DataError(f"{table.name}: expected samples, got none")
    if task == IMAGE_TASK:
        tables = {key: _with_pixels(table) for key, table in tables.items()}
    others = [table for key, table in tables.items() if key != "train"]
    classes = choose_classes(tables["train"], others, section.classes)
    parts = {
        key: _cut(key, table, classes, _fractions(key, tables, section, halve), section, seed)
        for key, table in tables.items()
    }
    preprocess, shape, samples = _read_samples(
        {key: part.table for key, part in parts.items()}, section, task
    )
    splits = {
        name: Split(name, part.table.name, part.labels[rows], samples[key], rows)
        for key, part in parts.items()
        for name, rows in part.rows.items()
    }
    for name, split in splits.items():
        refuse_absent_classes(f"{name} split ({split.file})", split.labels, classes)
    warnings = find_duplicates(
        {name: splits[name].digests() for name in ("train", "validation", "test")},
        {name: split.origin for name, split in splits.items()},
    )
    return Dataset(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        classes=classes,
        preprocess=preprocess,
        sample_shape=shape,
        warnings=warnings,
    )


def _with_pixels(table: Table) -> Table:
    if isinstance(table.content, np.ndarray):
        return replace(table, content=image_content(table))
    return table


def _fractions(
    key: str, tables: Mapping[str, Table], section: DataSection, halve: str | None
) -> dict[str, float]:
    """Say what is cut out of a table for the splits that have none of their own."""
    if key == halve:
        return {"test": 0.5}
    if key != "train" or halve is not None:
        return {}
    named = {"validation": section.validation, "test": section.test}
    return {
        name: share
        for name, share in named.items()
        if name not in tables and not isinstance(share, str)
    }


def _cut(
    key: str,
    table: Table,
    classes: tuple[str, ...],
    fractions: Mapping[str, float],
    section: DataSection,
    seed: int,
) -> _Part:
    labels = encode_labels(table, classes)
    chosen = limit_rows(labels, section.limit, seed=seed)
    if len(chosen) < len(labels):
        table, labels = table.take(chosen), labels[chosen]
    rows = cut_stratified(labels, fractions, seed=seed, classes=classes, name=table.name, rest=key)
    return _Part(table, labels, rows)


def _read_samples(
    tables: Mapping[str, Table], section: DataSection, task: str
) -> tuple[dict[str, Any] | None, tuple[int, ...], dict[str, Samples]]:
    """Return the preprocessing, the shape of a sample and the samples of each table."""
    if task == IMAGE_TASK:
        preprocess = make_preprocess(
            tables["train"],
            size=section.size,
            channels=section.channels,
            resize=section.resize,
            normalize=section.normalize,
        )
        shape = (preprocess["height"], preprocess["width"], preprocess["channels"])
        return preprocess, shape, {key: decode_table(t, preprocess) for key, t in tables.items()}
    samples = {key: array_samples(table) for key, table in tables.items()}
    shape = samples["train"].values.shape[1:]
    for key, found in samples.items():
        if found.values.shape[1:] != shape:
            raise DataError(
                f"{tables[key].name}: expected samples of shape {shape} as in "
                f"{tables['train'].name}, got {found.values.shape[1:]}"
            )
    return None, shape, dict(samples)
