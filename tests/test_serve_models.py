"""The models of a worker: their versions, and how a new one takes the place of an old one."""

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_app import Asker, echo_bundle, run, served, table_bundle
from tiny_bundle import make_bundle

from deploykit import runtime
from deploykit.errors import (
    BundleError,
    DeploykitError,
    MissingDependency,
    UsageError,
    VerificationError,
)
from deploykit.server.meters import Meters
from deploykit.server.models import Models
from deploykit.server.refusal import Refusal
from deploykit.server.settings import Settings

ONES = {"inputs": [1, 1, 1]}
Edit = Callable[[Path], Any]


def echoes(folder: Path, *versions: str, name: str = "echo") -> list[Path]:
    return [
        echo_bundle(folder / f"{name}-{version}", name=name, version=version)
        for version in versions
    ]


def scaled(folder: Path, version: str, shape: tuple[int, ...]) -> Path:
    return echo_bundle(folder, shape=shape, version=version)


def test_versions_are_ordered_as_numbers_and_the_highest_answers(tmp_path: Path) -> None:
    async def check() -> None:
        given = ["1.9", "1.10", "nightly", "1.2.3", "0.9"]
        async with served(*echoes(tmp_path, *given)) as ask:
            ordered = ["1.10", "1.9", "1.2.3", "0.9", "nightly"]
            assert ask.models.versions("echo") == ordered
            assert (await ask.get("/v2/models/echo")).json()["versions"] == ordered
            assert (await ask.post("/predict", ONES)).json()["version"] == "1.10"
            for version in given:
                answer = await ask.post(f"/predict/echo/versions/{version}", ONES)
                assert answer.json()["version"] == version
            assert [one["version"] for one in ask.models.describe()] == ordered
            assert ask.models.versions("other") == []

    run(check())


def test_the_first_model_given_answers_where_none_is_named(tmp_path: Path) -> None:
    async def check() -> None:
        bundles = [*echoes(tmp_path, "1", name="b"), *echoes(tmp_path, "1", name="a")]
        async with served(*bundles) as ask:
            assert (await ask.post("/predict", ONES)).json()["model"] == "b"
            assert (await ask.post("/predict/a", ONES)).json()["model"] == "a"
            for name in ("", "c", "A", "b "):
                with pytest.raises(Refusal, match="expected one of b, a") as refused:
                    ask.models.find(name)
                assert refused.value.status == 404
            with pytest.raises(Refusal, match="version of a: expected 1, got '2'"):
                ask.models.find("a", "2")

    run(check())


def test_one_version_of_one_model_is_given_once(tmp_path: Path) -> None:
    async def check() -> None:
        (bundle,) = echoes(tmp_path, "1")
        async with served(bundle, bundle, loaded=False) as ask:
            with pytest.raises(UsageError, match="echo 1: expected versions that differ"):
                await ask.models.load()
            assert not ask.models.ready

    run(check())


def corrupt(path: Path) -> None:
    data = bytearray((path / "model.onnx").read_bytes())
    data[-9] ^= 1
    (path / "model.onnx").write_bytes(data)


def reseal(path: Path) -> None:
    """Let a bundle's golden samples tell other answers, and its manifest say so."""
    inputs, outputs = (np.load(path / runtime.EXPECTED)[key] for key in ("inputs", "outputs"))
    np.savez(path / runtime.EXPECTED, inputs=inputs, outputs=outputs + 1)
    data = (path / runtime.EXPECTED).read_bytes()
    manifest = json.loads((path / "manifest.json").read_bytes())
    sealed = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"][runtime.EXPECTED] = sealed
    manifest["digest"] = runtime.digest_of(manifest)
    (path / "manifest.json").write_bytes(runtime.canonical_json(manifest))


def replace(path: Path, **changes: Any) -> None:
    """Write another bundle in the place of one."""
    shutil.rmtree(path)
    echo_bundle(path.parent / "made", **({"version": "1"} | changes)).rename(path)


BROKEN: dict[str, tuple[Edit, type[DeploykitError], str]] = {
    "another byte": (corrupt, BundleError, "differs from its manifest: model.onnx"),
    "a file less": (lambda path: (path / "run.py").unlink(), BundleError, "lacks run.py"),
    "a file more": (lambda path: (path / "x").touch(), BundleError, "has 'x' too"),
    "no bundle": (shutil.rmtree, BundleError, "expected a bundle"),
    "other answers": (reseal, VerificationError, "outputs differ by 1"),
}
UNFIT: dict[str, tuple[Edit, type[DeploykitError], str]] = {
    "another name": (lambda path: replace(path, name="echo2"), UsageError, "got echo2"),
    "a version that is there": (
        lambda path: replace(path, version="2"),
        UsageError,
        "expected versions that differ",
    ),
}


@pytest.mark.parametrize("fault", [*BROKEN, *UNFIT])
def test_a_bundle_that_cannot_take_the_place_leaves_the_old_one(tmp_path: Path, fault: str) -> None:
    edit, error, said = (BROKEN | UNFIT)[fault]

    async def check() -> None:
        old, other = echoes(tmp_path / "old", "1", "2")
        (new,) = echoes(tmp_path / "new", "1")
        async with served(old, other) as ask:
            before = ask.models.describe()
            await ask.models.prepare(1, {0: str(new)})  # whole it could
            edit(new)
            with pytest.raises(error, match=said):
                await ask.models.prepare(2, {0: str(new)})
            ask.models.discard(1)
            ask.models.discard(2)
            ask.models.discard(2)
            assert ask.models.describe() == before
            assert (await ask.post("/predict/echo/versions/1", ONES)).status == 200

    run(check())


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_bundle_is_not_loaded(tmp_path: Path, fault: str) -> None:
    edit, error, said = BROKEN[fault]

    async def check() -> None:
        (bundle,) = echoes(tmp_path, "1")
        edit(bundle)
        async with served(bundle, loaded=False) as ask:
            with pytest.raises(error, match=said):
                await ask.models.load()
            assert (await ask.get("/readyz")).status == 503

    run(check())


