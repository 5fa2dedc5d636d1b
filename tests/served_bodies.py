"""Models, and bodies that clients send them."""

import base64
import io
import json
import math
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image
from sample_models import array_model
from tiny_bundle import PREPROCESS, png_bytes

from deploykit.server.engine import ModelInfo
from deploykit.server.samples import is_quick, kind_of_body, read_samples

PIXELS = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4, 1)
TENSOR = {"dtype": "uint8", "shape": [-1, 4, 4, 1]}
IMAGES = ModelInfo("images", "1", "", {"inputs": [TENSOR], "preprocess": PREPROCESS})
ROWS = array_model("rows", "float32", [3])
FREE = array_model("free", "float32", [-1, 2])
PNG = png_bytes(PIXELS)
MAGIC = b"\x89PNG\r\n\x1a\n"


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1)).save(file, "JPEG", **options)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read(
    body: Any, content_type: str = "", info: ModelInfo = IMAGES, deadline: float = math.inf
) -> np.ndarray:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = kind_of_body(body, content_type)
    is_quick(body, kind)
    bounds = {"max_pixels": 1_000_000, "max_batch": 8}
    return read_samples(body, kind, info, **bounds, deadline=deadline)


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    sealed = kind + content
    return struct.pack(">I", len(content)) + sealed + struct.pack(">I", zlib.crc32(sealed))


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def progressive(scans: int) -> bytes:
    """A progressive JPEG file whose last scan comes again and again."""
    *head, last = jpeg(np.zeros((64, 64, 1), np.uint8), progressive=True).split(b"\xff\xda")
    more = b"\xff\xda" + last[:-2]
    return b"\xff\xda".join(head) + more * (scans - len(head) + 1) + b"\xff\xd9"
