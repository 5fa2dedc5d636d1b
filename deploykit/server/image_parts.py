"""Image files that would take far longer to decode than their pixels do, known by their parts.

Each scan of a progressive JPEG file is a pass over all pixels, for as little as 31 bytes; and each
segment or chunk costs Pillow some microseconds. Encoders write about ten scans, and parts of
thousands of bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from deploykit.server.refusal import Refusal

MAX_SCANS, MAX_PARTS = 100, 10_000
# What ends a scan: FF00 is a byte of its data, FF01 and FFD0 to FFD7 stand alone inside it.
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
START_OF_SCAN, END_OF_IMAGE = b"\xda", b"\xd9"
PNG_MAGIC, JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def check_parts(data: bytes, where: str) -> None:
    """Refuse a PNG or JPEG file of too many parts; whether it is whole, its decoder tells.

    Args:
        data: of the file.
        where: it stands, for the message.

    Raises:
        Refusal: 400.
    """
    if data.startswith(JPEG_MAGIC):
        markers = _markers(data)
    elif data.startswith(PNG_MAGIC):
        markers = _chunks(data)
    else:
        return
    scans = 0
    for count, marker in enumerate(markers, 1):
        scans += marker == START_OF_SCAN
        if scans > MAX_SCANS or count > MAX_PARTS:
            raise Refusal(
                400,
                f"{where}: expected an image file of at most {MAX_SCANS} scans and {MAX_PARTS} "
                "segments or chunks, got more; write it anew",
            )


def _markers(data: bytes) -> Iterator[bytes]:
    """Give the markers of a JPEG file as its decoder meets them."""
    at = 2
    while found := MARKER.search(data, at):
        yield found[1]
        if found[1] == END_OF_IMAGE:
            return
        length = data[found.end() : found.end() + 2]
        at = found.end() + int.from_bytes(length, "big")


def _chunks(data: bytes) -> Iterator[bytes]:
    """Give the types of the chunks of a PNG file."""
    at = len(PNG_MAGIC)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind
        at += length + 12
