"""Depth of a module: blocks that are left out."""

from collections.abc import Iterable

from torch import nn


def remove_blocks(module: nn.Module, names: Iterable[str]) -> None:
    """Replace each named block by its input, in place.

    Raises:
        AttributeError: there is no such module.
    """
    for name in names:
        parent, _, attribute = name.rpartition(".")
        module.get_submodule(name)
        setattr(module.get_submodule(parent), attribute, nn.Identity())
