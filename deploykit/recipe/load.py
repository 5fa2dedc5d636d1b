"""YAML -> Recipe, and back: every fault at once, each with its place and what was expected."""

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deploykit.errors import RecipeError
from deploykit.recipe.overrides import lay_over
from deploykit.recipe.schema import nearest_key, node_at, takes
from deploykit.recipe.sections import Recipe
from deploykit.recipe.tree import CORE_SCALARS, Fault, KeyPath, Source, Tree, read_tree
from deploykit.recipe.wording import shown

MAX_BYTES = 1 << 20
MAX_FAULTS = 50


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Relative paths in it stay as written; they are relative to the recipe's folder.

    Args:
        path: a YAML file of at most 1 MiB, in UTF-8.
        overrides: ``section.key=value`` each, laid over the file in this order.

    Raises:
        RecipeError: the file cannot be read, or has faults; ``problems`` lists them all.
    """
    where = str(path) if str(path).isprintable() else repr(str(path))
    return parse_recipe(_read(path, where), overrides, where)


def parse_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Read a recipe from YAML text; ``where`` is its name in messages.

    Example:
        >>> parse_recipe(text, ["train.epochs=3"]).train.epochs
        3

    Raises:
        RecipeError: it has faults; ``problems`` lists them all.
    """
    tree = read_tree(Source(text, where))
    if not tree.faults and not isinstance(tree.value, dict):
        tree.report((), f"expected a recipe's keys, such as schema: 1, got {shown(tree.value)}")
    if isinstance(tree.value, dict):
        for number, override in enumerate(overrides):
            lay_over(tree, override, number)
        recipe = _validate(tree)
        if recipe is not None and not tree.faults:
            return recipe
    raise RecipeError(_problems(tree.faults))


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every default, one top-level key a line, in running order."""
    values = recipe.model_dump(mode="json", by_alias=True)
    return "".join(f"{key}: {_flow(value)}\n" for key, value in values.items())


class _Dumper(yaml.SafeDumper):
    """Quotes text that PyYAML's rules or the core schema's would read as something else."""


for _scalar_kind in CORE_SCALARS:
    _Dumper.add_implicit_resolver(*_scalar_kind)


def _flow(value: Any) -> str:
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("\n").removesuffix("\n...")  # a bare scalar ends its document


def _read(path: Path, where: str) -> str:
    """Return a file's text; only a regular file of UTF-8 is opened and believed."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise RecipeError([f"{where}: expected a recipe file, got a folder"])
        if not stat.S_ISREG(mode):  # a pipe would block, a device never end
            raise RecipeError([f"{where}: expected a recipe file, got something else"])
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError([f"{where}: there is no such recipe file; check the path"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"{where}: the recipe cannot be read: {reason}"
        raise RecipeError([message]) from None
    if len(data) > MAX_BYTES:
        raise RecipeError([f"{where}: expected a recipe of at most 1 MiB, got more"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"{where}:{line}: expected UTF-8 text, got the byte 0x{data[error.start]:02x}"
        raise RecipeError([message]) from None


def _validate(tree: Tree) -> Recipe | None:
    """Return the recipe, or add what the models refuse to the tree's faults."""
    try:
        # As JSON, so that strict models take lists for tuples and 1 for 1.0, but no more.
        return Recipe.model_validate_json(json.dumps(tree.value))
    except ValidationError as error:
        details = error.errors(include_url=False)
    found = [_fault(detail, tree.value) for detail in details]
    blamed, around = set(tree.faulty), set[KeyPath]()
    for path, message in sorted(found, key=lambda fault: -len(fault[0])):
        # A list is blamed only if its items are fine, and a union once, not once a member.
        parents = {path[:depth] for depth in range(len(path))}
        if path not in around and path not in blamed and not parents & blamed:
            tree.report(path, message)
        blamed.add(path)
        around |= parents
    return None


def _fault(detail: Mapping[str, Any], value: Any) -> tuple[KeyPath, str]:
    """Put one of pydantic's complaints into our words, as (path, message)."""
    path = _locate(detail, value)
    if detail["type"] == "extra_forbidden":
        nearest = nearest_key(path)
        return path, "unknown key" + (f"; did you mean {nearest}?" if nearest else "; remove it")
    node = node_at(path)
    expected = takes(node) if node is not None else detail["msg"]
    if detail["type"] == "missing":
        return path, f"expected {expected}, got nothing"
    for part in path:
        value = value[part]
    if detail["type"] == "value_error" and isinstance(value, dict):  # a rule over several keys
        key, _, message = str(detail["ctx"]["error"]).partition(": ")
        return tuple(key.split(".")), message
    return path, f"expected {expected}, got {shown(value)}"


def _locate(detail: Mapping[str, Any], value: Any) -> KeyPath:
    """Return the path of the value that pydantic complains about.

    Its own locations hold the names of union members too.
    """
    path: KeyPath = ()
    for part in detail["loc"]:
        inside = isinstance(part, int) and part < len(value) if isinstance(value, list) else False
        if not inside and not (isinstance(value, dict) and part in value):
            return (*path, part) if detail["type"] == "missing" else path
        path, value = (*path, part), value[part]
    return path


def _problems(faults: Sequence[Fault]) -> list[str]:
    problems = [str(fault) for fault in sorted(faults)]
    if len(problems) > MAX_FAULTS:
        problems[MAX_FAULTS:] = [f"... and {len(problems) - MAX_FAULTS} more faults"]
    return problems
