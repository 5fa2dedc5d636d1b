"""Random changes of training images, in batches, on the images' device.

Every sample draws for itself. The draws are made by a generator of their own on the CPU, so
they are the same on every device, and nothing is taken from or left in torch's or numpy's
global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from deploykit.data.policies import auto_augment, rand_augment, rotate
from deploykit.seeds import stable_seed

if TYPE_CHECKING:
    from deploykit.recipe.sections import AugmentSection


@torch.no_grad()
def augment(
    images: Tensor,
    targets: Tensor,
    sections: Sequence[AugmentSection],
    *,
    seed_parts: tuple[int | str, ...],
) -> tuple[Tensor, Tensor]:
    """Apply the sections in their order; the arguments stay as they are.

    Args:
        images: float32 ``(N, C, H, W)``, 0 to 1, 1 or 3 channels.
        targets: float ``(N, classes)``, one-hot; mixup and cutmix make them soft.
        sections: what to do.
        seed_parts: where in the run this batch stands; equal parts, equal result, bit for
            bit on the same device.

    Returns:
        Images and targets of the same shapes, dtypes and device.

    Example:
        >>> from deploykit.recipe.sections import AugmentSection
        >>> x, y = torch.rand(4, 3, 8, 8), torch.eye(4)
        >>> x, y = augment(x, y, [AugmentSection(name="flip")], seed_parts=(0, "train", 1, 7))
    """
    for place, section in enumerate(sections):
        rng = np.random.default_rng(stable_seed(*seed_parts, "augment", place, section.name))
        images, targets = _apply(images, targets, section, rng)
    return images, targets


def _apply(
    images: Tensor, targets: Tensor, section: AugmentSection, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    changed = rng.random(len(images)) < section.probability
    match section.name:
        case "flip":
            images = _flip(images, rng, changed)
        case "crop":
            images = _crop(images, rng, changed, section.padding)
        case "rotate":
            images = _rotate(images, rng, changed, section.degrees)
        case "color":
            images = _color(images, rng, changed, section.strength)
        case "rand-augment":
            images = rand_augment(images, rng, changed, section.magnitude, section.operations)
        case "auto-augment":
            images = auto_augment(images, rng, changed)
        case "mixup":
            return _mixup(images, targets, rng, changed, section.alpha)
        case "cutmix":
            return _cutmix(images, targets, rng, changed, section.alpha)
    return images, targets


def _flip(images: Tensor, rng: np.random.Generator, changed: np.ndarray) -> Tensor:
    mirrored = changed & (rng.random(len(images)) < 0.5)
    return torch.where(_per_image(mirrored, images).bool(), images.flip(-1), images)


def _crop(images: Tensor, rng: np.random.Generator, changed: np.ndarray, padding: int) -> Tensor:
    """Cut the original size out of the image with a black border; pixels are only moved."""
    count, _, height, width = images.shape
    offsets = rng.integers(2 * padding + 1, size=(2, count))
    top, left = torch.from_numpy(np.where(changed, offsets, padding)).to(images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    sample = torch.arange(count, device=images.device)[:, None, None]
    bordered = pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    cut = bordered[sample, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def _rotate(
    images: Tensor, rng: np.random.Generator, changed: np.ndarray, largest: float
) -> Tensor:
    degrees = rng.uniform(-largest, largest, size=len(images))
    rotated = rotate(images, torch.from_numpy(degrees).to(images)).clamp(0, 1)
    return torch.where(_per_image(changed, images).bool(), rotated, images)


def _color(
    images: Tensor, rng: np.random.Generator, changed: np.ndarray, strength: float
) -> Tensor:
    """Change brightness, contrast and saturation; grey images have no saturation to change."""
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_saturation_with_gray_subtraction,
    )

    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=(3, len(images)))
    brightness, contrast, saturation = torch.from_numpy(factors).to(images)
    colored = adjust_brightness_accumulative(images, brightness)
    colored = adjust_contrast_with_mean_subtraction(colored, contrast)
    colored = adjust_saturation_with_gray_subtraction(colored, saturation)
    return torch.where(_per_image(changed, images).bool(), colored, images)


def _mixup(
    images: Tensor, targets: Tensor, rng: np.random.Generator, changed: np.ndarray, alpha: float
) -> tuple[Tensor, Tensor]:
    """Blend each image and target with another's, https://arxiv.org/abs/1710.09412."""
    partner = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    share = np.where(changed, rng.beta(alpha, alpha, size=len(images)), 1.0)
    return (
        _blend(images, images[partner], _per_image(share, images)),
        _blend(targets, targets[partner], torch.from_numpy(share).to(targets)[:, None]),
    )


def _cutmix(
    images: Tensor, targets: Tensor, rng: np.random.Generator, changed: np.ndarray, alpha: float
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image; targets by area, https://arxiv.org/abs/1905.04899."""
    count, _, height, width = images.shape
    partner = torch.from_numpy(rng.permutation(count)).to(images.device)
    side = np.sqrt(1 - rng.beta(alpha, alpha, size=count)) * changed
    inside = [
        _interval(rng.integers(size, size=count), side * size, size) for size in (height, width)
    ]
    pasted = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    # The border cuts boxes off, so the share is the area that was really pasted.
    share = 1 - pasted.mean(axis=(1, 2, 3))
    return (
        torch.where(torch.from_numpy(pasted).to(images.device), images[partner], images),
        _blend(targets, targets[partner], torch.from_numpy(share).to(targets)[:, None]),
    )


def _interval(centres: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """Return for each centre which of ``size`` places lie within its length, ``(N, size)``."""
    first = centres - np.rint(lengths).astype(np.int64) // 2
    places = np.arange(size) - first[:, None]
    inside: np.ndarray = (places >= 0) & (places < np.rint(lengths)[:, None])
    return inside


def _blend(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return own * share + other * (1 - share)


def _per_image(values: np.ndarray, images: Tensor) -> Tensor:
    """Return one number an image, in the images' dtype and on their device, ``(N, 1, 1, 1)``."""
    return torch.from_numpy(values).to(images).view(-1, 1, 1, 1)
