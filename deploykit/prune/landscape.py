"""What of a model can be narrowed or removed, and what each step of it harms."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from deploykit.artifacts import JsonDict
from deploykit.layer_shapes import is_inside
from deploykit.models.attention import split_attention
from deploykit.models.patterns import match_modules
from deploykit.prune.blocks import removable_blocks
from deploykit.prune.graph import LAYERS, Graph, undone
from deploykit.prune.groups import rank_groups
from deploykit.prune.selection import Prunable, channel_step
from deploykit.prune.sensitivity import Sensitivity
from deploykit.prune.trial import Twin
from deploykit.widths import read_widths

LayerCounts = Mapping[str, Mapping[str, int]]
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
        layer: name of a convolution or linear layer.
        lost: by how much its widths shrink with each unit of the group, see `read_widths`.
    """

    layer: str
    lost: Mapping[str, int]


@dataclass(frozen=True)
class Landscape:
    """What can be done to a model, and its harm: divergence of the answers, in nats.

    Attributes:
        groups: channels that go together, by the root of the group.
        members: the layers of each group, by root.
        losses: harm at each width that a group may narrow to, by root.
        blocks: harm of removing each residual block.
        left_alone: why a group keeps its channels.
        adjusted: see `Twin`.
        widths: of all convolutions and linear layers as they are.
    """

    groups: Mapping[str, Prunable]
    members: Mapping[str, tuple[Member, ...]]
    losses: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]
    left_alone: Mapping[str, str]
    adjusted: frozenset[str]
    widths: LayerCounts

    def narrowed(self, channels: Mapping[str, int]) -> LayerCounts:
        """Return the widths of all layers when each named group keeps so many channels."""
        widths = {layer: dict(found) for layer, found in self.widths.items()}
        for root, kept in channels.items():
            units = (self.groups[root].width - kept) // self.groups[root].unit
            for member in self.members[root]:
                for key, count in member.lost.items():
                    widths[member.layer][key] -= units * count
        return widths

    def without(self, roots: Collection[str]) -> Landscape:
        """Return the landscape in which these groups keep their channels."""
        losses = {root: found for root, found in self.losses.items() if root not in roots}
        groups = {root: group for root, group in self.groups.items() if root not in roots}
        return replace(self, groups=groups, losses=losses)

    def makers(self, root: str) -> set[str]:
        """Return the layers whose outputs the group holds."""
        return {one.layer for one in self.members[root] if OUTPUTS.intersection(one.lost)}

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
    sensitivity = Sensitivity(module, example, batches, found.adjusted)
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
    split = split_attention(copy.deepcopy(module).eval())
    protected = match_modules(split, rules.protect, "prune.protect")
    graph, twin = Graph(split, example), Twin(split, example)
    prunable, left_alone = rank_groups(
        graph,
        twin,
        importance=rules.importance,
        protected=protected,
        initial_widths=read_widths(module),
        channel_multiple=rules.channel_multiple,
    )
    blocks = removable_blocks(module, example) if rules.depth else ()
    return Landscape(
        groups={group.root: group for group in prunable},
        members={group.root: _members(graph, group, twin.adjusted) for group in prunable},
        losses={},
        blocks={
            block: 0.0
            for block in blocks
            if not any(is_inside(name, [block]) for name in protected)
        },
        left_alone=left_alone,
        adjusted=frozenset(twin.adjusted),
        widths=_layer_widths(split),
    )


def _members(graph: Graph, group: Prunable, adjusted: Collection[str]) -> tuple[Member, ...]:
    """Remove one unit, and read which widths of which layers follow."""
    module, removal = graph.module, {group.root: group.units()[0].tolist()}
    before = _layer_widths(module)
    with undone(module):
        graph.remove(module, removal, removal.keys() & adjusted)
        after = _layer_widths(module)
    lost = {
        layer: {key: width - after[layer][key] for key, width in widths.items()}
        for layer, widths in before.items()
        if widths != after[layer]
    }
    return tuple(
        Member(layer, {key: count for key, count in found.items() if count})
        for layer, found in lost.items()
    )


def _layer_widths(module: nn.Module) -> dict[str, dict[str, int]]:
    """Return the widths of convolutions and linear layers."""
    layers = {name for name, part in module.named_modules() if isinstance(part, LAYERS)}
    return {
        name: {key: width for key, width in widths.items() if isinstance(width, int)}
        for name, widths in read_widths(module).items()
        if name in layers
    }


def widths_below(group: Prunable, multiple: int) -> list[int]:
    """Return the widths that the group may narrow to, rising."""
    step = channel_step(group, multiple) * group.unit
    return list(range(step, group.width, step))
