"""LSTM layers whose weights are integers, and whose activations become so at run time.

ONNX Runtime has a kernel for them that finds the scale of its input at every run. It is the only
one: a GRU stays in float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch.fx import Graph, Node

from deploykit.quantization.rules import module_of

# Narrower ones are slower in integers: 0.6x at 32, 0.8x at 64, 1.2x at 128, 2.3x at 256 units.
MIN_UNITS = 128


def quantize_recurrent(
    proto: onnx.ModelProto, graph: Graph, keep_float: frozenset[str]
) -> onnx.ModelProto:
    """Return ``proto`` with integer weights in its LSTM layers where that is faster.

    Args:
        proto: as exported from ``graph``.
        graph: knows which modules the layers belong to.
        keep_float: names of modules that stay in float.
    """
    layers = [node for node in proto.graph.node if node.op_type == "LSTM"]
    modules = list(_modules(graph))
    if len(modules) != len(layers):
        modules = [""] * len(layers)
    chosen = [
        layer.name
        for layer, module in zip(layers, modules, strict=True)
        if _units(layer) >= MIN_UNITS and module not in keep_float
    ]
    return _quantize_dynamic(_fold_weights(proto), chosen) if chosen else proto


def _modules(graph: Graph) -> Iterator[str]:
    """Yield the module of each LSTM layer, which torch stacks in one node."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.lstm.input:
            yield from [module_of(node)] * _layers(node)


def _layers(node: Node) -> int:
    count = node.args[4]
    assert isinstance(count, int)
    return count


def _units(layer: onnx.NodeProto) -> int:
    return next((one.i for one in layer.attribute if one.name == "hidden_size"), 0)


def _fold_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Compute what depends on constants alone: the exporter sorts large weights in the graph."""
    from onnxscript import ir, optimizer

    model = ir.from_proto(proto)
    limit = 2**31
    optimizer.fold_constants(model, input_size_limit=limit, output_size_limit=limit)
    optimizer.optimize(model)
    return ir.to_proto(model)


def _quantize_dynamic(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        path = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["LSTM"],
            nodes_to_quantize=names,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)
