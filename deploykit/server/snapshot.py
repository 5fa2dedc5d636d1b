"""Bundles as a server took them: copies in a private folder, which nobody changes under it.

A worker that dies at night is started again from the bytes that were verified in the evening,
whatever has become of the bundle since then.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploykit import runtime
from deploykit.artifacts import JsonDict
from deploykit.bundle import told_as_deploykit
from deploykit.publish import told_as_usage

PREFIX = "deploykit-serve-"
REMEDY = "free some space, or name another folder in TMPDIR"


@contextmanager
def private_folder() -> Iterator[Path]:
    """Give a folder that only this user can read, and remove it at the end.

    The folder is locked, and a lock vanishes with its process: what servers left behind that were
    killed is removed by the next one.

    Raises:
        UsageError: there is no place for it.
    """
    with told_as_usage(Path(tempfile.gettempdir()), REMEDY):
        _remove_dead()
        folder, lock = _make()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make() -> tuple[Path, int]:
    """Make a folder that is locked before it bears a name by which others look for dead ones."""
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    lock = os.open(unnamed, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return unnamed.rename(unnamed.with_name(unnamed.name[1:])), lock


def _remove_dead() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(folder, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def take_snapshot(bundle: Path, destination: Path) -> JsonDict:
    """Copy a bundle: the very bytes that were verified.

    Args:
        bundle: a bundle's folder.
        destination: where the copy goes; nothing stands there.

    Returns:
        The manifest.

    Raises:
        BundleError: the folder is not what its manifest says.
        UsageError: the copy cannot be written.
    """
    with told_as_deploykit():
        manifest, contents = runtime.read_bundle(bundle)
    files = {**contents, runtime.MANIFEST: runtime.canonical_json(manifest)}
    with told_as_usage(destination, REMEDY):
        for name, data in files.items():
            path = destination / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return manifest
