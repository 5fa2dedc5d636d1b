"""Shell patterns over the names of modules, as recipes have them."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from deploykit.errors import CompressionError


def match_modules(module: nn.Module, patterns: Sequence[str], key: str) -> frozenset[str]:
    """Return the names of the modules that a pattern fits, and of those inside them.

    Raises:
        CompressionError: a pattern fits none; ``key`` is the recipe's.
    """
    names = [name for name, _ in module.named_modules() if name]
    hits = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            near = ", ".join(get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise CompressionError(
                f"{key}: {pattern!r} fits no module; near it are {near}", layer=pattern
            )
        hits.update(found)
    return frozenset(
        name for name in names if any(name == hit or name.startswith(f"{hit}.") for hit in hits)
    )
