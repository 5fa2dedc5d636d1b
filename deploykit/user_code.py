"""A user's own function: ``path/to/file.py:function``.

The file is code of the user's own and runs with the user's rights.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from deploykit.errors import DeploykitError
from deploykit.seeds import stable_seed


def load_function(
    name: str, base: Path, *, key: str, error: type[DeploykitError]
) -> Callable[..., Any]:
    """Run the file and return its function.

    While the file runs, and whenever the function is called, files beside it can be imported,
    and what the code raises is told in one sentence.

    Args:
        name: ``path/to/file.py:function``.
        base: folder that a relative path starts from.
        key: of the recipe, for messages.
        error: what is raised.

    Raises:
        DeploykitError: as ``error``: no such file or function, or the file fails when it is run.
    """
    path, _, wanted = name.rpartition(":")
    file = (base / path).resolve()
    if not file.exists():
        raise error(f"{key}: expected a Python file, got {path!r}: no such file; mend the path")
    if not file.is_file():
        raise error(f"{key}: {path}: expected a regular file, got none; mend the path")

    @contextmanager
    def told() -> Iterator[None]:
        sys.path.insert(0, str(file.parent))
        try:
            yield
        except DeploykitError:
            raise
        except (Exception, SystemExit) as raised:  # the user's code may raise anything
            why = " ".join(f"{type(raised).__name__}: {raised}".split())
            raise error(f"{key}: {name}: its code raised {why}; mend the file") from raised
        finally:
            sys.path.remove(str(file.parent))

    with told():
        function = getattr(_run(file), wanted, None)
    if not callable(function):
        raise error(f"{key}: expected a function {wanted!r} in {path}, got none; mend the name")
    wrapped: Callable[..., Any] = told()(function)
    return wrapped


def _run(file: Path) -> ModuleType:
    # Named by its path, so that two files called model.py stay apart.
    module_name = f"_deploykit_user_{stable_seed(str(file)):x}"
    spec = spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
