"""LSTM layers whose weights are integers, and whose activations become so at run time.

ONNX Runtime has a kernel for them that finds the scale of its input at every run. It is the only
one: a GRU stays in float.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.fx import Graph, GraphModule, Node

from deploykit.quantization.layers import module_of

# Narrower ones are slower in integers: 0.6x at 32, 0.8x at 64, 1.2x at 128, 2.3x at 256 units.
MIN_UNITS = 128
LIMITS = {8: 127, 7: 64}  # of weights of so many bits, as ONNX Runtime rounds them
KERNEL = "DynamicQuantizeLSTM"


def round_recurrent(graph: GraphModule, keep_float: frozenset[str], bits: int) -> GraphModule:
    """Round the weights of LSTM layers to what their integers will hold, in place.

    Args:
        graph: that ships, still in float there.
        keep_float: names of modules that stay in float.
        bits: of a weight.
    """
    for node in integer_recurrence(graph.graph, keep_float):
        for weight in _tensors(node):
            if weight.meta["val"].ndim == 2:
                owner, _, name = str(weight.target).rpartition(".")
                module = graph.get_submodule(owner)
                value = getattr(module, name).detach()
                scale = value.abs().amax(1, keepdim=True).clamp(min=2.0**-24) / LIMITS[bits]
                setattr(module, name, torch.nn.Parameter(torch.round(value / scale) * scale))
    return graph


def quantize_recurrent(
    proto: onnx.ModelProto, graph: Graph, keep_float: frozenset[str], bits: int
) -> onnx.ModelProto:
    """Return ``proto`` with integer weights in its LSTM layers where that is faster.

    Args:
        proto: as exported from ``graph``.
        graph: knows which modules the layers belong to.
        keep_float: names of modules that stay in float.
        bits: of a weight.
    """
    layers = [node for node in proto.graph.node if node.op_type == "LSTM"]
    owners = list(_layers(graph))
    if len(owners) != len(layers):
        return proto
    wanted = set(integer_recurrence(graph, keep_float))
    chosen = [layer.name for layer, owner in zip(layers, owners, strict=True) if owner in wanted]
    return _quantize_dynamic(_fold_weights(proto), chosen, bits) if chosen else proto


def integer_recurrence(graph: Graph, keep_float: frozenset[str]) -> list[Node]:
    """Return the LSTMs that are wide enough; torch stacks the layers of one in one node.

    Args:
        graph: knows which modules the layers belong to.
        keep_float: names of modules that stay in float.
    """
    return [
        node
        for node in graph.nodes
        if node.target is torch.ops.aten.lstm.input
        and module_of(node) not in keep_float
        and _tensors(node)[1].meta["val"].shape[1] >= MIN_UNITS
    ]


def _tensors(node: Node) -> list[Node]:
    tensors: Any = node.args[2]
    return list(tensors)


def _layers(graph: Graph) -> Iterator[Node]:
    """Yield the node of each LSTM layer, as often as the exporter writes it."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.lstm.input:
            count: Any = node.args[4]
            yield from [node] * count


def _fold_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Compute what depends on constants alone: the exporter sorts large weights in the graph."""
    from onnxscript import ir, optimizer

    model = ir.from_proto(proto)
    limit = 2**31
    optimizer.fold_constants(model, input_size_limit=limit, output_size_limit=limit)
    optimizer.optimize(model)
    return ir.to_proto(model)


def ort_quantization() -> Any:
    """Import ONNX Runtime's quantization.

    Its modules import one another by bare names, from a folder that they put on the path the
    first time; whoever put the path back since would break them.
    """
    import onnxruntime

    bare = str(Path(onnxruntime.__file__).parent / "transformers")
    sys.path.append(bare)
    try:
        return importlib.import_module("onnxruntime.quantization")
    finally:
        sys.path.remove(bare)


def _quantize_dynamic(proto: onnx.ModelProto, names: list[str], bits: int) -> onnx.ModelProto:
    """Let ONNX Runtime quantize layers; the others, which it would rename, stay as they are."""
    quantization = ort_quantization()
    # It transposes weights of linear layers, and then trusts the shapes that the file tells.
    shapeless = onnx.ModelProto()
    shapeless.CopyFrom(proto)
    del shapeless.graph.value_info[:]
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        path = Path(folder) / "dynamic.onnx"
        quantization.quantize_dynamic(
            shapeless,
            path,
            op_types_to_quantize=["LSTM"],
            nodes_to_quantize=names,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=bits < 8,
        )
        quantized = onnx.load(path)
    made = {node.output[0]: node for node in quantized.graph.node if node.op_type == KERNEL}
    for node in proto.graph.node:
        if node.output[0] in made:
            node.CopyFrom(made[node.output[0]])
    read = {name for node in proto.graph.node for name in node.input}
    both = [*quantized.graph.initializer, *proto.graph.initializer]
    known = {tensor.name: tensor for tensor in both if tensor.name in read}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(known.values())
    domain = next(one for one in quantized.opset_import if one.domain == "com.microsoft")
    proto.opset_import.append(domain)
    return proto
