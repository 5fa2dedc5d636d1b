"""Classifiers from elsewhere: digits by random features and a fitted last layer."""

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import load_dataset
from deploykit.recipe import parse_recipe
from deploykit.runtime import zero_point_and_scale

RECIPE = """\
schema: 1
name: digits
task: image-classification
data: {source: digits, limit: 600, validation: 0.25, test: 0.15}
model: {name: mlp}
verify: {samples: 64}
"""
WIDTH, CLASSES = 32, 10


@functools.cache
def digits():
    recipe = parse_recipe(RECIPE)
    return load_dataset(recipe.data, task=recipe.task, seed=recipe.seed, base=Path())


def normalized(pixels, preprocess):
    zero_point, scale = zero_point_and_scale(preprocess)
    floats = (pixels.astype(np.float32) - zero_point.astype(np.float32)) * scale
    return floats.transpose(0, 3, 1, 2)


def layers(channels=1, width=WIDTH, side=8):
    """Two convolutions with random weights; ends in features ``(N, width * (side / 2)^2)``."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(width, channels, 3, 3)) / np.sqrt(9 * channels),
        "b1": 0.1 * random.normal(size=width),
        "w2": random.normal(size=(width, width, 3, 3)) / np.sqrt(9 * width),
        "b2": 0.1 * random.normal(size=width),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("MaxPool", ["r2"], ["p2"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p2"], ["features"], "flatten"),
    ]
    constants = [
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    ]
    return nodes, constants, width * (side // 2) ** 2


def model_of(nodes, constants, inputs, outputs, *, opset=17, ir_version=8, **more):
    graph = helper.make_graph(nodes, "elsewhere", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **more)


def floats(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def run(model, inputs):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


@functools.cache
def _head():
    """Fit the last layer to the training split by least squares with a ridge."""
    nodes, constants, size = layers()
    body = model_of(nodes, constants, [floats("x", "n", 1, 8, 8)], [floats("features", "n", size)])
    data = digits()
    train = data.train
    features = run(body, normalized(train.load(np.arange(len(train))), data.preprocess))
    features = np.hstack([features, np.ones((len(features), 1), np.float32)])
    wanted = 2.0 * np.eye(CLASSES)[train.labels] - 1
    gram = features.T @ features + 1e-1 * len(features) * np.eye(features.shape[1])
    solved = np.linalg.solve(gram, features.T @ wanted).astype(np.float32)
    return solved[:-1], solved[-1]


def classifier(*, batch="n", last="Gemm", front=(), taken="x", taken_shape=(1, 8, 8), **more):
    """A net for digits that takes normalized float32 ``(N, 1, 8, 8)``, unless told otherwise."""
    nodes, constants, _ = layers()
    weight, bias = _head()
    constants += [numpy_helper.from_array(weight, "w3"), numpy_helper.from_array(bias, "b3")]
    ends = "logits" if last == "Gemm" else "scores"
    nodes.append(helper.make_node("Gemm", ["features", "w3", "b3"], [ends], "head"))
    if last != "Gemm":
        nodes.append(helper.make_node(last, ["scores"], ["logits"], "last", axis=1))
    return model_of(
        [*front, *nodes],
        constants,
        [floats(taken, batch, *taken_shape)],
        [floats("logits", batch, CLASSES)],
        **more,
    )


def saved(folder, model, name="net.onnx"):
    path = folder / name
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def data_file(folder, text=RECIPE):
    path = folder / "data.yaml"
    path.write_text(text)
    return path


def without(model, kind):
    """Return a copy without the nodes of one type; for planted faults."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [node for node in copy.graph.node if node.op_type != kind]
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy
