"""Alterations of the bytes and the names of a bundle's files, in both of its forms."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from deploykit import runtime
from tampered.bundles import Files, Mutation, as_folder, as_zip
from tampered.manifests import altered_manifests

Altered = Iterator[tuple[str, str, Files]]
LONG = 10_000  # bytes; only the runner is longer
# What Python would import in the place of a package, what a file manager leaves, and the like.
EXTRA = (
    *("more", "golden/003.png", "golden/more/deep/x", ".hidden", "numpy.py", "sitecustomize.py"),
    *("onnxruntime/__init__.py", "model.onnx.data", "weights.bin", "manifest.json.bak"),
    *("golden/manifest.json", "golden/signature.json", "Signature.json", "Manifest.json"),
    *("model.onnx.", "MODEL.ONNX", "Golden/000.png", ".DS_Store", "run.pyc"),
)


@dataclass(frozen=True)
class Amount:
    """How much is tried.

    Attributes:
        step: of so many bytes of a file one is flipped.
        long_step: likewise, of files that are longer than all others together.
        drawn: at most so many random alterations of a kind.
    """

    step: int
    long_step: int
    drawn: int


def altered_contents(files: Files, drawn: random.Random, amount: Amount) -> Iterator[Mutation]:
    """Yield everything that can be done to names and bytes alone."""
    for number, (kind, name, altered) in enumerate(_flips(files, drawn, amount)):
        yield as_folder(kind, name, altered)
        if number % 12 == 0:  # the zip file's own bytes are flipped too
            yield as_zip(kind, name, altered)
    others = (_cuts(files, drawn, amount), _growths(files), _swaps(files), _missing(files))
    more = (_extra(files), _renamed(files), altered_manifests(files, drawn))
    for kind, name, altered in itertools.chain(*others, *more):
        yield as_folder(kind, name, altered)
        yield as_zip(kind, name, altered)


def _flips(files: Files, drawn: random.Random, amount: Amount) -> Altered:
    for name, data in files.items():
        step = amount.long_step if len(data) > LONG else amount.step
        for at in range(drawn.randrange(step), len(data), step):
            yield "byte flipped", f"{name}, byte {at}", {**files, name: flipped(data, at, drawn)}


def flipped(data: bytes, at: int, drawn: random.Random) -> bytes:
    """Return the bytes with another one at a place."""
    return data[:at] + bytes([data[at] ^ drawn.randrange(1, 256)]) + data[at + 1 :]


def _cuts(files: Files, drawn: random.Random, amount: Amount) -> Altered:
    for name, data in files.items():
        lengths = {0, 1, len(data) // 2, len(data) - 1}
        lengths |= {drawn.randrange(len(data)) for _ in range(amount.drawn // len(files))}
        for length in sorted(lengths):
            yield "truncated", f"{name} to {length} bytes", {**files, name: data[:length]}


def _growths(files: Files) -> Altered:
    for name, data in files.items():
        mores = {"0": b"\0", "newline": b"\n", "itself": data, "1 MiB": bytes(2**20)}
        for told, more in mores.items():
            yield "appended", f"{name} and {told}", {**files, name: data + more}
            yield "prepended", f"{told} and {name}", {**files, name: more + data}


def _swaps(files: Files) -> Altered:
    for left, right in itertools.combinations(sorted(files), 2):
        swapped = {**files, left: files[right], right: files[left]}
        yield "two files swapped", f"{left} and {right}", swapped


def _missing(files: Files) -> Altered:
    for name in files:
        yield "missing", name, {other: data for other, data in files.items() if other != name}
    yield "missing", "all", {}
    yield "missing", "all but the manifest", {runtime.MANIFEST: files[runtime.MANIFEST]}


def _extra(files: Files) -> Altered:
    for name in EXTRA:
        yield "one more", name, {**files, name: b"more"}
        yield "one more", f"{name}, empty", {**files, name: b""}
    many = {f"many/{number}": b"" for number in range(runtime.MAX_FILES)}
    yield "too many", f"{len(many)} more", {**files, **many}


def _renamed(files: Files) -> Altered:
    for name, data in files.items():
        rest = {other: content for other, content in files.items() if other != name}
        for new in (name.upper(), name.capitalize(), f"{name}.old", f"x/{name}", f".{name}", "x"):
            yield "renamed", f"{name} to {new}", {**rest, new: data}
