"""Numbers behind the report's tables and bars; widths and places are shares in percent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
MOST_ROUNDINGS = 24

MAX_CLASSES_SHOWN = 20  # more do not fit a phone; the rest is folded, or left to report.json


def width_bars(widths: Sequence[Json]) -> list[dict[str, Any]]:
    """Return layers with bars of their channels before and after."""
    widest = max((row["before"] for row in widths), default=0) or 1
    return [
        {
            **row,
            "before_share": round(100 * row["before"] / widest, 1),
            "after_share": round(100 * row["after"] / widest, 1),
            "changed": row["before"] != row["after"],
        }
        for row in widths
    ]


def latency_bars(layers: Sequence[Json]) -> list[dict[str, Any]]:
    """Return layers with bars of what they take before and after; None where there is no such."""
    times = [row[key] or 0.0 for row in layers for key in ("before", "after")]
    longest = max(times, default=0.0) or 1.0
    return [
        {
            "layer": row["layer"] or "everything else",
            "before": row["before"],
            "after": row["after"],
            "before_share": round(100 * (row["before"] or 0.0) / longest, 1),
            "after_share": round(100 * (row["after"] or 0.0) / longest, 1),
        }
        for row in layers
    ]


def harm_bars(sensitivity: Json | None) -> list[dict[str, Any]]:
    """Return what leaving out each block or narrowing each group harms, as bars, least first."""
    if not sensitivity:
        return []
    harms = [(f"without {one['block']}", one["divergence"]) for one in sensitivity["blocks"]]
    for group in sensitivity["groups"]:
        layers = str(group["layers"]).split(", ")
        name = layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"
        harms += [
            (f"{name}: {group['width']} to {width}", harm)
            for width, harm in group["divergence"].items()
        ]
    largest = max((harm for _, harm in harms), default=0.0) or 1.0
    return [
        {"what": what, "harm": harm, "share": round(100 * harm / largest, 1)}
        for what, harm in sorted(harms, key=lambda one: one[1])
    ]


def noise_bars(rounding: Json | None) -> list[dict[str, Any]]:
    """Return the roundings that add most noise to the logits, as bars of their power."""
    if not rounding or rounding["together"] is None:
        return []
    found = [
        (f"{name}, {what}", decibels)
        for kind, what in (("weights", "weights"), ("tensors", "activations"))
        for name, decibels in rounding[kind].items()
    ]
    loudest = sorted(found, key=lambda one: one[1])[:MOST_ROUNDINGS]
    return [
        {
            "what": what,
            "decibels": decibels,
            "share": round(100 * 10 ** ((loudest[0][1] - decibels) / 10), 1),
        }
        for what, decibels in loudest
    ]


def class_changes(rows: Sequence[Json]) -> dict[str, Any] | None:
    """Return classes with their accuracy's change; of many, those that changed most."""
    if not rows:
        return None
    changes: list[dict[str, Any]] = [{**row, "change": _change(row)} for row in rows]
    largest = max((abs(row["change"]) for row in changes if row["change"] is not None), default=0)
    for row in changes:
        row["share"] = round(50 * abs(row["change"] or 0) / (largest or 1), 1)
    if len(changes) <= MAX_CLASSES_SHOWN:
        return {"shown": changes, "total": len(changes)}
    changes.sort(key=lambda row: -abs(row["change"] or 0))
    return {"shown": changes[:MAX_CLASSES_SHOWN], "total": len(changes)}


def _change(row: Json) -> float | None:
    before, after = row.get("baseline"), row.get("final")
    return None if before is None or after is None else float(after - before)


def confusions(details: Json) -> list[dict[str, Any]]:
    """Return the confusion matrices: as cells if they are small, else their largest mistakes."""
    labels = [str(label) for label in details.get("labels") or ()]
    found = []
    for name, matrix in (details.get("confusion") or {}).items():
        named = labels if len(labels) == len(matrix) else [str(i) for i in range(len(matrix))]
        small = len(matrix) <= MAX_CLASSES_SHOWN
        found.append(
            {
                "name": name,
                "labels": named,
                "rows": _cells(matrix) if small else (),
                "mistakes": () if small else _mistakes(matrix, named),
            }
        )
    return found


def _cells(matrix: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
    """Shade each cell by its share of the row; small shares stay visible."""
    rows = []
    for i, counts in enumerate(matrix):
        total = sum(counts) or 1
        rows.append(
            [
                {
                    "count": count,
                    "shade": round(100 * (count / total) ** 0.5) if count else 0,
                    "right": i == j,
                }
                for j, count in enumerate(counts)
            ]
        )
    return rows


def _mistakes(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> list[dict[str, Any]]:
    mistakes: list[dict[str, Any]] = [
        {"label": labels[i], "taken_for": labels[j], "count": count}
        for i, counts in enumerate(matrix)
        for j, count in enumerate(counts)
        if i != j and count
    ]
    return sorted(mistakes, key=lambda one: -one["count"])[:MAX_CLASSES_SHOWN]


def trained_spans(details: Json) -> list[dict[str, Any]]:
    """Return, for each stage, its groups of parameters and the epochs in which they learned."""
    spans = dict(details.get("trained") or {})
    for stage, records in (details.get("curves") or {}).items():
        if stage not in spans and any("trained" in record for record in records):
            spans[stage] = _spans_of_records(records)
    return [{"stage": stage, **_bars(found)} for stage, found in spans.items() if found]


def _spans_of_records(records: Sequence[Json]) -> list[dict[str, Any]]:
    """Join neighbouring epochs in which the same parameters learned."""
    spans: list[dict[str, Any]] = []
    for record in records:
        names, epoch = list(record.get("trained") or ()), record["epoch"]
        if spans and spans[-1]["parameters"] == names:
            spans[-1]["last_epoch"] = epoch
        else:
            spans.append({"first_epoch": epoch, "last_epoch": epoch, "parameters": names})
    return spans


def _bars(spans: Sequence[Json]) -> dict[str, Any]:
    """Group parameters by the first part of their name that tells groups apart."""
    epochs = 1 + max(span["last_epoch"] for span in spans)
    groups: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        for group, size in Counter(_group(name) for name in span["parameters"]).items():
            bars = groups.setdefault(group, [])
            length = span["last_epoch"] - span["first_epoch"] + 1
            bars.append(
                {
                    "left": round(100 * span["first_epoch"] / epochs, 2),
                    "width": round(100 * length / epochs, 2),
                    "hint": f"epochs {span['first_epoch']} to {span['last_epoch']}: "
                    f"{size} parameter tensors",
                }
            )
    rows = [{"group": group, "bars": bars} for group, bars in groups.items()]
    return {"rows": rows, "epochs": epochs, "spans": spans}


def _group(parameter: str) -> str:
    """``layer1.0.conv1.weight`` belongs to ``layer1``, as a reader thinks of it."""
    return parameter.split(".", 1)[0]
