"""Serving against a bare session and against other servers: `make bench-serving`, 20 minutes.

Every server runs alone, started anew in each of the interleaved rounds; ratios are taken within a
round. All serve the same file with the same options of the session.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from calls import Call, binary_call, json_call, raw_call, told
from served_models import (
    Served,
    about_model,
    read_options,
    read_served,
    served_bundle,
    wide_bundle,
)
from server_run import OTHERS, QUIET, Server, free_port, running, serving
from table import Figure, publish

from deploykit.load import Load, closed_loop, run_load

APPS = Path(__file__).with_name("rival_servers")
CONNECTIONS, CLIENTS, THREADS = 16, 32, 1
BINARY, RAW, JSON = "/v2 binary", "/predict raw", "/v2 JSON"
ALONE, LOGGED, TRACED = "single client, p50 ms", "with access log", "with tracing"
BARE, BARE_MS = "bare session.run", "session.run, p50 ms"
BATCHED, UNBATCHED = "wide model, --max-batch 32", "wide model, --max-batch 1"
OURS = ("--threads", str(THREADS))
OF_BARE, OF_BEST, JSON_OF_BEST, OVERHEAD_MS, OF_UNBATCHED = 0.55, 2.5, 1.3, 1.5, 1.5
Round = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """How long it is measured.

    Attributes:
        rounds: of everything.
        seconds: of each load.
        warm_up_s: of load before each.
    """

    rounds: int
    seconds: float
    warm_up_s: float


FULL, TRIAL = Plan(7, 6.0, 1.5), Plan(1, 1.0, 0.3)


def drive(url: str, call: Call, connections: int, plan: Plan) -> Load:
    """Return what a server made of a closed loop; every answer must be a 200.

    Raises:
        RuntimeError: one is not.
    """
    run_load(closed_loop(url, call.request, connections, plan.warm_up_s))
    load = run_load(closed_loop(url, call.request, connections, plan.seconds))
    if set(load.statuses) != {200} or load.errors:
        raise RuntimeError(f"{url}{call.target}: expected 200s, got {load.statuses} {load.errors}")
    return load


def measure_bare(model: Path, plan: Plan) -> Round:
    """Run the loop of nothing but the session, in a process of its own."""
    command = [sys.executable, APPS / "bare_loop.py", str(plan.seconds)]
    done = subprocess.run(command, env=variables(model), check=True, capture_output=True)
    found = json.loads(done.stdout)
    return {BARE: found["rate"], BARE_MS: found["p50_ms"]}


def measure_ours(bundle: Path, served: Served, plan: Plan) -> Round:
    """Measure our server in its forms, and what the access log and tracing cost it."""
    one = served.samples[:1]
    calls = {BINARY: binary_call(served, one), RAW: raw_call(served, one)}
    calls[JSON] = json_call(served, one)
    with serving(bundle, flags=(*QUIET, *OURS)) as server:
        found = {
            name: drive(server.url, call, CONNECTIONS, plan).throughput
            for name, call in calls.items()
        }
        found[ALONE] = drive(server.url, calls[BINARY], 1, plan).percentile(50)
    for name, flags in ((LOGGED, ()), (TRACED, (*QUIET, "--tracing"))):
        with serving(bundle, flags=(*OURS, *flags)) as server:
            found[name] = drive(server.url, calls[BINARY], CONNECTIONS, plan).throughput
    return found


def measure_batching(bundle: Path, served: Served, plan: Plan) -> Round:
    """Measure a model for which batches pay, with batches and without."""
    call, found = binary_call(served, served.samples[:1]), {}
    for name, most in ((BATCHED, "32"), (UNBATCHED, "1")):
        with serving(bundle, flags=(*QUIET, *OURS, "--max-batch", most)) as server:
            found[name] = drive(server.url, call, CLIENTS, plan).throughput
    return found


def variables(model: Path, **more: str) -> dict[str, str]:
    """Return the environment of the others."""
    return {**os.environ, "MODEL": str(model), "THREADS": str(THREADS), **more}


@contextmanager
def rival(command: list[str | Path], ready: str, model: Path) -> Iterator[Server]:
    """Run another server; ``PORT`` in its command becomes a free port."""
    port = str(free_port())
    with tempfile.TemporaryDirectory(prefix="deploykit-") as home:
        env = variables(model, BENTOML_HOME=home, BENTOML_DO_NOT_TRACK="True")
        command = [port if word == "PORT" else word for word in command]
        with running(command, ready=ready, url=f"http://127.0.0.1:{port}", env=env) as server:
            yield server


def rivals() -> dict[str, tuple[list[str | Path], str, bool]]:
    """Return the command of each, the path that says it is ready, and whether it takes batches."""
    python, bento = OTHERS / "bin/python", [OTHERS / "bin/bentoml", "serve"]
    at = ["--working-dir", APPS, "--host", "127.0.0.1", "--port", "PORT"]
    return {
        "FastAPI": ([python, APPS / "fastapi_app.py", "PORT"], "/health", False),
        "LitServe": ([python, APPS / "litserve_app.py", "PORT", "1"], "/health", False),
        "LitServe, batches": ([python, APPS / "litserve_app.py", "PORT", "16"], "/health", False),
        "BentoML": ([*bento, "bentoml_app:One", *at], "/readyz", False),
        "BentoML, batches": ([*bento, "bentoml_app:Batched", *at], "/readyz", True),
    }


def measure_rivals(model: Path, served: Served, plan: Plan) -> Round:
    """Measure every other server with its JSON body of nested lists."""
    found = {}
    for name, (command, ready, batch) in rivals().items():
        image = served.samples[:1] if batch else served.samples[0]
        with rival(command, ready, model) as server:
            call = told("/predict", {"image": image.tolist()})
            found[name] = drive(server.url, call, CONNECTIONS, plan).throughput
    return found


def measure(bundle: Path, plan: Plan) -> list[Round]:
    """Return what each round measured."""
    served, model = read_served(bundle), bundle / "model.onnx"
    found: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        wide = wide_bundle(Path(folder))
        wide_served = read_served(wide)
        parts: tuple[Callable[[], Round], ...] = (
            lambda: measure_bare(model, plan),
            lambda: measure_ours(bundle, served, plan),
            lambda: measure_rivals(model, served, plan),
            lambda: measure_batching(wide, wide_served, plan),
        )
        for number in range(plan.rounds):
            found.append({key: value for part in parts for key, value in part().items()})
            rates = {key: round(value, 2) for key, value in found[-1].items()}
            print(f"round {number + 1}: {rates}", flush=True)
    return found


def ratio(rounds: list[Round], name: str, of: str) -> float:
    """Return the median over the rounds of one number over another."""
    return statistics.median(one[name] / one[of] for one in rounds)


def median(rounds: list[Round], name: str) -> float:
    """Return the median over the rounds."""
    return statistics.median(one[name] for one in rounds)


def figures_of(rounds: list[Round], others: Mapping[str, object]) -> list[Figure]:
    """Return the rows of the table; ``others`` names the servers that we are held against."""
    best = max(others, key=lambda name: median(rounds, name))
    overhead = statistics.median(one[ALONE] - one[BARE_MS] for one in rounds)
    rows = [BARE, BINARY, RAW, JSON, *others, LOGGED, TRACED, BATCHED, UNBATCHED]
    figures = [Figure(f"{name}, answers/s", median(rounds, name), "{:.0f}") for name in rows]
    for name in (BINARY, RAW):
        share = ratio(rounds, name, BARE)
        figures.append(Figure(f"{name} / bare", share, "{:.2f}", at_least=OF_BARE))
    for name, least in ((BINARY, OF_BEST), (RAW, OF_BEST), (JSON, JSON_OF_BEST)):
        times = ratio(rounds, name, best)
        figures.append(Figure(f"{name} / best other ({best})", times, "{:.2f}x", at_least=least))
    return [
        *figures,
        Figure(f"{BARE_MS}", median(rounds, BARE_MS), "{:.3f}"),
        Figure(f"{BINARY}, {ALONE}", median(rounds, ALONE), "{:.3f}"),
        Figure("p50 over the session's", overhead, "{:.2f} ms", at_most=OVERHEAD_MS),
        Figure("access log costs", 1 - ratio(rounds, LOGGED, BINARY), "{:.1%}"),
        Figure("tracing costs", 1 - ratio(rounds, TRACED, BINARY), "{:.1%}"),
        Figure("batching gains", ratio(rounds, BATCHED, UNBATCHED), "{:.2f}x", OF_UNBATCHED),
    ]


def main() -> int:
    """Measure and tell."""
    options = read_options(__doc__.splitlines()[0])
    plan = TRIAL if options.trial else FULL
    rounds = measure(served_bundle(options), plan)
    return publish(
        "serving",
        figures_of(rounds, rivals()),
        about=f"{about_model(options)}: one worker, {THREADS} thread of ONNX Runtime, "
        f"{CONNECTIONS} connections in a closed loop, one image a request; access log and tracing "
        f"off but where their cost is shown. Medians of {plan.rounds} interleaved rounds, "
        "every server alone beside the load, which runs on the same machine.",
        command="make bench-serving",
        details=[
            "The others take the image as nested lists in JSON, as their documentation shows: "
            "`benchmarks/rival_servers`. The wide model has three float layers of 3,072; it is "
            f"asked by {CLIENTS} clients."
        ],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
