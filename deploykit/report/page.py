"""From ``report.json`` to the page: each function prepares one section, the template writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deploykit.report import wording
from deploykit.report.charts import Line, Point, line_chart, scatter
from deploykit.report.headline import (
    BATCHES,
    budget_rows,
    latency_ms,
    speed_ratio,
    summary,
    tiles,
    verdict,
)
from deploykit.report.tables import (
    class_changes,
    confusions,
    harm_bars,
    latency_bars,
    noise_bars,
    trained_spans,
    width_bars,
)

Json = Mapping[str, Any]


def render(report: Json) -> str:
    """Return the page of a report.

    Args:
        report: as ``Report.to_json`` makes it.

    Returns:
        One HTML document that refers to nothing outside itself.
    """
    details = report.get("details") or {}
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = (
        "percent",
        "points",
        "milliseconds",
        "short_milliseconds",
        "times",
        "size",
        "count",
        "seconds",
    )
    environment.filters.update({name: getattr(wording, name) for name in names})
    environment.filters.update(
        times_interval=wording.times_interval, points_interval=wording.points_interval
    )
    template = environment.from_string(_resource("page.html.j2"))
    return template.render(
        report=report,
        style=Markup(_resource("style.css")),
        verdict=verdict(report["budget"]),
        summary=summary(report, details),
        tiles=tiles(report, details),
        budget=budget_rows(report, details),
        tradeoffs=_tradeoffs(report),
        stages=_stage_rows(report, details),
        trials=_trial_rows(details.get("trials") or ()),
        courses=_courses(details.get("curves") or {}),
        trained=trained_spans(details),
        widths=width_bars(details.get("widths") or ()),
        left_alone=details.get("left_alone") or (),
        removed=(details.get("pruning") or {}).get("removed") or (),
        bounds=(details.get("pruning") or {}).get("bounds") or (),
        harms=harm_bars((details.get("pruning") or {}).get("sensitivity")),
        layers_ms=latency_bars(details.get("layers_ms") or ()),
        noises=noise_bars(details.get("rounding")),
        noise=(details.get("rounding") or {}).get("together"),
        fusion=_fusion(details.get("fusion")),
        classes=class_changes(details.get("per_class") or ()),
        confusions=confusions(details),
        warnings=details.get("warnings") or (),
        commands=details.get("commands") or (),
        facts=_facts(report, details),
    )


def _resource(name: str) -> str:
    return files("deploykit.report").joinpath(name).read_text(encoding="utf-8")


def _rows(report: Json) -> list[tuple[Json, str]]:
    """Return the stages in order, each with its role: ``baseline``, ``final``, ``kept``..."""
    refused = {one.get("stage") for one in report["decisions"] if one.get("kept") is False}
    baseline, final = report["baseline"], report["final"]
    rows: list[tuple[Json, str]] = []
    for stage in report["stages"]:
        role = "refused" if stage.get("name") in refused else "kept"
        if _same(stage, final):
            role, stage = "final", {**stage, **final}
        elif _same(stage, baseline):
            role, stage = "baseline", {**stage, **baseline}
        rows.append((stage, role))
    if not any(_same(stage, baseline) for stage, _ in rows):
        rows.insert(0, ({"name": "baseline", **baseline}, "baseline"))
    if not any(_same(stage, final) for stage, _ in rows):
        rows.append(({"name": "final", **final}, "final"))
    return rows


def _same(stage: Json, other: Json) -> bool:
    keys = ("validation_accuracy", "latency_ms", "size_bytes")
    return all(stage.get(key) == other.get(key) for key in keys)


def _tradeoffs(report: Json) -> list[Markup]:
    """Draw accuracy against latency, one chart a batch size, where both were measured."""
    charts = []
    for batch in BATCHES:
        points = [
            Point(str(stage.get("name")), latency, stage["validation_accuracy"], role)
            for stage, role in _rows(report)
            if (latency := latency_ms(stage, batch)) is not None
            and stage.get("validation_accuracy") is not None
        ]
        if points:
            chart = scatter(
                points,
                others=_other_trials(report, batch),
                title=f"validation accuracy against latency at batch {batch}",
                x=f"ms at batch {batch}",
                y="validation accuracy",
                formats=(lambda value: f"{value:.3g}", lambda value: wording.percent(value, 1)),
            )
            charts.append(chart)
    return charts


def _other_trials(report: Json, batch: str) -> list[Point]:
    """Return a dot for each try to hold the budget that was not chosen."""
    trials = (report.get("details") or {}).get("trials") or ()
    return [
        Point(f"trial {one['number']}", latency, one["validation_accuracy"], "trial")
        for one in trials
        if not one["chosen"] and (latency := latency_ms(one, batch)) is not None
    ]


def _trial_rows(trials: Sequence[Json]) -> list[dict[str, Any]]:
    """Say what each try to hold the budget was, and what came of it."""
    rows = []
    for one in trials if len(trials) > 1 else ():
        pruned = one["pruned"] or {}
        told = ", ".join(
            [f"prune.{key} {value:g}" for key, value in pruned.items()]
            + [f"{name} in float" for name in one["keep_float"]]
            + one.get("mix", False) * ["what is faster there in float"]
        )
        role = "final" if one["chosen"] else "passed" if one["passed"] else "refused"
        why = "; ".join(check["why"] for check in one["checks"] if not check["passed"])
        rows.append(
            {
                "number": one["number"],
                "role": role,
                "what": told or "no pruning",
                "validation_accuracy": one["validation_accuracy"],
                "speedup": one["speedup"],
                "size_bytes": one["size_bytes"],
                "why": one["failed"] or why or "holds the budget",
            }
        )
    return rows


def _stage_rows(report: Json, details: Json) -> list[dict[str, Any]]:
    tables = details.get("latency") or {}
    rows = []
    for stage, role in _rows(report):
        table = tables.get(stage.get("name")) or {}
        speeds = [
            (batch, *speed_ratio(stage, report["baseline"], table, batch)) for batch in BATCHES
        ]
        keys = ("name", "validation_accuracy", "accuracy", "size_bytes", "macs", "parameters")
        row = {key: stage.get(key) for key in (*keys, "peak_memory_bytes", "seconds")}
        row["role"] = role
        row["speeds"] = [
            {
                "batch": batch,
                "median_ms": latency_ms(stage, batch),
                "p90_ms": measured.get("p90_ms"),
                "ratio": None if role == "baseline" else ratio,
                "interval": measured.get("interval"),
            }
            for batch, ratio, measured in speeds
        ]
        rows.append(row)
    return rows


def _courses(curves: Mapping[str, Sequence[Json]]) -> list[dict[str, Any]]:
    """Draw loss, accuracy and learning rate of each stage that trained."""
    return [
        {"stage": stage, "charts": charts}
        for stage, records in curves.items()
        if (charts := _course(stage, records))
    ]


def _course(stage: str, records: Sequence[Json]) -> list[dict[str, Any]]:
    validation = "torch_validation_accuracy"
    if any("validation_accuracy" in record for record in records):
        validation = "validation_accuracy"
    panels = (
        ("loss", (("training", "loss"),), lambda value: f"{value:.3g}"),
        (
            "accuracy (torch)",
            (("training, augmented", "train_accuracy"), ("validation", validation)),
            lambda value: wording.percent(value, 1),
        ),
        ("learning rate", (("learning rate", "lr"),), lambda value: f"{value:.2g}"),
    )
    charts = []
    for name, series, write in panels:
        lines = [
            Line(label, [record["epoch"] for record in known], [record[key] for record in known], i)
            for i, (label, key) in enumerate(series, start=1)
            if (known := [record for record in records if record.get(key) is not None])
        ]
        if lines:
            chart = line_chart(
                lines,
                title=f"{name} of stage {stage} by epoch",
                x="epoch",
                y=name,
                formats=(lambda value: f"{value:.0f}", write),
            )
            legend = lines if len(lines) > 1 else ()
            charts.append({"svg": chart, "legend": legend})
    return charts


def _fusion(fusion: Json | None) -> dict[str, Any] | None:
    if not fusion:
        return None
    integer, floating = fusion.get("integer") or (), fusion.get("float") or ()
    total = len(integer) + len(floating)
    operators = sorted(
        (fusion.get("operators") or {}).items(), key=lambda item: (-item[1], item[0])
    )
    return {
        "integer": integer,
        "floating": floating,
        "total": total,
        "share": 100 * len(integer) / total if total else 0,
        "operators": operators,
    }


def _facts(report: Json, details: Json) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what a reader needs to judge or repeat the run, as tables of two columns."""
    run = {"seed": report["seed"], "target": report["target"], "threads": report["threads"]}
    machine = dict(report["environment"])
    versions = machine.pop("versions", None) or {}
    if machine.get("memory_bytes") is not None:
        machine["memory"] = wording.size(machine.pop("memory_bytes"))
    tables = (
        ("agreement of torch and ONNX Runtime", details.get("parity")),
        ("normalization's share of the latency, batch 1", _share(details.get("normalization"))),
        ("run", {**run, **(details.get("provenance") or {})}),
        ("machine", machine),
        ("versions", versions),
    )
    return [
        (name, [(str(key).replace("_", " "), _plain(value)) for key, value in table.items()])
        for name, table in tables
        if table
    ]


def _share(measured: Json | None) -> dict[str, str] | None:
    """Write a share and its interval in percent."""
    if measured is None:
        return None
    low, high = (wording.percent(bound) for bound in measured["interval"])
    return {"share": wording.percent(measured["share"]), "95% interval": f"{low} to {high}"}


def _plain(value: Any) -> str:
    """Write any JSON value for people."""
    if value is None:
        return wording.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(inner) for inner in value) or wording.DASH
    return str(value)
