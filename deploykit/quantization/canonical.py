"""Rewrites a traced graph into the spellings that ONNX Runtime has fast kernels for.

The values stay the same. Shapes but the batch are known in a traced graph, so a pooling over
the whole image becomes a pooling with that window (which has an integer kernel; a mean over
two axes has none), and a flattening becomes a reshape to fixed numbers (which needs no
arithmetic on shapes at run time). A product with a matrix of the model's own becomes the linear
layer that it is.

One rewrite guards values: a BatchNorm that cannot be folded into the layer before it gets a
name under which none of the libraries tries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from deploykit.errors import CompressionError
from deploykit.quantization.layers import is_constant, module_of
from deploykit.quantization.operators import ADDITIONS, LONE_NORM, NORM
from deploykit.quantization.partial_writes import partial_writes
from deploykit.quantization.rules import folds, is_float, pooling

aten = torch.ops.aten
Rewrite = Callable[[GraphModule, Node], Node | None]


def canonicalize(graph: GraphModule) -> GraphModule:
    """Rewrite ``graph`` in place and return it."""
    left_alone = set(partial_writes(graph.graph))
    for node in list(graph.graph.nodes):
        rewrite = None if node in left_alone else REWRITES.get(node.target)
        replacement = rewrite(graph, node) if rewrite else None
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def decompose(graph: GraphModule) -> GraphModule:
    """Write what has no integer kernel by operators that have one, in place.

    Activations become products of factors, and a linear layer over more than two axes one over
    two: ONNX Runtime takes in the bias of a matrix product only there.

    Raises:
        CompressionError: the model writes into a part of a tensor.
    """
    if writes := partial_writes(graph.graph):
        module = module_of(writes[0])
        raise CompressionError(
            f"quantize: expected values that are made once, got {writes[0].target} on a part of a "
            f"tensor in {module or 'the model itself'}; write torch.cat or torch.where there",
            layer=module,
        )
    for node in list(graph.graph.nodes):
        replacement = None
        if node.target in FACTORS:
            (source,) = node.all_input_nodes
            gate = _insert(graph, node, FACTORS[node.target], (source,))
            replacement = _insert(graph, node, aten.mul.Tensor, (source, gate))
        elif node.target is aten.linear.default:
            replacement = _rows(graph, node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _rows(graph: GraphModule, node: Node) -> Node | None:
    source, *constants = arguments(node)
    *sizes, width = node.meta["val"].shape
    open_sizes = [size for size in sizes if not isinstance(size, int)]
    if len(sizes) < 2 or len(open_sizes) != 1:
        return None
    rows = _insert(graph, node, aten.reshape.default, (source, [-1, source.meta["val"].shape[-1]]))
    linear = _insert(graph, node, aten.linear.default, (rows, *constants))
    shape = [size if isinstance(size, int) else -1 for size in sizes]
    return _insert(graph, node, aten.reshape.default, (linear, [*shape, width]))


def arguments(node: Node) -> tuple[Any, ...]:
    """Return the arguments of ``node`` without the breadth of their declared type."""
    return node.args


def _same_padding(graph: GraphModule, node: Node) -> Node | None:
    """Write padding by a word as numbers: what is odd apart, more of it behind than before."""
    given: list[Any] = list(node.args)
    given += [None, None, None, [1], "valid", [1], 1][len(given) :]
    source, weight, bias, stride, padding, dilation, groups = given
    window = weight.meta["val"].shape[2:]
    spread = list(dilation) * len(window) if len(dilation) == 1 else list(dilation)
    total = [gap * (size - 1) for gap, size in zip(spread, window, strict=True)]
    if padding == "valid":
        total = [0] * len(window)
    halves = [size // 2 for size in total]
    target = PADDED_BY_WORD[node.target]
    if any(size % 2 for size in total):
        around = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
        source = _insert(graph, node, aten.constant_pad_nd.default, (source, around))
        halves = [0] * len(window)
    return _insert(graph, node, target, (source, weight, bias, stride, halves, spread, groups))


def _flatten(graph: GraphModule, node: Node) -> Node | None:
    return _reshape(graph, node, node.args[0], node.meta["val"].shape)


def _global_pool(graph: GraphModule, node: Node) -> Node | None:
    source: Node
    source, size = arguments(node)[:2]
    height, width = source.meta["val"].shape[-2:]
    rows, columns = size
    if not _static((height, width)) or height % rows or width % columns:
        return None
    window = [height // rows, width // columns]
    if window == [1, 1]:
        return source
    return _insert(graph, node, aten.avg_pool2d.default, (source, window, window))


def _mean(graph: GraphModule, node: Node) -> Node | None:
    """A mean over height and width, or over a row, is a pooling; over other axes it stays."""
    source, axes = arguments(node)[:2]
    shape = source.meta["val"].shape
    if len(shape) == 3 and axes is not None and [axis % 3 for axis in axes] == [2]:
        return _row_mean(graph, node) if node.kwargs.get("dtype") is None else None
    if len(shape) != 4 or axes is None or {axis % 4 for axis in axes} != {2, 3}:
        return None
    if not _static(shape[2:]) or node.kwargs.get("dtype") is not None:
        return None
    pooled = _insert(graph, node, aten.avg_pool2d.default, (source, list(shape[2:])))
    keep = len(node.args) > 2 and node.args[2]
    return pooled if keep else _reshape(graph, node, pooled, node.meta["val"].shape)


def _row_pool(graph: GraphModule, node: Node) -> Node | None:
    return _row_mean(graph, node) if list(arguments(node)[1]) == [1] else None


def _row_mean(graph: GraphModule, node: Node) -> Node | None:
    """Write the mean of each row of a sequence as the mean over an image of height one."""
    source = arguments(node)[0]
    length = source.meta["val"].shape[2]
    if not _static([length]):
        return None
    image = _insert(graph, node, aten.unsqueeze.default, (source, 2))
    pooled = _insert(graph, node, aten.avg_pool2d.default, (image, [1, length]))
    return _reshape(graph, node, pooled, node.meta["val"].shape)


def _window_pool(graph: GraphModule, node: Node) -> Node | None:
    """Say of means over windows that all are over as many values, where they are."""
    source, window, stride, padding, ceiling, counted, divisor = pooling(node)
    sizes = source.meta["val"].shape[-2:]
    if divisor is not None or not _static(sizes):
        return None
    if ceiling and any(
        (size + 2 * pad - wide) % step
        for size, wide, step, pad in zip(sizes, window, stride, padding, strict=True)
    ):
        return None
    counted = counted or not any(padding)
    args = (source, list(window), list(stride), list(padding), False, counted)
    return None if args == node.args else _insert(graph, node, node.target, args)


def _clip(graph: GraphModule, node: Node) -> Node | None:
    """Write a clip from zero as the operator that fuses into the layer before it."""
    low, high = CLIPS.get(node.target) or _bounds(node)
    source = arguments(node)[0]
    if low != 0 or not source.meta["val"].dtype.is_floating_point:
        return None
    if high is None:
        return _insert(graph, node, aten.relu.default, (source,))
    if not isinstance(high, int | float) or high <= 0:
        return None
    return _insert(graph, node, aten.hardtanh.default, (source, 0.0, float(high)))


def _bounds(node: Node) -> tuple[Any, Any]:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    return low, high


def _product(graph: GraphModule, node: Node) -> Node | None:
    """Write a product with a matrix of the model's own, perhaps with a sum, as a linear layer."""
    *bias, source, weight = arguments(node)
    if node.kwargs or is_constant(source) or not _is_constant_of(weight, axes=2):
        return None
    if not all(_is_constant_of(one, axes=1) for one in bias):
        return None
    turned = _insert(graph, node, aten.t.default, (weight,))
    return _insert(graph, node, aten.linear.default, (source, turned, *bias))


