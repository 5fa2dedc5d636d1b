"""What is predicted of a model that was never built is what it turns out to be."""

import copy

import pytest
import torch
from tiny_layers import FAMILIES, TorchAttention, Vision
from torch import nn

from deploykit.prune import groups, landscape
from deploykit.prune.bounded import carry_out, prune_to_bound
from deploykit.prune.cost import MacsCost
from deploykit.prune.graph import LAYERS
from deploykit.prune.landscape import Rules, explore, survey, widths_below
from deploykit.prune.search import Plan
from deploykit.widths import read_widths

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RULES = Rules(importance="l2", protect=(), channel_multiple=1, depth=False)


def make(family):
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def halved(found):
    """Return a plan that narrows every group to the middle of its widths."""
    widths = {root: widths_below(group, 1) for root, group in found.groups.items()}
    channels = {root: options[len(options) // 2] for root, options in widths.items()}
    return Plan(channels, (), 0.0, 0.0, holds=True)


def layer_widths(module):
    layers = {name for name, part in module.named_modules() if isinstance(part, LAYERS)}
    return {name: widths for name, widths in read_widths(module).items() if name in layers}


def check_prediction(module):
    found = explore(module, IMAGE, RULES)
    plan = halved(found)
    smaller, _ = carry_out(module, IMAGE, plan, found, RULES)
    predicted, built = found.narrowed(plan.channels), layer_widths(smaller)
    assert plan.channels
    assert {name: predicted[name] for name in built} == built
    cost = MacsCost.of(module, IMAGE)
    assert cost.predict(predicted) == cost.measure(smaller) < cost.measure(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_widths_and_cost_are_those_of_the_model_once_it_is_built(family):
    check_prediction(make(family))


def test_prediction_that_forgets_members_would_be_found_out(monkeypatch):
    """The control."""
    members = landscape._members
    monkeypatch.setattr(landscape, "_members", lambda *args: members(*args)[:1])
    with pytest.raises(AssertionError):
        check_prediction(make("grouped"))


@pytest.mark.parametrize("family", ["attention of torch", "attention written out", "chunk"])
def test_survey_measures_every_width_and_leaves_the_module_alone(family):
    module = make(family)
    before = copy.deepcopy(module)
    found = survey(module, IMAGE, [IMAGE], RULES)
    for root, group in found.groups.items():
        assert set(found.losses[root]) == set(widths_below(group, 1))
        assert max(found.losses[root].values()) > 0
    assert all(type(a) is type(b) for a, b in zip(module.modules(), before.modules(), strict=True))
    pairs = zip(module.state_dict().values(), before.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_group_of_heads_narrows_by_whole_heads():
    torch.manual_seed(0)
    found = explore(Vision(TorchAttention), IMAGE, RULES)
    assert widths_below(found.groups["attention.inner.in_proj"], 1) == [12, 24, 36]


class BlocksFirst(nn.Module):
    """The layer that names the stream's group goes with its block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x + self.two(self.one(x).relu())


def test_widths_of_a_stream_are_kept_where_the_block_goes_that_names_it():
    torch.manual_seed(0)
    module = BlocksFirst().eval()
    found = explore(module, IMAGE, RULES)
    (stream,) = (root for root in found.groups if "stem" in found.makers(root))
    assert stream.startswith("blocks.0")
    plan = Plan({stream: 8}, ("blocks.0",), 0.0, 0.0, holds=True)
    smaller, _ = carry_out(module, IMAGE, plan, found, RULES)
    assert smaller.stem.out_channels == 8


class Parity(nn.Module):
    """A layer whose channels hang together by twos in a way that no rule sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.last, self.head = nn.Conv2d(16, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([x[:, ::2], x[:, 1::2]], 1)
        return self.head(self.last(x).relu().mean((2, 3)))


def first_half(group, channel_multiple):
    return sorted(group.units[: len(group.units) // 2].flatten().tolist())


@pytest.mark.parametrize("times", [1.3, 2.2])
def test_group_whose_channels_cannot_go_as_chosen_is_left_out_of_the_plan(times, monkeypatch):
    module = Parity().eval()
    # The trial draws channels that happen to fit, those that a plan chooses do not.
    monkeypatch.setattr(groups, "_trial_channels", first_half)
    cost = MacsCost.of(module, IMAGE)
    found = survey(module, IMAGE, [IMAGE], RULES)
    assert set(found.groups) == {"stem", "last"}
    bound = cost.measure(module) / times
    shrunk = prune_to_bound(module, IMAGE, found, cost=cost, bound=bound, rules=RULES)
    assert bound / 1.5 < shrunk.measured <= bound
    assert shrunk.notes.widths.keys() == {"last"}
    assert "setting them to zero" in shrunk.notes.left_alone["stem"]
