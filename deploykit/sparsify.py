"""The sparsifying stage: single weights become zero, so that the file that ships is smaller.

It is for size alone: ONNX Runtime has no kernels that pass over zeros, so the model computes with
them and is neither faster nor slower. Whatever is faster needs whole channels gone (`prune`).
Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
https://arxiv.org/abs/1506.02626. How the zeros are left out of the file: `deploykit.packing`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from deploykit.artifacts import Candidate, JsonDict
from deploykit.held_weights import layer_weights, projections, share_of_zeros
from deploykit.recipe.sections import SparsifySection

if TYPE_CHECKING:
    from deploykit.train import Training


def sparsify(candidate: Candidate, training: Training, section: SparsifySection) -> Candidate:
    """Set the smallest weights to zero and train the others; zeros stay zero from here on.

    Args:
        candidate: a float candidate; left as it is, the teacher where the section says so.
        training: data and plan for the recovery.
        section: the share of the weights, how they are ranked, which modules stay whole.

    Returns:
        The candidate, with the names of its sparse tensors in ``structure["sparse"]``;
        ``notes["sparsify"]`` has the share of zeros of each.
    """
    from deploykit.train import recover

    module = copy.deepcopy(candidate.module)
    weights = layer_weights(module, section.protect)
    with torch.no_grad():
        for name, mask in masks(weights, section.ratio, section.scope).items():
            weights[name].mul_(mask)
    structure = {**candidate.structure, "sparse": sorted(weights)}
    sparse = replace(candidate, module=module, structure=structure, stage="sparsify")
    recovery = recover(
        module,
        training,
        section,
        stage="sparsify",
        teacher=candidate.module,
        hold=projections(sparse),
    )
    zeros = {name: share_of_zeros([weight]) for name, weight in weights.items()}
    notes: JsonDict = {
        "sparsify": zeros,
        "why": f"{share_of_zeros(weights.values()):.1%} of the weights are zero, for size alone: "
        "ONNX Runtime computes with them all the same",
        "recovery": recovery,
    }
    return replace(sparse, notes=notes)


def masks(
    weights: Mapping[str, Tensor], ratio: float, scope: Literal["global", "uniform"]
) -> dict[str, Tensor]:
    """Return 1 where a weight stays and 0 where it goes, shaped and typed as the weights.

    Args:
        weights: by name.
        ratio: share that goes; each tensor keeps its largest weight whatever the others are.
        scope: rank the weights of all tensors by magnitude together, or each tensor's own.
    """
    sizes = {name: weight.detach().abs() for name, weight in weights.items()}
    if scope == "uniform":
        return {name: _largest({name: size}, ratio)[name] for name, size in sizes.items()}
    return _largest(sizes, ratio)


def _largest(sizes: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Mark all but the smallest ``ratio`` of all values; of equal ones the first go."""
    every = torch.cat([size.flatten() for size in sizes.values()])
    kept = torch.ones_like(every)
    kept[every.argsort(stable=True)[: round(ratio * len(every))]] = 0
    parts = torch.split(kept, [size.numel() for size in sizes.values()])
    marked = {}
    for (name, size), part in zip(sizes.items(), parts, strict=True):
        part[size.flatten().argmax()] = 1
        marked[name] = part.view_as(size)
    return marked
