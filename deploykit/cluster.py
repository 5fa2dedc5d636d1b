"""The clustering stage: the weights of a layer share a few values, so that the file is smaller.

It is for size alone: ONNX Runtime computes with the shared values as with any others. Han et al.,
"Deep Compression", https://arxiv.org/abs/1510.00149. How indices and values are stored:
`deploykit.packing`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploykit.artifacts import Candidate, JsonDict
from deploykit.held_weights import layer_weights, projections
from deploykit.recipe.sections import ClusterSection

if TYPE_CHECKING:
    from deploykit.train import Training

ITERATIONS = 100  # of k-means; it stands still long before


def cluster(candidate: Candidate, training: Training, section: ClusterSection) -> Candidate:
    """Let the weights of each layer share ``2**bits`` values, and train those.

    Args:
        candidate: a float candidate; left as it is, the teacher where the section says so. Zeros
            of a sparse one stay zero, which is one of the values then.
        training: data and plan for the recovery.
        section: how many values, which modules stay whole.

    Returns:
        The candidate, with the names of its clustered tensors in ``structure["clustered"]``;
        ``notes["cluster"]`` has the number of values of each.
    """
    from deploykit.train import recover

    module = copy.deepcopy(candidate.module)
    count = 2**section.bits
    weights = {
        name: weight
        for name, weight in layer_weights(module, section.protect).items()
        if weight.numel() > count  # fewer can share nothing
    }
    sparse = frozenset(candidate.structure.get("sparse", ()))
    with torch.no_grad():
        for name, weight in weights.items():
            values = clustered(weight.cpu().numpy(), count, keep_zeros=name in sparse)
            weight.copy_(torch.from_numpy(values))
    structure = {**candidate.structure, "clustered": sorted(weights)}
    shared = replace(candidate, module=module, structure=structure, stage="cluster")
    recovery = recover(
        module,
        training,
        section,
        stage="cluster",
        teacher=candidate.module,
        hold=projections(shared),
    )
    notes: JsonDict = {
        "cluster": {name: len(torch.unique(weight)) for name, weight in weights.items()},
        "why": f"the weights of a layer share {count} values, for size alone: ONNX Runtime "
        "computes with them all the same",
        "recovery": recovery,
    }
    return replace(shared, notes=notes)


def clustered(weight: np.ndarray, count: int, *, keep_zeros: bool = False) -> np.ndarray:
    """Return a weight with each value replaced by the nearest of ``count`` shared ones.

    Args:
        weight: float32 of any shape.
        count: values, at least 2; some may be left without a weight.
        keep_zeros: zero is one of the values, and has those weights alone that are zero.
    """
    chosen = weight != 0 if keep_zeros else np.ones(weight.shape, bool)
    values = weight[chosen].astype(np.float64)
    result = np.zeros_like(weight)
    if len(values):
        centres = shared_values(values, count - 1 if keep_zeros else count)
        result[chosen] = centres[_nearest(values, centres)]
    return result


def shared_values(values: np.ndarray, count: int) -> np.ndarray:
    """Return the means that k-means finds, rising.

    On a line the nearest of sorted means is found by bisection, and a mean begins every
    ``1 / count`` of the range: large weights are few and matter most (Han et al., section 3.2).
    A library's k-means measures every distance, and sums in the order of its threads.

    Args:
        values: float64 ``(n,)``.
        count: means.
    """
    centres = np.linspace(values.min(), values.max(), count)
    for _ in range(ITERATIONS):
        nearest = _nearest(values, centres)
        members = np.bincount(nearest, minlength=count)
        sums = np.bincount(nearest, values, count)
        moved = np.where(members > 0, sums / np.maximum(members, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _nearest(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    borders = (centres[1:] + centres[:-1]) / 2
    return np.searchsorted(borders, values)
