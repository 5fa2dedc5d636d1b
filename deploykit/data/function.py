"""A user's own function as a source."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from deploykit.data.arrays import make_table
from deploykit.data.dataset import Dataset
from deploykit.data.sources import require_file
from deploykit.data.table import Table
from deploykit.errors import DataError
from deploykit.seeds import stable_seed

_SPLITS = ("train", "validation", "test")


def call_function(source: str, base: Path) -> Dataset | dict[str, Table]:
    """Call ``path/to/file.py:function`` without arguments and return what it gives.

    Returns:
        A Dataset, taken as it is; or tables: ``train`` from ``(x, y)``, or those of a
        dict of splits.

    Raises:
        DataError: there is no such function, it fails, or gives something else.
    """
    value = _call(source, base)
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


def _call(source: str, base: Path) -> object:
    file, _, function_name = source.rpartition(":")
    path = base / file
    if not path.exists():
        raise DataError(f"data.source: expected a Python file, got {file!r}; {path} is missing")
    require_file(file, path)
    # Registered, because dataclasses look their own module up.
    module_name = f"deploykit_user_data_{stable_seed(str(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"data.source: expected a Python file, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise DataError(
                f"data.source: expected a function {function_name!r} in {file}, got none"
            )
        return function()
    except DataError:
        del sys.modules[module_name]
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        del sys.modules[module_name]
        text = f"{type(error).__name__}: {error}"
        raise DataError(f"{source}: expected data, but the function raised {text}") from error
