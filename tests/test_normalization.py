import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from deploykit.models import fold_normalization
from deploykit.models.resnet_cifar import resnet_cifar
from deploykit.runtime import zero_point_and_scale

COLOUR = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "channels": 3}
PIXELS = torch.randint(0, 256, (2, 3, 6, 6), generator=torch.Generator().manual_seed(0))


def normalized(preprocess):
    zero, scale = zero_point_and_scale(preprocess)
    x = (PIXELS.double() - torch.tensor(zero)[:, None, None]) * torch.tensor(scale)[:, None, None]
    return x.double()


def answers(module, preprocess):
    with torch.no_grad():
        return module.double().eval()(normalized(preprocess))


def fold(module, preprocess=COLOUR):
    return fold_normalization(module, preprocess, torch.zeros(2, 3, 6, 6))


class Net(nn.Module):
    def __init__(self, **layer):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, **layer)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return functional.relu(self.norm(self.conv(x)))


class TwoReaders(Net):
    def __init__(self):
        super().__init__(bias=False)
        self.other = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x):
        return super().forward(x).mean((2, 3)) + self.other(x).mean((2, 3))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(108, 5)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("make", "bias_added"),
    [
        (lambda: Net(bias=False), ["conv"]),
        (Net, []),
        (lambda: Net(groups=3, bias=False), ["conv"]),
        (TwoReaders, ["conv"]),
        (Flat, []),
    ],
)
def test_fold_changes_no_output_without_padding(make, bias_added):
    module = make()
    folded, shared, note = fold(module)
    assert note["folded"]
    assert note["bias_added"] == bias_added
    before, after = answers(module, COLOUR), answers(folded, shared)
    assert float((before - after).abs().max()) < 1e-6 * float(before.abs().max())
    # The control: the model as it was, fed with the shared normalization, answers otherwise.
    assert not torch.allclose(before, answers(module, shared), rtol=1e-3)


def test_fold_differs_at_zero_padded_borders_only():
    module = Net(padding=1)
    folded, shared, _ = fold(module)
    difference = (answers(module, COLOUR) - answers(folded, shared)).abs()
    assert float(difference[..., 1:-1, 1:-1].max()) < 1e-6
    assert float(difference.max()) > 1e-3


def test_fold_leaves_one_mean_and_one_std_on_whole_pixels():
    _, shared, _ = fold(Net())
    assert len(shared["mean"]) == len(shared["std"]) == 1
    assert shared["channels"] == 3
    assert np.isclose(255 * shared["mean"][0] % 1, 0) or np.isclose(255 * shared["mean"][0] % 1, 1)


def test_fold_never_alters_the_module_it_is_given():
    module = Net(bias=False)
    before = module.conv.weight.clone()
    fold(module)
    assert module.conv.bias is None
    assert torch.equal(before, module.conv.weight)
    assert module.training


def test_fold_of_a_frozen_layer_adds_a_frozen_bias():
    module = Net(bias=False)
    module.requires_grad_(False)
    folded, _, _ = fold(module)
    assert not folded.conv.bias.requires_grad


class Reader(Net):
    """Reads its input in another way as well."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.way(self, x)


@pytest.mark.parametrize(
    "way",
    [
        lambda net, x: net.conv(x) + x.mean(),
        lambda net, x: net.conv(x * 2),
        lambda net, x: net.conv(x) + net.conv(x),
        lambda net, x: functional.conv2d(x, net.conv.weight * 2),
        lambda net, x: net.conv(functional.pad(x, (1, 1, 1, 1), mode="reflect")),
        lambda net, x: net.conv(x).flatten(1) @ x.flatten(1).mean() * torch.ones(96),
        lambda net, x: x.flatten(1),
        lambda net, x: net.conv(x) if x.sum() > 0 else x,
    ],
)
def test_input_that_feeds_more_than_layers_is_left_as_it_is(way):
    module = Reader(way)
    folded, preprocess, note = fold(module)
    assert folded is module
    assert preprocess is COLOUR
    assert not note["folded"]
    assert note["why"]


def test_arrays_and_single_statistics_need_no_fold():
    module = Net()
    assert fold(module, None)[:2] == (module, None)
    single = {"mean": [0.5], "std": [0.25], "channels": 3}
    folded, shared, note = fold(module, single)
    assert folded is module
    assert [zero_point_and_scale(p)[0] for p in (shared, single)] == [128, 128]
    assert not note["folded"]


def test_equal_statistics_of_all_channels_become_one():
    module = Net()
    folded, shared, _ = fold(module, {"mean": [0.5] * 3, "std": [0.25] * 3, "channels": 3})
    assert folded is module
    assert shared["std"] == [0.25]


def test_resnet_folds_into_its_first_convolution():
    module = resnet_cifar(depth=20, classes=10, sample_shape=(32, 32, 3))
    _, _, note = fold_normalization(module, COLOUR, torch.zeros(2, 3, 32, 32))
    assert note["layers"] == ["conv1"]
