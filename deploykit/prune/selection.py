"""Which channels to remove: whole blocks of the target's channel multiple, the cheapest first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prunable:
    """A group of layers whose channels can only go together.

    Attributes:
        root: module name of the layer that stands for the group.
        label: names of all layers whose outputs the group holds.
        importance: float tensor ``(width,)``, one score a channel.
        divisions: grouped layers demand that each of so many equal parts loses the same
            channels; 1 otherwise.
        initial_width: width before the first pruning step.
        block: so many neighbouring channels go together, as those of an attention head do.
    """

    root: str
    label: str
    importance: Tensor
    divisions: int
    initial_width: int
    block: int = 1

    @property
    def width(self) -> int:
        """Channels before this step."""
        return len(self.importance)

    @property
    def unit(self) -> int:
        """Channels that can only go together."""
        return self.divisions * self.block

    def units(self) -> Tensor:
        """Return channels that go together, ``(units, channels)``, the least important first."""
        parts = torch.arange(self.width).reshape(self.divisions, -1, self.block)
        units = parts.swapaxes(0, 1).flatten(1)
        return units[torch.argsort(self.importance[units].sum(1), stable=True)]


@dataclass(frozen=True)
class _Block:
    """Channels of one group whose removal takes it to the next multiple."""

    score: float
    root: str
    channels: tuple[int, ...]


def select_channels(
    groups: Sequence[Prunable], *, channel_ratio: float, scope: str, channel_multiple: int
) -> dict[str, list[int]]:
    """Choose the channels to remove, by the root of their group.

    A block is what takes a group to the next lower multiple; blocks go, lowest mean importance
    first, while no more than the asked share is gone. So widths end on multiples, rounded up,
    and never below one.

    Args:
        groups: all that may be pruned.
        channel_ratio: share of the initial channels to have gone after this step.
        scope: ``global`` counts and ranks over all groups, ``uniform`` in each.
        channel_multiple: widths end on multiples of it.
    """
    pools = [list(groups)] if scope == "global" else [[group] for group in groups]
    chosen: dict[str, list[int]] = {}
    for pool in pools:
        initial = sum(group.initial_width for group in pool)
        budget = int(channel_ratio * initial + 1e-9) - initial + sum(g.width for g in pool)
        for root, channels in _spend(budget, pool, channel_multiple).items():
            chosen.setdefault(root, []).extend(channels)
    return {root: sorted(channels) for root, channels in chosen.items()}


def _spend(budget: int, pool: Sequence[Prunable], multiple: int) -> Mapping[str, list[int]]:
    blocks = [block for group in pool for block in _blocks(group, multiple)]
    chosen: dict[str, list[int]] = {}
    closed: set[str] = set()
    for block in sorted(blocks, key=lambda block: block.score):
        if block.root in closed:
            continue
        if len(block.channels) > budget:
            closed.add(block.root)  # its next blocks only make sense after this one
            continue
        budget -= len(block.channels)
        chosen.setdefault(block.root, []).extend(block.channels)
    return chosen


def _blocks(group: Prunable, multiple: int) -> list[_Block]:
    """Cut the channels above one multiple into blocks; their scores rise."""
    units, step = group.units(), channel_step(group, multiple)
    blocks, start = [], 0
    size = len(units) % step or step
    while start + size <= len(units) - step:
        channels = units[start : start + size].flatten().tolist()
        scores = group.importance[channels]
        blocks.append(_Block(float(scores.mean()), group.root, tuple(channels)))
        start, size = start + size, step
    return blocks


def channel_step(group: Prunable, multiple: int) -> int:
    """Return how many units make the width a multiple."""
    return multiple // math.gcd(multiple, group.unit)
