"""Candidate -> OnnxModel: one file that says what it is and not where it was made."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch.fx import GraphModule

from deploykit.artifacts import Candidate, OnnxModel
from deploykit.errors import ExportError, ModelError
from deploykit.packing import pack_weights
from deploykit.precision import convert_floats, precision_of
from deploykit.publish import write_atomic
from deploykit.quantization.deployable import candidate_graph, deployable, raw_example
from deploykit.quantization.graphs import quiet
from deploykit.quantization.layers import module_of, written_layers
from deploykit.quantization.recurrent import quantize_recurrent
from deploykit.targets import CPU, resolve_target
from deploykit.trim import strip

OPSET = 20
# As the exporter writes it: op='aten.name' or target=torch.ops.aten.name.overload.
OPERATOR = re.compile(r"(?:op='|target=torch\.ops\.)((?!higher_order)\w+\.\w+)")
STATISTICS = ("running_mean", "running_var")
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm"})  # by ONNX Runtime, where they are floats


def export_onnx(candidate: Candidate, path: Path, *, name: str) -> OnnxModel:
    """Write ``candidate`` as one ONNX file with a dynamic batch.

    A quantized candidate is written with int8 weights and quantize/dequantize pairs (QDQ), one
    of another precision of floats as `deploykit.precision` says. Zeros and shared values that a
    stage has made are stored as `deploykit.packing` says.
    Equal candidates give equal bytes, wherever they are written.

    Args:
        candidate: float or quantized.
        path: the file to write; replaced atomically.
        name: of the model, for the file's metadata.

    Raises:
        ModelError: weights are not finite, or the module cannot be traced.
        ExportError: an operator cannot be written at opset 20.
    """
    check_finite(candidate)
    graph = candidate_graph(candidate)
    proto = _to_onnx(candidate, graph)
    _name_layers(proto.graph, [module_of(node) for node in written_layers(graph.graph)])
    quantization = candidate.structure.get("quantization")
    target = resolve_target(quantization["target"]) if quantization else None
    if quantization and target and target.providers == (CPU,):
        keep_float = frozenset(quantization.get("keep_float", ()))
        with quiet():
            proto = quantize_recurrent(proto, graph.graph, keep_float, target.weight_bits)
        _keep_floats(proto.graph)
    proto = convert_floats(proto, precision_of(candidate))
    strip(proto)
    if candidate.structure.get("sparse") or candidate.structure.get("clustered"):
        pack_weights(proto.graph)
    proto.graph.name = name
    proto.producer_name, proto.producer_version = "deploykit", ""
    proto.domain, proto.model_version = "", 1
    signature = candidate.signature
    onnx.helper.set_model_props(
        proto, {"name": name, "labels": json.dumps(signature.labels, ensure_ascii=False)}
    )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: the exporter wrote an invalid model: {error}") from error
    write_atomic(path, proto.SerializeToString(deterministic=True))
    return OnnxModel(path=path, signature=signature, opset=OPSET)


def check_finite(candidate: Candidate) -> None:
    """Refuse weights that are not numbers: they pass every later check of form.

    Raises:
        ModelError: naming the tensors.
    """
    learned = {name for name, _ in candidate.module.named_parameters()}
    broken = [
        name
        for name, value in candidate.module.state_dict().items()
        if value.is_floating_point()
        and not (finite := torch.isfinite(value)).all()
        # A mask may hold infinity.
        and (name in learned or name.endswith(STATISTICS) or bool(value[~finite].isnan().any()))
    ]
    if broken:
        raise ModelError(
            f"{candidate.stage}: expected finite weights, got NaN or infinity in "
            f"{', '.join(broken[:5])}; train again with a lower rate"
        )


def _to_onnx(candidate: Candidate, graph: GraphModule) -> onnx.ModelProto:
    signature = candidate.signature
    try:
        # The exporter talks on standard output and writes a report when it fails.
        with quiet(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            program = torch.onnx.export(
                deployable(candidate, graph),
                (raw_example(candidate, batch=2),),
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        operator = _missing_operator(error)
        reason = str(list(_causes(error))[-1]).strip().partition("\n")[0]
        raise ExportError(
            f"export: expected operators of opset {OPSET}, got {operator or reason}; replace the "
            "layer that uses it",
            operator=operator,
            opset=OPSET,
        ) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and what it came from, the cause of all last."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _missing_operator(error: BaseException) -> str:
    """Find the operator's name in the chain of the exporter's errors."""
    found = [match for link in _causes(error) if (match := OPERATOR.search(str(link)))]
    return found[-1].group(1) if found else ""


def _keep_floats(graph: onnx.GraphProto) -> None:
    """Keep ONNX Runtime from rounding weights that were left in float.

    A float layer between pairs gets weights of eight bits from it, with one scale for the whole
    tensor; not where the pair before it has a scale for each channel, here the same for all (for
    each row, where there is but one channel: a single scale is one for the whole tensor).
    """
    shapes = {one.name: one.type.tensor_type.shape.dim for one in graph.value_info}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = {
        node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"
    }
    for place, node in reversed(list(enumerate(graph.node))):
        weight, pair = constants.get(node.input[1]) if len(node.input) > 1 else None, None
        if node.op_type in ROUNDED and weight and weight.data_type == onnx.TensorProto.FLOAT:
            pair = dequantized.get(node.input[0])
        if weight is None or pair is None or any(constants[one].dims for one in pair.input[1:]):
            continue
        sizes = [0, _input_channels(node, weight)]
        sizes += [dim.dim_value for dim in shapes.get(node.input[0], ())][2:]
        axis = next((axis for axis, size in enumerate(sizes) if size > 1), 1)
        spread = [_repeated(constants[one], sizes[axis], node.name) for one in pair.input[1:]]
        graph.initializer.extend(one for one in spread if one.name not in constants)
        again = onnx.helper.make_node(
            "DequantizeLinear",
            [pair.input[0], *(one.name for one in spread)],
            [f"{node.name}_input"],
            f"{node.name}_dequantize",
            axis=axis,
        )
        node.input[0] = again.output[0]
        graph.node.insert(place, again)


def _input_channels(node: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    """Return how many channels a layer reads."""
    given = {one.name: one.i for one in node.attribute}
    if node.op_type == "Conv":
        return int(weight.dims[1] * given.get("group", 1))
    return int(weight.dims[given.get("transB", 0)])


def _repeated(constant: onnx.TensorProto, count: int, name: str) -> onnx.TensorProto:
    values = np.full(count, onnx.numpy_helper.to_array(constant))
    return onnx.numpy_helper.from_array(values, f"{name}_{constant.name}")


def _name_layers(graph: onnx.GraphProto, modules: Sequence[str]) -> None:
    """Call convolutions and linear layers as the model's own modules are called."""
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {
        node.output[0]
        for node in graph.node
        if node.op_type in {"DequantizeLinear", "Transpose"} and node.input[0] in constants
    }
    layers = [
        node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in constants
    ]
    if len(layers) != len(modules):
        return  # the exporter split or joined a layer: its own names are the better ones
    taken = {node.name for node in graph.node}
    for layer, module in zip(layers, modules, strict=True):
        if module and module not in taken:
            taken.add(module)
            layer.name = module
