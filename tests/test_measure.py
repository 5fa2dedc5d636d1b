import gc
import json
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_quantized import CHANNELS, SIDE, TARGET, candidate_of, images, plain, settled
from torch import nn

from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.environment import environment
from deploykit.errors import DataError, MissingDependency, ModelError, VerificationError
from deploykit.exporter import export_onnx
from deploykit.measure import (
    Latency,
    count_macs,
    count_parameters,
    evaluate_onnx,
    latency,
    measure_latency,
    measure_normalization,
    peak_memory_bytes,
    size_bytes,
)
from deploykit.measure.normalization import without_normalization
from deploykit.measure.session import example_feed, open_model
from deploykit.quantize import calibrate
from deploykit.targets import TARGETS


def save_linear(path, weight, repeats=1):
    """Write ``y = x @ weight``; ``repeats`` more square products make it slower."""
    features, classes = weight.shape
    square = np.eye(features, dtype=np.float32)
    constants = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    constants += [numpy_helper.from_array(square + i, f"s{i}") for i in range(repeats - 1)]
    tensors = ["x", *(f"t{i}" for i in range(repeats - 1))]
    nodes = [
        helper.make_node("MatMul", [before, f"s{i}"], [after])
        for i, (before, after) in enumerate(pairwise(tensors))
    ]
    nodes.append(helper.make_node("MatMul", [tensors[-1], "w"], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", features])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    inputs = (TensorSpec("x", "float32", (-1, features)),)
    return OnnxModel(
        path, Signature(inputs, (TensorSpec("y", "float32", (-1, classes)),)), opset=20
    )


@dataclass
class Samples:
    """A split that notes how it was read."""

    x: np.ndarray
    labels: np.ndarray
    name: str = "validation"

    def __post_init__(self):
        self.batches = []

    def __len__(self):
        return len(self.labels)

    def load(self, indices):
        self.batches.append(len(indices))
        return self.x[indices]


@pytest.fixture
def identity(tmp_path):
    """A model whose answer is the place of its largest input."""
    return save_linear(tmp_path / "identity.onnx", np.eye(3))


def one_hot(predictions, labels):
    return Samples(np.eye(3, dtype=np.float32)[predictions], np.array(labels))


def test_evaluation_counts_what_the_model_answers(identity):
    found = evaluate_onnx(identity, one_hot([0, 1, 1, 0], [0, 1, 0, 0]), threads=1)
    assert found.predictions.tolist() == [0, 1, 1, 0]
    assert found.correct.tolist() == [True, True, False, True]
    assert found.accuracy == 0.75
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found.class_accuracy == (pytest.approx(2 / 3), 1.0, None)
    assert found.interval[0] < 0.75 < found.interval[1]
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 100])
def test_evaluation_streams_and_does_not_depend_on_the_batch_size(identity, batch_size):
    answers = np.random.default_rng(0).integers(0, 3, 10)
    split = one_hot(answers, np.zeros(10, dtype=np.int64))
    found = evaluate_onnx(identity, split, threads=1, batch_size=batch_size)
    assert found.predictions.tolist() == answers.tolist()
    assert found.predictions.dtype == np.int64
    assert max(split.batches) <= batch_size
    assert sum(split.batches) == 10


def test_evaluation_refuses_an_empty_split(identity):
    with pytest.raises(DataError, match="validation: expected at least one sample"):
        evaluate_onnx(identity, one_hot([], np.zeros(0, dtype=np.int64)), threads=1)


@pytest.mark.parametrize("label", [-1, 3])
def test_evaluation_refuses_labels_that_the_model_does_not_know(identity, label):
    with pytest.raises(DataError, match="validation, sample 1: expected a label below 3"):
        evaluate_onnx(identity, one_hot([0, 1], [0, label]), threads=1)


def test_evaluation_refuses_answers_that_are_no_numbers(tmp_path):
    model = save_linear(tmp_path / "broken.onnx", np.full((3, 3), np.nan))
    with pytest.raises(VerificationError, match=r"broken\.onnx: validation samples 0 to 1"):
        evaluate_onnx(model, one_hot([0, 1], [0, 1]), threads=1)


