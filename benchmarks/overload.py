"""Twice as many requests as a server can answer: `make bench-overload`, five minutes.

Requests arrive in an open loop, whatever becomes of those before them. Every answer is compared
with that of the bundle's session, bit by bit.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from calls import LENGTH, binary_call, logits_of
from served_models import (
    Served,
    about_model,
    agreeing,
    read_options,
    read_served,
    served_bundle,
)
from server_run import QUIET, Server, serving
from table import Figure, publish
from wire import exchange

from deploykit.load import Load, Request, closed_loop, open_loop, run_load

SAMPLES, CONNECTIONS = 32, 32
STEPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)  # of the closed loop's rate
CALM, OVER = 0.7, 2.0
ALLOWED = {200, 429, 503, 504}
GOODPUT, TAIL = 0.9, 2.0
CALM_DOWN_S = 2.0  # after which the server's queue is as long as before the overload


@dataclass(frozen=True)
class Plan:
    """Seconds of each part."""

    closed: float  # twice: the machine's own speed drifts by a tenth within minutes
    step: float
    calm: float
    over: float


FULL, TRIAL = Plan(15, 10, 30, 120), Plan(3, 1.5, 5, 10)


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        closed: the closed loop, before everything else and after it.
        steps: the open loop at rising rates, with the rate of each.
        calm: at 70% of the saturation.
        over: at twice the saturation.
    """

    closed: tuple[Load, Load]
    steps: tuple[tuple[float, Load], ...]
    calm: Load
    over: Load

    @property
    def peak(self) -> float:
        """The saturation: the most answers of 200 a second that a way of loading got."""
        closed = sum(load.goodput for load in self.closed) / len(self.closed)
        return max(closed, *(load.goodput for _, load in self.steps))


async def learn(server: Server, served: Served) -> tuple[list[Request], frozenset[bytes]]:
    """Return a request for each sample, with its number as id, and the answers they must get.

    Raises:
        RuntimeError: an answer has not the bits of the session.
    """
    requests, answers = [], set()
    for at in range(len(served.samples)):
        call = binary_call(served, served.samples[at : at + 1], id=str(at))
        answer = (await exchange(server.address, [call.wire()])).answers[0]
        head, raw = logits_of(answer.body, answer.headers.get(LENGTH))
        if raw != np.ascontiguousarray(served.logits[at]).tobytes() or head["id"] != str(at):
            raise RuntimeError(f"sample {at}: the server answers otherwise than the session")
        requests.append(call.request)
        answers.add(answer.body)
    return requests, frozenset(answers)


def measure(server: Server, served: Served, plan: Plan) -> Found:
    """Find the saturation, then load the server below and far above it."""
    requests, answers = asyncio.run(learn(server, served))

    def drive(rate: float, seconds: float) -> Load:
        load = run_load(open_loop(server.url, requests, rate, seconds, answers.__contains__))
        print(f"{rate:.0f}/s: {told(load)}", flush=True)
        return load

    def circle() -> Load:
        load = run_load(
            closed_loop(server.url, requests, CONNECTIONS, plan.closed, answers.__contains__)
        )
        print(f"closed loop: {told(load)}", flush=True)
        return load

    run_load(closed_loop(server.url, requests, CONNECTIONS, plan.closed / 5))
    closed = circle()
    rates = [share * closed.goodput for share in STEPS]
    steps = tuple((rate, drive(rate, plan.step)) for rate in rates)
    peak = max(closed.goodput, *(load.goodput for _, load in steps))
    calm, over = drive(CALM * peak, plan.calm), drive(OVER * peak, plan.over)
    time.sleep(CALM_DOWN_S)
    return Found((closed, circle()), steps, calm, over)


def told(load: Load) -> str:
    """Return a load in a line."""
    percentiles = [f"{load.percentile(percent):.1f}" for percent in (50, 90, 99)]
    return (
        f"{load.goodput:.0f} good answers/s, p50/p90/p99 {'/'.join(percentiles)} ms, "
        f"statuses {load.statuses}, errors {load.errors}, sent up to {load.late_ms:.1f} ms late"
    )


def figures_of(found: Found) -> list[Figure]:
    """Return the rows of the table."""
    calm, over = found.calm, found.over
    tail = over.percentile(99) / calm.percentile(99)
    loads = [*found.closed, calm, over, *(load for _, load in found.steps)]
    share = over.goodput / found.peak
    return [
        Figure("saturation, answers/s", found.peak, "{:.0f}"),
        Figure("requests at twice that", sum(over.statuses.values()), "{:d}"),
        Figure("other statuses than 200, 429, 503, 504", strange(over.statuses), "{:d}", at_most=0),
        Figure("requests without an answer", sum(over.errors.values()), "{:d}", at_most=0),
        Figure("goodput / saturation", share, "{:.1%}", at_least=GOODPUT),
        Figure("p99 at 70%", calm.percentile(99), "{:.2f} ms"),
        Figure("p99 at 200%, of those admitted", over.percentile(99), "{:.2f} ms"),
        Figure("p99 at 200% / at 70%", tail, "{:.2f}x", at_most=TAIL),
        Figure("wrong answers, in all loads", sum(one.wrong for one in loads), "{:d}", at_most=0),
    ]


def strange(statuses: Mapping[int, int]) -> int:
    """Return how many answers had a status that overload does not explain."""
    return sum(count for status, count in statuses.items() if status not in ALLOWED)


def main() -> int:
    """Measure and tell."""
    options = read_options(__doc__.splitlines()[0], queue={"metavar": "N", "help": "of the server"})
    bundle = served_bundle(options)
    served = read_served(bundle, SAMPLES)
    if not agreeing(bundle, served):
        raise SystemExit("--bundle: expected a model that gives the same bits in every batch")
    flags = [*QUIET, "--threads", "1"] + (["--queue", options.queue] if options.queue else [])
    with serving(bundle, flags=flags) as server:
        found = measure(server, served, TRIAL if options.trial else FULL)
    steps = [f"- open loop, {rate:.0f}/s: {told(load)}" for rate, load in found.steps]
    return publish(
        "overload",
        figures_of(found),
        about=f"{about_model(options)}: one worker, one thread, {SAMPLES} different images "
        "in turn, one a request. Saturation is the most that an open loop got, or a closed "
        "one in the mean of before and after; 70% and 200% of it arrive at random times "
        "(Poisson). The load runs on the same machine.",
        command="make bench-overload",
        details=[
            f"- closed loop, {CONNECTIONS} connections: {told(found.closed[0])}",
            *steps,
            f"- at 70%: {told(found.calm)}",
            f"- at 200%: {told(found.over)}",
            f"- closed loop again: {told(found.closed[1])}",
        ],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
