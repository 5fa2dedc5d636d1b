"""The devices as one HTML page: its parts are prepared here, the template writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deploykit.fleet.gather import DeployedModel, Told
from deploykit.report import wording
from deploykit.report.charts import Point, scatter

BATCHES = (1, 32)
LONGEST_LABEL = 26  # letters that a dot of a chart has room for
FILTERS = ("percent", "milliseconds", "short_milliseconds", "size", "count")


def render(models: Sequence[DeployedModel]) -> str:
    """Return the page.

    Args:
        models: at least one, as `gather` returns them.

    Returns:
        One HTML document that refers to nothing outside itself.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({name: getattr(wording, name) for name in FILTERS})
    template = environment.from_string(_resource("deploykit.fleet", "devices.html.j2"))
    return template.render(
        style=Markup(_resource("deploykit.report", "style.css")),
        title=models[0].label if len(models) == 1 else f"{len(models)} models",
        devices=len({one.value.device.name for model in models for one in model.told}),
        tradeoffs=_tradeoffs(models),
        models=[_described(model) for model in models],
    )


def _resource(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _described(model: DeployedModel) -> dict[str, Any]:
    return {
        "label": model.label,
        "bundle": model.bundle,
        "bars": [bars for batch in BATCHES if (bars := _bars(model, batch))],
        "rows": [_row(one) for one in model.told],
        "warnings": list(_warnings(model)),
    }


def _name(told: Told, model: DeployedModel) -> str:
    """Name a device; with its threads where it was measured with several counts of them."""
    name = told.value.device.name
    twice = sum(one.value.device.name == name for one in model.told) > 1
    return f"{name}, {told.value.threads} threads" if twice else name


def _bars(model: DeployedModel, batch: int) -> dict[str, Any] | None:
    """Return the latencies at a batch size, each as a share of the longest."""
    found = [
        (_name(one, model), time.median_ms)
        for one in model.told
        if (time := one.value.at_batch(batch)) is not None
    ]
    if not found:
        return None
    longest = max(median for _, median in found)
    rows = [
        {"device": name, "median_ms": median, "share": round(100 * median / longest, 2)}
        for name, median in found
    ]
    return {"batch": batch, "rows": rows}


def _row(told: Told) -> dict[str, Any]:
    value = told.value
    return {
        "file": told.file,
        "value": value,
        "times": [(batch, value.at_batch(batch)) for batch in BATCHES],
        "features": " ".join(value.device.features),
    }


def _warnings(model: DeployedModel) -> Iterator[str]:
    """Say what a reader must know before comparing."""
    target = model.bundle.target
    if not target.startswith("cpu-"):
        yield f"These latencies are the CPU's: they say nothing about {target}."
    for one in model.told:
        value, name = one.value, _name(one, model)
        if target.startswith("cpu-") and value.device.cpu_target != target:
            yield f"{name} is {value.device.cpu_target}; the bundle was made for {target}."
        if value.golden.grey_levels:
            yield f"The image decoder of {name} differs from the bundle's by one grey level."
    if len({one.value.threads for one in model.told}) > 1:
        yield "Thread counts differ: compare latencies of equal counts."


def _tradeoffs(models: Sequence[DeployedModel]) -> list[Markup]:
    """Draw accuracy against latency, one chart a batch size, where there are models to compare."""
    if len({model.bundle.accuracy for model in models} - {None}) < 2:
        return []
    charts = []
    for batch in BATCHES:
        dots = [
            Point(_shortened(f"{model.label}, {_name(one, model)}"), time.median_ms, share, "kept")
            for model in models
            for one in model.told
            if (time := one.value.at_batch(batch)) is not None
            and (share := one.value.accuracy) is not None
        ]
        if dots:
            chart = scatter(
                dots[:1],  # the rest is no course of steps, so nothing joins it
                others=dots[1:],
                title=f"accuracy against latency at batch {batch}",
                x=f"ms at batch {batch}",
                y="accuracy",
                formats=(lambda value: f"{value:.3g}", lambda value: wording.percent(value, 1)),
            )
            charts.append(chart)
    return charts


def _shortened(label: str) -> str:
    if len(label) <= LONGEST_LABEL:
        return label
    return label[: LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
