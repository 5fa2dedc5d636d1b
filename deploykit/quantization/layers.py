"""The layers of a traced graph: which nodes they are, and what their modules are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from deploykit.errors import CompressionError
from deploykit.quantization.operators import CONSTANT_FACTORS, RECURRENT, WEIGHTED


def kernels(graph: Graph) -> Iterator[Node]:
    """Yield the weighted nodes of ``graph``, whatever they compute in."""
    return (node for node in graph.nodes if is_weighted(node))


def written_layers(graph: Graph) -> Iterator[Node]:
    """Yield what a file writes as a convolution or a product with a constant, known here or not."""
    for node in graph.nodes:
        place = 1 if node.target in WEIGHTED else CONSTANT_FACTORS.get(node.target)
        factor = None if place is None else node.args[place]
        if isinstance(factor, Node) and is_constant(factor):
            yield node


def match_layers(
    graph: Graph, patterns: Sequence[str], *, all_there: bool = True
) -> frozenset[str]:
    """Return the modules of layers that a pattern fits, by their name or one around them.

    Args:
        graph: a traced model.
        patterns: shell patterns.
        all_there: whether each must fit; not where blocks were removed, perhaps with its layers.

    Raises:
        CompressionError: a pattern fits none.
    """
    layers = sorted({module_of(node) for node in graph.nodes if _has_weights(node)})
    matched: set[str] = set()
    for pattern in patterns:
        found = [
            name
            for name in layers
            if any(fnmatchcase(around, pattern) for around in accumulate(name.split("."), _dotted))
        ]
        if not found and all_there:
            near = ", ".join(get_close_matches(pattern, layers, n=3, cutoff=0.0))
            raise CompressionError(
                f"quantize.keep_float: {pattern!r} fits no layer with weights; near it are {near}",
                layer=pattern,
            )
        matched.update(found)
    return frozenset(matched)


def module_of(node: Node) -> str:
    """Return the name of the module whose forward pass made ``node``; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def is_weighted(node: Node) -> bool:
    """Whether ``node`` is a layer whose weight is known before any input is."""
    return bool(node.target in WEIGHTED) and is_constant(node.all_input_nodes[1])


def is_constant(node: Node) -> bool:
    """Whether the value of ``node`` is known before any input is."""
    sources = node.all_input_nodes
    return node.op == "get_attr" or (bool(sources) and all(map(is_constant, sources)))


def tensor_of(graph: GraphModule, node: Node) -> Tensor:
    """Return the parameter or buffer that ``node`` reads, apart from its history."""
    owner, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(owner), name)
    return tensor.detach()


def _has_weights(node: Node) -> bool:
    return is_weighted(node) or node.target in RECURRENT


def _dotted(around: str, name: str) -> str:
    return f"{around}.{name}"
