"""A multilayer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from deploykit.errors import ModelError


class Mlp(nn.Module):
    """Linear layers with ReLU between them, on flattened samples.

    Args:
        widths: features of each layer, from the input to the logits.
        dropout: share of hidden activations dropped in training.
    """

    def __init__(self, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map samples ``(N, ...)`` to logits ``(N, classes)``."""
        x = x.flatten(1)
        *hidden, last = self.layers
        for layer in hidden:
            x = self.dropout(functional.relu(layer(x)))
        logits: torch.Tensor = last(x)
        return logits


def mlp(
    *,
    classes: int,
    sample_shape: tuple[int, ...],
    hidden: Sequence[int] = (128, 128),
    dropout: float = 0.0,
) -> Mlp:
    """Build the net for samples of any shape; ``hidden`` lists the hidden widths.

    Raises:
        ModelError: a width is not positive, or ``dropout`` is not in [0, 1).
    """
    if hidden and min(hidden) < 1:
        raise ModelError(
            f"model.arguments.hidden: expected positive numbers, got {list(hidden)}; "
            "for example [128, 128]"
        )
    if not 0 <= dropout < 1:
        raise ModelError(f"model.arguments.dropout: expected 0 <= x < 1, got {dropout}")
    return Mlp((math.prod(sample_shape), *hidden, classes), dropout)
