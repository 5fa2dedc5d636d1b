"""Normalization of pixels in training, to the number what the deployed model does inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deploykit.runtime import zero_point_and_scale


def normalize(batch: Tensor, preprocess: Mapping[str, Any] | None) -> Tensor:
    """Normalize a batch as the deployed model does.

    Args:
        batch: pixels as stored, uint8 ``(N, H, W, C)``, or as augmented, float
            ``(N, C, H, W)`` from 0 to 255; features ``(N, ...)`` where ``preprocess`` is
            ``None``.
        preprocess: holds ``mean``, ``std`` and ``channels``.

    Returns:
        float32 ``(N, C, H, W)``, ``(pixel - zero_point) * scale``; features as float32.
    """
    if preprocess is None:
        return batch.to(torch.float32)
    pixels = batch.permute(0, 3, 1, 2) if batch.dtype == torch.uint8 else batch
    zero_point, scale = (
        torch.from_numpy(constant).to(device=batch.device, dtype=torch.float32).view(1, -1, 1, 1)
        for constant in zero_point_and_scale(preprocess)
    )
    # Strides as of a tensor made in this order; those of one channel count as contiguous with
    # the channels innermost as well, and a view of what a convolution makes of that fails.
    ordered = pixels.to(torch.float32).contiguous().flatten().view(pixels.shape)
    return (ordered - zero_point) * scale
