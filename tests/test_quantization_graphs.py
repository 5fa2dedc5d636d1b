import copy

import numpy as np
import pytest
import torch
from tiny_quantized import (
    CHANNELS,
    CLASSES,
    EXAMPLE,
    SIDE,
    TARGET,
    Net,
    conv,
    noise_ratio,
    plain,
    pooled,
    settled,
)
from tiny_training import SignalAfter, tiny_dataset, tiny_net, tiny_plan, tiny_training
from torch import nn
from torch.nn import functional

from deploykit.errors import CompressionError, Interrupted
from deploykit.quantization import graphs
from deploykit.quantization.canonical import canonicalize
from deploykit.quantization.graphs import (
    calibration_graph,
    freeze_statistics,
    integer_graph,
    quiet,
    read_parameters,
    set_graph_mode,
    trace,
    training_graph,
)
from deploykit.quantization.layers import kernels, module_of
from deploykit.recipe.sections import GroupSection
from deploykit.train import fit, stop_on_signals

relu = functional.relu
NOTHING = frozenset()
aten = torch.ops.aten


def batch(count=32, seed=0):
    return torch.randn(count, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(seed))


def clone(graph):
    with quiet():  # copying a graph warns of torch's own deprecations
        return copy.deepcopy(graph)


def norms(graph):
    return [node for node in graph.graph.nodes if "batch_norm" in node.name]


def statistics(graph):
    return {
        name: value.clone()
        for name, value in graph.state_dict().items()
        if name.endswith(("running_mean", "running_var"))
    }


def ranges(graph):
    return {
        module.tensor_key: (
            module.activation_post_process.min_val.item(),
            module.activation_post_process.max_val.item(),
        )
        for module in graph.modules()
        if hasattr(module, "tensor_key")
    }


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def prepared():
    """A training graph with settled ranges; tests take a copy."""
    graph = training_graph(settled(plain()), EXAMPLE, TARGET, {})
    set_graph_mode(graph, True, NOTHING)
    for seed in range(3):
        graph(batch(seed=seed))
    return graph


@pytest.fixture
def graph(prepared):
    return clone(prepared)


# BatchNorm


def constants(graph):
    """Return momentum and epsilon of each BatchNorm, and the epsilon in each folded scale."""
    added = [
        user.args[1]
        for norm in norms(graph)
        for user in norm.args[4].users
        if user.target is aten.add.Tensor
    ]
    return [norm.args[6:8] for norm in norms(graph)], added


def test_batch_norm_keeps_its_own_momentum_and_epsilon(graph):
    assert constants(graph) == ([(0.3, 0.1), (0.1, 1e-5)], [0.1, 1e-5])


def test_the_library_alone_loses_them(monkeypatch):
    monkeypatch.setattr(graphs, "restore_constants", lambda graph, norms: None)
    assert constants(training_graph(settled(plain()), EXAMPLE, TARGET, {}))[0][0] != (0.3, 0.1)


def divided(graph):
    """Return the shapes of what each folded scale is divided out of."""
    found = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is aten.div.Tensor and args[0].dim() == 4:
                found.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with Watch():
        graph(batch())
    return found


def test_the_folded_scale_leaves_through_the_weight_and_changes_no_answer(monkeypatch):
    mended = training_graph(settled(plain()), EXAMPLE, TARGET, {})
    monkeypatch.setattr(graphs, "divide_weights", lambda graph: None)
    alone = training_graph(settled(plain()), EXAMPLE, TARGET, {})
    for graph in (mended, alone):
        set_graph_mode(graph, True, NOTHING)
    assert divided(mended) == [(8, CHANNELS, 3, 3), (8, 8, 3, 3)]
    assert divided(alone) == [(32, 8, SIDE, SIDE)] * 2
    # A sum here and there rounds the other way.
    equal = torch.isclose(mended(batch()), alone(batch()), atol=1e-5)
    assert equal.float().mean() > 0.95


def test_statistics_move_as_the_float_modules_do():
    net = settled(plain())
    graph = training_graph(net, EXAMPLE, TARGET, {})
    set_graph_mode(graph, True, NOTHING)
    graph(batch())
    float_net = copy.deepcopy(net).train()
    float_net(batch())
    expected = statistics(float_net)
    for name, value in statistics(graph).items():
        spread = expected[name.replace("mean", "var")].sqrt().max()
        assert torch.allclose(value, expected[name], rtol=0.05, atol=0.1 * spread), name


