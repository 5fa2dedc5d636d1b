"""How much the answers suffer when one group narrows or one block goes, before any recovery."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from deploykit.depth import remove_blocks
from deploykit.models.attention import split_attention
from deploykit.prune.graph import Graph, undone
from deploykit.prune.selection import Prunable

MOST_WIDTHS = 4  # measured a group; those between are interpolated
Batches = Sequence[Tensor]


class Sensitivity:
    """Measures the divergence of a damaged model's answers from the sound one's.

    Args:
        module: a sound float module; left as it is.
        example: float input ``(N, ...)``.
        batches: float inputs of the validation split.
        adjusted: see `Twin`.
    """

    def __init__(
        self, module: nn.Module, example: Tensor, batches: Batches, adjusted: Collection[str]
    ) -> None:
        self._batches = batches
        self._sound = copy.deepcopy(module).eval()
        self._answers = [log_softmax(self._run(self._sound, batch), dim=-1) for batch in batches]
        self._graph = Graph(split_attention(copy.deepcopy(module).eval()), example)
        self._adjusted = adjusted

    def of_group(self, group: Prunable, widths: Sequence[int]) -> dict[int, float]:
        """Return the divergence at each width of the group; rising as it narrows."""
        measured = {width: self._narrowed(group, width) for width in _spread(widths)}
        return _interpolated(group.width, widths, measured)

    def of_block(self, name: str) -> float:
        """Return the divergence without a block."""
        damaged = copy.deepcopy(self._sound)
        remove_blocks(damaged, [name])
        return self._divergence(damaged)

    def _narrowed(self, group: Prunable, width: int) -> float:
        module, removal = self._graph.module, {group.root: channels_to_remove(group, width)}
        with undone(module):
            self._graph.remove(module, removal, removal.keys() & self._adjusted)
            return self._divergence(module)

    def _divergence(self, damaged: nn.Module) -> float:
        """Return the mean Kullback-Leibler divergence of the class probabilities, in nats."""
        total = count = 0.0
        for batch, expected in zip(self._batches, self._answers, strict=True):
            answers = log_softmax(self._run(damaged, batch), dim=-1)
            total += float(kl_div(answers, expected, reduction="sum", log_target=True))
            count += len(batch)
        return max(0.0, total / count)

    @staticmethod
    @torch.no_grad()
    def _run(module: nn.Module, batch: Tensor) -> Tensor:
        answers: Tensor = module(batch)
        return answers


def channels_to_remove(group: Prunable, width: int) -> list[int]:
    """Return the least important channels, so many that ``width`` of them stay."""
    units = group.units()
    gone = len(units) - width // group.unit
    channels: list[int] = units[:gone].flatten().tolist()
    return sorted(channels)


def _spread(widths: Sequence[int]) -> list[int]:
    """Return the widths to measure: the ends, and some between."""
    ordered = sorted(widths, reverse=True)
    if len(ordered) <= MOST_WIDTHS:
        return ordered
    places = torch.linspace(0, len(ordered) - 1, MOST_WIDTHS).round().int().tolist()
    return [ordered[place] for place in places]


def _interpolated(
    full: int, widths: Sequence[int], measured: Mapping[int, float]
) -> dict[int, float]:
    """Fill the gaps, and let no narrower width come out as less harmful."""
    known = sorted({**measured, full: 0.0}.items(), reverse=True)
    found, worst = {}, 0.0
    for width in sorted(widths, reverse=True):
        (above, least), (below, most) = next(
            (one, other) for one, other in pairwise(known)
            if one[0] >= width >= other[0]
        )  # fmt: skip
        share = (above - width) / (above - below)
        worst = max(worst, least + share * (most - least))
        found[width] = worst
    return found
