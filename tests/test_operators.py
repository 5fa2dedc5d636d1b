"""Every family of operators: what ONNX Runtime makes of it, and that all graphs agree on it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_quantized import (
    CHANNELS,
    CLASSES,
    EXAMPLE,
    TARGET,
    Net,
    Samples,
    candidate_of,
    conv,
    images,
    noise_ratio,
    pooled,
    settled,
)
from torch import nn
from torch.nn import functional

from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.quantization import rules, spellings
from deploykit.quantization.deployable import candidate_graph, deployable
from deploykit.quantization.graphs import (
    integer_graph,
    read_parameters,
    set_graph_mode,
    training_graph,
)
from deploykit.quantization.rules import align
from deploykit.quantize import calibrate
from deploykit.recipe.sections import VerifySection
from deploykit.verify import verify_onnx

relu = functional.relu
PIXELS = images(64)[0]


class SqueezeExcite(nn.Module):
    """Scales channels by what their means say."""

    def __init__(self, channels, gate):
        super().__init__()
        self.shrink, self.grow = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.gate = gate

    def forward(self, x):
        return x * self.gate(self.grow(relu(self.shrink(functional.adaptive_avg_pool2d(x, 1)))))


def between(middle, *, after=16, **modules):
    """``middle`` between two convolutions of 16 channels, then a classifier."""
    return Net(
        lambda net, x: net.fc(pooled(relu(net.c2(middle(net, net.c1(x)))))),
        c1=conv(CHANNELS, 16),
        c2=conv(after, 16),
        fc=nn.Linear(16, CLASSES),
        **modules,
    )


def shuffle(net, x):
    a, b = x.chunk(2, 1)
    joined = torch.cat([a, relu(net.c3(b))], 1)
    return joined.view(-1, 2, 8, 12, 12).transpose(1, 2).contiguous().view(-1, 16, 12, 12)


def inception(net, x):
    pooled_most = functional.max_pool2d(relu(x), 3, 1, 1)
    return torch.cat([relu(net.c3(x)), relu(net.c4(x)), pooled_most], 1)


def transformer(net, x):
    x = net.c1(x).flatten(2).transpose(1, 2)
    y = net.norm(x)
    x = x + net.attention(y, y, y, need_weights=False)[0]
    x = x + net.down(functional.gelu(net.up(net.norm(x))))
    return net.fc(x.mean(1))


def convnext(net, x):
    y = net.norm(net.c3(x).permute(0, 2, 3, 1))
    return x + net.gain * net.down(functional.gelu(net.up(y))).permute(0, 3, 1, 2)


def gained():
    net = between(
        convnext,
        c3=conv(16, 16, 7, groups=16),
        norm=nn.LayerNorm(16),
        up=nn.Linear(16, 32),
        down=nn.Linear(32, 16),
    )
    net.gain = nn.Parameter(0.5 + torch.rand(16, 1, 1))
    return net


def pool_row(x):
    return functional.max_pool1d(functional.relu(x), 2)


class Written(nn.Module):
    """Layers written out as products with matrices of the model's own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(CHANNELS, 16) / 2)
        self.down = nn.Parameter(torch.randn(16, 16) / 4)
        self.shift = nn.Parameter(torch.randn(16))
        self.weight = nn.Parameter(torch.randn(CLASSES, 16) / 4)

    def forward(self, x):
        x = relu(x.permute(0, 2, 3, 1) @ self.up + self.shift)
        x = pooled(x.permute(0, 3, 1, 2))
        return torch.addmm(self.shift, x, self.down) @ self.weight.T


