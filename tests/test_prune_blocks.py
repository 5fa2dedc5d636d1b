import pytest
import torch
from torch import nn
from torch.nn import functional

from deploykit.depth import remove_blocks
from deploykit.models.resnet_cifar import resnet_cifar
from deploykit.prune.blocks import removable_blocks

IMAGE = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Adds what two convolutions make to what ``shortcut`` makes of the input."""

    def __init__(self, shortcut, last=functional.relu):
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut, self.last = shortcut, last

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x)).relu()) + self.shortcut(x))


def net(*blocks):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 3))
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), *blocks, head)


def test_blocks_that_pass_their_input_on_can_go():
    module = net(Block(lambda x: x), Block(lambda x: x, last=lambda x: x))
    assert removable_blocks(module, IMAGE) == ("2", "3")


@pytest.mark.parametrize(
    "shortcut",
    [lambda x: 0.5 * x, lambda x: -x, lambda x: x.flip(1), lambda x: x + 1, torch.sigmoid],
)
def test_block_that_alters_its_input_stays(shortcut):
    assert removable_blocks(net(Block(shortcut)), IMAGE) == ()


def test_layers_of_equal_width_are_no_blocks():
    module = net(nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    assert removable_blocks(module, IMAGE) == ()


def test_block_that_is_called_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(lambda x: x)

        def forward(self, x):
            return self.block(self.block(x))

    # All of it may go, but not the half of it.
    assert removable_blocks(net(Twice()), IMAGE) == ("2",)


def test_first_block_of_a_stage_stays_and_the_others_can_go():
    module = resnet_cifar(depth=20, classes=10, sample_shape=(32, 32, 3))
    found = removable_blocks(module, torch.randn(2, 3, 32, 32))
    assert set(found) == {"layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1",
                          "layer3.2"}  # fmt: skip


def test_removed_block_hands_its_input_on():
    module = net(Block(lambda x: x)).eval()
    before = module[1](module[0](IMAGE))
    remove_blocks(module, ["2"])
    assert torch.equal(module[2](before), before)
    with pytest.raises(AttributeError):
        remove_blocks(module, ["9"])


def test_finding_blocks_leaves_the_module_alone():
    module = net(Block(lambda x: x)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    removable_blocks(module, IMAGE)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_block_that_wants_arguments_by_name_stays():
    class Named(Block):
        def forward(self, x, *, times):
            return super().forward(x) * times

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Named(lambda x: x)

        def forward(self, x):
            return self.inner(x, times=1)

    assert "2.inner" not in removable_blocks(net(Calls()), IMAGE)


class Held(nn.Module):
    """Blocks that the forward pass reaches through what ``hold`` makes of them."""

    def __init__(self, hold):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = Block(lambda x: x), Block(lambda x: x)
        self.blocks = hold([self.one, self.two])

    def forward(self, x):
        x = x.relu()
        for block in self.blocks:
            x = block(x)
        return x.flatten(1)


def test_block_that_would_still_run_from_a_list_stays():
    assert removable_blocks(Held(list), IMAGE) == ()


def test_block_of_two_names_goes_from_both():
    module = Held(nn.ModuleList).eval()
    assert removable_blocks(module, IMAGE) == ("one", "two")
    remove_blocks(module, ["one", "two"])
    assert torch.equal(module(IMAGE), IMAGE.relu().flatten(1))


def test_block_whose_layer_others_use_too_stays():
    first, second = Block(lambda x: x), Block(lambda x: x)
    second.second = first.second
    assert removable_blocks(net(first, second, Block(lambda x: x)), IMAGE) == ("4",)
