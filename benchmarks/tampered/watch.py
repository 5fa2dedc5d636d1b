"""What reading an altered bundle set off, and whether it may."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import onnxruntime

from deploykit import runtime
from deploykit.errors import BundleError, VerificationError
from tampered.bundles import Mutation

PASSED, OPENED, OUTSIDE, OTHER, HUNG = "let pass", "opened", "outside", "other error", "hung"
FAULTS = {
    PASSED: "let pass",
    OPENED: "models that ONNX Runtime was given",
    OUTSIDE: "accesses outside of the bundle",
    OTHER: "errors of another kind, or of several lines",
    HUNG: "hangs",
}
REFUSALS = (runtime.BrokenBundleError, BundleError, VerificationError)
EXAMPLES = 5
# Audit events of Python that name places, and which of their arguments do; see
# https://docs.python.org/3/library/audit_events.html.
PLACES = {
    **dict.fromkeys(("open", "os.listdir", "os.scandir", "os.mkdir", "os.rmdir"), (0,)),
    **dict.fromkeys(("os.remove", "os.truncate", "os.chmod", "os.chown", "os.utime"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), (0, 1)),
    **dict.fromkeys(("shutil.rmtree", "os.chdir", "os.listxattr", "os.setxattr"), (0,)),
}
# And those of what a reader of files has no use for, wherever it is.
DEEDS = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen", "urllib.Request"),
)


class Hung(BaseException):
    """Reading took too long; no ``except Exception`` catches it."""


@dataclass
class Seen:
    """What happened while something was read.

    Attributes:
        sessions: how many models ONNX Runtime was given.
        touched: what was opened, listed or changed: the event, the place and how it was opened.
        removed: the folder that was removed last; where nothing was, the working directory.
    """

    sessions: int = 0
    touched: list[tuple[str, Path, int]] = field(default_factory=list)
    removed: Path = Path()

    def note(self, event: str, place: Any, flags: int) -> None:
        """Add what an audit event tells of a place."""
        path = Path(os.fsdecode(place))
        if event == "shutil.rmtree":
            self.removed = path
        # It opens what it removes from the folder above, and audit events tell the name alone.
        self.touched.append((event, self.removed / path, flags))


_watched: list[Seen] = []  # the one that is being filled, if any


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Remember an audit event; a hook cannot be taken away again, so it looks for who asks."""
    if not _watched:
        return
    if event in PLACES:
        flags = arguments[2] if event == "open" else 0
        for one in PLACES[event]:
            if isinstance(arguments[one], (str, bytes, os.PathLike)):  # else a descriptor
                _watched[0].note(event, arguments[one], flags or 0)
    elif event in DEEDS:
        _watched[0].note(event, "", 0)


@cache
def _hook() -> None:
    sys.addaudithook(_note)


@contextmanager
def watching() -> Iterator[Seen]:
    """Note what Python's audit hooks tell and every model that is opened; none is."""
    _hook()
    seen, real = Seen(), onnxruntime.InferenceSession

    def refuse(*_: object, **__: object) -> NoReturn:
        seen.sessions += 1
        raise RuntimeError("a model was opened")

    onnxruntime.InferenceSession = refuse
    _watched.append(seen)
    try:
        yield seen
    finally:
        _watched.clear()
        onnxruntime.InferenceSession = real


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise Hung after so many seconds; None: never."""
    if seconds is None:
        yield
        return

    def give_up(_: int, __: FrameType | None) -> NoReturn:
        raise Hung

    handler = signal.signal(signal.SIGALRM, give_up)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # a test's own, if it has one


Read = Callable[[Path], object]


@dataclass
class Tally:
    """Counts of what came of altered bundles.

    Attributes:
        readers: who reads, for each judge.
        allowed: files and folders outside of a bundle that reading it needs.
        limit_s: seconds after which reading counts as hung; None: for ever.
    """

    readers: Mapping[str, Sequence[Read]]
    allowed: Collection[Path]
    limit_s: float | None = None
    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    slowest_s: float = 0.0

    def judge(self, mutation: Mutation, place: Path) -> set[str]:
        """Let everyone read one altered bundle; return what they did that they may not."""
        path = mutation.make(place)
        found: set[str] = set()
        for read in self.readers[mutation.judge]:
            found |= self._read(read, path)
        self.tried[mutation.kind] += 1
        self.refused[mutation.kind] += not found
        for fault in found:
            self.faults[fault] += 1
            told = self.examples.setdefault(fault, [])
            if len(told) < EXAMPLES:
                told.append(f"{mutation.kind}: {mutation.name}")
        return found

    def _read(self, read: Read, path: Path) -> set[str]:
        found, start = set(), time.perf_counter()
        with watching() as seen:
            try:
                with at_most(self.limit_s):
                    read(path)
                found.add(PASSED)
            except REFUSALS as error:
                if "\n" in str(error):
                    found.add(OTHER)
            except Hung:
                found.add(HUNG)
            except Exception:  # noqa: BLE001 - which one it is says nothing more
                found.add(OTHER)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
        if seen.sessions:
            found.add(OPENED)
        if any(self._is_outside(one, path) for one in seen.touched):
            found.add(OUTSIDE)
        return found

    def _is_outside(self, touched: tuple[str, Path, int], path: Path) -> bool:
        event, place, flags = touched
        if event in DEEDS:
            return True
        if flags & os.O_NOFOLLOW:  # a link there is refused, not followed
            real = Path(os.path.realpath(place.parent)) / place.name
        else:
            real = Path(os.path.realpath(place))
        # The bundle itself may be reached by a link.
        inside = (path, Path(os.path.realpath(path)), *self.allowed)
        return not any(real.is_relative_to(one) for one in inside)
