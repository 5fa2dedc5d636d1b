"""What pruning did, for the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deploykit.artifacts import JsonDict
from deploykit.models.modes import evaluating


@dataclass(frozen=True)
class PruneNotes:
    """What was removed and what was left.

    Attributes:
        channel_ratio: the share that was asked for.
        achieved_ratio: the share removed, of the channels of all prunable groups.
        widths: output channels ``(before, after)`` of each layer that got narrower.
        left_alone: why a group kept all its channels, by the names of its layers.
        macs: multiply-accumulates of one sample, before and after.
        parameters: number of parameters, before and after.
    """

    channel_ratio: float
    achieved_ratio: float
    widths: Mapping[str, tuple[int, int]]
    left_alone: Mapping[str, str]
    macs: tuple[int, int]
    parameters: tuple[int, int]

    def to_json(self) -> JsonDict:
        """Return plain JSON for the report."""
        return asdict(self)


def count_macs(module: nn.Module, example: torch.Tensor) -> int:
    """Count the multiply-accumulates of convolutions and matrix products of one sample.

    Args:
        module: runs in evaluation mode; its own modes are given back.
        example: one sample or more; only its first is used.
    """
    with torch.no_grad(), evaluating(module), FlopCounterMode(display=False) as counter:
        module(example[:1])
    return int(counter.get_total_flops()) // 2


def count_parameters(module: nn.Module) -> int:
    """Count the parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
