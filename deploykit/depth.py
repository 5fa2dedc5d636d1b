"""Depth of a module: blocks that are left out."""

from collections.abc import Iterable

from torch import nn


def remove_blocks(module: nn.Module, names: Iterable[str]) -> None:
    """Replace each named block by its input, in place, wherever else it stands too.

    Raises:
        AttributeError: there is no such module.
    """
    for name in names:
        for alias in aliases(module, name):
            module.set_submodule(alias, nn.Identity())


def aliases(module: nn.Module, name: str) -> list[str]:
    """Return every name by which ``module`` holds the module of this name.

    Raises:
        AttributeError: there is no such module.
    """
    block = module.get_submodule(name)
    return [other for other, part in module.named_modules(remove_duplicate=False) if part is block]
