"""SIGTERM, swaps and a killed worker, all under load: `make bench-lifecycle`, five minutes.

Every answer is judged: it must be whole, and its bits those of one version, the one it names.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from ledger import MIXED, WRONG, Ledger, Question, load, questions_of
from served_models import (
    Served,
    about_model,
    raised_bundle,
    read_options,
    read_served,
    served_bundle,
)
from server_run import QUIET, STOP_S, Server, left_of, serving
from table import Figure, publish
from wire import exchange

from deploykit.publish import publish_folder

CLIENTS, SEED, RAISED_BY = 8, 0, 4.0
GRACE_S, REVIVAL_S = 30.0, 3.0
DEATH_S = 1.0  # in which workers see that nobody supervises them any more
BALANCER_S = 0.2  # after which a balancer has seen that a server is not ready
SWAP_LIMIT_S, REVIVAL_LIMIT_S = 20.0, 15.0
CORRUPT = 2  # of five swaps, the one before which a corrupt bundle is tried


@dataclass(frozen=True)
class Stop:
    """What one SIGTERM under load came to.

    Attributes:
        polite: requests of clients that stop asking when readiness says no.
        stubborn: requests of those that ask until nobody takes a connection.
        readiness: the answers of /readyz after the signal, in order; None where nobody took the
            connection.
        seconds: until the server had exited.
        orphans: processes that were left.
    """

    polite: Ledger
    stubborn: Ledger
    readiness: tuple[int | None, ...]
    seconds: float
    orphans: int

    @property
    def lost(self) -> int:
        """Requests that the server had taken and did not answer."""
        return self.polite.lost + self.polite.unread + self.stubborn.lost

    @property
    def unready_first(self) -> bool:
        """Whether readiness said 503 before nobody was there to ask."""
        return 503 in self.readiness[: self.readiness.index(None)]


async def stop_under_load(
    bundle: Path,
    questions: Sequence[Question],
    moment: float,
    number: signal.Signals = signal.SIGTERM,
) -> Stop:
    """Start a server, load it, and send a signal after ``moment`` seconds."""
    with serving(bundle) as server:
        async with (
            load(server.address, questions, CLIENTS, per_connection=50) as polite,
            load(server.address, questions, CLIENTS) as stubborn,
        ):
            await asyncio.sleep(moment)
            tree, begun = server.tree(), time.perf_counter()
            server.signal(number)
            readiness = await watch_readiness(server, polite)
            stubborn.stop.set()
            await asyncio.to_thread(server.process.wait, STOP_S)
            seconds = time.perf_counter() - begun
            await asyncio.sleep(DEATH_S if number == signal.SIGKILL else 0)
            orphans = len(left_of(tree))
    return Stop(polite, stubborn, readiness, seconds, orphans)


async def watch_readiness(server: Server, polite: Ledger) -> tuple[int | None, ...]:
    """Ask for readiness until nobody is there; stop the polite clients as a balancer would."""
    seen: list[int | None] = []
    while None not in seen:
        ask = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        seen.append((await exchange(server.address, [ask])).status)
        if seen[-1] == 503 and 503 not in seen[:-1]:
            asyncio.get_running_loop().call_later(BALANCER_S, polite.stop.set)
        await asyncio.sleep(0.02)
    return tuple(seen)


@dataclass(frozen=True)
class Swaps:
    """What swaps under load came to.

    Attributes:
        requests: those that were asked all the while.
        seconds: from each signal until the new version answered; infinite where it never did.
        kept: corrupt bundles that left the old version serving.
    """

    requests: Ledger
    seconds: tuple[float, ...]
    kept: int


async def swap_under_load(versions: Sequence[Path], count: int, folder: Path) -> Swaps:
    """Replace the served bundle ``count`` times, and once in five by a corrupt one first."""
    served = [read_served(version) for version in versions]
    place = folder / "served"
    put(versions[0], place)
    seconds, kept = [], 0
    with serving(place) as server:
        async with load(server.address, questions_of(served), 2 * CLIENTS) as requests:
            for number in range(1, count + 1):
                old, new = served[(number - 1) % 2], served[number % 2]
                if number % 5 == CORRUPT:
                    await asyncio.to_thread(put, corrupt_copy(versions[number % 2], folder), place)
                    server.signal(signal.SIGHUP)
                    await asyncio.sleep(2)
                    kept += await version_at(server, new.name) == old.version
                await asyncio.to_thread(put, versions[number % 2], place)
                seconds.append(await swap(server, new.name, new.version))
                await asyncio.sleep(0.3)
    return Swaps(requests, tuple(seconds), kept)


def put(bundle: Path, place: Path) -> None:
    """Let a copy of a bundle take its place in one step."""
    with publish_folder(place, force=True) as staging:
        shutil.copytree(bundle, staging, dirs_exist_ok=True)


def corrupt_copy(bundle: Path, folder: Path) -> Path:
    """Return a copy of a bundle with one other byte in its model."""
    copy = folder / "corrupt"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    model = bytearray((copy / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (copy / "model.onnx").write_bytes(model)
    return copy


async def swap(server: Server, name: str, version: str) -> float:
    """Tell the server to read its bundle again; return the seconds until it answers with it."""
    begun = time.perf_counter()
    server.signal(signal.SIGHUP)
    while (seconds := time.perf_counter() - begun) < SWAP_LIMIT_S:
        if await version_at(server, name) == version:
            return seconds
        await asyncio.sleep(0.02)
    return math.inf


async def version_at(server: Server, name: str) -> str | None:
    """Return the version that answers for a model."""
    ask = f"GET /v2/models/{name} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    outcome = await exchange(server.address, [ask])
    return json.loads(outcome.answers[0].body)["versions"][-1] if outcome.status == 200 else None


@dataclass(frozen=True)
class Killed:
    """What the death of one of two workers came to: requests, and seconds until it was back."""

    requests: Ledger
    seconds: float
    version: str

    @property
    def succeeded(self) -> float:
        """Share of the requests that were answered well."""
        return self.requests.verdicts[self.version] / max(
            1, self.requests.sent + self.requests.refused
        )


async def kill_under_load(bundle: Path, served: Served, seconds: float) -> Killed:
    """Kill one of two workers in the midst of ``seconds`` of load."""
    with serving(bundle, flags=(*QUIET, "--workers", "2")) as server:
        async with load(
            server.address, questions_of([served]), 2 * CLIENTS, per_connection=20
        ) as requests:
            await asyncio.sleep(seconds / 3)
            old = server.workers()
            os.kill(min(old), signal.SIGKILL)
            revival = await seconds_to_revive(server, old)
            await asyncio.sleep(seconds / 3)
    return Killed(requests, revival, served.version)


async def seconds_to_revive(server: Server, old: set[int]) -> float:
    """Return the seconds until a new worker holds a client's connection."""
    begun = time.perf_counter()
    while (seconds := time.perf_counter() - begun) < REVIVAL_LIMIT_S:
        if any(holds_a_client(pid) for pid in server.workers() - old):
            return seconds
        await asyncio.sleep(0.05)
    return math.inf


