"""A server with a planted fault: what counts faults must see every one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from wire import Address

from faults.verdicts import FAULTS, Case, Tally, send_all

ERROR = b'{"error": "planted"}'
GOOD = b"good"


def _answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d -\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


PLANTED = {
    "undocumented": _answer(418, ERROR),
    "5xx": _answer(500, ERROR),
    "hung": None,
    "unanswered": b"",
    "split": _answer(400, ERROR) * 2,
    "formless": _answer(400, b"Bad Request"),
    "other answer": _answer(200, b"another"),
}


@asynccontextmanager
async def planted(fault: str) -> AsyncIterator[Address]:
    """Run a server that commits one fault, whatever it is asked."""
    answer = PLANTED[fault]

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2]
    finally:
        server.close()


async def seen_faults() -> list[str]:
    """Return the faults that are counted when they are there, and only the one that is."""
    seen = []
    for fault in FAULTS:
        tally = Tally()
        good = GOOD if fault == "other answer" else None
        request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
        case = Case("planted", (request,), frozenset({200, 400}), good=good, linger_s=0.05)
        async with planted(fault) as address:
            await send_all(address, [case] * 3, tally, timeout_s=0.3)
        if dict(tally.faults) == {fault: 3}:
            seen.append(fault)
    return seen
