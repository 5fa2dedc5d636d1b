"""Which layers of an ONNX model run in integer arithmetic, and why the others do not.

The answer is read from the graph that ONNX Runtime makes for itself when it opens the model,
not from the file: a layer between quantize/dequantize pairs runs in integers only if ONNX
Runtime fuses it with them.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit.artifacts import JsonDict, OnnxModel
from deploykit.errors import ModelError, first_line

INTEGER_LAYERS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
# What ONNX Runtime appends to the name of a node when it changes the layout of its tensors.
LAYOUT_WORDS = re.compile(r"(_token_\d+|_nchwc)+$")
FLOAT_LAYERS = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "GRU",
        "Gemm",
        "LSTM",
        "MatMul",
        "RNN",
    }
)
NO_INTEGER_KERNEL = frozenset({"ConvTranspose", "GRU", "RNN"})


@dataclass(frozen=True)
class FloatLayer:
    """A convolution, linear layer or matrix product that stayed in float."""

    name: str
    operator: str
    why: str


@dataclass(frozen=True)
class FusionReport:
    """What ONNX Runtime really runs.

    Attributes:
        integer: names of the layers that run in integers, in order.
        floating: the layers that do not, each with the reason.
        operators: how many nodes of each type the optimized graph has.
    """

    integer: tuple[str, ...]
    floating: tuple[FloatLayer, ...]
    operators: Mapping[str, int]

    def to_json(self) -> JsonDict:
        """Return what ``report.json`` holds as ``details.fusion``."""
        return {
            "integer": list(self.integer),
            "float": [vars(layer) for layer in self.floating],
            "operators": dict(self.operators),
        }


def fused_operators(model: OnnxModel, threads: int) -> FusionReport:
    """Read back the graph that ONNX Runtime runs on the CPU.

    Args:
        model: a model with or without quantize/dequantize pairs.
        threads: threads inside an operator.

    Raises:
        ModelError: the file is missing, or ONNX Runtime cannot open it.

    Example:
        >>> [layer.name for layer in fused_operators(model, threads=1).floating]
        []
    """
    written = load_proto(model.path)
    _name_nodes(written.graph)
    nodes = list(_all_nodes(optimize(written, model.path, threads).graph))
    graph = _Graph.of(written.graph)
    integer = [graph.original_name(node) for node in nodes if node.op_type in INTEGER_LAYERS]
    floating = [
        FloatLayer(name := graph.original_name(node), node.op_type, _why_float(name, graph))
        for node in nodes
        if node.op_type in FLOAT_LAYERS
    ]
    counts = Counter(node.op_type for node in nodes)
    return FusionReport(tuple(integer), tuple(floating), dict(sorted(counts.items())))


def written_names(model: OnnxModel, executed: Iterable[str], threads: int) -> dict[str, str]:
    """Return, for nodes as ONNX Runtime executes them, the written nodes they were made from.

    A kernel that works on another layout is named anew: after its node or its output, with a
    word appended.

    Raises:
        ModelError: the file is missing, or ONNX Runtime cannot open it.
    """
    written = load_proto(model.path)
    _name_nodes(written.graph)
    graph, origins = _Graph.of(written.graph), dict[str, str]()
    for node in _all_nodes(optimize(written, model.path, threads).graph):
        origins[node.name] = graph.original_name(node)
        for tensor in node.output:
            origins.setdefault(tensor, origins[node.name])
    return {
        name: origins.get(name) or origins.get(LAYOUT_WORDS.sub("", name), name)
        for name in executed
    }


def load_proto(path: Path) -> Any:
    """Read an ONNX file.

    Raises:
        ModelError: it is missing, or something else.
    """
    import onnx

    try:
        return onnx.load(path)
    except OSError as error:
        raise ModelError(f"{path}: expected an ONNX file, got {error.strerror}") from error
    except Exception as error:  # protobuf's own, by several names
        raise ModelError(f"{path}: expected an ONNX file, got something else") from error


def _name_nodes(graph: Any) -> None:
    """Give nameless and namesake nodes a name, by which to know them after optimization."""
    taken: set[str] = set()
    for index, node in enumerate(_all_nodes(graph)):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}#{index}"
        taken.add(node.name)


def _all_nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of the graphs inside (``If``, ``Loop``, ``Scan``)."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def optimize(written: Any, path: Path, threads: int) -> Any:
    """Return a model as ONNX Runtime runs it, short of layout changes, which rename nodes only.

    Raises:
        ModelError: ONNX Runtime cannot open it; ``path`` is named.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        try:
            onnxruntime.InferenceSession(
                written.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises a dozen types of its own
            raise ModelError(f"{path}: ONNX Runtime cannot open it: {first_line(error)}") from error
        return onnx.load(optimized)


@dataclass(frozen=True)
class _Graph:
    """The written graph, by node name and by tensor name."""

    nodes: Mapping[str, Any]
    producers: Mapping[str, Any]
    consumers: Mapping[str, list[Any]]
    constants: Mapping[str, Any]
    outputs: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, graph: Any) -> _Graph:
        nodes = list(_all_nodes(graph))
        consumers: dict[str, list[Any]] = {}
        for node in nodes:
            for tensor in dict.fromkeys(node.input):
                consumers.setdefault(tensor, []).append(node)
        return cls(
            nodes={node.name: node for node in nodes},
            producers={tensor: node for node in nodes for tensor in node.output},
            consumers=consumers,
            constants={tensor.name: tensor for tensor in graph.initializer},
            outputs=frozenset(tensor.name for tensor in graph.output),
        )

    def original_name(self, optimized: Any) -> str:
        """Return the written node's name; fusions append words of their own to it."""
        name: str = optimized.name
        if name in self.nodes:
            return name
        roots = [known for known in self.nodes if name.startswith(f"{known}/")]
        return max(roots, key=len, default=name)

    def is_dequantized(self, tensor: str) -> bool:
        producer = self.producers.get(tensor)
        return producer is not None and producer.op_type == "DequantizeLinear"

    def is_constant(self, tensor: str) -> bool:
        """Whether a float tensor depends on no input; packed weights are decoded from constants."""
        if tensor in self.constants:
            return True
        producer = self.producers.get(tensor)
        if producer is None or producer.op_type == "DequantizeLinear":
            return False
        return all(self.is_constant(source) for source in producer.input if source)

    def constant(self, tensor: str) -> Any:
        """Return a constant's values, or None."""
        from onnx import numpy_helper

        if tensor in self.constants:
            return numpy_helper.to_array(self.constants[tensor])
        producer = self.producers.get(tensor)
        if producer is not None and producer.op_type == "Constant":
            return numpy_helper.to_array(producer.attribute[0].t)
        return None


