"""The report of a run: ``report.json`` for programs, ``report.html`` for people."""

from __future__ import annotations

from pathlib import Path

from deploykit.artifacts import Report
from deploykit.publish import write_atomic, write_json
from deploykit.report.page import render


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into a run's folder.

    The page is one file: it loads nothing, runs no script, and what comes from outside (names,
    labels, reasons) is escaped. What ``report.details`` lacks is left out of it. It shows::

        {"curves": {stage: [{"epoch", "loss", "train_accuracy", "torch_validation_accuracy",
                             "lr", "seconds"}]},
         "trained": {stage: [{"first_epoch", "last_epoch", "parameters": [name]}]},
         "latency": {stage: {"1": {"median_ms", "p90_ms", "ratio", "interval", "verdict"}, "32"}},
         "widths": [{"layer", "before", "after"}],
         "left_alone": [{"layer", "why"}],
         "fusion": {"integer": [name], "float": [{"name", "operator", "why"}],
                    "operators": {type: count}},
         "confusion": {"baseline": [[count]], "final": [[count]]},
         "per_class": [{"label", "baseline", "final"}],
         "labels": [label],
         "parity": {what: value}, "provenance": {what: value},
         "warnings": [sentence], "commands": [line]}

    Epochs count from 0; accuracies are 0 to 1; ``before`` and ``after`` are channels. An epoch's
    record may name its ``trained`` parameters itself, in place of ``trained`` by spans.

    Args:
        report: what was measured and decided.
        folder: an existing folder.

    Raises:
        UsageError: the folder cannot be written.
        ValueError: a number of the report is NaN or infinite.
    """
    value = report.to_json()
    write_json(folder / "report.json", value)
    write_atomic(folder / "report.html", render(value).encode())


__all__ = ["render", "write_report"]
