"""The workers of a server: started, listened to, started again when they die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from deploykit.errors import (
    BundleError,
    DataError,
    DeploykitError,
    MissingDependency,
    UsageError,
)
from deploykit.server.channel import Channel
from deploykit.server.settings import Settings

PING_S = 1.0
SILENT_PINGS = 30  # unanswered, after which a worker counts as hanging
YOUNG_S = 10.0  # a worker that dies younger than this is not started again at once
MAX_PAUSE_S = 2.0
KINDS: dict[int, type[DeploykitError]] = {
    2: UsageError,
    3: DataError,
    4: BundleError,
    5: MissingDependency,
}
Tell = Callable[[str], None]


@dataclass(eq=False)
class Worker:
    """A worker's process, as the supervisor sees it.

    Attributes:
        number: its place among the workers, from 0.
        bundles: the snapshots that it was started with.
        ready: whether its models are loaded and warm.
        models: what it serves, once it is ready.
        failure: why it could not serve, and its exit code, where it said so.
    """

    number: int
    bundles: tuple[Path, ...]
    process: asyncio.subprocess.Process
    channel: Channel
    ready: bool = False
    models: list[dict[str, Any]] = field(default_factory=list)
    failure: tuple[str, int] | None = None
    unanswered: int = 0
    _awaited: dict[str, asyncio.Future[dict[str, Any] | None]] = field(default_factory=dict)

    def kill(self) -> None:
        """End it at once."""
        # Popen.kill() looks whether the process has ended, and so may take its exit code away
        # from asyncio, which waits for it in a thread.
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)

    async def ask(self, do: str, answer: str, **details: Any) -> dict[str, Any] | None:
        """Say something, and wait for the event that answers it.

        Returns:
            The event; None: the worker has died.
        """
        if self.process.returncode is not None:
            return None
        self._awaited[answer] = asyncio.get_running_loop().create_future()
        self.channel.send(do=do, **details)
        return await self._awaited[answer]

    def answered(self, event: str, message: dict[str, Any] | None) -> None:
        """Give an event to whoever waits for it."""
        waiting = self._awaited.pop(event, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def died(self) -> None:
        """Tell all who wait that nothing will come."""
        for event in list(self._awaited):
            self.answered(event, None)

    def error(self) -> DeploykitError:
        """Return why it ended before it was ready."""
        if self.failure is not None:
            sentence, exit_code = self.failure
            return KINDS.get(exit_code, DeploykitError)(sentence)
        return DeploykitError(
            f"worker {self.number}: {self.end()} before it was ready; is there enough memory?"
        )

    def end(self) -> str:
        """Say how it ended."""
        code = self.process.returncode
        if code is not None and code < 0:
            names = (one.name for one in signal.Signals if one == -code)
            return f"was killed by {next(names, f'signal {-code}')}"
        return f"ended with exit code {code}"


class Crew:
    """All workers of a server, each kept alive in its place.

    Args:
        settings: of the server; ``bundles`` are replaced by snapshots.
        listener: the listening socket that all share.
        folder: private, for the meters.
        bundles: snapshots that workers are started with, by their place on the command line;
            a swap replaces it.
        tell: says a line to the operator.
        on_reload: called with a worker and its event when a client asks for a swap.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        folder: Path,
        bundles: Sequence[Path],
        tell: Tell,
        on_reload: Callable[[Worker, dict[str, Any]], None],
    ) -> None:
        self.settings, self.listener = settings, listener
        self.bundles = tuple(bundles)
        self.workers: dict[int, Worker] = {}
        self.all_ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.stopping = False
        self._tell, self._on_reload = tell, on_reload
        self._meters = folder / "meters"
        self._meters.mkdir()

    async def keep(self, number: int) -> None:
        """Have a worker in this place until the server stops.

        Raises:
            DeploykitError: a worker could not serve, before all had been ready once.
        """
        early_deaths = 0
        while not self.stopping:
            try:
                worker = await self._spawn(number)
            except OSError as error:  # no memory or no process is free, for now
                if not self.all_ready.is_set():
                    raise DeploykitError(f"worker {number} cannot be started: {error}") from error
                self._tell(f"worker {number} cannot be started: {error}; it is tried again")
                await asyncio.sleep(MAX_PAUSE_S)
                continue
            if self.stopping:  # it may have missed that
                worker.kill()
            began = asyncio.get_running_loop().time()
            await self._live(worker)
            if self.stopping:
                return
            if not self.all_ready.is_set():
                raise worker.error()
            reason = f": {worker.failure[0]}" if worker.failure else ""
            self._tell(f"worker {number} {worker.end()}{reason}; another takes its place")
            young = asyncio.get_running_loop().time() - began < YOUNG_S
            early_deaths = early_deaths + 1 if young else 0
            if early_deaths > 1:
                await asyncio.sleep(min(MAX_PAUSE_S, 0.25 * 2 ** (early_deaths - 1)))

    def send(self, **message: Any) -> None:
        """Say something to all."""
        for worker in self.workers.values():
            worker.channel.send(**message)

    def stop(self) -> None:
        """Let all end when they have answered; the ready ones also take what waits outside."""
        someone_is_ready = any(worker.ready for worker in self.workers.values())
        for worker in self.workers.values():
            if someone_is_ready and not worker.ready:
                worker.kill()
            else:
                worker.channel.send(do="stop")

    def kill(self) -> None:
        """End all at once."""
        for worker in self.workers.values():
            worker.kill()

    async def _spawn(self, number: int) -> Worker:
        bundles = self.bundles
        ours, theirs = socket.socketpair()
        with theirs, closed_on_error(ours):
            settings = replace(self.settings, bundles=tuple(map(str, bundles)))
            descriptors = (self.listener.fileno(), theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "deploykit.server.worker"),
                *map(str, (*descriptors, os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=descriptors,
                process_group=0,  # Ctrl-C is for the supervisor
                env={
                    **os.environ,
                    "BENTOML_DO_NOT_TRACK": "True",
                    "ORT_DISABLE_TELEMETRY": "1",
                    "DEPLOYKIT_SERVE": settings.to_json(),
                    "PROMETHEUS_MULTIPROC_DIR": str(self._meters),
                },
            )
        self.gone.clear()
        worker = Worker(number, bundles, process, await Channel.over(ours))
        self.workers[number] = worker
        if not self.all_ready.is_set():
            # Health is told from the start. Later a place that is being filled takes nothing: its
            # requests are better off waiting for it, or with the other workers.
            worker.channel.send(do="listen")
        return worker

    async def _live(self, worker: Worker) -> None:
        """Listen to a worker until it dies."""
        watching = asyncio.create_task(self._watch(worker))
        listening = asyncio.create_task(self._listen(worker))
        await worker.process.wait()
        watching.cancel()
        await listening  # what it said last
        worker.channel.close()
        del self.workers[worker.number]
        worker.died()
        mark_process_dead(worker.process.pid, str(self._meters))  # type: ignore[no-untyped-call]
        if not self.workers:
            self.gone.set()

    async def _watch(self, worker: Worker) -> None:
        """Kill a worker that hangs; tell of one that takes long to begin."""
        for second in range(1, sys.maxsize):
            await asyncio.sleep(PING_S)
            if not worker.ready:
                if second == SILENT_PINGS:
                    self._tell(f"worker {worker.number} is not ready after {second} s")
                continue
            if worker.unanswered >= SILENT_PINGS:
                self._tell(f"worker {worker.number} hangs and is killed")
                worker.kill()
                return
            worker.unanswered += 1
            worker.channel.send(do="ping")

    async def _listen(self, worker: Worker) -> None:
        while (message := await worker.channel.receive()) is not None:
            event = message.pop("event")
            if event == "pong":
                worker.unanswered = 0
            elif event == "ready":
                self._begin(worker, message["models"])
            elif event == "failed":
                worker.failure = message["error"], message["exit_code"]
            elif event == "reload":
                self._on_reload(worker, message)
            else:
                worker.answered(event, message)
        if not self.stopping:
            worker.kill()  # it has closed the channel and lives: nobody could stop it

    def _begin(self, worker: Worker, models: list[dict[str, Any]]) -> None:
        worker.models = models
        if worker.bundles != self.bundles:  # a swap was quicker than its start
            worker.kill()
            return
        worker.ready = True
        worker.channel.send(do="listen")
        if len(self.workers) == self.settings.workers and all(
            one.ready for one in self.workers.values()
        ):
            self.all_ready.set()


@contextmanager
def closed_on_error(end: socket.socket) -> Iterator[None]:
    """Close a socket if the block raises."""
    try:
        yield
    except BaseException:
        end.close()
        raise
