"""Models from elsewhere become bundles that answer what they answered."""

import json
import re
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tiny_foreign import (
    CLASSES,
    RECIPE,
    classifier,
    data_file,
    digits,
    floats,
    model_of,
    normalized,
    run,
    saved,
)

from deploykit import runtime
from deploykit.bundle import load_bundle, verify_bundle
from deploykit.errors import (
    BudgetError,
    BundleError,
    CompressionError,
    DataError,
    ExportError,
    ModelError,
    RecipeError,
    UsageError,
    VerificationError,
)
from deploykit.foreign import integers, making
from deploykit.foreign.border import layout_of, read_border, tidy, without_softmax
from deploykit.foreign.export import export_foreign
from deploykit.foreign.pixels import Normalization, take_pixels
from deploykit.measure import measure_latency
from deploykit.measure.latency import Latency
from deploykit.runtime import detect_cpu
from deploykit.targets import TARGETS, about_integers, why_not_here

HERE = TARGETS[detect_cpu()]
METHODS = integers.METHODS
NET = classifier()
PREPROCESS = {"channels": 1, "mean": [0.5], "std": [0.5]}


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch):
    """Measure in no time; no test asks how good the figures are."""
    quick = partial(measure_latency, seconds_per_model=0.02)
    monkeypatch.setattr("deploykit.foreign.making.measure_latency", quick)
    monkeypatch.setattr("deploykit.foreign.export.peak_memory_bytes", lambda *_: 2**20)
    monkeypatch.setattr(integers, "METHODS", {"minmax": METHODS["minmax"]})


@pytest.fixture
def paying(monkeypatch):
    """Let integers be twice as fast, or half, whatever this machine finds."""

    def set_ratio(ratio):
        def measure(models, **_):
            return {
                name: {
                    batch: Latency(1.0, 1.0, by, (by * 0.99, by * 1.01), 10, 1, 0.02)
                    for batch in ("1", "32")
                }
                for name in models
                for by in [1.0 if name == "fp32" else ratio]
            }

        monkeypatch.setattr("deploykit.foreign.making.measure_latency", measure)

    return set_ratio


class Told:
    """Keeps what progress is told."""

    def __init__(self):
        self.sentences = []

    def message(self, text):
        self.sentences.append(text)


def exported(tmp_path, model=NET, name="net.onnx", **options):
    out = tmp_path / "bundle"
    if "data" not in options:
        options["data"] = data_file(tmp_path)
    options = {"quantize": "none", **options}
    assert export_foreign(saved(tmp_path, model, name), out, **options) == out
    return out, verify_bundle(out)


def operators(out):
    return [node.op_type for node in onnx.load(out / "model.onnx").graph.node]


def answers_of(bundle, split):
    samples = split.load(np.arange(len(split)))
    return load_bundle(bundle).predict(list(samples)).logits


# What ships of the floats


def test_a_bundle_answers_as_the_file_did(tmp_path):
    out, manifest = exported(tmp_path)
    split = digits().validation
    expected = run(NET, normalized(split.load(np.arange(len(split))), digits().preprocess))
    np.testing.assert_allclose(answers_of(out, split), expected, atol=1e-4)
    assert manifest["inputs"] == [{"name": "image", "dtype": "uint8", "shape": [-1, 8, 8, 1]}]
    assert manifest["labels"] == [str(digit) for digit in range(10)]
    assert manifest["measured"]["accuracy"] > 0.8
    assert manifest["measured"]["parity"]["agreement"] == 1.0
    assert manifest["measured"]["precision"] == "fp32"
    assert manifest["measured_on"] is not None
    assert (manifest["name"], manifest["target"]) == ("net", HERE.name)


def test_equal_files_give_equal_bundles(tmp_path, paying):
    paying(2.0)
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _, manifest = exported(tmp_path / name, quantize="ptq")
        digests.append(manifest["files"]["model.onnx"])
    assert digests[0] == digests[1]


def test_the_bundle_reads_image_files(tmp_path):
    out, _ = exported(tmp_path)
    golden = sorted((out / "golden").glob("*.png"))
    assert len(golden) == 16
    stored = np.load(out / "golden" / "expected.npz")["outputs"]
    answered = load_bundle(out).predict(golden).logits
    np.testing.assert_allclose(answered, stored, atol=1e-4)


def test_a_tampered_bundle_is_refused(tmp_path):
    out, _ = exported(tmp_path)
    model = out / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleError, match="differs from its manifest"):
        verify_bundle(out)


