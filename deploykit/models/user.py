"""A user's own model: ``path/to/file.py:function``."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from deploykit.errors import ModelError


def load_factory(name: str, base: Path) -> Callable[..., Any]:
    """Run the file and return its function.

    The file is code of the user's own and runs with the user's rights.

    Args:
        name: ``path/to/file.py:function``.
        base: folder that a relative path starts from.

    Raises:
        ModelError: no such file or function, or the file fails when it is run.
    """
    path, _, function = name.rpartition(":")
    file = (base / path).resolve()
    if not file.is_file():
        raise ModelError(f"model.name: {name}: no such file: {file}")
    factory = getattr(_run(file, name), function, None)
    if not callable(factory):
        raise ModelError(f"model.name: {name}: {file} has no function {function!r}")
    return factory  # type: ignore[no-any-return]


def _run(file: Path, name: str) -> object:
    # Named by its path, so that two files called model.py stay apart.
    module_name = f"_deploykit_user_{abs(hash(file)):x}"
    spec = spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ModelError(f"model.name: {name}: {file} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        with _importable(file.parent):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ModelError(
            f"model.name: {name}: {file} failed: {type(error).__name__}: {error}"
        ) from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the file import its neighbours while it runs."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
