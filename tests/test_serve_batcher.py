"""The batcher: what runs together, what waits, and what is left when nobody waits any more."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_app import PROVIDER, PlantedEngine, run, slow_bundle, table_bundle
from tiny_bundle import make_bundle

from deploykit.server.batcher import Answer, Batcher
from deploykit.server.engine import _warm, open_engine
from deploykit.server.meters import Meters, ModelMeters
from deploykit.server.refusal import Refusal

LONG_S = 20.0


@asynccontextmanager
async def batching(engine: Any = None, **options: Any) -> AsyncIterator[Any]:
    """A batcher over an engine; it ends idle, with nothing left in its queue."""
    engine = engine or PlantedEngine()
    meters = Meters()
    its_meters = ModelMeters(meters, "planted", "1", PROVIDER)
    settings = {"max_batch": 8, "window_us": 0, "queue": 64} | options
    batcher = Batcher(engine, its_meters, **settings)
    batcher.totals = lambda: meters.totals("planted", "1")
    try:
        yield engine, batcher
    finally:
        if isinstance(engine, PlantedEngine):
            engine.gate.set()
        await batcher.close()
    assert batcher.totals()["deploykit_waiting_samples"] == 0
    assert not any(one.name == f"session {engine.info.name}" for one in threading.enumerate())


def rows(*values: float, width: int = 1) -> np.ndarray:
    return np.repeat(np.array(values, np.float32)[:, np.newaxis], width, 1)


async def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds; what never does fails the test."""
    stop = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < stop
        await asyncio.sleep(0.001)


async def busy(engine: PlantedEngine, batcher: Batcher) -> "asyncio.Task[Answer]":
    """Occupy the session; everything that comes now waits."""
    engine.gate.clear()
    known = len(engine.batches)
    first = asyncio.create_task(batcher.submit(rows(0), LONG_S))
    await until(lambda: len(engine.batches) > known)
    return first


async def waiting(batcher: Batcher, *samples: np.ndarray, timeout_s: float = LONG_S) -> Any:
    """Submit, one after the other, while the session is busy."""
    tasks = []
    for one in samples:
        tasks.append(asyncio.create_task(batcher.submit(one, timeout_s)))
        await asyncio.sleep(0)
    return tasks


def sizes(engine: PlantedEngine) -> list[int]:
    return [len(batch) for batch in engine.batches]


def test_an_idle_session_takes_a_request_at_once_and_alone() -> None:
    async def check() -> None:
        async with batching() as (engine, batcher):
            for value in range(5):
                answer = await batcher.submit(rows(value), LONG_S)
                np.testing.assert_array_equal(answer.outputs, rows(2 * value))
                assert (answer.batch, answer.queue_s < 0.5) == (1, True)
            assert sizes(engine) == [1] * 5

    run(check())


def test_what_waits_goes_together_and_everybody_gets_their_own() -> None:
    async def check() -> None:
        async with batching() as (engine, batcher):
            first = await busy(engine, batcher)
            tasks = await waiting(batcher, rows(1), rows(2, 3), rows(4))
            engine.gate.set()
            assert (await first).batch == 1
            answers = await asyncio.gather(*tasks)
            assert sizes(engine) == [1, 4]
            assert [one.outputs.ravel().tolist() for one in answers] == [[2], [4, 6], [8]]
            assert {one.batch for one in answers} == {4}

    run(check())


def test_no_batch_is_larger_than_allowed_and_the_oldest_is_always_in_the_next() -> None:
    async def check() -> None:
        async with batching(max_batch=4) as (engine, batcher):
            first = await busy(engine, batcher)
            asked = [rows(1, 1, 1), rows(2, 2), rows(3), rows(4, 4, 4, 4), rows(5)]
            tasks = await waiting(batcher, *asked)
            engine.gate.set()
            await asyncio.gather(first, *tasks)
            told = [batch.ravel().tolist() for batch in engine.batches[1:]]
            assert told == [[1, 1, 1, 3], [2, 2, 5], [4, 4, 4, 4]]

    run(check())


