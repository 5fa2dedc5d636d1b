"""A trimmed graph: fewer bytes, and the answers that it gave before."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import array_model, image_model
from tiny_foreign import classifier, floats, model_of

from deploykit.packing import pack_weights
from deploykit.trim import FEW, trim

LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)


def branched(branch, opset=20):
    """A model whose graphs inside an If are ``branch``, of the outer ``x`` and ``y = 2 x``."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Less", ["sum", "zero"], ["yes"]),
        helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
    ]
    return model_of(
        nodes,
        [constant("zero", np.float32(0)), constant("one", np.float32([1]))],
        [floats("x", "n", 4)],
        [floats("z", "n", 4)],
        opset=opset,
    )


def constant(name, values):
    return numpy_helper.from_array(np.asarray(values), name)


def answers(model, inputs, level=LEVELS[0]):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: inputs})


def example(model):
    value = model.graph.input[0].type.tensor_type
    shape = [dim.dim_value or 3 for dim in value.shape.dim]
    generator = np.random.default_rng(0)
    if value.elem_type == TensorProto.UINT8:
        return generator.integers(0, 256, shape, np.uint8)
    return generator.standard_normal(shape).astype(np.float32)


def assert_same(before, after):
    inputs = example(before)
    for level in LEVELS:
        for one, other in zip(
            answers(before, inputs, level), answers(after, inputs, level), strict=True
        ):
            assert one.tobytes() == other.tobytes()


def operators(model):
    return [node.op_type for node in model.graph.node]


def small(nodes, constants=(), outputs=("y",), **more):
    ends = [floats(name, "n", 3) for name in outputs]
    return model_of(nodes, constants, [floats("x", "n", 3)], ends, **more)


def test_dead_nodes_and_their_weights_go():
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("MatMul", ["x", "w"], ["nobody"]),
    ]
    trimmed = trim(small(nodes, [constant("w", np.ones((3, 9), np.float32))]))
    assert operators(trimmed) == ["Relu"]
    assert not trimmed.graph.initializer


def test_identities_go_and_the_border_keeps_its_names():
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Identity", ["b"], ["y"]),
    ]
    before = small(nodes)
    trimmed = trim(before)
    assert operators(trimmed) == ["Relu"]
    assert [one.name for one in (*trimmed.graph.input, *trimmed.graph.output)] == ["x", "y"]
    assert_same(before, trimmed)


def test_an_identity_between_input_and_output_stays():
    before = small([helper.make_node("Identity", ["x"], ["y"])])
    assert_same(before, trim(before))


def test_weights_equal_bit_for_bit_are_stored_once():
    same = np.linspace(0, 1, 300, dtype=np.float32).reshape(3, 100)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("MatMul", ["x", "w2"], ["b"]),
        helper.make_node("Sub", ["a", "b"], ["c"]),
        helper.make_node("MatMul", ["c", "v"], ["y"]),
    ]
    kept = constant("v", np.ones((100, 3), np.float32))
    before = small(nodes, [constant("w1", same), constant("w2", same.copy()), kept])
    trimmed = trim(before)
    assert len(trimmed.graph.initializer) == 2
    assert_same(before, trimmed)


