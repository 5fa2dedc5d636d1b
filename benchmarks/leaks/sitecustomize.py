"""A leak planted in a server: Python reads this at its start where the folder is on its path.

`DEPLOYKIT_LEAK` says what every request leaves behind: memory, descriptors or threads.
"""

import os
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

APP = "deploykit.server.app"
KEPT: list[Any] = []
RATE = 100  # descriptors and threads are few: one in so many requests leaves one


def leak(what: str, request: int) -> None:
    """Leave something behind that is never freed."""
    if what == "memory":
        KEPT.append(bytearray(8192))
    elif request % RATE == 0 and what == "descriptors":
        KEPT.append(os.open(os.devnull, os.O_RDONLY))
    elif request % RATE == 0 and what == "threads":
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def wrapped(call: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return an application's call that leaks."""
    count = 0

    async def leaking(*arguments: Any) -> None:
        nonlocal count
        count += 1
        leak(what, count)
        await call(*arguments)

    return leaking


class Finder:
    """Finds the module of the application, and wraps it when it has been loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the module's own spec with another end of its loading."""
        if name != APP:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_wrap(module: ModuleType) -> None:
            load(module)
            module.App.__call__ = wrapped(module.App.__call__, os.environ["DEPLOYKIT_LEAK"])

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


if "DEPLOYKIT_LEAK" in os.environ:
    sys.meta_path.insert(0, Finder())
