"""The model that benchmarks quantize: ResNet-20 with fresh weights, for 32x32 images."""

from __future__ import annotations

from pathlib import Path

import torch

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.models import build_model
from deploykit.recipe.sections import ModelSection

SHAPE, CLASSES = (32, 32, 3), 10


def resnet20_candidate() -> Candidate:
    """Return the candidate; equal weights in every process."""
    torch.manual_seed(0)
    section = ModelSection(name="resnet20")
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, *SHAPE)),),
        (TensorSpec("logits", "float32", (-1, CLASSES)),),
        preprocess={"mean": [0.5], "std": [0.25], "channels": SHAPE[-1]},
    )
    return Candidate(
        build_model(section, classes=CLASSES, sample_shape=SHAPE, base=Path()),
        signature,
        {"model": {"name": section.name, "arguments": {}}, "sample_shape": list(SHAPE)},
        stage="train",
    )
