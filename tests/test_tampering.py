"""Whoever alters a bundle is refused, and the benchmark of that sees a check that is missing."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
from tampered.bundles import Mutation, as_folder
from tampered.planted import PLANTS, Plant, sample
from tampered.watch import FAULTS, HUNG, OPENED, OTHER, OUTSIDE, PASSED, Tally
from tampered.zip_writer import entries_of, zip_of
from tampering import TRIAL, Setting, prepare, warm_up, whole_that_pass

from deploykit import runtime
from deploykit.errors import BundleError

PER_KIND = 12
FEW = 100  # files: ten thousand take their time


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    found = prepare(tmp_path_factory.mktemp("tampering").resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "MAX_FILES", FEW)
        warm_up(found)
    return found


@pytest.fixture(scope="module")
def mutations(setting: Setting) -> list[Mutation]:
    """Some alterations of every kind."""
    by_kind = defaultdict[str, list[Mutation]](list)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "MAX_FILES", FEW)
        for mutation in setting.mutations(TRIAL.amount):
            by_kind[mutation.kind].append(mutation)
    return [one for kind in by_kind.values() for one in kind[:: max(len(kind) // PER_KIND, 1)]]


def test_unaltered_bundles_are_taken(setting: Setting) -> None:
    assert whole_that_pass(setting) == 6


def test_alterations_of_every_kind_are_refused_unopened(
    setting: Setting, mutations: list[Mutation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "MAX_FILES", FEW)
    tally = setting.tally()
    setting.try_all(mutations, tally)
    assert tally.examples == {}
    assert tally.refused == tally.tried
    assert len(tally.tried) > 30


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.told)
def test_a_check_that_is_switched_off_is_seen(
    plant: Plant, setting: Setting, mutations: list[Mutation]
) -> None:
    tally = setting.tally(limit_s=0.2)
    with plant.planted():
        setting.try_all(sample(plant, mutations, 40), tally)
    assert plant.faults <= set(tally.faults)


def test_a_zip_file_takes_memory_as_it_is_large(setting: Setting, tmp_path: Path) -> None:
    data = runtime.pack(setting.files)
    (tmp_path / "small.zip").write_bytes(data)
    (tmp_path / "giant.zip").write_bytes(data)
    os.truncate(tmp_path / "giant.zip", 2**33)
    tracemalloc.start()
    try:
        runtime.read_bundle(tmp_path / "small.zip")
        with pytest.raises(runtime.BrokenBundleError):
            runtime.read_bundle(tmp_path / "giant.zip")
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


def test_tricks_are_planted_in_what_deploykit_writes(setting: Setting) -> None:
    assert zip_of(entries_of(setting.files)) == runtime.pack(setting.files)


# What a reader may not do is seen.


def open_a_model(path: Path) -> None:
    onnxruntime.InferenceSession(b"")


def read_elsewhere(path: Path) -> None:
    (path.parent / "outside" / "secret").read_bytes()


def read_through_a_link(path: Path) -> None:
    (path / "link").symlink_to("..")
    (path / "link" / "outside" / "secret").read_bytes()


def write_elsewhere(path: Path) -> None:
    (path.parent / "more").write_bytes(b"")


def list_elsewhere(path: Path) -> None:
    list(path.parent.iterdir())


def run_a_program(path: Path) -> None:
    os.system("true")


def ask_the_network(path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))


def raise_another(path: Path) -> None:
    raise KeyError("x")


def raise_two_lines(path: Path) -> None:
    raise BundleError("one\ntwo")


def wait(path: Path) -> None:
    os.mkfifo(path / "pipe")
    (path / "pipe").read_bytes()


def refuse(path: Path) -> None:
    (path / runtime.MANIFEST).read_bytes()
    raise BundleError("no")


@pytest.mark.parametrize(
    ("read", "faults"),
    [
        (refuse, set()),
        (lambda _: None, {PASSED}),
        (open_a_model, {OPENED, OTHER}),
        (read_elsewhere, {OUTSIDE, PASSED}),
        (read_through_a_link, {OUTSIDE, PASSED}),
        (write_elsewhere, {OUTSIDE, PASSED}),
        (list_elsewhere, {OUTSIDE, PASSED}),
        (run_a_program, {OUTSIDE, PASSED}),
        (ask_the_network, {OUTSIDE, PASSED}),
        (raise_another, {OTHER}),
        (raise_two_lines, {OTHER}),
        (wait, {HUNG}),
    ],
)
def test_what_a_reader_may_not_do_is_counted(
    read: Callable[[Path], None], faults: set[str], setting: Setting
) -> None:
    tally = Tally({"hashes": (read,)}, (), limit_s=0.2)
    setting.try_all([as_folder("kind", "name", setting.files)], tally)
    assert set(tally.faults) == faults <= set(FAULTS)
    assert tally.refused.total() == (not faults)


def test_models_are_opened_again_when_nobody_watches(setting: Setting) -> None:
    session = onnxruntime.InferenceSession
    setting.try_all([Mutation("kind", "name", lambda place: place)], setting.tally())
    assert onnxruntime.InferenceSession is session