def test_an_input_of_channels_last_is_taken_as_it_is(tmp_path):
    front = [helper.make_node("Transpose", ["raw"], ["x"], "turn", perm=[0, 3, 1, 2])]
    model = classifier(front=front, taken="raw", taken_shape=(8, 8, 1))
    out, manifest = exported(tmp_path, model)
    assert manifest["measured"]["parity"]["agreement"] == 1.0
    assert operators(out)[0] == "DequantizeLinear"


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_a_model_of_pixels_is_taken_as_it_is(tmp_path, layout):
    turn = [0, 3, 1, 2] if layout == "nhwc" else [0, 1, 2, 3]
    shape = [8, 8, 1] if layout == "nhwc" else [1, 8, 8]
    model = classifier(
        front=[
            helper.make_node("Transpose", ["pixels"], ["turned"], perm=turn),
            helper.make_node("Cast", ["turned"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["cast", "middle"], ["centred"]),
            helper.make_node("Div", ["centred", "middle"], ["x"]),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(127.5), "middle"))
    image = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", *shape])
    model.graph.input[0].CopyFrom(image)
    out, manifest = exported(tmp_path, model)
    assert manifest["inputs"][0]["shape"] == [-1, 8, 8, 1]
    assert manifest["measured"]["accuracy"] > 0.8
    assert manifest["preprocess"]["mean"] == [0.0]
    assert "DequantizeLinear" not in operators(out)


ARRAYS = """\
task: classification
data: {source: digits, limit: 600, validation: 0.25, test: 0.15}
"""


def test_arrays_are_fed_as_they_are(tmp_path):
    random = np.random.default_rng(0)
    model = model_of(
        [helper.make_node("Gemm", ["x", "w"], ["y"])],
        [numpy_helper.from_array(random.normal(size=(64, CLASSES)).astype(np.float32), "w")],
        [floats("x", "n", 64)],
        [floats("y", "n", CLASSES)],
    )
    out, manifest = exported(tmp_path, model, data=data_file(tmp_path, ARRAYS))
    assert manifest["preprocess"] is None
    assert manifest["task"] == "classification"
    assert manifest["inputs"] == [{"name": "x", "dtype": "float32", "shape": [-1, 64]}]
    assert operators(out) == ["Gemm"]


def test_a_softmax_at_the_end_goes(tmp_path):
    model = classifier(last="Softmax")
    out, manifest = exported(tmp_path, model)
    split = digits().validation
    expected = run(model, normalized(split.load(np.arange(len(split))), digits().preprocess))
    probabilities = load_bundle(out).predict(list(split.load(np.arange(len(split))))).probabilities
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    assert "Softmax" not in operators(out)
    assert manifest["measured"]["source"]["softmax_removed"] is True


def test_probabilities_that_stay_are_told(tmp_path):
    model = classifier(last="Softmax")
    model.graph.node[-1].output[0] = "probabilities"
    model.graph.node.append(helper.make_node("Abs", ["probabilities"], ["logits"]))
    told = Told()
    exported(tmp_path, model, progress=told)
    assert any("look like probabilities already" in one for one in told.sentences)


def test_softmax_over_another_axis_stays():
    model = classifier(last="Softmax")
    model.graph.node[-1].attribute[0].i = 0
    assert without_softmax(model) is None
    assert without_softmax(NET) is None


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_becomes_dynamic(tmp_path, batch):
    _, manifest = exported(tmp_path, classifier(batch=batch))
    assert manifest["inputs"][0]["shape"][0] == -1
    assert manifest["measured"]["source"]["fixed_batch"] == batch


def test_old_files_are_lifted(tmp_path):
    model = classifier(opset=9, ir_version=3)
    for tensor in model.graph.initializer:  # which IR 3 lists among the inputs
        model.graph.input.append(floats(tensor.name, *tensor.dims))
    out, manifest = exported(tmp_path, model, quantize="ptq")
    assert manifest["opset"] >= 13
    assert len(onnx.load(out / "model.onnx").graph.input) == 1


def test_images_are_resized_to_the_model(tmp_path):
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for label in ("dark", "light"):
        (folder / label).mkdir(parents=True)
        for place in range(12):
            level = random.integers(0, 90) + (150 if label == "light" else 0)
            pixels = np.full((20, 30, 3), level, np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{place}.png")
    model = model_of(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        [numpy_helper.from_array(np.array([[-1, 1]] * 3, np.float32), "w")],
        [floats("x", "n", 3, 16, 16)],
        [floats("y", "n", 2)],
    )
    _, manifest = exported(tmp_path, model, data=folder)
    assert manifest["inputs"][0]["shape"] == [-1, 16, 16, 3]
    assert manifest["labels"] == ["dark", "light"]
    assert manifest["measured"]["accuracy"] == 1.0


def test_sizes_that_the_file_leaves_open_are_those_of_the_data(tmp_path):
    _, manifest = exported(tmp_path, classifier(taken_shape=(1, "h", "w")))
    assert manifest["inputs"][0]["shape"] == [-1, 8, 8, 1]


# Integers and halves


def test_integers_ship_where_they_pay(tmp_path, paying, monkeypatch):
    monkeypatch.setattr(integers, "METHODS", METHODS)
    paying(2.0)
    told = Told()
    _, manifest = exported(tmp_path, quantize="auto", progress=told)
    measured = manifest["measured"]
    assert measured["precision"] == "int8"
    assert measured["accuracy"] > measured["baseline_accuracy"] - 0.05
    assert measured["size_bytes"] < 0.6 * measured["baseline_size_bytes"]
    assert measured["kernels"]["agreement"] >= 0.98
    assert measured["methods_tried"] == 3
    assert HERE.name in manifest["verified_on"]["targets"]
    assert any(one.startswith("int8 ships") for one in told.sentences)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_integers_that_are_not_faster_stay_behind(tmp_path, paying, ratio):
    paying(ratio)
    _, manifest = exported(tmp_path, quantize="auto")
    assert manifest["measured"]["precision"] == "fp32"
    assert "does not pay" in manifest["measured"]["decision"]


def test_integers_that_were_asked_for_ship_however_fast(tmp_path, paying):
    paying(0.5)
    _, manifest = exported(tmp_path, quantize="ptq")
    assert manifest["measured"]["precision"] == "int8"


def test_browsers_get_integers_that_this_cpu_can_prove(tmp_path):
    out, manifest = exported(tmp_path, quantize="ptq", target="web")
    assert (manifest["target"], "index.html" in manifest["files"]) == ("web", True)
    assert {HERE.name, "web"} <= set(manifest["verified_on"]["targets"])
    assert about_integers(TARGETS["web"]) in manifest["measured"]["decision"]
    assert verify_bundle(out) == manifest


def coarse(monkeypatch):
    """Make integers cost half of the accuracy."""
    from deploykit.foreign import making

    evaluate = making.evaluate_onnx

    def worse(model, split, **how):
        found = evaluate(model, split, **how)
        if "fp32" not in model.path.name:
            found.correct[::2] = False
        return found

    monkeypatch.setattr(making, "evaluate_onnx", worse)


def test_integers_that_cost_accuracy_stay_behind(tmp_path, paying, monkeypatch):
    paying(2.0)
    coarse(monkeypatch)
    _, manifest = exported(tmp_path, quantize="auto")
    assert manifest["measured"]["precision"] == "fp32"


def test_integers_that_were_asked_for_and_cost_accuracy_are_refused(tmp_path, monkeypatch):
    coarse(monkeypatch)
    with pytest.raises(BudgetError, match="--max-drop"):
        exported(tmp_path, quantize="ptq")
    assert not (tmp_path / "bundle").exists()


def test_pixels_go_into_the_first_integer_layer_as_they_come(tmp_path, paying):
    paying(2.0)
    out, _ = exported(tmp_path, quantize="ptq")
    graph = onnx.load(out / "model.onnx").graph
    assert [node.op_type for node in graph.node[:2]].count("QuantizeLinear") == 0
    readers = [node for node in graph.node if "image_turned" in node.input]
    assert readers
    assert {node.op_type for node in readers} == {"DequantizeLinear"}


def test_integer_layers_are_fused(tmp_path, paying):
    from deploykit.artifacts import OnnxModel, Signature
    from deploykit.fusion import fused_operators

    paying(2.0)
    out, manifest = exported(tmp_path, quantize="ptq")
    model = OnnxModel(out / "model.onnx", Signature.from_json(manifest), manifest["opset"])
    report = fused_operators(model, 1)
    assert len(report.integer) == 3
    assert report.floating == ()


def test_kernels_that_answer_otherwise_than_their_floats_are_refused(tmp_path, monkeypatch):
    from deploykit.foreign import making

    turn = iter([0.0, 50.0])
    real = making.answers

    def off(session, split, count):
        found = real(session, split, count)
        return found + next(turn) * np.arange(found.shape[1])

    monkeypatch.setattr(making, "_proven", partial(_proven_plainly, making))
    monkeypatch.setattr(making, "answers", off)
    with pytest.raises(VerificationError, match="integer kernels with the floats"):
        exported(tmp_path, quantize="ptq")


def _proven_plainly(making, foreign, precision, model, held_to, allowed):
    split = foreign.dataset.validation
    nothing = np.eye(2, dtype=np.float32)
    agreement = making.compare("nothing", nothing, nothing, held_to)
    validation = making.evaluate_onnx(model, split, threads=1)
    return making.Made(precision, model, validation, agreement, allowed)


def test_a_model_without_layers_for_integers(tmp_path):
    model = model_of(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("ReduceSum", ["flat", "axes"], ["sum"], keepdims=1),
            helper.make_node("Sin", ["sum"], ["wave"]),
            helper.make_node("Where", ["yes", "wave", "sum"], ["a"]),
            helper.make_node("Tile", ["a", "times"], ["logits"]),
        ],
        [
            numpy_helper.from_array(np.array([1]), "axes"),
            numpy_helper.from_array(np.array([True]), "yes"),
            numpy_helper.from_array(np.array([1, CLASSES]), "times"),
        ],
        [floats("x", "n", 1, 8, 8)],
        [floats("logits", "n", CLASSES)],
    )
    _, manifest = exported(tmp_path, model, quantize="auto")
    assert manifest["measured"]["precision"] == "fp32"
    with pytest.raises(CompressionError, match="--quantize none"):
        exported(tmp_path, model, quantize="ptq", force=True)


def test_halves_ship_for_gpus(tmp_path):
    out, manifest = exported(tmp_path, quantize="auto", target="cuda")
    kinds = {tensor.data_type for tensor in onnx.load(out / "model.onnx").graph.initializer}
    assert manifest["measured"]["precision"] == "fp16"
    assert TensorProto.FLOAT not in kinds
    assert manifest["inputs"][0]["dtype"] == "uint8"
    if why_not_here(TARGETS["cuda"]):
        assert manifest["measured"]["latency_ms"] == {"1": None, "32": None}
        assert manifest["measured_on"] is None


def test_weights_of_two_bytes_ship_where_they_are_asked_for(tmp_path):
    _, whole = exported(tmp_path, quantize="none")
    _, manifest = exported(tmp_path, quantize="fp16-weights", force=True)
    assert manifest["measured"]["precision"] == "fp16-weights"
    assert set(TARGETS) == set(manifest["verified_on"]["targets"])
    size, halved = (one["files"]["model.onnx"]["bytes"] for one in (whole, manifest))
    assert halved < 0.6 * size


def integers_of(target):
    """What another's quantizer would have made of the net."""
    train = digits().train
    samples = normalized(train.load(np.arange(64)), digits().preprocess)
    batches = integers.Batches("x", lambda places: samples[places], len(samples))
    (proto,) = integers.quantized(NET, lambda: batches, target, None).values()
    return proto


def test_integers_that_come_with_the_file_ship_as_they_are(tmp_path):
    told = Told()
    _, manifest = exported(tmp_path, integers_of(HERE), quantize="auto", progress=told)
    measured = manifest["measured"]
    assert measured["precision"] == "int8"
    assert measured["kernels"]["max_steps"] <= 8
    assert manifest["verified_on"]["targets"] == [HERE.name]
    assert any("as the file was given" in one for one in told.sentences)


@pytest.mark.parametrize(
    "options",
    [{"quantize": "ptq"}, {"quantize": "fp16-weights"}, {"target": "cuda", "quantize": "auto"}],
)
def test_integers_that_come_with_the_file_become_nothing_else(tmp_path, options):
    with pytest.raises(CompressionError, match="holds integers already; give the float file"):
        exported(tmp_path, integers_of(HERE), **options)


def test_integers_that_come_with_the_file_and_overflow_here_are_refused(tmp_path, monkeypatch):
    true_compare = making.compare

    def compare(between, expected, answered, held_to):
        off = 1.0 if "kernels" in between else 0.0
        return true_compare(between, expected, answered + off * np.ptp(expected), held_to)

    monkeypatch.setattr(making, "compare", compare)
    with pytest.raises(VerificationError, match="give the float file"):
        exported(tmp_path, integers_of(HERE), quantize="none")


def test_a_name_inside_a_branch_does_not_meet_the_pixels(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["image"])],
        "branch",
        [],
        [floats("image", "n", 1, 8, 8)],
    )
    front = [helper.make_node("If", ["yes"], ["x0"], then_branch=branch, else_branch=branch)]
    model = classifier(front=front)
    model.graph.node[1].input[0] = "x0"
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    exported(tmp_path, model)


