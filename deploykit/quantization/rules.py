"""Where quantize/dequantize pairs must stand so that ONNX Runtime fuses integer kernels.

A pair belongs on every tensor that an integer kernel reads or writes, and nowhere inside a
fused group: ``conv -> batch norm -> relu`` is one kernel, so only what leaves it is quantized.
Operators that merely move values (slice, pad, reshape, max-pool) pass the integers through and
share the parameters of what they read. Everything else computes in float between pairs.

The rules are those of ONNX Runtime's QDQ selectors:
https://github.com/microsoft/onnxruntime/tree/main/onnxruntime/core/optimizer/qdq_transformer
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

WEIGHTED = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.linear.default,
    }
)
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
COMPUTING = frozenset(
    {
        aten.add.Tensor,
        aten.add_.Tensor,
        aten.mul.Tensor,
        aten.mul_.Tensor,
        aten.sigmoid.default,
        aten.leaky_relu.default,
        aten.leaky_relu_.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.mean.dim,
        aten.cat.default,
    }
)
NORM = aten.batch_norm.default
# The same arithmetic by a name that no library folds into the layer before it.
LONE_NORM = torch.batch_norm
CLIPPING = frozenset(
    {
        aten.relu.default,
        aten.relu_.default,
        aten.hardtanh.default,
        aten.hardtanh_.default,
        aten.relu6.default,
    }
)
# A clip fuses only where the range it leaves starts at zero: ONNX Runtime drops a Relu whose
# quantized output has its smallest value as zero point, and keeps the kernel in float otherwise.
MOVING = frozenset(
    {
        aten.slice.Tensor,
        aten.pad.default,
        aten.constant_pad_nd.default,
        aten.max_pool2d.default,
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.select.int,
        aten.contiguous.default,
        aten.clone.default,
    }
)
# Nothing in the model that ships; in training it scales what it lets through, out of the range.
DROPOUTS = frozenset({aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default})
# Where the value to pad with stands among the arguments.
PAD_VALUES: dict[object, int] = {aten.pad.default: 3, aten.constant_pad_nd.default: 2}


@dataclass(frozen=True)
class QuantizedTensor:
    """A value that is quantized.

    Attributes:
        node: the graph node whose output it is.
        root: the node whose parameters it has; ``node`` itself unless the value was only moved.
        key: name of the parameters, from the module that produced the root's value; the same in
            every graph traced from the same model, whatever was fused meanwhile.
    """

    node: Node
    root: Node
    key: str


def quantized_tensors(graph: Graph) -> list[QuantizedTensor]:
    """Return every value of ``graph`` that needs a quantize/dequantize pair, in graph order."""
    heads = {group_tail(node): node for node in graph.nodes if _is_kernel(node)}
    names = _node_names(graph)
    roots: dict[Node, Node] = {}
    pending = [*heads, *(source for head in heads.values() for source in activations(head))]
    while pending:
        node = pending.pop()
        if node in roots or not _is_float(node):
            continue
        if moves(node):
            source = node.all_input_nodes[0]
            roots[node] = source
            pending.append(source)
        else:
            roots[node] = node
    return [
        QuantizedTensor(node, root := _follow(roots, node), names[heads.get(root, root)])
        for node in graph.nodes
        if node in roots and node.target not in DROPOUTS
    ]


def kernels(graph: Graph) -> Iterator[Node]:
    """Yield the weighted nodes of ``graph``: what must become an integer kernel."""
    return (node for node in graph.nodes if _is_weighted(node))


def activations(kernel: Node) -> list[Node]:
    """Return the values that ``kernel`` reads, its weight and bias excepted."""
    if kernel.target in WEIGHTED:
        return [kernel.all_input_nodes[0]]
    return [node for node in kernel.all_input_nodes if _is_float(node)]


def group_tail(head: Node) -> Node:
    """Return the last node that ONNX Runtime fuses into the kernel of ``head``."""
    tail = head
    if head.target in WEIGHTED:
        tail = _sole_user(tail, {NORM}) or tail
    if head.target in WEIGHTED or head.target in {aten.add.Tensor, aten.add_.Tensor}:
        tail = _sole_clip(tail) or tail
    return tail


def folds(norm: Node) -> bool:
    """Whether a BatchNorm can become part of the weight of the layer that it reads.

    It must have scale, shift and statistics; the layer this one reader, a weight of its own
    and one output a channel.
    """
    layer = norm.args[0]
    complete = all(isinstance(tensor, Node) for tensor in norm.args[1:5])
    if not complete or not isinstance(layer, Node) or not _is_weighted(layer):
        return False
    alone = len(layer.users) == 1 and all(
        len(constant.users) == 1 for constant in layer.all_input_nodes[1:]
    )
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
    if node.op != "call_function" or not _is_float(node):
        return False
    if node.target in WEIGHTED:
        return _is_weighted(node)
    # Arithmetic with a literal has no second tensor for an integer kernel to read.
    return node.target in COMPUTING and (
        node.target not in {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor}
        or len(activations(node)) == len(node.args)
    )


def _is_weighted(node: Node) -> bool:
    """Whether ``node`` is a layer whose weight is known before any input is."""
    return bool(node.target in WEIGHTED) and _is_constant(node.all_input_nodes[1])


def _is_constant(node: Node) -> bool:
    sources = node.all_input_nodes
    return node.op == "get_attr" or (bool(sources) and all(map(_is_constant, sources)))


def moves(node: Node) -> bool:
    """Whether ``node`` only moves values, zero (which every range holds) among them."""
    place = PAD_VALUES.get(node.target)
    padding = None if place is None else next(iter(node.args[place : place + 1]), None)
    return not padding and (node.target in MOVING or node.target in DROPOUTS)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


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


def module_of(node: Node) -> str:
    """Return the name of the module whose forward pass made ``node``; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
