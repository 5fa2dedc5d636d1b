import itertools

import numpy as np
import pytest

from deploykit.prune.search import Option, make_choices, search

# Three groups: harm at each width, and what a channel of it costs.
LOSSES = {
    "a": {16: 0.9, 32: 0.4, 48: 0.1},
    "b": {16: 0.5, 32: 0.2, 48: 0.1},
    "c": {16: 0.05, 32: 0.02},
}
FULL = {"a": 64, "b": 64, "c": 48}
PRICES = {"a": 1.0, "b": 3.0, "c": 0.5}
LAYERS = {root: {f"block.{root}"} for root in LOSSES}


def price(channels, removed=()):
    """Costs that add up, in plateaus of 16 channels."""
    return sum(PRICES[root] * -(-channels.get(root, FULL[root]) // 16) for root in FULL) + 2


def every_plan(losses):
    """Return (cost, loss) of every assignment, the slow and sure way."""
    ways = [[(root, FULL[root], 0.0), *((root, *one) for one in found.items())]
            for root, found in losses.items()]  # fmt: skip
    for way in itertools.product(*ways):
        yield price({root: width for root, width, _ in way}), sum(loss for *_, loss in way)


@pytest.mark.parametrize("bound", [19.5, 17, 15.5, 13, 11, 9, 8])
def test_search_finds_the_least_harm_that_holds_the_bound(bound):
    plan = search(make_choices(LOSSES, {}, LAYERS), price, bound)
    best = min(loss for cost, loss in every_plan(LOSSES) if cost <= bound)
    assert plan.holds
    assert plan.cost <= bound
    assert plan.loss == pytest.approx(best)


def test_a_bound_that_nothing_holds_gets_the_cheapest_and_says_so():
    plan = search(make_choices(LOSSES, {}, LAYERS), price, 3.0)
    assert not plan.holds
    assert plan.cost == min(cost for cost, _ in every_plan(LOSSES))


def test_a_bound_that_holds_already_changes_nothing():
    plan = search(make_choices(LOSSES, {}, LAYERS), price, 1000)
    assert (plan.channels, plan.removed, plan.loss) == ({}, (), 0.0)


def test_a_block_goes_with_the_groups_inside_it():
    blocks = {"block": 0.3}

    def with_blocks(channels, removed):
        return 2 if removed else price(channels)

    choices = make_choices(LOSSES, blocks, LAYERS)
    assert len(choices) == 1
    assert [option.removed for option in choices[0]].count(("block",)) == 1
    plan = search(choices, with_blocks, 9)
    assert plan.removed == ("block",)
    assert plan.channels == {}


def test_groups_outside_of_a_block_are_chosen_apart():
    layers = {**LAYERS, "b": {"block.b", "stem"}}  # its channels leave the block
    choices = make_choices(LOSSES, {"block": 0.3}, layers)
    assert [set(option.channels) for option in choices[1]] == [set(), {"b"}, {"b"}, {"b"}]


def test_costs_of_neighbours_that_depend_on_each_other_still_hold_the_bound():
    def product(channels, removed=()):
        a, b = (channels.get(root, 64) / 64 for root in "ab")
        return 10 * a * b + 2 * b + 1

    losses = {root: LOSSES[root] for root in "ab"}
    for bound in np.linspace(3, 12, 10):
        plan = search(make_choices(losses, {}, LAYERS), product, bound)
        assert plan.holds
        assert product(plan.channels) <= bound * (1 + 1e-9)


def test_many_groups_in_one_block_stay_few_options():
    losses = {str(i): dict.fromkeys(range(8, 64, 8), 1.0) for i in range(5)}
    layers = {root: {f"block.{root}"} for root in losses}
    (options,) = make_choices(losses, {"block": 1.0}, layers)
    assert len(options) <= 129
    assert options[0] == Option(0.0)
