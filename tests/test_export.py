import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from tiny_quantized import (
    CHANNELS,
    CLASSES,
    PREPROCESS,
    SIDE,
    TARGET,
    Net,
    Samples,
    array_candidate,
    candidate_of,
    conv,
    images,
    noise_ratio,
    plain,
    pooled,
    settled,
)
from torch import nn
from torch.nn import functional

from deploykit.data.pixels import normalize
from deploykit.errors import ExportError, ModelError
from deploykit.exporter import OPSET, export_onnx
from deploykit.fusion import fused_operators
from deploykit.models.weights import _tensor_fault
from deploykit.quantize import calibrate
from deploykit.recipe.sections import VerifySection
from deploykit.structure import rebuild, save_candidate
from deploykit.verify import verify_onnx

pytestmark = pytest.mark.slow

PIXELS = images(96)[0]
relu = functional.relu


@pytest.fixture(scope="module")
def floating():
    return candidate_of(settled(plain()))


@pytest.fixture(scope="module")
def integer(floating):
    return calibrate(floating, PIXELS, target=TARGET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(floating, integer, folder):
    return {
        "float": export_onnx(floating, folder / "float.onnx", name="tiny-net"),
        "int8": export_onnx(integer, folder / "int8.onnx", name="tiny-net"),
    }


@pytest.fixture(params=["float", "int8"])
def model(request, models):
    return models[request.param]


def test_grey_images_may_be_viewed_as_rows(tmp_path):
    """Pixels of one channel are laid out as those of several: strides of their own fail a view."""
    net = Net(lambda net, x: net.fc(net.c(x).view(x.shape[0], -1)), c=conv(1, 4))
    net.fc = nn.Linear(4 * SIDE * SIDE, CLASSES)
    grey = {**PREPROCESS, "channels": 1}
    candidate = candidate_of(net.eval(), preprocess=grey)
    shape = (-1, SIDE, SIDE, 1)
    (spec,) = candidate.signature.inputs
    candidate = replace(
        candidate,
        signature=replace(candidate.signature, inputs=(replace(spec, shape=shape),)),
        structure={**candidate.structure, "sample_shape": list(shape[1:])},
    )
    pixels = PIXELS[:32, :, :, :1]
    for one in (candidate, calibrate(candidate, pixels, target=TARGET)):
        model = export_onnx(one, tmp_path / "grey.onnx", name="grey")
        verify_onnx(one, model, Samples(pixels), VerifySection(samples=32), threads=1)


def run(model, values):
    session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: values})[0]


# The border


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_the_batch_is_dynamic(model, count):
    answer = run(model, PIXELS[:count])
    assert answer.shape == (count, CLASSES)
    assert np.allclose(answer[0], run(model, PIXELS[:1])[0], atol=1e-5)


def test_the_input_is_raw_pixels(model):
    proto = onnx.load(model.path)
    (image,) = proto.graph.input
    (logits,) = proto.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert image.type.tensor_type.elem_type == TensorProto.UINT8
    assert [d.dim_value for d in image.type.tensor_type.shape.dim][1:] == [SIDE, SIDE, CHANNELS]
    assert image.type.tensor_type.shape.dim[0].dim_param


