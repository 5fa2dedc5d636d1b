"""Bodies of `/predict`: images, arrays, JSON or raw tensors, as samples of a model."""

from __future__ import annotations

import base64
import binascii
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from deploykit import runtime
from deploykit.server.batcher import TOO_LATE
from deploykit.server.engine import ModelInfo
from deploykit.server.image_parts import JPEG_MAGIC, PNG_MAGIC, check_parts
from deploykit.server.refusal import Refusal
from deploykit.server.tensors import checked, kind_of, numbers, parse_json

JSON, RAW = "application/json", "application/octet-stream"
NPY = "application/x-npy"
IMAGES = ("image/png", "image/jpeg")
# What curl sends for a body it was not told about says nothing of it.
UNTOLD = ("", "application/x-www-form-urlencoded")
NPY_MAGIC = b"\x93NUMPY"
SMALL_PIXELS, SMALL_JSON = 65_536, 65_536  # bytes


def kind_of_body(body: bytes, content_type: str) -> str:
    """Tell what a body holds: by its magic, its content type, or its first character.

    Returns:
        ``image``, ``npy``, ``json`` or ``raw``.

    Raises:
        Refusal: 415, a content type that is none of them.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in {JSON, RAW, NPY, *IMAGES, *UNTOLD, "image/jpg", "image/*"}:
        raise Refusal(
            415,
            f"content-type: expected one of {', '.join([*IMAGES, JSON, NPY, RAW])}, "
            f"got {media_type[:60]!r}",
        )
    if media_type == JSON:
        return "json"
    if body.startswith((PNG_MAGIC, JPEG_MAGIC)) or media_type.startswith("image/"):
        return "image"
    if body.startswith(NPY_MAGIC) or media_type == NPY:
        return "npy"
    if media_type == RAW:
        return "raw"
    # A raw tensor may begin with any byte: of a few it also ends as JSON does.
    text = body.strip()
    return "json" if (text[:1] + text[-1:]) in (b"{}", b"[]") else "raw"


def is_quick(body: bytes, kind: str) -> bool:
    """Whether a body is read sooner than handed to a thread; a PNG's header tells its size."""
    if kind == "json":
        return len(body) <= SMALL_JSON and body.count(b'"') <= 2  # more: texts, which are images
    if kind != "image":
        return True
    if not body.startswith(PNG_MAGIC) or len(body) > SMALL_PIXELS:
        return False
    if body[12:16] != b"IHDR" or body.count(b"IHDR") > 1:  # the last one counts
        return False
    width, height = int.from_bytes(body[16:20], "big"), int.from_bytes(body[20:24], "big")
    return width * height <= SMALL_PIXELS


def read_samples(
    body: bytes,
    kind: str,
    info: ModelInfo,
    *,
    max_pixels: int,
    max_batch: int,
    deadline: float = math.inf,
) -> np.ndarray:
    """Read the samples of a body.

    Args:
        body: unpacked.
        kind: what ``kind_of_body`` said.
        info: of the model that is asked.
        max_pixels: of an image.
        max_batch: samples that one request may bring.
        deadline: by ``time.perf_counter``; no image is begun after it.

    Returns:
        ``(N, ...)`` as the model takes them.

    Raises:
        Refusal: 400 with what was expected and what was found, 504 past the deadline.
    """
    if kind == "image":
        return _image(body, info, max_pixels, "body")[np.newaxis]
    if kind == "npy":
        samples = _from_npy(body, info)
    elif kind == "raw":
        samples = _from_raw(body, info)
    else:
        samples = _from_json(parse_json(body), info, max_pixels, max_batch, deadline)
    _check_count(len(samples), max_batch)
    return samples


def _check_count(count: int, max_batch: int) -> None:
    if not 1 <= count <= max_batch:
        raise Refusal(400, f"body: expected 1 to {max_batch} samples, got {count}")


def _image(data: bytes, info: ModelInfo, max_pixels: int, where: str) -> np.ndarray:
    preprocess = info.manifest["preprocess"]
    if preprocess is None:
        raise Refusal(400, f"{where}: expected an array, for {info.name} takes no images")
    check_parts(data, where)
    try:
        return runtime.decode_image(data, preprocess, max_pixels=max_pixels)
    except runtime.ImageError as error:
        hint = "; the server's --max-pixels sets it" if "pixels" in str(error) else ""
        raise Refusal(400, f"{where}: {error}{hint}") from error


