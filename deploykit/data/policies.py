"""RandAugment and AutoAugment with a policy of its own for each sample.

Kornia's containers draw one sequence of operations for a whole batch, so the samples are
grouped here by the operation that each has drawn, and kornia's functions, which take a
parameter for each sample and agree with Pillow's to a rounding, do the rest.

RandAugment: https://arxiv.org/abs/1909.13719. AutoAugment: https://arxiv.org/abs/1805.09501.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Takes images (K, C, H, W) and levels (K,) from -1 to 1, and returns images (K, C, H, W).
Operation = Callable[[Tensor, Tensor], Tensor]

RAND_AUGMENT_LEVELS = 30
_AUTO_AUGMENT_LEVELS = 9
# AutoAugment was searched on small images (CIFAR-10) and on large ones (ImageNet).
_LARGE_SIDE = 96
_ENHANCEMENT = 0.9
_SHEAR = 0.3
_TRANSLATION = 150 / 331
_ROTATION_DEGREES = 30.0
_POSTERIZED_BITS = 4
_SHARPNESS_KERNEL = 3


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Move pixels about the centre; what enters from outside is black.

    Args:
        images: ``(N, C, H, W)``.
        matrices: ``(N, 2, 3)``, from source to destination, in pixels from the centre.
    """
    from kornia.geometry.transform import warp_affine

    height, width = images.shape[-2:]
    centre = images.new_tensor([(width - 1) / 2, (height - 1) / 2])
    linear, shift = matrices[:, :, :2], matrices[:, :, 2]
    shift = shift + centre - (linear @ centre)
    return warp_affine(images, torch.cat([linear, shift.unsqueeze(-1)], dim=-1), (height, width))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image counter-clockwise by its angle ``(N,)``."""
    angles = degrees * (math.pi / 180)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = [torch.stack([cos, sin, zero], dim=1), torch.stack([-sin, cos, zero], dim=1)]
    return warp(images, torch.stack(rows, dim=1))


def _affine(images: Tensor, levels: Tensor, row: int, column: int, size: float) -> Tensor:
    matrices = torch.eye(2, 3, device=images.device, dtype=images.dtype).repeat(len(images), 1, 1)
    matrices[:, row, column] = levels * size
    return warp(images, matrices)


def _enhance(name: str) -> Operation:
    """Blend with a degenerate image; level 0 changes nothing."""

    def apply(images: Tensor, levels: Tensor) -> Tensor:
        import kornia.enhance

        if name == "sharpness" and min(images.shape[-2:]) < _SHARPNESS_KERNEL:
            return images
        enhanced: Tensor = getattr(kornia.enhance, name)(images, 1 + levels * _ENHANCEMENT)
        return enhanced

    return apply


def _posterize(images: Tensor, levels: Tensor) -> Tensor:
    from kornia.enhance import posterize

    return posterize(images, 8 - (levels.abs() * _POSTERIZED_BITS).round().long())


def _solarize(images: Tensor, levels: Tensor) -> Tensor:
    from kornia.enhance import solarize

    return solarize(images, 1 - levels.abs())


def _auto_contrast(images: Tensor, levels: Tensor) -> Tensor:
    from kornia.enhance import normalize_min_max

    flat = images.amax(dim=(-2, -1), keepdim=True) == images.amin(dim=(-2, -1), keepdim=True)
    # Kornia would turn a channel of one value black.
    return torch.where(flat, images, normalize_min_max(images))


def _equalize(images: Tensor, levels: Tensor) -> Tensor:
    from kornia.enhance import equalize

    return equalize(images)


_OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, levels: images,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "rotate": lambda images, levels: rotate(images, levels * _ROTATION_DEGREES),
    "solarize": _solarize,
    "posterize": _posterize,
    "color": _enhance("adjust_saturation_with_gray_subtraction"),
    "contrast": _enhance("adjust_contrast_with_mean_subtraction"),
    "brightness": _enhance("adjust_brightness_accumulative"),
    "sharpness": _enhance("sharpness"),
    "shear_x": lambda images, levels: _affine(images, levels, 0, 1, _SHEAR),
    "shear_y": lambda images, levels: _affine(images, levels, 1, 0, _SHEAR),
    "translate_x": lambda images, levels: _affine(
        images, levels, 0, 2, _TRANSLATION * images.shape[-1]
    ),
    "translate_y": lambda images, levels: _affine(
        images, levels, 1, 2, _TRANSLATION * images.shape[-2]
    ),
    "invert": lambda images, levels: 1 - images,
}
# RandAugment's fourteen are all but the last.
_NAMES = tuple(_OPERATIONS)
_RAND_AUGMENT = tuple(name for name in _NAMES if name != "invert")
_UNCHANGED = _NAMES.index("identity")


def apply_operations(images: Tensor, numbers: np.ndarray, levels: np.ndarray) -> Tensor:
    """Apply to each image the operation that it has drawn.

    Args:
        images: float32 ``(N, C, H, W)``, 0 to 1.
        numbers: places in the table of operations, int64 ``(N,)``.
        levels: strengths with their sign, float ``(N,)``, -1 to 1.
    """
    out = images.clone()
    for number in np.unique(numbers[numbers != _UNCHANGED]):
        rows = np.flatnonzero(numbers == number)
        index = torch.from_numpy(rows).to(images.device)
        level = torch.from_numpy(levels[rows]).to(images)
        changed = _OPERATIONS[_NAMES[number]](images[index], level)
        out[index] = changed.clamp(0, 1)
    return out


def rand_augment(
    images: Tensor, rng: np.random.Generator, changed: np.ndarray, magnitude: int, operations: int
) -> Tensor:
    """Apply ``operations`` random operations of one strength to each changed image."""
    count = len(images)
    for _ in range(operations):
        numbers = rng.integers(len(_RAND_AUGMENT), size=count)
        levels = rng.choice([-1.0, 1.0], size=count) * (magnitude / RAND_AUGMENT_LEVELS)
        images = apply_operations(images, np.where(changed, numbers, _UNCHANGED), levels)
    return images


def auto_augment(images: Tensor, rng: np.random.Generator, changed: np.ndarray) -> Tensor:
    """Apply one of the 25 published policies to each changed image.

    Images with a side of 96 pixels or more take the policies found on ImageNet, smaller
    ones those found on CIFAR-10.
    """
    policies = _published_policies(large=max(images.shape[-2:]) >= _LARGE_SIDE)
    count = len(images)
    drawn = rng.integers(len(policies), size=count)
    for step in range(2):
        names, chances, levels = zip(*(policy[step] for policy in policies), strict=True)
        numbers = np.array([_NAMES.index(name) for name in names])[drawn]
        happens = changed & (rng.random(count) < np.array(chances)[drawn])
        signs = rng.choice([-1.0, 1.0], size=count)
        strength = np.array([(level or 0) / _AUTO_AUGMENT_LEVELS for level in levels])[drawn]
        images = apply_operations(images, np.where(happens, numbers, _UNCHANGED), signs * strength)
    return images


def _published_policies(*, large: bool) -> list[list[tuple[str, float, float | None]]]:
    """Return AutoAugment's tables: pairs of (operation, probability, level from 0 to 9)."""
    from kornia.augmentation.auto.autoaugment import autoaugment

    return autoaugment.imagenet_policy if large else autoaugment.cifar10_policy
