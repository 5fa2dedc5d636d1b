from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_quantized import (
    CHANNELS,
    CLASSES,
    TARGET,
    Net,
    Samples,
    candidate_of,
    conv,
    images,
    plain,
    pooled,
    settled,
)
from torch import nn
from torch.nn import functional

from deploykit import runtime
from deploykit.errors import VerificationError
from deploykit.exporter import export_onnx
from deploykit.quantize import calibrate
from deploykit.recipe.sections import VerifySection
from deploykit.targets import TARGETS
from deploykit.verify import BATCH_SIZES, verify_onnx

pytestmark = pytest.mark.slow

PIXELS = images(160)[0]
SPLIT = Samples(PIXELS)


def tokens():
    """A linear layer on three axes: the exporter writes its bias as an addition."""

    def forward(net, x):
        x = functional.relu(net.l1(x.flatten(2).transpose(1, 2)))
        return net.fc(functional.relu(net.l2(x)).mean(1))

    return Net(forward, l1=nn.Linear(CHANNELS, 8), l2=nn.Linear(8, 8), fc=nn.Linear(8, CLASSES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def floating(folder):
    candidate = candidate_of(settled(plain()))
    return candidate, export_onnx(candidate, folder / "float.onnx", name="tiny")


@pytest.fixture(scope="module")
def integer(floating, folder):
    candidate = calibrate(floating[0], PIXELS, target=TARGET)
    return candidate, export_onnx(candidate, folder / "int8.onnx", name="tiny")


@pytest.fixture(params=["floating", "integer"])
def exported(request):
    return request.getfixturevalue(request.param)


def parity_of(exported, section=None, split=SPLIT):
    candidate, model = exported
    return verify_onnx(candidate, model, split, section or VerifySection(), threads=1)


def altered(exported, path, layer, change):
    """Write the model anew with one weight of ``layer`` changed by ``change(values)``."""
    candidate, model = exported
    proto = onnx.load(model.path)
    makers = {node.output[0]: node for node in proto.graph.node}
    (node,) = (node for node in proto.graph.node if node.name == layer)
    name = node.input[1]
    while name in makers:  # through DequantizeLinear and Transpose
        name = makers[name].input[0]
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(proto, path)
    return candidate, replace(model, path=path)


def turn(values):
    np.negative(values, out=values)


def turn_largest(values):
    """Give the weight of the largest size the other sign."""
    place = np.abs(values.astype(np.float64)).argmax()
    values.flat[place] = -values.flat[place]


def test_good_models_agree(exported):
    parity = parity_of(exported)
    assert parity.samples == 160
    assert parity.agreement >= 0.99
    assert parity.max_steps <= parity.allowed_steps
    assert parity.max_abs == pytest.approx(parity.max_steps * parity.scale)


def test_float_models_are_held_to_a_fraction_of_a_step(floating, integer):
    assert parity_of(floating).allowed_steps == 0.25
    assert parity_of(integer).allowed_steps == VerifySection().max_steps
    assert parity_of(integer).max_steps <= 2


def test_a_step_of_an_integer_model_is_the_scale_of_its_output(integer):
    scale, _ = integer[0].structure["quantization"]["parameters"]["fc:linear#0"]
    assert parity_of(integer).scale == pytest.approx(scale)


TAILS = {
    "temperature": lambda logits: 16.0 * logits,
    "softmax": lambda logits: logits.softmax(-1),
    "softmax at a temperature": lambda logits: (logits / 4).softmax(-1),
}


@pytest.mark.parametrize("tail", TAILS)
def test_what_follows_the_last_integers_carries_their_step(tail, folder):
    net = plain()
    inner, after = net._forward, TAILS[tail]
    net._forward = lambda net, x: after(inner(net, x))
    candidate = calibrate(candidate_of(settled(net)), PIXELS, target=TARGET)
    exported = candidate, export_onnx(candidate, folder / f"{tail}.onnx", name="tiny")
    parity = parity_of(exported)
    scale, _ = candidate.structure["quantization"]["parameters"]["fc:linear#0"]
    if tail == "temperature":
        assert parity.scale == pytest.approx(16 * scale, rel=1e-5)
    else:
        assert 0 < parity.scale < scale / 2, "a probability moves by less than its logit"


@pytest.mark.parametrize("layer", ["c1", "c2", "fc"])
def test_one_altered_weight_fails_and_its_layer_is_named(exported, tmp_path, layer):
    broken = altered(exported, tmp_path / "broken.onnx", layer, turn_largest)
    section = VerifySection(max_steps=2)
    parity_of(exported, section)  # the model itself passes
    with pytest.raises(VerificationError, match=f"first layer that diverges is {layer}$") as caught:
        parity_of(broken, section)
    assert caught.value.report["layer"] == layer
    assert caught.value.report["max_steps"] > 0.25


@pytest.mark.parametrize("name", ["web", "tensorrt"])
def test_weights_that_may_overflow_here_are_told(floating, tmp_path, monkeypatch, name):
    candidate = calibrate(floating[0], PIXELS, target=TARGETS[name])
    model = export_onnx(candidate, tmp_path / "int8.onnx", name="tiny")
    broken = altered((candidate, model), tmp_path / "broken.onnx", "fc", turn)
    monkeypatch.setattr("deploykit.runtime.detect_cpu", lambda *_: "cpu-x86-avx2")
    told = r"8 bits can overflow the sums of this CPU \(cpu-x86-avx2\): verify it on x86 with VNNI"
    with pytest.raises(VerificationError, match=told):
        parity_of(broken)


@pytest.mark.parametrize("layer", ["l1", "l2", "fc"])
def test_a_linear_layer_on_three_axes_is_named_too(folder, tmp_path, layer):
    candidate = candidate_of(settled(tokens()))
    model = export_onnx(candidate, folder / "tokens.onnx", name="tiny")
    broken = altered((candidate, model), tmp_path / "broken.onnx", layer, turn)
    section = VerifySection(max_steps=0.02)
    parity_of((candidate, model), section)
    with pytest.raises(VerificationError, match=f"first layer that diverges is {layer}$"):
        parity_of(broken, section)


def test_a_layer_whose_norm_stays_apart_is_named_too(tmp_path):
    def forward(net, x):
        y = net.c1(x)
        return net.fc(pooled(functional.relu(net.n1(y)) + y))

    net = Net(forward, c1=conv(CHANNELS, 8), n1=nn.BatchNorm2d(8), fc=nn.Linear(8, CLASSES))
    candidate = candidate_of(settled(net))
    model = export_onnx(candidate, tmp_path / "m.onnx", name="tiny")
    parity_of((candidate, model))
    with pytest.raises(VerificationError, match=r"first layer that diverges is fc$"):
        parity_of(altered((candidate, model), tmp_path / "broken.onnx", "fc", turn_largest))


def test_numbers_that_are_none_never_pass(exported, tmp_path):
    def spoil(values):
        values.flat[0] = np.nan

    if exported[1].path.name == "int8.onnx":
        broken = altered_scale(exported, tmp_path / "broken.onnx")
    else:
        broken = altered(exported, tmp_path / "broken.onnx", "fc", spoil)
    with pytest.raises(VerificationError):
        parity_of(broken)


def altered_scale(exported, path):
    candidate, model = exported
    proto = onnx.load(model.path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.dims:
            tensor.CopyFrom(numpy_helper.from_array(np.float32(np.nan), tensor.name))
    onnx.save(proto, path)
    return candidate, replace(model, path=path)


def test_a_torch_answer_that_is_no_number_never_passes(floating):
    net = Net(lambda net, x: net.inner(x) * torch.nan, inner=floating[0].module)
    with pytest.raises(VerificationError):
        parity_of((candidate_of(net), floating[1]))


def test_a_file_that_is_no_model_is_refused(floating, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(VerificationError, match="export the model anew"):
        parity_of((floating[0], replace(floating[1], path=path)))


def test_another_models_file_is_refused(floating, tmp_path):
    other = candidate_of(settled(plain(), seed=1))
    model = export_onnx(other, tmp_path / "other.onnx", name="tiny")
    with pytest.raises(VerificationError, match=r"first layer that diverges is c1$"):
        parity_of((floating[0], model))


def test_every_batch_size_takes_part(floating, monkeypatch):
    sizes = []
    run_model = runtime.run_model

    def spy(session, batch):
        sizes.append(len(batch))
        return run_model(session, batch)

    monkeypatch.setattr(runtime, "run_model", spy)
    assert parity_of(floating).samples == sum(sizes) == 160
    assert tuple(sizes[:4]) == BATCH_SIZES == (1, 2, 7, 64)
    sizes.clear()
    assert parity_of(floating, VerifySection(samples=5)).samples == sum(sizes) == 5


def test_a_float_layer_behind_integers_may_carry_their_steps(integer, folder, tmp_path):
    candidate = calibrate(candidate_of(settled(plain())), PIXELS, target=TARGET, keep_float=("fc",))
    exported = candidate, export_onnx(candidate, folder / "mixed.onnx", name="tiny")
    parity = parity_of(exported)
    assert parity.allowed_steps == VerifySection().max_steps
    assert parity.max_steps <= 2
    with pytest.raises(VerificationError):
        parity_of(altered(exported, tmp_path / "broken.onnx", "fc", turn))
