"""From the recipe's data section, or from arrays, to a Dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.data.arrays import make_table
from deploykit.data.build import IMAGE_TASK, build_dataset
from deploykit.data.csv_file import read_csv
from deploykit.data.dataset import Dataset
from deploykit.data.function import call_function
from deploykit.data.labels import refuse_absent_classes
from deploykit.data.parquet import read_parquet
from deploykit.data.sources import existing_path, read_digits, read_imagefolder, read_numpy
from deploykit.data.table import Table
from deploykit.errors import DataError

if TYPE_CHECKING:
    from deploykit.recipe.sections import DataSection

_IMAGE_FILES = ("parquet", "imagefolder")
_FILES = (*_IMAGE_FILES, "numpy", "csv")
Pair = tuple[Any, Any]


def load_dataset(section: DataSection, *, task: str, seed: int, base: Path) -> Dataset:
    """Read, check, split and decode the samples that a recipe names.

    Args:
        section: the recipe's data section.
        task: ``image-classification``, or ``classification`` of arrays.
        seed: the recipe's; equal seeds split equal data equally.
        base: the recipe's folder, which relative paths start from.

    Returns:
        Three splits, each with a sample of every class.

    Raises:
        DataError: anything is wrong with the data; the first bad row is named.
    """
    if ".py:" in section.source:
        _refuse_paths(section)
        found = call_function(section.source, base)
        if isinstance(found, Dataset):
            return _checked(found, section, task)
        return build_dataset(found, section, task=task, seed=seed)
    return build_dataset(_read_tables(section, task, base), section, task=task, seed=seed)


def dataset_from_arrays(
    train: Pair,
    validation: Pair,
    test: Pair | None = None,
    *,
    classes: tuple[str, ...] | None = None,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    seed: int = 0,
) -> Dataset:
    """Make a Dataset of arrays.

    Without ``test`` a stratified half of ``validation`` becomes the test split: the rows of
    ``train`` may have been seen by the weights.

    Args:
        train: ``(x, y)``; x are images, uint8 ``(n, H, W)`` or ``(n, H, W, C)``, or
            features, other numbers ``(n, ...)``; y are class numbers or names ``(n,)``.
        validation: the same, for decisions.
        test: the same, for the last word.
        classes: class names in label order.
        mean: of pixels, 0 to 1 scale; one number or one a channel.
        std: of pixels, 0 to 1 scale; one number or one a channel.
        seed: decides how validation is halved.

    Returns:
        Three splits; a warning says if validation was halved.

    Raises:
        DataError: counts, shapes, dtypes or labels are not what they must be.

    Example:
        >>> data = dataset_from_arrays((x, y), (x_held_out, y_held_out))  # doctest: +SKIP
    """
    from deploykit.recipe.sections import DataSection, NormalizeSection

    pairs = {"train": train, "validation": validation, "test": test}
    tables = {
        key: make_table(key, pair[0], pair[1]) for key, pair in pairs.items() if pair is not None
    }
    first = tables["train"].content
    images = isinstance(first, np.ndarray) and first.dtype == np.uint8 and first.ndim in {3, 4}
    section = DataSection(
        source="arrays", classes=classes, normalize=NormalizeSection(mean=mean, std=std)
    )
    task = IMAGE_TASK if images else "classification"
    if test is not None:
        return build_dataset(tables, section, task=task, seed=seed)
    dataset = build_dataset(tables, section, task=task, seed=seed, halve="validation")
    note = "no test split was given: half of the validation split became the test split"
    return replace(dataset, warnings=(note, *dataset.warnings))


def _read_tables(section: DataSection, task: str, base: Path) -> dict[str, Table]:
    if section.source == "digits":
        _refuse_paths(section)
        return {"train": read_digits(as_images=task == IMAGE_TASK)}
    if section.source not in _FILES:
        raise DataError(
            f"data.source: expected digits, {', '.join(_FILES)} or path/to/file.py:function, "
            f"got {section.source!r}"
        )
    if section.source in _IMAGE_FILES and task != IMAGE_TASK:
        raise DataError(
            f"data.source: expected digits, numpy, csv or a function for task {task}, "
            f"got {section.source}, which holds images"
        )
    if section.train is None:
        raise DataError(f"data.train: expected the path that source {section.source} reads")
    read = _reader(section, task)
    named = {"train": section.train, "validation": section.validation, "test": section.test}
    return {
        key: read(name, existing_path(key, name, base))
        for key, name in named.items()
        if isinstance(name, str)
    }


def _reader(section: DataSection, task: str) -> Callable[[str, Path], Table]:
    columns = {"image_column": section.image_column, "label_column": section.label_column}
    if section.source == "parquet":
        return lambda name, path: read_parquet(name, path, **columns)
    if section.source == "imagefolder":
        return read_imagefolder
    if section.source == "numpy":
        return read_numpy
    images = section.image_column if task == IMAGE_TASK else None
    return lambda name, path: read_csv(
        name,
        path,
        image_column=images,
        label_column=section.label_column,
        classes=section.classes,
    )


def _refuse_paths(section: DataSection) -> None:
    if section.train is not None:
        raise DataError(f"data.train: expected none, got a path; {section.source} reads no file")
    for key, value in (("validation", section.validation), ("test", section.test)):
        if isinstance(value, str):
            raise DataError(
                f"data.{key}: expected a fraction, got a path; {section.source} reads no file"
            )


def _checked(dataset: Dataset, section: DataSection, task: str) -> Dataset:
    """Hold a Dataset of a user's own to the promises of ours."""
    if (dataset.preprocess is not None) != (task == IMAGE_TASK):
        kind = "arrays" if dataset.preprocess is None else "images"
        raise DataError(f"{section.source}: expected data for task {task}, got {kind}")
    for split in dataset.splits:
        refuse_absent_classes(split.name, split.labels, dataset.classes)
    return dataset