def _why_float(name: str, graph: _Graph) -> str:
    """Name the first rule of ONNX Runtime's fusion that the written layer breaks."""
    node = graph.nodes.get(name)
    if node is None:
        return "ONNX Runtime made it itself; the written graph has no such layer"
    if node.op_type in NO_INTEGER_KERNEL:
        return f"ONNX Runtime has no integer kernel for {node.op_type} on the CPU"
    if node.op_type == "LSTM":
        return "its weights are floats: the integer kernel is not faster for few units"
    if len(node.input) > 1 and graph.is_constant(node.input[1]):
        return "its weights are floats"
    for role, tensor in zip(("first input", "second input"), node.input, strict=False):
        if not graph.is_dequantized(tensor):
            return f"its {role} is not quantized: {_origin(tensor, graph)}"
    return _why_output(node, graph) or (
        "ONNX Runtime has no integer kernel for these attributes, types or quantization parameters"
    )


def _origin(tensor: str, graph: _Graph) -> str:
    producer = graph.producers.get(tensor)
    if producer is None:
        return f"{tensor} is a float constant or input"
    return f"it comes from {producer.op_type} {producer.name}, without a pair between"


def _why_output(node: Any, graph: _Graph) -> str | None:
    """Say what stands between a layer and the QuantizeLinear that it must end in."""
    following = graph.consumers.get(node.output[0], [])
    if node.output[0] in graph.outputs or not following:
        return "its output leaves the model without a QuantizeLinear"
    if len(following) > 1:
        listed = ", ".join(f"{one.op_type} {one.name}" for one in following)
        return f"its output goes to {len(following)} nodes ({listed}), not to one QuantizeLinear"
    (after,) = following
    if after.op_type == "QuantizeLinear":
        return None
    if after.op_type in {"Relu", "Clip"}:
        return _why_activation(after, graph)
    return (
        f"{after.op_type} {after.name} stands between it and the next QuantizeLinear; "
        "it needs a pair of its own before that"
    )


def _why_activation(activation: Any, graph: _Graph) -> str | None:
    """Relu and Clip vanish only into a range of integers that cuts at the same places."""
    following = graph.consumers.get(activation.output[0], [])
    called = f"{activation.op_type} {activation.name}"
    if len(following) != 1 or following[0].op_type != "QuantizeLinear":
        return f"the output of {called} behind it is not followed by one QuantizeLinear"
    quantized = _quantized_range(following[0], graph)
    if quantized is None:
        return f"the QuantizeLinear behind {called} has no single constant scale and zero point"
    step, zero, first, last = quantized
    low, high = _passed_range(activation, graph)
    if first >= low - step / 2 and last <= high + step / 2:
        return None
    borders = [f"begin at {low:.4g}"] * math.isfinite(low) + [f"end at {high:.4g}"] * (
        math.isfinite(high)
    )
    return (
        f"the range quantized behind {called}, {first:.4g} to {last:.4g} (zero point {zero}), is "
        f"wider than what that lets through; it must {' and '.join(borders)}"
    )


def _quantized_range(quantize: Any, graph: _Graph) -> tuple[float, int, float, float] | None:
    """Return step, zero point, lowest and highest value of a QuantizeLinear's integers."""
    import numpy as np

    scale = graph.constant(quantize.input[1])
    given = len(quantize.input) > 2 and quantize.input[2]
    zero_point = graph.constant(quantize.input[2]) if given else np.uint8(0)
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
        return None
    step, zero, limits = scale.item(), zero_point.item(), np.iinfo(zero_point.dtype)
    return step, zero, step * (limits.min - zero), step * (limits.max - zero)


def _passed_range(activation: Any, graph: _Graph) -> tuple[float, float]:
    """Return the lowest and the highest value that a Relu or Clip lets through."""
    if activation.op_type == "Relu":
        return 0.0, math.inf
    bounds = [-math.inf, math.inf]
    for place, tensor in enumerate(activation.input[1:3]):
        if (bound := graph.constant(tensor)) is not None:
            bounds[place] = bound.item()
    return bounds[0], bounds[1]