def holds_a_client(pid: int) -> bool:
    """Whether a process has taken a connection."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_ESTABLISHED for one in found)


def _of_stops(stops: Sequence[Stop]) -> list[Figure]:
    ledgers = [ledger for one in stops for ledger in (one.polite, one.stubborn)]
    unready = sum(one.unready_first for one in stops)
    unread = sum(one.stubborn.unread for one in stops)
    return [
        Figure("SIGTERMs under load", len(stops), "{:d}"),
        Figure("requests answered meanwhile", sum(one.answered for one in ledgers), "{:d}"),
        Figure("admitted requests lost", sum(one.lost for one in stops), "{:d}", at_most=0),
        Figure("wrong answers", sum(_wrong(one) for one in ledgers), "{:d}", at_most=0),
        Figure("readiness said 503 before the end", unready, "{:d}", at_least=len(stops)),
        Figure("longest exit", max(one.seconds for one in stops), "{:.2f} s", at_most=GRACE_S),
        Figure("orphans", sum(one.orphans for one in stops), "{:d}", at_most=0),
        Figure("never read, of clients that ignore readiness", unread, "{:d}"),
    ]


def _of_the_master(stop: Stop) -> list[Figure]:
    return [
        Figure("left of a server after SIGKILL of its first", stop.orphans, "{:d}", at_most=0),
        Figure("requests that this loses, as it must", stop.lost, "{:d}", at_least=1),
    ]


def _of_swaps(swaps: Swaps) -> list[Figure]:
    requests, count = swaps.requests, len(swaps.seconds)
    missing = requests.sent - requests.answered + requests.turned_away + requests.refused
    corrupt = sum(number % 5 == CORRUPT for number in range(1, count + 1))
    return [
        Figure("swaps under load", sum(map(math.isfinite, swaps.seconds)), "{:d}", at_least=count),
        Figure("requests answered meanwhile", requests.answered, "{:d}"),
        Figure("requests lost or refused", missing, "{:d}", at_most=0),
        Figure("answers of mixed versions", requests.verdicts[MIXED], "{:d}", at_most=0),
        Figure("answers of neither version", requests.verdicts[WRONG], "{:d}", at_most=0),
        Figure("median swap", statistics.median(swaps.seconds), "{:.2f} s"),
        Figure("corrupt bundles that changed nothing", swaps.kept, "{:d}", at_least=corrupt),
    ]


def _of_the_killed(killed: Killed) -> list[Figure]:
    requests = killed.requests
    return [
        Figure("requests while one of two workers died", requests.sent, "{:d}"),
        Figure("of which succeeded", killed.succeeded, "{:.2%}", at_least=0.99),
        Figure("wrong answers", _wrong(requests), "{:d}", at_most=0),
        Figure("worker back after", killed.seconds, "{:.2f} s", at_most=REVIVAL_S),
    ]


def _wrong(ledger: Ledger) -> int:
    return ledger.verdicts[MIXED] + ledger.verdicts[WRONG]


async def measure(bundle: Path, stops: int, swaps: int, seconds: float) -> list[Figure]:
    """Do everything; the moments of the signals come from the seed."""
    served, drawn = read_served(bundle), random.Random(SEED)
    questions, stopped = questions_of([served]), []
    for number in range(stops):
        stopped.append(await stop_under_load(bundle, questions, drawn.uniform(0.2, 1.5)))
        print(f"SIGTERM {number + 1}: {stopped[-1].lost} lost", flush=True)
    with tempfile.TemporaryDirectory(prefix="deploykit-") as place:
        folder = Path(place)
        other = raised_bundle(bundle, folder / "other", "2.0", RAISED_BY)
        swapped = await swap_under_load([bundle, other], swaps, folder)
    return [
        *_of_stops(stopped),
        *_of_the_master(await stop_under_load(bundle, questions, 1.0, signal.SIGKILL)),
        *_of_swaps(swapped),
        *_of_the_killed(await kill_under_load(bundle, served, seconds)),
    ]


def main() -> int:
    """Measure and tell."""
    options = read_options(__doc__.splitlines()[0])
    bundle = served_bundle(options)
    how = (2, 2, 6.0) if options.trial else (20, 20, 30.0)
    return publish(
        "lifecycle",
        asyncio.run(measure(bundle, *how)),
        about=f"`deploykit serve` ({about_model(options)}) under closed-loop load of "
        f"{2 * CLIENTS} clients: SIGTERM at random moments (seed {SEED}), SIGHUP after its "
        "bundle was replaced (every fifth time by a corrupt one first), SIGKILL of one of "
        "two workers and of a supervisor.",
        command="make bench-lifecycle",
        details=[
            "Half of the clients stop asking when readiness says 503, as a balancer lets them; "
            "the others go on until nobody takes a connection. A request is lost where its answer "
            "is not whole; on a new connection of the latter half it may never have been read."
        ],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
