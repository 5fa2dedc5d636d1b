"""The load behind ``deploykit bench --url``."""

import asyncio
import json
import math
import signal
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from deploykit.address import bearer
from deploykit.client import Client
from deploykit.client.tensors import DATATYPES, Array, encode_inputs
from deploykit.errors import DataError, Interrupted, ServerError, UsageError, first_line
from deploykit.load.connection import Request
from deploykit.load.loops import closed_loop, open_loop, run_load
from deploykit.load.tally import Load

CONNECTIONS, SECONDS = 16, 10.0
MAX_RATE = 100_000  # requests a second; a process does not send more
PERCENTS = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@dataclass(frozen=True)
class Plan:
    """What ``deploykit bench --url`` is asked to do.

    Attributes:
        url: of the server.
        model: its name; None for the first that is served.
        rate: requests a second of an open loop; None for a closed one.
        connections: of a closed loop; None for 16.
        seconds: how long requests are sent; None for 10.
        body: the file to send to ``/predict``; None for a sample of random numbers.
        token: what the server demands.
    """

    url: str
    model: str | None
    rate: float | None
    connections: int | None
    seconds: float | None
    body: Path | None
    token: str | None


def bench_server(plan: Plan, as_json: bool, tell: Callable[[str], None]) -> None:
    """Measure a server under load, and tell it.

    Args:
        plan: what to do.
        as_json: whether to tell one JSON object.
        tell: prints.

    Raises:
        UsageError, DataError: what was asked for cannot be done.
        ServerError: the server cannot be asked, is not ready, or answered nothing with 200.
        Interrupted: Ctrl-C ended it; what was measured until then is told.
    """
    _check(plan)
    request = _request(plan)
    load, stopped = run_load(_measure(plan, request))
    about = describe(plan, request, load)
    tell(json.dumps(about) if as_json else render(about))
    if stopped:
        raise Interrupted(signal.SIGINT, "bench: stopped by SIGINT; measured until then")
    if not load.statuses.get(200):
        raise ServerError(f"{about['url']}: expected answers of status 200, got none")


def _check(plan: Plan) -> None:
    if plan.rate is not None and plan.connections is not None:
        raise UsageError("--rate and --connections: expected one of them, got both; drop one")
    if plan.rate is not None and not 0 < plan.rate <= MAX_RATE:
        raise UsageError(f"--rate: expected 0 < x <= {MAX_RATE}, got {plan.rate}")
    if plan.seconds is not None and not (plan.seconds > 0 and math.isfinite(plan.seconds)):
        raise UsageError(f"--seconds: expected more than 0, got {plan.seconds}")


def _request(plan: Plan) -> Request:
    """Ask the server what it takes, and return the request to send."""
    content = None if plan.body is None else _read(plan.body)
    with Client(plan.url, plan.token, retries=0) as client:
        served = client.models()
        if not served or not client.ready():
            raise ServerError(f"{plan.url}: expected a server that is ready, got one that is not")
        if content is not None:
            path = "/predict" if plan.model is None else f"/predict/{quote(plan.model, safe='')}"
            return Request("POST", path, bearer(plan.token), content)
        model = plan.model or served[0].name
        headers, content = encode_inputs(random_inputs(client.metadata(model)))
    path = f"/v2/models/{quote(model, safe='')}/infer"
    return Request("POST", path, {**headers, **bearer(plan.token)}, content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise DataError(f"--body: {path}: cannot be read: {first_line(error)}") from error


def random_inputs(metadata: Mapping[str, Any]) -> dict[str, Array]:
    """Draw one sample for each input of a model, the same each time.

    Bytes are any byte, floats 0 to 1, and other integers 0 or 1, which no model finds out of
    range.

    Args:
        metadata: what the Open Inference Protocol tells of the model; a size that it leaves open
            (-1) becomes 1.

    Raises:
        ServerError: an input of a datatype that has no arrays.
    """
    draw = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for about in metadata["inputs"]:
        dtype = DATATYPES.get(about["datatype"])
        if dtype is None:
            raise ServerError(
                f"{about['name']}: expected a datatype of {', '.join(DATATYPES)}, "
                f"got {about['datatype']}; give the request's body: --body FILE"
            )
        shape = [max(1, size) for size in about["shape"]]
        if dtype.kind == "f":
            inputs[about["name"]] = draw.random(shape).astype(dtype)
        else:
            inputs[about["name"]] = draw.integers(
                256 if dtype == np.uint8 else 2, size=shape
            ).astype(dtype)
    return inputs


async def _measure(plan: Plan, request: Request) -> tuple[Load, bool]:
    """Run the loop that is asked for; return also whether Ctrl-C ended it."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    seconds = SECONDS if plan.seconds is None else plan.seconds

    def stop_once() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C does not wait for answers

    with suppress(NotImplementedError):  # on Windows Ctrl-C ends all at once
        loop.add_signal_handler(signal.SIGINT, stop_once)
    if plan.rate is not None:
        load = await open_loop(plan.url, request, plan.rate, seconds, stop=stop)
    else:
        connections = plan.connections or CONNECTIONS
        load = await closed_loop(plan.url, request, connections, seconds, stop=stop)
    return load, stop.is_set()


def describe(plan: Plan, request: Request, load: Load) -> dict[str, Any]:
    """Return what was done and measured, as JSON has it; null is a latency without answers."""
    drive = {"connections": plan.connections or CONNECTIONS}
    sent = {"rate": plan.rate, "late_ms": load.late_ms}
    latency_ms = {name: load.percentile(percent) for name, percent in PERCENTS.items()}
    return {
        "url": f"{plan.url.rstrip('/')}{request.path}",
        **(drive if plan.rate is None else sent),
        "seconds": load.seconds,
        "throughput": load.throughput,
        "goodput": load.goodput,
        "latency_ms": {
            name: None if math.isnan(value) else value for name, value in latency_ms.items()
        },
        "statuses": {str(status): count for status, count in load.statuses.items()},
        "errors": load.errors,
    }


def render(about: Mapping[str, Any]) -> str:
    """Return the same for a person, in 80 columns."""
    if "rate" in about:
        drive = (
            f"open loop, {about['rate']:g} requests/s; sent up to {about['late_ms']:.1f} ms late"
        )
    else:
        drive = f"closed loop, {about['connections']} connections"
    latency_ms = [
        f"{name} {'-' if value is None else f'{value:.2f}'}"
        for name, value in about["latency_ms"].items()
    ]
    rows = {
        "load": f"{drive}; {about['seconds']:.1f} s",
        "throughput": f"{about['throughput']:.1f} answers/s",
        "goodput": f"{about['goodput']:.1f} answers/s of status 200",
        "latency ms": f"{', '.join(latency_ms)} of status 200",
        "statuses": _counts(about["statuses"]),
        "errors": _counts(about["errors"]),
    }
    lines = [
        textwrap.fill(value, 80, initial_indent=f"{name:<12}", subsequent_indent=" " * 12)
        for name, value in rows.items()
    ]
    return "\n".join([about["url"], *lines])


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"
