"""Ten minutes of mixed load: memory, descriptors and threads stay flat: `make bench-soak`.

The same check is then run against servers in which a leak was planted, and must see it.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calls import Call, every_form
from faults.sockets import wire_cases
from faults.verdicts import Tally, send_all
from ledger import Question, load
from scipy.stats import theilslopes
from served_models import Served, about_model, read_options, read_served, served_bundle
from server_run import QUIET, Server, Usage, serving
from table import Figure, publish

MIB = 2**20
CLIENTS, SEED = 8, 0
QUIET_S = 0.5  # after the load, so that its connections are gone before they are counted
WARM_UP = 0.25  # of the samples; caches and pools fill
# Growth over the whole run, of what is left after the warm-up.
MAX_MEMORY, MAX_OTHERS = 8 * MIB, 3
LEAKS = {"memory": "memory_bytes", "descriptors": "descriptors", "threads": "threads"}


@dataclass(frozen=True)
class Growth:
    """By how much each grew over a run, after the warm-up: the slope times its length."""

    memory_bytes: float
    descriptors: float
    threads: float

    @property
    def too_large(self) -> list[str]:
        """Names of those that are not flat."""
        return [
            name
            for name, attribute in LEAKS.items()
            if getattr(self, attribute) > (MAX_MEMORY if name == "memory" else MAX_OTHERS)
        ]


def growth_of(samples: Sequence[Usage]) -> Growth:
    """Return the growth: the median of all slopes, which no single sample can bend."""
    steady = samples[round(WARM_UP * len(samples)) :]
    return Growth(
        *(
            float(theilslopes([getattr(one, name) for one in steady])[0]) * (len(steady) - 1)
            for name in LEAKS.values()
        )
    )


def questions_of(served: Served) -> list[Question]:
    """Return good requests of every form, a few bad ones, and what monitors ask."""
    calls = list(every_form(served).values())
    others = [Call(path, method="GET") for path in ("/metrics", "/readyz", "/v2", "/nowhere")]
    broken = [Call(call.target, call.body[:-3], call.headers) for call in calls]
    return [
        Question(call.wire(), lambda answer: str(answer.status))
        for call in (*(calls * 5), *others, *broken)
    ]


async def soak(server: Server, served: Served, seconds: float, rounds: int) -> list[Usage]:
    """Load a server; return what it holds in the quiet moment after each round."""
    questions, samples = questions_of(served), []
    calls, drawn = list(every_form(served).values()), random.Random(SEED)
    for number in range(rounds):
        stop = time.monotonic() + seconds / rounds - QUIET_S
        async with load(server.address, questions, CLIENTS, per_connection=200) as ledger:
            cases = list(wire_cases(calls, 50, seed=number))
            await send_all(server.address, drawn.sample(cases, 20), Tally(), at_once=2)
            await asyncio.sleep(max(0.0, stop - time.monotonic()))
        if ledger.lost or not ledger.answered:
            raise RuntimeError(f"soak: expected every request answered, got {ledger}")
        await asyncio.sleep(QUIET_S)
        samples.append(server.usage())
    return samples


def measure(bundle: Path, seconds: float, rounds: int, env: dict[str, str]) -> list[Usage]:
    """Soak a fresh server."""
    served = read_served(bundle)
    with serving(bundle, flags=(*QUIET, "--threads", "1"), env=env) as server:
        return asyncio.run(soak(server, served, seconds, rounds))


def leaking(what: str) -> dict[str, str]:
    """Return the variables that plant a leak."""
    return {"PYTHONPATH": str(Path(__file__).with_name("leaks")), "DEPLOYKIT_LEAK": what}


def figures_of(growth: Growth, last: Usage, seen: Sequence[str], minutes: float) -> list[Figure]:
    """Return the rows of the table.

    Args:
        growth: of the sound server.
        last: what it held at the end.
        seen: planted leaks that were too large for the same bounds.
        minutes: of the soak.
    """
    memory, most = "{:+.2f} MiB", {"at_most": MAX_OTHERS}
    return [
        Figure("minutes of load", minutes, "{:.1f}"),
        Figure("memory, growth", growth.memory_bytes / MIB, memory, at_most=MAX_MEMORY / MIB),
        Figure("descriptors, growth", growth.descriptors, "{:+.1f}", **most),
        Figure("threads, growth", growth.threads, "{:+.1f}", **most),
        Figure("memory at the end", last.memory_bytes / MIB, "{:.0f} MiB"),
        Figure("descriptors at the end", last.descriptors, "{:d}"),
        Figure("threads at the end", last.threads, "{:d}"),
        *(Figure(f"planted leak of {what} is seen", what in seen, "{:d}", 1) for what in LEAKS),
    ]


def main() -> int:
    """Soak a sound server, then leaking ones."""
    options = read_options(__doc__.splitlines()[0])
    bundle = served_bundle(options)
    seconds, rounds = (12.0, 6) if options.trial else (600.0, 60)
    samples, seen = measure(bundle, seconds, rounds, {}), []
    for what in LEAKS:
        growth = growth_of(
            measure(bundle, *((8.0, 4) if options.trial else (60.0, 12)), leaking(what))
        )
        print(f"planted leak of {what}: {growth}", flush=True)
        seen += [what] if growth.too_large == [what] else []
    return publish(
        "soak",
        figures_of(growth_of(samples), samples[-1], seen, seconds / 60),
        about=f"`deploykit serve` ({about_model(options)}), one worker, under closed-loop load of "
        f"{CLIENTS} clients: every form of body, bad ones, monitors' requests, broken "
        "connections. All its processes are measured between rounds, without a client.",
        command="make bench-soak",
        details=[
            f"Growth is the median slope of the samples after the first {WARM_UP:.0%}, times the "
            "rest of the run. A planted leak (in a run of a minute) counts as seen where it, and "
            "it alone, is beyond the same bounds."
        ],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