def test_only_samples_of_one_shape_go_together() -> None:
    async def check() -> None:
        async with batching() as (engine, batcher):
            first = await busy(engine, batcher)
            tasks = await waiting(
                batcher, rows(1, width=2), rows(2, width=3), rows(3, width=2), rows(4, width=3)
            )
            engine.gate.set()
            answers = await asyncio.gather(first, *tasks)
            assert [batch.shape for batch in engine.batches[1:]] == [(2, 2), (2, 3)]
            assert [one.outputs.max() for one in answers] == [0, 2, 4, 6, 8]

    run(check())


def test_a_window_gathers_and_ends_early_when_the_batch_is_full() -> None:
    async def check() -> None:
        async with batching(window_us=300_000, max_batch=3) as (engine, batcher):
            started = time.perf_counter()
            tasks = await waiting(batcher, rows(1))
            await asyncio.sleep(0.1)
            tasks += await waiting(batcher, rows(2))
            answers = await asyncio.gather(*tasks)
            assert 0.28 < time.perf_counter() - started < 3
            assert sizes(engine) == [2]
            assert answers[0].queue_s > answers[1].queue_s
        async with batching(window_us=10_000_000, max_batch=3) as (engine, batcher):
            started = time.perf_counter()
            await asyncio.gather(*(batcher.submit(rows(one), LONG_S) for one in range(3)))
            assert time.perf_counter() - started < 5
            tasks = await waiting(batcher, rows(4))  # and closing does not wait for it either
        assert tasks[0].done()

    run(check())