# name -> net, floats that become integers again (islands), operators that must be there
FAMILIES = {
    "hard-swish": (
        lambda: between(lambda net, x: functional.hardswish(x)),
        0,
        {"Clip": 1, "QLinearMul": 1},
    ),
    "silu": (
        lambda: between(lambda net, x: functional.silu(x)),
        0,
        {"QLinearSigmoid": 1, "QLinearMul": 1},
    ),
    "squeeze and excite": (
        lambda: between(lambda net, x: net.se(relu(x)), se=SqueezeExcite(16, torch.sigmoid)),
        0,
        {"QLinearSigmoid": 1, "QLinearMul": 1, "QLinearAveragePool": 2},
    ),
    "hard squeeze and excite": (
        lambda: between(
            lambda net, x: net.se(functional.hardswish(x)),
            se=SqueezeExcite(16, functional.hardsigmoid),
        ),
        0,
        {"Clip": 2, "QLinearMul": 2},
    ),
    "leaky relu": (
        lambda: between(lambda net, x: functional.leaky_relu(x, 0.1)),
        0,
        {"QLinearLeakyRelu": 1},
    ),
    "mean of windows": (
        lambda: between(lambda net, x: functional.avg_pool2d(relu(x), 2)),
        0,
        {"QLinearConv": 3},
    ),
    "mean of windows with zeros around": (
        lambda: between(lambda net, x: functional.avg_pool2d(relu(x), 3, 1, 1)),
        0,
        {"QLinearConv": 3},
    ),
    "mean of windows without zeros around": (
        lambda: between(
            lambda net, x: functional.avg_pool2d(relu(x), 3, 1, 1, count_include_pad=False)
        ),
        1,
        {"AveragePool": 1},
    ),
    "mean of windows that reach out of the image": (
        lambda: between(lambda net, x: functional.avg_pool2d(relu(x), 5, 3, ceil_mode=True)),
        1,
        {"AveragePool": 1},
    ),
    "mean of windows that could reach out": (
        lambda: between(
            lambda net, x: functional.avg_pool2d(
                relu(x), 2, 2, ceil_mode=True, count_include_pad=False
            )
        ),
        0,
        {"QLinearConv": 3},
    ),
    "norm behind a concatenation": (
        lambda: between(
            lambda net, x: relu(net.n4(torch.cat([x, net.c3(relu(net.n3(x)))], 1))),
            after=24,
            n3=nn.BatchNorm2d(16),
            c3=conv(16, 8),
            n4=nn.BatchNorm2d(24),
        ),
        0,
        {"QLinearConcat": 1, "QLinearConv": 5},
    ),
    "channel shuffle": (
        lambda: between(shuffle, c3=conv(8, 8)),
        0,
        {"Split": 1, "QLinearConcat": 1},
    ),
    "inception": (
        lambda: between(inception, after=32, c3=conv(16, 8), c4=conv(16, 8, 1)),
        0,
        {"QLinearConcat": 1, "MaxPool": 1, "Clip": 1},
    ),
    "relu behind a concatenation": (
        lambda: between(
            lambda net, x: relu(torch.cat([x, net.c3(x)], 1)), after=24, c3=conv(16, 8)
        ),
        0,
        {"QLinearConcat": 1, "Clip": 1},
    ),
    "relu that others bypass": (
        lambda: between(
            lambda net, x: (lambda y: y + net.c4(relu(y)))(x + net.c3(x)),
            c3=conv(16, 16),
            c4=conv(16, 16),
        ),
        0,
        {"QLinearAdd": 2, "Clip": 1},
    ),
    "depthwise": (
        lambda: between(lambda net, x: functional.relu6(net.c3(x)), c3=conv(16, 16, groups=16)),
        0,
        {"QLinearConv": 3},
    ),
    "grouped": (
        lambda: between(lambda net, x: relu(net.c3(x)), c3=conv(16, 16, groups=4)),
        0,
        {"QLinearConv": 3},
    ),
    "transposed": (
        lambda: between(
            lambda net, x: relu(net.up(functional.max_pool2d(x, 2))),
            up=nn.ConvTranspose2d(16, 16, 2, 2),
        ),
        1,
        {"ConvTranspose": 1, "QLinearConv": 2},
    ),
    "resize": (
        lambda: between(
            lambda net, x: functional.interpolate(
                functional.max_pool2d(x, 2), scale_factor=2, mode="bilinear"
            )
        ),
        1,
        {"Resize": 1, "QLinearConv": 2},
    ),
    "gelu": (lambda: between(lambda net, x: functional.gelu(x)), 1, {"Gelu": 1}),
    # in floats: norm, softmax and two products of attention, the sums and the mean
    "transformer": (
        lambda: Net(
            transformer,
            c1=nn.Conv2d(CHANNELS, 16, 4, 4),
            norm=nn.LayerNorm(16),
            attention=nn.MultiheadAttention(16, 2, batch_first=True),
            up=nn.Linear(16, 32),
            down=nn.Linear(32, 16),
            fc=nn.Linear(16, CLASSES),
        ),
        5,
        {"QGemm": 5, "Add": 2, "Softmax": 1, "QLinearConv": 1},
    ),
    "convnext": (gained, 2, {"QGemm": 3, "QLinearAdd": 1, "QLinearMul": 1, "QLinearConv": 3}),
    "sequence": (
        lambda: Net(
            lambda net, x: net.fc(
                pool_row(net.c2(pool_row(net.n1(net.c1(x.flatten(2)))))).mean(-1)
            ),
            c1=nn.Conv1d(CHANNELS, 16, 3, padding=1),
            n1=nn.BatchNorm1d(16),
            c2=nn.Conv1d(16, 16, 3, padding=1),
            fc=nn.Linear(16, CLASSES),
        ),
        0,
        {"QLinearConv": 2, "MaxPool": 2, "QLinearAveragePool": 1, "QGemm": 1},
    ),
    "uneven padding": (
        lambda: between(lambda net, x: relu(net.c3(x)), c3=nn.Conv2d(16, 16, 4, padding="same")),
        0,
        {"QLinearConv": 3},
    ),
    "products with matrices": (Written, 0, {"QGemm": 3}),
    "embedding": (
        lambda: Net(
            lambda net, x: net.fc(net.words((x[:, :1, :1] > 0).long()).flatten(1)),
            words=nn.Embedding(2, 4),
            fc=nn.Linear(48, CLASSES),
        ),
        1,
        {"QGemm": 1, "Gather": 1},
    ),
}


