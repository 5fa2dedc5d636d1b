"""Encoded images and how they become pixels: in threads, by the deployed decoder."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.data.table import Encoded, Origin, Table, digest, refuse_rows
from deploykit.errors import DataError

if TYPE_CHECKING:
    from deploykit.recipe.sections import NormalizeSection, ResizeSection

# Pixels of a table up to this size stay in memory; larger tables are decoded when asked for.
KEPT_BYTES = 2 * 1024**3
# Images a thread takes at once: enough to hide the pool's own cost.
_CHUNK = 64
_MOST_THREADS = 16
# EXIF orientations from here on lie on their side.
_FIRST_TURNED = 5


@dataclass(frozen=True, eq=False)
class ImageSamples:
    """Images of one table; every one has been decoded once, so none is broken.

    Attributes:
        encoded: PNG or JPEG bytes of a row, as a client has them.
        preprocess: how bytes become pixels; see ``deploykit.runtime``.
        digests: a digest of each row's pixels.
        pixels: uint8 ``(n, H, W, C)`` where they fit into memory.
        origin: names a row for people.
    """

    encoded: Encoded
    preprocess: Mapping[str, Any]
    digests: tuple[bytes, ...]
    pixels: np.ndarray | None
    origin: Origin

    def load(self, rows: np.ndarray) -> np.ndarray:
        """Return the pixels of ``rows``, uint8 ``(m, H, W, C)``; the caller owns them."""
        if self.pixels is not None:
            kept: np.ndarray = self.pixels[rows]
            return kept
        out = np.empty((len(rows), *pixel_shape(self.preprocess)), dtype=np.uint8)

        def keep(index: int, pixels: np.ndarray) -> None:
            out[index] = pixels

        _decode(self.encoded, self.preprocess, self.origin, rows, keep)
        return out

    def raw(self, row: int) -> bytes:
        """Return the encoded image of a row."""
        return self.encoded(row)


def decode_table(table: Table, preprocess: Mapping[str, Any]) -> ImageSamples:
    """Decode every image of a table once, to prove that it can be.

    Raises:
        DataError: images cannot be decoded; the first is named.
    """
    count, shape = len(table), pixel_shape(preprocess)
    digests = [b""] * count
    fits = count * int(np.prod(shape)) <= KEPT_BYTES
    kept = np.empty((count, *shape), dtype=np.uint8) if fits else None
    encoded = table.content if callable(table.content) else _png_reader(table.content)

    def keep(index: int, pixels: np.ndarray) -> None:
        digests[index] = digest(pixels)
        if kept is not None:
            kept[index] = pixels

    if isinstance(table.content, np.ndarray) and table.content.shape[1:] == shape:
        # Encoding to PNG loses nothing: what decoding would give is what we have.
        kept = table.content
        digests = [digest(pixels) for pixels in kept]
    else:
        _decode(encoded, preprocess, table.origin, np.arange(count), keep)
    return ImageSamples(encoded, preprocess, tuple(digests), kept, table.origin)


def _decode(
    encoded: Encoded,
    preprocess: Mapping[str, Any],
    origin: Origin,
    rows: np.ndarray,
    keep: Callable[[int, np.ndarray], None],
) -> None:
    """Give ``keep`` the place in ``rows`` and the pixels of each image, from many threads."""
    from deploykit.runtime import ImageError, decode_image

    def work(start: int) -> list[tuple[int, str]]:
        failures = []
        for index in range(start, min(start + _CHUNK, len(rows))):
            row = int(rows[index])
            try:
                keep(index, decode_image(encoded(row), preprocess))
            except ImageError as error:
                failures.append((row, str(error)))
            except OSError as error:
                failures.append((row, f"the image cannot be read ({error.strerror or error})"))
        return failures

    pool = ThreadPoolExecutor(max_workers=min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        found = pool.map(work, range(0, len(rows), _CHUNK))
        failures = [failure for chunk in found for failure in chunk]
    finally:  # whoever interrupts does not wait for the images that nobody began
        pool.shutdown(cancel_futures=True)
    if failures:
        refuse_rows(origin, [row for row, _ in failures], failures[0][1])


def pixel_shape(preprocess: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return ``(H, W, C)`` of the decoded images."""
    return preprocess["height"], preprocess["width"], preprocess["channels"]


def make_preprocess(
    table: Table,
    *,
    size: tuple[int, int] | None,
    channels: int | None,
    resize: ResizeSection,
    normalize: NormalizeSection,
) -> dict[str, Any]:
    """Describe how images become pixels; what the recipe leaves open the first image says.

    Raises:
        DataError: the first image is broken, or the parts do not fit each other, such as
            three means and one channel.
    """
    from deploykit.runtime import check_preprocess

    if size is None or channels is None:
        first = first_image_shape(table)
        size, channels = size or first[:2], channels or first[2]
    preprocess = {
        "height": size[0],
        "width": size[1],
        "channels": channels,
        "filter": resize.filter,
        "antialias": resize.antialias,
        "fit": resize.fit,
        "mean": list(normalize.mean),
        "std": list(normalize.std),
        "exif": True,
        "alpha": "white",
    }
    try:
        check_preprocess(preprocess)
    except ValueError as error:
        raise DataError(f"data.resize, data.normalize: {error}") from error
    return preprocess


def first_image_shape(table: Table) -> tuple[int, int, int]:
    """Return ``(H, W, C)`` of the first row, as a person sees it.

    Raises:
        DataError: the image is broken.
    """
    if isinstance(table.content, np.ndarray):
        height, width, channels = table.content.shape[1:]
        return height, width, channels
    from PIL import ExifTags, Image

    # The runtime's own decoder refuses what is broken or too large before Pillow reads on.
    smallest = {"height": 1, "width": 1, "channels": 3, "filter": "nearest"}
    rules = {**smallest, "antialias": True, "fit": "stretch"}
    _decode(table.content, rules, table.origin, np.arange(1), lambda index, pixels: None)
    with Image.open(io.BytesIO(table.content(0)), formats=("PNG", "JPEG")) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= _FIRST_TURNED
        grey = image.mode in {"1", "L", "LA"} or image.mode.startswith("I")
        width, height = image.size
    shape = (width, height) if turned else (height, width)
    return (*shape, 1 if grey else 3)


def _png_reader(pixels: np.ndarray) -> Encoded:
    def encode(row: int) -> bytes:
        from PIL import Image

        picture = pixels[row, :, :, 0] if pixels.shape[-1] == 1 else pixels[row]
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(out, format="PNG")
        return out.getvalue()

    return encode
