"""Where quantize/dequantize pairs must stand so that ONNX Runtime fuses integer kernels.

A pair belongs on every tensor that an integer kernel reads or writes, and nowhere inside a
fused group: ``conv -> batch norm -> relu`` is one kernel, so only what leaves it is quantized.
Operators that merely move values (slice, pad, reshape, max-pool) pass the integers through and
share the parameters of what they read. Everything else computes in float between pairs.

Layers with weights are worth a conversion before and after them. The other integer kernels are
not: they run in integers where what they read comes from an integer kernel and what they make
goes to one, and in float elsewhere, such as the residual stream of a transformer, which no
integer kernel reads.

The rules are those of ONNX Runtime's QDQ selectors:
https://github.com/microsoft/onnxruntime/tree/main/onnxruntime/core/optimizer/qdq_transformer
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from deploykit.quantization.layers import is_weighted, module_of
from deploykit.quantization.operators import (
    ADDITIONS,
    CLIPPING,
    DROPOUTS,
    HARD_SIGMOIDS,
    LIGHT,
    LONE_NORM,
    MOVING,
    NORM,
    PAD_VALUES,
    PRODUCTS,
    RECTIFIERS,
    SPLITS,
    TRANSPOSED,
    WEIGHTED,
)

aten = torch.ops.aten
Parameters = tuple[float, int]  # scale and zero point
# Largest integer of a bias: leaves the sums of products room in their 32 bits.
BIAS_LIMIT = 2.0**28


@dataclass(frozen=True)
class QuantizedTensor:
    """A value that is quantized.

    Attributes:
        node: the graph node whose output it is.
        root: the node whose parameters it has; ``node`` itself unless the value was only moved,
            or goes into a concatenation and nowhere else.
        key: name of the parameters, from the module that produced the root's value; the same in
            every graph traced from the same model, whatever was fused meanwhile.
        aligned: whether a hard sigmoid computes on its integers, see `align`.
    """

    node: Node
    root: Node
    key: str
    aligned: bool = False


def quantized_tensors(
    graph: Graph, keep_float: frozenset[str] = frozenset()
) -> list[QuantizedTensor]:
    """Return every value of ``graph`` that needs a quantize/dequantize pair, in graph order.

    Args:
        graph: traced and canonical.
        keep_float: names of modules whose layers stay in float.
    """
    tails = integer_kernels(graph, keep_float)
    made = frozenset(tails.values())
    heads = {group_tail(node): node for node in graph.nodes if _is_kernel(node)}
    names = _node_names(graph)
    roots: dict[Node, Node] = {}
    pending = [*made, *(source for head in tails for source in activations(head))]
    while pending:
        node = pending.pop()
        if node in roots or not (is_float(node) or node.target in SPLITS):
            continue
        roots[node] = source = _passed_on(node, made) or _joined_in(node, tails) or node
        pending.append(source)
        if node.target in SPLITS:
            pending.extend(node.users)  # ONNX Runtime splits integers only if all parts are
    read = {_follow(roots, node) for node in roots if node.target in HARD_SIGMOIDS}
    aligned = {root for root in read if root.target not in CLIPPING}  # whose zero point is fixed
    return [
        QuantizedTensor(
            node, root := _follow(roots, node), names[heads.get(root, root)], root in aligned
        )
        for node in graph.nodes
        if node in roots and not (node.target in DROPOUTS | SPLITS or _is_derived(node, roots))
    ]


def integer_kernels(graph: Graph, keep_float: frozenset[str] = frozenset()) -> Mapping[Node, Node]:
    """Return the first and the last node of everything that becomes one integer kernel."""
    tails = {
        node: group_tail(node)
        for node in graph.nodes
        if _is_kernel(node) and node.target not in TRANSPOSED and module_of(node) not in keep_float
    }
    while idle := [head for head in tails if head.target in LIGHT and not _pays(head, tails)]:
        for head in idle:
            del tails[head]
    return tails


def _pays(head: Node, tails: Mapping[Node, Node]) -> bool:
    """Whether a kernel reads what an integer kernel made, and makes what one reads."""
    made = frozenset(tails.values())
    fed = any(_origin(source, made) in made for source in activations(head))
    return fed and any(reader in tails for reader in _readers(tails[head], made))


def _origin(node: Node, made: frozenset[Node]) -> Node:
    while (source := _passed_on(node, made)) is not None:
        node = source
    return node


def _readers(node: Node, made: frozenset[Node]) -> Iterator[Node]:
    for user in node.users:
        if user not in made and (moves(user) or user.target in HARD_SIGMOIDS | RECTIFIERS):
            yield from _readers(user, made)
        else:
            yield user


def _passed_on(node: Node, made: frozenset[Node]) -> Node | None:
    """Return the node whose integers ``node`` hands on, or None where it makes its own.

    A Relu that no kernel took in cuts integers as well, and a hard sigmoid has as many values
    as integers come in; behind a float operator both are part of what is quantized.
    """
    if node in made or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if moves(node):
        return source
    cuts = node.target in HARD_SIGMOIDS | RECTIFIERS and _origin(source, made) in made
    return source if cuts else None


def _joined_in(node: Node, tails: Mapping[Node, Node]) -> Node | None:
    """Return the concatenation that alone reads ``node``, so that both may share parameters.

    Quantized once rather than twice, and joined by copying. What ends in a clip needs a range
    that is cut at the same places.
    """
    cat = _sole_user(node, {aten.cat.default})
    if cat is None or cat not in tails or node.op != "call_function":
        return None
    clip = _clipped_to(node)
    same = clip is None or all(_clipped_to(source) == clip for source in activations(cat))
    return cat if same else None


def _clipped_to(node: Node) -> tuple[object, ...] | None:
    kind = str(node.target).replace("_.", ".")  # in place or not
    return (kind, *node.args[1:]) if node.target in CLIPPING else None


def _is_derived(node: Node, roots: Mapping[Node, Node]) -> bool:
    return node.target in HARD_SIGMOIDS and roots[node] is not node


def align(scale: float, zero_point: int, low: int, high: int) -> Parameters:
    """Return parameters under which a hard sigmoid is a cut of integers between two of them.

    The hard sigmoid of ``scale * (q - zero_point)`` is ``scale / 6 * (q - zero_point + 3 / scale)``
    cut to 0 and 1: integers again, if ``3 / scale`` is one. Equal for what is aligned already.

    Args:
        scale: of a tensor that a hard sigmoid reads; made larger, mostly by less than a hundredth.
        zero_point: of the same; moved where the range does not reach down to -3.
        low: smallest integer.
        high: largest integer.
    """
    below, above = max(3.0, scale * (zero_point - low)), scale * (high - zero_point)
    steps = math.floor(3 * (high - low) / (below + above) + 1e-3)
    if steps < 1:
        return scale, zero_point
    return 3 / steps, low + round(below * steps / 3)


def least_scale(bias: Tensor, input_scale: float) -> Tensor:
    """Return the least scale of a weight, one a channel, that leaves room for its bias.

    ONNX Runtime counts a bias in steps of the input's scale times the weight's, in 32 bits: where
    weights next to nothing stand beside a bias, that would be too many.
    """
    return bias.detach().abs() / (input_scale * BIAS_LIMIT)


def activations(kernel: Node) -> list[Node]:
    """Return the values that ``kernel`` reads, its weight and bias excepted."""
    if kernel.target in WEIGHTED or kernel.target is LONE_NORM:
        return [kernel.all_input_nodes[0]]
    return [node for node in kernel.all_input_nodes if is_float(node)]


def group_tail(head: Node) -> Node:
    """Return the last node that ONNX Runtime fuses into the kernel of ``head``."""
    tail = head
    if head.target in WEIGHTED:
        tail = _sole_user(tail, {NORM}) or tail
    if head.target in WEIGHTED or head.target in ADDITIONS or head.target is LONE_NORM:
        tail = _sole_clip(tail) or tail
    return tail


def folds(norm: Node) -> bool:
    """Whether a BatchNorm can become part of the weight of the layer that it reads.

    It must have scale, shift and statistics; the layer this one reader, a weight of its own
    and one output a channel.
    """
    layer = norm.args[0]
    complete = all(isinstance(tensor, Node) for tensor in norm.args[1:5])
    if not complete or not isinstance(layer, Node) or not is_weighted(layer):
        return False
    # What is computed from others, as by spectral_norm, is nowhere to be folded into.
    constants = layer.all_input_nodes[1:]
    held = all(one.op == "get_attr" for one in (*constants, *norm.all_input_nodes[1:]))
    alone = held and len(layer.users) == 1 and all(len(one.users) == 1 for one in constants)
    if layer.target is aten.linear.default:
        return alone and layer.meta["val"].ndim == 2
    groups = layer.args[6] if layer.target in TRANSPOSED and len(layer.args) > 6 else 1
    return alone and bool(groups == 1)


def _sole_user(node: Node, targets: set[object]) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _sole_clip(node: Node) -> Node | None:
    clip = _sole_user(node, set(CLIPPING))
    if clip is None or "hardtanh" not in str(clip.target):
        return clip
    low = clip.args[1] if len(clip.args) > 1 else -1.0
    return clip if low == 0 else None


def _is_kernel(node: Node) -> bool:
    """Whether ONNX Runtime has a kernel for ``node`` that is worth its conversions."""
    if node.op != "call_function" or not is_float(node):
        return False
    if node.target in WEIGHTED:
        return is_weighted(node)
    if node.target in ADDITIONS | PRODUCTS:
        # Arithmetic with a literal has no second tensor for an integer kernel to read.
        return len(activations(node)) == len(node.args)
    if node.target is LONE_NORM:
        return is_scaling(node)
    if node.target is aten.avg_pool2d.default:
        return is_global(node) or is_even_mean(node)
    return node.target in LIGHT


def is_scaling(norm: Node) -> bool:
    """Whether a BatchNorm that folds into no layer is a convolution with one weight a channel."""
    return norm.meta["val"].ndim == 4 and all(isinstance(one, Node) for one in norm.args[3:5])


def is_global(pool: Node) -> bool:
    """Whether a mean is taken over the whole image."""
    source, window, _stride, padding, *_ = pooling(pool)
    return tuple(shape_of(source)[-2:]) == window and not any(padding)


def shape_of(node: Node) -> torch.Size:
    """Return the shape of a value; conversions, which know none, keep that of what they read."""
    while "val" not in node.meta:
        node = node.all_input_nodes[0]
    shape: torch.Size = node.meta["val"].shape
    return shape


def is_even_mean(pool: Node) -> bool:
    """Whether every mean of a pooling is over as many values, so that weights can say it.

    A pooling that is not over the whole image has a slow integer kernel: as a convolution it
    takes a quarter of the time.
    """
    *_, padding, ceiling, counted, divisor = pooling(pool)
    return not ceiling and divisor is None and (counted or not any(padding))


def pooling(pool: Node) -> tuple[Any, ...]:
    """Return source, window, stride, padding, ceil_mode, count_include_pad, divisor_override."""
    given: list[Any] = list(pool.args)
    given += [None, None, [], 0, False, True, None][len(given) :]
    source, window, stride, padding, ceiling, counted, divisor = given
    window = _pair(window)
    return source, window, _pair(stride) or window, _pair(padding), ceiling, counted, divisor


def _pair(sizes: Any) -> tuple[int, ...]:
    listed = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,)
    return listed * 2 if len(listed) == 1 else listed


def moves(node: Node) -> bool:
    """Whether ``node`` only moves values, zero (which every range holds) among them."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0].target in SPLITS
    place = PAD_VALUES.get(node.target)
    padding = None if place is None else next(iter(node.args[place : place + 1]), None)
    return not padding and (node.target in MOVING or node.target in DROPOUTS)


def is_float(node: Node) -> bool:
    """Whether the value of ``node`` is of the floats that integers can stand for."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _follow(roots: dict[Node, Node], node: Node) -> Node:
    while roots[node] is not node:
        node = roots[node]
    return node


def _node_names(graph: Graph) -> dict[Node, str]:
    """Name each node ``module:operator#n``, the n-th of its kind in that module.

    A tensor of the model's own is ``module:tensor``.
    """
    counts: dict[str, int] = defaultdict(int)
    names = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"input:{counts['input']}"
            counts["input"] += 1
        elif node.op == "get_attr":
            names[node] = ":".join(str(node.target).rpartition(".")[::2])
        elif node.op == "call_function":
            kind = node.target.__name__.partition(".")[0].rstrip("_")
            stem = f"{module_of(node)}:{kind}"
            names[node] = f"{stem}#{counts[stem]}"
            counts[stem] += 1
    return names
