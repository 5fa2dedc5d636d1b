"""One page of what ``bench --json`` printed on several devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploykit.errors import UsageError
from deploykit.fleet.gather import gather
from deploykit.fleet.page import render
from deploykit.fleet.table import table_lines
from deploykit.publish import told_as_usage, write_atomic

DOCTYPE = b"<!doctype html>"


def write_devices(files: Sequence[Path], out: Path, *, force: bool = False) -> str:
    """Write the page: which device, which latency, which accuracy.

    Args:
        files: what ``run.py bench --json`` or ``deploykit bench BUNDLE --json`` printed, one file
            a device.
        out: the page, one HTML file that loads nothing.
        force: replace a page that stands there.

    Returns:
        The same in lines of at most 80 characters, for a terminal.

    Raises:
        DataError: a file is not what ``bench --json`` printed, or a device is there twice.
        UsageError: no files, ``out`` stands already or cannot be written.
    """
    _refuse_existing(out, force)
    models = gather(files)
    write_atomic(out, render(models).encode())
    return "\n".join(table_lines(models))


def _refuse_existing(out: Path, force: bool) -> None:
    """Refuse to replace anything but a page, lest a mistyped path destroy a measurement."""
    with told_as_usage(out):
        if not out.exists():
            return
        if not force:
            raise UsageError(
                f"{out}: exists already; choose another place, or replace it with --force"
            )
        if out.is_file():
            with out.open("rb") as file:
                if file.read(len(DOCTYPE)).lower() == DOCTYPE:
                    return
        raise UsageError(
            f"{out}: expected a page to replace, found something else; choose another place"
        )


__all__ = ["gather", "render", "table_lines", "write_devices"]
