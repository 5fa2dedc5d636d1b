"""Run a module in evaluation mode and leave no trace of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Put ``module`` in evaluation mode, then give every part of it its own mode back."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield module.eval()
    finally:
        for part, training in modes.items():
            part.training = training
