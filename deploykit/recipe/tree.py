"""YAML text as plain values that remember where they stand.

Only what a recipe needs is read: mappings, lists and scalars of YAML 1.2's core schema
(so ``3e-3`` is a number, and ``no`` is text). Tags, anchors and aliases are faults: they
are how YAML runs code and how a small file grows into a huge one.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from deploykit.recipe.wording import shown, shown_key

MAX_DEPTH = 20
MAX_VALUES = 10_000

EMPTY = "expected a value, got nothing; write null, or leave the key out"
EMPTY_FILE = "expected a recipe's keys, such as schema: 1, got an empty file"

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
# (tag, what it looks like, its first characters), as PyYAML's resolvers take them.
CORE_SCALARS = (
    (_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    (_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    (
        _TAG + "int",
        re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
        list("-+0123456789"),
    ),
    (
        _TAG + "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        list("-+0123456789."),
    ),
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe parser (in C where it is there), with the core schema's scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own protocol


for _scalar_kind in CORE_SCALARS:
    _Loader.add_implicit_resolver(*_scalar_kind)


@dataclass(frozen=True, order=True)
class Origin:
    """Where a value was written: ``recipe.yaml:12``, or ``--set train.epochs=x``."""

    position: int
    text: str


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is wrong; faults sort as the user meets them."""

    origin: Origin
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin.text, self.path, self.message) if part)


def dotted(path: KeyPath) -> str:
    """Write a path as recipes do: ``data.augment.0.padding``."""
    return ".".join(shown_key(part) for part in path)


@dataclass
class Tree:
    """Plain values, where each stands, and what could not be read.

    ``faulty`` holds the paths that are reported already, and whose value means nothing.
    """

    value: Any = None
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    faulty: set[KeyPath] = field(default_factory=set)

    def origin(self, path: KeyPath) -> Origin:
        """Return where ``path`` stands, or else its nearest parent."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def report(self, path: KeyPath, message: str, origin: Origin | None = None) -> None:
        """Add a fault at ``path``; ``origin`` where that is not the place of its value."""
        self.faults.append(Fault(origin or self.origin(path), dotted(path), message))

    def reject(self, path: KeyPath, message: str, origin: Origin | None = None) -> None:
        """Report ``path`` and leave its value out from here on."""
        self.report(path, message, origin)
        self.faulty.add(path)


@dataclass(frozen=True)
class Source:
    """A piece of YAML and its name: a file whose lines are told, or one ``--set``."""

    text: str
    where: str
    override: int | None = None

    def origin(self, line: int | None = None) -> Origin:
        """Return the place of ``line``, counted from 0; ``None`` is the whole."""
        if self.override is not None:
            return Origin(sys.maxsize + self.override, self.where)
        return (
            Origin(0, self.where) if line is None else Origin(line + 1, f"{self.where}:{line + 1}")
        )


def read_tree(source: Source, root: KeyPath = ()) -> Tree:
    """Read YAML; whatever is wrong with it ends up in the tree's ``faults``.

    Args:
        source: the text and its name.
        root: the path at which its value stands in the recipe.
    """
    tree = Tree(origins={(): source.origin(), root: source.origin()})
    try:
        for place, message in _unsafe(source.text):
            tree.reject(root, message, source.origin(place))
            return tree
        node = yaml.compose(source.text, Loader=_Loader)
    except yaml.YAMLError as error:
        line, message = _syntax(source.text, error)
        tree.reject(root, message, source.origin(line))
        return tree
    if node is None:
        tree.reject(root, EMPTY_FILE if source.override is None else EMPTY)
    else:
        tree.value = _value(node, root, source, tree)
        tree.origins[()] = source.origin()  # what is missing stands on no line
    return tree


def _unsafe(text: str) -> Iterator[tuple[int, str]]:
    """Yield what must be refused before the text becomes nodes, as (line, message)."""
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        place = text.count("\n", 0, found.start())
        yield place, f"expected text, got the character {found.group()!r}"
    depth = values = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = _line(event) or 0
        documents += isinstance(event, yaml.DocumentStartEvent)
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if documents > 1:
            yield line, "expected one YAML document, got a second one; remove the --- line"
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            yield line, "expected no anchors and aliases; write the value out, or quote & and *"
        if depth > MAX_DEPTH:
            yield line, f"expected at most {MAX_DEPTH} levels, got more"
        if values > MAX_VALUES:
            yield line, f"expected at most {MAX_VALUES} values, got more"


def _syntax(text: str, error: yaml.YAMLError) -> tuple[int | None, str]:
    """Put a parser's complaint into our words, as (line, message)."""
    mark: Any = getattr(error, "problem_mark", None)
    line: int | None = None if mark is None else mark.line
    rest = text.splitlines()[line : line + 1] if line is not None else []
    if rest and rest[0][mark.column :].startswith("\t"):
        return line, "expected spaces, got a tab"
    return line, f"expected valid YAML: {getattr(error, 'problem', None) or 'it cannot be read'}"


def _value(node: yaml.Node, path: KeyPath, source: Source, tree: Tree) -> Any:
    tree.origins[path] = source.origin(_line(node))
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, path, source, tree)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_value(item, (*path, i), source, tree) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, tree)
    tree.reject(path, f"expected no tag, got {_tag(node)}")
    return None


def _mapping(node: yaml.MappingNode, path: KeyPath, source: Source, tree: Tree) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        origin = source.origin(_line(key_node))
        if not isinstance(key_node, yaml.ScalarNode):
            tree.reject(path, "expected a word as key, got a list or a section", origin)
        elif key_node.value in values:
            first = tree.origins[(*path, key_node.value)]
            message = f"expected once, got it again; it stands in {first.text} already"
            tree.reject((*path, key_node.value), message, origin)
        else:
            inner = (*path, key_node.value)
            values[key_node.value] = _value(value_node, inner, source, tree)
            tree.origins[inner] = origin  # the key's line, where its value starts below
    return values


def _scalar(node: yaml.ScalarNode, path: KeyPath, tree: Tree) -> Any:
    kind = node.tag.removeprefix(_TAG)
    try:
        if kind == "str":
            return _text(node.value)
        if kind == "null" and not node.value:
            raise ValueError(EMPTY)
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        if kind in ("int", "float"):
            return _number(node.value, kind)
        raise ValueError(f"expected no tag, got {_tag(node)}")
    except ValueError as error:
        tree.reject(path, str(error))
        return None


def _line(node: yaml.Node | yaml.Event) -> int | None:
    return None if node.start_mark is None else node.start_mark.line


def _tag(node: yaml.Node) -> str:
    return shown(node.tag.replace(_TAG, "!!", 1))


def _text(text: str) -> str:
    # Control characters and lone surrogates break terminals, paths and JSON.
    if any(c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"expected text of one line without control characters, got {shown(text)}")
    return text


def _number(text: str, kind: str) -> int | float:
    bases = {"0o": 8, "0x": 16}
    with contextlib.suppress(ValueError):  # .nan, more digits than Python reads, !!int text
        if kind == "int":
            return int(text, bases.get(text[:2], 10))
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f"expected a finite number, got {shown(text)}")