def test_normalization_inside_is_that_of_training(floating, models):
    with torch.no_grad():
        expected = floating.module(normalize(torch.from_numpy(PIXELS), PREPROCESS)).numpy()
    assert np.allclose(run(models["float"], PIXELS), expected, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_normalization_by_channel_is_kept(floating, tmp_path, quantized):
    preprocess = {**PREPROCESS, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    signature = replace(floating.signature, preprocess=preprocess)
    candidate = replace(floating, signature=signature)
    if quantized:
        candidate = calibrate(candidate, PIXELS, target=TARGET)
    model = export_onnx(candidate, tmp_path / "m.onnx", name="tiny")
    with torch.no_grad():
        expected = floating.module(normalize(torch.from_numpy(PIXELS), preprocess)).numpy()
    assert noise_ratio(expected, run(model, PIXELS)) < (0.01 if quantized else 1e-8)


def test_arrays_are_taken_as_they_are(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    model = export_onnx(array_candidate(net, (6,)), tmp_path / "m.onnx", name="tiny")
    values = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    with torch.no_grad():
        assert np.allclose(run(model, values), net(torch.from_numpy(values)), atol=1e-5)
    (features,) = onnx.load(model.path).graph.input
    assert (features.name, features.type.tensor_type.elem_type) == ("features", TensorProto.FLOAT)


def test_an_argument_may_have_any_name(tmp_path):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(SIDE * SIDE * CHANNELS, CLASSES)

        def forward(self, picture):
            return self.fc(picture.view(picture.size(0), -1))

    candidate = candidate_of(Other().eval())
    model = export_onnx(candidate, tmp_path / "m.onnx", name="tiny")
    assert [value.name for value in onnx.load(model.path).graph.input] == ["image"]
    verify_onnx(candidate, model, Samples(PIXELS), VerifySection(), threads=1)


# The file


def test_the_file_says_what_it_is_and_not_where_it_was_made(model):
    proto = onnx.load(model.path)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", OPSET)]
    assert model.opset == OPSET == 20
    assert proto.graph.name == "tiny-net"
    props = {prop.key: prop.value for prop in proto.metadata_props}
    assert props == {"name": "tiny-net", "labels": json.dumps(list("abcde"))}
    assert not proto.functions
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]
    for part in [proto.graph, *proto.graph.node, *values]:
        assert not part.metadata_props
        assert not part.doc_string
    data = model.path.read_bytes()
    for word in (b"/tmp", b"/home", b"site-packages", b".py", b"Traceback", b"pkg.torch"):
        assert word not in data
    assert [path.suffix for path in model.path.parent.iterdir()] == [".onnx", ".onnx"]


def test_weights_of_layers_are_stored_as_int8(models):
    proto = onnx.load(models["int8"].path)
    kinds = {tuple(tensor.dims): tensor.data_type for tensor in proto.graph.initializer}
    for shape in ((8, CHANNELS, 3, 3), (8, 8, 3, 3), (CLASSES, 8)):
        assert kinds[shape] == TensorProto.INT8
    floats = [t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in floats) <= 8  # biases and scales


def test_layers_are_called_as_the_modules(models):
    for model in models.values():
        names = [node.name for node in onnx.load(model.path).graph.node]
        assert {"c1", "c2", "fc"} <= set(names)
        assert len(set(names)) == len(names)


def test_layers_keep_their_names_beside_products_that_are_none(tmp_path):
    def forward(net, x):
        x = functional.relu(net.c1(x)).unsqueeze(2)
        return pooled(net.c3(x).squeeze(2)) @ net.projection

    net = Net(forward, c1=conv(CHANNELS, 8), c3=nn.Conv3d(8, 8, 1))
    net.projection = nn.Parameter(torch.randn(8, CLASSES))
    model = export_onnx(candidate_of(net.eval()), tmp_path / "m.onnx", name="tiny")
    assert {"c1", "c3"} <= {node.name for node in onnx.load(model.path).graph.node}


@pytest.mark.parametrize(("value", "right"), [(float("-inf"), True), (float("nan"), False)])
def test_a_mask_may_hold_infinity(tmp_path, value, right):
    net = Net(lambda net, x: net.fc((x.flatten(1) + net.mask).exp()), fc=nn.Linear(432, CLASSES))
    net.register_buffer("mask", torch.zeros(432).index_fill(0, torch.arange(9), value))
    with nullcontext() if right else pytest.raises(ModelError, match="mask"):
        export_onnx(candidate_of(net.eval()), tmp_path / "m.onnx", name="tiny")


def test_weights_with_a_mask_are_taken_where_the_model_has_it():
    masked, whole = torch.tensor([0.0, float("-inf")]), torch.zeros(2)
    assert _tensor_fault(masked, masked, None) == ""
    assert "infinity" in _tensor_fault(masked, whole, None)
    assert "NaN" in _tensor_fault(masked * 0, masked, None)


def test_every_layer_of_the_integer_model_runs_in_integers(models):
    report = fused_operators(models["int8"], threads=1)
    assert report.integer == ("c1", "c2", "fc")
    assert report.floating == ()


FRESH = """
from pathlib import Path
from deploykit.exporter import export_onnx
from deploykit.structure import load_candidate
for name in ("float", "int8"):
    candidate = load_candidate(Path(name), base=Path())
    export_onnx(candidate, Path(name) / "m.onnx", name="tiny")
"""


def test_two_folders_and_processes_give_the_same_bytes(tmp_path):
    structure = {
        "model": {"name": "digits-cnn", "arguments": {"widths": [8, 8]}},
        "classes": CLASSES,
        "sample_shape": [SIDE, SIDE, CHANNELS],
    }
    net = settled(rebuild(structure, base=tmp_path))
    candidate = replace(candidate_of(net), structure=structure)
    candidates = {"float": candidate, "int8": calibrate(candidate, PIXELS, target=TARGET)}
    place = tmp_path / "quite another place"
    for name, one in candidates.items():
        save_candidate(one, place / name)
    command = [sys.executable, "-W", "error", "-c", FRESH]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name, one in candidates.items():
        export_onnx(one, tmp_path / "m.onnx", name="tiny")
        assert (tmp_path / "m.onnx").read_bytes() == (place / name / "m.onnx").read_bytes()


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    net = settled(plain())
    with torch.no_grad():
        net.c2.weight[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match=r"c2\.weight"):
        export_onnx(candidate_of(net), tmp_path / "m.onnx", name="tiny")
    assert list(tmp_path.iterdir()) == []


def refused(forward, tmp_path, error):
    net = Net(forward, c1=conv(CHANNELS, 8), fc=nn.Linear(8, CLASSES)).eval()
    with pytest.raises(error) as caught:
        export_onnx(candidate_of(net), tmp_path / "m.onnx", name="tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert list(tmp_path.iterdir()) == []
    return caught.value


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (lambda net, x: net.fc(pooled(torch.special.i0(net.c1(x)))), "prims.bessel_i0"),
        (
            lambda net, x: net.fc(torch.linalg.svd(net.c1(x))[1].mean(-1)),
            "aten._linalg_svd",
        ),
    ],
)
def test_an_operator_that_onnx_lacks_is_named_in_one_sentence(tmp_path, capfd, forward, operator):
    error = refused(forward, tmp_path, ExportError)
    assert (error.operator, error.opset) == (operator, OPSET)
    assert operator in str(error)
    assert capfd.readouterr() == ("", "")


def test_a_branch_on_values_is_refused_in_one_sentence(tmp_path, capfd):
    def forward(net, x):
        x = net.c1(x)
        return net.fc(pooled(x if x.sum() > 0 else -x))

    assert "data-dependent" in str(refused(forward, tmp_path, ModelError))
    assert capfd.readouterr() == ("", "")


def test_a_batch_size_written_into_the_model_is_refused(tmp_path):
    message = str(
        refused(lambda net, x: net.fc(pooled(net.c1(x)).reshape(2, 8)), tmp_path, ModelError)
    )
    assert "one batch size" in message


# What models are made of


def head(channels=16):
    return nn.Linear(channels, CLASSES)


def squeeze_excite(net, x):
    x = relu(net.n1(net.c1(x)))
    gate = torch.sigmoid(net.c3(relu(net.c2(functional.adaptive_avg_pool2d(x, 1)))))
    return net.fc(pooled(net.c4(x * gate)))


def option_a(net, x):
    x = relu(net.c1(x))
    shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    return net.fc(pooled(relu(net.n2(net.c2(x)) + shortcut)))


NETS = {
    "residual": lambda: Net(
        lambda net, x: net.fc(pooled(relu(net.n2(net.c2(relu(net.c1(x)))) + net.c3(x)))),
        c1=conv(CHANNELS, 16),
        c2=conv(16, 16, bias=False),
        n2=nn.BatchNorm2d(16),
        c3=conv(CHANNELS, 16, 1),
        fc=head(),
    ),
    "depthwise and grouped": lambda: Net(
        lambda net, x: net.fc(
            pooled(relu(net.c3(functional.relu6(net.n2(net.c2(relu(net.c1(x))))))))
        ),
        c1=conv(CHANNELS, 8),
        c2=conv(8, 8, groups=8, bias=False),
        n2=nn.BatchNorm2d(8),
        c3=conv(8, 16, groups=4),
        fc=head(),
    ),
    "concat": lambda: Net(
        lambda net, x: net.fc(pooled(relu(net.c3(torch.cat([relu(net.c1(x)), net.c2(x)], 1))))),
        c1=conv(CHANNELS, 8),
        c2=conv(CHANNELS, 8),
        c3=conv(16, 16),
        fc=head(),
    ),
    "squeeze and excite": lambda: Net(
        squeeze_excite,
        c1=conv(CHANNELS, 16, bias=False),
        n1=nn.BatchNorm2d(16),
        c2=conv(16, 4, 1),
        c3=conv(4, 16, 1),
        c4=conv(16, 16),
        fc=head(),
    ),
    "hard swish": lambda: Net(
        lambda net, x: net.fc(
            pooled(functional.hardswish(net.n2(net.c2(functional.hardswish(net.c1(x))))))
        ),
        c1=conv(CHANNELS, 16),
        c2=conv(16, 16),
        n2=nn.BatchNorm2d(16),
        fc=head(),
    ),
    "layer norm and gelu": lambda: Net(
        lambda net, x: net.fc(functional.gelu(net.ln(net.l1(x.flatten(1))))),
        l1=nn.Linear(SIDE * SIDE * CHANNELS, 16),
        ln=nn.LayerNorm(16),
        fc=head(),
    ),
    "constants": lambda: Net(
        lambda net, x: net.fc(pooled(relu(net.c1(x * 0.5 + 0.1)) * net.gain.weight[0, 0] / 2)),
        c1=conv(CHANNELS, 16),
        gain=nn.Linear(1, 1),
        fc=head(),
    ),
    "viewed": lambda: Net(
        lambda net, x: net.fc(relu(net.c1(x)).view(x.size(0), -1)),
        c1=conv(CHANNELS, 4, stride=2),
        fc=head(4 * 36),
    ),
}
IN_FLOAT = {
    "transposed": (
        lambda: Net(
            lambda net, x: net.fc(pooled(relu(net.n1(net.up(relu(net.c1(x))))))),
            c1=conv(CHANNELS, 16, stride=2),
            up=nn.ConvTranspose2d(16, 16, 2, 2),
            n1=nn.BatchNorm2d(16),
            fc=head(),
        ),
        {"up": "no integer kernel for ConvTranspose"},
    ),
    "attention": (
        lambda: Net(
            lambda net, x: (
                lambda t: net.fc((torch.softmax(net.q(t) @ t.transpose(1, 2), -1) @ t).mean(1))
            )(net.c1(x).flatten(2).transpose(1, 2)),
            c1=nn.Conv2d(CHANNELS, 16, 4, 4),
            q=nn.Linear(16, 16),
            fc=head(),
        ),
        {"matmul": "is not quantized"},
    ),
}


def proved(net, path):
    """Export float and int8, verify both, compare int8 with float; return the fusion."""
    candidate = candidate_of(net)
    model = export_onnx(candidate, path / "float.onnx", name="tiny")
    verify_onnx(candidate, model, Samples(PIXELS), VerifySection(), threads=1)
    quantized = calibrate(candidate, PIXELS, target=TARGET)
    integers = export_onnx(quantized, path / "int8.onnx", name="tiny")
    parity = verify_onnx(quantized, integers, Samples(PIXELS), VerifySection(), threads=1)
    assert parity.max_steps <= 3
    assert noise_ratio(run(model, PIXELS), run(integers, PIXELS)) < 0.02
    return fused_operators(integers, threads=1)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())
def test_every_layer_runs_in_integers_close_to_float(make, tmp_path):
    assert proved(settled(make()), tmp_path).floating == ()


@pytest.mark.parametrize(("make", "reasons"), IN_FLOAT.values(), ids=IN_FLOAT.keys())
def test_what_stays_in_float_is_named_and_right(make, reasons, tmp_path):
    report = proved(settled(make()), tmp_path)
    assert report.floating
    for layer in report.floating:
        (why,) = (why for name, why in reasons.items() if name in layer.name)
        assert why in layer.why


def test_padding_stays_between_integers(tmp_path):
    net = Net(
        option_a,
        c1=conv(CHANNELS, 8),
        c2=conv(8, 16, stride=2, bias=False),
        n2=nn.BatchNorm2d(16),
        fc=head(),
    )
    report = proved(settled(net), tmp_path)
    assert report.floating == ()
    assert report.operators["Pad"] == 1
    assert "QuantizeLinear" not in report.operators
    assert report.operators["DequantizeLinear"] == 1  # the logits