def test_a_file_that_no_converter_can_write_is_told(tmp_path, monkeypatch):
    def stumble(*_):
        raise RuntimeError("so")

    monkeypatch.setattr("deploykit.foreign.intake.convert_floats", stumble)
    with pytest.raises(ExportError, match=r"net\.onnx: cannot be written in fp32: so; ship"):
        exported(tmp_path)


def test_values_too_large_for_halves_are_refused(tmp_path):
    model = onnx.ModelProto.FromString(NET.SerializeToString())
    for tensor in model.graph.initializer:
        factor = {"w2": 1e6, "b2": 1e6, "w3": 1e-6}.get(tensor.name, 1)
        values = numpy_helper.to_array(tensor) * np.float32(factor)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(VerificationError, match=r"below 65504, got .* Conv 'conv2', which"):
        exported(tmp_path, model, target="cuda", quantize="auto")


def test_integers_for_tensorrt_are_signed_and_symmetric():
    proto = integers_of(TARGETS["tensorrt"])
    constants = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    zeros = [
        constants[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"
    ]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert constants["b1"].dtype == np.float32


# What is refused


def test_ptq_for_a_target_of_halves_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no integer kernels"):
        exported(tmp_path, quantize="ptq", target="cuda")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantize": "qat"}, "--quantize: expected auto, ptq, fp16-weights, none, got"),
        ({"layout": "hwcn"}, "--layout: expected nchw or nhwc"),
        ({"max_drop": 2}, "--max-drop"),
        ({"version": "a b"}, "version: expected"),
        ({"name": "Ü"}, "--name: expected"),
        ({"target": "abacus"}, "target: expected one of"),
    ],
)
def test_words_that_are_none_are_refused_before_any_work(tmp_path, options, match):
    with pytest.raises(UsageError, match=match):
        export_foreign(tmp_path / "none.onnx", tmp_path / "out", **{"data": "digits", **options})


