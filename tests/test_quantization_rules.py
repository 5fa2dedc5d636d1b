import pytest
import torch
from tiny_quantized import CHANNELS, CLASSES, EXAMPLE, TARGET, Net, conv, noise_ratio, plain, pooled
from torch import nn
from torch.nn import functional

from deploykit.errors import CompressionError
from deploykit.quantization.graphs import (
    calibration_graph,
    integer_graph,
    quiet,
    read_parameters,
    trace,
    training_graph,
)
from deploykit.quantization.layers import kernels
from deploykit.quantization.rules import quantized_tensors

relu = functional.relu


def pairs(module, example=EXAMPLE):
    """Return key -> root's key of every tensor that gets a pair, in graph order."""
    return quantized_tensors(trace(module, example).graph)


def keys(module, example=EXAMPLE):
    """Return the parameters' keys, each once, in graph order."""
    return list(dict.fromkeys(tensor.key for tensor in pairs(module, example)))


def moved(module, example=EXAMPLE):
    """Return operator -> key of every tensor that shares another one's parameters."""
    return {
        tensor.node.target.__name__: tensor.key
        for tensor in pairs(module, example)
        if tensor.node is not tensor.root
    }


def test_a_fused_group_is_quantized_only_where_it_is_entered_and_left():
    tensors = pairs(plain())
    assert [tensor.key for tensor in tensors if tensor.node is tensor.root] == [
        "input:0",
        "c1:conv2d#0",
        "c2:conv2d#0",
        ":avg_pool2d#0",
        "fc:linear#0",
    ]
    names = [tensor.node.target.__name__ for tensor in tensors if tensor.node.op != "placeholder"]
    assert names == [
        "relu.default",
        "relu.default",
        "avg_pool2d.default",
        "reshape.default",
        "linear.default",
    ]


def test_the_relu_behind_an_addition_belongs_to_it():
    net = Net(
        lambda net, x: net.c3(relu(net.c1(x) + net.c2(x))),
        c1=conv(CHANNELS, 8),
        c2=conv(CHANNELS, 8),
        c3=conv(8, 8),
    )
    assert keys(net) == ["input:0", "c1:conv2d#0", "c2:conv2d#0", ":add#0", "c3:conv2d#0"]


def test_values_that_are_only_moved_share_their_parameters():
    def forward(net, x):
        x = relu(net.c1(x))
        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return net.fc(functional.max_pool2d(x, 2).flatten(1))

    net = Net(forward, c1=conv(CHANNELS, 8), fc=nn.Linear(16 * 9, CLASSES))
    shared = moved(net)
    assert set(shared) == {"slice.Tensor", "pad.default", "max_pool2d.default", "reshape.default"}
    assert set(shared.values()) == {"c1:conv2d#0"}


@pytest.mark.parametrize(
    ("value", "shares"), [(None, True), (0.0, True), (1.5, False), (float("-inf"), False)]
)
def test_padding_shares_parameters_only_where_they_hold_its_value(value, shares):
    net = Net(
        lambda net, x: net.c2(functional.pad(relu(net.c1(x)), (1, 1), value=value)),
        c1=conv(CHANNELS, 8),
        c2=conv(8, 8),
    )
    assert ("pad.default" in moved(net)) == shares
    assert (":pad#0" in keys(net)) != shares


@pytest.mark.parametrize(
    ("clip", "fused"),
    [
        (functional.relu6, True),
        (lambda x: functional.relu6(x, inplace=True), True),
        (lambda x: x.clamp(0, 6), True),
        (lambda x: x.clamp(min=0.0), True),
        (lambda x: torch.clamp_min(x, 0), True),
        (lambda x: x.clamp(max=6), False),
        (lambda x: x.clamp(-1, 6), False),
        (lambda x: functional.hardtanh(x, 0.0, 4.0), True),
        (functional.hardtanh, False),
        (lambda x: functional.hardtanh(x, -1.0, 4.0), False),
    ],
)
def test_a_clip_fuses_only_if_it_begins_at_zero(clip, fused):
    net = Net(lambda net, x: net.c2(clip(net.c1(x))), c1=conv(CHANNELS, 8), c2=conv(8, 8))
    apart = [key for key in keys(net) if not key.startswith(("c", "input"))]
    assert (apart == []) == fused