class Storm:
    """Requests of all sizes that come, wait, give up and run late, at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.answered = 0
        self.refused: set[int] = set()

    async def ask(self, batcher: Batcher, value: int) -> None:
        await asyncio.sleep(self.random.random() * 0.2)
        samples = rows(*[value] * self.random.randint(1, 8))
        patience = self.random.choice([0.0, 0.02, LONG_S, LONG_S, LONG_S])
        task = asyncio.create_task(batcher.submit(samples, patience))
        if self.random.random() < 0.2:
            await asyncio.sleep(self.random.random() * 0.05)
            task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError:
            return
        except Refusal as refusal:
            self.refused.add(refusal.status)
            return
        np.testing.assert_array_equal(answer.outputs, 2 * samples)
        self.answered += 1


@pytest.mark.parametrize("seed", range(3))
def test_in_any_storm_runs_never_overlap_and_nothing_is_mixed_or_left(seed: int) -> None:
    async def check() -> None:
        storm = Storm(seed)
        async with batching(PlantedEngine(0.002), queue=100) as (engine, batcher):
            await asyncio.gather(*(storm.ask(batcher, value) for value in range(300)))
            assert engine.overlaps == 0
            assert max(sizes(engine)) <= 8
            assert 50 < storm.answered < 300
            assert storm.refused <= {429, 504}

    run(check())


def test_runs_that_overlap_would_be_noticed() -> None:
    engine = PlantedEngine()
    engine.gate.clear()
    threads = [threading.Thread(target=engine.run, args=(rows(1),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(engine.batches) < 2:
        time.sleep(0.001)
    engine.gate.set()
    for thread in threads:
        thread.join()
    assert engine.overlaps == 1


class Choosy(PlantedEngine):
    """Refuses a batch that holds 9, breaks over 13, and answers 7 with no number."""

    def answer(self, batch: np.ndarray, options: Any) -> np.ndarray:
        if (batch == 13).any():
            raise ZeroDivisionError
        if (batch == 9).any():
            raise Refusal(422, "no nines")
        return np.where(batch == 7, np.nan, batch)


def test_a_guilty_request_does_not_touch_its_neighbours(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with batching(Choosy()) as (engine, batcher):
            first = await busy(engine, batcher)
            asked = [rows(1), rows(9, 1), rows(2), rows(7, 2), rows(13), rows(3)]
            tasks = await waiting(batcher, *asked)
            engine.gate.set()
            found = await asyncio.gather(first, *tasks, return_exceptions=True)
            told = [
                one.status if isinstance(one, Refusal) else one.outputs.ravel().tolist()
                for one in found
            ]
            assert told == [[0], [1], 422, [2], 422, 500, [3]]
            assert (await batcher.submit(rows(4), LONG_S)).outputs == 4
            assert engine.overlaps == 0

    run(check())
    assert "ZeroDivisionError" in caplog.text


def test_a_real_session_answers_the_neighbours_of_a_guilty_request_as_if_alone(
    tmp_path: Path,
) -> None:
    async def check() -> None:
        engine = open_engine(table_bundle(tmp_path), threads=1, require_gpu=False, max_batch=8)
        async with batching(engine, window_us=200_000) as (_, batcher):
            asked = [np.array([[one]], np.int64) for one in (1, 99, 3)]
            found = await asyncio.gather(
                *(batcher.submit(one, LONG_S) for one in asked), return_exceptions=True
            )
            for samples, answer in ((asked[0], found[0]), (asked[2], found[2])):
                assert answer.outputs.tobytes() == engine.run(samples).tobytes()
            assert found[1].status == 422
            assert "out of data bounds" in found[1].message

    run(check())


def test_batched_answers_of_the_tiny_model_have_the_bits_of_single_ones(tmp_path: Path) -> None:
    async def check() -> None:
        engine = open_engine(make_bundle(tmp_path), threads=1, require_gpu=False, max_batch=8)
        drawn = np.random.default_rng(0).integers(0, 256, (8, 1, 4, 4, 1), np.uint8)
        async with batching(engine, window_us=1_000_000) as (_, batcher):
            answers = await asyncio.gather(*(batcher.submit(one, LONG_S) for one in drawn))
            for samples, answer in zip(drawn, answers, strict=True):
                assert answer.batch == 8
                assert answer.outputs.tobytes() == engine.run(samples).tobytes()

    run(check())


def test_a_full_queue_says_when_to_come_again_and_an_empty_one_takes_anything() -> None:
    async def check() -> None:
        async with batching(queue=4) as (engine, batcher):
            first = await busy(engine, batcher)
            tasks = await waiting(batcher, rows(*range(8)))  # more than the queue: nothing waited
            with pytest.raises(
                Refusal, match=r"8 samples waiting for 4 places \(--queue 4"
            ) as refused:
                await batcher.submit(rows(1), LONG_S)
            assert refused.value.status == 429
            assert int(refused.value.headers["retry-after"]) >= 1
            with pytest.raises(Refusal), batcher.reserved(1):
                pass
            engine.gate.set()
            await asyncio.gather(first, *tasks)
            await batcher.submit(rows(1), LONG_S)

    run(check())


async def _flood(batcher: Batcher, count: int) -> "tuple[list[Any], int]":
    """Submit until the queue is full, then more; return what was admitted, and how much was not."""
    tasks = await waiting(batcher, *[rows(1)] * count)
    refused = [task for task in tasks if task.done() and task.exception() is not None]
    return [task for task in tasks if task not in refused], len(refused)


def test_a_burst_fills_the_queue_and_an_overload_that_lasts_finds_it_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is admitted under an overload waits few runs; when it is over, bursts fit."""
    monkeypatch.setattr("deploykit.server.batcher.OVERLOAD_S", 0.3)

    async def check() -> None:
        async with batching(max_batch=8, queue=16) as (engine, batcher):
            for round_ in range(3):
                first = await busy(engine, batcher)
                admitted, refused = await _flood(batcher, 20)
                assert (len(admitted), refused) == ((16, 4) if round_ == 0 else (10, 10))
                engine.gate.set()
                await asyncio.gather(first, *admitted)
            await asyncio.sleep(0.4)
            first = await busy(engine, batcher)
            admitted, refused = await _flood(batcher, 16)
            assert (len(admitted), refused) == (16, 0)
            engine.gate.set()
            await asyncio.gather(first, *admitted)

    run(check())


