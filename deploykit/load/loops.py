"""The two ways to drive a server: at a rate of its own, or as fast as it answers.

In an open loop requests arrive on a schedule, whatever becomes of those before them, as they do
from clients who know nothing of each other: queues can grow, and do. In a closed loop each of a
number of clients waits for its answer, so that a slow server slows its own load (Schroeder,
Wierman, Harchol-Balter 2006, "Open Versus Closed: A Cautionary Tale").
"""

import asyncio
import importlib
import itertools
import random
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

from deploykit.address import Address, parse_address
from deploykit.load.connection import BrokenAnswer, Connection, Request, connect
from deploykit.load.tally import Check, Load, Tally

PATIENCE_S = 15.0  # servers end what takes them 10 s by themselves, and say so
MAX_CONNECTIONS = 1024
RECONNECT_S = 0.05  # a server that refuses is not worth a core
# Timers of event loops tick in milliseconds: a request may go half a tick early, rather than late.
HALF_TICK_S = 0.0005

Requests = Request | Sequence[Request]
Arrivals = Literal["poisson", "constant"]
T = TypeVar("T")


def run_load(load: Coroutine[Any, Any, T]) -> T:
    """Run a load in an event loop of its own: uvloop's where it is installed."""
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ModuleNotFoundError):  # there is none for Windows
        new_event_loop = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(load)


async def closed_loop(
    url: str,
    requests: Requests,
    connections: int,
    seconds: float,
    check: Check | None = None,
    *,
    patience_s: float = PATIENCE_S,
    stop: asyncio.Event | None = None,
) -> Load:
    """Ask over some connections; each sends its next request when its last one is answered.

    Args:
        url: of the server, as ``http://127.0.0.1:3000``.
        requests: what to ask; several are taken in turn.
        connections: how many ask at once.
        seconds: how long requests are sent; what is under way then is waited for.
        check: given the body of each answer of status 200, tells whether it is right.
        patience_s: how long, at the end, an answer is waited for; then it counts as an error.
        stop: ends the load before its time when it is set.

    Returns:
        What was measured; latencies count from the sending of a request.

    Raises:
        UsageError: no URL of a server.
    """
    address, wires = _prepare(url, requests)
    context = _tls_of(address)
    tally = Tally(check)
    over = asyncio.Event()

    async def ask_on() -> None:
        connection = Connection()
        try:
            while not over.is_set():
                try:
                    if not connection.usable:
                        connection = await connect(address, context)
                    sent = time.perf_counter()
                    tally.answered(sent, await connection.ask(next(wires)))
                except OSError as error:
                    tally.failed(error)
                    await asyncio.sleep(RECONNECT_S)
        finally:
            connection.close()

    tasks = {asyncio.create_task(ask_on()) for _ in range(connections)}
    try:
        await _first_of(asyncio.sleep(seconds), stop)
        over.set()
        await _settle(tasks, patience_s, tally)
    finally:
        await _cancel(tasks)
    return tally.load()