def test_a_missing_or_damaged_model_is_named(identity):
    with pytest.raises(ModelError, match=r"no\.onnx"):
        open_model(OnnxModel(identity.path.with_name("no.onnx"), identity.signature, 20), 1)
    identity.path.write_bytes(identity.path.read_bytes()[:40])
    with pytest.raises(ModelError, match=r"identity\.onnx"):
        open_model(identity, 1)


def test_a_provider_that_is_not_installed_is_named(identity):
    with pytest.raises(MissingDependency, match="NoSuchExecutionProvider"):
        open_model(identity, 1, replace(TARGETS["cuda"], providers=("NoSuchExecutionProvider",)))


def test_example_inputs_follow_the_signature_and_are_always_the_same():
    inputs = (TensorSpec("x", "uint8", (-1, 4, 4, 3)), TensorSpec("z", "float32", (-1, 5)))
    model = OnnxModel("unused", Signature(inputs, ()), 20)
    feed = example_feed(model, 7)
    assert {name: (value.dtype, value.shape) for name, value in feed.items()} == {
        "x": (np.uint8, (7, 4, 4, 3)),
        "z": (np.float32, (7, 5)),
    }
    assert feed["x"].max() > 250
    assert all(np.array_equal(value, feed[name]) for name, value in example_feed(model, 7).items())


class Machine:
    """A clock and models that advance it; stands in for the time module and for sessions."""

    def __init__(self, slowdown):
        self.now, self.slowdown, self.order = 0.0, slowdown, []

    def perf_counter(self):
        return self.now

    def session(self, name, seconds):
        machine = self

        class Session:
            def run(self, _outputs, _feed):
                machine.order.append(name)
                machine.now += seconds * machine.slowdown(machine.now)

        return Session()


@pytest.fixture
def simulate(monkeypatch, identity):
    def simulate(slowdown, seconds, **options):
        machine = Machine(slowdown)
        models = {name: OnnxModel(name, identity.signature, 20) for name in seconds}
        monkeypatch.setattr(latency, "time", machine)
        monkeypatch.setattr(
            latency,
            "open_model",
            lambda model, *_: machine.session(model.path, seconds[model.path]),
        )
        options = {"batch_sizes": (1,), "threads": 1, "baseline": "slow", **options}
        return measure_latency(models, **options), machine

    return simulate


def drift(now):
    """A machine that becomes three times slower within the first half second."""
    return 1 + min(2.0, 4 * now)


def test_a_machine_that_slows_down_does_not_change_the_ratio(simulate):
    measured, _ = simulate(drift, {"slow": 0.002, "fast": 0.001})
    assert measured["fast"]["1"].ratio == pytest.approx(2, rel=0.05)
    assert measured["fast"]["1"].verdict == "faster"


def test_one_model_after_the_other_would_have_measured_the_drift():
    machine = Machine(drift)
    spent = {}
    for name, seconds in (("slow", 0.002), ("fast", 0.001)):
        session, start = machine.session(name, seconds), machine.now
        for _ in range(200):
            session.run(None, None)
        spent[name] = machine.now - start
    assert spent["slow"] / spent["fast"] < 1.5


def test_the_baseline_has_ratio_one_and_decides_nothing(simulate):
    measured, _ = simulate(drift, {"slow": 0.002, "fast": 0.001})
    one = measured["slow"]["1"]
    assert (one.ratio, one.interval, one.verdict) == (1, (1, 1), "undecided")


def test_a_slower_model_is_called_slower(simulate):
    measured, _ = simulate(lambda now: 1, {"slow": 0.002, "fast": 0.001}, baseline="fast")
    assert measured["slow"]["1"].verdict == "slower"


@pytest.mark.parametrize("factor", [1.0, 1.015, 0.99])
def test_a_difference_inside_the_margin_is_undecided(simulate, factor):
    measured, _ = simulate(lambda now: 1, {"slow": 0.002 * factor, "same": 0.002})
    assert measured["same"]["1"].verdict == "undecided"


