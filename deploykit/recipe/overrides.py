"""``--set section.key=value``, laid over a recipe before it is validated."""

from typing import Any

from deploykit.recipe.tree import KeyPath, Origin, Source, Tree, read_tree
from deploykit.recipe.wording import shown


def lay_over(tree: Tree, override: str, number: int) -> None:
    """Replace one value of ``tree``; what is wrong with that becomes a fault of the tree.

    A section that is absent is made, an item of a list is named by its index, and
    ``null`` drops a section.

    Args:
        tree: the recipe; its value is a mapping.
        override: ``section.key=value``, the value in YAML.
        number: which of the overrides this is, so that faults keep their order.
    """
    key, equals, value = override.partition("=")
    shown_override = override if override.isprintable() and len(override) < 200 else shown(override)
    source = Source(value, f"--set {shown_override}", number)
    parts = key.split(".")
    if not equals or not all(parts):
        message = "expected section.key=value, for example train.epochs=5"
        tree.report((), message, source.origin())
        return
    found = _holder(tree, parts, source.origin())
    if found is None:
        return
    holder, path = found
    read = read_tree(source, path)
    _forget(tree, path)
    tree.faults += read.faults
    tree.faulty |= read.faulty
    tree.origins |= {place: origin for place, origin in read.origins.items() if place}
    holder[path[-1]] = read.value


def _holder(tree: Tree, parts: list[str], origin: Origin) -> tuple[Any, KeyPath] | None:
    """Return the section or list that holds the value, and the value's path."""
    holder: Any = tree.value
    path: KeyPath = ()
    for depth, part in enumerate(parts):
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                count = f"the recipe's list has {len(holder)}; set it whole"
                tree.report(path, f"expected the index of an item, got {part}; {count}", origin)
                return None
            path = (*path, int(part))
        elif isinstance(holder, dict):
            path = (*path, part)
        elif path in tree.faulty:
            return None
        else:
            tree.report(path, f"expected a section, got {shown(holder)}", origin)
            return None
        if depth == len(parts) - 1:
            break
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = [] if parts[depth + 1].isdecimal() else {}
            _forget(tree, path)
            tree.origins[path] = origin
        holder = holder[path[-1]]
    return holder, path


def _forget(tree: Tree, path: KeyPath) -> None:
    """Drop the places of a value that is replaced."""
    for place in [place for place in tree.origins if place[: len(path)] == path]:
        del tree.origins[place]
    tree.faulty = {place for place in tree.faulty if place[: len(path)] != path}
