"""Packed weights: the values they were, fewer bytes, and nothing left to decode at run time."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifacts import OnnxModel, Signature
from deploykit.fusion import fused_operators
from deploykit.packing import pack_weights

SHAPES = [(32, 16, 3, 3), (33, 37), (20, 9, 5)]  # 33 * 37 is no multiple of 8


def sparse(shape, kind):
    random = np.random.default_rng(0)
    values = (random.normal(size=shape) * 40).astype(kind)
    values[random.random(shape) < 0.9] = 0
    return values


def shared(shape, kind):
    random = np.random.default_rng(1)
    return np.sort(random.normal(size=16) * 40).astype(kind)[random.integers(0, 16, shape)]


def scaled(shape, kind):
    """Shared values, each channel with a scale of its own."""
    scale = np.linspace(0.5, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (shared(shape, np.float32) * scale).astype(kind)


def scaled_second(shape, kind):
    turned = (shape[1], shape[0], *shape[2:])
    return np.ascontiguousarray(np.swapaxes(scaled(turned, kind), 0, 1))


def both(shape, kind):
    values = shared(shape, kind)
    values[np.random.default_rng(2).random(shape) < 0.8] = 0
    return values


def dense(shape, kind):
    return (np.random.default_rng(3).normal(size=shape) * 40).astype(kind)


def model_of(values):
    """A model that answers with its weight, cast to float."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
        "g",
        [helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
        [numpy_helper.from_array(values, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def session_of(model, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def answer(model, **options):
    return session_of(model, **options).run(None, {"unused": np.zeros(1, np.float32)})[0]


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [sparse, shared, scaled, scaled_second, both])
def test_packed_weight_is_what_it_was(make, shape, kind):
    values = make(shape, kind)
    model = model_of(values)
    pack_weights(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(answer(model), values.astype(np.float32))
    unoptimized = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert np.array_equal(answer(model, level=unoptimized), values.astype(np.float32))


@pytest.mark.parametrize(
    ("make", "kind", "smaller"),
    [
        (sparse, np.float32, 6.0),  # 1 bit a weight, and 32 for a tenth of them
        (sparse, np.int8, 3.0),
        (shared, np.float32, 7.0),  # 4 bits a weight
        (shared, np.int8, 1.8),
        (scaled, np.float32, 6.0),
        (both, np.float32, 10.0),  # 1 bit a weight, and 4 for a fifth of them
    ],
)
def test_packed_weight_takes_its_bits(make, kind, smaller):
    model = model_of(make((64, 64, 3, 3), kind))
    before = model.ByteSize()
    pack_weights(model.graph)
    assert before / model.ByteSize() > smaller


@pytest.mark.parametrize("values", [dense((64, 64), np.float32), sparse((8, 8), np.float32)])
def test_weight_that_would_not_become_smaller_stays_as_it_stands(values):
    model = model_of(values)
    before = model.SerializeToString()
    pack_weights(model.graph)
    assert model.SerializeToString() == before


def test_single_numbers_and_indices_are_left_alone():
    for values in (np.zeros(10_000, np.float32), np.zeros((100, 100), np.int64)):
        model = model_of(values)
        pack_weights(model.graph)
        assert [node.op_type for node in model.graph.node] == ["Cast"]


def convolution(values, *, quantized):
    """A convolution as it ships: float, or integers between pairs."""
    channels = len(values)
    stored = [numpy_helper.from_array(values, "w")]
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    if quantized:
        stored += [
            numpy_helper.from_array(np.full(channels, 0.01, np.float32), "ws"),
            numpy_helper.from_array(np.zeros(channels, np.int8), "wz"),
            numpy_helper.from_array(np.float32(0.02), "s"),
            numpy_helper.from_array(np.uint8(0), "z"),
        ]
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("Conv", ["xd", "wd"], ["c"], name="layer", **conv),
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["y"]),
        ]
    else:
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="layer", **conv)]
    kind = TensorProto.UINT8 if quantized else TensorProto.FLOAT
    border = [helper.make_tensor_value_info(name, kind, ["batch", channels, 8, 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", border[:1], border[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("make", [sparse, scaled, both])
def test_onnx_runtime_decodes_when_it_opens_the_file(make, quantized, tmp_path):
    """What runs is the graph of the unpacked file, integer kernels included."""
    model = convolution(
        make((32, 32, 3, 3), np.int8 if quantized else np.float32), quantized=quantized
    )
    found, answers = [], []
    kind = np.uint8 if quantized else np.float32
    inputs = np.random.default_rng(5).integers(0, 255, (2, 32, 8, 8)).astype(kind)
    for name in ("dense", "packed"):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        found.append(fused_operators(OnnxModel(path, Signature((), ()), 20), threads=1))
        answers.append(session_of(model).run(None, {"x": inputs})[0])
        pack_weights(model.graph)
    assert found[0] == found[1]
    assert found[1].integer == (("layer",) if quantized else ())
    assert np.array_equal(*answers)
    assert len(model.graph.node) > 4, "it was packed"


def test_decoding_that_is_left_to_run_time_would_be_seen(tmp_path):
    """As NonZero is: the reason why it decodes nothing here."""
    model = convolution(sparse((32, 32, 3, 3), np.float32), quantized=False)
    pack_weights(model.graph)
    (reshape,) = (node for node in model.graph.node if node.output[0] == "w")
    found = helper.make_node("NonZero", [reshape.input[0]], ["places"])
    kept = helper.make_node("ReduceMin", ["places"], ["least"], keepdims=0)
    some = helper.make_node("Cast", ["least"], ["zero"], to=TensorProto.FLOAT)
    added = helper.make_node("Add", ["w", "zero"], ["v"])
    at = list(model.graph.node).index(reshape)
    for node in (added, some, kept, found):
        model.graph.node.insert(at + 1, node)
    model.graph.node[-1].input[1] = "v"
    path = tmp_path / "late.onnx"
    path.write_bytes(model.SerializeToString())
    operators = fused_operators(OnnxModel(path, Signature((), ()), 20), threads=1).operators
    assert "NonZero" in operators
