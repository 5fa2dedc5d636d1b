"""Pruning to a bound on what the model costs: widths and depth chosen together."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from deploykit.depth import remove_blocks
from deploykit.errors import CompressionError
from deploykit.prune.channels import prune_channels
from deploykit.prune.cost import Cost
from deploykit.prune.landscape import Landscape, Rules
from deploykit.prune.notes import PruneNotes
from deploykit.prune.search import Plan, make_choices, search
from deploykit.prune.selection import Prunable
from deploykit.prune.sensitivity import channels_to_remove

TRIES = 4  # to meet the bound as measured, by aiming below it
MISSED = 1.02  # the bound counts as met up to this: what a measurement can tell


@dataclass(frozen=True)
class Shrunk:
    """A module that was pruned to a bound.

    Attributes:
        module: the smaller copy, in evaluation mode.
        notes: what was done in this step.
        removed: all blocks that are gone, those of earlier steps included.
        predicted: its cost by the model of costs.
        measured: its cost.
        bound: the cost that was asked for.
    """

    module: nn.Module
    notes: PruneNotes
    removed: tuple[str, ...]
    predicted: float
    measured: float
    bound: float


def prune_to_bound(
    module: nn.Module,
    example: Tensor,
    landscape: Landscape,
    *,
    cost: Cost,
    bound: float,
    rules: Rules,
    removed: Sequence[str] = (),
) -> Shrunk:
    """Prune a copy of ``module`` until its measured cost holds the bound.

    Args:
        module: left as it is.
        example: float input ``(N, ...)``.
        landscape: of ``module``, see `survey`.
        cost: predicts and measures.
        bound: largest cost, in the unit of ``cost``.
        rules: those of the landscape.
        removed: blocks that are gone already.

    Raises:
        CompressionError: nothing that may be done holds the bound; names the least that can be
            reached.
    """
    aim, tries = bound, TRIES
    whole: dict[str, str] = {}
    while tries:
        plan = _choose(landscape, cost, aim, removed)
        smaller, notes = carry_out(module, example, plan, landscape, rules)
        if refused := _refused(plan, landscape, notes):
            whole |= {landscape.groups[root].label: why for root, why in refused.items()}
            landscape = landscape.without(refused)
            continue
        tries -= 1
        gone = (*removed, *plan.removed)
        measured = cost.measure(smaller, gone)
        if measured <= bound * MISSED:
            notes = replace(notes, left_alone={**notes.left_alone, **whole})
            return Shrunk(smaller, notes, gone, plan.cost, measured, bound)
        if not plan.holds:
            break
        aim *= bound / measured
    raise CompressionError(
        f"prune: expected a model of at most {bound:.4g}, got {measured:.4g} with all that may be "
        "narrowed or removed; ask for less, allow prune.depth, or protect fewer modules"
    )


def _refused(plan: Plan, landscape: Landscape, notes: PruneNotes) -> dict[str, str]:
    """Say which groups of a plan kept all channels, and why: those chosen cannot go."""
    return {
        root: notes.left_alone.get(landscape.groups[root].label, "its channels cannot go as chosen")
        for root in plan.channels
        if not landscape.makers(root) & notes.widths.keys()
    }


def _choose(landscape: Landscape, cost: Cost, bound: float, removed: Sequence[str]) -> Plan:
    """Choose widths and blocks with the least summed harm whose price holds the bound."""

    def price(channels: Mapping[str, int], gone: Collection[str]) -> float:
        return cost.predict(landscape.narrowed(channels), (*removed, *gone))

    makers = {root: landscape.makers(root) for root in landscape.groups}
    return search(make_choices(landscape.losses, landscape.blocks, makers), price, bound)


def carry_out(
    module: nn.Module, example: Tensor, plan: Plan, landscape: Landscape, rules: Rules
) -> tuple[nn.Module, PruneNotes]:
    """Build the module that a plan of its landscape describes, every removal proven."""
    # A group is named after the first layer that makes it, which may go with a block.
    width = {
        maker: channels
        for root, channels in plan.channels.items()
        for maker in landscape.makers(root)
    }
    shorter = copy.deepcopy(module)
    remove_blocks(shorter, plan.removed)

    def select(prunable: Sequence[Prunable]) -> dict[str, list[int]]:
        return {
            group.root: channels_to_remove(group, width[group.root])
            for group in prunable
            if group.root in width
        }

    smaller, notes = prune_channels(
        shorter,
        example,
        select=select,
        importance=rules.importance,
        protect=rules.protect,
        channel_multiple=rules.channel_multiple,
    )
    return smaller, replace(notes, removed=plan.removed)
