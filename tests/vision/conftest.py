"""These tests need torchvision and timm, which live in an environment of their own."""

from importlib.util import find_spec

import pytest
from vision_operators import define_operators

collect_ignore_glob = [] if find_spec("torchvision") and find_spec("timm") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _operators():
    """Define torchvision's operators for as long as the tests run, where they are missing."""
    return define_operators()
