"""How far each group narrows and which blocks go, all at once, under a bound on the cost.

A choice is taken for each group of channels, or for a residual block with the groups inside it:
to stay, to narrow, or to go. Choosing one option each, such that the summed loss is least while
the summed cost holds a bound, is a multiple-choice knapsack, which dynamic programming solves;
Shen et al., "HALP", https://arxiv.org/abs/2110.10811, prune by it. Costs of neighbouring groups
depend on each other, so it is solved again around each solution until nothing changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deploykit.layer_shapes import is_inside

# Prices a model in which these groups keep so many channels and these blocks are gone.
Pricing = Callable[[Mapping[str, int], Collection[str]], float]

BINS = 4000  # steps in which costs are counted
ROUNDS = 8
MOST_OPTIONS = 128  # of one choice


@dataclass(frozen=True)
class Option:
    """One thing that can be done.

    Attributes:
        loss: estimated harm, in any unit that adds up.
        channels: how many channels each group keeps, by its root; a group left out stays.
        removed: the block that goes, or nothing.
    """

    loss: float
    channels: Mapping[str, int] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is done, and what it is expected to bring.

    Attributes:
        channels: how many channels each group keeps, by its root.
        removed: blocks that go.
        loss: summed estimates.
        cost: predicted.
        holds: whether the cost holds the bound; if not, this is the cheapest that there is.
    """

    channels: Mapping[str, int]
    removed: tuple[str, ...]
    loss: float
    cost: float
    holds: bool


def make_choices(
    groups: Mapping[str, Mapping[int, float]],
    blocks: Mapping[str, float],
    members: Mapping[str, Collection[str]],
) -> list[list[Option]]:
    """Return the options of every choice; the first one is to stay.

    Args:
        groups: loss at each width that a group may narrow to, by its root.
        blocks: loss of removing each block.
        members: the names of the layers of each group, by its root.
    """
    choices, inside = [], set()
    for block, loss in blocks.items():
        roots = [root for root in groups if all(is_inside(name, [block]) for name in members[root])]
        inside.update(roots)
        options = _combined({root: groups[root] for root in roots})
        choices.append([*options, Option(loss, removed=(block,))])
    for root, widths in groups.items():
        if root not in inside:
            choices.append(_combined({root: widths}))
    return choices


def _combined(groups: Mapping[str, Mapping[int, float]]) -> list[Option]:
    """Return every way to narrow these groups, thinned out where there are too many."""
    ways = [[(root, None, 0.0), *((root, *one) for one in sorted(widths.items(), reverse=True))]
            for root, widths in groups.items()]  # fmt: skip
    while np.prod([len(way) for way in ways]) > MOST_OPTIONS:
        longest = max(range(len(ways)), key=lambda place: len(ways[place]))
        ways[longest] = ways[longest][:1] + ways[longest][2::2]
    return [
        Option(
            sum(loss for _, _, loss in way),
            {root: width for root, width, _ in way if width is not None},
        )
        for way in itertools.product(*ways)
    ]


def search(choices: Sequence[Sequence[Option]], price: Pricing, bound: float) -> Plan:
    """Take one option of each choice, with the least loss whose cost holds the bound.

    Args:
        choices: from `make_choices`.
        price: the cost of a whole assignment.
        bound: the largest cost.
    """
    taken = [0] * len(choices)
    best: Plan | None = None
    aim = bound
    for _ in range(ROUNDS):
        deltas, now = _deltas(choices, taken, price)
        solved = _knapsack(choices, deltas, aim - now)
        plan = _plan(choices, solved, price, bound)
        if (
            (plan.holds and (best is None or not best.holds or plan.loss < best.loss))
            or best is None
            or (not best.holds and plan.cost < best.cost)
        ):
            best = plan
        if solved == taken and plan.holds:
            break
        # Neighbours that narrow together bring another cost than each of them alone.
        aim = aim if plan.holds else aim - (plan.cost - bound)
        taken = solved
    assert best is not None
    return best


def _deltas(
    choices: Sequence[Sequence[Option]], taken: Sequence[int], price: Pricing
) -> tuple[list[np.ndarray], float]:
    """Return what each option changes in the cost while all other choices stay as taken."""
    now = price(*_merged(choices, taken))
    deltas = []
    for place, options in enumerate(choices):
        others = list(taken)
        found = np.zeros(len(options))
        for number in range(len(options)):
            others[place] = number
            found[number] = price(*_merged(choices, others)) - now
        deltas.append(found)
    return deltas, now


def _merged(
    choices: Sequence[Sequence[Option]], taken: Sequence[int]
) -> tuple[dict[str, int], tuple[str, ...]]:
    channels: dict[str, int] = {}
    removed: list[str] = []
    for options, number in zip(choices, taken, strict=True):
        channels.update(options[number].channels)
        removed.extend(options[number].removed)
    return channels, tuple(removed)


def _knapsack(
    choices: Sequence[Sequence[Option]], deltas: Sequence[np.ndarray], room: float
) -> list[int]:
    """Choose by dynamic programming; the cheapest of each where nothing holds ``room``."""
    least = [float(found.min()) for found in deltas]
    spare = room - sum(least)
    if spare < 0:
        return [int(found.argmin()) for found in deltas]
    span = sum(float(found.max()) for found in deltas) - sum(least)
    step = max(min(spare, span), 1e-12) / BINS
    # Rounded to the nearest: what ends above the bound by that is aimed lower in the next round.
    weights = [
        np.rint((found - low) / step).astype(int) for found, low in zip(deltas, least, strict=True)
    ]
    bins = min(BINS, int(spare / step + 1e-9)) + 1
    losses = np.zeros(bins)
    picks = []
    for options, weight in zip(choices, weights, strict=True):
        table = np.full((len(options), bins), np.inf)
        for number, option in enumerate(options):
            if weight[number] < bins:
                table[number, weight[number] :] = losses[: bins - weight[number]] + option.loss
        picks.append(table.argmin(0))
        losses = table.min(0)
    if not np.isfinite(losses[-1]):
        return [int(found.argmin()) for found in deltas]
    taken, place = [0] * len(choices), bins - 1
    for number in range(len(choices) - 1, -1, -1):
        taken[number] = int(picks[number][place])
        place -= int(weights[number][taken[number]])
    return taken


def _plan(
    choices: Sequence[Sequence[Option]], taken: Sequence[int], price: Pricing, bound: float
) -> Plan:
    channels, removed = _merged(choices, taken)
    cost = price(channels, removed)
    loss = sum(options[number].loss for options, number in zip(choices, taken, strict=True))
    return Plan(channels, removed, loss, cost, cost <= bound * (1 + 1e-9))