def test_a_request_of_more_than_a_batch_runs_alone() -> None:
    async def check() -> None:
        async with batching(max_batch=2) as (engine, batcher):
            first = await busy(engine, batcher)
            tasks = await waiting(batcher, rows(1, 2, 3), rows(4), rows(5))
            engine.gate.set()
            await asyncio.gather(first, *tasks)
            assert sizes(engine) == [1, 3, 2]

    run(check())


def test_a_client_that_goes_as_its_batch_is_done_takes_no_neighbour_with_it() -> None:
    async def check() -> None:
        async with batching() as (engine, batcher):
            first = await busy(engine, batcher)
            gone, neighbour, another = await waiting(batcher, rows(1), rows(2), rows(3))
            engine.gate.set()
            await first
            time.sleep(0.2)  # the answers are there, and nobody has been told yet
            assert sizes(engine) == [1, 3]
            gone.cancel()
            told = await asyncio.wait_for(asyncio.gather(neighbour, another), LONG_S)
            assert [one.outputs.ravel().tolist() for one in told] == [[4], [6]]
            with pytest.raises(asyncio.CancelledError):
                await gone

    run(check())


class TimedEngine:
    """Takes so many seconds for a batch, by a clock of its own."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.now = seconds, 0.0

    def perf_counter(self) -> float:
        return self.now

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.now += self.seconds(len(batch))
        return batch


@pytest.mark.parametrize(
    ("seconds", "pays"),
    [
        (lambda size: 0.01, 16),
        (lambda size: 0.01 * size, 1),
        (lambda size: 0.01 + 0.01 * max(0, size - 4), 4),
        (lambda size: 0.9 * size, 1),
    ],
    ids=[
        "a batch costs what a sample does",
        "each sample costs the same",
        "free up to four",
        "too slow to try them all",
    ],
)
def test_a_batch_is_as_large_as_pays(
    seconds: Callable[[int], float], pays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = TimedEngine(seconds)
    monkeypatch.setattr("deploykit.server.engine.time", engine)
    assert _warm(engine, rows(0), 16) == pays


def test_places_that_are_reserved_count_and_come_back() -> None:
    async def check() -> None:
        async with batching(queue=2) as (engine, batcher):
            with (
                batcher.reserved(1),
                batcher.reserved(1),
                pytest.raises(Refusal, match="2 samples waiting"),
            ):
                await batcher.submit(rows(1), LONG_S)
            with pytest.raises(KeyError), batcher.reserved(2):
                raise KeyError
            first = await busy(engine, batcher)
            tasks = await waiting(batcher, rows(1), rows(2))
            engine.gate.set()
            await asyncio.gather(first, *tasks)

    run(check())


def test_the_deadline_takes_a_waiting_request_out_of_the_queue() -> None:
    async def check() -> None:
        async with batching(queue=2) as (engine, batcher):
            first = await busy(engine, batcher)
            late, patient = (
                await waiting(batcher, rows(1), timeout_s=0.05),
                await waiting(batcher, rows(2)),
            )
            with pytest.raises(Refusal, match="--timeout sets it") as refused:
                await late[0]
            assert refused.value.status == 504
            patient += await waiting(batcher, rows(3))  # its place is free again
            engine.gate.set()
            await asyncio.gather(first, *patient)
            assert [batch.ravel().tolist() for batch in engine.batches] == [[0], [2, 3]]

    run(check())


class Endless(PlantedEngine):
    """Runs until it is told to end; ``deaf`` it does not listen."""

    deaf = False

    def answer(self, batch: np.ndarray, options: Any) -> np.ndarray:
        stop = time.monotonic() + (1 if batch.max() < 0 else 0)
        while time.monotonic() < stop:
            if options.terminate and not self.deaf:
                raise RuntimeError("ended")
            time.sleep(0.001)
        return batch


async def lateness(engine: PlantedEngine) -> float:
    """How long the next request waits behind one whose deadline has passed."""
    async with batching(engine) as (_, batcher):
        with pytest.raises(Refusal, match="deadline"):
            await batcher.submit(rows(-1), 0.05)
        return (await batcher.submit(rows(1), LONG_S)).queue_s


def test_the_deadline_ends_the_run_and_the_next_begins_at_once() -> None:
    deaf = Endless()
    deaf.deaf = True
    assert run(lateness(Endless())) < 0.7
    assert run(lateness(deaf)) > 0.8  # such a run it is


def test_a_real_run_ends_at_the_deadline(tmp_path: Path) -> None:
    async def check() -> None:
        engine = open_engine(slow_bundle(tmp_path), threads=1, require_gpu=False, max_batch=1)
        async with batching(engine) as (_, batcher):
            started = time.perf_counter()
            with pytest.raises(Refusal, match="deadline"):
                await batcher.submit(np.array([[10**9]]), 0.1)  # a quarter of an hour
            answer = await batcher.submit(np.array([[2]]), LONG_S)
            assert answer.outputs == 4
            assert time.perf_counter() - started < 3

    run(check())


def test_a_run_that_somebody_still_waits_for_goes_on() -> None:
    async def check() -> None:
        async with batching(Endless()) as (engine, batcher):
            first = await busy(engine, batcher)
            late = await waiting(batcher, rows(-1), timeout_s=0.2)
            patient = await waiting(batcher, rows(-2))
            engine.gate.set()
            await first
            with pytest.raises(Refusal):
                await late[0]
            assert (await patient[0]).outputs == -2
            assert sizes(engine) == [1, 2]

    run(check())


def test_a_request_whose_client_has_gone_leaves_the_queue_or_ends_its_run() -> None:
    async def check() -> None:
        async with batching(Endless()) as (engine, batcher):
            first = await busy(engine, batcher)
            (gone,) = await waiting(batcher, rows(5))
            gone.cancel()
            await asyncio.wait([gone])
            engine.gate.set()
            await first
            running = asyncio.create_task(batcher.submit(rows(-1), LONG_S))
            await until(lambda: len(engine.batches) == 2)
            running.cancel()
            assert (await batcher.submit(rows(1), LONG_S)).queue_s < 0.7
            assert [batch.ravel().tolist() for batch in engine.batches] == [[0], [-1], [1]]
            assert gone.cancelled()
            assert running.cancelled()

    run(check())


def test_closing_answers_what_waits() -> None:
    async def check() -> None:
        async with batching() as (engine, batcher):
            first = await busy(engine, batcher)
            tasks = await waiting(batcher, *(rows(one) for one in range(20)))
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0.02)
            assert not closing.done()
            engine.gate.set()
            await asyncio.gather(closing, first)
            assert [task.result().outputs.item() for task in tasks] == [2 * n for n in range(20)]

    run(check())


def test_meters_tell_every_run_and_every_sample() -> None:
    async def check() -> None:
        async with batching() as (engine, batcher):
            first = await busy(engine, batcher)
            tasks = await waiting(batcher, rows(1, 2), rows(3))
            assert batcher.totals()["deploykit_waiting_samples"] == 3
            engine.gate.set()
            await asyncio.gather(first, *tasks)
            totals = {key.removeprefix("deploykit_"): n for key, n in batcher.totals().items()}
            assert (totals["samples_total"], totals["queue_seconds_count"]) == (4, 3)
            assert totals["batch_samples_sum"] == sum(sizes(engine)) == 4
            assert totals["batch_samples_count"] == totals["compute_seconds_count"] == 2
            assert totals["last_answer_timestamp_seconds"] == pytest.approx(time.time(), abs=20)

    run(check())
