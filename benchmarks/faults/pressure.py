"""Bodies far over the limit, and clients that take their time."""

from __future__ import annotations

import asyncio
import gzip
import math
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from server_run import Server
from wire import Address, Outcome, exchange

LARGE = 100_000_000
PIECE = 65_536
DRIP_S = 0.5
KINDS = ("head", "body", "read")
SLOW_LIMIT_S = 20.0
READ = 6  # answers that a slow reader asks for, 30 kB each
ROUTES = (
    ("raw samples", "/predict", "content-type: application/octet-stream", b"\x00"),
    ("JSON", "/predict", "content-type: application/json", b"["),
    (".npy", "/predict", "content-type: application/x-npy", b"\x93NUMPY\x01\x00"),
    ("PNG", "/predict", "content-type: image/png", b"\x89PNG\r\n\x1a\n"),
    (
        "protocol",
        "/v2/models/{name}/infer",
        "content-type: application/json",
        b'{"inputs":[{"data":[',
    ),
    ("binary tensor", "/v2/models/{name}/infer", "inference-header-content-length: 100", b"{"),
)


@dataclass(frozen=True)
class Large:
    """What came of one large body."""

    name: str
    outcome: Outcome
    growth_bytes: int


async def send_large(server: Server, name: str) -> list[Large]:
    """Send bodies of 100 MB to every route of the model ``name``, in three ways each."""
    found = []
    for form, path, header, start in ROUTES:
        head = f"POST {path.format(name=name)} HTTP/1.1\r\nhost: localhost\r\n{header}\r\n"
        for way, pieces in _ways(head.encode(), start):
            before = _reset_peak(server)
            outcome = await exchange(server.address, pieces)
            found.append(Large(f"{form}, {way}", outcome, _peak(server) - before))
    return found


def _ways(head: bytes, start: bytes) -> Iterator[tuple[str, Iterator[bytes]]]:
    yield "told by content-length", _declared(head, start)
    yield "in chunks", _chunked(head, start)
    yield "in a gzip", iter([_packed(head, start)])


def _declared(head: bytes, start: bytes) -> Iterator[bytes]:
    yield head + f"content-length: {LARGE}\r\n\r\n".encode() + start
    for _ in range(LARGE // PIECE):
        yield b" " * PIECE
    yield b" " * (LARGE % PIECE - len(start))


def _chunked(head: bytes, start: bytes) -> Iterator[bytes]:
    yield head + b"transfer-encoding: chunked\r\n\r\n"
    yield b"%x\r\n%s\r\n" % (len(start), start)
    for _ in range(LARGE // PIECE):
        yield b"%x\r\n%s\r\n" % (PIECE, b" " * PIECE)
    yield b"0\r\n\r\n"


def _packed(head: bytes, start: bytes) -> bytes:
    body = gzip.compress(start + b" " * LARGE)
    return head + f"content-encoding: gzip\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _reset_peak(server: Server) -> int:
    """Begin the kernel's peaks anew, and return the memory that the processes hold, in bytes."""
    for process in server.tree():
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return _sum_of(server, "VmRSS")


def _peak(server: Server) -> int:
    return _sum_of(server, "VmHWM")


def _sum_of(server: Server, key: str) -> int:
    """Return the sum of one line of /proc/PID/status over a server's processes, in bytes."""
    total = 0
    for process in server.tree():
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
        total += 1024 * sum(map(int, values))
    return total


async def meet_slow_clients(server: Server, name: str, count: int) -> list[float]:
    """Let so many slow clients loose, a third of each kind, over two seconds.

    Returns:
        After how many seconds each was closed.
    """
    held: set[int] = set()
    watching = asyncio.create_task(_watch(server.address[1], held))

    async def meet(number: int) -> float:
        await asyncio.sleep(2 * number / count)
        return await _slow_client(server.address, KINDS[number % len(KINDS)], name, held)

    try:
        return await asyncio.gather(*map(meet, range(count)))
    finally:
        watching.cancel()


async def _watch(port: int, held: set[int]) -> None:
    """Keep the ports of the clients whose connections the server has not closed.

    The kernel is asked: what is closed while the client does not read, the client cannot see.
    """
    established = re.compile(rb":%04X [0-9A-F]{8}:([0-9A-F]{4}) 01 " % port)
    while True:
        table = await asyncio.to_thread(Path("/proc/net/tcp").read_bytes)
        found = {int(one, 16) for one in established.findall(table)}
        held.intersection_update(found)
        held.update(found)
        await asyncio.sleep(DRIP_S / 2)


async def _slow_client(address: Address, kind: str, name: str, held: set[int]) -> float:
    """Send a byte (or read one) every half second, until the server has closed."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        if kind == "read":  # small segments: the server's kernel then buffers little of the answers
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        await loop.sock_connect(client, address)
        begun = time.perf_counter()
        await loop.sock_sendall(client, _start_of(kind, name))
        while (seconds := time.perf_counter() - begun) < SLOW_LIMIT_S:
            if seconds > 2 * DRIP_S and client.getsockname()[1] not in held:
                return seconds
            with suppress(OSError):
                client.recv(1) if kind == "read" else client.send(b"a")
            await asyncio.sleep(DRIP_S)
    return math.inf


def _start_of(kind: str, name: str) -> bytes:
    """Return what a slow client sends at once."""
    if kind == "head":
        return b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-slow: "
    if kind == "body":
        path = f"POST /v2/models/{name}/infer HTTP/1.1\r\n"
        return path.encode() + b"host: localhost\r\ncontent-length: 3000\r\n\r\n"
    return b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * READ
