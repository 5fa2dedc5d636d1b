"""Requests that wait together run together: one thread a model, which never overlaps its session.

While the session is busy requests gather; when it is free, whatever of one shape is waiting runs
as one batch. So nothing waits while the server is idle, and batches grow with the load by
themselves. A window, where one is set, lets the first sample wait for others.

Every sample was validated before it came here. Should the model refuse a batch all the same (an
index out of range, say), its requests run one by one, so that only the guilty one is refused.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploykit.server.engine import Engine
from deploykit.server.meters import ModelMeters
from deploykit.server.refusal import Refusal

log = logging.getLogger("deploykit.serve")
FAULT = "a fault of the server; its log has the cause"
TOO_LATE = "the deadline passed before the model answered; --timeout sets it"
# Seconds without a refusal until an overload is over; what may wait meanwhile, in batches and in
# samples: enough that the session never waits.
OVERLOAD_S = 1.0
SHORT_RUNS, SHORT_LEAST = 1.25, 8
NOT_FINITE = "the model gave NaN or infinity for this input; expected finite outputs"


@dataclass(frozen=True, slots=True)
class Answer:
    """Outputs of one request.

    Attributes:
        outputs: ``(N, ...)`` as the model gives them.
        queue_s: seconds that it waited.
        compute_s: seconds of the run that it was part of.
        batch: samples of that run.
    """

    outputs: np.ndarray
    queue_s: float
    compute_s: float
    batch: int


@dataclass(slots=True, eq=False)
class _Job:
    """One request that waits or runs."""

    samples: np.ndarray
    future: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)

    @property
    def alive(self) -> bool:
        """Whether it is still to be answered.

        A request that is cancelled has lost its future at once, and its task hears of it later.
        """
        return not self.future.done()


class Batcher:
    """The queue of one model, and the thread that empties it.

    The event loop and the session's thread share the queue, under ``_wake``; jobs are answered
    and given up in the event loop alone.
    """

    def __init__(
        self,
        engine: Engine,
        meters: ModelMeters,
        *,
        max_batch: int,
        window_us: int,
        queue: int,
    ) -> None:
        self._engine, self._meters = engine, meters
        self._max_batch, self._window_s, self._limit = max_batch, window_us / 1e6, queue
        self._short = min(queue, max(SHORT_LEAST, int(SHORT_RUNS * max_batch)))
        self._overloaded_until = 0.0
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._waiting = 0  # samples, those reserved among them
        self._expected = 0  # requests that were let in and have not begun
        self._running: list[_Job] = []
        self._options: Any = None
        self._closing = False
        self._sample_s = 0.0  # what a sample took of late
        self._thread = threading.Thread(
            target=self._work, name=f"session {engine.info.name}", daemon=True
        )
        self._thread.start()

    async def submit(self, samples: np.ndarray, timeout_s: float) -> Answer:
        """Run samples, perhaps in a batch with others'.

        A caller that is cancelled takes its samples out of the queue; a run that nobody waits
        for any more is ended.

        Args:
            samples: ``(N, ...)``, valid for the model; more than ``max_batch`` run alone.
            timeout_s: after so many seconds it is given up.

        Raises:
            Refusal: 429 where the queue is full, 504 past the deadline, 422 where the model
                refuses the values or answers with none.
        """
        job = _Job(samples, self._loop.create_future())
        with self._wake:
            self._admit(len(samples))
            self._jobs.append(job)
            self._wake.notify()
        timer = self._loop.call_later(timeout_s, self._expire, job)
        try:
            return await job.future
        except asyncio.CancelledError:
            self._give_up(job)
            if not job.future.cancelled():
                job.future.exception()  # a refusal that came too late is no fault to be logged
            raise
        finally:
            timer.cancel()

    @contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Hold places in the queue for samples that are still being decoded.

        Raises:
            Refusal: 429 where the queue is full.
        """
        with self._wake:
            self._admit(count)
        try:
            yield
        finally:
            with self._wake:
                self._leave(count)

    def refuse_if_full(self) -> None:
        """Spare reading a request that would find no place.

        Raises:
            Refusal: 429 where the queue is full.
        """
        with self._wake:
            self._check_room(1)

    def expect(self) -> None:
        """Hold a place for a request of which the head was read; `arrived` gives it back.

        Raises:
            Refusal: 429 where the queue is full.
        """
        with self._wake:
            self._check_room(1)
            self._expected += 1

    def arrived(self) -> None:
        """Note that a request that was expected has begun."""
        with self._wake:
            self._expected -= 1

    async def close(self) -> None:
        """Answer what is waiting, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _admit(self, count: int) -> None:
        """Take places in the queue."""
        self._check_room(count)
        self._waiting += count
        self._meters.waiting.inc(count)

    def _check_room(self, count: int) -> None:
        """Refuse what finds no place; where nothing waits there is always one.

        A queue that was full gets short, until all that came for a second found room: a burst may
        fill it, but under an overload that lasts waiting longer helps nobody (Nichols
        and Jacobson 2012, https://queue.acm.org/detail.cfm?id=2209336; Maurer 2015,
        https://queue.acm.org/detail.cfm?id=2839461).
        """
        limit = self._limit if self._loop.time() > self._overloaded_until else self._short
        taken = self._waiting + self._expected
        if taken and taken + count > limit:
            self._overloaded_until = self._loop.time() + OVERLOAD_S
            seconds = max(1, math.ceil(self._waiting * self._sample_s))
            raise Refusal(
                429,
                f"{self._engine.info.name}: expected room for {count} more, got {taken} "
                f"samples waiting for {limit} places (--queue {self._limit}, less while it is "
                f"overloaded); try again in {seconds} s",
                {"retry-after": str(seconds)},
            )

    def _leave(self, count: int) -> None:
        self._waiting -= count
        self._meters.waiting.dec(count)

    def _expire(self, job: _Job) -> None:
        if job.alive:
            job.future.set_exception(Refusal(504, TOO_LATE))
            self._give_up(job)

    def _give_up(self, job: _Job) -> None:
        """Forget a job: out of the queue, or out of the run, which ends if nobody else waits."""
        with self._wake:
            if job in self._jobs:
                self._jobs.remove(job)
                self._leave(len(job.samples))
            elif job in self._running and not any(one.alive for one in self._running):
                self._options.terminate = True

    # In the session's thread.

    def _work(self) -> None:
        while jobs := self._next():
            if not self._run(jobs):
                for job in jobs:
                    self._run([job])

    def _run(self, jobs: list[_Job]) -> bool:
        """Run jobs as one batch; False where one of several is to blame for a refusal."""
        with self._wake:
            if not any(job.alive for job in jobs):
                return True
            self._running, self._options = jobs, _run_options()
        started = time.perf_counter()
        found: np.ndarray | Refusal
        try:
            found = self._engine.run(_together(jobs), self._options)
        except Refusal as refusal:
            found = refusal
        except Exception:  # whatever it is, the thread lives on: without it nobody is answered
            log.exception("%s: a fault of the server", self._engine.info.name)
            found = Refusal(500, FAULT)
        seconds = time.perf_counter() - started
        with self._wake:
            self._running = []
        if isinstance(found, Refusal) and len(jobs) > 1:
            return False
        self._loop.call_soon_threadsafe(self._deliver, jobs, found, started, seconds)
        return True

    def _next(self) -> list[_Job]:
        """Wait for jobs that can run together; none where no more will come."""
        with self._wake:
            while not self._jobs:
                if self._closing:
                    return []
                self._wake.wait()
                self._let_window_pass()
            return self._take()

    def _let_window_pass(self) -> None:
        """Wait for others to join the first job, as long as it may be kept waiting."""
        while self._window_s and self._jobs and not self._closing:
            left = self._jobs[0].since + self._window_s - time.perf_counter()
            if left <= 0 or sum(len(job.samples) for job in self._jobs) >= self._max_batch:
                return
            self._wake.wait(left)

    def _take(self) -> list[_Job]:
        """Take the oldest job, and every other that can join it."""
        taken = [self._jobs.popleft()]
        room = self._max_batch - len(taken[0].samples)
        shape = taken[0].samples.shape[1:]
        for job in list(self._jobs) if room > 0 else ():
            if job.samples.shape[1:] == shape and len(job.samples) <= room:
                self._jobs.remove(job)
                taken.append(job)
                room -= len(job.samples)
        self._leave(sum(len(job.samples) for job in taken))
        return taken

    # In the event loop again.

    def _deliver(
        self, jobs: list[_Job], found: np.ndarray | Refusal, started: float, seconds: float
    ) -> None:
        """Answer every job of a run."""
        if isinstance(found, Refusal):
            self._fail(jobs[0], found)
            return
        self._measure(len(found), seconds)
        start = 0
        for job in jobs:
            stop = start + len(job.samples)
            answer = Answer(found[start:stop], started - job.since, seconds, len(found))
            if job.alive:
                self._answer(job, answer)
            start = stop

    def _answer(self, job: _Job, answer: Answer) -> None:
        if not np.isfinite(answer.outputs).all():
            self._fail(job, Refusal(422, NOT_FINITE))
            return
        self._meters.queue.observe(answer.queue_s)
        self._meters.samples.inc(len(answer.outputs))
        job.future.set_result(answer)

    def _fail(self, job: _Job, refusal: Refusal) -> None:
        if job.alive:
            job.future.set_exception(refusal)

    def _measure(self, samples: int, seconds: float) -> None:
        self._meters.batch.observe(samples)
        self._meters.compute.observe(seconds)
        self._meters.last.set_to_current_time()
        latest = seconds / samples
        self._sample_s = 0.9 * self._sample_s + 0.1 * latest if self._sample_s else latest


def _together(jobs: list[_Job]) -> np.ndarray:
    if len(jobs) == 1:
        return jobs[0].samples
    return np.concatenate([job.samples for job in jobs])


def _run_options() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # what a client's values did wrong is told to the client
    return options