def test_a_cumulative_average_goes_on_with_the_default_momentum():
    net = Net(
        lambda net, x: relu(net.n1(net.c1(x))),
        c1=conv(CHANNELS, 8),
        n1=nn.BatchNorm2d(8, momentum=None),
    )
    assert constants(training_graph(net.eval(), EXAMPLE, TARGET, {}))[0] == [(0.1, 1e-5)]


def test_mode_is_set_for_each_norm(graph):
    set_graph_mode(graph, True, frozenset({"n1"}))
    assert [norm.args[5] for norm in norms(graph)] == [False, True]
    set_graph_mode(graph, True, NOTHING)
    assert [norm.args[5] for norm in norms(graph)] == [True, True]
    set_graph_mode(graph, False, NOTHING)
    assert [norm.args[5] for norm in norms(graph)] == [False, False]


def test_frozen_statistics_stand_still_and_others_move(graph):
    for subject in (graph, clone(graph)):
        set_graph_mode(subject, True, frozenset({"n2"}))
        before = statistics(subject)
        subject(batch())
        assert moved(before, statistics(subject)) == {"n1.running_mean", "n1.running_var"}


def test_evaluation_moves_neither_statistics_nor_ranges(graph):
    set_graph_mode(graph, False, NOTHING)
    before = statistics(graph), ranges(graph)
    graph(batch() * 9)
    assert not moved(before[0], statistics(graph))
    assert ranges(graph) == before[1]


def test_training_moves_ranges(graph):
    set_graph_mode(graph, True, NOTHING)
    before = ranges(graph)
    graph(batch() * 9)
    assert all(ranges(graph)[key] != before[key] for key in before)


def test_frozen_statistics_stay_until_the_mode_is_set_anew(graph):
    set_graph_mode(graph, True, NOTHING)
    freeze_statistics(graph)
    before = statistics(graph), ranges(graph)
    graph(batch() * 9)
    assert not moved(before[0], statistics(graph))
    assert ranges(graph) == before[1]
    set_graph_mode(graph, True, NOTHING)
    graph(batch() * 9)
    assert moved(before[0], statistics(graph)) == set(before[0])


def test_norms_without_statistics_of_their_own_are_left_as_they_are():
    net = Net(
        lambda net, x: relu(net.n1(net.c1(x))),
        c1=conv(CHANNELS, 8),
        n1=nn.BatchNorm2d(8, track_running_stats=False),
    )
    graph = training_graph(net.eval(), EXAMPLE, TARGET, {})
    for training in (True, False):
        set_graph_mode(graph, training, NOTHING)
        graph(batch())
        assert [norm.args[5] for norm in norms(graph)] == [True]


def test_dropout_drops_in_training_only():
    net = Net(
        lambda net, x: net.fc(net.drop(pooled(net.c1(x)))),
        c1=conv(CHANNELS, 32),
        drop=nn.Dropout(0.5),
        fc=nn.Linear(32, CLASSES),
    )
    graph = training_graph(net, EXAMPLE, TARGET, {})
    set_graph_mode(graph, True, NOTHING)
    graph(batch())
    freeze_statistics(graph)
    assert not torch.equal(graph(batch()), graph(batch()))
    set_graph_mode(graph, False, NOTHING)
    assert torch.equal(graph(batch()), graph(batch()))


def test_dropout_does_not_stretch_the_range_of_what_it_reads():
    net = Net(
        lambda net, x: net.fc(net.drop(relu(net.l1(x.flatten(1))))),
        l1=nn.Linear(EXAMPLE[0].numel(), 32),
        drop=nn.Dropout(0.9),
        fc=nn.Linear(32, CLASSES),
    )
    graph = training_graph(settled(net), EXAMPLE, TARGET, {})
    set_graph_mode(graph, True, NOTHING)
    for seed in range(3):
        graph(batch(seed=seed))
    with torch.no_grad():
        largest = max(relu(net.l1(batch(seed=seed).flatten(1))).max() for seed in range(3))
    assert ranges(graph)["l1:linear#0"][1] <= largest * 1.05


# Through the training loop

FREEZING = tiny_plan(
    epochs=3,
    groups=(GroupSection(modules=("bn1", "conv1"), thaw_epoch=2),),
    average=None,
)


class Watch:
    """Keeps the statistics with which each epoch begins."""

    def __init__(self):
        self.seen = {}

    def __call__(self, graph, epoch, _epochs):
        self.seen[epoch] = statistics(graph)