def test_a_file_that_is_no_model_leaves_nothing(tmp_path):
    with pytest.raises(ModelError, match=r"net.onnx: expected an ONNX file"):
        exported(tmp_path, b"\x00" * 100)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_that_stands_is_kept_unless_forced(tmp_path):
    _, before = exported(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        exported(tmp_path)
    _, after = exported(tmp_path, force=True, version="2")
    assert (before["version"], after["version"]) == ("1", "2")


def test_other_classes_are_refused(tmp_path):
    text = RECIPE.replace("limit: 600", "limit: 600, classes: [a, b]")
    with pytest.raises(DataError):
        exported(tmp_path, data=data_file(tmp_path, text))
    model = model_of(
        [helper.make_node("Flatten", ["x"], ["y"])],
        [],
        [floats("x", "n", 1, 8, 8)],
        [floats("y", "n", 64)],
    )
    with pytest.raises(DataError, match=r"expected 64 classes, which .* tells apart, got 10"):
        exported(tmp_path, model)


def test_another_size_is_refused(tmp_path):
    text = RECIPE.replace("limit: 600", "limit: 600, size: [10, 10]")
    with pytest.raises(DataError, match=r"expected samples of shape \(1, 8, 8\)"):
        exported(tmp_path, data=data_file(tmp_path, text))


def test_faults_of_the_data_file_are_told_with_their_line(tmp_path):
    with pytest.raises(RecipeError, match=r"data.yaml:1: data.sauce: unknown key"):
        exported(tmp_path, data=data_file(tmp_path, "data: {source: digits, sauce: 1}\n"))


@pytest.mark.parametrize("text", ["data: {source: digits, limit: 600}\n", RECIPE])
def test_a_file_of_data_alone_is_enough(tmp_path, text):
    _, manifest = exported(tmp_path, data=data_file(tmp_path, text))
    assert manifest["task"] == "image-classification"


def test_a_float_model_that_answers_otherwise_is_refused(tmp_path, monkeypatch):
    from deploykit.foreign import intake

    monkeypatch.setattr(intake, "take_pixels", partial(_negated, take_pixels))
    with pytest.raises(VerificationError, match="fp32 with the file as given"):
        exported(tmp_path)


def _negated(real, proto, *more, **how):
    grafted = real(proto, *more, **how)
    for tensor in grafted.graph.initializer:
        if tensor.name == "image_scale":
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return grafted


# The command


def test_how_many_the_file_answers_right_is_told_at_once(tmp_path):
    told = Told()
    exported(tmp_path, progress=told)
    said = r"as given: \d+\.\d\d% right of \d+ validation samples"
    assert re.match(said, told.sentences[0])


def test_the_command_makes_a_bundle(tmp_path, deploykit):
    path, out = saved(tmp_path, NET), tmp_path / "bundle"
    data = data_file(tmp_path)
    done = deploykit("export", path, "--data", data, "--quantize", "none", "--out", out)
    assert done.code == 0, done.err
    assert "fp32 ships" in done.err
    assert deploykit("verify", out).code == 0
    golden = sorted((out / "golden").glob("*.png"))[0]
    assert deploykit("predict", out, golden).code == 0


@pytest.mark.parametrize(
    ("content", "data", "code"),
    [(b"\x00", "digits", 3), (b"\x00", "none.yaml", 3), (None, "digits", 3)],
)
def test_the_command_refuses_in_one_sentence(tmp_path, deploykit, content, data, code):
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    done = deploykit("export", path, "--data", data, "--out", tmp_path / "bundle")
    assert done.code == code
    assert done.err.startswith(f"error: {path}: expected an ONNX file")
    assert done.err.count("\n") == 1


# The parts


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [((3, 32, 32), "nchw"), ((32, 32, 3), "nhwc"), ((1, -1, -1), "nchw"), ((-1, -1, 3), "nhwc")],
)
def test_the_axis_of_channels_tells_the_layout(sizes, layout):
    assert layout_of(sizes, None, "net.onnx") == layout


