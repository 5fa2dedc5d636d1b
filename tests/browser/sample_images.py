"""Image files of every kind that a client may have, small ones."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 37, 23
ADAM7 = [
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
]
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # a pixel, by colour type


def photo(channels: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Pixels with slopes, edges and noise, uint8 (H, W, C)."""
    random = np.random.default_rng(channels)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / (3 + c) + c) * np.cos(y / (4 - c / 2)) for c in range(channels)]
    pixels = np.stack(waves, axis=-1) + random.normal(0, 12, (height, width, channels))
    pixels[5:9, 20:30] = 255 * (np.arange(channels) % 2)
    return np.clip(pixels, 0, 255).astype(np.uint8)


# PNG


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed(samples: np.ndarray, depth: int) -> list[bytes]:
    """Pack each row of (H, W * samples) integers."""
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in samples]
    if depth == 8:
        return [row.astype(np.uint8).tobytes() for row in samples]
    bits = (samples[..., np.newaxis] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]


def filtered(rows: Sequence[bytes], distance: int) -> bytes:
    """Filter the rows of a pass by each of the five kinds in turn."""
    above = bytes(len(rows[0]) if rows else 0)
    out = bytearray()
    for number, row in enumerate(rows):
        kind = (number + 4) % 5  # the first row by Paeth, too
        out.append(kind)
        for i, value in enumerate(row):
            left = row[i - distance] if i >= distance else 0
            corner = above[i - distance] if i >= distance else 0
            guess = {0: 0, 1: left, 2: above[i], 3: (left + above[i]) // 2}.get(kind)
            if guess is None:
                guess = min(
                    (left, above[i], corner), key=lambda one: abs(left + above[i] - corner - one)
                )
            out.append((value - guess) % 256)
        above = row
    return bytes(out)


def png(
    samples: np.ndarray, type: int, depth: int, *, interlaced: bool = False, **chunks: bytes
) -> bytes:
    """Encode (H, W, samples) integers as they are."""
    height, width = samples.shape[:2]
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    distance = max(SAMPLES[type] * depth // 8, 1)
    data = b""
    for left, top, step_x, step_y in passes:
        part = samples[top::step_y, left::step_x]
        if part.size:
            data += filtered(packed(part.reshape(len(part), -1).astype(np.int64), depth), distance)
    head = struct.pack(">IIBBBBB", width, height, depth, type, 0, 0, int(interlaced))
    body = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    half = zlib.compress(data)
    cut = len(half) // 2  # pixels may lie in several chunks
    return b"".join(
        [
            *(b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), body),
            *(chunk(b"IDAT", half[:cut]), chunk(b"IDAT", half[cut:]), chunk(b"IEND", b"")),
        ]
    )


def deep(channels: int) -> np.ndarray:
    """Samples of 16 bits whose low bytes matter if they are rounded."""
    return photo(channels).astype(np.int64) * 256 + np.random.default_rng(9).integers(
        0, 256, (HEIGHT, WIDTH, channels)
    )


def pngs() -> dict[str, bytes]:
    """PNG files by what is in them."""
    palette = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8).tobytes()
    faded = bytes(range(256))
    found = {}
    for depth in (1, 2, 4, 8):
        few = photo(1) >> (8 - depth)
        colours, alphas = palette[: 3 * 2**depth], faded[:: 256 >> depth][: 2**depth]
        found[f"grey of {depth} bits"] = png(few, 0, depth)
        found[f"grey of {depth} bits, interlaced"] = png(few, 0, depth, interlaced=True)
        found[f"palette of {depth} bits"] = png(few, 3, depth, PLTE=colours)
        found[f"palette of {depth} bits, transparent"] = png(
            few, 3, depth, PLTE=colours, tRNS=alphas
        )
        one = struct.pack(">H", int(np.median(few)))
        found[f"grey of {depth} bits, one transparent"] = png(few, 0, depth, tRNS=one)
    found["palette with one clear colour"] = png(
        photo(1), 3, 8, PLTE=palette, tRNS=b"\xff" * 9 + b"\0"
    )
    names = {0: "grey", 2: "colour", 4: "grey with alpha", 6: "colour with alpha"}
    for type, name in names.items():
        count = SAMPLES[type]
        found[f"{name}, 8 bits"] = png(photo(count), type, 8)
        found[f"{name}, 8 bits, interlaced"] = png(photo(count), type, 8, interlaced=True)
        found[f"{name}, 16 bits"] = png(deep(count), type, 16)
        found[f"{name}, 16 bits, interlaced"] = png(deep(count), type, 16, interlaced=True)
    edge = photo(3)[6, 25].astype(int).tolist()
    found["colour, one transparent"] = png(photo(3), 2, 8, tRNS=struct.pack(">HHH", *edge))
    found["colour of 16 bits, one transparent"] = png(
        deep(3), 2, 16, tRNS=struct.pack(">HHH", *edge)
    )
    level = int(deep(1)[6, 25, 0])
    found["grey of 16 bits, one transparent"] = png(deep(1), 0, 16, tRNS=struct.pack(">H", level))
    found["colour with a gamma"] = png(photo(3), 2, 8, gAMA=struct.pack(">I", 100_000))
    found["colour with a profile"] = saved(photo(3), "PNG", icc_profile=profile())
    found["one pixel"] = png(photo(3)[:1, :1], 2, 8)
    found["one row"] = png(photo(3)[:1], 2, 8, interlaced=True)
    for turn in range(1, 9):
        found[f"orientation {turn}"] = saved(photo(4), "PNG", exif=exif(turn))
    block = exif(6).tobytes()
    hexadecimal = b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
    keyword = b"Raw profile type exif\0"
    found["orientation in ImageMagick's text"] = png(photo(3), 2, 8, tEXt=keyword + hexadecimal)
    packed_text = keyword + b"\0" + zlib.compress(hexadecimal)
    found["orientation in ImageMagick's packed text"] = png(photo(3), 2, 8, zTXt=packed_text)
    bare = block.removeprefix(b"Exif\0\0")
    found["orientation behind JPEG's mark"] = png(photo(3), 2, 8, eXIf=b"Exif\0\0" + bare)
    long = b"MM\0\x2a" + struct.pack(">IHHHIII", 8, 1, 0x0112, 4, 1, 6, 0)
    found["orientation as a long number"] = png(photo(3), 2, 8, eXIf=long)
    return found