def test_operators_in_place_are_known_as_their_twins():
    def forward(net, x):
        return net.c3(net.act(net.c1(x).add_(net.c2(x))))

    net = Net(
        forward,
        c1=conv(CHANNELS, 8),
        c2=conv(CHANNELS, 8),
        c3=conv(8, 8),
        act=nn.ReLU(inplace=True),
    )
    assert keys(net) == ["input:0", "c1:conv2d#0", "c2:conv2d#0", ":add#0", "c3:conv2d#0"]


def test_integers_are_never_annotated():
    def forward(net, x):
        count = net.count.reshape(1, 1, 1, 1)[:1]
        return relu(net.n1(net.c1(x) + count)) * x.argmax(1, keepdim=True)[:, :, :, :]

    net = Net(forward, c1=conv(CHANNELS, 8), n1=nn.BatchNorm2d(8))
    net.register_buffer("count", torch.tensor(3))
    assert keys(net) == ["input:0", "c1:conv2d#0"]


def test_arithmetic_with_a_literal_is_no_kernel():
    net = Net(lambda net, x: net.c2(net.c1(x) * 0.5 + 1.0), c1=conv(CHANNELS, 8), c2=conv(8, 8))
    assert keys(net) == ["input:0", "c1:conv2d#0", ":add#0", "c2:conv2d#0"]
    assert keys(Net(lambda net, x: x * 2.0 + 1.0)) == []


def test_a_tensor_of_the_models_own_is_quantized_by_its_name():
    net = Net(lambda net, x: net.c2(net.c1(x) * net.gain), c1=conv(CHANNELS, 8), c2=conv(8, 8))
    net.gain = nn.Parameter(torch.rand(8, 1, 1))
    expected = [":gain", ":mul#0", "c1:conv2d#0", "c2:conv2d#0", "input:0"]
    assert sorted(keys(net)) == expected


def test_a_convolution_that_is_read_twice_is_quantized_before_its_norm():
    def forward(net, x):
        y = net.c1(x)
        return net.c2(relu(net.n1(y)) + y)

    net = Net(forward, c1=conv(CHANNELS, 8), n1=nn.BatchNorm2d(8), c2=conv(8, 8))
    assert keys(net) == ["input:0", "c1:conv2d#0", "n1:batch_norm#0", ":add#0", "c2:conv2d#0"]


def test_a_module_that_is_called_twice_has_a_key_for_each_call():
    net = Net(lambda net, x: net.c2(net.c2(net.c1(x))), c1=conv(CHANNELS, 8), c2=conv(8, 8))
    found = keys(net)
    assert len(found) == len(set(found)) == 4


def test_a_weight_that_depends_on_the_input_is_no_layer():
    def forward(net, x):
        weight = net.c1(x).mean((0, 2, 3)).reshape(8, 1, 1, 1).expand(8, CHANNELS, 1, 1)
        return functional.conv2d(x, weight)

    graph = trace(Net(forward, c1=conv(CHANNELS, 8)), EXAMPLE)
    assert [node.args[1].target for node in kernels(graph.graph)] == ["c1.weight"]


def test_a_weight_made_of_parameters_is_a_layers():
    normed = nn.utils.parametrizations.weight_norm(conv(CHANNELS, 8))
    assert keys(Net(lambda net, x: net.c1(x), c1=normed)) == ["input:0", "c1:conv2d#0"]


def test_the_largest_in_a_window_of_a_sequence_is_only_moved():
    def forward(net, x):
        return net.c2(functional.max_pool1d(relu(net.c1(x.flatten(2))), 2))

    net = Net(forward, c1=nn.Conv1d(CHANNELS, 8, 3), c2=nn.Conv1d(8, 8, 3))
    assert moved(net)["max_pool1d.default"] == "c1:conv1d#0"


def test_a_norm_behind_a_computed_weight_stays_a_norm():
    normed = nn.utils.parametrizations.spectral_norm(conv(CHANNELS, 8, bias=False))
    net = Net(lambda net, x: relu(net.n1(net.c1(x))), c1=normed, n1=nn.BatchNorm2d(8)).eval()
    found = calibration_graph(net, EXAMPLE, TARGET, {})
    samples = torch.randn(8, *EXAMPLE.shape[1:])
    with torch.no_grad():
        expected = net(samples)
        found(samples)
        integers = integer_graph(net, EXAMPLE, TARGET, read_parameters(found), {})(samples)
    assert noise_ratio(expected, integers) < 0.01