def fit_graph(graph, watch, checkpoints=None, **changes):
    training = tiny_training(checkpoints, plan=FREEZING, augment=(), **changes)
    fit(graph, training, stage="quantize", set_mode=set_graph_mode, on_epoch=watch)
    watch.seen[FREEZING.epochs] = statistics(graph)


@pytest.fixture(scope="module")
def tiny_graph():
    return training_graph(tiny_net(), torch.zeros(2, 1, 8, 8), TARGET, {})


def test_frozen_norms_move_from_the_epoch_that_thaws_them(tiny_graph):
    watch = Watch()
    fit_graph(clone(tiny_graph), watch)
    still = {"layer1.1.running_mean", "layer1.1.running_var"}
    both = still | {"bn1.running_mean", "bn1.running_var"}
    seen = watch.seen
    assert [moved(seen[epoch], seen[epoch + 1]) for epoch in range(3)] == [still, still, both]


@pytest.mark.parametrize("stop", [{"epochs": 2}, {"steps": 9}, {"steps": 14}], ids=str)
def test_they_do_so_after_a_resume_too_bit_for_bit(tiny_graph, tmp_path, stop):
    expected, interrupted, resumed = (clone(tiny_graph) for _ in range(3))
    whole, watch = Watch(), Watch()
    fit_graph(expected, whole)
    with stop_on_signals(), pytest.raises(Interrupted):
        fit_graph(interrupted, Watch(), tmp_path, progress=SignalAfter(**stop))
    fit_graph(resumed, watch, tmp_path)
    for name, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    if 1 in watch.seen:  # stopped before the epoch that thaws them
        assert not moved(whole.seen[2], watch.seen[2])
    assert "bn1.running_mean" in moved(watch.seen[2], watch.seen[3])


def test_tiny_data_are_enough_for_these_tests():
    assert len(tiny_dataset().train) > FREEZING.batch_size


# From training to integers


def weights(graph):
    """Return what rounds the weight of each layer, in graph order."""
    made = [kernel.args[1] for kernel in kernels(graph.graph)]
    return [node.args[0] if node.target is aten.div.Tensor else node for node in made]


def to_integers(net, graph):
    """Return the integer graph of what ``graph`` has learned about ``net``."""
    trained = graph.state_dict()
    module = copy.deepcopy(net)
    module.load_state_dict({k: trained.get(k, v) for k, v in module.state_dict().items()})
    return integer_graph(module, EXAMPLE, TARGET, read_parameters(graph), {})


def test_weights_of_the_last_training_pass_are_those_that_ship(graph):
    net = settled(plain())
    set_graph_mode(graph, True, NOTHING)
    freeze_statistics(graph)
    graph(batch())
    integers = to_integers(net, graph)
    learned = [graph.get_submodule(node.target).scale for node in weights(graph)]
    shipped = [getattr(integers, node.args[1].target) for node in weights(integers)]
    assert len(learned) == 3
    for ours, theirs in zip(learned, shipped, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)


