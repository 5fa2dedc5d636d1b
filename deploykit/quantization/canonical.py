"""Rewrites a traced graph into the spellings that ONNX Runtime has fast kernels for.

The values stay the same. Shapes but the batch are known in a traced graph, so a pooling over
the whole image becomes a pooling with that window (which has an integer kernel; a mean over
two axes has none), and a flattening becomes a reshape to fixed numbers (which needs no
arithmetic on shapes at run time).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
Rewrite = Callable[[GraphModule, Node], Node | None]


def canonicalize(graph: GraphModule) -> GraphModule:
    """Rewrite ``graph`` in place and return it."""
    for node in list(graph.graph.nodes):
        rewrite = REWRITES.get(node.target)
        replacement = rewrite(graph, node) if rewrite else None
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def arguments(node: Node) -> tuple[Any, ...]:
    """Return the arguments of ``node`` without the breadth of their declared type."""
    return node.args


def _flatten(graph: GraphModule, node: Node) -> Node | None:
    return _reshape(graph, node, node.args[0], node.meta["val"].shape)


def _global_pool(graph: GraphModule, node: Node) -> Node | None:
    source, size = arguments(node)[:2]
    height, width = source.meta["val"].shape[-2:]
    rows, columns = size
    if not _static((height, width)) or height % rows or width % columns:
        return None
    window = [height // rows, width // columns]
    return _insert(graph, node, aten.avg_pool2d.default, (source, window, window))


def _mean(graph: GraphModule, node: Node) -> Node | None:
    """A mean over height and width is a pooling; over other axes it stays as it is."""
    source, axes = arguments(node)[:2]
    shape = source.meta["val"].shape
    if len(shape) != 4 or axes is None or {axis % 4 for axis in axes} != {2, 3}:
        return None
    if not _static(shape[2:]) or node.kwargs.get("dtype") is not None:
        return None
    pooled = _insert(graph, node, aten.avg_pool2d.default, (source, list(shape[2:])))
    keep = len(node.args) > 2 and node.args[2]
    return pooled if keep else _reshape(graph, node, pooled, node.meta["val"].shape)


def _reshape(graph: GraphModule, node: Node, source: Any, shape: torch.Size) -> Node | None:
    if not _static(shape[1:]) or not isinstance(shape[0], torch.SymInt):
        return None
    return _insert(graph, node, aten.reshape.default, (source, [-1, *shape[1:]]))


def _static(sizes: Any) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _insert(graph: GraphModule, before: Node, target: Any, args: tuple[Any, ...]) -> Node:
    """Add a node that stands for ``before``: of the same module, with the shape it gives."""
    with graph.graph.inserting_before(before):
        node = graph.graph.call_function(target, args)
    value = args[0].meta["val"]
    with value.fake_mode:
        node.meta = {**before.meta, "val": target(value, *args[1:])}
    return node


REWRITES: dict[Any, Rewrite] = {
    aten.flatten.using_ints: _flatten,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.mean.dim: _mean,
}
