"""The process behind `deploykit serve`: it answers nothing itself, so nothing can take it down.

It holds the listening socket and the snapshots of the bundles, keeps the workers alive, swaps
bundles in all of them, and drains them when it is told to stop.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploykit.artifacts import JsonDict
from deploykit.errors import DeploykitError, Interrupted
from deploykit.server.crew import Crew, Worker
from deploykit.server.listener import open_listener, turn_away, url_of
from deploykit.server.settings import Settings
from deploykit.server.snapshot import private_folder, take_snapshot
from deploykit.server.swap import Swaps


def supervise(settings: Settings) -> None:
    """Serve until a signal says stop.

    Args:
        settings: checked, with the number of threads of a worker.

    Raises:
        Interrupted: always at the end; the workers were drained.
        DeploykitError: it could not start.
    """
    with private_folder() as folder:
        snapshots = [folder / "start" / str(slot) for slot in range(len(settings.bundles))]
        manifests = [
            take_snapshot(Path(bundle), snapshot)
            for bundle, snapshot in zip(settings.bundles, snapshots, strict=True)
        ]
        with open_listener(settings.host, settings.port) as listener:
            asyncio.run(Supervisor(settings, listener, folder).run(snapshots, manifests))


class Supervisor:
    """The life of a server, from its start to its last answer."""

    def __init__(self, settings: Settings, listener: socket.socket, folder: Path) -> None:
        self._settings, self._listener, self._folder = settings, listener, folder
        self._url = url_of(listener, settings)

    async def run(self, snapshots: Sequence[Path], manifests: Sequence[JsonDict]) -> None:
        """Serve; see `supervise`."""
        self._ended: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._crew = Crew(
            self._settings, self._listener, self._folder, snapshots, tell, self._on_reload
        )
        sources = [Path(bundle) for bundle in self._settings.bundles]
        self._swaps = Swaps(self._crew, sources, manifests, self._folder)
        self._obey_signals()
        keepers = [self._start(self._keep(number)) for number in range(self._settings.workers)]
        announcing = self._start(self._announce())
        try:
            stopped_by = await self._ended
            announcing.cancel()
            outcome = await self._drain()
        finally:
            self._crew.stopping = True
            self._crew.kill()
            await asyncio.wait(keepers)
        raise Interrupted(stopped_by, f"serve: stopped by {stopped_by.name}; {outcome}")

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep(self, number: int) -> None:
        try:
            await self._crew.keep(number)
        except Exception as error:  # noqa: BLE001 - it ends the server, where it is told
            if not self._ended.done():
                self._ended.set_exception(error)

    async def _announce(self) -> None:
        await self._crew.all_ready.wait()
        models = self._crew.workers[0].models
        for model in models:
            tell(
                f"{model['name']} {model['version']}: {model['provider']}, "
                f"{self._settings.threads} thread(s) in each of {self._settings.workers} worker(s)"
            )
        names = ", ".join(f"{model['name']} {model['version']}" for model in models)
        tell(f"serving {names} on {self._url} (docs: /docs)")

    # Signals.

    def _obey_signals(self) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ValueError, RuntimeError):  # outside of the main thread there are none
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._stop, number)
            loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self._reload_all()))

    def _stop(self, number: signal.Signals) -> None:
        """Begin to drain; the second time, stop at once."""
        if self._ended.done():
            self._hurry.set()
        else:
            self._ended.set_result(number)

    # Swaps.

    async def _reload_all(self) -> None:
        with suppress(DeploykitError):  # which is told
            await self._swap(None)

    def _on_reload(self, worker: Worker, message: dict[str, Any]) -> None:
        self._start(self._reload_for(worker, message["request"], message["model"]))

    async def _reload_for(self, worker: Worker, request: int, model: str | None) -> None:
        error, status = None, 200
        if self._ended.done():
            error, status = "the server is stopping; ask the next one", 503
        else:
            try:
                await self._swap(model)
            except DeploykitError as fault:
                error, status = str(fault), 400
        worker.channel.send(do="reloaded", request=request, error=error, status=status)

    async def _swap(self, model: str | None) -> None:
        await self._crew.all_ready.wait()
        try:
            swapped = await self._swaps.swap(model)
        except DeploykitError as error:
            tell(f"error: {error}; what was served is served on")
            raise
        tell(f"now serving {', '.join(swapped)} on {self._url}")

    # The end.

    async def _drain(self) -> str:
        """Let the workers answer what was admitted.

        Returns:
            How it went, for the last sentence.
        """
        crew, settings = self._crew, self._settings
        crew.stopping = True
        if not crew.all_ready.is_set():
            return "it had not begun to serve"
        with suppress(TimeoutError):
            async with asyncio.timeout(settings.grace_s):
                # Balancers have to see that readiness says no before connections are refused.
                crew.send(do="drain")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), settings.drain_s)
                if not self._hurry.is_set():
                    turn_away(self._listener)
                    crew.stop()
                    await first_of(crew.gone, self._hurry)
        if not crew.workers:
            return "every admitted request was answered"
        if self._hurry.is_set():
            return "a second signal ended it at once"
        return f"requests were still in work after {settings.grace_s:g} s; raise --grace"


async def first_of(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def tell(line: str) -> None:
    """Say a line to the operator; a server goes on where nobody listens any more."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - a server's log
