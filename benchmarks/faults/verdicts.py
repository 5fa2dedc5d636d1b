"""Whether what came of a bad request is what a server may do, and counts of what is not."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wire import HANG_S, Address, Outcome, exchange

# What may answer a request of which the server could not even read the head.
UNREADABLE = frozenset({400, 404, 405, 408, 413, 415, 422, 431})
NO_PATH, NO_METHOD = frozenset({400, 404}), frozenset({400, 405})
METHODS_TOLD = NO_METHOD | {204}  # RFC 9110 lets OPTIONS ask of any path
EXAMPLES = 10
FAULTS = {
    "undocumented": "undocumented statuses",
    "5xx": "5xx, but for a documented 503 or 504",
    "hung": "hangs",
    "unanswered": "whole requests without an answer",
    "split": "answers that nobody asked for",
    "formless": 'errors that are not {"error": "..."}',
    "other answer": "good requests answered otherwise",
}


@dataclass(frozen=True)
class Case:
    """A request and what may come of it.

    Attributes:
        kind: of the fault, for the table.
        pieces: the bytes that are sent.
        documented: the statuses that may answer.
        whole: whether the server gets a request that it can read to its end; only then it owes
            an answer, and closing is none.
        good: the body that must answer; None for a bad request.
        answers: so many are owed.
        method: of the request.
        half_close: whether the sender ends its side.
        linger_s: how long to look for answers that nobody asked for. Behind another request that
            is not whole there may be one: what is left of it is a request to the server.
    """

    kind: str
    pieces: tuple[bytes, ...]
    documented: frozenset[int] = UNREADABLE
    whole: bool = True
    good: bytes | None = None
    answers: int = 1
    method: str = "POST"
    half_close: bool = False
    linger_s: float = 0.0


class Documented:
    """The statuses that an OpenAPI document tells of each operation."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._operations = [
            (re.compile(re.sub(r"\\{[^/]+\\}", "[^/]+", re.escape(path))), path, operations)
            for path, operations in document["paths"].items()
        ]
        # The path that has fewer holes is the nearer one.
        self._operations.sort(key=lambda one: one[1].count("{"))

    def of(self, method: str, path: str) -> frozenset[int]:
        """Return the statuses that may answer ``method`` at ``path``, which has no query."""
        method = "get" if method == "HEAD" else method.lower()
        for pattern, _, operations in self._operations:
            if pattern.fullmatch(path):
                if method not in operations:
                    return METHODS_TOLD if method == "options" else NO_METHOD
                return frozenset(int(one) for one in operations[method]["responses"])
        return NO_PATH


def faults_of(case: Case, outcome: Outcome) -> list[str]:
    """Name what the server did wrong; the names are keys of ``FAULTS``."""
    found = []
    if outcome.end == "hung":
        found.append("hung")
    elif len(outcome.answers) < case.answers and (case.whole or outcome.end == "garbled"):
        found.append("unanswered")
    if len(outcome.answers) > case.answers and (case.whole or case.linger_s):
        found.append("split")
    for answer in outcome.answers[: case.answers]:
        if answer.status not in case.documented:
            found.append("5xx" if answer.status >= 500 else "undocumented")
        if case.good is not None and (answer.status, answer.body) != (200, case.good):
            found.append("other answer")
        if answer.status >= 400 and case.method != "HEAD" and not _is_error(answer.body):
            found.append("formless")
    return found


def _is_error(body: bytes) -> bool:
    """Whether a body is ``{"error": "a sentence"}``."""
    try:
        value = json.loads(body)
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("error"), str) and bool(value["error"])


@dataclass
class Tally:
    """What came of many requests.

    Attributes:
        kinds: requests by kind.
        statuses: by kind, how often each status (or way to end) came.
        faults: by name, how often.
        examples: the first few of every fault, told.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, case: Case, outcome: Outcome) -> None:
        """Count one request."""
        self.kinds[case.kind] += 1
        told = str(outcome.status or outcome.end)
        self.statuses.setdefault(case.kind, Counter())[told] += 1
        for name in faults_of(case, outcome):
            start = b"".join(case.pieces)[:120]
            self.blame(name, f"{case.kind}: {outcome.end} {told} after {start!r}")

    def blame(self, name: str, example: str) -> None:
        """Count a fault."""
        self.faults[name] += 1
        kept = self.examples.setdefault(name, [])
        if len(kept) < EXAMPLES:
            kept.append(example)

    @property
    def refused(self) -> int:
        """Bad requests that were answered 4xx, or closed."""
        return sum(
            count
            for kind, found in self.statuses.items()
            for told, count in found.items()
            if kind != "good" and (told.startswith("4") or told in {"closed", "reset"})
        )

    @property
    def sent(self) -> int:
        """Bad requests."""
        return sum(count for kind, count in self.kinds.items() if kind != "good")


async def send_all(
    address: Address,
    cases: Iterable[Case],
    tally: Tally,
    *,
    at_once: int = 16,
    timeout_s: float = HANG_S,
) -> None:
    """Send cases, so many at once, each over a connection of its own, and count what comes."""
    waiting = iter(cases)

    async def send() -> None:
        for case in waiting:
            outcome = await exchange(
                address,
                case.pieces,
                method=case.method,
                answers=case.answers,
                linger_s=case.linger_s,
                half_close=case.half_close,
                timeout_s=timeout_s,
            )
            tally.add(case, outcome)

    await asyncio.gather(*(send() for _ in range(at_once)))
