"""BatchNorm in training graphs: what torchao's fusion with a convolution leaves to be mended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from deploykit.quantization.layers import tensor_of
from deploykit.quantization.operators import LONE_NORM, NORM

aten = torch.ops.aten
LEAST_SCALE = 1e-6  # of a BatchNorm, beside 1


def batch_norms(graph: GraphModule) -> Iterator[Node]:
    """Yield the BatchNorms that have running statistics; others always take the batch's."""
    return (
        node
        for node in graph.graph.nodes
        if node.target in {NORM, LONE_NORM} and isinstance(node.args[3], Node)
    )


def norm_name(norm: Node) -> str:
    """Return the name of the module that holds the statistics."""
    mean = norm.args[3]
    assert isinstance(mean, Node)
    return str(mean.target).rpartition(".")[0]


def norm_constants(module: nn.Module, norm: Node) -> tuple[Any, ...]:
    """Return momentum and epsilon; the default where there is no momentum: no graph can count."""
    owner = module.get_submodule(norm_name(norm))
    cumulative = getattr(owner, "momentum", 0.1) is None
    return (0.1 if cumulative else norm.args[6]), norm.args[7]


@torch.no_grad()
def lift_zeros(graph: GraphModule) -> None:
    """Let no BatchNorm scale by exactly zero: the folded scale is divided out again."""
    for norm in batch_norms(graph):
        scale = norm.args[1]
        if isinstance(scale, Node) and scale.op == "get_attr":
            weight = tensor_of(graph, scale)
            weight.masked_fill_(weight == 0, LEAST_SCALE)


def restore_constants(graph: GraphModule, norms: Mapping[str, tuple[Any, ...]]) -> None:
    """Give every BatchNorm its own momentum and epsilon back.

    torchao's fusion of convolution and BatchNorm writes the defaults into every one:
    https://github.com/pytorch/ao (qat_utils, "TODO: allow setting eps").
    """
    for node in batch_norms(graph):
        momentum, epsilon = norms[norm_name(node)]
        node.update_arg(6, momentum)
        node.update_arg(7, epsilon)
        variance = node.args[4]
        assert isinstance(variance, Node)
        # update_arg takes the user out of the users and puts it back.
        for user in list(variance.users):
            if user.target is aten.add.Tensor:
                user.update_arg(1, epsilon)
    graph.recompile()


def divide_weights(graph: GraphModule) -> None:
    """Divide each folded scale out of the weight again, where torchao divides the output.

    A convolution is linear in its weight, so the answers are the same, at a fraction of the
    elements to divide and to take gradients of.
    """
    for folded in graph.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        match folded.args, _line(folded):
            case (
                [_, Node(args=[source, *_]) as scale],
                [
                    Node(op="call_module") as rounded,
                    Node(target=aten.conv1d.default | aten.conv2d.default) as convolution,
                    Node(target=aten.div.Tensor, args=[_, Node(args=[divisor, *_])]) as division,
                    *_,
                ],
            ) if divisor is source and convolution.args[1] is rounded and not _bias(convolution):
                with graph.graph.inserting_after(rounded):
                    divided = graph.graph.call_function(aten.div.Tensor, (rounded, scale))
                convolution.replace_input_with(rounded, divided)
                division.replace_all_uses_with(convolution)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _line(node: Node) -> list[Node]:
    """Return the nodes that follow ``node``, as far as each is the only user of the one before."""
    line: list[Node] = []
    while len(node.users) == 1:
        (node,) = node.users
        line.append(node)
    return line


def _bias(convolution: Node) -> Any:
    """Return the bias; None where there is none, or zeros in its place."""
    bias = convolution.args[2] if len(convolution.args) > 2 else None
    return None if isinstance(bias, Node) and bias.target is aten.zeros_like.default else bias