@pytest.mark.parametrize("sizes", [(3, 32, 3), (-1, -1, -1), (5, 32, 32), (1, 1, 1)])
def test_sizes_that_tell_no_layout_ask_for_it(sizes):
    with pytest.raises(ModelError, match="--layout nchw or --layout nhwc"):
        layout_of(sizes, None, "net.onnx")
    assert layout_of(sizes, "nhwc", "net.onnx") == "nhwc"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize(
    "preprocess",
    [
        {"channels": 3, "mean": [0.5], "std": [0.25]},
        {"channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
        {"channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.25]},
    ],
    ids=["one", "by channel", "mean by channel"],
)
def test_normalization_in_front_is_that_of_the_manifest(layout, dequantize, preprocess):
    shape = (3, 5, 4) if layout == "nchw" else (5, 4, 3)
    flatten = helper.make_node("Flatten", ["x"], ["y"])
    model = model_of([flatten], [], [floats("x", "n", *shape)], [floats("y", "n", 60)])
    normalization = Normalization.of(preprocess, layout)
    grafted = take_pixels(model, (5, 4, 3), layout, normalization, dequantize=dequantize)
    onnx.checker.check_model(grafted, full_check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), np.uint8)
    expected = normalization.apply(pixels).reshape(3, -1)
    np.testing.assert_allclose(run(grafted, pixels), expected, rtol=1e-6)


def test_names_of_the_front_do_not_collide():
    front = [helper.make_node("Identity", ["image"], ["x"])]
    model = classifier(front=front, taken="image")
    normalization = Normalization.of(PREPROCESS, "nchw")
    grafted = take_pixels(model, (8, 8, 1), "nchw", normalization, dequantize=True)
    onnx.checker.check_model(grafted, full_check=True)
    assert grafted.graph.input[0].name == "image_"


def test_tidied_models_know_their_sizes():
    model = classifier(taken_shape=(1, "h", "w"))
    tidied = tidy(model, read_border(model), (1, 8, 8), "net.onnx")
    assert read_border(tidied).input.shape == (-1, 1, 8, 8)
    assert model.graph.input[0].type.tensor_type.shape.dim[2].dim_param == "h"


def test_the_manifest_is_json_that_a_person_can_read(tmp_path):
    out, manifest = exported(tmp_path)
    assert json.loads(json.dumps(manifest)) == manifest
    assert "the file as given" in (out / "README.md").read_text()
    contents = runtime.read_bundle(out)[1]
    assert str(tmp_path).encode() not in b"".join(contents.values())
