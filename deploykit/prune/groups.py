"""Which groups of layers may lose channels, and how much each channel matters."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.prune.graph import Graph, Group
from deploykit.prune.selection import Prunable
from deploykit.prune.trial import Twin
from deploykit.widths import Widths, output_width

# Layers whose weights tell how much a channel matters.
RANKED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def rank_groups(
    graph: Graph,
    twin: Twin,
    *,
    importance: str,
    protected: frozenset[str],
    initial_widths: Widths,
    channel_multiple: int,
) -> tuple[list[Prunable], dict[str, str]]:
    """Return the groups that may lose channels, and why each other one may not."""
    ways = graph.groups()
    chosen, left_alone = [], graph.strangers()
    reasons = _faults(twin, [way[0] for way in ways], protected, initial_widths, channel_multiple)
    others = [way[1] for way in ways if len(way) > 1 and reasons[way[0].root]]
    second = _faults(twin, others, protected, initial_widths, channel_multiple)
    for way in ways:
        root = way[0].root
        if not reasons[root]:
            chosen.append(way[0])
        elif not second.get(root, reasons[root]):
            chosen.append(way[1])
        else:
            left_alone[way[0].label] = reasons[root]
    scores = [_score(graph, group, importance) for group in chosen]
    return [
        Prunable(
            root=group.root,
            label=group.label,
            importance=score,
            divisions=group.divisions,
            initial_width=output_width(initial_widths[group.root]),
            block=group.block,
        )
        for group, score in zip(chosen, scores, strict=True)
    ], left_alone


def set_gradients(
    module: nn.Module, importance: str, gradients: Mapping[str, Tensor] | None
) -> None:
    """Hand the gradients of the loss to the parameters, where importance needs them."""
    if importance != "taylor":
        return
    if gradients is None:
        raise ValueError("importance taylor needs gradients")
    for name, parameter in module.named_parameters():
        parameter.grad = gradients.get(name, torch.zeros_like(parameter)).clone()


def _faults(
    twin: Twin,
    groups: Sequence[Group],
    protected: frozenset[str],
    initial_widths: Widths,
    channel_multiple: int,
) -> dict[str, str]:
    """Say for each root why its group keeps all its channels, or ``""``."""
    faults: dict[str, str] = {}
    narrow: dict[str, str] = {}
    trials: dict[str, list[int]] = {}
    for group in groups:
        named = sorted(group.layers & protected)
        width = output_width(initial_widths[group.root])
        if width <= channel_multiple:
            narrow[group.root] = f"not wider than one multiple of {channel_multiple}"
        faults[group.root] = f"protected: {named[0]}" if named else group.reason
        if not faults[group.root] and len(group.units) < 2:
            faults[group.root] = narrow.get(group.root, "its channels can only go all together")
        if not faults[group.root]:
            trials[group.root] = _trial_channels(group, channel_multiple)
    # A fault says more than a width: a classifier of few classes is narrow as well.
    found = twin.faults(trials)
    return {root: fault or found.get(root, narrow.get(root, "")) for root, fault in faults.items()}


def _trial_channels(group: Group, channel_multiple: int) -> list[int]:
    """Draw about half of the channels, in the multiples in which they would go."""
    units = len(group.units)
    step = min(channel_multiple, max(1, units // 2))
    count = max(step, units // 2 // step * step)
    drawn = torch.randperm(units, generator=torch.Generator().manual_seed(0))[:count]
    return sorted(group.units[drawn.numpy()].flatten().tolist())


@torch.no_grad()
def _score(graph: Graph, group: Group, importance: str) -> Tensor:
    """Return one score a channel with a mean of 1 over the group.

    The score is the mean, over all layers that make, normalize or read the channel, of the sum of
    ``|w|``, ``w**2`` or ``|w * gradient|`` over the channel's weights. Channels that go together
    share it.
    """
    total, layers = np.zeros(len(group.units)), 0
    for name, dim, units in graph.places(group):
        layer = graph.module.get_submodule(name.rpartition(".")[0])
        if not name.endswith("weight") or not isinstance(layer, RANKED):
            continue
        weight = layer.get_parameter("weight")
        match importance:
            case "taylor":
                power = (weight * weight.grad).abs() if weight.grad is not None else weight * 0
            case "l1":
                power = weight.abs()
            case _:
                power = weight.square()
        sums = power.double().cpu().movedim(dim, 0).reshape(len(units), -1).sum(1).numpy()
        np.add.at(total, units[units >= 0], sums[units >= 0])
        layers += 1
    scores = torch.from_numpy(total / max(layers, 1))
    # A group without any weight or gradient comes out as 0/0.
    scores = torch.nan_to_num(scores / scores.mean(), nan=1.0)
    spread = torch.empty(group.width, dtype=torch.float64)
    spread[torch.from_numpy(group.units)] = scores[:, None]
    return spread
