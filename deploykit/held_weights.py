"""Weights that a stage has put in order, and how later training keeps that order.

Zeros stay zero and shared values stay shared in every training that follows: the structure of a
candidate names the tensors, their values say which are zero and which are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from deploykit.artifacts import Candidate
from deploykit.errors import CompressionError
from deploykit.models.patterns import match_modules

Projection = Callable[[Tensor], Tensor]


def layer_weights(module: nn.Module, protect: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights of convolutions, linear layers and attention by name; no biases.

    Args:
        module: shares its parameters with what is returned.
        protect: shell patterns of modules to leave out, with all that is in them.
    """
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if name.endswith("weight")
        and isinstance(
            module.get_submodule(name.rpartition(".")[0]),
            nn.Linear | _ConvNd | nn.MultiheadAttention,
        )
        and not any(_is_in(name, pattern) for pattern in protect)
    }


def check_protected(module: nn.Module, protect: Sequence[str], key: str) -> None:
    """Refuse patterns that fit no module, and those that leave no weight.

    Raises:
        CompressionError: naming the pattern; ``key`` is the recipe's.
    """
    match_modules(module, protect, f"{key}.protect")
    if not layer_weights(module, protect):
        raise CompressionError(
            f"{key}: expected convolutions or linear layers to alter, got none; remove the section"
        )


def _is_in(parameter: str, pattern: str) -> bool:
    """Whether a pattern fits a module that holds the parameter, at any depth."""
    parts = parameter.split(".")[:-1]
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def projections(candidate: Candidate) -> dict[str, Projection]:
    """Return what keeps a candidate's zeros and shared values, by parameter.

    Each is the orthogonal projection onto what the weights may be: applied to a gradient and to
    the weight that was moved by it, a step of gradient descent stays there. For shared values
    that is the sum of the members' gradients, as Han et al. 2015 have it, over their number: the
    same way, at a rate that suits groups of any size.
    """
    parameters = dict(candidate.module.named_parameters(remove_duplicate=False))
    held: dict[str, Projection] = {}
    for name in candidate.structure.get("sparse", ()):
        held[name] = partial(_zeroed, mask=parameters[name].detach() != 0)
    for name in candidate.structure.get("clustered", ()):
        # Zeros are a group of their own, and its mean must not move them.
        mask = held.get(name, _as_it_is)
        _, members = torch.unique(parameters[name].detach().cpu(), return_inverse=True)
        held[name] = partial(_shared, mask=mask, members=members.flatten())
    # A graph knows a tied weight by one of its names.
    known = {id(parameters[name]): one for name, one in held.items()}
    return {name: known[id(one)] for name, one in parameters.items() if id(one) in known}


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _zeroed(values: Tensor, mask: Tensor) -> Tensor:
    return values * mask.to(values.device)


def _shared(values: Tensor, mask: Projection, members: Tensor) -> Tensor:
    """Replace each value by its group's mean; in float64, where that of equal values is exact."""
    members = members.to(values.device)
    flat = mask(values).flatten().double()
    count = int(members.max()) + 1
    sums = flat.new_zeros(count).scatter_add_(0, members, flat)
    means = (sums / torch.bincount(members, minlength=count)).to(values.dtype)
    return means[members].view_as(values)


def share_of_zeros(tensors: Iterable[Tensor]) -> float:
    """Return the share of all values that are zero."""
    counts = [(int((tensor == 0).sum()), tensor.numel()) for tensor in tensors]
    return sum(zeros for zeros, _ in counts) / sum(total for _, total in counts)
