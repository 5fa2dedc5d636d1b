"""Files that no server may take at their word: .npy, PNG and JPEG with lies in them, and bombs."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from served_models import Served, png

from deploykit.bundle_files import npy_bytes

MIB = 2**20


def broken_npys(served: Served) -> Iterator[bytes]:
    """Yield .npy files whose header lies, or that hold what no model takes."""
    one = served.samples[0]
    good, shape = npy_bytes(one), tuple(one.shape)
    for descr in (
        "|O",
        "<U5",
        "|S9",
        "<c16",
        "<M8[s]",
        "|V8",
        ">f8",
        "<f16",
        "|b1",
        "<i8",
        "x",
        "<f4,<f4",
    ):
        yield _npy({"descr": descr, "fortran_order": False, "shape": shape}, one.tobytes())
    for wrong in (
        (-1,),
        (2**62, 2**62),
        (2**63,),
        (0,),
        (),
        (1.5,),
        (True, 3),
        ("a",),
        [1],
        5,
        None,
        (10**30,),
    ):
        yield _npy({"descr": one.dtype.str, "fortran_order": False, "shape": wrong}, one.tobytes())
    nested = [("a", "<f4"), ("b", "|O")]
    for header in (
        *(
            {"descr": nested, "fortran_order": False, "shape": (3,)},
            {"shape": shape},
            {},
            [],
            None,
            5,
            "x",
        ),
        {"descr": one.dtype.str, "fortran_order": 5, "shape": shape},
        {"descr": one.dtype.str, "fortran_order": False, "shape": shape, "more": 1},
    ):
        yield _npy(header, one.tobytes())
    for text in (
        "__import__('os').getpid()",
        "(" * 3000,
        "{" * 3000,
        "9" * 9000,
        "\x00",
        "é",
        "{'descr': 1 if 1 else 2}",
    ):
        yield _npy_of(text.encode("latin-1"), b"")
    for cut in (5, 6, 7, 8, 9, 10, 20, 60, 100, len(good) - 1):
        yield good[:cut]
    yield good + b"x"
    yield good[:6] + b"\x03\x00" + good[8:]
    yield good[:6] + b"\x63\x63" + good[8:]
    yield b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + good[10:]
    yield b"\x93NUMPY\x01\x00" + struct.pack("<H", 2**16 - 1) + good[10:]
    yield npy_bytes(np.full(shape, np.nan, np.float32))
    yield npy_bytes(np.full(shape, np.inf, np.float64))
    yield npy_bytes(np.full(shape, 1e300, np.float64))


def _npy(header: Any, data: bytes) -> bytes:
    return _npy_of(repr(header).encode(), data)


def _npy_of(header: bytes, data: bytes) -> bytes:
    padded = header + b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + data


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(
    width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 0, more: bytes = b""
) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", head)
        + more
        + _chunk(b"IDAT", data)
        + _chunk(b"IEND", b"")
    )


def broken_pngs() -> Iterator[bytes]:
    """Yield PNG files that are bombs, cut off or damaged."""
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    good, packed = png(pixels), zlib.compress(bytes(33 * 32))
    for width, height in (
        *((0, 0), (0, 5), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (65_535, 65_535), (1, 2**31 - 1)),
        *((4001, 4000), (30_000, 30_000), (16_000_001, 1)),
    ):
        yield _png(width, height, packed)
    yield _png(20_000, 20_000, zlib.compress(bytes(2501 * 20_000), 9), depth=1)  # a true bomb
    for depth, colour in ((3, 0), (16, 3), (8, 1), (8, 5), (0, 0), (255, 255), (8, 3), (1, 2)):
        yield _png(32, 32, packed, depth=depth, colour=colour)
    long = zlib.compress(bytes(32 * MIB))
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        text = b"a\x00\x00" + (b"" if kind != b"iTXt" else b"\x01\x00\x00\x00") + long
        yield _png(32, 32, packed, more=_chunk(kind, text) * 4)
    yield _png(32, 32, packed, more=_chunk(b"acTL", struct.pack(">II", 2**31, 0)))
    yield _png(32, 32, packed, more=_chunk(b"tRNS", b"\x00")) + b"x" * 100
    yield _png(32, 32, packed, more=_chunk(b"eXIf", b"MM\x00*" + b"\xff" * 60))
    yield _png(32, 32, packed, more=_chunk(b"IHDR", bytes(13)))
    yield _png(32, 32, b"", more=b"")
    yield _png(32, 32, zlib.compress(b"short"))
    yield _png(32, 32, b"\x00" * 50)
    for cut in range(1, len(good), len(good) // 40):
        yield good[:cut]
    for at in range(8, 60):
        yield good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]


def broken_jpegs() -> Iterator[bytes]:
    """Yield JPEG files that are bombs, cut off or damaged."""
    file = io.BytesIO()
    noise = np.random.default_rng(4).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", progressive=True)
    good = file.getvalue()
    frame = good.index(b"\xff\xc2") + 5
    for height, width in ((65_535, 65_535), (0, 32), (32, 0), (65_535, 1), (4_001, 4_000)):
        yield good[:frame] + struct.pack(">HH", height, width) + good[frame + 4 :]
    for cut in range(2, len(good), len(good) // 40):
        yield good[:cut]
    for at in range(2, len(good), len(good) // 60):
        yield good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :]
    yield good[:2] + b"\xff\xe1\xff\xff" + good[2:]
    yield (
        good[:2]
        + b"\xff\xe1\x00\x20Exif\x00\x00"
        + b"MM\x00*\x00\x00\x00\x08"
        + b"\xff" * 16
        + good[2:]
    )
    yield good[:2] + b"\xff\xfe\x00\x00" * 1000
    yield b"\xff\xd8" + b"\xff\xda\x00\x02" * 5000
