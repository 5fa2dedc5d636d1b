"""Floats of two bytes: what is written, and that the proof sees what they cannot hold."""

import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from tiny_quantized import (
    CLASSES,
    PREPROCESS,
    Samples,
    array_candidate,
    candidate_of,
    images,
    noise_ratio,
    plain,
    settled,
)
from torch import nn

from deploykit.errors import VerificationError
from deploykit.exporter import export_onnx
from deploykit.precision import EXACTNESS, HalfArithmetic, convert, precision_of
from deploykit.quantization.deployable import candidate_graph
from deploykit.quantize import calibrate
from deploykit.recipe.sections import VerifySection
from deploykit.targets import TARGETS
from deploykit.verify import verify_onnx

pytestmark = pytest.mark.slow

PIXELS = images(96)[0]
HALVES = ("fp16", "fp16-weights", "bf16")


@pytest.fixture(scope="module")
def floating():
    return candidate_of(settled(plain()))


@pytest.fixture(scope="module")
def models(floating, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        precision: export_onnx(
            convert(floating, precision), folder / f"{precision}.onnx", name="tiny"
        )
        for precision in ("fp32", *HALVES)
    }


def answers(model, values=PIXELS):
    session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: values})[0]


def proved(candidate, path, samples=PIXELS):
    model = export_onnx(candidate, path, name="tiny")
    return verify_onnx(candidate, model, Samples(samples), VerifySection(), threads=1)


def weight_bytes(model):
    """Count the weights; single numbers, as normalization has them, stay aside."""
    return sum(
        len(tensor.raw_data)
        for tensor in onnx.load(model.path).graph.initializer
        if len(tensor.dims) > 1 and np.prod(tensor.dims) > 1
    )


@pytest.mark.parametrize("precision", HALVES)
def test_weights_take_two_bytes_and_the_border_stays(models, precision):
    assert weight_bytes(models[precision]) * 2 == weight_bytes(models["fp32"])
    graph = onnx.load(models[precision].path).graph
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert {"c1", "c2", "fc"} <= {node.name for node in graph.node}


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("fp16", TensorProto.FLOAT16),
        ("fp16-weights", TensorProto.FLOAT),
        ("bf16", TensorProto.FLOAT),
    ],
)
def test_fp16_computes_in_halves_and_stored_weights_in_float32(models, precision, kind):
    graph = onnx.shape_inference.infer_shapes(onnx.load(models[precision].path)).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    layers = [node for node in graph.node if node.op_type in {"Conv", "Gemm"}]
    assert {kinds.get(node.output[0], kind) for node in layers} == {kind}


@pytest.mark.parametrize("precision", HALVES)
def test_answers_stay_near_float_and_are_not_the_same(models, precision):
    expected, got = answers(models["fp32"]), answers(models[precision])
    step = np.ptp(expected) / 255
    assert 0 < np.abs(expected - got).max() <= EXACTNESS[precision].steps * step
    assert noise_ratio(expected, got) < (1e-3 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("mean", [[0.5], [0.4, 0.5, 0.6]])
def test_models_of_images_are_proven(floating, tmp_path, precision, mean):
    preprocess = {**PREPROCESS, "mean": mean, "std": [0.25] * len(mean)}
    candidate = replace(floating, signature=replace(floating.signature, preprocess=preprocess))
    parity = proved(convert(candidate, precision), tmp_path / "m.onnx")
    assert parity.max_steps <= parity.allowed_steps == EXACTNESS[precision].steps


@pytest.mark.parametrize("precision", HALVES)
def test_models_of_arrays_are_proven(tmp_path, precision):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    values = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    proved(convert(array_candidate(net, (6,)), precision), tmp_path / "m.onnx", values)


def loud(candidate):
    """The same answers by way of values that no half can hold."""
    net = settled(plain())
    with torch.no_grad():
        net.n2.weight *= 1e6
        net.n2.bias *= 1e6
        net.fc.weight *= 1e-6
    return replace(candidate, module=net)


def test_an_overflow_of_fp16_is_refused_with_the_remedy(floating, tmp_path):
    with pytest.raises(VerificationError, match="set precision: bf16 or fp32"):
        proved(convert(loud(floating), "fp16"), tmp_path / "m.onnx")
    proved(convert(loud(floating), "bf16"), tmp_path / "m.onnx")


def test_weights_that_no_half_can_hold_stay_exact(floating, tmp_path):
    net = settled(plain())
    with torch.no_grad():
        net.n1.weight[0] = net.n1.bias[0] = 0  # a channel that is never heard
        net.c2.weight[:, 0] = 1e6
    loudest = convert(replace(floating, module=net), "fp16-weights")
    proved(loudest, tmp_path / "m.onnx")
    weights = [one for one in onnx.load(tmp_path / "m.onnx").graph.initializer if len(one.dims) > 1]
    kinds = {one.data_type for one in weights if np.prod(one.dims) > 1}
    assert kinds == {TensorProto.FLOAT, TensorProto.FLOAT16}


def test_the_cpu_alone_would_not_see_that_overflow(floating, tmp_path):
    """Why the proof rounds by itself: ONNX Runtime's CPU kernels never hold a half."""
    model = export_onnx(convert(loud(floating), "fp16"), tmp_path / "m.onnx", name="tiny")
    assert np.isfinite(answers(model)).all()


def test_half_arithmetic_rounds_what_each_operator_gives(floating):
    graph = candidate_graph(floating)
    inputs = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        exact, halves = graph(inputs), HalfArithmetic(graph)(inputs)
    assert torch.equal(halves, halves.half().float())
    assert 0 < (exact - halves).abs().max() < 1e-2 * exact.abs().max()


def test_precision_is_told_by_the_structure(floating):
    assert precision_of(floating) == "fp32"
    assert precision_of(convert(floating, "fp16")) == "fp16"
    quantized = calibrate(floating, PIXELS[:8], target=TARGETS["cpu-x86-vnni"])
    assert precision_of(quantized) == "int8"


def test_the_converter_leaves_the_module_path_as_it_was(floating, tmp_path):
    before = list(sys.path)
    export_onnx(convert(floating, "fp16"), tmp_path / "m.onnx", name="tiny")
    assert sys.path == before


# TensorRT


def test_integers_for_tensorrt_are_symmetric_and_signed(floating, tmp_path):
    quantized = calibrate(floating, PIXELS, target=TARGETS["tensorrt"])
    zero_points = {zero for _, zero in quantized.structure["quantization"]["parameters"].values()}
    assert zero_points == {0}
    assert proved(quantized, tmp_path / "m.onnx").max_steps <= 2
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            zero_point = stored[node.input[2]]
            assert zero_point.data_type in {TensorProto.INT8, TensorProto.INT32}
            assert not onnx.numpy_helper.to_array(zero_point).any()
    (first,) = (node for node in graph.node if graph.input[0].name in node.input)
    assert first.op_type == "Cast"  # the one thing TensorRT does to uint8


def test_integers_for_others_are_neither(floating):
    quantized = calibrate(floating, PIXELS, target=TARGETS["web"])
    zero_points = {zero for _, zero in quantized.structure["quantization"]["parameters"].values()}
    assert zero_points != {0}
