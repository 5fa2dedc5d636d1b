"""What a model costs whatever runs it: bytes, parameters, multiplications."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from deploykit.artifacts import OnnxModel

if TYPE_CHECKING:
    from torch import Tensor, nn


def size_bytes(model: OnnxModel) -> int:
    """Return the size of the ONNX file."""
    return model.path.stat().st_size


def count_parameters(module: nn.Module) -> int:
    """Return the number of learned values; a shared one counts once, buffers not at all."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Count the multiply-accumulates of one sample's forward pass.

    Convolutions, linear layers, matrix products and attention count; a bias, a normalization or
    an activation does not.

    Args:
        module: left as it is; a copy runs, in evaluation mode.
        inputs: at least one sample each, ``(N, ...)``; the first one is used.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from deploykit.models.attention import plain_attention

    # By attribute: exported graphs refuse .eval().
    module = copy.deepcopy(module)
    for part in module.modules():
        part.training = False
    # The counter follows modules by gradient hooks, which no view of a parameter may meet.
    module.requires_grad_(False)
    # It knows no fused attention of CPUs.
    with (
        plain_attention(),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        module(*(tensor[:1] for tensor in inputs))
    return int(counter.get_total_flops()) // 2
