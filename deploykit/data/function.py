"""A user's own function as a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deploykit.data.arrays import make_table
from deploykit.data.dataset import Dataset
from deploykit.data.table import Table
from deploykit.errors import DataError
from deploykit.user_code import load_function

_SPLITS = ("train", "validation", "test")


def call_function(source: str, base: Path) -> Dataset | dict[str, Table]:
    """Call ``path/to/file.py:function`` without arguments and return what it gives.

    Returns:
        A Dataset, taken as it is; or tables: ``train`` from ``(x, y)``, or those of a
        dict of splits.

    Raises:
        DataError: there is no such function, it fails, or gives something else.
    """
    value = load_function(source, base, key="data.source", error=DataError)()
    if isinstance(value, Dataset):
        return value
    splits = value if isinstance(value, Mapping) else {"train": value}
    strange = [str(key) for key in splits if key not in _SPLITS]
    if strange or "train" not in splits:
        raise DataError(
            f"{source}: expected the splits train and, if there are any, validation and test, "
            f"got {', '.join(map(str, splits)) or 'none'}"
        )
    tables = {}
    for key, pair in splits.items():
        name = f"{source}, {key}" if value is splits else source
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"{name}: expected (x, y), got {type(pair).__name__}")
        tables[str(key)] = make_table(name, pair[0], pair[1])
    return tables
