"""Pruning to a bound on what the model costs: widths and depth chosen together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from deploykit.artifacts import JsonDict
from deploykit.prune.blocks import removable_blocks, remove_blocks
from deploykit.prune.channels import prune_channels
from deploykit.prune.graph import Graph
from deploykit.prune.groups import match_modules, rank_groups
from deploykit.prune.notes import PruneNotes
from deploykit.prune.search import Cost, Plan, make_choices, search
from deploykit.prune.selection import Prunable, channel_step
from deploykit.prune.sensitivity import Sensitivity, channels_to_remove
from deploykit.prune.trial import Twin
from deploykit.widths import read_widths

Widths = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Member:
    """How a layer follows its group.

    Attributes:
        layer: name of the module.
        keys: which of its widths shrink, see `read_widths`.
        share: of its channels that go with each channel of the group's root.
    """

    layer: str
    keys: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Landscape:
    """What can be narrowed or removed, and what each step of it harms.

    Attributes:
        groups: by root.
        members: the layers of each group, by root.
        losses: divergence at each width, by root.
        blocks: divergence without each block.
        left_alone: why a group keeps its channels.
        widths: of the layers as they are.
    """

    groups: Mapping[str, Prunable]
    members: Mapping[str, tuple[Member, ...]]
    losses: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]
    left_alone: Mapping[str, str]
    widths: Widths

    def narrowed(self, channels: Mapping[str, int]) -> Widths:
        """Return the widths of the layers when each named group keeps so many channels."""
        widths: Widths = {}
        for root, kept in channels.items():
            gone = self.groups[root].width - kept
            for member in self.members[root]:
                layer = widths.setdefault(member.layer, dict(self.widths[member.layer]))
                for key in member.keys:
                    layer[key] -= round(gone * member.share)
        return widths

    def to_json(self) -> JsonDict:
        """Return the sensitivities for the report."""
        return {
            "groups": [
                {"layers": self.groups[root].label, "width": self.groups[root].width,
                 "divergence": {str(width): loss for width, loss in sorted(widths.items())}}
                for root, widths in self.losses.items()
            ],
            "blocks": [{"block": name, "divergence": loss} for name, loss in self.blocks.items()],
        }  # fmt: skip


def survey(
    module: nn.Module,
    example: Tensor,
    batches: Sequence[Tensor],
    *,
    importance: str,
    protect: Sequence[str],
    channel_multiple: int,
    depth: bool,
) -> Landscape:
    """Measure once what narrowing each group and removing each block does to the answers.

    Args:
        module: a sound float module; left as it is.
        example: float input ``(N, ...)``.
        batches: float inputs of the validation split.
        importance: ``l1`` or ``l2``: which channels of a group go first.
        protect: shell patterns over modules to leave whole.
        channel_multiple: widths are multiples of it.
        depth: whether blocks may go.
    """
    protected = match_modules(module, protect)
    graph = Graph(copy.deepcopy(module), example)
    prunable, left_alone = rank_groups(
        graph,
        Twin(module, example),
        importance=importance,
        protected=protected,
        initial_widths=read_widths(module),
        channel_multiple=channel_multiple,
    )
    sensitivity = Sensitivity(module, example, batches)
    blocks = [
        block
        for block in (removable_blocks(module, example) if depth else ())
        if not any(name == block or name.startswith(f"{block}.") for name in protected)
    ]
    return Landscape(
        groups={group.root: group for group in prunable},
        members={group.root: _members(graph, group) for group in prunable},
        losses={
            group.root: sensitivity.of_group(group, _widths_below(group, channel_multiple))
            for group in prunable
        },
        blocks={block: sensitivity.of_block(block) for block in blocks},
        left_alone=left_alone,
        widths=read_widths(module),
    )


def _members(graph: Graph, group: Prunable) -> tuple[Member, ...]:
    """Read from the dependency graph which widths of which layers follow the group."""
    everything = graph.group(group.root, range(group.width))
    members = []
    for dependency, channels in everything:
        layer = dependency.target.module
        if layer not in graph.names:
            continue
        keys = _keys(layer, graph.narrows_input(dependency))
        if keys:
            members.append(Member(graph.names[layer], keys, len(channels) / group.width))
    return tuple(members)


def _keys(layer: Any, inputs: bool) -> tuple[str, ...]:
    if isinstance(layer, nn.Linear):
        return ("in_features",) if inputs else ("out_features",)
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return ()
    if layer.groups == layer.in_channels == layer.out_channels > 1:
        return ("in_channels", "out_channels", "groups")
    return ("in_channels",) if inputs else ("out_channels",)


def _widths_below(group: Prunable, multiple: int) -> list[int]:
    step = channel_step(group, multiple) * group.divisions
    return list(range(step, group.width, step))


def choose(landscape: Landscape, cost: Cost, bound: float) -> Plan:
    """Choose widths and blocks with the least summed divergence whose cost holds the bound."""
    members = {
        root: {member.layer for member in found if set(member.keys) & {"out_channels", "out_features"}}
        for root, found in landscape.members.items()
    }  # fmt: skip

    def price(channels: Mapping[str, int], removed: Collection[str]) -> float:
        return cost.predict(landscape.narrowed(channels), removed)

    return search(make_choices(landscape.losses, landscape.blocks, members), price, bound)


def carry_out(
    module: nn.Module, example: Tensor, plan: Plan, *, importance: str, protect: Sequence[str],
    channel_multiple: int,
) -> tuple[nn.Module, PruneNotes]:  # fmt: skip
    """Build the module that a plan describes, every removal proven.

    Raises:
        CompressionError: the pruned model does not run.
    """
    shorter = copy.deepcopy(module)
    remove_blocks(shorter, plan.removed)

    def select(prunable: Sequence[Prunable]) -> dict[str, list[int]]:
        return {
            group.root: channels_to_remove(group, plan.channels[group.root])
            for group in prunable
            if group.root in plan.channels
        }

    return prune_channels(
        shorter,
        example,
        select=select,
        importance=importance,
        protect=protect,
        channel_multiple=channel_multiple,
    )