@pytest.mark.parametrize("dilation", [1, 2, (3, 1)])
@pytest.mark.parametrize(
    ("padding", "size"), [("same", 3), ("same", 5), ("same", 4), ("same", (2, 3)), ("valid", 3)]
)
def test_padding_by_a_word_is_a_layers_too(padding, size, dilation):
    layer = nn.Conv2d(CHANNELS, 8, size, padding=padding, dilation=dilation)
    net = Net(lambda net, x: net.c1(x), c1=layer)
    assert keys(net) == ["input:0", "c1:conv2d#0"]
    samples = torch.randn(3, *EXAMPLE.shape[1:])
    with torch.no_grad():
        assert torch.allclose(trace(net, EXAMPLE)(samples), net(samples), atol=1e-5)


def test_dropout_gets_no_pair_of_its_own():
    net = Net(
        lambda net, x: net.fc(net.drop(pooled(net.c1(x)))),
        c1=conv(CHANNELS, 8),
        drop=nn.Dropout(0.5),
        fc=nn.Linear(8, CLASSES),
    )
    assert not any("dropout" in str(tensor.node.target) for tensor in pairs(net))
    assert "fc:linear#0" in keys(net)


def branches(first):
    """Two branches whose modules may be made and called in either order."""

    def forward(net, x):
        if first == "a":
            a = relu(net.na(net.a(x)))
            b = relu(net.nb(net.b(x)))
        else:
            b = relu(net.nb(net.b(x)))
            a = relu(net.na(net.a(x)))
        return net.fc(pooled(a + b))

    order = ("a", "b") if first == "a" else ("b", "a")
    modules = {name: conv(CHANNELS, 8, bias=False) for name in order}
    norms = {f"n{name}": nn.BatchNorm2d(8) for name in order}
    return Net(forward, **modules, **norms, fc=nn.Linear(8, CLASSES)).eval()


def watched(graph):
    return {module.tensor_key for module in graph.modules() if hasattr(module, "tensor_key")}


def test_keys_are_equal_in_every_graph_and_order_of_modules():
    expected = set(keys(branches("a")))
    for first in ("a", "b"):
        net = branches(first)
        assert set(keys(net)) == expected
        calibration = calibration_graph(net, EXAMPLE, TARGET, {})
        calibration(torch.randn(4, *EXAMPLE.shape[1:]))
        parameters = read_parameters(calibration)
        assert set(parameters) == expected
        integer_graph(net, EXAMPLE, TARGET, parameters, {})  # refuses any other set
    assert watched(training_graph(branches("b"), EXAMPLE, TARGET, {})) == expected


def test_pixels_get_no_pair_but_where_they_were_moved():
    net = Net(lambda net, x: net.c1(functional.pad(x, (1, 1))), c1=conv(CHANNELS, 8))
    exact = {"input:0": (1 / 64, 128)}
    graph = integer_graph(net.eval(), EXAMPLE, TARGET, {"c1:conv2d#0": (0.25, 100)}, exact)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    made = [node.args[:3] for node in graph.graph.nodes if node.target is quantize]
    assert [arguments[1:] for arguments in made] == [(1 / 64, 128), (0.25, 100)]
    assert made[0][0].op != "placeholder"


def test_parameters_of_another_model_are_refused_by_name():
    given = {"input:0": (1 / 64, 128), "c9:conv2d#0": (0.1, 100)}
    net = Net(lambda net, x: net.c1(x), c1=conv(CHANNELS, 8))
    with pytest.raises(CompressionError, match=r"c1:conv2d#0.*missing.*c9:conv2d#0.*unknown"):
        integer_graph(net, EXAMPLE, TARGET, given, {})


def test_only_training_refuses_a_range_without_end():
    net = Net(
        lambda net, x: net.c2(
            functional.max_pool2d(functional.pad(net.c1(x), (1, 1, 1, 1), value=-torch.inf), 3)
        ),
        c1=conv(CHANNELS, 8),
        c2=conv(8, 8),
    )
    samples = torch.randn(4, *EXAMPLE.shape[1:])
    calibration = calibration_graph(net.eval(), EXAMPLE, TARGET, {})
    training = training_graph(net, EXAMPLE, TARGET, {})
    with quiet(), torch.no_grad():
        expected = calibration(samples)
        training(samples)
    # Calibration looks past infinity: the smallest integer serves the pooling as well.
    parameters = read_parameters(calibration)
    answer = integer_graph(net, EXAMPLE, TARGET, parameters, {})(samples)
    assert noise_ratio(expected, answer) < 0.01
    with pytest.raises(CompressionError, match="finite values in :pad#0"):
        read_parameters(training)
