"""Shell patterns over the names of modules, as recipes have them."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from deploykit.errors import CompressionError


def match_modules(module: nn.Module, patterns: Sequence[str], key: str) -> frozenset[str]:
    """Return the names of the modules that a pattern fits, and of those inside them.

    A module that stands in several places has as many names; where it has parameters, a pattern
    that fits one of them fits all.

    Raises:
        CompressionError: a pattern fits none; ``key`` is the recipe's.
    """
    parts = [(name, part) for name, part in module.named_modules(remove_duplicate=False) if name]
    names = [name for name, _ in parts]
    hits = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            near = ", ".join(get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise CompressionError(
                f"{key}: {pattern!r} fits no module; near it are {near}", layer=pattern
            )
        hits.update(found)
    inside = {
        name for name in names if any(name == hit or name.startswith(f"{hit}.") for hit in hits)
    }
    held = [part for name, part in parts if name in inside]
    shared = {id(part) for part in held if next(part.parameters(), None) is not None}
    return frozenset(name for name, part in parts if name in inside or id(part) in shared)
