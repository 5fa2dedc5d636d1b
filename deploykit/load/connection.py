"""One HTTP/1.1 connection that asks one question at a time, in as few steps as asyncio allows.

The load shares the cores with the server that it measures, so a request is bytes that were made
once, and of an answer nothing is read but its status, its length and whether the connection stays.
"""

import asyncio
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from deploykit.address import Address

MAX_HEAD_BYTES = 64 * 2**10
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5]\d\d)[ \r]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r", re.IGNORECASE)
_LAST = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What is asked, again and again; ``path`` is below the server's URL, with its query."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def encode(self, address: Address) -> bytes:
        """Return the bytes on the wire.

        Raises:
            ValueError: a line break stands where it would begin another header.
        """
        fields = {"Host": address.authority, "Content-Length": str(len(self.body)), **self.headers}
        lines = [
            f"{self.method} {address.base}{self.path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in fields.items()),
        ]
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("request: expected no line break in its path or headers")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


class Answer(NamedTuple):
    """An answer, and when the last byte of it came, on the clock of ``time.perf_counter``."""

    status: int
    body: bytes
    at: float


class BrokenAnswer(ConnectionError):
    """What came is no answer that this client can read, or none came."""


class Connection(asyncio.Protocol):
    """A connection; ``usable`` while it is open and nothing is asked of it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._buffer = bytearray()

    @property
    def usable(self) -> bool:
        """Whether a request can be sent now."""
        return self._transport is not None and self._waiting is None

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer.

        Raises:
            BrokenAnswer: no answer, or an unreadable one; the connection is closed.
        """
        if self._transport is None or self._waiting is not None:
            raise BrokenAnswer("closed while idle" if self._transport is None else "still busy")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiting
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection over; called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer; called by the event loop."""
        self._buffer += data
        try:
            answer = self._read()
        except BrokenAnswer as broken:
            self._fail(broken)
        else:
            if answer is not None:
                self._succeed(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection is gone; called by the event loop."""
        self._fail(BrokenAnswer("connection reset" if exc else "connection closed"))

    def _read(self) -> Answer | None:
        """Return the answer that the buffer holds, or None while a part of it is missing."""
        if self._waiting is None:
            raise BrokenAnswer("bytes that nobody asked for")
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BrokenAnswer(f"no end of headers in {MAX_HEAD_BYTES} bytes")
            return None
        head = bytes(self._buffer[: end + 2])
        status, length = _STATUS.match(head), _LENGTH.search(head)
        if status is None or length is None:
            raise BrokenAnswer("no Content-Length" if status else "not HTTP/1.1")
        begin = end + 4
        surplus = len(self._buffer) - begin - int(length[1])
        if surplus < 0:
            return None
        if surplus > 0:
            raise BrokenAnswer("more bytes than Content-Length says")
        answer = Answer(int(status[1]), bytes(self._buffer[begin:]), time.perf_counter())
        if _LAST.search(head):
            self.close()
        return answer

    def _succeed(self, answer: Answer) -> None:
        self._buffer.clear()
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _fail(self, broken: BrokenAnswer) -> None:
        self.close()
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(broken)


async def connect(address: Address, context: ssl.SSLContext | None) -> Connection:
    """Open a connection.

    Args:
        address: of the server.
        context: of TLS, where the address demands it.

    Raises:
        OSError: nobody listens there, or another reason of the system's.
    """
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        Connection, address.host, address.port, ssl=context
    )
    return connection
