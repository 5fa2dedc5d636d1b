"""The recipe's keys as data: what each takes, its default and what it is for.

Read from the JSON schema of the models, so that faults, help and documents say the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from deploykit.recipe.sections import Recipe
from deploykit.recipe.wording import shown

REQUIRED = "required"

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        path: dotted, ``N`` for the items of a list: ``data.augment.N.padding``.
        takes: what is accepted, in words: ``0 <= x < 1``.
        default: in the recipe's spelling; ``required`` where there is none.
        about: what it is for, with its unit.
        is_section: it holds further keys.
    """

    path: str
    takes: str
    default: str
    about: str
    is_section: bool


@cache
def _schema() -> Node:
    return Recipe.model_json_schema(by_alias=True)


def _resolve(node: Node) -> Node:
    reference = node.get("$ref")
    return _schema()["$defs"][reference.rpartition("/")[2]] if reference else node


def _choices(node: Node) -> list[Node]:
    return [_resolve(choice) for choice in node.get("anyOf", [node])]


def _child(node: Node, part: str | int) -> Node | None:
    """Return what stands under ``part`` of a section, a list or a free mapping."""
    for choice in _choices(node):
        if isinstance(part, int) and "items" in choice:
            return _resolve(choice["items"])
        if isinstance(part, int) and part < len(choice.get("prefixItems", ())):
            return _resolve(choice["prefixItems"][part])
        if part in choice.get("properties", {}):
            return _with_default(choice["properties"][part])
        if isinstance(choice.get("additionalProperties"), Mapping):
            return _resolve(choice["additionalProperties"])
    return None


def _with_default(node: Node) -> Node:
    return {
        **_resolve(node),
        **{key: node[key] for key in ("description", "default") if key in node},
    }


def node_at(path: tuple[str | int, ...]) -> Node | None:
    """Return the schema of the key at ``path``, or ``None`` if there is no such key."""
    node: Node | None = _schema()
    for part in path:
        node = None if node is None else _child(node, part)
    return node


def summary(section: str) -> str:
    """Return the sentence that describes a top-level section."""
    node = _schema()["properties"][section]
    found = [choice["description"] for choice in _choices(node) if "properties" in choice]
    return str(found[0])


def takes(node: Node) -> str:
    """Say in words what a key accepts: ``integer >= 1``, ``text or null``."""
    choices = [_resolve(choice) for choice in node.get("anyOf", [])]
    if choices:
        return _either([takes(choice) for choice in choices])
    if "const" in node:
        return shown(node["const"])
    if "enum" in node:
        return _either([str(value) for value in node["enum"]])
    kind = node["type"]
    if kind in ("number", "integer"):
        return _range(node, kind)
    if kind == "array":
        return _list(node)
    if kind == "string" and "pattern" in node:
        return f"text that fits {node['pattern']}"
    names = {"string": "text", "boolean": "true or false", "object": "section", "null": "null"}
    return names[kind]


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _range(node: Node, kind: str) -> str:
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    above = "<=" if "minimum" in node else "<"
    below = "<=" if "maximum" in node else "<"
    if low is None and high is None:
        return kind
    if high is None:
        sign = ">=" if "minimum" in node else ">"
        return f"integer {sign} {low:g}" if kind == "integer" else f"x {sign} {low:g}"
    span = f"x {below} {high}" if low is None else f"{low} {above} x {below} {high}"
    return f"integer, {span}" if kind == "integer" else span


def _list(node: Node) -> str:
    items = node.get("prefixItems") or [node["items"]]
    least, most = node.get("minItems", 0), node.get("maxItems")
    count = (
        "list of"
        if most is None
        else f"list of {most}:"
        if least == most
        else f"list of {least} to {most}:"
    )
    inner = takes(_resolve(items[0]))
    return f"{count} {'sections' if inner == 'section' else inner}"


def keys(node: Node | None = None, prefix: str = "") -> Iterator[Key]:
    """Yield every key of a recipe, in running order, each section before what it holds."""
    for choice in _choices(_schema() if node is None else node):
        if choice.get("type") == "array" and "items" in choice:
            choice, prefix = _resolve(choice["items"]), f"{prefix}N."
        required = choice.get("required", ())
        for name, raw in choice.get("properties", {}).items():
            child = _with_default(raw)
            inner = list(keys(child, f"{prefix}{name}."))
            yield Key(
                path=f"{prefix}{name}",
                takes=takes(child),
                default=REQUIRED if name in required else _default(child["default"]),
                about=child.get("description", ""),
                is_section=bool(inner),
            )
            yield from inner


def _default(value: Any) -> str:
    return (
        "its own defaults" if isinstance(value, dict) and value else shown(value).replace("'", "")
    )


@cache
def _all_paths() -> tuple[str, ...]:
    return tuple(key.path for key in keys())


def nearest_key(path: tuple[str | int, ...]) -> str | None:
    """Return the known key that an unknown ``path`` most likely meant, dotted."""
    *parents, last = (str(part) for part in path)
    section = node_at(path[:-1]) or {}
    siblings = [name for choice in _choices(section) for name in choice.get("properties", ())]
    prefix = ".".join(parents)
    if close := get_close_matches(str(last), siblings, n=1):
        return f"{prefix}.{close[0]}" if prefix else close[0]
    elsewhere = [known for known in _all_paths() if known.rpartition(".")[2] == last]
    # The one that shares the most of the way with what was written.
    return min(elsewhere, key=lambda known: not known.startswith(prefix + "."), default=None)
