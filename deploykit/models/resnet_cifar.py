"""Residual networks for 32x32 images with parameter-free shortcuts.

He et al., "Deep Residual Learning for Image Recognition", section 4.2 and shortcut option A,
https://arxiv.org/abs/1512.03385. Module names are those of the published CIFAR-10 weights of
https://github.com/akamaster/pytorch_resnet_cifar10.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from deploykit.errors import ModelError

DEPTHS = (20, 32, 44, 56)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the shortcut skips pixels and pads channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            x = functional.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(out + x)


class ResNetCifar(nn.Module):
    """Three stages of 16, 32 and 64 channels, of ``blocks`` blocks each."""

    def __init__(self, blocks: int, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalized images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet_cifar(*, depth: int, classes: int, sample_shape: tuple[int, ...]) -> ResNetCifar:
    """Build the net of ``depth`` layers for images of ``sample_shape`` ``(H, W, C)``.

    Raises:
        ModelError: the samples are not images.
    """
    if len(sample_shape) != 3:
        raise ModelError(
            f"model.name: resnet{depth}: expected images (height, width, channels), got samples "
            f"of shape {sample_shape}; use mlp or a model of your own"
        )
    return ResNetCifar((depth - 2) // 6, sample_shape[-1], classes)


RESNETS = {f"resnet{depth}": partial(resnet_cifar, depth=depth) for depth in DEPTHS}
