"""Accuracy as torch computes it; what decides is ONNX Runtime's, see `deploykit.measure`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from deploykit.data.pixels import normalize
from deploykit.errors import DataError
from deploykit.interrupt import raise_if_stopped
from deploykit.train.freeze import set_mode

if TYPE_CHECKING:
    from deploykit.data.dataset import Split

SetMode = Callable[[nn.Module, bool, frozenset[str]], None]


@torch.no_grad()
def evaluate(
    module: nn.Module,
    split: Split,
    preprocess: Mapping[str, Any] | None,
    *,
    batch_size: int = 256,
    set_mode: SetMode = set_mode,
) -> float:
    """Return the share of samples whose largest logit is their label's, 0 to 1.

    The module is left in evaluation mode.

    Raises:
        DataError: the split is empty.
        Interrupted: a signal asked to stop.
    """
    if not len(split):
        raise DataError(f"data.{split.name}: expected samples to evaluate on, got none")
    device = device_of(module)
    set_mode(module, False, frozenset())
    correct = 0
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, min(start + batch_size, len(split)))
        inputs = normalize(torch.from_numpy(split.load(indices)).to(device), preprocess)
        answers = module(inputs).argmax(dim=1).cpu().numpy()
        correct += int((answers == split.labels[indices]).sum())
        raise_if_stopped(f"evaluation on {split.name}")
    return correct / len(split)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's parameters are."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
