"""Publish files and folders so that a reader sees the old one or the new one, always whole.

Everything is written beside its destination, forced to the disk, and then renamed. What a
killed process left behind is removed by the next one that publishes to the same place.
"""

import ctypes
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from deploykit.errors import UsageError

LOCK = ".lock"
MANIFEST = "manifest.json"
Kind = Literal["bundle", "zip", "run", "candidate"]
# What a folder of each kind always holds, and what else it may: one with anything more may not be
# replaced by --force.
OUR_FOLDERS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bundle": ((MANIFEST, "model.onnx"), ("run.py", "README.md", "golden", "signature.json")),
    "run": (
        ("recipe.yaml", LOCK),
        (
            *("splits.json", "calibration.npy", "golden", "logs", "checkpoints", "candidates"),
            *("onnx", "trials", "measurements.json", "latencies*.json"),
            *("report.json", "report.html"),
        ),
    ),
    "candidate": (("structure.json",), ("model.safetensors",)),
}
# How the zip file of a bundle begins: an entry's head of 30 bytes, its name, its first key.
ZIP_MAGIC, ZIP_FIRST, ZIP_HEAD_BYTES = b"PK\3\4", b'manifest.json{"digest":"', 30
LEFT_OVER = (".*.tmp", ".*.staging", ".DS_Store")  # by this or another program; no loss
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace the file at ``path`` by ``data``, wholly or not at all; it keeps its mode.

    Args:
        path: the file.
        data: all of it, or its pieces in order, each written before the next is asked for.

    Raises:
        UsageError: the place cannot be written.
    """
    with told_as_usage(path):
        _remove_dead(path.parent, path.name, "tmp")
        staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with staging.open("xb") as file:
                _lock(file.fileno())
                with suppress(FileNotFoundError):
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace the file at ``path`` by readable JSON: indented, keys sorted, no NaN."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())


def refuse_existing(destination: Path, force: bool, kind: Kind = "bundle") -> None:
    """Refuse a destination that stands already, before any work is done for it.

    With ``force`` a folder of the same ``kind``, or an empty one, may be replaced, or the zip file
    of a bundle by another; a link, another file and a folder of anything else may not, lest a
    mistyped path destroy it.

    Raises:
        UsageError: it may not be replaced.
    """
    with told_as_usage(destination):
        if not os.path.lexists(destination):
            return
        if not force:
            raise UsageError(
                f"{destination}: exists already; choose another place, or replace it with --force"
            )
        if found := _foreign(destination, kind):
            kind_told = "the zip file of a bundle" if kind == "zip" else f"a {kind}"
            raise UsageError(
                f"{destination}: expected {kind_told} to replace, found {found}; choose another "
                "place or remove it yourself"
            )


def _foreign(destination: Path, kind: Kind) -> str:
    """Say what shows that something is not of this kind; nothing if it is, or if it is empty."""
    if kind == "zip":
        return "" if _is_zip(destination) else "something else"
    if destination.is_symlink() or not destination.is_dir():
        return "something else"
    names = sorted(entry.name for entry in destination.iterdir())
    kinds = (one for one, (always, _) in OUR_FOLDERS.items() if set(always) <= set(names))
    found = next(kinds, None)
    if found not in {None, kind}:
        return f"a {found}"
    always, others = OUR_FOLDERS[found] if found else ((), ())
    ours = (*always, *others, *LEFT_OVER)
    declared = _declared(destination) if found == "bundle" else set()
    foreign = (name for name in names if name not in declared and not _fits(name, ours))
    return next((f"something else in it, {name}" for name in foreign), "")


def _declared(bundle: Path) -> set[str]:
    """Name what a bundle's manifest says that it holds; nothing where it is damaged."""
    try:
        files = json.loads((bundle / MANIFEST).read_bytes())["files"]
        return {name.split("/")[0] for name in files}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()


def _is_zip(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(ZIP_HEAD_BYTES + len(ZIP_FIRST))
    return head.startswith(ZIP_MAGIC) and head[ZIP_HEAD_BYTES:] == ZIP_FIRST


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def publish_folder(
    destination: Path, *, force: bool = False, kind: Kind = "bundle"
) -> Iterator[Path]:
    """Give an empty folder to write in, which then becomes ``destination`` in one step.

    If the block raises, nothing of it stays and ``destination`` is as it was.

    Args:
        destination: where the folder will stand; its parent is made if need be.
        force: replace what stands there, as ``refuse_existing`` allows.
        kind: of the folder, and so of what it may replace.

    Yields:
        The folder to write in, on the same filesystem.

    Raises:
        UsageError: ``destination`` exists, or cannot be written.
    """
    refuse_existing(destination, force, kind)
    with told_as_usage(destination):
        destination = destination.absolute()
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _guard(destination.parent):
            staging, lock = _make_staging(destination)
        try:
            yield staging
            _sync_tree(staging)
            with _guard(destination.parent):
                refuse_existing(destination, force, kind)
                _swap(staging, destination)
            _sync(destination.parent)
        finally:
            # After an exchange this is the old folder.
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Hold the folder ``path`` alone; a lock vanishes with the process that holds it.

    Raises:
        UsageError: another process holds it.
    """
    with told_as_usage(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _lock(descriptor):
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                f"{path}: process {holder} works in it; wait for it or choose another folder"
            )
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextmanager
def told_as_usage(path: Path, remedy: str = "free the place or choose another") -> Iterator[None]:
    """Tell what the file system refuses (full, read-only, no such folder) in one sentence."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{error.filename or path}: cannot be written: {error.strerror or error}; {remedy}"
        ) from error


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _guard(parent: Path) -> Iterator[None]:
    """Let one process at a time make stagings in ``parent`` and swap them in."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_staging(destination: Path) -> tuple[Path, int]:
    """Make a locked folder beside the destination, and clear up after dead processes."""
    parent, name = destination.parent, destination.name
    for aside in parent.glob(_pattern(name, "old")):
        # Killed between the two renames of _swap: the old folder has no other name.
        if destination.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(destination)
    _remove_dead(parent, name, "staging")
    staging = destination.with_name(f".{name}.{secrets.token_hex(4)}.staging")
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY | os.O_CLOEXEC)
    _lock(lock)
    return staging, lock


def _pattern(name: str, suffix: str) -> str:
    return f".{glob.escape(name)}.????????.{suffix}"


def _remove_dead(parent: Path, name: str, suffix: str) -> None:
    """Remove what nobody holds a lock on any more: its writer was killed."""
    for stale in parent.glob(_pattern(name, suffix)):
        with suppress(OSError):
            descriptor = os.open(stale, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _lock(descriptor):
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            finally:
                os.close(descriptor)


def _swap(staging: Path, destination: Path) -> None:
    """Put ``staging`` in the place of ``destination``; what stood there takes its name."""
    if not destination.exists():
        staging.rename(destination)
    elif not _exchange(staging, destination):
        # Without the system's exchange the place is empty for a moment.
        aside = staging.with_suffix(".old")
        destination.rename(aside)
        try:
            staging.rename(destination)
        except BaseException:
            aside.rename(destination)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = (os.fsencode(left), os.fsencode(right))
    if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(right))


def _sync_tree(folder: Path) -> None:
    """Force a folder to the disk, its manifest last: with it there, everything is."""
    paths = sorted(folder.rglob("*"), key=lambda path: (path == folder / MANIFEST, path))
    for path in paths:
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
