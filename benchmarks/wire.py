"""Bytes to a socket, and whatever comes back; nothing here mends a request or tries it again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import h11

Address = tuple[str, int]
HANG_S = 15.0


@dataclass(frozen=True)
class Answer:
    """One whole HTTP answer; the names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Outcome:
    """What came of a connection.

    Attributes:
        answers: whole ones, in order.
        end: ``open`` (as many answers as were awaited came), ``closed``, ``reset``, ``hung``,
            ``refused`` (no connection) or ``garbled`` (what came is not HTTP, or half an answer).
        seconds: that it took.
    """

    answers: tuple[Answer, ...]
    end: str
    seconds: float

    @property
    def status(self) -> int | None:
        """Status of the first answer."""
        return self.answers[0].status if self.answers else None


@dataclass
class Answers:
    """Parses a stream of answers to requests of one method."""

    method: str = "GET"
    found: list[Answer] = field(default_factory=list)
    _parts: list[bytes] = field(default_factory=list)
    _head: h11.Response | None = None
    _http: h11.Connection | None = None

    def feed(self, data: bytes) -> None:
        """Take what was received; ``b""`` is the end of the stream.

        Raises:
            h11.RemoteProtocolError: it is not HTTP.
        """
        if self._http is None:
            if not data:
                return
            self._http = self._expect()
        self._http.receive_data(data)
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Response):
                self._head = event
            elif isinstance(event, h11.Data):
                self._parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._finish()
                return
            elif not isinstance(event, h11.InformationalResponse):
                return

    def _expect(self) -> h11.Connection:
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method=self.method, target="/", headers=[("host", "x")]))
        http.send(h11.EndOfMessage())
        return http

    def _finish(self) -> None:
        assert self._head is not None
        assert self._http is not None
        headers = {
            key.decode().lower(): value.decode("latin-1") for key, value in self._head.headers
        }
        self.found.append(Answer(self._head.status_code, headers, b"".join(self._parts)))
        rest = self._http.trailing_data[0]
        self._http, self._head, self._parts = None, None, []
        if rest:
            self.feed(rest)


async def exchange(
    address: Address,
    pieces: Iterable[bytes],
    *,
    method: str = "GET",
    answers: int = 1,
    linger_s: float = 0.0,
    half_close: bool = False,
    timeout_s: float = HANG_S,
) -> Outcome:
    """Send bytes over a connection of their own and read at the same time.

    Args:
        address: of the server.
        pieces: what is sent, one after the other, until an answer or the end has come.
        method: that is answered; answers to HEAD have no body.
        answers: so many are awaited.
        linger_s: how much longer to look for answers that nobody asked for.
        half_close: whether the sender ends its side behind the last piece.
        timeout_s: without an answer by then the server hangs.
    """
    begun = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError:
        return Outcome((), "refused", time.perf_counter() - begun)
    sending = asyncio.create_task(_send(writer, pieces, half_close))
    stream = Answers(method)
    try:
        async with asyncio.timeout(timeout_s):
            end = await _receive(reader, stream, answers)
    except TimeoutError:
        end = "hung"
    seconds = time.perf_counter() - begun
    if end == "open" and linger_s:
        with suppress(TimeoutError):
            async with asyncio.timeout(linger_s):
                end = await _receive(reader, stream, answers + 1)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.transport.abort()
    return Outcome(tuple(stream.found), end, seconds)


async def _send(writer: asyncio.StreamWriter, pieces: Iterable[bytes], half_close: bool) -> None:
    with suppress(OSError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if half_close:
            writer.write_eof()


async def _receive(reader: asyncio.StreamReader, stream: Answers, wanted: int) -> str:
    """Read until ``wanted`` answers are there; return how it ended."""
    try:
        while len(stream.found) < wanted:
            data = await reader.read(65536)
            stream.feed(data)
            if not data:
                return "closed"
    except OSError:
        return "reset"
    except h11.RemoteProtocolError:
        return "garbled"
    return "open"