def test_without_a_gpu_a_server_that_requires_one_does_not_start(tmp_path: Path) -> None:
    async def check() -> None:
        models = Models(Settings((str(make_bundle(tmp_path)),), require_gpu=True), Meters())
        with pytest.raises(MissingDependency, match="--require-gpu demands"):
            await models.load()

    run(check())


def test_what_is_prepared_answers_only_once_it_is_committed(tmp_path: Path) -> None:
    async def check() -> None:
        (old,) = echoes(tmp_path, "1")
        new = scaled(tmp_path / "new", "2", (2,))
        async with served(old) as ask:
            await ask.models.prepare(7, {0: str(new)})
            assert (await ask.post("/predict", ONES)).json()["version"] == "1"
            await ask.models.commit(7)
            assert (await ask.post("/predict", {"inputs": [1, 1]})).json()["version"] == "2"
            assert (await ask.post("/predict", ONES)).status == 400
            assert (await ask.get("/v2/models/echo/versions/1")).status == 404
            text = (await ask.get("/metrics")).body.decode()
            assert 'deploykit_model_workers{model="echo",provider="CPUExecution' in text
            gone = [line for line in text.splitlines() if "_model_workers{" in line]
            assert sorted(line[-3:] for line in gone) == ["0.0", "1.0"]

    run(check())


def test_only_the_slots_named_are_exchanged(tmp_path: Path) -> None:
    async def check() -> None:
        bundles = [*echoes(tmp_path, "1", "2"), table_bundle(tmp_path / "t", name="table")]
        (new,) = echoes(tmp_path / "new", "3")
        async with served(*bundles) as ask:
            await ask.models.prepare(1, {1: str(new)})
            await ask.models.commit(1)
            told = [(one["name"], one["version"]) for one in ask.models.describe()]
            assert told == [("echo", "3"), ("echo", "1"), ("table", "1.0")]
            assert ask.models.versions("echo") == ["3", "1"]

    run(check())


async def _asking(ask: Asker, swapped: asyncio.Event, seen: set[str]) -> int:
    """Ask the model for its class of [1, 5, 2] until it was swapped, and a little longer."""
    count = 0
    while not swapped.is_set() or count % 20:
        answer = (await ask.post("/predict?top=9", {"inputs": [1, 5, 2]})).json()
        version, (found,) = answer["version"], answer["predictions"]
        expected = {"1": ["old0", "old1", "old2"], "2": ["new0", "new1", "new2"]}[version]
        assert found["label"] == expected[1]
        assert sorted(one["label"] for one in found["top"]) == expected
        seen.add(version)
        count += 1
        await asyncio.sleep(0)
    return count


def test_a_swap_under_requests_loses_none_and_mixes_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        bundles = [
            echo_bundle(tmp_path / word, version=version, labels=[f"{word}{n}" for n in range(3)])
            for word, version in (("old", "1"), ("new", "2"))
        ]
        async with served(bundles[0]) as ask:
            swapped, seen = asyncio.Event(), set()
            clients = [asyncio.create_task(_asking(ask, swapped, seen)) for _ in range(8)]
            for swap in range(5):
                await ask.models.prepare(swap, {0: str(bundles[(swap + 1) % 2])})
                await asyncio.sleep(0.02)
                await ask.models.commit(swap)
                await asyncio.sleep(0.02)
            swapped.set()
            asked = sum(await asyncio.gather(*clients))
            assert seen == {"1", "2"}
            totals = [ask.models.meters.totals("echo", version) for version in "12"]
            assert sum(one["ok"] for one in totals) == asked > 50
            assert sum(one["failed"] for one in totals) == 0

    run(check())


def test_a_swap_waits_for_requests_that_hold_the_old_version(tmp_path: Path) -> None:
    async def check() -> None:
        (old,) = echoes(tmp_path, "1")
        (new,) = echoes(tmp_path / "new", "2")
        async with served(old) as ask:
            held = ask.models.find("echo")
            await ask.models.prepare(1, {0: str(new)})
            with held.held():
                committing = asyncio.create_task(ask.models.commit(1))
                await asyncio.sleep(0.05)
                assert not committing.done()
                assert (await ask.post("/predict", ONES)).json()["version"] == "2"
                answer = await held.batcher.submit(np.ones((1, 3), np.float32), 10)
                assert answer.outputs.sum() == 3
            await committing

    run(check())


def test_closing_answers_requests_that_are_still_being_read(tmp_path: Path) -> None:
    async def check() -> None:
        async with served(*echoes(tmp_path, "1", name="a")) as ask:
            long = {"inputs": [[0.123456789, 1, 2]] * 8}
            padded = b" " * 200_000 + json.dumps(long).encode()
            asked = asyncio.create_task(ask.post("/predict", padded))
            while not ask.models.find(None).users:
                await asyncio.sleep(0)
            await ask.models.close()
            assert (await asked).status == 200
            assert (await ask.post("/predict", ONES)).status == 503

    run(check())
