"""A process that answers: ``python -m deploykit.server.worker LISTENER CONTROL SUPERVISOR``.

The arguments are two descriptors and a process id. The supervisor says over the control channel
when connections are taken and when the worker stops; where it is gone, so is the worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import os
import resource
import signal
import socket
import ssl
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import uvloop

from deploykit.errors import DeploykitError
from deploykit.server import http
from deploykit.server.app import App
from deploykit.server.channel import Channel
from deploykit.server.door import Door
from deploykit.server.front import Front
from deploykit.server.meters import Meters
from deploykit.server.models import Models
from deploykit.server.refusal import Refusal
from deploykit.server.settings import Settings
from deploykit.server.tls import server_context

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The thread that runs a session needs the interpreter's lock back when it is done; by default the
# loop may keep it for 5 ms, which is several times what a small model takes.
SWITCH_S = 0.0005
MAX_FILES = 65536


class Worker:
    """Loads the models, answers requests, obeys the supervisor."""

    def __init__(self, settings: Settings, channel: Channel, listener: socket.socket) -> None:
        self.settings, self.channel = settings, channel
        self.models = Models(settings, Meters())
        self.app = App(self.models, settings, self._reload)
        self.front = Front(self.app, self.models)
        self.state = http.State(None if settings.tracing else self.app.turn_away)
        self.door = Door(listener, self.front, self.state, _context(settings))
        self._reloads: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Work until the supervisor says stop; where it is gone, end at once."""
        self._start(self._load())
        obeying = asyncio.create_task(self._obey())
        stopped = asyncio.create_task(self._stopped.wait())
        await asyncio.wait((obeying, stopped), return_when=asyncio.FIRST_COMPLETED)
        if obeying.done():
            os._exit(1)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self) -> None:
        try:
            if self.settings.tracing:
                await self.front.trace()
            await self.models.load()
        except Exception as error:  # noqa: BLE001 - the supervisor tells it in one sentence
            await give_up(self.channel, error)
        gc.collect()
        gc.freeze()  # what is here now stays: no collection need look at it again
        self.channel.send(event="ready", models=self.models.describe())

    async def _obey(self) -> None:
        """Do what the supervisor says, until it is gone."""
        deeds: dict[str, Callable[..., None]] = {
            "ping": lambda: self.channel.send(event="pong"),
            "listen": self.door.open,
            "drain": self._drain,
            "stop": lambda: self._start(self._stop()),
            "prepare": lambda swap, slots: self._start(self._prepare(swap, slots)),
            "commit": lambda swap: self._start(self._commit(swap)),
            "discard": self.models.discard,
            "reloaded": self._reloaded,
        }
        while (message := await self.channel.receive()) is not None:
            deeds[message.pop("do")](**message)

    # Swaps.

    async def _prepare(self, swap: int, slots: dict[str, str]) -> None:
        fault = None
        try:
            await self.models.prepare(swap, {int(slot): path for slot, path in slots.items()})
        except Exception as error:  # noqa: BLE001 - told to whoever asked for the swap
            fault = told(error)[0]
        self.channel.send(event="prepared", swap=swap, error=fault)

    async def _commit(self, swap: int) -> None:
        await self.models.commit(swap)
        self.channel.send(event="committed", swap=swap)

    async def _reload(self, model: str | None) -> None:
        """Ask the supervisor for a swap, and wait until every worker has confirmed it."""
        request = next(self._numbers)
        self._reloads[request] = asyncio.get_running_loop().create_future()
        self.channel.send(event="reload", request=request, model=model)
        try:
            answer = await self._reloads[request]
        finally:
            del self._reloads[request]
        if answer["error"] is not None:
            raise Refusal(answer["status"], answer["error"])

    def _reloaded(self, request: int, **answer: Any) -> None:
        if request in self._reloads:  # its client may have gone
            self._reloads[request].set_result(answer)

    # The end.

    def _drain(self) -> None:
        self.models.draining = self.state.draining = True

    async def _stop(self) -> None:
        """Answer what was admitted, and what waits at the door."""
        self._drain()
        await self.door.close()
        for connection in list(self.state.connections):
            connection.shutdown()
        while self.state.connections or self.state.tasks:
            await asyncio.sleep(0.01)
        if self.models.ready:
            await self.models.close()
        await self.front.close()
        self.app.close()
        self._stopped.set()


def told(error: Exception) -> tuple[str, int]:
    """Return an error as a sentence, and the exit code that goes with it."""
    if isinstance(error, DeploykitError):
        return str(error), error.exit_code
    return f"unexpected {type(error).__name__}: {error}", 1


async def give_up(channel: Channel, error: Exception) -> NoReturn:
    """Tell the supervisor why this worker cannot serve, and end."""
    sentence, exit_code = told(error)
    channel.send(event="failed", error=sentence, exit_code=exit_code)
    await channel.flush()
    os._exit(exit_code)


def _context(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return server_context(settings.tls_cert, settings.tls_key)


def allow_many_connections() -> None:
    """Raise the limit of open files, which is 1024 in many places, as far as the system lets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def die_with(supervisor: int) -> None:
    """Have the system kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:  # it died before that
        os._exit(1)


async def work(listener: int, control: int) -> None:
    """Serve on a listening socket, told what to do over a control socket."""
    settings = Settings.from_json(os.environ["DEPLOYKIT_SERVE"])
    channel = await Channel.over(socket.socket(fileno=control))
    door = socket.socket(fileno=listener)
    door.setblocking(False)
    try:
        worker = Worker(settings, channel, door)
    except DeploykitError as error:  # as of a certificate that was replaced by a broken one
        await give_up(channel, error)
    await worker.run()


def main() -> None:
    """Work, and end without the interpreter's clean-up, in which a runtime's threads may hang."""
    listener, control, supervisor = (int(argument) for argument in sys.argv[1:])
    # The supervisor tells when to stop. A signal sent to the whole group must not be quicker.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with(supervisor)
    allow_many_connections()
    sys.setswitchinterval(SWITCH_S)
    warnings.filterwarnings("ignore", module="PIL")  # a client's image is no fault of ours
    uvloop.run(work(listener, control))
    os._exit(0)


if __name__ == "__main__":
    main()