# Torch's own, once a process, of a model that it computes less well.
WARNS = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def exported(net, folder):
    """Quantize, write and verify; return what ONNX Runtime runs, and the error's power."""
    candidate = candidate_of(net)
    quantized = calibrate(candidate, PIXELS, target=TARGET)
    model = export_onnx(quantized, folder / "m.onnx", name="tiny")
    parity = verify_onnx(quantized, model, Samples(PIXELS), VerifySection(), threads=1)
    assert parity.max_steps <= 3
    pixels = torch.from_numpy(PIXELS)
    with torch.no_grad():
        expected, answered = (
            deployable(one, candidate_graph(one))(pixels) for one in (candidate, quantized)
        )
    return fused_operators(model, threads=1), noise_ratio(expected, answered)


@WARNS
@pytest.mark.slow
@pytest.mark.parametrize(("make", "islands", "wanted"), FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_runs_in_integers_where_they_are_faster(make, islands, wanted, tmp_path):
    report, noise = exported(settled(make()), tmp_path)
    found = {operator: report.operators.get(operator, 0) for operator in wanted}
    assert found == wanted
    assert report.operators.get("QuantizeLinear", 0) == islands
    assert noise < 0.01


@WARNS
@pytest.mark.slow
@pytest.mark.parametrize("make", [family[0] for family in FAMILIES.values()], ids=FAMILIES.keys())
def test_a_family_trains_what_it_ships(make):
    net = settled(make())
    graph = training_graph(net, EXAMPLE, TARGET, {})
    frozen = frozenset(name for name, _ in net.named_modules() if name.startswith("n"))
    set_graph_mode(graph, True, frozen)
    samples = torch.randn(32, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(0))
    for batch in samples.split(8):  # ranges of one batch may be others' in whole steps: ties
        graph(batch).square().sum().backward()
    learning = {name for name, one in graph.named_parameters() if one.grad is not None}
    assert learning >= {name for name, _ in net.named_parameters() if name.endswith("weight")}
    set_graph_mode(graph, False, frozenset())
    with torch.no_grad():
        trained = graph(samples)
        shipped = integer_graph(net, EXAMPLE, TARGET, read_parameters(graph), {})(samples)
    assert torch.isclose(trained, shipped, atol=1e-6).float().mean() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hard-swish", "relu that others bypass", "mean of windows"])
def test_without_our_spelling_floats_stand_between(family, monkeypatch, tmp_path):
    monkeypatch.setattr(spellings, "SPELLINGS", {})
    report, _ = exported(settled(FAMILIES[family][0]()), tmp_path)
    slow = "QLinearAveragePool" if family == "mean of windows" else "QuantizeLinear"
    assert report.operators.get(slow, 0) > FAMILIES[family][2].get(slow, 0)


@pytest.mark.slow
def test_light_operators_would_convert_a_stream_that_no_layer_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(rules, "_pays", lambda head, tails: True)
    report, _ = exported(settled(FAMILIES["transformer"][0]()), tmp_path)
    assert report.operators["QLinearAdd"] == 2


@given(
    st.floats(1e-3, 1.0),
    st.integers(0, 255),
    st.sampled_from([(0, 255), (-128, 127)]),
)
def test_aligned_integers_are_a_hard_sigmoids(scale, zero_point, limits):
    low, high = limits
    zero_point += low
    aligned, zero = align(scale, zero_point, low, high)
    assert align(aligned, zero, low, high) == pytest.approx((aligned, zero))
    steps = round(3 / aligned)
    assert low <= zero - steps
    integers = np.arange(low, high + 1)
    line = aligned / 6 * (np.clip(integers, zero - steps, zero + steps) - (zero - steps))
    values = aligned * (integers - zero)
    assert np.allclose(line, np.clip(values / 6 + 0.5, 0, 1), atol=1e-6)
    # All that was in range still is, but for half a step.
    assert values[0] <= scale * (low - zero_point) + aligned / 2 + 1e-6
    assert values[-1] >= scale * (high - zero_point) - aligned / 2 - 1e-6