def _sum(graph: GraphModule, node: Node) -> Node | None:
    """Take a vector that is added to a linear layer without a bias for its bias."""
    one, other = arguments(node)[:2]
    for layer, bias in ((one, other), (other, one)):
        if not _lacks_bias(layer) or node.kwargs or not _is_constant_of(bias, axes=1):
            continue
        if bias.meta["val"].shape[0] == layer.meta["val"].shape[-1]:
            whole = _insert(graph, node, aten.linear.default, (*layer.args, bias))
            whole.meta["nn_module_stack"] = layer.meta.get("nn_module_stack")
            return whole
    return None


def _lacks_bias(node: Any) -> bool:
    """Whether ``node`` is a linear layer without a bias, read once."""
    is_linear = isinstance(node, Node) and node.target is aten.linear.default
    return is_linear and len(node.args) == 2 and len(node.users) == 1 and is_float(node)


def _is_constant_of(node: Any, *, axes: int) -> bool:
    known = isinstance(node, Node) and is_constant(node) and is_float(node)
    return known and node.meta["val"].ndim == axes


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
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    # The dispatcher of torch.export; another one would take the batch for a constant in a padding.
    with values[0].fake_mode, enable_python_dispatcher():
        node.meta = {**before.meta, "val": target(*values)}
    return node


PADDED_BY_WORD: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
}
CLIPS: dict[Any, tuple[float, float]] = {
    aten.relu6.default: (0.0, 6.0),
    aten.relu6_.default: (0.0, 6.0),
}
CLAMPS = (
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
)
REWRITES: dict[Any, Rewrite] = {
    **dict.fromkeys(PADDED_BY_WORD, _same_padding),
    aten.flatten.using_ints: _flatten,
    aten.adaptive_avg_pool1d.default: _row_pool,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.avg_pool2d.default: _window_pool,
    aten.mean.dim: _mean,
    **dict.fromkeys((*CLIPS, *CLAMPS), _clip),
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.addmm.default: _product,
    **dict.fromkeys(ADDITIONS, _sum),
    NORM: _norm,
}
# x * gate(x)
FACTORS: dict[Any, Any] = {
    aten.silu.default: aten.sigmoid.default,
    aten.silu_.default: aten.sigmoid.default,
    aten.hardswish.default: aten.hardsigmoid.default,
    aten.hardswish_.default: aten.hardsigmoid.default,
}
