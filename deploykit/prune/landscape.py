"""What of a model can be narrowed or removed, and what each step of it harms."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from deploykit.artifacts import JsonDict
from deploykit.layer_shapes import is_inside
from deploykit.prune.blocks import removable_blocks
from deploykit.prune.graph import Graph
from deploykit.prune.groups import match_modules, rank_groups
from deploykit.prune.selection import Prunable, channel_step
from deploykit.prune.sensitivity import Sensitivity
from deploykit.prune.trial import Twin
from deploykit.widths import read_widths

Widths = dict[str, dict[str, int]]
OUTPUTS = frozenset({"out_channels", "out_features"})


@dataclass(frozen=True)
class Rules:
    """What may be done to a model.

    Attributes:
        importance: norm that says which channels of a group go first.
        protect: shell patterns over modules to leave whole.
        channel_multiple: widths are multiples of it.
        depth: whether residual blocks may go.
    """

    importance: Literal["l1", "l2"]
    protect: tuple[str, ...]
    channel_multiple: int
    depth: bool


@dataclass(frozen=True)
class Member:
    """How a layer follows its group.

    Attributes:
        layer: name of the module.
        keys: which of its widths shrink, see `read_widths`.
        share: how many of its channels go with each channel of the group's root.
    """

    layer: str
    keys: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Landscape:
    """What can be done to a model, and its harm: divergence of the answers, in nats.

    Attributes:
        groups: channels that go together, by the root of the group.
        members: the layers of each group, by root.
        losses: harm at each width that a group may narrow to, by root.
        blocks: harm of removing each residual block.
        left_alone: why a group keeps its channels.
        widths: of all layers as they are.
    """

    groups: Mapping[str, Prunable]
    members: Mapping[str, tuple[Member, ...]]
    losses: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]
    left_alone: Mapping[str, str]
    widths: Widths

    def narrowed(self, channels: Mapping[str, int]) -> Widths:
        """Return the widths of all layers when each named group keeps so many channels."""
        widths = {layer: dict(found) for layer, found in self.widths.items()}
        for root, kept in channels.items():
            gone = self.groups[root].width - kept
            for member in self.members[root]:
                for key in member.keys:
                    widths[member.layer][key] -= round(gone * member.share)
        return widths

    def makers(self, root: str) -> set[str]:
        """Return the layers whose outputs the group holds."""
        return {one.layer for one in self.members[root] if OUTPUTS.intersection(one.keys)}

    def to_json(self) -> JsonDict:
        """Return the sensitivities for the report."""
        return {
            "groups": [
                {
                    "layers": self.groups[root].label,
                    "width": self.groups[root].width,
                    "divergence": {str(width): losses[width] for width in sorted(losses)},
                }
                for root, losses in self.losses.items()
            ],
            "blocks": [{"block": name, "divergence": loss} for name, loss in self.blocks.items()],
        }


def survey(
    module: nn.Module, example: Tensor, batches: Sequence[Tensor], rules: Rules
) -> Landscape:
    """Measure once what narrowing each group and removing each block does to the answers.

    Args:
        module: a sound float module; left as it is.
        example: float input ``(N, ...)``.
        batches: float inputs of the validation split.
        rules: what may be done.

    Raises:
        CompressionError: a pattern fits no module, or the model cannot be traced.
    """
    found = explore(module, example, rules)
    sensitivity = Sensitivity(module, example, batches)
    losses = {
        root: sensitivity.of_group(group, widths_below(group, rules.channel_multiple))
        for root, group in found.groups.items()
    }
    blocks = {block: sensitivity.of_block(block) for block in found.blocks}
    return replace(found, losses=losses, blocks=blocks)


def explore(module: nn.Module, example: Tensor, rules: Rules) -> Landscape:
    """Find what can be narrowed or removed, without measuring what that harms.

    Raises:
        CompressionError: a pattern fits no module, or the model cannot be traced.
    """
    protected = match_modules(module, rules.protect)
    graph = Graph(copy.deepcopy(module), example)
    prunable, left_alone = rank_groups(
        graph,
        Twin(module, example),
        importance=rules.importance,
        protected=protected,
        initial_widths=read_widths(module),
        channel_multiple=rules.channel_multiple,
    )
    blocks = removable_blocks(module, example) if rules.depth else ()
    return Landscape(
        groups={group.root: group for group in prunable},
        members={group.root: _members(graph, group) for group in prunable},
        losses={},
        blocks={
            block: 0.0
            for block in blocks
            if not any(is_inside(name, [block]) for name in protected)
        },
        left_alone=left_alone,
        widths=read_widths(module),
    )


def _members(graph: Graph, group: Prunable) -> tuple[Member, ...]:
    """Read from the dependency graph which widths of which layers follow the group."""
    members = []
    for dependency, channels in graph.group(group.root, range(group.width)):
        layer = dependency.target.module
        keys = _keys(layer, graph.narrows_input(dependency)) if layer in graph.names else ()
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


def widths_below(group: Prunable, multiple: int) -> list[int]:
    """Return the widths that the group may narrow to, rising."""
    step = channel_step(group, multiple) * group.divisions
    return list(range(step, group.width, step))
