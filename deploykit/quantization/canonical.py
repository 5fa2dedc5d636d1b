"""Rewrites a traced graph into the spellings that ONNX Runtime has fast kernels for.

The values stay the same. Shapes but the batch are known in a traced graph, so a pooling over
the whole image becomes a pooling with that window (which has an integer kernel; a mean over
two axes has none), and a flattening becomes a reshape to fixed numbers (which needs no
arithmetic on shapes at run time).

Two rewrites guard values: a BatchNorm that cannot be folded into the layer before it gets a
name under which none of the libraries tries, and padding between pairs pads the integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from deploykit.quantization.rules import LONE_NORM, NORM, PAD_VALUES, folds, moves

aten = torch.ops.aten
PLAIN = frozenset({"constant", 0})  # padding with one value, not with what stands at the border
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


def pad_integers(graph: GraphModule) -> GraphModule:
    """Pad integers with their zero point where a converted graph pads floats, in place.

    ONNX Runtime itself moves slices and reshapes between pairs into the integers, but no padding.
    """
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default:
            source, padding = _integers_behind(node)
            if source is not None:
                with graph.graph.inserting_before(node):
                    padded = graph.graph.call_function(
                        aten.constant_pad_nd.default, (source, padding, node.args[2])
                    )
                padded.meta = dict(node.meta)
                node.replace_all_uses_with(padded)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _integers_behind(quantize: Node) -> tuple[Node | None, Any]:
    """Return the integers behind a padding with zeros that ``quantize`` reads, and its sizes."""
    pad, *parameters = arguments(quantize)
    if pad.target not in PAD_VALUES or not moves(pad) or not PLAIN.issuperset(pad.args[2:3]):
        return None, None
    dequantize, sizes = arguments(pad)[:2]
    pair = dequantize.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default
    same = pair and dequantize.args[1:6] == tuple(parameters[:5])
    return (dequantize.args[0], sizes) if same else (None, None)


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


def _norm(_graph: GraphModule, node: Node) -> None:
    if not folds(node):
        node.target = LONE_NORM


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
    NORM: _norm,
}
