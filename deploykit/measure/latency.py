"""Latency of exported models, compared fairly on a machine that is never quiet."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from deploykit.artifacts import JsonDict, OnnxModel
from deploykit.measure.session import example_feed, open_model
from deploykit.seeds import stable_seed
from deploykit.statistics import Interval, median_ratio_interval
from deploykit.targets import Target

WARM_UP_RUNS, WARM_UP_SECONDS = 3, 0.05
SAMPLE_SECONDS = 0.005  # long against the clock and a context switch, short against a drift
MIN_ROUNDS = 10  # a 95% interval of a median needs 6

Verdict = Literal["faster", "slower", "undecided"]


@dataclass(frozen=True)
class Latency:
    """One model's latency at one batch size, beside the baseline's in the same rounds.

    Attributes:
        median_ms: of single runs; milliseconds a batch.
        p90_ms: nine of ten runs were at most as long; milliseconds a batch.
        ratio: baseline's time / this model's, median over the rounds; above 1 is faster.
        interval: 95% interval of the ratio.
        rounds: rounds that the ratio rests on.
        threads: threads inside an operator.
        margin: a ratio this close to 1 decides nothing.
    """

    median_ms: float
    p90_ms: float
    ratio: float
    interval: Interval
    rounds: int
    threads: int
    margin: float

    @property
    def verdict(self) -> Verdict:
        """Compare with the baseline; ``undecided`` where the interval reaches the margin."""
        low, high = self.interval
        if low > 1 + self.margin:
            return "faster"
        return "slower" if high < 1 / (1 + self.margin) else "undecided"

    @property
    def decided(self) -> float:
        """The ratio, 1 where the rounds leave it undecided."""
        return 1.0 if self.verdict == "undecided" else self.ratio

    @property
    def shown(self) -> float:
        """The ratio, the least that the rounds allow where they leave it undecided."""
        return self.interval[0] if self.verdict == "undecided" else self.ratio

    def to_json(self) -> JsonDict:
        """Return the fields and the verdict."""
        return {
            "median_ms": self.median_ms,
            "p90_ms": self.p90_ms,
            "ratio": self.ratio,
            "interval": list(self.interval),
            "rounds": self.rounds,
            "threads": self.threads,
            "margin": self.margin,
            "verdict": self.verdict,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Latency:
        """Read what `to_json` wrote, so that a resumed run decides by the same numbers."""
        low, high = value["interval"]
        fields = ("median_ms", "p90_ms", "ratio", "rounds", "threads", "margin")
        return cls(interval=(low, high), **{name: value[name] for name in fields})


@dataclass
class _Runner:
    """One model in the rounds: how to run it, and the times so far, in ms."""

    session: Any
    feed: Mapping[str, np.ndarray]
    runs_per_sample: int = 1
    runs_ms: list[float] = field(default_factory=list)
    samples_ms: list[float] = field(default_factory=list)

    def run_ms(self) -> float:
        start = time.perf_counter()
        self.session.run(None, self.feed)
        return 1000 * (time.perf_counter() - start)

    def warm_up(self) -> None:
        """Let memory be planned and caches fill, then choose how long a sample is."""
        times = [self.run_ms() for _ in range(WARM_UP_RUNS)]
        while sum(times) < 1000 * WARM_UP_SECONDS:
            times.append(self.run_ms())
        self.runs_per_sample = math.ceil(1000 * SAMPLE_SECONDS / float(np.median(times)))

    def sample(self) -> None:
        """Time one sample; its first run, which finds the other models' caches, is left out."""
        self.run_ms()
        times = [self.run_ms() for _ in range(self.runs_per_sample)]
        self.runs_ms += times
        self.samples_ms.append(float(np.median(times)))


def measure_latency(
    models: Mapping[str, OnnxModel],
    *,
    threads: int,
    baseline: str,
    batch_sizes: Sequence[int] = (1, 32),
    precision: float = 0.02,
    margin: float = 0.02,
    seconds_per_model: float = 3.0,
    seed: int = 0,
    target: Target | None = None,
) -> dict[str, dict[str, Latency]]:
    """Time models against a baseline in interleaved rounds.

    In each round every model runs for some milliseconds, in an order drawn anew, so that a
    machine that slows down slows all of them. Rounds go on until every ratio is known to
    ``precision`` or the time is up; at least `MIN_ROUNDS` are run.

    Args:
        models: name -> model.
        threads: threads inside an operator.
        baseline: name of the model that ratios compare with.
        batch_sizes: samples a run.
        precision: half the interval's width, relative to the ratio, that is narrow enough.
        margin: a ratio this close to 1 is ``undecided``.
        seconds_per_model: cap for one batch size, for each model; may be exceeded by slow models.
        seed: of the order within the rounds.
        target: whose execution providers run the models; default: the CPU's.

    Returns:
        ``{name: {"1": Latency, "32": Latency}}``; the baseline's ratio is 1.

    Raises:
        ValueError: the baseline is not among the models.
        ModelError: ONNX Runtime cannot open a model.

    Example:
        >>> measured = measure_latency({"fp32": a, "int8": b}, threads=1, baseline="fp32")
        >>> measured["int8"]["1"].ratio, measured["int8"]["1"].verdict
        (1.87, 'faster')
    """
    if baseline not in models:
        raise ValueError(f"baseline: expected one of {sorted(models)}, got {baseline!r}")
    sessions = {name: open_model(model, threads, target) for name, model in models.items()}
    measured: dict[str, dict[str, Latency]] = {name: {} for name in models}
    for batch_size in batch_sizes:
        runners = {
            name: _Runner(sessions[name], example_feed(model, batch_size))
            for name, model in models.items()
        }
        generator = np.random.default_rng(stable_seed("latency", seed, batch_size))
        _run_rounds(runners, baseline, precision, seconds_per_model * len(models), generator)
        for name, runner in runners.items():
            latency = _summarize(runner, runners[baseline], threads, margin)
            measured[name][str(batch_size)] = latency
    return measured


def _run_rounds(
    runners: Mapping[str, _Runner],
    baseline: str,
    precision: float,
    seconds: float,
    generator: np.random.Generator,
) -> None:
    """Fill the runners' times, in rounds, until the ratios are precise or the time is up."""
    names = sorted(runners)
    stop = time.perf_counter() + seconds
    with _no_garbage_collection():
        for name in names:
            runners[name].warm_up()
        rounds = 0
        while rounds < MIN_ROUNDS or (
            time.perf_counter() < stop and not _is_precise(runners, baseline, precision)
        ):
            for position in generator.permutation(len(names)):
                runners[names[position]].sample()
            rounds += 1


def _is_precise(runners: Mapping[str, _Runner], baseline: str, precision: float) -> bool:
    for name, runner in runners.items():
        ratio, (low, high) = _ratio(runner, runners[baseline])
        if name != baseline and (high - low) / 2 > precision * ratio:
            return False
    return True


def _ratio(runner: _Runner, baseline: _Runner) -> tuple[float, Interval]:
    return median_ratio_interval(np.array(baseline.samples_ms), np.array(runner.samples_ms))


def _summarize(runner: _Runner, baseline: _Runner, threads: int, margin: float) -> Latency:
    ratio, interval = _ratio(runner, baseline)
    median_ms, p90_ms = np.percentile(runner.runs_ms, (50, 90))
    rounds = len(runner.samples_ms)
    return Latency(float(median_ms), float(p90_ms), ratio, interval, rounds, threads, margin)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector from falling into one model's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