def _from_npy(body: bytes, info: ModelInfo) -> np.ndarray:
    spec = info.manifest["inputs"][0]
    dtype = np.dtype(spec["dtype"])
    try:
        array = runtime.parse_npy(body)
        # Pixels are taken as they are: floats from 0 to 1 would turn into black.
        exact = array.dtype == dtype or array.dtype == dtype.newbyteorder()
        if not exact and (dtype.kind != "f" or not np.can_cast(array.dtype, dtype, "same_kind")):
            raise runtime.InputError(f"expected {dtype}, got {array.dtype}")
        batch = _with_batch_axis(array, spec["shape"])
        return checked(runtime.cast_finite(batch, dtype), "body")
    except runtime.InputError as error:
        raise Refusal(400, f"body: {error}") from error


def _from_raw(body: bytes, info: ModelInfo) -> np.ndarray:
    """Read samples that stand back to back, little-endian, row-major."""
    spec = info.manifest["inputs"][0]
    dtype, shape = np.dtype(spec["dtype"]), spec["shape"][1:]
    if -1 in shape:
        raise Refusal(400, f"body: expected .npy or JSON, for the sizes of {info.name} vary")
    sample_bytes = math.prod(shape) * dtype.itemsize
    count, rest = divmod(len(body), sample_bytes)
    if rest or not count:
        raise Refusal(
            400,
            f"body: expected an image, JSON, .npy or samples of {sample_bytes} bytes "
            f"({shape} of {dtype}), got {len(body)} bytes",
        )
    array = np.frombuffer(body, dtype.newbyteorder("<")).reshape(count, *shape)
    return checked(array.astype(dtype, copy=False), "body")


def _from_json(
    value: Any, info: ModelInfo, max_pixels: int, max_batch: int, deadline: float
) -> np.ndarray:
    """Read ``{"inputs": ...}``, ``{"image": ...}`` or ``{"images": [...]}``; or bare numbers."""
    if isinstance(value, list):
        value = {"inputs": value}
    if not isinstance(value, dict) or len(value) != 1:
        raise Refusal(
            400, 'body: expected one of {"inputs": ...}, {"image": ...}, {"images": [...]}'
        )
    ((key, content),) = value.items()
    if key == "image":
        return _image(_from_base64(content, key), info, max_pixels, key)[np.newaxis]
    if key == "images":
        _check_images(content, max_batch)
        return _images(content, info, max_pixels, deadline)
    if key != "inputs":
        raise Refusal(400, f"body: expected inputs, image or images, got {key[:40]!r}")
    spec = info.manifest["inputs"][0]
    array = numbers(content, None, np.dtype(spec["dtype"]), "inputs")
    try:
        return _with_batch_axis(array, spec["shape"])
    except runtime.InputError as error:
        raise Refusal(400, f"inputs: {error}") from error


def _check_images(content: Any, max_batch: int) -> None:
    """Refuse a list that is none, or too long, before anything is decoded."""
    if not isinstance(content, list):
        raise Refusal(400, f"images: expected a list of base64 texts, got {kind_of(content)}")
    _check_count(len(content), max_batch)


def _images(
    content: Sequence[Any], info: ModelInfo, max_pixels: int, deadline: float
) -> np.ndarray:
    decoded = []
    for at, text in enumerate(content):
        if time.perf_counter() > deadline:
            raise Refusal(504, TOO_LATE)
        where = f"images[{at}]"
        decoded.append(_image(_from_base64(text, where), info, max_pixels, where))
    return np.stack(decoded)


def _from_base64(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise Refusal(400, f"{where}: expected base64 text, got {kind_of(text)}")
    text = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{where}: expected base64 text ({error})") from error


def _with_batch_axis(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return a batch: of the one sample that the array is, or the array.

    Raises:
        InputError: it is neither a sample nor a batch of them.
    """
    batch = array[np.newaxis] if array.ndim == len(shape) - 1 else array
    fits = batch.ndim == len(shape) and all(
        size == found if size != -1 else found > 0
        for size, found in zip(shape[1:], batch.shape[1:], strict=True)
    )
    if not fits:
        raise runtime.InputError(
            f"expected a sample of shape {list(shape[1:])} or a batch of them, "
            f"got {list(array.shape)}"
        )
    return batch
