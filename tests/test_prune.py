import pytest
import torch
from torch import nn
from torch.nn import functional

from deploykit.cost import count_macs
from deploykit.errors import CompressionError
from deploykit.models.digits_cnn import digits_cnn
from deploykit.models.patterns import match_modules
from deploykit.models.resnet_cifar import resnet_cifar
from deploykit.prune import prune_channels
from deploykit.prune.rules import RULES
from deploykit.prune.selection import Prunable, select_channels
from deploykit.prune.trial import Twin
from deploykit.widths import read_widths

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and a head, with whatever stands between them."""

    def __init__(self, between=lambda x: x, width=16, second=None, readers=1):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.between = between
        self.second = second or nn.Conv2d(width * readers, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        return self.head(self.second(self.between(x)).mean((2, 3)))


def prune(module, example=IMAGE, **options):
    return prune_channels(module, example, **{"channel_ratio": 0.5, **options})


def zeroed_outputs(module, pruned, example):
    """Answer as ``module`` would with exactly those channels at zero that ``pruned`` lacks."""
    kept = [
        next(i for i, row in enumerate(module.first.weight) if torch.equal(row, wanted))
        for wanted in pruned.first.weight
    ]
    mask = torch.zeros(len(module.first.weight)).index_fill_(0, torch.tensor(kept), 1.0)
    handle = module.norm.register_forward_hook(lambda *args: args[2] * mask[:, None, None])
    with torch.no_grad():
        outputs = module.eval()(example)
    handle.remove()
    return outputs


def answers(module, example=IMAGE):
    with torch.no_grad():
        return module.eval()(example)


def test_pruned_model_equals_the_model_with_those_channels_at_zero():
    module = Net()
    pruned, notes = prune(module, scope="uniform", protect=["head"])
    assert torch.allclose(answers(pruned), zeroed_outputs(module, pruned, IMAGE), atol=1e-6)
    assert notes.widths == {"first": (16, 8)}


def test_the_module_it_is_given_is_never_altered():
    module = Net().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    prune(module)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(part.training for part in module.modules())


def test_classifier_outputs_are_left_alone():
    pruned, notes = prune(Net(), channel_ratio=0.9)
    assert pruned.head.out_features == 5
    assert notes.left_alone["head"] == "it carries the model's output"


def test_convolutional_classifier_is_left_alone():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    pruned, notes = prune(module)
    assert pruned[2].out_channels == 5
    assert "2" in notes.left_alone


# Shapes fit whatever is removed, but channel i does not stay at i.
SILENT = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(3, 1),
    "index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
}


def believe(trace, arguments, result):
    """A wrong rule: every channel stays where it is."""
    trace.assign(result, trace.axes(arguments["self"]))


@pytest.mark.parametrize("operator", SILENT)
def test_group_that_would_be_pruned_wrongly_without_a_word_is_left_alone(operator):
    pruned, notes = prune(Net(SILENT[operator]))
    assert pruned.first.out_channels == 16
    assert "first" in notes.left_alone
    assert pruned.second.out_channels < 16


@pytest.mark.parametrize("operator", SILENT)
def test_trial_refuses_what_a_wrong_rule_would_prune_wrongly(operator, monkeypatch):
    monkeypatch.setitem(RULES, operator, believe)
    pruned, notes = prune(Net(SILENT[operator]))
    assert pruned.first.out_channels == 16
    assert notes.left_alone["first"] == "removing its channels does not equal setting them to zero"


@pytest.mark.parametrize("operator", SILENT)
def test_without_the_trial_a_wrongly_pruned_model_gets_through(operator, monkeypatch):
    """The control: the trial, and nothing else, stops these."""
    monkeypatch.setitem(RULES, operator, believe)
    monkeypatch.setattr(Twin, "fault", lambda *args: "")
    module = Net(SILENT[operator])
    pruned, _ = prune(module, protect=["head"], scope="uniform")
    assert pruned.first.out_channels == 8
    assert not torch.allclose(answers(pruned), zeroed_outputs(module, pruned, IMAGE), atol=1e-3)


@pytest.mark.parametrize(
    ("between", "readers", "prunes"),
    [
        (lambda x: functional.hardswish(x), 1, True),
        (lambda x: torch.sigmoid(x), 1, True),
        (lambda x: torch.cat([x, x * 2], 1), 2, True),
        (lambda x: functional.max_pool2d(x, 2), 1, True),
        (lambda x: x * x.mean(), 1, False),
        (lambda x: x.softmax(1), 1, False),
        (lambda x: x - x.mean(1, keepdim=True), 1, False),
        (lambda x: x.view(len(x), 4, 4, 8, 8).transpose(1, 2).reshape(len(x), 16, 8, 8), 1, False),
    ],
)
def test_operations_between_layers_are_pruned_rightly_or_left_alone(between, readers, prunes):
    module = Net(between, readers=readers)
    pruned, notes = prune(module, protect=["head"], scope="uniform")
    assert (pruned.first.out_channels == 8) == prunes
    assert ("first" in notes.left_alone) != prunes
    if prunes and readers == 1 and between(torch.zeros(1, 1, 2, 2)).sum() == 0:
        assert torch.allclose(answers(pruned), zeroed_outputs(module, pruned, IMAGE), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "protect", "width"),
    [
        ((nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.Conv2d(16, 16, 1)), [], 8),
        ((nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 16, 1)), ["second.1"], 8),
        ((nn.ConvTranspose2d(16, 16, 2),), [], 8),
        ((nn.PReLU(16), nn.Conv2d(16, 16, 1)), [], 8),
    ],
)
def test_pruning_layers_of_every_kind_equals_zeroing_their_channels(layers, protect, width):
    module = Net(second=nn.Sequential(*layers))
    pruned, notes = prune(module, scope="uniform", protect=["head", *protect])
    assert pruned.first.out_channels == width
    assert not any("first" in label for label in notes.left_alone)
    assert torch.allclose(answers(pruned), zeroed_outputs(module, pruned, IMAGE), atol=1e-6)


def test_grouped_convolution_loses_the_same_channels_of_each_part():
    layers = (nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 16, 1))
    pruned, _ = prune(Net(second=nn.Sequential(*layers)), scope="uniform")
    grouped = pruned.second[0]
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (8, 16, 4)


@pytest.mark.parametrize("depth", [20, 56])
def test_padded_shortcut_is_found_and_inner_channels_are_pruned(depth):
    module = resnet_cifar(depth=depth, classes=10, sample_shape=(16, 16, 3))
    pruned, notes = prune(module, torch.randn(2, 3, 16, 16), scope="uniform")
    assert pruned.layer1[0].conv1.out_channels == 8
    assert pruned.layer1[0].conv2.out_channels == 16
    assert pruned.layer3[2].conv1.out_channels == 32
    (reason,) = [why for label, why in notes.left_alone.items() if label.startswith("conv1,")]
    assert "padded" in reason
    assert any("layer3.0.conv2" in label for label in notes.left_alone)
    assert notes.macs[1] < 0.6 * notes.macs[0]


def lose_track(trace, arguments, result):
    """A wrong rule: padded channels hang on nothing."""


@pytest.mark.parametrize("trial", [True, False])
def test_wrong_rule_for_padded_shortcuts_never_gives_a_model_that_does_not_run(trial, monkeypatch):
    """The control: without the trial, the last check, a forward pass, still stops it."""
    monkeypatch.setitem(RULES, "constant_pad_nd", lose_track)
    module = resnet_cifar(depth=20, classes=10, sample_shape=(16, 16, 3))
    example = torch.randn(2, 3, 16, 16)
    if trial:
        _, notes = prune(module, example, scope="uniform")
        reasons = [why for label, why in notes.left_alone.items() if label.startswith("conv1,")]
        assert "does not run" in reasons[0]
        return
    monkeypatch.setattr(Twin, "fault", lambda *args: "")
    with pytest.raises(CompressionError, match=r"does not run|expected outputs"):
        prune(module, example, scope="uniform")


def test_dead_and_equal_weights_do_not_blind_the_trial():
    module = Net(lambda x: x.flip(1))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    _, notes = prune(module)
    assert "first" in notes.left_alone


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
def test_widths_end_on_multiples_and_the_ratio_is_not_exceeded(multiple, scope, importance):
    module = digits_cnn(classes=10, sample_shape=(8, 8, 1), widths=(16, 32, 32))
    x = torch.randn(4, 1, 8, 8)
    module(x).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    pruned, notes = prune(
        module,
        x,
        channel_ratio=0.3,
        channel_multiple=multiple,
        scope=scope,
        importance=importance,
        gradients=gradients,
    )
    widths = [conv.out_channels for conv in pruned.convs]
    assert all(width % multiple == 0 and width >= multiple for width in widths)
    assert notes.achieved_ratio == (80 - sum(widths)) / 80
    assert notes.achieved_ratio <= 0.3
    assert notes.achieved_ratio > (0.3 - 0.06 if scope == "global" else 0.1) - multiple / 40


def test_layer_not_wider_than_a_multiple_stays_whole():
    module = digits_cnn(classes=10, sample_shape=(8, 8, 1), widths=(8, 12, 64))
    pruned, notes = prune(module, torch.randn(2, 1, 8, 8), channel_multiple=16, channel_ratio=0.9)
    assert [conv.out_channels for conv in pruned.convs] == [8, 12, 16]
    assert notes.left_alone["convs.0"] == "not wider than one multiple of 16"


def test_protected_layer_keeps_inputs_and_outputs():
    module = digits_cnn(classes=10, sample_shape=(8, 8, 1), widths=(8, 8, 8, 8))
    pruned, notes = prune(module, torch.randn(2, 1, 8, 8), protect=["convs.2"], channel_ratio=0.6)
    widths = read_widths(pruned)
    assert widths["convs.2"] == read_widths(module)["convs.2"]
    assert notes.left_alone["convs.1"] == "protected: convs.2"
    assert widths["convs.0"]["out_channels"] < 8


def test_protecting_a_module_protects_what_is_inside():
    module = resnet_cifar(depth=20, classes=10, sample_shape=(16, 16, 3))
    pruned, _ = prune(module, torch.randn(2, 3, 16, 16), protect=["layer1"], scope="uniform")
    assert pruned.layer1[0].conv1.out_channels == 16
    assert pruned.layer2[0].conv1.out_channels == 16


def test_pattern_of_one_name_of_a_shared_layer_fits_all():
    module = nn.Module()
    module.a = nn.Sequential(nn.Linear(2, 2), nn.SiLU())
    module.b = nn.Sequential(module.a[0], module.a[1])
    assert match_modules(module, ["b.0"], "prune.protect") == {"a.0", "b.0"}
    # Without parameters nothing is shared: each place may have another activation.
    assert match_modules(module, ["b.1"], "surgery.protect") == {"b.1"}


def test_pattern_that_fits_nothing_is_refused_with_near_names():
    with pytest.raises(CompressionError, match=r"'secnd' fits no module; near it are second"):
        prune(Net(), protect=["secnd"])


def test_frozen_layers_are_pruned_and_stay_frozen():
    module = Net()
    module.first.requires_grad_(False)
    pruned, notes = prune(module, scope="uniform")
    assert notes.widths["first"] == (16, 8)
    assert not pruned.first.weight.requires_grad
    assert pruned.second.weight.requires_grad


def test_steps_reach_the_ratio_of_the_first_widths():
    module = digits_cnn(classes=10, sample_shape=(8, 8, 1), widths=(32, 32, 32))
    initial, x = read_widths(module), torch.randn(2, 1, 8, 8)
    for ratio in (0.25, 0.5):
        module, notes = prune(
            module, x, channel_ratio=ratio, channel_multiple=8, initial_widths=initial
        )
        assert notes.achieved_ratio == ratio


def test_taylor_keeps_the_channels_that_the_loss_depends_on():
    module = Net()
    gradients = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    gradients["first.weight"][3:7] = 1.0
    options = {"importance": "taylor", "gradients": gradients, "scope": "uniform"}
    pruned, _ = prune(module, channel_ratio=0.75, protect=["head"], **options)
    assert torch.equal(pruned.first.weight, module.first.weight[3:7])


def test_magnitude_keeps_the_larger_channels():
    module = Net()
    with torch.no_grad():
        module.first.weight[::2] *= 100
    pruned, _ = prune(module, scope="uniform", protect=["head"])
    assert torch.equal(pruned.first.weight, module.first.weight[::2])


def test_pruning_is_deterministic():
    first, _ = prune(Net())
    second, _ = prune(Net())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_to_prune_leaves_the_model_whole():
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    pruned, notes = prune(module)
    assert notes.achieved_ratio == 0
    assert torch.equal(answers(pruned), answers(module))


def test_ratio_zero_removes_nothing():
    _, notes = prune(Net(), channel_ratio=0.0)
    assert notes.widths == {}
    assert notes.macs[0] == notes.macs[1]


def test_model_that_cannot_be_traced_is_refused():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    with pytest.raises(CompressionError, match="cannot be"):
        prune(Broken())


def test_macs_and_parameters_are_counted_exactly():
    _, notes = prune(Net(), channel_ratio=0.0)
    first, second = 64 * 16 * 3 * 9, 64 * 16 * 16 * 9
    assert notes.macs[0] == first + second + 16 * 5
    assert notes.parameters[0] == (27 * 16 + 16) + 32 + (144 * 16 + 16) + 85
    assert count_macs(Net(), IMAGE) == notes.macs[0]


def test_blocks_go_in_order_of_importance():
    groups = [
        Prunable("a", "a", torch.tensor([0.1, 0.2, 5.0, 6.0]), 1, 4),
        Prunable("b", "b", torch.tensor([3.0, 1.0, 2.0, 9.0]), 1, 4),
    ]
    options = {"channel_ratio": 0.5, "channel_multiple": 1}
    assert select_channels(groups, scope="global", **options) == {"a": [0, 1], "b": [1, 2]}
    assert select_channels(groups, scope="uniform", **options) == {"a": [0, 1], "b": [1, 2]}
    options["channel_multiple"] = 2
    assert select_channels(groups, scope="global", **options) == {"a": [0, 1], "b": [1, 2]}
    options["channel_ratio"] = 0.25
    assert select_channels(groups, scope="global", **options) == {"a": [0, 1]}


def test_divided_channels_go_in_equal_parts():
    group = Prunable("a", "a", torch.tensor([1.0, 9.0, 8.0, 1.0, 9.0, 9.0]), 2, 6)
    chosen = select_channels([group], channel_ratio=0.4, scope="global", channel_multiple=1)
    assert chosen == {"a": [0, 3]}


class TrainsMore(Net):
    """Adds what a part of its own makes of the second layer, in training only."""

    def __init__(self):
        super().__init__()
        self.aside = nn.Linear(16, 5)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        x = self.second(x).mean((2, 3))
        return self.head(x) + self.aside(x) if self.training else self.head(x)


def test_channels_that_only_training_reads_elsewhere_stay_and_the_rest_goes_on():
    pruned, notes = prune(TrainsMore())
    assert notes.widths == {"first": (16, 8)}
    assert notes.left_alone["second"].startswith("the pruned model does not run")
    assert pruned.train()(IMAGE).shape == (2, 5)


def test_parameters_that_hold_whole_numbers_are_no_hindrance():
    module = Net(between=lambda x: x[:, :, module.rows])
    module.rows = nn.Parameter(torch.arange(4), requires_grad=False)
    assert prune(module)[1].widths.keys() == {"first", "second"}
