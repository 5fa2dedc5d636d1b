"""What a benchmark found: printed, kept with machine and versions, held to its promises."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deploykit.environment import environment
from deploykit.publish import write_atomic

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what it is.
        value: the number; a figure that could not be measured is NaN and holds no promise.
        form: how it is written, a format string.
        at_least: promised lower bound.
        at_most: promised upper bound.
    """

    name: str
    value: float
    form: str = "{:.4g}"
    at_least: float | None = None
    at_most: float | None = None

    @property
    def promise(self) -> str:
        """The bounds in words."""
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(
            f"{word} {self.form.format(bound)}" for word, bound in bounds if bound is not None
        )

    @property
    def holds(self) -> bool:
        """Whether the value is within the bounds."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def cells(self) -> tuple[str, str, str, str]:
        """Return the cells of the figure's row."""
        verdict = "" if not self.promise else "yes" if self.holds else "NO"
        return self.name, self.form.format(self.value), self.promise, verdict


def code_key(*settings: object) -> str:
    """Name the code, the versions and the settings that a result comes from.

    A kept result of another key is none of today's.
    """
    found = hashlib.sha256(repr((settings, environment()["versions"])).encode())
    for folder in ("deploykit", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{file.relative_to(ROOT)} ".encode() + file.read_bytes())
    return found.hexdigest()


def publish(
    name: str,
    figures: Sequence[Figure],
    *,
    about: str,
    command: str,
    details: Sequence[str] = (),
    keep: bool = True,
    folder: Path = RESULTS,
) -> int:
    """Print the figures and keep them in ``results/NAME.md``.

    Args:
        name: of the benchmark.
        figures: rows of the table.
        about: what was measured, in a sentence.
        command: what reproduces it; names no place of this machine.
        details: lines below the table.
        keep: whether to write the file; trials print only.
        folder: where results are kept.

    Returns:
        The exit code: 1 if a promise does not hold.
    """
    rows = [("figure", "value", "promised", "holds"), *(figure.cells() for figure in figures)]
    sys.stdout.write("\n".join([*_aligned(rows), *details]) + "\n")
    if keep:
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*_heading(name, about, command), *_markdown(rows), "", *details])
        write_atomic(folder / f"{name}.md", f"{text.rstrip()}\n".encode())
    return 0 if all(figure.holds for figure in figures) else 1


def _heading(name: str, about: str, command: str) -> list[str]:
    found = environment()
    memory = f"{found['memory_bytes'] / 2**30:.0f} GiB"
    system = f"{found['os'].split()[0]} {found['machine']}"
    versions = [f"{package} {version}" for package, version in found["versions"].items() if version]
    return [
        f"# {name}",
        "",
        about,
        "",
        f"- Command: `{command}`",
        f"- Date: {datetime.now(UTC):%Y-%m-%d}",
        f"- Machine: {found['cpu']} ({', '.join(found['features']) or 'no int8 extensions'}), "
        f"{found['cores']} cores, {memory}, {system}",
        f"- Versions: Python {found['python']}, {', '.join(versions)}",
        "",
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|---" * len(rows[0]) + "|", *body]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
