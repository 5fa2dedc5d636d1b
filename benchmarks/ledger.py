"""Clients that keep a book: every request that was sent, and what became of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import h11
import numpy as np
from calls import LENGTH, binary_call, logits_of
from served_models import Served
from wire import Address, Answer, Answers

MIXED, WRONG, REFUSED = "mixed", "wrong", "status"
Judge = Callable[[Answer], str]


@dataclass(frozen=True)
class Question:
    """A request and how its answer is judged: in a word, such as the version that gave it."""

    data: bytes
    judge: Judge


@dataclass
class Ledger:
    """What became of the requests.

    Attributes:
        verdicts: whole answers, by their judges' words.
        lost: requests without a whole answer, on a connection that had answered before or in the
            middle of the answer.
        unread: requests on a new connection that ended without a byte: the server may never have
            seen them.
        refused: connections that nobody took.
        stop: set when no more shall be asked; what is under way is awaited.
    """

    verdicts: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    unread: int = 0
    refused: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def answered(self) -> int:
        """Whole answers, whatever they say."""
        return self.verdicts.total()

    @property
    def turned_away(self) -> int:
        """Answers with another status than 200."""
        return sum(count for word, count in self.verdicts.items() if word.startswith(REFUSED))

    @property
    def sent(self) -> int:
        """Requests."""
        return self.answered + self.lost + self.unread


def questions_of(versions: Sequence[Served]) -> list[Question]:
    """Return a question a sample; its judge names the version that gave the answer."""
    return [
        Question(
            binary_call(versions[0], versions[0].samples[at : at + 1]).wire(),
            lambda answer, at=at: version_of(answer, versions, at),
        )
        for at in range(len(versions[0].samples))
    ]


def version_of(answer: Answer, versions: Sequence[Served], at: int) -> str:
    """Name the version whose bits an answer to sample ``at`` has.

    Returns:
        The version; ``mixed`` where the answer names another one than its bits are of, ``wrong``
        where they are of none; ``status 503`` and the like where it is none of 200.
    """
    if answer.status != 200:
        return f"{REFUSED} {answer.status}"
    head, raw = logits_of(answer.body, answer.headers.get(LENGTH))
    for served in versions:
        if raw == np.ascontiguousarray(served.logits[at]).tobytes():
            return served.version if head["model_version"] == served.version else MIXED
    return WRONG


@asynccontextmanager
async def load(
    address: Address, questions: Sequence[Question], clients: int, *, per_connection: int = 10**9
) -> AsyncIterator[Ledger]:
    """Let so many clients ask until the block ends, or until the ledger's ``stop`` is set."""
    ledger = Ledger()
    asking = [
        asyncio.create_task(_keep_asking(address, questions, ledger, number, per_connection))
        for number in range(clients)
    ]
    try:
        yield ledger
    finally:
        ledger.stop.set()
        await asyncio.gather(*asking)


async def _keep_asking(
    address: Address, questions: Sequence[Question], ledger: Ledger, number: int, most: int
) -> None:
    """Ask one question after the other, ``most`` on a connection, beginning at ``number``."""
    while not ledger.stop.is_set():
        try:
            reader, writer = await asyncio.open_connection(*address)
        except OSError:
            ledger.refused += 1
            await asyncio.sleep(0.02)
            continue
        for asked in range(most):
            question = questions[(number + asked) % len(questions)]
            again = await _ask(reader, writer, question, ledger, first=asked == 0)
            if not again or ledger.stop.is_set():
                break
        number += 1
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    question: Question,
    ledger: Ledger,
    *,
    first: bool,
) -> bool:
    """Ask a question and book what comes; whether the connection can be asked again."""
    stream, received = Answers(), 0
    with suppress(OSError, h11.RemoteProtocolError):
        writer.write(question.data)
        while not stream.found:
            data = await reader.read(65536)
            received += len(data)
            stream.feed(data)
            if not data:
                break
    if stream.found:
        answer = stream.found[0]
        ledger.verdicts[question.judge(answer)] += 1
        return "close" not in answer.headers.get("connection", "")
    if first and not received:
        ledger.unread += 1
    else:
        ledger.lost += 1
    return False
