"""The first look at a file from elsewhere: what it refuses, and that the parent outlives it."""

import re
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_foreign import classifier, floats, model_of, saved

from deploykit.errors import ModelError
from deploykit.foreign import limits
from deploykit.foreign.checks import Refused, look_at
from deploykit.foreign.limits import MAX_BYTES, Limits, examine, read_model

GIGABYTE = 2**30
WITHIN = Limits(memory_bytes=GIGABYTE, cpu_seconds=20, wall_seconds=40)
NET = classifier()


def look(model, shape=None):
    return look_at(model if isinstance(model, bytes) else model.SerializeToString(), shape)


def refuses(model, match, shape=None):
    with pytest.raises(Refused, match=match):
        look(model, shape)


def altered(change):
    model = onnx.ModelProto()
    model.CopyFrom(NET)
    change(model)
    return model


def weight(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def with_weight(name, alter):
    def change(model):
        tensor = weight(model, name)
        values = numpy_helper.to_array(tensor).copy()
        alter(values)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return altered(change)


def test_a_sound_model_tells_its_border():
    found = look(NET)
    assert found["input"] == {"name": "x", "dtype": "float32", "shape": [-1, 1, 8, 8]}
    assert found["output"]["shape"] == [-1, 10]
    assert found["fixed_batch"] == 0


def test_open_sizes_are_run_when_they_are_known():
    model = classifier(taken_shape=(1, "h", "w"))
    assert look(model)["input"]["shape"] == [-1, 1, -1, -1]
    assert look(model, [1, 8, 8])["input"]["shape"] == [-1, 1, 8, 8]
    refuses(model, "expected a model that runs", [1, 9, 11])


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"GIF89a" * 20, b"PK\x03\x04" + b"\xff" * 99])
def test_something_else_is_refused(data):
    refuses(data, "expected an ONNX file")


@pytest.mark.parametrize("name", ["w1", "b2", "w3"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_with_their_layer(name, value):
    model = with_weight(name, lambda values: values.flat.__setitem__(3, value))
    refuses(model, f"NaN or infinity in '{name}' of (Conv|Gemm) '")


def test_infinity_in_a_bound_is_no_fault():
    front = [helper.make_node("Clip", ["raw", "low"], ["x"])]
    model = classifier(front=front, taken="raw")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-np.inf), "low"))
    assert look(model)["input"]["name"] == "raw"


def test_nan_in_an_attribute_is_refused():
    constant = helper.make_node(
        "Constant", [], ["c"], value=numpy_helper.from_array(np.float32(np.nan), "v")
    )
    model = classifier(front=[constant, helper.make_node("Add", ["raw", "c"], ["x"])], taken="raw")
    refuses(model, "got NaN or infinity in Constant")


def outside(tensor):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_attribute(model):
    inner = numpy_helper.from_array(np.float32(1), "v")
    outside(inner)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=inner))


def external_branch(model):
    graph = helper.make_graph([], "branch", [], [], [numpy_helper.from_array(np.float32(1), "v")])
    outside(graph.initializer[0])
    node = helper.make_node("If", ["yes"], ["z"], then_branch=graph, else_branch=graph)
    model.graph.node.insert(0, node)


EXTERNAL = {
    "weight": lambda model: outside(weight(model, "w1")),
    "attribute": external_attribute,
    "branch": external_branch,
}


@pytest.mark.parametrize("place", EXTERNAL)
def test_weights_in_another_file_are_refused(place):
    refuses(altered(EXTERNAL[place]), "expected every weight inside the file")


def test_sparse_weights_are_refused():
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [1], [2.0]),
        helper.make_tensor("at", TensorProto.INT64, [1], [0]),
        [4],
    )
    refuses(altered(lambda model: model.graph.sparse_initializer.append(sparse)), "dense weights")


def test_operators_of_nobody_are_refused_by_name():
    model = altered(lambda model: setattr(model.graph.node[1], "domain", "com.example"))
    refuses(model, "got Relu of 'com.example'")


