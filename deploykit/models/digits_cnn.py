"""A small convolutional net for small images."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from deploykit.errors import ModelError


class DigitsCnn(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU, one pooling before the last of them.

    The default widths are the smallest whose int8 form is clearly faster than float on a
    CPU at batch 1: nets of 32 to 64 channels spend their time between the layers.

    Args:
        widths: output channels of each convolution.
        in_channels: channels of the image.
        classes: number of logits.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 128, 128), in_channels: int = 1, classes: int = 10
    ) -> None:
        super().__init__()
        channels = (in_channels, *widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False)
            for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.linear = nn.Linear(channels[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalized images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if index == last:
                x = functional.max_pool2d(x, 2)
            x = functional.relu(norm(conv(x)))
        logits: torch.Tensor = self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def digits_cnn(
    *, classes: int, sample_shape: tuple[int, ...], widths: Sequence[int] = (64, 128, 128)
) -> DigitsCnn:
    """Build the net for images of ``sample_shape`` ``(H, W, C)``, at least 2 by 2 pixels.

    Raises:
        ModelError: the samples are not such images, or a width is not positive.
    """
    if len(sample_shape) != 3 or min(sample_shape[:2]) < 2:
        raise ModelError(
            "model.name: digits-cnn: expected images (height, width, channels) of at least 2x2 "
            f"pixels, got samples of shape {sample_shape}; use mlp or a model of your own"
        )
    if not widths or min(widths) < 1:
        raise ModelError(
            f"model.arguments.widths: expected positive numbers, got {list(widths)}; "
            "for example [64, 128, 128]"
        )
    return DigitsCnn(widths, sample_shape[-1], classes)
