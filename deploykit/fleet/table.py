"""The devices in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deploykit.fleet.gather import DeployedModel, Measurement
from deploykit.report import wording

COLUMNS = 80
WIDEST = 12  # of any cell but the device's name
GAP = "  "
HEAD = ("device", "cpu", "threads", "batch 1", "batch 32", "memory", "runtime")


def table_lines(models: Sequence[DeployedModel]) -> Iterator[str]:
    """Write a heading and a table for each model."""
    for model in models:
        bundle = model.bundle
        accuracy = wording.percent(bundle.accuracy)
        yield _cut(f"{model.label} for {bundle.target}: accuracy {accuracy}", COLUMNS)
        yield from _aligned([HEAD, *(_cells(one.value) for one in model.told)])


def _cells(one: Measurement) -> tuple[str, ...]:
    times = (one.at_batch(batch) for batch in (1, 32))
    return (
        one.device.name,
        one.device.cpu_target,
        str(one.threads),
        *(wording.milliseconds(None if time is None else time.median_ms) for time in times),
        wording.size(one.memory.peak_bytes),
        one.onnxruntime,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Cut what is too wide: the name of a device last."""
    cells = [[row[0], *(_cut(cell, WIDEST) for cell in row[1:])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = COLUMNS - sum(widths[1:]) - len(GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], room)
    for row in cells:
        words = (_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True))
        yield GAP.join(words).rstrip()


def _cut(text: str, width: int) -> str:
    """Shorten to a column."""
    plain = text.replace(wording.SPACE, " ")
    return plain if len(plain) <= width else plain[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
