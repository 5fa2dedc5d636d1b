"""Where torchvision was built for CUDA and torch for CPUs."""

from __future__ import annotations

import torch

# torchvision built for CUDA fails to import beside a torch built for CPUs, for want of these two.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def define_operators() -> torch.library.Library | None:
    """Define torchvision's operators where they are missing; they last as long as the answer."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        return library
    return None