def test_functions_are_refused():
    function = helper.make_function(
        "com.example",
        "F",
        ["a"],
        ["b"],
        [helper.make_node("F", ["a"], ["b"], domain="com.example")],  # itself
        [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)],
    )
    refuses(altered(lambda model: model.functions.append(function)), "functions of the model's own")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: setattr(m, "ir_version", 99), "expected IR version"),
        (lambda m: setattr(m.opset_import[0], "version", 999), "expected opset"),
    ],
)
def test_what_is_newer_than_onnx_is_refused(change, match):
    refuses(altered(change), match)


def test_a_dangling_edge_is_refused():
    model = altered(lambda m: m.graph.node[0].input.__setitem__(0, "nobody"))
    refuses(model, "expected a valid ONNX model")


@pytest.mark.parametrize("kind", ["input", "output"])
def test_several_ends_are_refused_by_name(kind):
    def change(model):
        second = floats("second", "n", 10)
        getattr(model.graph, kind).append(second)
        if kind == "output":
            model.graph.node.append(helper.make_node("Relu", ["logits"], ["second"]))

    refuses(altered(change), f"expected one {kind}, got 2: '.*second'")


def test_input_of_another_type_is_refused():
    model = model_of(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
        [],
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 3])],
        [floats("y", "n", 3)],
    )
    refuses(model, "input 'x': expected float32 or uint8, got int64")


def test_an_output_that_is_no_row_of_classes_is_refused():
    model = model_of(
        [helper.make_node("Relu", ["x"], ["y"])],
        [],
        [floats("x", "n", 1, 8, 8)],
        [floats("y", "n", 1, 8, 8)],
    )
    refuses(model, "output 'y': expected \\(N, classes\\), got 4 axes")


def random_model():
    return classifier(
        front=[
            helper.make_node("RandomNormalLike", ["raw"], ["noise"]),
            helper.make_node("Add", ["raw", "noise"], ["x"]),
        ],
        taken="raw",
    )


def test_random_answers_are_refused():
    refuses(random_model(), "equal answers to equal inputs")


def test_answers_that_depend_on_the_batch_are_refused():
    front = [
        helper.make_node("ReduceMean", ["raw"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["raw", "mean"], ["x"]),
    ]
    refuses(classifier(front=front, taken="raw"), "expected a batch of any size, got a batch of")


def test_a_fixed_batch_is_freed_where_that_answers_the_same():
    found = look(classifier(batch=1))
    assert (found["fixed_batch"], found["input"]["shape"][0]) == (1, -1)


def reshaped(shape):
    """A net of a fixed batch of one, whose exporter wrote the batch into a reshape."""
    model = classifier(batch=1)
    place = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Flatten")
    model.graph.node[place].CopyFrom(
        helper.make_node("Reshape", ["p2", "shape"], ["features"], "flatten")
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape), "shape"))
    return model


@pytest.mark.parametrize("shape", [[1, 512], [1, -1]])
def test_a_batch_written_into_a_reshape_is_freed(shape):
    assert look(reshaped(shape))["fixed_batch"] == 1


def test_a_fixed_batch_that_cannot_be_freed_is_refused():
    model = classifier(
        batch=1,
        front=[
            helper.make_node("ReduceSum", ["raw", "axes"], ["sum"], keepdims=1),
            helper.make_node("Add", ["raw", "sum"], ["x"]),
        ],
        taken="raw",
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axes"))
    refuses(model, "got a fixed batch of 1, and a batch of . answers otherwise.*dynamic batch")


def looping(trips, grows):
    """A model whose loop counts to ``trips``; what it carries doubles where it ``grows``."""
    end = "twice" if grows else "kept"
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Concat", ["carried", "carried"], ["twice"], axis=1)
            if grows
            else helper.make_node("Neg", ["carried"], ["kept"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("carried", "n", None),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), floats(end, "n", None)],
    )
    return model_of(
        [
            helper.make_node("Loop", ["trips", "yes", "x"], ["grown"], body=body),
            helper.make_node("ReduceMax", ["grown"], ["most"], axes=[1], keepdims=1),
            helper.make_node("Concat", ["most", "most"], ["y"], axis=1),
        ],
        [
            numpy_helper.from_array(np.int64(trips), "trips"),
            numpy_helper.from_array(np.bool_(True), "yes"),
        ],
        [floats("x", "n", 3)],
        [floats("y", "n", 2)],
    ).SerializeToString()


