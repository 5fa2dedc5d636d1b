"""What a file system can put in the place of a bundle, or of a file in it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from deploykit import runtime
from tampered.bundles import Files, Mutation, file_of, folder_of

GIANT = 2**33  # bytes, none of which takes a place on the disk
DEPTH = 40
Change = Callable[[Path, Path], object]  # of a file's path, with a folder outside of the bundle


def altered_places(files: Files) -> Iterator[Mutation]:
    """Yield folders in which something is no plain file of its own, and paths of no bundle."""
    for kind, changes in (("link", LINKS), ("no plain file", OTHERS), ("giant file", GIANTS)):
        for name in files:
            for told, change in changes.items():
                yield Mutation(kind, f"{name}: {told}", partial(_change, files, name, change))
    yield Mutation("too many", "folders", partial(_plant, files, _many))
    for told, plant in PLANTS.items():
        yield Mutation("planted in the folder", told, partial(_plant, files, plant))
    for told, make in PATHS.items():
        yield Mutation("path of no bundle", told, partial(make, files))


def _change(files: Files, name: str, change: Change, place: Path) -> Path:
    folder = folder_of(files, place)
    change(folder / name, _outside(place))
    return folder


def _plant(files: Files, plant: Change, place: Path) -> Path:
    folder = folder_of(files, place)
    plant(folder, _outside(place))
    return folder


def _outside(place: Path) -> Path:
    outside = place / "elsewhere"
    outside.mkdir()
    return outside


def _move(path: Path, outside: Path) -> Path:
    return path.rename(outside / path.name)


def _listen(path: Path) -> None:
    """Put a socket there; a name that long must be reached from beside it."""
    here = Path.cwd()
    path.unlink()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _replace(path: Path, put: Callable[[Path], object]) -> None:
    path.unlink()
    put(path)


LINKS: dict[str, Change] = {
    "link to it elsewhere": lambda path, outside: path.symlink_to(_move(path, outside)),
    "link to it beside it": lambda path, _: path.symlink_to(path.rename(f"{path}.old").name),
    "link to a device": lambda path, _: _replace(path, lambda new: new.symlink_to("/dev/zero")),
    "link to nothing": lambda path, _: _replace(path, lambda new: new.symlink_to("nothing")),
    "link to itself": lambda path, _: _loop(path),
    "hard link to it elsewhere": lambda path, outside: os.link(path, outside / path.name),
    "hard link to it beside it": lambda path, _: os.link(path, f"{path}.old"),
}
OTHERS: dict[str, Change] = {
    "pipe": lambda path, _: _replace(path, os.mkfifo),
    "socket": lambda path, _: _listen(path),
    "folder": lambda path, _: _replace(path, Path.mkdir),
    "folder with it": lambda path, _: (
        path.rename(f"{path}.old"),
        path.mkdir(),
        Path(f"{path}.old").rename(path / path.name),
    ),
}
GIANTS: dict[str, Change] = {
    "8 GiB of zeros": lambda path, _: _replace(path, _zeros),
    "and 8 GiB of zeros": lambda path, _: os.truncate(path, GIANT),
}


def _zeros(path: Path) -> None:
    path.touch()
    os.truncate(path, GIANT)


def _deep(folder: Path) -> None:
    for _ in range(DEPTH):
        folder /= "deep"
    folder.mkdir(parents=True)


def _many(folder: Path, _: Path) -> None:
    for number in range(runtime.MAX_FILES + 1):
        (folder / str(number)).mkdir()


def _named(name: bytes, folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).touch()


PLANTS: dict[str, Change] = {
    "link to golden elsewhere": lambda folder, outside: (folder / "golden").symlink_to(
        _move(folder / "golden", outside)
    ),
    "link to the folder above": lambda folder, _: (folder / "up").symlink_to(".."),
    "link to the folder": lambda folder, _: (folder / "here").symlink_to("."),
    "link to the root": lambda folder, _: (folder / "root").symlink_to("/"),
    "link to nothing": lambda folder, _: (folder / "nothing").symlink_to("nowhere"),
    "pipe": lambda folder, _: os.mkfifo(folder / "pipe"),
    "empty folder": lambda folder, _: (folder / "empty").mkdir(),
    "folders in folders": lambda folder, _: _deep(folder),
    "name of no text": lambda folder, _: _named(b"\xff\xfe", folder),
    "name of two lines": lambda folder, _: _named(b"two\nlines", folder),
    "name that moves the cursor": lambda folder, _: _named(b"\x1b[2J", folder),
    "name of 255 bytes": lambda folder, _: _named(b"x" * 255, folder),
    "itself": lambda folder, _: shutil.copytree(folder, folder.parent / "copy").rename(
        folder / "copy"
    ),
    "signature that is a link": lambda folder, _: (folder / runtime.SIGNATURE).symlink_to("run.py"),
    "signature that is a pipe": lambda folder, _: os.mkfifo(folder / runtime.SIGNATURE),
    "signature that is a folder": lambda folder, _: (folder / runtime.SIGNATURE).mkdir(),
    "signature of 8 GiB": lambda folder, _: _zeros(folder / runtime.SIGNATURE),
    "signature of 64 KiB and a byte": lambda folder, _: (folder / runtime.SIGNATURE).write_bytes(
        bytes(runtime.MAX_SIGNATURE_BYTES + 1)
    ),
    "signature that is a hard link": lambda folder, outside: os.link(
        file_of(b"{}", outside), folder / runtime.SIGNATURE
    ),
}


def _pipe(_: Files, place: Path) -> Path:
    os.mkfifo(place / "bundle")
    return place / "bundle"


def _dangling(_: Files, place: Path) -> Path:
    (place / "bundle").symlink_to("nowhere")
    return place / "bundle"


def _sparse(files: Files, place: Path) -> Path:
    path = file_of(runtime.pack(files), place)
    os.truncate(path, GIANT)
    return path


def _within(files: Files, place: Path) -> Path:
    return folder_of(files, place) / "golden"


PATHS: dict[str, Callable[[Files, Path], Path]] = {
    "nothing": lambda _, place: place / "bundle",
    "folder of the bundle's folder": lambda files, place: folder_of(files, place).parent,
    "folder in the bundle": _within,
    "file of the bundle": lambda files, place: folder_of(files, place) / runtime.MANIFEST,
    "empty file": lambda _, place: file_of(b"", place),
    "pipe": _pipe,
    "link to nothing": _dangling,
    "zip file of 8 GiB": _sparse,
    "8 GiB of zeros": lambda _, place: (path := file_of(b"", place), os.truncate(path, GIANT))[0],
    "below a file": lambda files, place: folder_of(files, place) / runtime.MODEL / "x",
    "a name that is too long": lambda _, place: place / ("x" * 300),
}