def other_palette() -> bytes:
    """A PNG whose palette changed on the way."""
    data = bytearray(png(photo(1), 3, 8, PLTE=bytes(range(256)) * 3))
    data[data.index(b"PLTE") + 4] ^= 1
    return bytes(data)


def interlaced_otherwise() -> bytes:
    """A PNG that names a way to interlace which nobody knows."""
    data = png(photo(3), 2, 8)
    head = data[16:28] + b"\2"
    return data[:8] + chunk(b"IHDR", head) + data[33:]


# JPEG


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x010F] = "a maker"
    found[0x0112] = orientation
    return found


def profile() -> bytes:
    """A profile that is not sRGB: a browser that obeyed it would change colours."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def saved(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    modes = {1: "L", 3: "RGB", 4: options.pop("mode", "RGBA")}
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.frombytes(
        modes[pixels.shape[-1]], (pixels.shape[1], pixels.shape[0]), squeezed.tobytes()
    ).save(file, kind, **options)
    return file.getvalue()


def jpegs() -> dict[str, bytes]:
    """JPEG files by what is in them."""
    found = {
        "JPEG, grey": saved(photo(1), "JPEG"),
        "JPEG, CMYK": saved(photo(4), "JPEG", mode="CMYK"),
    }
    for chroma in ("4:4:4", "4:2:2", "4:2:0"):
        for quality in (30, 75, 98):
            found[f"JPEG {chroma}, quality {quality}"] = saved(
                photo(3), "JPEG", subsampling=chroma, quality=quality
            )
    found["JPEG, progressive"] = saved(photo(3), "JPEG", progressive=True)
    found["JPEG, larger"] = saved(photo(3, 301, 199), "JPEG", progressive=True, quality=60)
    found["JPEG, red green blue"] = saved(photo(3), "JPEG", keep_rgb=True)
    found["JPEG with a profile"] = saved(photo(3), "JPEG", icc_profile=profile())
    for turn in range(1, 9):
        found[f"JPEG, orientation {turn}"] = saved(photo(3), "JPEG", exif=exif(turn))
    return found
