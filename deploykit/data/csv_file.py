"""CSV files: paths of images, or features, one row a sample."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit.data.labels import parse_text_labels
from deploykit.data.sources import require_file
from deploykit.data.table import Origin, Table, refuse_rows
from deploykit.errors import DataError


@dataclass(frozen=True)
class _Rows:
    """The cells of a file; ``lines`` are where each row ends, from 1, as editors count."""

    header: list[str]
    cells: list[list[str]]
    lines: list[int]


def read_csv(
    name: str,
    path: Path,
    *,
    image_column: str | None,
    label_column: str,
    classes: tuple[str, ...] | None,
) -> Table:
    """Return the samples of a CSV file with a header, UTF-8.

    Args:
        name: the file as the recipe calls it.
        path: the file.
        image_column: holds paths of images, relative to the file; ``None`` where all
            columns but the label's are features.
        label_column: holds class numbers or names.
        classes: the recipe's class names, which tell names like ``7`` from numbers.

    Raises:
        DataError: the file cannot be read, or a column is missing, or a cell is empty
            or no finite number.
    """
    require_file(name, path)
    rows = _read_rows(name, path)

    def origin(row: int) -> str:
        return f"{name}, line {rows.lines[row]}"

    texts = _column(name, rows, "label", label_column, origin)
    labels = parse_text_labels(texts, classes)
    if image_column is None:
        return Table(name, labels, _features(rows, label_column, name, origin), origin)
    images = [path.parent / text for text in _column(name, rows, "image", image_column, origin)]
    missing = [row for row, image in enumerate(images) if not image.is_file()]
    if missing:
        refuse_rows(origin, missing, f"image {str(images[missing[0]])!r} is not a file")
    return Table(name, labels, lambda row: images[row].read_bytes(), origin)


def _read_rows(name: str, path: Path) -> _Rows:
    cells, lines = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            for row in reader:
                if not row:
                    continue  # an empty line, such as the last one
                if len(row) != len(header):
                    raise DataError(
                        f"{name}, line {reader.line_num}: expected {len(header)} cells as in the "
                        f"header, got {len(row)}"
                    )
                cells.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{name}: expected a CSV file in UTF-8 ({error})") from error
    repeated = [column for column in header if header.count(column) > 1]
    if repeated:
        raise DataError(f"{name}: expected distinct columns, got {repeated[0]!r} twice")
    return _Rows(header, cells, lines)


def _column(name: str, rows: _Rows, key: str, column: str, origin: Origin) -> list[str]:
    if column not in rows.header:
        raise DataError(
            f"{name}: expected a column {column!r}, got {', '.join(rows.header) or 'no header'}; "
            f"set data.{key}_column"
        )
    place = rows.header.index(column)
    texts = [row[place] for row in rows.cells]
    empty = [row for row, text in enumerate(texts) if not text]
    refuse_rows(origin, empty, f"expected a value in column {column!r}, got none")
    return texts


def _features(rows: _Rows, label_column: str, name: str, origin: Origin) -> np.ndarray:
    places = [place for place, column in enumerate(rows.header) if column != label_column]
    if not places:
        raise DataError(f"{name}: expected columns of features, got only {label_column!r}")
    values = np.empty((len(rows.cells), len(places)), dtype=np.float64)
    bad: list[int] = []
    problem = ""
    for row, cells in enumerate(rows.cells):
        numbers = [_number(cells[place]) for place in places]
        values[row] = numbers
        if not all(map(math.isfinite, numbers)):
            if not bad:
                place = places[[math.isfinite(number) for number in numbers].index(False)]
                got = f"{cells[place]!r} in column {rows.header[place]!r}"
                problem = f"expected finite numbers, got {got}"
            bad.append(row)
    refuse_rows(origin, bad, problem)
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
