import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from deploykit.layer_shapes import LayerShape
from deploykit.measure import layer_times as layers
from deploykit.measure.layer_times import REFERENCE, LayerTimes, layer_model
from deploykit.measure.profile import Profiler

CONV = LayerShape("conv", 16, 32, (8, 8), 1, (3, 3), (2, 2), (1, 1), (1, 1))
SHAPES = [
    CONV,
    replace(CONV, inputs=32, groups=32),
    replace(CONV, kind="transposed", kernel=(2, 2), padding=(0, 0)),
    LayerShape("linear", 24, 10),
    LayerShape("linear", 24, 10, (7,)),
]


@pytest.mark.parametrize("precision", ["float32", "uint8", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.kind}{shape.groups}")
def test_every_layer_becomes_a_model_that_runs(shape, precision):
    shape = replace(shape, precision=precision)
    session = onnxruntime.InferenceSession(layer_model(shape))
    feed = layers._feed(shape)
    (answer,) = session.run(None, feed)
    assert answer.dtype == precision
    assert answer.shape[-1 if shape.kind == "linear" else 1] == shape.outputs


@pytest.mark.parametrize(("precision", "operator"), [("float32", "Conv"), ("uint8", "QLinearConv")])
def test_layer_is_timed_as_the_kernel_that_ships(precision, operator):
    shape = replace(CONV, precision=precision)
    profiler = Profiler(layer_model(shape), layers._feed(shape), threads=1)
    profiler.run(2)
    assert operator in {name for _, name in profiler.finish()}


def test_macs_are_counted_by_hand():
    assert CONV.macs == 16 * 32 * 9 * 4 * 4
    assert replace(CONV, inputs=32, groups=32).macs == 32 * 9 * 4 * 4
    assert LayerShape("linear", 24, 10, (7,)).macs == 24 * 10 * 7


def test_larger_layers_cost_more():
    large = replace(REFERENCE, outputs=256)
    found = LayerTimes(threads=1).ask([REFERENCE, large])
    assert found[large] > 3 * found[REFERENCE] > 0


@pytest.fixture
def counted(monkeypatch):
    """Costs that are made up, and a count of what was measured."""
    asked = []

    def measure(shapes, threads):
        asked.extend(shapes)
        return {shape.key: float(shape.outputs) for shape in shapes}

    monkeypatch.setattr(layers, "_measure", measure)
    return asked


def test_what_was_measured_is_not_measured_again(tmp_path, counted):
    first = LayerTimes.open(tmp_path, threads=1)
    assert first.ask([CONV, CONV])[CONV] == 32
    assert first.measured == 1
    again = LayerTimes.open(tmp_path, threads=1)
    assert again.ask([CONV]) == first.ask([CONV])
    assert again.measured == 0
    assert counted == [CONV]
    assert LayerTimes.open(tmp_path, threads=2).costs == {}


def test_tables_of_two_processes_are_joined(tmp_path, counted):
    one, other = (LayerTimes.open(tmp_path, threads=1) for _ in range(2))
    one.ask([CONV])
    other.ask([REFERENCE])
    assert len(LayerTimes.open(tmp_path, threads=1).costs) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"costs": 3}', '{"costs": {"a": "b"}}'])
def test_damaged_table_counts_as_none(tmp_path, counted, text):
    LayerTimes.open(tmp_path, threads=1).ask([CONV])
    (file,) = tmp_path.glob("*.json")
    file.write_text(text)
    assert LayerTimes.open(tmp_path, threads=1).costs == {}


def test_table_is_plain_json(tmp_path, counted):
    LayerTimes.open(tmp_path, threads=1).ask([CONV])
    (file,) = tmp_path.glob("*.json")
    (key,) = json.loads(file.read_text())["costs"]
    assert json.loads(key)["outputs"] == 32
    assert np.isfinite(list(json.loads(file.read_text())["costs"].values())).all()


def test_table_that_cannot_be_kept_still_answers(tmp_path, counted):
    (tmp_path / "file").write_text("no folder")
    times = LayerTimes.open(tmp_path / "file" / "cache", threads=1)
    assert times.ask([CONV]) == {CONV: 32.0}
