"""Checks that are switched off: what counts faults must see every one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from deploykit import bundle, runtime, signing
from tampered.bundles import Mutation
from tampered.watch import HUNG, OPENED, OTHER, OUTSIDE, PASSED

real_canonical_json = runtime.canonical_json


class Alike(bytes):
    """Bytes that are equal to anything."""

    __hash__ = bytes.__hash__

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False


def _read_anything(folder: Path, name: str, limit: int) -> bytes:
    with (folder / name).open("rb") as file:
        return file.read(limit + 1)


def _list_anything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _raise(_: object) -> NoReturn:
    raise KeyError("planted")


@dataclass(frozen=True)
class Plant:
    """A check that does not happen.

    Attributes:
        told: what is switched off.
        kinds: alterations that it would refuse: a pattern of their names.
        faults: that must be counted then.
        patches: the code that stands in for the check.
    """

    told: str
    kinds: str
    faults: frozenset[str]
    patches: tuple[tuple[Any, str, Any], ...]

    def has(self, mutation: Mutation) -> bool:
        """Whether the check would refuse an alteration."""
        return re.fullmatch(self.kinds, mutation.kind) is not None

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Switch the check off."""
        with ExitStack() as stack:
            for where, name, other in self.patches:
                stack.enter_context(mock.patch.object(where, name, other))
            yield


def _always(value: object) -> Callable[..., object]:
    return lambda *_: value


PLANTS = (
    Plant(
        "hashes of files",
        "byte flipped|truncated|two files swapped|external data",
        frozenset({PASSED, OPENED}),
        ((runtime, "_is_as_declared", _always(True)),),
    ),
    Plant(
        "the manifest's digest",
        "manifest with a stale digest",
        frozenset({PASSED, OPENED}),
        ((runtime, "digest_of", lambda manifest: manifest.get("digest")),),
    ),
    Plant(
        "the manifest's spelling",
        "manifest in another spelling",
        frozenset({PASSED, OPENED}),
        ((runtime, "canonical_json", lambda value: Alike(real_canonical_json(value))),),
    ),
    Plant(
        "the manifest's names",
        "names in a sealed manifest",
        frozenset({PASSED, OPENED, OUTSIDE}),
        (
            (runtime, "FILE_NAME", re.compile(".*", re.DOTALL)),
            (runtime, "_check_names", _always(None)),
        ),
    ),
    Plant(
        "missing and further files",
        "one more|planted in the folder",
        frozenset({PASSED, OPENED}),
        ((runtime, "_check_names", _always(None)),),
    ),
    Plant(
        "links",
        "link",
        frozenset({PASSED, OPENED, OUTSIDE}),
        ((runtime, "_read_file", _read_anything), (runtime, "_list_files", _list_anything)),
    ),
    Plant(
        "pipes",
        "no plain file",
        frozenset({HUNG}),
        ((runtime, "_read_file", _read_anything), (runtime, "_list_files", _list_anything)),
    ),
    Plant(
        "the zip file's spelling",
        "zip: .*",
        frozenset({PASSED, OPENED}),
        ((runtime, "_is_packed", _always(True)),),
    ),
    Plant(
        "the runner",
        "sealed anew: the runner",
        frozenset({OPENED}),
        ((bundle, "_runner", _always(Alike())),),
    ),
    Plant(
        "the signature",
        "sealed anew, under the old signature|signature .*|without a signature",
        frozenset({OPENED}),
        ((signing, "check_manifest", _always(None)),),
    ),
    Plant(
        "errors' kinds",
        "manifest in another spelling",
        frozenset({OTHER}),
        ((runtime, "parse_manifest", _raise),),
    ),
)


def sample(plant: Plant, mutations: Iterable[Mutation], most: int) -> list[Mutation]:
    """Return the first of what a check would refuse, and others evenly from all of it."""
    found = [mutation for mutation in mutations if plant.has(mutation)]
    return found[:: max(len(found) // most, 1)][:most]
