"""The border of a model from elsewhere, and what is changed there: batch, layout, probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifacts import JsonDict, TensorSpec
from deploykit.errors import ModelError, first_line
from deploykit.trim import graphs_of, unify_domains

BATCH = "batch"
CHANNELS = (1, 3)
LAYOUTS = ("nchw", "nhwc")
OPSET, OLDEST = 20, 13  # below 13 quantize/dequantize pairs know no channels
INPUTS: Mapping[int, str] = {TensorProto.FLOAT: "float32", TensorProto.UINT8: "uint8"}
OUTPUTS: Mapping[int, str] = {TensorProto.FLOAT: "float32"}


@dataclass(frozen=True)
class Border:
    """What a model takes and gives.

    Attributes:
        input: ``(-1, ...)``; a size that the file leaves open is -1 as well.
        output: ``(-1, classes)``; likewise.
        fixed_batch: the batch that the file demands; 0 where it takes any.
    """

    input: TensorSpec
    output: TensorSpec
    fixed_batch: int

    def to_json(self) -> JsonDict:
        """Return plain JSON."""
        return {
            "input": self.input.to_json(),
            "output": self.output.to_json(),
            "fixed_batch": self.fixed_batch,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Border:
        """Read what `to_json` wrote."""
        taken, given = (TensorSpec.from_json(value[end]) for end in ("input", "output"))
        return cls(taken, given, int(value["fixed_batch"]))


def read_border(proto: onnx.ModelProto) -> Border:
    """Return the border of a model with one input and one output.

    Raises:
        ValueError: it has another border.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    for kind, values in (("input", inputs), ("output", proto.graph.output)):
        if len(values) != 1:
            names = ", ".join(repr(value.name[:80]) for value in values[:5]) or "none"
            raise ValueError(f"expected one {kind}, got {len(values)}: {names}; keep one of them")
    taken = _spec("input", inputs[0], INPUTS)
    given = _spec("output", proto.graph.output[0], OUTPUTS)
    if len(taken.shape) < 2:
        raise ValueError(
            f"input {taken.name[:80]!r}: expected a batch of samples (N, ...), got "
            f"{len(taken.shape)} axes; export it with a batch"
        )
    if given.shape and len(given.shape) != 2:
        raise ValueError(
            f"output {given.name[:80]!r}: expected (N, classes), got {len(given.shape)} axes; "
            "flatten it in the model"
        )
    batch = max(0, taken.shape[0])
    return Border(
        TensorSpec(taken.name, taken.dtype, (-1, *taken.shape[1:])),
        TensorSpec(given.name, given.dtype, (-1, given.shape[1] if given.shape else -1)),
        batch,
    )


def _spec(kind: str, value: onnx.ValueInfoProto, dtypes: Mapping[int, str]) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in dtypes:
        known = TensorProto.DataType.DESCRIPTOR.values_by_number.get(tensor.elem_type)
        got = "no tensor" if known is None else known.name.lower()
        raise ValueError(
            f"{kind} {value.name[:80]!r}: expected {' or '.join(dtypes.values())}, got {got}; "
            "cast it in the model"
        )
    sizes = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtypes[tensor.elem_type], tuple(sizes))


def free_batch(proto: onnx.ModelProto, border: Border) -> onnx.ModelProto:
    """Return the model with a batch of any size, as far as that can be had.

    Sizes of the batch that an exporter wrote into reshapes become "the rest". Whether the result
    answers the same is for the caller to prove.

    Args:
        proto: takes a fixed batch; left as it is.
        border: of ``proto``.
    """
    freed = onnx.ModelProto()
    freed.CopyFrom(proto)
    _free_reshapes(freed, border.fixed_batch)
    del freed.graph.value_info[:]
    weights = {tensor.name for tensor in freed.graph.initializer}
    for value in [*freed.graph.input, *freed.graph.output]:
        if value.name not in weights and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    return freed


