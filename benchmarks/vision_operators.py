"""What torchvision needs before its import, where it was built for GPUs and torch was not."""

from __future__ import annotations

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def define_operators() -> torch.library.Library | None:
    """Define torchvision's operators where its import fails for want of them.

    Returns:
        What holds the definitions, to be kept as long as torchvision is used; None where
        nothing was missing.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        return library
    return None
