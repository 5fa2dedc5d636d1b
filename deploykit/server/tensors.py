"""Numbers that clients send, as JSON or as bytes, checked and made into tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson

from deploykit.server.refusal import Refusal

MAX_DIMENSIONS = 32


def parse_json(data: bytes) -> Any:
    """Parse JSON: UTF-8, no NaN, no trailing bytes, bounded depth.

    Raises:
        Refusal: 400, it is none.
    """
    try:
        return orjson.loads(data)
    except ValueError as error:
        said = str(error).rstrip(".")
        raise Refusal(400, f"body: expected JSON, at most 1,024 levels deep: {said}") from error


def numbers(data: Any, shape: Sequence[int] | None, dtype: np.dtype[Any], where: str) -> np.ndarray:
    """Make a tensor of the numbers of a JSON value.

    Args:
        data: flat, or nested as ``shape`` says.
        shape: of the tensor; None: that of the nesting.
        dtype: of the tensor; the numbers must fit in it.
        where: they stand, for the message.

    Raises:
        Refusal: 400, ragged, too many, too few, not numbers or out of range.
    """
    if not isinstance(data, list):
        raise Refusal(400, f"{where}: expected a list of numbers, got {kind_of(data)}")
    flat, nesting = _flatten(data, where)
    if shape is None:
        shape = nesting
    elif len(nesting) > 1 and nesting != list(shape):
        raise Refusal(400, f"{where}: expected {list(shape)} or a flat list, got {nesting}")
    if len(flat) != math.prod(shape):
        raise Refusal(
            400, f"{where}: expected {math.prod(shape)} numbers for {list(shape)}, got {len(flat)}"
        )
    return _cast(flat, dtype, where).reshape(shape)


def _flatten(data: list[Any], where: str) -> tuple[list[Any], list[int]]:
    """Undo the nesting of a list, whose lists of one level are equally long."""
    shape = [len(data)]
    while data and isinstance(data[0], list):
        if len(shape) > MAX_DIMENSIONS:
            raise Refusal(400, f"{where}: expected at most {MAX_DIMENSIONS} dimensions")
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise Refusal(400, f"{where}: expected lists of equal length, got a ragged one")
        shape.append(len(data[0]))
        data = list(chain.from_iterable(data))
    return data, shape


def _cast(flat: list[Any], dtype: np.dtype[Any], where: str) -> np.ndarray:
    """Convert numbers; booleans count as numbers only for a boolean tensor."""
    kinds = set(map(type, flat))
    if dtype.kind in "iu" and float in kinds:  # in JSON Schema 2.0 is an integer too
        flat = [int(one) if type(one) is float and _is_exact(one) else one for one in flat]
        kinds = set(map(type, flat))
    kinds_of: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
    allowed = kinds_of.get(dtype.kind, {int})
    if not kinds <= allowed:
        found = ", ".join(sorted(kind_of(kind()) for kind in kinds - allowed))
        raise Refusal(400, f"{where}: expected {_in_words(dtype)}, got {found}")
    try:
        if dtype == np.uint8:
            return np.frombuffer(bytes(flat), dtype)  # ten times as fast as numpy's own way
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
        fits = dtype.kind != "f" or np.isfinite(array).all()
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise Refusal(400, f"{where}: expected {_in_words(dtype)}, got one out of range")
    return array


def _is_exact(number: float) -> bool:
    """Whether a fraction is an integer, and no rounded one: so are those past 64 bits parsed."""
    return number.is_integer() and abs(number) < 2**53


def _in_words(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "b":
        return "true or false"
    if dtype.kind == "f":
        return f"numbers within {dtype}"
    limits = np.iinfo(dtype)
    return f"integers from {limits.min} to {limits.max}"


def checked(array: np.ndarray, where: str) -> np.ndarray:
    """Return an array whose values are all ones that its dtype means.

    Raises:
        Refusal: 400, NaN, infinity, or a boolean that is neither 0 nor 1.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refusal(400, f"{where}: expected finite numbers, got NaN or infinity")
    if array.dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise Refusal(400, f"{where}: expected bytes of 0 or 1 for BOOL, got another")
    return array


def kind_of(value: Any) -> str:
    """Name the JSON type of a value."""
    names = {bool: "a boolean", str: "text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int) else "a fraction")


def told(value: Any) -> str:
    """Spell a client's value; what is long or holds others is named, not spelled."""
    is_flat = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    if is_flat and not any(isinstance(one, (list, dict)) for one in value):
        text = repr(value)
    elif isinstance(value, (list, dict)):
        text = kind_of(value)
    else:
        text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