async def open_loop(
    url: str,
    requests: Requests,
    rate: float,
    seconds: float,
    check: Check | None = None,
    *,
    arrivals: Arrivals = "poisson",
    max_connections: int = MAX_CONNECTIONS,
    patience_s: float = PATIENCE_S,
    stop: asyncio.Event | None = None,
) -> Load:
    """Ask on a schedule, over as many connections as that takes.

    Latencies count from when a request was due, not from when it could be sent: who counts from
    there leaves out just the requests that a stalled server kept from being sent (coordinated
    omission: Gil Tene, "How NOT to Measure Latency"; his wrk2 does it so).

    Args:
        url: as of `closed_loop`.
        requests: as of `closed_loop`.
        rate: requests a second.
        seconds: how long requests arrive; answers are waited for.
        check: as of `closed_loop`.
        arrivals: ``poisson``, at random and independent, the same for each load of equal rate;
            or ``constant``, evenly.
        max_connections: what arrives while that many are in use is an error, ``no free
            connection``.
        patience_s: as of `closed_loop`.
        stop: as of `closed_loop`.

    Raises:
        UsageError: no URL of a server.
    """
    address, wires = _prepare(url, requests)
    pool = _Pool(address, max_connections)
    tally = Tally(check)
    tasks: set[asyncio.Task[None]] = set()

    async def ask(due: float, wire: bytes) -> None:
        began = time.perf_counter()
        tally.sent(began - due)
        try:
            connection = await pool.take()
            try:
                tally.answered(min(began, due), await connection.ask(wire))
            finally:
                pool.give_back(connection)
        except OSError as error:
            tally.failed(error)

    def forget(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:  # faults are raised at the end
            tasks.discard(task)

    async def send_all() -> None:
        for after_s in _schedule(rate, seconds, arrivals):
            due = tally.started + after_s
            # even when late: the pause lets answers in
            await asyncio.sleep(max(0.0, due - HALF_TICK_S - time.perf_counter()))
            task = asyncio.create_task(ask(due, next(wires)))
            tasks.add(task)
            task.add_done_callback(forget)
        await asyncio.sleep(tally.started + seconds - time.perf_counter())

    try:
        await _first_of(send_all(), stop)
        await _settle(tasks, patience_s, tally)
    finally:
        await _cancel(tasks)
        pool.close()
    return tally.load()


class _Pool:
    """Connections of an open loop; the one that was used last is used next, so that few are."""

    def __init__(self, address: Address, bound: int) -> None:
        self._address, self._context, self._bound = address, _tls_of(address), bound
        self._free: list[Connection] = []
        self._in_use = 0

    async def take(self) -> Connection:
        """Return a connection, a new one where none is free.

        Raises:
            OSError: the bound is reached, or no connection can be opened.
        """
        if self._in_use >= self._bound:
            raise BrokenAnswer("no free connection")
        self._in_use += 1
        while self._free:
            connection = self._free.pop()
            if connection.usable:  # a server closes what was idle for long
                return connection
        try:
            return await connect(self._address, self._context)
        except BaseException:
            self._in_use -= 1
            raise

    def give_back(self, connection: Connection) -> None:
        self._in_use -= 1
        if connection.usable:
            self._free.append(connection)

    def close(self) -> None:
        for connection in self._free:
            connection.close()


def _prepare(url: str, requests: Requests) -> tuple[Address, Iterator[bytes]]:
    address = parse_address(url)
    several = [requests] if isinstance(requests, Request) else requests
    return address, itertools.cycle([request.encode(address) for request in several])


def _tls_of(address: Address) -> ssl.SSLContext | None:
    return ssl.create_default_context() if address.tls else None


def _schedule(rate: float, seconds: float, arrivals: Arrivals) -> Iterator[float]:
    """Yield when requests arrive, in seconds since the beginning, the same times each time."""
    draw = random.Random(0)
    due = 0.0
    for count in itertools.count(1):
        due = due + draw.expovariate(rate) if arrivals == "poisson" else count / rate
        if due >= seconds:
            return
        yield due


async def _first_of(work: Coroutine[Any, Any, None], stop: asyncio.Event | None) -> None:
    """Wait until the work is done, or until ``stop`` is set and the work is cancelled."""
    if stop is None:
        await work
        return
    tasks = {asyncio.create_task(work), asyncio.create_task(stop.wait())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await _cancel(tasks)


async def _settle(tasks: set[asyncio.Task[None]], patience_s: float, tally: Tally) -> None:
    """Wait for what is under way; count what takes longer than patience allows."""
    if not tasks:
        return
    done, pending = await asyncio.wait(tasks, timeout=patience_s)
    for task in done:
        task.result()  # a fault of the check is the caller's
    for _ in pending:
        tally.failed(BrokenAnswer("no answer"))


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
