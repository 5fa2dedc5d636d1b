"""Ten thousand bad requests, huge bodies, slow clients: `make bench-bad_requests`, ten minutes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calls import Call, binary_call, every_form
from faults.bodies import BadBodies
from faults.by_schema import OTHER, Found, ask_by_schema
from faults.planted import seen_faults
from faults.pressure import LARGE, Large, meet_slow_clients, send_large
from faults.sockets import slow_cases, wire_cases
from faults.verdicts import FAULTS, Case, Documented, Tally, send_all
from served_models import Served, agreeing, read_options, read_served, served_bundle, wide_bundle
from server_run import QUIET, Server, serving
from table import Figure, publish
from wire import exchange

from deploykit.load import closed_loop

MAX_BATCH, SEED = 32, 0
SLOW_CLIENTS, OTHERS, CLOSED_S = 50, 4, 10.0
GROWTH_MIB = 16.0
RAISED = re.compile(r"^[\w.]+(?:Error|Exception): .{,60}", re.MULTILINE)
EVERY = 20  # so many bad requests to a good one beside them


@dataclass(frozen=True)
class Amount:
    """How much is sent.

    Attributes:
        bodies: scrambled ones, for each model.
        requests: scrambled as a whole.
        examples: of schemathesis, for each operation.
        bounds: whether schemathesis goes to the bounds of the schemas.
        slow_s: seconds of load without slow clients, and beside them.
        refused: so many must be refused, at least.
    """

    bodies: int
    requests: int
    examples: int
    bounds: bool
    slow_s: float
    refused: int


FULL, TRIAL = Amount(3000, 2500, 150, True, 10.0, 10_000), Amount(100, 100, 3, False, 4.0, 1_000)


class Watch:
    """A running server, good answers it must give again, and what came of everything.

    Attributes:
        server: under test.
        models: that it serves.
        steady: those of them that give the same bits in every batch.
        tally: of all requests.
        restarts: workers that came new.
    """

    def __init__(self, server: Server, models: Sequence[Served], steady: Sequence[Served]) -> None:
        self.server, self.models, self.steady = server, models, steady
        self.tally, self.restarts = Tally(), 0
        self._workers = server.workers()
        self._good: list[Case] = []

    async def learn(self) -> None:
        """Ask one good request of every form, and remember the answers."""
        for served in self.steady:
            for call in every_form(served).values():
                outcome = await exchange(self.server.address, [call.wire()])
                if outcome.status != 200:
                    raise RuntimeError(f"{call.target}: expected 200, got {outcome}")
                body = outcome.answers[0].body
                self._good.append(Case("good", (call.wire(),), frozenset({200}), good=body))

    async def send(self, name: str, cases: Iterable[Case], at_once: int = 16) -> None:
        """Send a block of bad requests with good ones between them, and all good ones after it."""
        await send_all(self.server.address, self._mixed(cases), self.tally, at_once=at_once)
        await self.look(name)

    async def look(self, name: str) -> None:
        """Ask all good requests again, and count new workers."""
        await send_all(self.server.address, self._good, self.tally)
        self.restarts += len(self.new_workers())
        print(f"{name}: {self.tally.sent} sent, faults: {dict(self.tally.faults)}", flush=True)

    def new_workers(self) -> set[int]:
        """Return the workers that were not there when last asked."""
        workers = self.server.workers()
        new, self._workers = workers - self._workers, workers
        return new

    def _mixed(self, cases: Iterable[Case]) -> Iterator[Case]:
        for number, case in enumerate(cases):
            if number % EVERY == 0:
                yield self._good[number // EVERY % len(self._good)]
            yield case


async def documented_by(server: Server) -> Documented:
    """Read the server's OpenAPI document."""
    outcome = await exchange(server.address, [Call("/openapi.json", method="GET").wire()])
    return Documented(json.loads(outcome.answers[0].body))


async def send_bad(watch: Watch, amount: Amount) -> Found:
    """Send every kind of bad request; return what schemathesis found."""
    drawn = random.Random(SEED)
    bodies = BadBodies(await documented_by(watch.server), MAX_BATCH)
    calls = [call for served in watch.models for call in every_form(served).values()]
    await watch.learn()
    for served in watch.models:
        await watch.send(f"listed bodies, {served.name}", bodies.listed(served))
        scrambled = bodies.scrambled(served, amount.bodies, drawn)
        await watch.send(f"scrambled bodies, {served.name}", scrambled)
    await watch.send("below HTTP", wire_cases(calls, amount.requests, SEED))
    await watch.send("that never end", slow_cases(calls), at_once=128)
    found = await asyncio.to_thread(
        ask_by_schema, watch.server.url, amount.examples, SEED, bounds=amount.bounds
    )
    await watch.look("schemathesis")
    return found


async def sees_a_restart(watch: Watch) -> bool:
    """Kill a worker: whether the one that takes its place is counted."""
    os.kill(min(watch.server.workers()), signal.SIGKILL)
    for _ in range(100):
        await asyncio.sleep(0.1)
        if watch.new_workers():
            return True
    return False


@dataclass(frozen=True)
class Slow:
    """What slow clients came to.

    Attributes:
        seconds: after which each was closed.
        before_ms: p99 of other clients without them.
        beside_ms: p99 of other clients beside them.
    """

    seconds: Sequence[float]
    before_ms: float
    beside_ms: float


