"""Arrays as samples: pixels that are decoded already, and features."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from deploykit.data.table import Origin, Table, digest, refuse_rows, rows_of
from deploykit.errors import DataError

_IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True, eq=False)
class ArraySamples:
    """Features of one table, float32 ``(n, ...)``, all finite."""

    values: np.ndarray
    digests: tuple[bytes, ...]
    origin: Origin

    def load(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of ``rows``, float32 ``(m, ...)``; the caller owns them."""
        values: np.ndarray = self.values[rows]
        return values

    def raw(self, row: int) -> bytes:
        """Return one sample as the bytes of a .npy file."""
        out = io.BytesIO()
        np.save(out, self.values[row], allow_pickle=False)
        return out.getvalue()


def make_table(name: str, x: object, y: object, classes: tuple[str, ...] | None = None) -> Table:
    """Check arrays and make them a table.

    Args:
        name: where they come from, for messages.
        x: pixels, uint8 ``(n, H, W)`` or ``(n, H, W, C)`` with 1 or 3 channels; or
            features, any real numbers ``(n, ...)``.
        y: class numbers, any integers ``(n,)``; or class names, strings ``(n,)``.
        classes: class names in label order, where they are known.

    Raises:
        DataError: counts differ, or a dtype or shape is not one of these, or a feature
            is not finite.
    """
    content, labels = as_array(name, "x", x), as_array(name, "y", y)
    if content.ndim < 1 or labels.ndim != 1:
        raise DataError(
            f"{name}: expected x of shape (n, ...) and y of shape (n,), "
            f"got {content.shape} and {labels.shape}"
        )
    if len(content) != len(labels):
        raise DataError(
            f"{name}: expected a label for each sample, "
            f"got {len(content)} samples and {len(labels)} labels"
        )

    checked = _check_labels(name, labels), _check_content(name, content)
    return Table(name, *checked, rows_of(name), classes)


def as_array(name: str, key: str, value: object) -> np.ndarray:
    """Return ``value`` as an array of numbers or strings.

    Raises:
        DataError: it is ragged, or holds objects.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{name}: {key}: expected an array of numbers ({error})") from error
    if array.dtype.kind not in "biufU":
        raise DataError(
            f"{name}: {key}: expected numbers{' or strings' if key == 'y' else ''}, "
            f"got dtype {array.dtype}"
        )
    return array


def _check_labels(name: str, labels: np.ndarray) -> np.ndarray | tuple[str, ...]:
    if labels.dtype.kind == "U":
        return tuple(str(label) for label in labels)
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{name}: y: expected integer class numbers or names, got dtype {labels.dtype}"
        )
    if labels.dtype == np.uint64:  # int64 would wrap what is far out of range anyway
        labels = np.minimum(labels, np.uint64(2**62))
    return labels.astype(np.int64)


def _check_content(name: str, content: np.ndarray) -> np.ndarray:
    if content.dtype.kind not in "iuf":
        raise DataError(f"{name}: x: expected numbers, got dtype {content.dtype}")
    if content.dtype.kind == "f":
        axes = tuple(range(1, content.ndim))
        bad = np.flatnonzero(~np.isfinite(content).all(axis=axes))
        refuse_rows(rows_of(name), bad, "x: expected finite numbers, got NaN or infinity")
    return content


def image_content(table: Table) -> np.ndarray:
    """Return the pixels of a table as uint8 ``(n, H, W, C)``.

    Raises:
        DataError: the arrays are not images.
    """
    pixels = np.asarray(table.content)
    if pixels.dtype == np.uint8 and pixels.ndim == 3:
        pixels = pixels[..., np.newaxis]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in _IMAGE_CHANNELS:
        raise DataError(
            f"{table.name}: x: expected images, uint8 (n, H, W) or (n, H, W, C) with 1 or 3 "
            f"channels, got {pixels.dtype} {pixels.shape}; "
            "other arrays are for task classification"
        )
    if 0 in pixels.shape[1:]:
        raise DataError(f"{table.name}: x: expected images with pixels, got {pixels.shape}")
    return pixels


def array_samples(table: Table) -> ArraySamples:
    """Return the features of a table as float32 samples.

    Raises:
        DataError: the table holds images, or a feature is too large for float32.
    """
    if not isinstance(table.content, np.ndarray):
        raise DataError(
            f"{table.name}: expected arrays, got images; "
            "set task: image-classification, or choose source numpy or csv"
        )
    if table.content.ndim < 2 or 0 in table.content.shape[1:]:
        raise DataError(
            f"{table.name}: x: expected features of shape (n, ...), got {table.content.shape}"
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(table.content, dtype=np.float32)
    axes = tuple(range(1, values.ndim))
    bad = np.flatnonzero(~np.isfinite(values).all(axis=axes))
    refuse_rows(table.origin, bad, "x: expected numbers that float32 holds, got a larger one")
    return ArraySamples(values, tuple(digest(sample) for sample in values), table.origin)
