"""What a load measured."""

import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.errors import first_line
from deploykit.load.connection import Answer

Check = Callable[[bytes], bool]


@dataclass(frozen=True, eq=False)
class Load:
    """What a server made of a load.

    Attributes:
        seconds: from the first request until the last was answered or given up.
        latencies_ms: float64, of each answer of status 200, in the order of the answers.
        statuses: how many answers had each status.
        errors: how many requests got no answer, by the reason.
        wrong: how many answers of status 200 failed the check.
        late_ms: how late the load's own requests went out (99th percentile); where that is no
            small part of the latencies, they measure the load and not the server.
    """

    seconds: float
    latencies_ms: np.ndarray[Any, np.dtype[np.float64]]
    statuses: dict[int, int]
    errors: dict[str, int]
    wrong: int
    late_ms: float

    @property
    def throughput(self) -> float:
        """Answers a second, of any status."""
        return sum(self.statuses.values()) / self.seconds

    @property
    def goodput(self) -> float:
        """Answers of status 200 a second that did not fail the check."""
        return (self.statuses.get(200, 0) - self.wrong) / self.seconds

    def percentile(self, percent: float) -> float:
        """Return the latency in ms that ``percent`` of the 200s did not exceed; NaN without any."""
        if not len(self.latencies_ms):
            return float("nan")
        return float(np.percentile(self.latencies_ms, percent))


class Tally:
    """Counts while a load runs; times are those of ``time.perf_counter``."""

    def __init__(self, check: Check | None) -> None:
        self.started = time.perf_counter()
        self._check = check
        self._latencies_s: list[float] = []
        self._late_s: list[float] = []
        self._statuses: Counter[int] = Counter()
        self._errors: Counter[str] = Counter()
        self._wrong = 0

    def answered(self, since: float, answer: Answer) -> None:
        """Count an answer to a request whose latency counts from ``since``."""
        self._statuses[answer.status] += 1
        if answer.status == 200:
            self._latencies_s.append(answer.at - since)
            if self._check is not None and not self._check(answer.body):
                self._wrong += 1

    def failed(self, error: OSError) -> None:
        """Count a request that got no answer."""
        self._errors[_reason(error)] += 1

    def sent(self, late_s: float) -> None:
        """Note how late a request went out, less than 0 where early."""
        self._late_s.append(max(0.0, late_s))

    def load(self) -> Load:
        """Return what was counted until now."""
        return Load(
            seconds=time.perf_counter() - self.started,
            latencies_ms=1000 * np.array(self._latencies_s, np.float64),
            statuses=dict(sorted(self._statuses.items())),
            errors=dict(self._errors.most_common()),
            wrong=self._wrong,
            late_ms=1000 * float(np.percentile(self._late_s or [0.0], 99)),
        )


def _reason(error: OSError) -> str:
    """Return the reason without addresses, so that equal ones are counted together."""
    if error.errno and not isinstance(error, ssl.SSLError | socket.gaierror):
        return os.strerror(error.errno).lower()
    return first_line(error)