def test_the_process_finds_what_the_look_finds():
    assert examine(NET.SerializeToString(), "net.onnx").to_json() == look(NET)


def test_an_endless_loop_is_stopped_and_told():
    quick = Limits(memory_bytes=GIGABYTE, cpu_seconds=4, wall_seconds=60)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"loop.onnx: expected .* endless loop"):
        examine(looping(2**62, grows=False), "loop.onnx", limits=quick)
    assert time.monotonic() - started < 50
    assert examine(looping(2, grows=False), "loop.onnx", limits=quick).output.shape == (-1, 2)


def test_a_model_that_waits_is_stopped_by_the_clock(monkeypatch):
    monkeypatch.setattr(limits, "_PROGRAM", "import time; time.sleep(60)")
    with pytest.raises(ModelError, match=r"within 0.5 s, got no answer"):
        examine(b"", "slow.onnx", limits=Limits(wall_seconds=0.5))


def test_a_model_that_eats_memory_is_refused():
    with pytest.raises(ModelError, match=r"eater.onnx: expected a model that"):
        examine(looping(40, grows=True), "eater.onnx", limits=WITHIN)
    assert examine(looping(4, grows=True), "eater.onnx", limits=WITHIN).output.shape == (-1, 2)


def test_a_crash_is_one_sentence(monkeypatch):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(limits, "_PROGRAM", program)
    with pytest.raises(ModelError, match=r"brings its process down \(SIGSEGV\)"):
        examine(b"", "crash.onnx")


def test_a_process_that_fails_tells_its_last_line(monkeypatch):
    monkeypatch.setattr(limits, "_PROGRAM", "raise RuntimeError('so')")
    with pytest.raises(ModelError, match=r"process down \(RuntimeError: so\)"):
        examine(b"", "crash.onnx")


def test_files_beside_the_user_are_not_run(marks):
    """Python looks for modules where it is started, unless it is told not to."""
    assert examine(NET.SerializeToString(), "net.onnx", limits=WITHIN).input.shape == (-1, 1, 8, 8)
    assert list(marks.iterdir()) == []


def test_lower_limits_of_the_users_shell_hold():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9, 9)); "
        "from deploykit.foreign.checks import _limit; "
        "_limit({'memory_bytes': 2**32, 'cpu_seconds': 100}); "
        "print(resource.getrlimit(resource.RLIMIT_CPU))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "(9, 9)\n", done.stderr


def test_integers_that_all_samples_of_a_batch_scale_are_refused():
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    model = model_of(nodes, [], [floats("x", "n", 4)], [floats("y", "n", 4)], opset=20)
    refuses(model, "no other sample of a batch touches, got DynamicQuantizeLinear")


def test_names_in_the_file_cannot_steer_the_terminal():
    model = altered(lambda m: m.graph.node[0].input.__setitem__(0, "\x1b[31mnobody"))
    with pytest.raises(ModelError, match="expected a valid ONNX model") as refusal:
        examine(model.SerializeToString(), "net.onnx", limits=WITHIN)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_file_is_refused_or_still_a_model(seed):
    damaged, random = bytearray(NET.SerializeToString()), np.random.default_rng(seed)
    for place in random.integers(0, 600, 3):  # operators, attributes, names
        damaged[place] = random.integers(0, 256)
    try:
        told = f"output {examine(bytes(damaged), 'damaged.onnx', limits=WITHIN).output.shape}"
    except ModelError as refusal:
        told = str(refusal)
    assert re.fullmatch(r"output \(-1, 10\)|damaged.onnx: expected .*", told)


def test_what_is_no_plain_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(ModelError, match="expected an ONNX file"):
            read_model(path)


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, NET)
    monkeypatch.setattr(limits, "MAX_BYTES", 100)
    with pytest.raises(ModelError, match="expected at most 100 bytes"):
        read_model(path)
    assert MAX_BYTES == 2**31 - 1
