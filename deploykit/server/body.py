"""Bodies of requests, as small as the server allows before and after unpacking."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from deploykit.server.refusal import Refusal

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's wbits
PIECE = 65_536
HEAD = 2  # bytes that tell zlib's header from raw data
MAX_MEMBERS = 1_000  # of a gzip body; an empty member costs 20 bytes and a decompressor


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Read the body of a request, unpacked.

    Memory stays within ``limit`` and a few pieces: what is too large is refused by its header
    where it has one, else at the piece that is too much; what is packed is unpacked as it comes.

    Args:
        headers: of the request, names in lower case.
        receive: gives ASGI's messages ``http.request``.
        limit: bytes, as sent and unpacked.

    Raises:
        Refusal: 413 over the limit, 415 packed in another way than gzip or deflate, 400 damaged.
        ClientGone: it is not whole.
    """
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in {"identity", "", *WINDOWS}:
        raise Refusal(415, f"content-encoding: expected gzip or deflate, got {encoding[:40]!r}")
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit, f"{declared[:20].decode()} bytes")
    unpacker = _Unpacker(encoding, limit) if encoding in WINDOWS else None
    body, received, more = bytearray(), 0, True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        piece = _piece(message)
        received += len(piece)
        if received > limit:
            raise _too_large(limit, "more")
        if unpacker is None:
            body += piece
        else:
            unpacker.feed(piece)
    return bytes(body) if unpacker is None else unpacker.finish()


def _piece(message: Mapping[str, Any]) -> bytes:
    if message["type"] == "http.disconnect":
        raise ClientGone
    piece: bytes = message.get("body", b"")
    return piece


def _too_large(limit: int, found: str) -> Refusal:
    return Refusal(
        413,
        f"body: expected at most {limit} bytes, got {found}; the server's --max-body sets it",
        {"connection": "close"},
    )


class _Unpacker:
    """gzip (of one or several members) or deflate (with zlib's header or raw)."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._encoding, self._limit = encoding, limit
        self._stream = zlib.decompressobj(WINDOWS[encoding])
        self._body, self._head = bytearray(), b""
        self._members, self._started = 1, False

    def feed(self, data: bytes) -> None:
        if not self._started:
            self._head = data = self._head + data
            if len(data) < HEAD:
                return
            self._started = True
            if self._encoding == "deflate" and not _has_zlib_header(data):
                self._stream = zlib.decompressobj(-zlib.MAX_WBITS)  # raw, as some send it
        while data:
            if self._stream.eof:
                data = self._next_member(data)
            self._unpack(data)
            data = self._stream.unconsumed_tail or self._stream.unused_data

    def _next_member(self, data: bytes) -> bytes:
        """A gzip file may consist of several, one after the other (RFC 1952, 2.2)."""
        self._members += 1
        if self._encoding == "deflate" or self._members > MAX_MEMBERS:
            raise _damaged(self._encoding)
        self._stream = zlib.decompressobj(WINDOWS[self._encoding])
        return data

    def finish(self) -> bytes:
        while not self._stream.eof:
            if not self._unpack(b""):  # what zlib held back
                raise _damaged(self._encoding)
        return bytes(self._body)

    def _unpack(self, data: bytes) -> bytes:
        try:
            piece = self._stream.decompress(data, PIECE)
        except zlib.error as error:
            raise _damaged(self._encoding) from error
        self._body += piece
        if len(self._body) > self._limit:
            raise _too_large(self._limit, "more when unpacked")
        return piece


def _has_zlib_header(data: bytes) -> bool:
    """Whether data begin as RFC 1950 says; the test is zlib's own."""
    return data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:HEAD], "big") % 31 == 0


def _damaged(encoding: str) -> Refusal:
    return Refusal(400, f"body: expected whole {encoding} data, got damaged or truncated ones")
