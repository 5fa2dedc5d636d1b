"""Parquet files of images as Hugging Face writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.data.sources import require_file
from deploykit.data.table import Encoded, Table, concatenate, refuse_rows, rows_of
from deploykit.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(name: str, path: Path, *, image_column: str, label_column: str) -> Table:
    """Return the images and labels of a parquet file, or of all in a folder, by name.

    The image column is a struct of ``bytes`` and ``path`` or plain bytes; the label column
    holds class numbers or names. Class names come from the schema's metadata: ``classes``
    (comma-separated), or Hugging Face's description of a ClassLabel.

    Raises:
        DataError: a file cannot be read, or a column is missing, has another type or
            has rows without a value.
    """
    if not path.is_dir():
        return _read_file(name, path, image_column, label_column)
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))
    if not files:
        raise DataError(f"{name}: expected .parquet files in the folder, got none")
    tables = [_read_file(f"{name}/{file.name}", file, image_column, label_column) for file in files]
    return concatenate(name, tables)


def _read_file(name: str, path: Path, image_column: str, label_column: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_file(name, path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            for key, column in (("image", image_column), ("label", label_column)):
                if schema.names.count(column) != 1:
                    raise DataError(
                        f"{name}: expected one column {column!r}, got {', '.join(schema.names)}; "
                        f"set data.{key}_column"
                    )
            table = file.read(columns=[image_column, label_column])
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{name}: expected a parquet file, got one that cannot be read ({first_line(error)})"
        ) from error
    return Table(
        name,
        _read_labels(name, label_column, table.column(label_column)),
        _read_images(name, path.parent, image_column, table.column(image_column)),
        rows_of(name),
        _class_names(name, schema, label_column),
    )


def _read_labels(name: str, column: str, values: pa.ChunkedArray) -> np.ndarray | tuple[str, ...]:
    import pyarrow as pa
    import pyarrow.compute as pc

    missing = np.flatnonzero(np.asarray(pc.is_null(values)))
    refuse_rows(rows_of(name), missing, f"expected a label in column {column!r}, got none")
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_integer(kind):
        # Numbers beyond int64 wrap; all of them are out of range and refused as such.
        return np.asarray(values.cast(kind).cast(pa.int64(), safe=False))
    if _is_text(kind):
        return tuple(values.cast(pa.large_string()).to_pylist())
    raise DataError(
        f"{name}: expected integers or strings in the label column {column!r}, got {values.type}"
    )


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(
        test(kind)
        for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )


def _read_images(name: str, folder: Path, column: str, values: pa.ChunkedArray) -> Encoded:
    import pyarrow as pa
    import pyarrow.compute as pc

    fields = {field.name: field.type for field in values.type} if _is_struct(values.type) else {}
    paths = None
    if "bytes" in fields:
        if "path" in fields and _is_text(fields["path"]):
            paths = pc.struct_field(values, "path")
        values = pc.struct_field(values, "bytes")
    if not _is_bytes(values.type) and not pa.types.is_null(values.type):
        raise DataError(
            f"{name}: expected bytes or a struct of bytes and path in the image column "
            f"{column!r}, got {values.type}"
        )
    absent = np.asarray(pc.is_null(values))
    if paths is not None:
        absent &= np.asarray(pc.is_null(paths))
    problem = f"expected an image in column {column!r}, got none"
    refuse_rows(rows_of(name), np.flatnonzero(absent), problem)

    def encoded(row: int) -> bytes:
        data = values[row].as_py()
        if data is None and paths is not None:
            return Path(folder, paths[row].as_py()).read_bytes()
        return bytes(data)

    return encoded


def _is_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _class_names(name: str, schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    metadata = schema.metadata or {}
    try:
        if b"classes" in metadata:
            return tuple(text.strip() for text in metadata[b"classes"].decode().split(","))
        if b"huggingface" in metadata:
            return _hugging_face_names(json.loads(metadata[b"huggingface"]), label_column)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"{name}: expected class names in the schema's metadata, got what cannot be read "
            f"({error}); write the metadata anew, or without 'classes' and 'huggingface'"
        ) from error
    return None


def _hugging_face_names(description: Any, label_column: str) -> tuple[str, ...] | None:
    feature = description.get("info", {}).get("features", {}).get(label_column, {})
    names = feature.get("names")
    # Older writers keep the names as {"0": "airplane", ...}.
    if isinstance(names, dict):
        names = [names[str(number)] for number in range(len(names))]
    return None if names is None else tuple(str(text) for text in names)
