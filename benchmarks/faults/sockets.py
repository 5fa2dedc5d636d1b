"""Bad requests below HTTP's meaning: heads, lengths, chunks, pipelines and cut connections."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from calls import Call

from faults.verdicts import UNREADABLE, Case

# Behind an odd head that a server may as well understand, its path answers.
ODD = UNREADABLE | {200}
CRLF = b"\r\n"
END = b"\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
SMUGGLED = b"GET /v2 HTTP/1.1\r\nhost: smuggled\r\n\r\n"

CORPUS = Path(__file__).with_name("corpus")
REPEATED = re.compile(rb"<([^<>]+)\*(\d+)>")


def listed(name: str) -> list[bytes]:
    """Return the entries of a file of the corpus, one a line.

    Bytes that are not printed are written as in Python, and ``<ab*3>`` is ``ababab``.
    """
    lines = (CORPUS / f"{name}.txt").read_text().splitlines()
    return [
        REPEATED.sub(lambda found: found[1] * int(found[2]), _unescaped(line)) for line in lines
    ]


def _unescaped(line: str) -> bytes:
    return line.encode("ascii").decode("unicode_escape").encode("latin-1")


def wire_cases(calls: list[Call], count: int, seed: int) -> Iterator[Case]:
    """Yield every listed fault, and ``count`` random ones."""
    drawn = random.Random(seed)
    yield from _heads(drawn)
    yield from _large_heads()
    yield from _lengths()
    yield from _chunks()
    yield from _smuggled()
    yield from _pipelines()
    yield from _cut(calls)
    yield from _scrambled(calls, count, drawn)


def slow_cases(calls: list[Call]) -> Iterator[Case]:
    """Yield requests that never come to their end, with the connection left open."""
    for call in calls:
        data = call.wire()
        for at in (0, 1, 10, data.index(END), data.index(END) + 4, len(data) - 1):
            yield _broken("never ends", data[:at])
    yield _broken("never ends", GET + b"transfer-encoding: chunked\r\n\r\n5\r\nab")
    yield _broken("never ends", GET + b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n")
    yield _broken("never ends", b"\r\n" * 3)
    yield _broken("never ends", GET + b"content-length: 5\r\nexpect: 100-continue\r\n\r\n")


def _broken(kind: str, data: bytes, *, half_close: bool = False, linger_s: float = 0.0) -> Case:
    """Return a case that the server may close without a word."""
    return Case(kind, (data,), ODD, whole=False, half_close=half_close, linger_s=linger_s)


def _heads(drawn: random.Random) -> Iterator[Case]:
    for line in listed("request_lines"):
        yield _broken("request line", line + b"\r\nhost: x\r\n\r\n", half_close=True)
    for header in listed("headers"):
        yield _broken("header", GET + header + END, half_close=True)
        yield _broken("header", b"POST /predict HTTP/1.1\r\n" + header + END, half_close=True)
    yield _broken("header", b"GET /healthz HTTP/1.1\r\n\r\n")
    yield _broken("header", GET.replace(CRLF, b"\n") + b"\n")
    yield _broken("header", b"\r\n\r\n" + GET + CRLF)
    yield _broken(
        "another protocol", bytes.fromhex("16030100c4010000c00303") + drawn.randbytes(200)
    )
    yield _broken(
        "another protocol", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), half_close=True
    )
    yield _broken("another protocol", b"SSH-2.0-OpenSSH_9.9\r\n", half_close=True)
    for _ in range(50):
        noise = drawn.randbytes(drawn.randint(1, 2000))
        yield _broken("another protocol", noise, half_close=True)


def _large_heads() -> Iterator[Case]:
    for size in (9_000, 20_000, 70_000, 300_000, 2_000_000):
        yield _broken("large head", b"GET /" + b"a" * size + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        yield _broken(
            "large head", b"GET /healthz?" + b"a" * size + b" HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        yield _broken("large head", GET + b"x: " + b"a" * size + END)
        yield _broken("large head", GET + b"a" * size + b": x" + END)
        yield _broken("large head", GET + b"x: y\r\n" * (size // 6) + CRLF)
        yield _broken("large head", b"A" * size + b" / HTTP/1.1\r\nhost: x\r\n\r\n")


def _lengths() -> Iterator[Case]:
    post = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: "
    for length in listed("lengths"):
        yield _broken("content-length", post + length + END + b"abcde", half_close=True)
    for pair in ((b"5", b"6"), (b"5", b"5"), (b"5", b"-5"), (b"", b"5")):
        both = post + pair[0] + b"\r\ncontent-length: " + pair[1] + END
        yield _broken("content-length", both + b"abcde", half_close=True)
    for coding in listed("transfer_codings"):
        head = b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: " + coding + END
        yield _broken("transfer-encoding", head + b"2\r\nab\r\n0\r\n\r\n", half_close=True)
    old = b"POST /predict HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    yield _broken("transfer-encoding", old, half_close=True)


def _chunks() -> Iterator[Case]:
    for path in (b"/predict", b"/v2/repository/index", b"/healthz"):
        head = b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        for chunks in listed("chunks"):
            yield _broken("chunks", head + chunks, half_close=True)


def _smuggled() -> Iterator[Case]:
    """Two lengths, and behind the one a request of its own: it must never be answered."""
    chunked = b"0\r\n\r\n" + SMUGGLED
    for first, second in (
        (f"content-length: {len(chunked)}", "transfer-encoding: chunked"),
        ("transfer-encoding: chunked", f"content-length: {len(chunked)}"),
        (f"content-length: {len(chunked)}", "transfer-encoding : chunked"),
        (f"content-length: {len(chunked)}", "transfer-encoding: xchunked"),
        (f"content-length: {len(chunked)}", "transfer-encoding: chunked, identity"),
        (f"content-length: {len(chunked)}", "x: y\r\n transfer-encoding: chunked"),
        (f"content-length: {len(chunked)}", "x: y\rtransfer-encoding: chunked"),
        ("content-length: 0", f"content-length: {len(chunked)}"),
        (f"content-length: {len(chunked)}", "content-length: 0"),
    ):
        head = f"POST /predict HTTP/1.1\r\nhost: x\r\n{first}\r\n{second}\r\n\r\n".encode()
        yield _broken("smuggling", head + chunked, linger_s=0.3)


def _pipelines() -> Iterator[Case]:
    """Refusals in a row, on one connection: each has its answer, in order."""
    for count in (2, 5, 50):
        data = b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n" * count
        yield Case("pipeline", (data,), frozenset({404}), answers=count, method="GET")
        data = b"PUT /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n" * count
        yield Case("pipeline", (data,), frozenset({405}), answers=count, method="PUT")
    flood = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 5000
    yield replace(_broken("pipeline", flood), answers=5000)


def _cut(calls: list[Call]) -> Iterator[Case]:
    """Good requests of which the end is missing."""
    for call in calls:
        data = call.wire()
        for at in range(1, len(data), max(1, len(data) // 40)):
            yield _broken("cut off", data[:at], half_close=True)


def _scrambled(calls: list[Call], count: int, drawn: random.Random) -> Iterator[Case]:
    """Good requests with a few bytes changed anywhere."""
    for _ in range(count):
        call = drawn.choice(calls)
        data = scrambled(call.wire(), drawn, within=call.wire().index(END) + 60)
        yield _broken("scrambled request", data, half_close=True)


def scrambled(data: bytes, drawn: random.Random, within: int | None = None) -> bytes:
    """Change, drop, double or insert bytes at a few places of the first ``within``."""
    changed = bytearray(data)
    for _ in range(drawn.choice((1, 1, 2, 4, 16))):
        limit = min(len(changed), within or len(changed))
        at, size = drawn.randrange(limit + 1), drawn.choice((1, 1, 2, 8))
        how = drawn.randrange(5)
        if how == 0:
            changed[at : at + size] = drawn.randbytes(size)
        elif how == 1:
            del changed[at : at + size]
        elif how == 2:
            changed[at:at] = drawn.randbytes(size)
        elif how == 3:
            changed[at:at] = changed[at : at + 16 * size]
        else:
            changed[at : at + 1] = bytes([drawn.choice(b'\x00\xff\r\n :{}[]",-019')])
    return bytes(changed)