@pytest.mark.parametrize(
    "other", [np.float32(-0.0), np.int32(0), np.zeros(1, np.float32)], ids=["sign", "type", "shape"]
)
def test_weights_that_only_look_equal_stay_two(other):
    nodes = [
        helper.make_node("Add", ["x", "zero"], ["a"]),
        helper.make_node("Cast", ["other"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["a", "cast"], ["y"]),
    ]
    before = small(nodes, [constant("zero", np.float32(0)), constant("other", other)])
    trimmed = trim(before)
    assert {tensor.name for tensor in trimmed.graph.initializer} >= {"zero"}
    assert_same(before, trimmed)


def test_shapes_made_of_constants_are_folded():
    nodes = [
        helper.make_node("Concat", ["first", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    before = small(nodes, [constant("first", np.array([-1])), constant("rest", np.array([3]))])
    trimmed = trim(before)
    assert operators(trimmed) == ["Reshape"]
    assert_same(before, trimmed)


def test_arithmetic_of_floats_is_left_to_the_runtime():
    nodes = [
        helper.make_node("Exp", ["c"], ["e"]),
        helper.make_node("Add", ["e", "c"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["y"]),
    ]
    before = small(nodes, [constant("c", np.float32(0.1))])
    assert operators(trim(before)) == ["Exp", "Add", "Mul"]


def test_a_weight_that_is_only_turned_is_stored_turned():
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    weight = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    before = small(nodes, [constant("w", weight)])
    trimmed = trim(before)
    assert operators(trimmed) == ["MatMul"]
    assert_same(before, trimmed)


def test_what_would_grow_stays_as_it_is_computed():
    nodes = [
        helper.make_node("Expand", ["c", "shape"], ["wide"]),
        helper.make_node("MatMul", ["x", "wide"], ["a"]),
        helper.make_node("ReduceSum", ["a", "axes"], ["b"], keepdims=1),
        helper.make_node("Add", ["x", "b"], ["y"]),
    ]
    constants = [
        constant("c", np.float32(1)),
        constant("shape", np.array([3, 100 * FEW])),
        constant("axes", np.array([1])),
    ]
    before = small(nodes, constants)
    trimmed = trim(before)
    assert "Expand" in operators(trimmed)
    assert trimmed.ByteSize() <= before.ByteSize()


def test_packed_weights_stay_packed():
    weight = np.zeros((64, 64), np.float32)
    weight[::7, ::5] = 0.5
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [constant("w", weight)],
        [floats("x", "n", 64)],
        [floats("y", "n", 64)],
        opset=20,
        ir_version=9,
    )
    pack_weights(model.graph)
    assert trim(model).ByteSize() <= model.ByteSize()
    assert_same(model, trim(model))


def test_quantize_dequantize_pairs_and_their_constants_stay():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"]),
        helper.make_node("MatMul", ["d", "dw"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "s2", "z2"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s2", "z2"], ["y"]),
    ]
    constants = [
        *(constant(name, np.float32(0.1)) for name in ("s", "s2", "ws")),
        *(constant(name, np.uint8(128)) for name in ("z", "z2")),
        constant("wz", np.int8(0)),
        constant("w", np.arange(9, dtype=np.int8).reshape(3, 3)),
    ]
    before = small(nodes, constants)
    trimmed = trim(before)
    assert operators(trimmed) == operators(before)
    assert len(trimmed.graph.initializer) == 4  # one scale, one zero point a type, the weight
    assert_same(before, trimmed)


def test_paths_and_chatter_go():
    secret = "/home/somebody/net.py"
    node = helper.make_node("Relu", ["x"], ["y"], doc_string=secret)
    node.metadata_props.add(key="trace", value=secret)
    model = small([node])
    model.doc_string = model.graph.doc_string = secret
    model.metadata_props.add(key="source", value=secret)
    model.graph.value_info.add(name=secret)
    model.graph.input[0].doc_string = secret
    assert secret.encode() not in trim(model).SerializeToString()


def test_nodes_inside_a_branch_are_stripped_too():
    secret = "/home/somebody"
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"], doc_string=secret)],
        "branch",
        [],
        [floats("r", "n", 3)],
        doc_string=secret,
    )
    choose = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    before = small([choose], [constant("yes", np.bool_(True))])
    assert secret.encode() not in trim(before).SerializeToString()
    assert_same(before, trim(before))


def test_sparse_weights_are_not_lost():
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0]),
        helper.make_tensor("w_at", TensorProto.INT64, [1], [4]),
        [3, 3],
    )
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])])
    model.graph.sparse_initializer.append(sparse)
    assert len(trim(model).graph.sparse_initializer) == 1


