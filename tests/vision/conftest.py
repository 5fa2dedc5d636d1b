"""These tests need torchvision and timm, which live in an environment of their own."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("torchvision") and find_spec("timm") else ["test_*.py"]

# torchvision built for CUDA fails to import beside a torch built for CPUs, for want of these two.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@pytest.fixture(scope="session", autouse=True)
def _operators():
    """Define torchvision's operators for as long as the tests run, where they are missing."""
    try:
        import torchvision  # noqa: F401

        yield
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        yield library
