"""Which groups of layers may lose channels, and how much each channel matters."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from deploykit.errors import CompressionError
from deploykit.prune.graph import Graph
from deploykit.prune.selection import Prunable
from deploykit.prune.trial import Twin
from deploykit.widths import output_width


def rank_groups(
    graph: Graph,
    twin: Twin,
    *,
    importance: str,
    protected: frozenset[str],
    initial_widths: Mapping[str, Mapping[str, int]],
    channel_multiple: int,
) -> tuple[list[Prunable], dict[str, str]]:
    """Return the groups that may lose channels, and why each other one may not."""
    prunable, left_alone = [], {}
    for group in graph.groups():
        root, label = graph.root(group), graph.label(group)
        width = output_width(initial_widths[root])
        reason = _reason_to_leave(graph, group, twin, protected, width, channel_multiple)
        scores = None if reason else _score(group, importance)
        if scores is None:
            left_alone[label] = reason or "its channels cannot be ranked"
        else:
            prunable.append(Prunable(root, label, scores, graph.divisions(group), width))
    return prunable, left_alone


def match_modules(module: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Return the names of the modules that a pattern fits, and of those inside them."""
    names = [name for name, _ in module.named_modules() if name]
    hits = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            near = ", ".join(get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise CompressionError(
                f"prune.protect: {pattern!r} fits no module; near it are {near}", layer=pattern
            )
        hits.update(found)
    return frozenset(
        name for name in names if any(name == hit or name.startswith(f"{hit}.") for hit in hits)
    )


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


def _reason_to_leave(
    graph: Graph,
    group: Any,
    twin: Twin,
    protected: frozenset[str],
    width: int,
    channel_multiple: int,
) -> str:
    """Say why the group keeps all its channels, or return ``""``."""
    named = [name for name, _, _ in graph.layers(group) if name in protected]
    if named:
        return f"protected: {named[0]}"
    narrow = (
        f"not wider than one multiple of {channel_multiple}" if width <= channel_multiple else ""
    )
    if graph.width(group) < 2:
        return narrow or "one channel is left"
    # A fault says more than a width: a classifier of few classes is narrow as well.
    channels = _trial_channels(graph, group, channel_multiple)
    return twin.fault({graph.root(group): channels}) or narrow


def _trial_channels(graph: Graph, group: Any, channel_multiple: int) -> list[int]:
    """Draw about half of the channels, in the multiples in which they would go."""
    width, divisions = graph.width(group), graph.divisions(group)
    units = width // divisions
    step = min(channel_multiple, max(1, units // 2))
    count = max(step, units // 2 // step * step)
    drawn = torch.randperm(units, generator=torch.Generator().manual_seed(0))[:count]
    parts = torch.arange(width)[: units * divisions].reshape(divisions, units)
    return sorted(parts[:, drawn].flatten().tolist())


def _score(group: Any, importance: str) -> Tensor | None:
    """Return one score a channel with a mean of 1 over the group, or None if nothing tells."""
    if importance == "taylor":
        scorer = torch_pruning.importance.GroupTaylorImportance()
    else:
        scorer = torch_pruning.importance.GroupMagnitudeImportance(p=1 if importance == "l1" else 2)
    scores: Tensor | None = scorer(group)
    if scores is None or scores.ndim != 1:
        return None
    # A group without any weight or gradient comes out as 0/0.
    return torch.nan_to_num(scores.detach().double().cpu(), nan=1.0)
