"""What the report says first: the verdict, the numbers that a reader came for, the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.report import wording

Json = Mapping[str, Any]
BATCHES = ("1", "32")


def verdict(budget: Json) -> tuple[str, str]:
    """Return a style and the words."""
    if budget.get("max_drop") is None and budget.get("min_speedup") is None:
        return "none", "no budget set"
    return ("good", "budget held") if budget.get("passed") else ("bad", "budget missed")


def speedup(report: Json, details: Json, batch: str) -> tuple[float | None, Json]:
    """Return the final model's ratio at a batch size, and all that is known about it."""
    table = (details.get("latency") or {}).get(report["final"].get("name")) or {}
    return speed_ratio(report["final"], report["baseline"], table, batch)


def speed_ratio(stage: Json, baseline: Json, table: Json, batch: str) -> tuple[float | None, Json]:
    """Return a stage's ratio: as measured in interleaved rounds, else of the medians."""
    measured = table.get(batch) or {}
    if measured.get("ratio") is not None:
        return measured["ratio"], measured
    before, after = latency_ms(baseline, batch), latency_ms(stage, batch)
    return (before / after if before and after else None), {}


def latency_ms(stage: Json, batch: str) -> float | None:
    """Return a stage's median, or None where it was not measured."""
    value: float | None = (stage.get("latency_ms") or {}).get(batch)
    return value


def _size_ratio(report: Json) -> float | None:
    before, after = report["baseline"].get("size_bytes"), report["final"].get("size_bytes")
    return before / after if before and after else None


def _validation_drop(report: Json) -> float | None:
    before, after = (report[key].get("validation_accuracy") for key in ("baseline", "final"))
    return None if before is None or after is None else float(before - after)


def summary(report: Json, details: Json) -> str:
    """Say in a sentence what came out."""
    parts = []
    ratio, _ = speedup(report, details, "1")
    if ratio is not None:
        parts.append(f"{wording.times(ratio)} the speed of the float model at batch 1")
    if (ratio := _size_ratio(report)) is not None:
        parts.append(f"{wording.times(ratio)} smaller")
    if (drop := report["drop"].get("value")) is not None:
        verb = "lost" if drop >= 0 else "won"
        parts.append(f"{wording.points(abs(drop)).lstrip('+')} points of accuracy {verb}")
    return ", ".join(parts)


def tiles(report: Json, details: Json) -> list[dict[str, Any]]:
    """Return the four numbers that a reader came for."""
    sizes = [wording.size(report[key].get("size_bytes")) for key in ("baseline", "final")]
    return [
        _tile("test accuracy", wording.percent(report["final"].get("accuracy")), _changes(report)),
        *(_speed_tile(report, details, batch) for batch in BATCHES),
        _tile("smaller file", wording.times(_size_ratio(report)), [" → ".join(sizes)]),
    ]


def _tile(name: str, value: str, notes: list[str]) -> dict[str, Any]:
    return {"name": name, "value": value, "notes": notes}


def _changes(report: Json) -> list[str]:
    """Say what the accuracy was, and how it changed in test and in validation."""
    drop, validation = report["drop"], _validation_drop(report)
    notes = [f"{wording.percent(report['baseline'].get('accuracy'))} before"]
    if drop.get("value") is not None:
        notes.append(f"change {wording.points(-drop['value'])} points")
    if (interval := drop.get("interval")) is not None:
        notes.append(f"95% interval {wording.points_interval([-interval[1], -interval[0]])}")
    if validation is not None:
        notes.append(f"validation: change {wording.points(-validation)} points")
    return notes


def _speed_tile(report: Json, details: Json, batch: str) -> dict[str, Any]:
    ratio, measured = speedup(report, details, batch)
    times = [wording.milliseconds(latency_ms(report[key], batch)) for key in ("baseline", "final")]
    notes = [" → ".join(times)]
    if measured.get("interval") is not None:
        notes.append(f"95% interval {wording.times_interval(measured['interval'])}")
    if measured.get("verdict") == "undecided":
        notes.append("inside the margin: undecided")
    return _tile(f"speed-up, batch {batch}", wording.times(ratio), notes)


def budget_rows(report: Json, details: Json) -> list[dict[str, str]]:
    """Return each limit beside what it is held against, on the validation split."""
    budget, rows = report["budget"], []
    if budget.get("max_drop") is not None:
        judged = {one["name"]: one["value"] for one in budget.get("checks", ())}
        drop = judged.get("max_drop", _validation_drop(report))
        sure = budget.get("confidence")
        how = "" if sure is None else f", with {sure:.0%} confidence"
        limit = f"at most {wording.points(budget['max_drop']).lstrip('+')} points lost"
        got = f"{wording.points(drop).lstrip('+')} points lost in validation{how}"
        rows.append({"limit": limit, "got": got})
    if budget.get("min_speedup") is not None:
        ratio, _ = speedup(report, details, "1")
        limit = f"at least {wording.times(budget['min_speedup'])} the speed at batch 1"
        rows.append({"limit": limit, "got": wording.times(ratio)})
    return rows
