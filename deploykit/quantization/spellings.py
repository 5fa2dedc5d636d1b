"""Rewrites a converted graph where ONNX Runtime has an integer kernel under another spelling.

The values stay the same, to the last integer: each rewrite stands between a dequantization and
a quantization, where ONNX Runtime would otherwise convert, compute in float and convert back.
What ONNX Runtime moves into the integers itself (slices, reshapes, max-pooling) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deploykit.quantization.layers import tensor_of
from deploykit.quantization.operators import (
    CLIPPING,
    HARD_SIGMOIDS,
    LONE_NORM,
    PAD_VALUES,
    RECTIFIERS,
)
from deploykit.quantization.rules import (
    is_even_mean,
    is_global,
    is_scaling,
    least_scale,
    moves,
    pooling,
    shape_of,
)

aten = torch.ops.aten
integers = torch.ops.quantized_decomposed
QUANTIZE = integers.quantize_per_tensor.default
DEQUANTIZE = integers.dequantize_per_tensor.default
LIMIT = 63  # no 16-bit sum of u8 * s8 overflows, and equal weights lose nothing by it
PLAIN = frozenset({"constant", 0})  # padding with one value, not with what stands at the border
Spelling = Callable[[GraphModule, Node], Node | None]


def spell_integers(graph: GraphModule) -> GraphModule:
    """Rewrite a converted ``graph`` in place and return it."""
    for node in list(graph.graph.nodes):
        spelling = SPELLINGS.get(node.target)
        if spelling is None or not node.args or not _dequantized(node.args[0]):
            continue
        with graph.graph.inserting_before(node):
            replacement = spelling(graph, node)
        if replacement is not None:
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _dequantized(node: Any) -> bool:
    return isinstance(node, Node) and node.target is DEQUANTIZE


def arguments(node: Node) -> tuple[Any, ...]:
    """Return the arguments of ``node`` without the breadth of their declared type."""
    return node.args


def _pad(graph: GraphModule, node: Node) -> Node | None:
    """Pad integers with their zero point."""
    if not moves(node) or not PLAIN.issuperset(node.args[2:3]) or not _stays(node):
        return None
    dequantize, sizes = arguments(node)[:2]
    source, scale, zero_point, *form = dequantize.args
    padded = graph.graph.call_function(aten.constant_pad_nd.default, (source, sizes, zero_point))
    return graph.graph.call_function(DEQUANTIZE, (padded, scale, zero_point, *form))


def _relu(graph: GraphModule, node: Node) -> Node | None:
    """Cut integers at their zero point."""
    if not _stays(node):
        return None
    source, scale, zero_point, low, high, dtype = arguments(arguments(node)[0])
    cut = graph.graph.call_function(aten.clamp.default, (source, zero_point, high))
    return graph.graph.call_function(DEQUANTIZE, (cut, scale, zero_point, low, high, dtype))


def _hard_sigmoid(graph: GraphModule, node: Node) -> Node | None:
    """Cut integers where the line leaves 0 and 1, and read them by the line, see `rules.align`."""
    source, scale, zero_point, low, high, dtype = arguments(arguments(node)[0])
    steps = round(3 / scale)
    if abs(3 / scale - steps) > 1e-2 or not low <= zero_point - steps:
        return None
    limits = zero_point - steps, min(high, zero_point + steps)
    cut = graph.graph.call_function(aten.clamp.default, (source, *limits))
    return graph.graph.call_function(
        DEQUANTIZE, (cut, scale / 6, zero_point - steps, low, high, dtype)
    )


def _mean(graph: GraphModule, node: Node) -> Node | None:
    """Take means of windows by a convolution with equal weights.

    Means over unequal numbers of values stay in float behind a clip that cuts nothing: ONNX
    Runtime would take their integer kernel, which is slower and wrong where the last window
    reaches out of the image.
    """
    if is_global(node) or not _requantized(node):
        return None
    if not is_even_mean(node):
        limit = torch.finfo(torch.float32).max
        floats = graph.graph.call_function(aten.clamp.default, (node.args[0], -limit, limit))
        return graph.graph.call_function(aten.avg_pool2d.default, (floats, *node.args[1:]))
    source, window, stride, padding, *_ = pooling(node)
    channels = shape_of(source)[1]
    weight = torch.full((channels, 1, *window), 1 / (window[0] * window[1]))
    return _convolve(graph, node, weight, None, [list(stride), list(padding), [1, 1], channels])


def _scale(graph: GraphModule, node: Node) -> Node | None:
    """Apply a BatchNorm that no layer took in by a convolution with one weight a channel."""
    if not is_scaling(node) or not _requantized(node):
        return None
    gain, shift, mean, variance = (
        None if one is None else tensor_of(graph, one) for one in arguments(node)[1:5]
    )
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + arguments(node)[7]) * (1 if gain is None else gain)
    bias = (0 if shift is None else shift) - mean * factor
    form = [[1, 1], [0, 0], [1, 1], len(factor)]
    return _convolve(graph, node, factor.reshape(-1, 1, 1, 1), bias, form)


def _convolve(
    graph: GraphModule, node: Node, weight: Tensor, bias: Tensor | None, form: list[Any]
) -> Node:
    """Insert a convolution whose weights are equal within a channel, as integers of its scale."""
    scale = weight.flatten(1).abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LIMIT
    if bias is not None:
        scale = torch.maximum(scale, least_scale(bias, arguments(arguments(node)[0])[1]))
    whole = torch.round(weight / scale.reshape(-1, 1, 1, 1)).to(torch.int8)
    constants = [
        _store(graph, f"{node.name}_{name}", value)
        for name, value in (
            ("weight", whole),
            ("scale", scale),
            ("zero_point", torch.zeros_like(scale, dtype=torch.int64)),
        )
    ]
    dequantized = graph.graph.call_function(
        integers.dequantize_per_channel.default, (*constants, 0, -LIMIT, LIMIT, torch.int8)
    )
    shift = None if bias is None else _store(graph, f"{node.name}_bias", bias)
    return graph.graph.call_function(aten.conv2d.default, (node.args[0], dequantized, shift, *form))


def _store(graph: GraphModule, name: str, value: Tensor) -> Node:
    graph.register_buffer(name, value.detach())
    return graph.graph.get_attr(name)


def _stays(node: Node) -> bool:
    """Whether what reads ``node`` quantizes it to the integers that it was read from."""
    parameters = arguments(arguments(node)[0])[1:6]
    return all(user.target is QUANTIZE and user.args[1:6] == parameters for user in node.users)


def _requantized(node: Node) -> bool:
    """Whether one quantization follows ``node``, perhaps behind a clip."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in CLIPPING:
        users = list(users[0].users)
    return len(users) == 1 and users[0].target is QUANTIZE


SPELLINGS: dict[Any, Spelling] = {
    **dict.fromkeys(PAD_VALUES, _pad),
    **dict.fromkeys(RECTIFIERS, _relu),
    **dict.fromkeys(HARD_SIGMOIDS, _hard_sigmoid),
    aten.avg_pool2d.default: _mean,
    LONE_NORM: _scale,
}
