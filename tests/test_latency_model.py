import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_quantized import EXAMPLE, TARGET, candidate_of, plain, settled
from torch import nn

from deploykit import latency_model
from deploykit.cost import count_macs
from deploykit.latency_model import LatencyCost, LatencyModel, Part
from deploykit.layer_shapes import layer_shapes
from deploykit.measure import Latency
from deploykit.measure.layer_times import LayerTimes
from deploykit.widths import read_widths


class Table:
    """Layers that cost as many units as they have output channels."""

    threads = 1

    def __init__(self):
        self.costs = {}

    def ask(self, shapes):
        return {shape: float(shape.outputs) for shape in shapes}


def model_of(module, example=EXAMPLE):
    shapes = layer_shapes(module, example)
    parts = [Part("", 1.0, 0.0, kernel=False)]
    for layer in shapes:
        parts += [Part(layer, 4.0, 0.0, kernel=True), Part(layer, 2.0, 1.0, kernel=False)]
    measured = sum(part.ms for part in parts)
    return LatencyModel(measured, tuple(parts), shapes, read_widths(module), Table())


def test_prediction_for_the_model_itself_is_what_was_measured():
    model = model_of(plain())
    assert model.predict({}) == pytest.approx(model.measured_ms)
    assert model.predict(model.widths) == pytest.approx(model.measured_ms)


def test_narrower_layer_takes_its_share_and_what_follows_part_of_it():
    model = model_of(plain())
    widths = {"c1": {**model.widths["c1"], "out_channels": 4}}
    # Half of the kernel's 4 ms, and half of the 1 ms that is moved values.
    assert model.measured_ms - model.predict(widths) == pytest.approx(2.0 + 0.5)


def test_removed_module_takes_all_that_follows_its_layers():
    net = nn.Sequential(plain(), nn.Linear(5, 5))
    model = model_of(net)
    assert model.predict({}, ["0"]) == pytest.approx(1.0 + 6.0)
    assert model.predict({}, ["0.c1"]) == pytest.approx(model.measured_ms - 6.0)


@pytest.fixture
def cost(tmp_path):
    candidate = candidate_of(settled(plain()))
    return LatencyCost(
        candidate, TARGET, "int8", times=LayerTimes(1), record=tmp_path / "latencies.json"
    )


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(latency_model, "SECONDS", 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_profile_gives_the_time_of_every_layer_to_it(cost, precision):
    cost.precision = precision
    spent = cost.model.layer_ms({})
    assert {"c1", "c2", "fc"} <= spent.keys()
    assert all(ms > 0 for layer, ms in spent.items() if layer)
    assert sum(spent.values()) == pytest.approx(cost.model.measured_ms)
    precisions = {shape.precision for shape in cost.model.shapes.values()}
    assert precisions == ({"uint8"} if precision == "int8" else {"float32"})


@pytest.mark.slow
def test_resumed_run_reads_what_was_measured(cost, monkeypatch):
    narrow = settled(plain())
    narrow.c2 = nn.Conv2d(8, 8, 1)
    widths = {"c1": {**cost.model.widths["c1"], "out_channels": 4}}
    expected = cost.predict(widths), cost.measure(narrow), cost.measure(narrow, ["c1"])
    assert cost.speedup(narrow) == pytest.approx(cost.model.measured_ms / expected[1])
    resumed = LatencyCost(cost.candidate, TARGET, "int8", times=LayerTimes(1), record=cost.record)
    for name in ("measure_latency", "latency_parts"):  # would fail if they were called
        monkeypatch.setattr(latency_model, name, None)
    monkeypatch.setattr("deploykit.measure.layer_times._measure", None)
    assert (resumed.predict(widths), resumed.measure(narrow), resumed.measure(narrow, ["c1"])) == (
        expected
    )
    assert json.loads(cost.record.read_text())["schema"] == 1


@pytest.mark.parametrize(("interval", "known"), [((0.965, 1.002), 0.965), ((1.2, 1.4), 1.3)])
def test_candidate_is_judged_by_what_the_rounds_have_shown(cost, monkeypatch, interval, known):
    asked = []

    def measured(models, *, threads, **how):
        asked.append(how["precision"])
        return {
            name: {"1": Latency(1, 1, sum(interval) / 2, interval, 9, 1, 0.02)} for name in models
        }

    monkeypatch.setattr(latency_model, "measure_latency", measured)
    monkeypatch.setattr(LatencyCost, "_ship", lambda *_: None)
    assert cost.compare(cost.candidate) == pytest.approx(known)
    assert cost.speedup(settled(plain()), ["c1"]) == pytest.approx(sum(interval) / 2)
    assert asked == [latency_model.JUDGED_PRECISION, latency_model.PRECISION]


def test_candidates_of_another_shape_are_measured_on_their_own(cost, monkeypatch):
    measured = iter([1.5, 1.2])
    one = replace(cost.candidate, stage="prune")
    monkeypatch.setattr(LatencyCost, "_beside", lambda *_: SimpleNamespace(shown=next(measured)))
    narrow = settled(plain())
    narrow.c2 = nn.Conv2d(8, 4, 3)
    asked = [one, one, replace(one, module=narrow)]
    assert [cost.compare(candidate) for candidate in asked] == [1.5, 1.5, 1.2]


@pytest.mark.slow
def test_whole_model_is_not_timed_against_itself(cost):
    assert cost.measure(cost.candidate.module) == cost.model.measured_ms


@pytest.mark.slow
def test_layers_that_ship_in_float_are_timed_in_float(cost):
    cost.keep_float = ("c2",)
    kinds = {layer: shape.precision for layer, shape in cost.model.shapes.items()}
    assert (kinds["c1"], kinds["c2"]) == ("uint8", "float32")
    assert cost.speedup(settled(plain()), ["c2.gone"]) > 0


@pytest.mark.slow
def test_record_keeps_what_an_earlier_trial_asked(cost):
    cost.predict({"c1": {**cost.model.widths["c1"], "out_channels": 4}})
    cost.speedup(settled(plain()))
    before = json.loads(cost.record.read_text())["layers"]
    later = LatencyCost(cost.candidate, TARGET, "int8", times=LayerTimes(1), record=cost.record)
    later.speedup(settled(plain()), ["another"])
    assert json.loads(cost.record.read_text())["layers"].keys() >= before.keys()


class Windows(nn.Module):
    """A layer that sees windows of each image, and one that is called for two sizes."""

    def __init__(self):
        super().__init__()
        self.conv, self.qkv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x):
        windows = x.reshape(len(x), 3, -1, 4).permute(0, 2, 3, 1).flatten(0, 1)
        seen = self.qkv(windows).reshape(len(x), -1, 8).mean(1)
        return self.fc(seen + self.conv(x).mean((2, 3)) + self.conv(x[..., ::2, ::2]).mean((2, 3)))


def test_what_a_sample_goes_through_several_times_is_counted_so():
    example = torch.randn(2, 3, 12, 12)
    shapes = layer_shapes(Windows(), example)
    assert (shapes["qkv"].size, shapes["qkv"].calls) == ((4,), 36)
    assert shapes["conv"].size == (12, 12)
    assert sum(shape.macs for shape in shapes.values()) == count_macs(Windows(), example)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(input=x.mean((1, 2)))


def test_layers_that_are_called_by_keyword_are_seen():
    assert layer_shapes(Keyword(), torch.randn(2, 3, 12, 12))["fc"].outputs == 5