def test_an_interval_that_reaches_the_margin_is_undecided():
    assert make_latency((1.01, 1.3)).verdict == "undecided"
    assert make_latency((0.7, 0.99)).verdict == "undecided"
    assert make_latency((1.03, 1.3)).verdict == "faster"
    assert make_latency((0.7, 0.97)).verdict == "slower"


def make_latency(interval):
    return Latency(1.0, 1.2, sum(interval) / 2, interval, rounds=20, threads=1, margin=0.02)


def test_what_is_shown_of_an_undecided_ratio_is_the_least_that_it_may_be():
    assert make_latency((0.965, 1.002)).shown == 0.965
    assert make_latency((1.1, 1.3)).shown == pytest.approx(1.2)
    assert make_latency((0.7, 0.9)).shown == pytest.approx(0.8)


def test_latency_survives_json():
    value = make_latency((1.01, 1.3))
    assert Latency.from_json(json.loads(json.dumps(value.to_json()))) == value


def test_rounds_end_when_the_ratio_is_precise(simulate):
    measured, machine = simulate(lambda now: 1, {"slow": 0.002, "fast": 0.001})
    assert measured["fast"]["1"].rounds == latency.MIN_ROUNDS
    assert machine.now < 1


def test_rounds_end_when_the_time_is_up(simulate):
    noise = np.random.default_rng(0)
    seconds = {"slow": 0.002, "fast": 0.001}
    measured, machine = simulate(lambda now: noise.lognormal(0, 3), seconds, seconds_per_model=1)
    low, high = measured["fast"]["1"].interval
    assert high - low > 0.04 * measured["fast"]["1"].ratio
    assert measured["fast"]["1"].rounds >= latency.MIN_ROUNDS
    assert machine.now >= 2


def test_rounds_are_enough_for_an_interval_however_slow_the_models(simulate):
    measured, _ = simulate(lambda now: 1, {"slow": 20.0, "fast": 10.0}, seconds_per_model=0.1)
    assert measured["fast"]["1"].rounds == latency.MIN_ROUNDS


