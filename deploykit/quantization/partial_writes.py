"""Writes into a part of a tensor, which the edges of a traced graph do not show.

``h[:, :8].relu_()`` is a slice and an operator in place; what reads ``h`` afterwards reads what was
written, although no edge leads there. A graph that is run as it stands computes that right. One
whose operators are exchanged, or whose values are rounded as they are made, would lose it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch._ops import OpOverload
from torch.fx import Graph, Node


def partial_writes(graph: Graph) -> list[Node]:
    """Return the nodes that write into a view of a tensor that is read again by another way."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    return [node for node in graph.nodes if _writes(node) and _is_read_behind(node, place)]


def _is_read_behind(node: Node, place: dict[Node, int]) -> bool:
    written = node.all_input_nodes[0]
    root = written
    while _is_view(root):
        root = root.all_input_nodes[0]
    return any(
        place[user] > place[node]
        for alias in (root, *_views_of(root))
        if alias is not written
        for user in alias.users
    )


def _views_of(node: Node) -> Iterator[Node]:
    for user in node.users:
        if _is_view(user) and user.all_input_nodes[0] is node:
            yield user
            yield from _views_of(user)


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    if not isinstance(node.target, OpOverload):
        return False
    aliases = [one.alias_info for one in node.target._schema.returns]
    return any(one is not None and not one.is_write for one in aliases)


def _writes(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or not node.all_input_nodes:
        return False
    taken = node.target._schema.arguments
    return bool(taken and taken[0].alias_info is not None and taken[0].alias_info.is_write)