async def bear_slow_clients(server: Server, served: Served, seconds: float) -> Slow:
    """Serve a few clients without slow ones, then beside them, so many seconds each."""
    request = binary_call(served, served.samples[:1]).request
    before = await closed_loop(server.url, request, OTHERS, seconds)
    slow = asyncio.create_task(meet_slow_clients(server, served.name, SLOW_CLIENTS))
    beside = await closed_loop(server.url, request, OTHERS, seconds)
    return Slow(await slow, before.percentile(99), beside.percentile(99))


async def measure(bundle: Path, amount: Amount) -> tuple[list[Figure], list[str]]:
    """Do everything; return the rows of the table and the lines below it."""
    controls = await seen_faults()
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        bundles = [bundle, wide_bundle(Path(folder))]
        models = [read_served(one) for one in bundles]
        steady = [two for one, two in zip(bundles, models, strict=True) if agreeing(one, two)]
        with serving(*bundles, flags=(*QUIET, "--max-batch", str(MAX_BATCH))) as server:
            watch = Watch(server, models, steady)
            found = await send_bad(watch, amount)
            slow = await bear_slow_clients(server, models[0], amount.slow_s)
            await watch.look("slow clients")
            log = server.log
            controls += ["restarts"] * await sees_a_restart(watch)
        with serving(bundle) as server:  # a fresh one, which has no memory to use again
            large = await send_large(server, models[0].name)
            log += server.log
    figures = [
        *_of_requests(watch, found, amount.refused),
        Figure("tracebacks in the server's log", log.count("Traceback"), "{:d}", at_most=0),
        *_of_pressure(large, slow),
        Figure("planted faults that are seen", len(controls), "{:d}", at_least=len(FAULTS) + 1),
    ]
    return figures, [*_details(watch.tally, found, large), *sorted(set(RAISED.findall(log)))]


def _of_requests(watch: Watch, found: Found, least: int) -> list[Figure]:
    tally = watch.tally
    rows = [
        Figure("bad requests", tally.sent + found.sent, "{:d}"),
        Figure("of which refused", tally.refused + found.refused, "{:d}", at_least=least),
        Figure("good requests between them", tally.kinds["good"], "{:d}"),
    ]
    for name, told in FAULTS.items():
        count = tally.faults[name] + found.faults.get(name, 0)
        rows.append(Figure(told, count, "{:d}", at_most=0))
    rows.append(Figure(OTHER, found.faults.get(OTHER, 0), "{:d}", at_most=0))
    return [*rows, Figure("restarts", watch.restarts, "{:d}", at_most=0)]


def _of_pressure(large: Sequence[Large], slow: Slow) -> list[Figure]:
    refused = sum(one.outcome.status in {400, 413} for one in large)
    growth = max(one.growth_bytes for one in large) / 2**20
    size, count = f"{LARGE // 10**6} MB", len(slow.seconds)
    last, ratio = max(slow.seconds), slow.beside_ms / slow.before_ms
    return [
        Figure(f"bodies of {size}, refused", refused, "{:d}", at_least=len(large)),
        Figure("memory that one takes at most", growth, "{:.1f} MiB", at_most=GROWTH_MIB),
        Figure(f"last of {count} slow clients closed after", last, "{:.1f} s", at_most=CLOSED_S),
        Figure("others' p99 without them", slow.before_ms, "{:.2f} ms"),
        Figure("others' p99 beside them / without", ratio, "{:.2f}x", at_most=2.0),
    ]


def _details(tally: Tally, found: Found, large: Sequence[Large]) -> list[str]:
    """Tell what came of every kind, and the first of the faults."""
    lines = ["| kind | requests | answers |", "|---|---|---|"]
    for kind, statuses in sorted(tally.statuses.items()):
        counts = ", ".join(f"{count} x {told}" for told, count in sorted(statuses.items()))
        lines.append(f"| {kind} | {tally.kinds[kind]} | {counts} |")
    lines.append(f"| by schema | {found.sent} | {found.refused} x refused |")
    for one in large:
        told, mib = one.outcome.status or one.outcome.end, one.growth_bytes / 2**20
        lines.append(f"| {LARGE // 10**6} MB, {one.name} | 1 | {told}, {mib:+.1f} MiB |")
    examples = [f"{name}: {text}" for name, texts in tally.examples.items() for text in texts]
    return [*lines, "", *examples, *found.told]


def main() -> int:
    """Measure and tell."""
    options = read_options(__doc__.splitlines()[0])
    bundle = served_bundle(options)
    amount = TRIAL if options.trial else FULL
    figures, details = asyncio.run(measure(bundle, amount))
    return publish(
        "bad_requests",
        figures,
        about="`deploykit serve` of an image model and a float model, one worker, under bad "
        "requests: bodies of every form with every fault that is listed in `faults/bodies.py` and "
        "`faults/corpus`, the same with random bytes changed, raw sockets (`faults/sockets.py`), "
        "and what schemathesis derives from `/openapi.json`; good requests between them must get "
        f"the same bytes each time. Seed {SEED}.",
        command="make bench-bad_requests",
        details=details,
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
