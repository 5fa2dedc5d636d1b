import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.errors import ModelError
from deploykit.fusion import fused_operators


class Graph:
    """A quantized graph under construction; each method returns the tensor that it makes."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, operator, inputs, name, **attributes):
        self.nodes.append(helper.make_node(operator, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def pair(self, tensor, name, zero_point=0, scale=0.05):
        parameters = [
            self.constant(f"{name}_scale", np.float32(scale)),
            self.constant(f"{name}_zero", np.uint8(zero_point)),
        ]
        quantized = self.node("QuantizeLinear", [tensor, *parameters], f"{name}_q")
        return self.node("DequantizeLinear", [quantized, *parameters], f"{name}_dq")

    def weight(self, name, shape):
        values = np.random.default_rng(0).integers(-100, 100, shape).astype(np.int8)
        inputs = [
            self.constant(name, values),
            self.constant(f"{name}_scale", np.full(shape[0], 0.01, np.float32)),
            self.constant(f"{name}_zero", np.zeros(shape[0], np.int8)),
        ]
        return self.node("DequantizeLinear", inputs, f"{name}_dq", axis=0)

    def conv(self, tensor, name, channels=8):
        inputs = [tensor, self.weight(f"{name}.weight", (8, channels, 3, 3))]
        return self.node("Conv", inputs, name, pads=[1, 1, 1, 1], kernel_shape=[3, 3])

    def save(self, path, output):
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8, 6, 6])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", "A", "B", "C"])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        spec = TensorSpec("x", "float32", (-1, 8, 6, 6))
        return OnnxModel(path, Signature((spec,), ()), opset=20)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def two_convolutions(path, middle, *, first_pair=True):
    """x -> [pair] -> first -> ``middle`` -> second -> pair."""
    graph = Graph()
    x = graph.pair("x", "in", 128) if first_pair else "x"
    between = middle(graph, graph.conv(x, "first"))
    return graph.save(path, graph.pair(graph.conv(between, "second"), "out", 128))


def reasons(model):
    return {layer.name: layer.why for layer in fused_operators(model, threads=1).floating}


def relu(zero_point, scale=0.05):
    return lambda graph, x: graph.pair(graph.node("Relu", [x], "relu"), "mid", zero_point, scale)


def clip(high, scale):
    def middle(graph, x):
        bounds = [graph.constant("low", np.float32(0)), graph.constant("high", np.float32(high))]
        return graph.pair(graph.node("Clip", [x, *bounds], "clip"), "mid", 0, scale)

    return middle


def silu(graph, x):
    gate = graph.node("Sigmoid", [x], "gate")
    return graph.pair(graph.node("Mul", [x, gate], "swish"), "mid", 20)


def test_layers_between_pairs_run_in_integers(path):
    report = fused_operators(two_convolutions(path, relu(0)), threads=1)
    assert report.integer == ("first", "second")
    assert report.floating == ()
    assert report.operators["QLinearConv"] == 2
    assert "Conv" not in report.operators


def test_a_relu_whose_zero_point_is_not_the_lowest_leaves_its_layer_in_float(path):
    report = fused_operators(two_convolutions(path, relu(128)), threads=1)
    (layer,) = report.floating
    assert (layer.name, layer.operator) == ("first", "FusedConv")
    assert layer.why == (
        "the range quantized behind Relu relu, -6.4 to 6.35 (zero point 128), is wider than what "
        "that lets through; it must begin at 0"
    )
    assert report.integer == ("second",)


def test_a_silu_leaves_its_layer_in_float(path):
    found = reasons(two_convolutions(path, silu))
    assert list(found) == ["first"]
    assert "Sigmoid gate, Mul swish" in found["first"]


def test_a_silu_with_a_pair_before_it_leaves_nothing_in_float(path):
    model = two_convolutions(path, lambda graph, x: silu(graph, graph.pair(x, "before", 128)))
    assert reasons(model) == {}


def test_another_activation_is_named(path):
    def middle(graph, x):
        return graph.pair(graph.node("HardSwish", [x], "swish"), "mid", 20)

    assert reasons(two_convolutions(path, middle))["first"].startswith("HardSwish swish stands")


def test_a_clip_within_the_quantized_range_leaves_its_layer_in_float(path):
    found = reasons(two_convolutions(path, clip(6.0, scale=12 / 255)))
    assert found["first"].endswith("it must begin at 0 and end at 6")


def test_a_clip_at_the_borders_of_the_quantized_range_fuses(path):
    assert reasons(two_convolutions(path, clip(6.0, scale=6 / 255))) == {}


def test_an_input_without_a_pair_is_named(path):
    found = reasons(two_convolutions(path, relu(0), first_pair=False))
    assert found == {"first": "its first input is not quantized: x is a float constant or input"}


def test_a_layer_fed_by_float_arithmetic_names_it(path):
    def middle(graph, x):
        return graph.node("Sigmoid", [graph.pair(x, "mid", 128)], "gate")

    assert "it comes from Sigmoid gate" in reasons(two_convolutions(path, middle))["second"]


def test_an_output_that_leaves_unquantized_is_named(path):
    graph = Graph()
    model = graph.save(path, graph.conv(graph.pair("x", "in", 128), "only"))
    assert reasons(model) == {"only": "its output leaves the model without a QuantizeLinear"}


def test_a_product_with_a_float_factor_names_it(path):
    graph = Graph()
    gate = graph.node("Sigmoid", ["x"], "gate")
    x = graph.node("MatMul", [graph.pair("x", "in", 128), gate], "product")
    found = reasons(graph.save(path, graph.pair(x, "out", 128)))
    assert found["product"].startswith("its second input is not quantized: it comes from Sigmoid")


def test_a_model_without_pairs_is_all_float(path):
    graph = Graph()
    weight = graph.constant("w", np.ones((8, 8, 1, 1), np.float32))
    report = fused_operators(graph.save(path, graph.node("Conv", ["x", weight], "c")), threads=1)
    assert report.integer == ()
    assert [layer.name for layer in report.floating] == ["c"]


def linear(graph, bias, quantized):
    x = graph.pair("x", "in", 128)
    x = graph.node("MatMul", [x, graph.weight("fc.weight", (6, 8))], "fc/MatMul")
    if bias:
        x = graph.node("Add", [x, graph.constant("fc.bias", np.ones(8, np.float32))], "fc/Add")
    return graph.pair(x, "out", 128) if quantized else x


def test_linear_layers_are_known_by_their_written_name_after_a_fusion_renamed_them(path):
    graph = Graph()
    report = fused_operators(graph.save(path, linear(graph, True, True)), threads=1)
    assert [*report.integer, *(layer.name for layer in report.floating)] == ["fc/MatMul"]


def test_nameless_nodes_get_a_name(path):
    model = two_convolutions(path, relu(128))
    written = onnx.load(path)
    for node in written.graph.node:
        node.name = ""
    onnx.save(written, path)
    (layer,) = fused_operators(model, threads=1).floating
    assert layer.name.startswith("Conv#")
    assert "zero point 128" in layer.why


def test_the_model_file_is_left_alone(path):
    model = two_convolutions(path, relu(0))
    before = path.read_bytes()
    fused_operators(model, threads=1)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_json_has_the_keys_that_the_report_renders(path):
    value = fused_operators(two_convolutions(path, silu), threads=1).to_json()
    assert set(value) == {"integer", "float", "operators"}
    assert set(value["float"][0]) == {"name", "operator", "why"}


def test_what_is_no_model_is_refused_by_name(path):
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"model\.onnx"):
        fused_operators(OnnxModel(path, Signature((), ()), 20), threads=1)
    with pytest.raises(ModelError, match="missing"):
        fused_operators(OnnxModel(path.with_name("missing.onnx"), Signature((), ()), 20), 1)