def test_the_model_that_is_trimmed_stays_as_it_was():
    model = classifier()
    before = model.SerializeToString(deterministic=True)
    trim(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("make", [image_model, array_model], ids=["image", "array"])
def test_bundled_models_answer_as_before(tmp_path, make):
    before = onnx.load(make(tmp_path / "m.onnx").path)
    assert_same(before, trim(before))


def test_a_net_answers_as_before():
    before = classifier()
    assert_same(before, trim(before))


UNARY = ("Identity", "Relu", "Neg", "Abs", "Sigmoid", "Tanh")
BINARY = ("Add", "Mul", "Sub", "Max")


@st.composite
def graphs(draw):
    """A graph of ten nodes or so: repeated constants, identities, dead ends, foldable shapes."""
    values = [np.float32(draw(st.sampled_from([0.0, -0.0, 0.5, 1.5]))) for _ in range(4)]
    constants = [constant(f"c{place}", value) for place, value in enumerate(values)]
    constants += [constant("first", np.array([-1])), constant("rest", np.array([3]))]
    nodes, tensors = [], ["x"]
    for place in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(["unary", "binary", "constant", "folded", "reshape"]))
        source, out = draw(st.sampled_from(tensors)), f"t{place}"
        if kind == "unary":
            nodes.append(helper.make_node(draw(st.sampled_from(UNARY)), [source], [out]))
        elif kind == "binary":
            other = draw(st.sampled_from(tensors))
            nodes.append(helper.make_node(draw(st.sampled_from(BINARY)), [source, other], [out]))
        elif kind == "constant":
            other = f"c{draw(st.integers(0, 3))}"
            nodes.append(helper.make_node(draw(st.sampled_from(BINARY)), [source, other], [out]))
        elif kind == "folded":
            pair = [f"c{draw(st.integers(0, 3))}" for _ in range(2)]
            nodes.append(helper.make_node(draw(st.sampled_from(BINARY)), pair, [f"f{place}"]))
            nodes.append(helper.make_node("Add", [source, f"f{place}"], [out]))
        else:
            nodes.append(helper.make_node("Concat", ["first", "rest"], [f"s{place}"], axis=0))
            nodes.append(helper.make_node("Reshape", [source, f"s{place}"], [out]))
        tensors.append(out)
    nodes.append(helper.make_node("Relu", [draw(st.sampled_from(tensors))], ["y"]))
    return small(nodes, constants)


@settings(max_examples=60)
@given(graphs())
def test_any_graph_answers_as_before_in_no_more_bytes(before):
    trimmed = trim(before)
    onnx.checker.check_model(trimmed, full_check=True)
    assert trimmed.ByteSize() <= before.ByteSize()
    assert_same(before, trimmed)
    again = trim(trimmed)
    assert again.SerializeToString(deterministic=True) == trimmed.SerializeToString(
        deterministic=True
    )


def test_an_identity_that_gives_an_outer_value_stays():
    """A branch may give what stands outside of it by way of an identity alone."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["y"], ["given"])], "branch", [], [floats("given", "n", 4)]
    )
    model = branched(branch)
    assert_same(model, trim(model))


def test_what_a_loop_carries_and_collects_stays():
    """The sum of each step is carried on, and by way of an identity collected."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["carried", "next"], ["sum"]),
            helper.make_node("Identity", ["sum"], ["collected"]),
        ],
        "body",
        [floats("carried", 2), floats("next", 2)],
        [floats("sum", 2), floats("collected", 2)],
    )
    model = model_of(
        [helper.make_node("Scan", ["start", "x"], ["last", "all"], body=body, num_scan_inputs=1)],
        [constant("start", np.zeros(2, np.float32))],
        [floats("x", 3, 2)],
        [floats("last", 2), floats("all", 3, 2)],
        opset=20,
    )
    assert_same(model, trim(model))


@pytest.mark.parametrize(
    "bomb",
    [
        helper.make_node("Expand", ["one", "vast"], ["bomb"]),
        helper.make_node("Range", ["none", "much", "step"], ["bomb"]),
    ],
    ids=lambda node: node.op_type,
)
def test_what_never_runs_is_not_computed(bomb):
    """Few constants may stand for more values than any memory holds."""
    branch = helper.make_graph(
        [
            bomb,
            helper.make_node("Size", ["bomb"], ["size"]),
            helper.make_node("Cast", ["size"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["y", "float"], ["given"]),
        ],
        "branch",
        [],
        [floats("given", "n", 4)],
        [
            constant("one", np.int64([1])),
            constant("vast", np.int64([2**40])),
            constant("none", np.int64(0)),
            constant("much", np.int64(2**40)),
            constant("step", np.int64(1)),
        ],
    )
    trimmed = trim(branched(branch))
    (condition,) = (node for node in trimmed.graph.node if node.op_type == "If")
    operators = [node.op_type for node in condition.attribute[0].g.node]
    assert bomb.op_type in operators


def test_both_spellings_of_onnxs_domain_are_one():
    model = classifier()
    model.opset_import[0].domain = "ai.onnx"
    model.graph.node[0].domain = "ai.onnx"
    trimmed = trim(model)
    assert [one.domain for one in trimmed.opset_import] == [""]
    assert_same(classifier(), trimmed)


def test_a_model_that_the_library_cannot_read_stays(monkeypatch):
    def stumble(_):
        raise RuntimeError("so")

    monkeypatch.setattr("deploykit.trim._rebuilt", stumble)
    model = classifier()
    assert_same(model, trim(model))
