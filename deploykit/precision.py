"""Floats of two bytes: fp16 in weights and arithmetic, fp16-weights and bf16 in weights alone.

fp16 is what GPUs compute fastest. ONNX Runtime's CPU kernels take no bf16, and read fp16 but
compute float32 between operators, so that an overflow of fp16 does not show there: the proof
of an fp16 model is a graph that rounds each value as a GPU does. Where a CPU computes, weights
alone are worth storing in two bytes: half the file, and the speed of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from deploykit.artifacts import Candidate
from deploykit.quantization.operators import NORM
from deploykit.tools import load_tool


@dataclass(frozen=True)
class Exactness:
    """How near a model of some precision stays to the float32 one.

    Attributes:
        steps: allowed error of an output, in steps that an 8-bit output of its range would have.
        relative: allowed error of an inner value, as a share of its tensor's largest.
        remedy: what helps where that does not hold, to be told after what was found.
    """

    steps: float
    relative: float
    remedy: str = ""


EXACTNESS: Mapping[str, Exactness] = {
    "int8": Exactness(0.25, 1e-3),  # where no activation is rounded, but weights alone
    "fp32": Exactness(0.25, 1e-3),
    # A significand of 11 bits, and 65504 is the largest number.
    "fp16": Exactness(1.0, 1e-2, "; set precision: bf16 or fp32"),
    "fp16-weights": Exactness(1.0, 1e-2, "; set precision: bf16 or fp32"),
    # A significand of 8 bits, with the range of float32.
    "bf16": Exactness(4.0, 5e-2, "; set precision: fp32"),
}
STORED = {
    "fp16-weights": (torch.float16, TensorProto.FLOAT16),
    "bf16": (torch.bfloat16, TensorProto.BFLOAT16),
}


def precision_of(candidate: Candidate) -> str:
    """Return the precision in which a candidate is exported: int8, or one of `EXACTNESS`."""
    if candidate.structure.get("quantization"):
        return "int8"
    return str(candidate.structure.get("precision", "fp32"))


def convert(candidate: Candidate, precision: str) -> Candidate:
    """Let a float candidate ship in floats of two bytes; its module stays float32."""
    structure = {**candidate.structure, "precision": precision}
    return replace(candidate, structure=structure, stage="convert", notes={})


def convert_floats(proto: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a float32 model in another precision of floats; its border stays as it is.

    Args:
        proto: a float model, whose layers and tensors keep their names.
        precision: ``fp32`` changes nothing; ``fp16`` computes in halves; ``fp16-weights`` and
            ``bf16`` store the weights so and compute in float32.
    """
    if precision == "fp16":
        converter = load_tool("onnxruntime.transformers.float16")
        return _sorted(converter.convert_float_to_float16(proto, keep_io_types=True))
    if precision in STORED:
        _store(proto.graph, *STORED[precision])
    return proto


def _sorted(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Put casts of inputs, which the converter appends, before what reads them."""
    inputs = {value.name for value in proto.graph.input}
    first = [node for node in proto.graph.node if inputs.issuperset(node.input)]
    rest = [node for node in proto.graph.node if not inputs.issuperset(node.input)]
    del proto.graph.node[:]
    proto.graph.node.extend([*first, *rest])
    return proto


def _store(graph: onnx.GraphProto, dtype: torch.dtype, kind: int) -> None:
    """Keep weights in two bytes; what has one axis (biases, scales) stays exact and costs little.

    So does what two bytes cannot hold, as the least float of a mask in fp16. ONNX Runtime casts
    constants once, when it opens the model.
    """
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            values = torch.tensor(numpy_helper.to_array(tensor))
            stored = values.to(dtype)
            if not torch.equal(stored.isfinite(), values.isfinite()):
                continue
            data = stored.view(torch.uint16).numpy().tobytes()
            name = f"{tensor.name}_stored"
            casts.append(
                helper.make_node("Cast", [name], [tensor.name], name=name, to=TensorProto.FLOAT)
            )
            tensor.CopyFrom(helper.make_tensor(name, kind, tensor.dims, data, raw=True))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


class HalfArithmetic(nn.Module):
    """Runs a float graph as a GPU's fp16 kernels do: sums in float32, every result rounded."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *inputs: Tensor) -> Tensor:
        """Answer as the graph does, to the precision of fp16; infinity where that overflows."""
        answer: Tensor = _Rounding(self.graph_module).run(*map(_rounded, inputs))
        return answer


class _Rounding(Interpreter):
    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        # A BatchNorm is folded into the layer before it, whose own result then never exists.
        folded = len(node.users) == 1 and next(iter(node.users)).target is NORM
        return value if node.op != "call_function" or folded else _rounded(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.half().float()
    return value
