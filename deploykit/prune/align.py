"""The inverse of pruning: channels of zeros, where kernels are faster for a rounder width.

A depthwise layer whose last block of 16 channels is not full takes about twice as long in ONNX
Runtime's integers (x86 with VNNI) as one with the next full block: 1.8 to 2.4 times for 72 against
80, 88 against 96 and 120 against 128 channels, as `LayerTimes` measures them. Channels whose
weights are zero, those of all layers that read them included, change nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deploykit.artifacts import Candidate
from deploykit.errors import CompressionError
from deploykit.models.modes import evaluating
from deploykit.prune.graph import Graph, Group, replace_tensors
from deploykit.structure import example_input
from deploykit.widths import changed_widths, read_widths

TOLERANCE = 1e-4  # of the largest output: the same sums in another order


@dataclass(frozen=True)
class Growth:
    """Channels to add to one group.

    Attributes:
        added: how many.
        ends: tensor and dimension, and the index before which they stand.
    """

    added: int
    ends: Mapping[tuple[str, int], int]


def align_widths(candidate: Candidate, multiple: int) -> Candidate | None:
    """Return a candidate whose depthwise layers have widths that are multiples of ``multiple``.

    It answers as before. What cannot be widened, or would answer otherwise, stays as it is.

    Args:
        candidate: a float one; left as it is.
        multiple: channels that a kernel computes together.

    Returns:
        The wider candidate, None where nothing can be widened.
    """
    if candidate.structure.get("clustered"):  # zero would be one more value to share
        return None
    example, module = example_input(candidate, batch=2), copy.deepcopy(candidate.module).eval()
    expected = _answer(module, example)
    try:
        growths = list(_growths(module, example, multiple))
    except CompressionError:  # it cannot be traced
        return None
    for growth in growths:
        wider = copy.deepcopy(module)
        grow_tensors(wider, growth)
        if _answers_alike(wider, example, expected):
            module = wider
    changed = changed_widths(read_widths(candidate.module), read_widths(module))
    if not changed:
        return None
    widths = {**candidate.structure.get("widths", {}), **changed}
    return replace(candidate, module=module, structure={**candidate.structure, "widths": widths})


def _growths(module: nn.Module, example: Tensor, multiple: int) -> Iterator[Growth]:
    graph = Graph(module, (example,))
    for ways in graph.groups():
        group = ways[-1]
        added = -group.width % multiple
        plain = not group.reason and group.units.shape[1] == 1
        if added and plain and _has_depthwise(module, group) and not _is_normalized(graph, group):
            ends = dict(_ends(graph, group))
            if all(end > 0 for end in ends.values()):
                yield Growth(added, ends)


def _has_depthwise(module: nn.Module, group: Group) -> bool:
    layers = [module.get_submodule(name) for name in group.layers]
    return any(
        isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels > 1
        for layer in layers
    )


def _is_normalized(graph: Graph, group: Group) -> bool:
    """Whether means over the group's channels are taken, which zeros would shift."""
    removal = {group.root: range(group.width)}
    return not all(mask.all() for masks in graph.kept_in_norms(removal) for mask in masks)


def _ends(graph: Graph, group: Group) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield where the group's channels end in each tensor; 0 where they do not stand in a row."""
    for name, dim, number in graph.places(group):
        (held,) = np.nonzero(number >= 0)
        in_a_row = np.array_equal(number[held[0] : held[-1] + 1], np.arange(group.width))
        yield (name, dim), int(held[-1]) + 1 if in_a_row else 0


@torch.no_grad()
def grow_tensors(module: nn.Module, growth: Growth) -> None:
    """Put zeros into the tensors of ``module``, ones where they divide, in place.

    That is in variances, and in the scale of a norm: quantization-aware training takes the folded
    scale out of a convolution's output again.
    """
    grown: dict[str, Tensor] = {}
    for (name, dim), end in growth.ends.items():
        holder, _, key = name.rpartition(".")
        owner = module.get_submodule(holder)
        old = grown.get(name, getattr(owner, key).detach())
        divides = key == "running_var" or (key == "weight" and isinstance(owner, _NormBase))
        shape = [*old.shape]
        shape[dim] = growth.added
        fresh = old.new_full(shape, 1.0 if divides else 0.0)
        rest = old.shape[dim] - end
        grown[name] = torch.cat([old.narrow(dim, 0, end), fresh, old.narrow(dim, end, rest)], dim)
    replace_tensors(module, grown)


def _answers_alike(module: nn.Module, example: Tensor, expected: Tensor) -> bool:
    try:
        found = _answer(module, example)
    except Exception:  # noqa: BLE001 - its own code may count on the old width in any way
        return False
    largest = float(expected.abs().max())
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= TOLERANCE * largest
    )


def _answer(module: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(module):
        answer: Tensor = module(example)
    return answer