UNUSUAL = {
    "linear and norm": lambda: Net(
        lambda net, x: net.fc(relu(net.n1(net.l1(x.flatten(1))))),
        l1=nn.Linear(EXAMPLE[0].numel(), 16, bias=False),
        n1=nn.BatchNorm1d(16),
        fc=nn.Linear(16, CLASSES),
    ),
    "linear and norm over another axis": lambda: Net(
        lambda net, x: net.fc(relu(net.n1(net.l1(x.flatten(2)[:, :, :12]))).flatten(1)),
        l1=nn.Linear(12, CHANNELS),
        n1=nn.BatchNorm1d(CHANNELS),
        fc=nn.Linear(CHANNELS * CHANNELS, CLASSES),
    ),
    "a convolution read twice": lambda: Net(
        lambda net, x: net.fc(pooled((lambda y: relu(net.n1(y)) + y)(net.c1(x)))),
        c1=conv(CHANNELS, 8),
        n1=nn.BatchNorm2d(8),
        fc=nn.Linear(8, CLASSES),
    ),
    "a shared convolution, two norms": lambda: Net(
        lambda net, x: net.fc(pooled(relu(net.n2(net.c2(relu(net.n1(net.c2(net.c1(x))))))))),
        c1=conv(CHANNELS, 8),
        c2=conv(8, 8, bias=False),
        n1=nn.BatchNorm2d(8),
        n2=nn.BatchNorm2d(8),
        fc=nn.Linear(8, CLASSES),
    ),
    "a shared norm": lambda: Net(
        lambda net, x: net.fc(pooled(relu(net.n1(net.c2(relu(net.n1(net.c1(x)))))))),
        c1=conv(CHANNELS, 8),
        c2=conv(8, 8),
        n1=nn.BatchNorm2d(8),
        fc=nn.Linear(8, CLASSES),
    ),
    "a norm without scale and shift": lambda: Net(
        lambda net, x: net.fc(pooled(relu(net.n1(net.c1(x))))),
        c1=conv(CHANNELS, 8),
        n1=nn.BatchNorm2d(8, affine=False),
        fc=nn.Linear(8, CLASSES),
    ),
    "grouped transposed convolution": lambda: Net(
        lambda net, x: net.fc(pooled(relu(net.n1(net.t1(net.c1(x)))))),
        c1=conv(CHANNELS, 8, stride=2),
        t1=nn.ConvTranspose2d(8, 8, 2, 2, groups=4),
        n1=nn.BatchNorm2d(8),
        fc=nn.Linear(8, CLASSES),
    ),
    "convolution over one axis": lambda: Net(
        lambda net, x: net.fc(relu(net.n1(net.c1(x.flatten(2)))).mean(-1)),
        c1=nn.Conv1d(CHANNELS, 8, 5, 2),
        n1=nn.BatchNorm1d(8),
        fc=nn.Linear(8, CLASSES),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_training_calibration_and_integers_compute_the_same(make):
    net = settled(make())
    samples = batch(64)
    calibration = calibration_graph(net, EXAMPLE, TARGET, {})
    training = training_graph(net, EXAMPLE, TARGET, {})
    set_graph_mode(training, True, frozenset({"n1", "n2"}))
    with torch.no_grad():
        expected = net(samples)
        assert torch.allclose(calibration(samples), expected, atol=1e-4)
        training(samples)
        set_graph_mode(training, False, NOTHING)
        integers = integer_graph(net, EXAMPLE, TARGET, read_parameters(calibration), {})
        answers = {
            "integers": integers(samples),
            "training": training(samples),
            "trained integers": to_integers(net, training)(samples),
        }
    for name, answer in answers.items():
        assert noise_ratio(expected, answer) < 0.01, name
    # What training shows is what ships, but for the rounding of a sum here and there.
    equal = torch.isclose(answers["training"], answers["trained integers"], atol=1e-6)
    assert equal.float().mean() > 0.99


def test_a_norm_that_scales_by_zero_trains():
    """As the last one of a residual block that begins as its shortcut."""
    net = settled(plain())
    nn.init.zeros_(net.n2.weight)
    graph = training_graph(net, EXAMPLE, TARGET, {})
    set_graph_mode(graph, True, NOTHING)
    answer = graph(batch(8))
    answer.square().sum().backward()
    assert answer.isfinite().all()
    assert all(one.grad.isfinite().all() for one in graph.parameters() if one.grad is not None)
    assert not net.n2.weight.any(), "the module stays as it was"


def test_tensors_that_a_graph_makes_are_made_where_it_is():
    net = Net(
        lambda net, x: net.fc(pooled(x)) + torch.arange(CLASSES, device=x.device),
        fc=nn.Linear(CHANNELS, CLASSES),
    )
    graph = training_graph(net, EXAMPLE, TARGET, {}).to("meta")
    set_graph_mode(graph, True, NOTHING)
    made = [node.kwargs["device"] for node in graph.graph.nodes if "device" in node.kwargs]
    assert made == [torch.device("meta")]


# Canonical spellings

WEIGHT = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(5))
SPELLINGS = {
    "flatten": (lambda x: x.flatten(1), {aten.flatten.using_ints}),
    "pool to one": (
        lambda x: functional.adaptive_avg_pool2d(x, (1, 1)),
        {aten.adaptive_avg_pool2d.default},
    ),
    "pool to four": (
        lambda x: functional.adaptive_avg_pool2d(x, (2, 2)),
        {aten.adaptive_avg_pool2d.default},
    ),
    "pool unevenly": (lambda x: functional.adaptive_avg_pool2d(x, (5, 1)), set()),
    "mean": (lambda x: x.mean((2, 3)), {aten.mean.dim}),
    "mean from behind": (lambda x: x.mean((-1, -2)), {aten.mean.dim}),
    "mean that keeps axes": (lambda x: x.mean((2, 3), keepdim=True), {aten.mean.dim}),
    "mean from behind that keeps axes": (
        lambda x: x.mean((-1, -2), keepdim=True),
        {aten.mean.dim},
    ),
    "mean of channels": (lambda x: x.mean((1, 2)), set()),
    "clip at six": (lambda x: functional.relu6(x * 3), {aten.relu6.default}),
    "clip in place": (lambda x: (x * 3).clamp_(0, 2), {aten.clamp_.default}),
    "clip from below": (lambda x: x.clamp(min=0), {aten.clamp.default}),
    "clip from above": (lambda x: x.clamp(max=0.5), set()),
    "mean of rows": (lambda x: x.flatten(2).mean(-1), {aten.mean.dim}),
    "mean of rows that keeps axes": (
        lambda x: x.flatten(2).mean(2, keepdim=True),
        {aten.mean.dim},
    ),
    "pool rows to one": (
        lambda x: functional.adaptive_avg_pool1d(x.flatten(2), 1),
        {aten.adaptive_avg_pool1d.default},
    ),
    "pool rows to two": (lambda x: functional.adaptive_avg_pool1d(x.flatten(2), 2), set()),
    "mean of columns": (lambda x: x.flatten(2).mean(1), set()),
    "matrix of the model's own": (lambda x: x @ WEIGHT, {aten.matmul.default}),
    "its transpose": (lambda x: x @ WEIGHT.T + WEIGHT[0], {aten.matmul.default, aten.add.Tensor}),
    "rows by a matrix": (lambda x: torch.mm(x.flatten(1)[:, :SIDE], WEIGHT), {aten.mm.default}),
    "rows by a matrix and a sum": (
        lambda x: torch.addmm(WEIGHT[0], x.flatten(1)[:, :SIDE], WEIGHT),
        {aten.addmm.default},
    ),
    "scaled rows by a matrix and a sum": (
        lambda x: torch.addmm(WEIGHT[0], x.flatten(1)[:, :SIDE], WEIGHT, beta=2),
        set(),
    ),
    "matrix from the left": (lambda x: WEIGHT @ x, set()),
    "matrices of the model's own": (lambda x: x @ WEIGHT.expand(3, -1, -1), set()),
    "two inputs": (lambda x: x @ x, set()),
    "a sum of each row": (lambda x: x @ WEIGHT + WEIGHT[:, :1], {aten.matmul.default}),
    "mean in another type": (lambda x: x.mean((2, 3), dtype=torch.float64), set()),
}


@pytest.mark.parametrize(("forward", "gone"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_canonical_spelling_keeps_values(forward, gone):
    net = Net(lambda net, x: forward(x))
    program = torch.export.export(
        net, (EXAMPLE,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    graph = canonicalize(program.module(check_guards=False))
    assert not gone & {node.target for node in graph.graph.nodes}
    for count in (2, 5):
        expected = net(batch(count))
        assert graph(batch(count)).shape == expected.shape
        assert torch.allclose(graph(batch(count)), expected, atol=1e-6)


def clip_a_part(net, x):
    h = net.c1(x)
    h[:, :4].clamp_(min=0)
    return net.c2(h)


def clip_what_overlaps(net, x):
    h = net.c1(x)
    whole = h.flatten(2)
    functional.relu6(h[:, 4:], inplace=True)
    return net.c2(whole.view_as(h))


def overwrite_a_part(net, x):
    h = net.c1(x)
    h[:, 0] = 0
    return net.c2(functional.silu(h, inplace=True))


@pytest.mark.parametrize("forward", [clip_a_part, clip_what_overlaps, overwrite_a_part])
def test_a_write_into_a_part_is_kept_in_floats_and_refused_in_integers(forward):
    net = Net(forward, c1=conv(CHANNELS, 8), c2=conv(8, 8))
    with torch.no_grad():
        assert torch.allclose(trace(net, EXAMPLE)(batch(3)), net(batch(3)), atol=1e-6)
    for make in (training_graph, calibration_graph):
        with pytest.raises(CompressionError, match=r"part of a tensor in .*torch\.cat"):
            make(net, EXAMPLE, TARGET, {})


def test_writing_into_what_nothing_else_reads_is_as_good_as_a_new_value():
    def forward(net, x):
        h = functional.relu(net.c1(x).flatten(1), inplace=True)
        return net.fc(h)

    net = Net(forward, c1=conv(CHANNELS, 8), fc=nn.Linear(8 * SIDE * SIDE, CLASSES))
    graph = calibration_graph(net, EXAMPLE, TARGET, {})
    with torch.no_grad():
        assert torch.allclose(graph(batch(3)), net(batch(3)), atol=1e-4)


def test_products_of_other_types_stay_as_they_are():
    """Integers stand for float32 alone, and ONNX Runtime has no layer of the others."""
    wide, table = WEIGHT.double(), (WEIGHT * 9).long()
    net = Net(
        lambda net, x: net.c1((x.double() @ wide).float() + (x > 0).long() @ table),
        c1=conv(CHANNELS, 8),
    )
    graph = calibration_graph(net, EXAMPLE, TARGET, {})
    assert aten.linear.default not in {node.target for node in graph.graph.nodes}
    with torch.no_grad():
        assert torch.allclose(graph(batch(3)), net(batch(3)), atol=1e-4)


def test_a_layer_keeps_its_name_when_it_takes_in_a_sum():
    net = Net(
        lambda net, x: net.fc(x.flatten(1)) + net.shift, fc=nn.Linear(EXAMPLE[0].numel(), 4, False)
    )
    net.shift = nn.Parameter(torch.ones(4))
    (layer,) = kernels(trace(net, EXAMPLE).graph)
    assert module_of(layer) == "fc"
    assert len(layer.args) == 3


class StillNorm(nn.Module):
    """As detectors have it: constants and statistics that no training moves."""

    def __init__(self, width):
        super().__init__()
        for name, value in (("weight", 0), ("bias", 1), ("running_mean", 2), ("running_var", 3)):
            self.register_buffer(name, torch.full((width,), float(value)))

    def forward(self, x):
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False
        )


def test_statistics_of_a_users_own_norm_stand_still():
    net = Net(
        lambda net, x: net.fc(pooled(net.n1(net.c1(x)))),
        c1=conv(CHANNELS, 8),
        n1=StillNorm(8),
        fc=nn.Linear(8, CLASSES),
    )
    graph = training_graph(net, EXAMPLE, TARGET, {})
    set_graph_mode(graph, True, NOTHING)
    graph(batch(8))
    buffers = dict(graph.named_buffers())
    assert torch.equal(buffers["n1.running_mean"], net.n1.running_mean)
    assert torch.equal(buffers["n1.running_var"], net.n1.running_var)


def test_a_clip_of_whole_numbers_stays_as_it_is():
    """ONNX Runtime has no rectifier for them."""
    graph = trace(Net(lambda net, x: (x * 3).long().clamp(min=0)), EXAMPLE)
    assert aten.clamp.default in {node.target for node in graph.graph.nodes}


def test_a_graph_shares_nothing_with_the_module_it_was_made_of():
    net = plain().train()
    net.n1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = trace(net, EXAMPLE)
    with torch.no_grad():
        for tensor in (*graph.parameters(), *graph.buffers()):
            tensor.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (net.training, net.n1.training) == (True, False)


# Padding


def padded(net, x):
    x = relu(net.c1(x))
    return net.fc(pooled(net.c2(functional.pad(x[:, :, ::2, ::2], net.sizes, net.how))))


@pytest.mark.parametrize(
    ("how", "sizes", "moves"),
    [
        ("constant", (0, 0, 0, 0, 4, 4), True),
        ("constant", (1, 2), True),
        ("reflect", (1, 2, 0, 1), False),
    ],
)
def test_padding_between_pairs_pads_integers_and_keeps_values(monkeypatch, how, sizes, moves):
    channels = 16 if len(sizes) == 6 else 8
    net = Net(padded, c1=conv(CHANNELS, 8), c2=conv(channels, 8), fc=nn.Linear(8, CLASSES))
    net.how, net.sizes = how, sizes
    net = settled(net)
    calibration = calibration_graph(net, EXAMPLE, TARGET, {})
    with torch.no_grad():
        calibration(batch())
        parameters = read_parameters(calibration)
        graph = integer_graph(net, EXAMPLE, TARGET, parameters, {})
        monkeypatch.setattr(graphs, "spell_integers", lambda graph: graph)
        plain_graph = integer_graph(net, EXAMPLE, TARGET, parameters, {})
        assert np.array_equal(graph(batch()), plain_graph(batch()))
    floats = {aten.pad.default} & {node.target for node in graph.graph.nodes}
    assert bool(floats) != moves