def test_models_take_turns_in_an_order_that_changes_but_is_repeatable(simulate):
    seconds = {"slow": 0.01, "fast": 0.01, "third": 0.01}
    orders = [simulate(lambda now: 1, seconds, seed=seed)[1].order for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    rounds = [orders[0][-6 * i - 6 : len(orders[0]) - 6 * i : 2] for i in range(10)]
    assert all(sorted(turn) == ["fast", "slow", "third"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1


def test_every_batch_size_is_a_key(simulate):
    measured, _ = simulate(lambda now: 1, {"slow": 0.002}, batch_sizes=(1, 32))
    assert list(measured["slow"]) == ["1", "32"]


def test_an_unknown_baseline_is_refused(identity):
    with pytest.raises(ValueError, match="baseline: expected one of"):
        measure_latency({"a": identity}, threads=1, baseline="b")


def test_a_real_model_with_more_work_is_slower(tmp_path):
    weight = np.eye(64)
    models = {
        "long": save_linear(tmp_path / "long.onnx", weight, repeats=80),
        "short": save_linear(tmp_path / "short.onnx", weight),
    }
    measured = measure_latency(
        models, threads=1, baseline="long", batch_sizes=(32,), seconds_per_model=0.2
    )
    short, long = measured["short"]["32"], measured["long"]["32"]
    assert short.verdict == "faster"
    assert 0 < short.median_ms <= short.p90_ms
    assert short.median_ms < long.median_ms
    assert gc.isenabled()


def test_peak_memory_grows_with_the_model_and_not_with_the_parent(tmp_path):
    small = save_linear(tmp_path / "small.onnx", np.ones((64, 3)))
    large = save_linear(tmp_path / "large.onnx", np.ones((4096, 2048)))
    ballast = np.ones(100_000_000, dtype=np.uint8)
    peaks = [peak_memory_bytes(model, threads=1) for model in (small, large)]
    assert peaks[0] < 40e6
    assert 30e6 < peaks[1] < 200e6 + ballast[0]


def test_files_beside_the_user_are_not_run(identity, marks):
    assert peak_memory_bytes(identity, threads=1) > 0
    assert list(marks.iterdir()) == []


def test_peak_memory_of_what_is_no_model_is_an_error(identity):
    identity.path.write_bytes(b"")
    with pytest.raises(ModelError, match=r"identity\.onnx: its memory"):
        peak_memory_bytes(identity, threads=1)


def images_model(folder, *, quantized):
    """Write a net of images, in float or in integers."""
    candidate = candidate_of(settled(plain()))
    if quantized:
        candidate = calibrate(candidate, images()[0], target=TARGET)
    return export_onnx(candidate, folder / "model.onnx", name="images")


@pytest.mark.slow
@pytest.mark.parametrize(("quantized", "dtype"), [(False, "float32"), (True, "uint8")])
def test_model_without_normalization_answers_the_same_from_its_first_layer_on(
    tmp_path, quantized, dtype
):
    whole = images_model(tmp_path, quantized=quantized)
    bare = without_normalization(whole, tmp_path / "bare.onnx", threads=1)
    (fed,) = bare.signature.inputs
    assert (fed.dtype, fed.shape) == (dtype, (-1, CHANNELS, SIDE, SIDE))
    pixels = images(4)[0]
    turned = pixels.transpose(0, 3, 1, 2)
    if not quantized:
        turned = ((turned / 255 - 0.5) / 0.25).astype(np.float32)
    (expected,) = open_model(whole, 1).run(None, {"image": pixels})
    (got,) = open_model(bare, 1).run(None, {fed.name: turned})
    # Half a grey level: the zero point of the pixels is a whole number.
    np.testing.assert_allclose(got, expected, atol=0 if quantized else 0.05)


@pytest.mark.slow
def test_cost_of_normalization_is_measured_where_there_is_one(tmp_path):
    found = measure_normalization(
        images_model(tmp_path, quantized=False), threads=1, seconds_per_model=0.1
    )
    assert found["interval"][0] <= found["share"] <= found["interval"][1] < 1


def test_model_of_arrays_has_no_normalization_to_measure(identity):
    assert measure_normalization(identity, threads=1) is None


def test_size_is_that_of_the_file(identity):
    assert size_bytes(identity) == len(identity.path.read_bytes())


@pytest.fixture
def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 10)
    )


def test_macs_are_counted_by_hand(network):
    assert count_macs(network, torch.zeros(2, 3, 4, 4)) == 3 * 9 * 8 * 16 + 8 * 16 * 10


class Query(nn.Module):
    """Attends with a query of its own: a view of a parameter goes into a module."""

    def __init__(self):
        super().__init__()
        self.query, self.project = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.project(self.query.expand(len(x), -1, -1)) @ x.transpose(1, 2)


def test_macs_are_counted_where_a_module_reads_a_view_of_a_parameter():
    assert count_macs(Query(), torch.zeros(2, 6, 4)) == 4 * 4 + 4 * 6


def test_macs_of_attention_that_torch_computes_by_one_operator_are_counted():
    tokens, width, inner = 6, 16, 32
    layer = nn.TransformerEncoderLayer(width, 4, inner, batch_first=True)
    projections, products = 4 * tokens * width**2, 2 * tokens**2 * width
    assert (
        count_macs(nn.TransformerEncoder(layer, 2), torch.zeros(2, tokens, width))
        == 2 * (projections + products + 2 * tokens * width * inner)
    )  # fmt: skip


def test_counting_macs_leaves_the_module_alone(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, torch.randn(1, 3, 4, 4))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_shared_parameters_count_once_and_buffers_not():
    layer = nn.Linear(4, 4)
    assert count_parameters(nn.Sequential(layer, layer, nn.BatchNorm1d(4))) == 20 + 8


def test_environment_names_the_machine_and_the_versions():
    found = environment()
    assert set(found["versions"]) >= {"deploykit", "torch", "torchao", "onnx"}
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["onnxruntime"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    json.dumps(found, allow_nan=False)