def _free_reshapes(proto: onnx.ModelProto, batch: int) -> None:
    """Let reshapes to constant shapes that begin with the batch keep all sizes but that."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*inferred.graph.value_info, *inferred.graph.output]
    }
    for node in proto.graph.node:
        shape = shapes.get(node.output[0], []) if node.op_type == "Reshape" else []
        if len(shape) > 1 and shape[0] == batch and all(shape):
            name = f"{node.output[0]}_any_batch"
            proto.graph.initializer.append(
                helper.make_tensor(name, TensorProto.INT64, [len(shape)], [-1, *shape[1:]])
            )
            node.input[1] = name


def layout_of(sizes: tuple[int, ...], asked: str | None, where: str) -> str:
    """Say how a model lays out its images: ``nchw`` or ``nhwc``.

    Args:
        sizes: of one image as the model takes it; -1 where the file leaves one open.
        asked: what the user says; None: to be told by the axis that has 1 or 3 channels.
        where: the file, for messages.

    Raises:
        ModelError: the sizes do not tell.
    """
    if asked is not None:
        return asked
    found = [
        layout
        for layout, axis in zip(LAYOUTS, (0, 2), strict=True)
        if sizes[axis] in CHANNELS and not (layout == "nhwc" and sizes[0] in CHANNELS)
        and not (layout == "nchw" and sizes[2] in CHANNELS)
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"{where}: expected 1 or 3 channels on the first or on the last axis of an image, got "
        f"{sizes}, which does not tell; say it with --layout nchw or --layout nhwc"
    )


def tidy(
    proto: onnx.ModelProto, border: Border, shape: tuple[int, ...], where: str
) -> onnx.ModelProto:
    """Return the model with constant weights, an opset that can be quantized and known sizes.

    Args:
        proto: of ``border``; left as it is.
        border: of the file.
        shape: of one sample as the model takes it.
        where: the file, for messages.

    Raises:
        ModelError: its opset is too old, and cannot be lifted.
    """
    tidied = free_batch(proto, border) if border.fixed_batch else onnx.ModelProto.FromString(
        proto.SerializeToString()
    )  # fmt: skip
    weights = {tensor.name for tensor in tidied.graph.initializer}
    inputs = [value for value in tidied.graph.input if value.name not in weights]
    del tidied.graph.input[:]
    tidied.graph.input.extend(inputs)
    tidied.ir_version = max(tidied.ir_version, 8)
    unify_domains(tidied)
    tidied = _lifted(tidied, where)
    for graph in graphs_of(tidied.graph):
        del graph.value_info[:]
    _set_shape(tidied.graph.input[0], shape)
    _set_shape(tidied.graph.output[0], border.output.shape[1:])
    return tidied


def opset_of(proto: onnx.ModelProto) -> int:
    """Return the opset of ONNX's own operators."""
    return max(
        (one.version for one in proto.opset_import if one.domain in {"", "ai.onnx"}), default=1
    )


def _lifted(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    if opset_of(proto) >= OLDEST:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, OPSET)
    except Exception as error:  # a C++ converter that fails in many ways
        raise ModelError(
            f"{where}: expected opset {OLDEST} or newer, got {opset_of(proto)}, which cannot be "
            f"lifted: {first_line(error)}; export it again with opset {OPSET}"
        ) from error


def _set_shape(value: onnx.ValueInfoProto, sizes: tuple[int, ...]) -> None:
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, [BATCH, *sizes]))


def without_softmax(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the model that answers with logits; None where no softmax is its last operator.

    Readers of a bundle make probabilities of its answers: of probabilities they would make flat
    ones.
    """
    output = proto.graph.output[0].name
    last = next((node for node in proto.graph.node if output in node.output), None)
    if last is None or last.op_type != "Softmax" or last.domain not in {"", "ai.onnx"}:
        return None
    axis = next((one.i for one in last.attribute if one.name == "axis"), -1)
    if axis not in {1, -1} or last.input[0] in {one.name for one in proto.graph.input}:
        return None
    stripped = onnx.ModelProto()
    stripped.CopyFrom(proto)
    stripped.graph.node.remove(last)
    stripped.graph.output[0].name = last.input[0]
    return stripped


def constants_of(graph: onnx.GraphProto) -> dict[str, Any]:
    """Return the values of a graph's small constants by name."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if len(tensor.dims) < 2
    }
