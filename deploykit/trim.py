"""An ONNX graph without what nobody needs: fewer bytes, and the same answers bit for bit.

Dead nodes, unused and repeated initializers, identities and chatter go; constants are folded where
the result is small or takes the place of what it was made from. Only operators that move values,
or compute small integers, are folded: arithmetic of floats may round otherwise in numpy than in
ONNX Runtime, which folds it when it opens the file. Quantize/dequantize pairs stay as they stand.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    import onnx_ir as ir

FEW = 64  # values: shapes, axes and the like
EVERY = 2**31  # values: no file holds more
MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
SMALL = frozenset(
    {
        *MOVES,
        *("Add", "Cast", "Concat", "Equal", "Expand", "Gather", "Mul", "Range", "Shape", "Size"),
        *("Slice", "Sub", "Where"),
    }
)
EXACT = frozenset({"BOOL", "INT8", "UINT8", "INT32", "INT64"})


def trim(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same model in fewer bytes.

    Names of layers and of the border stay; doc strings, metadata and recorded shapes go. Equal
    models give equal bytes; a trimmed model stays as it is.

    Args:
        proto: any model; left as it is.

    Example:
        >>> path.write_bytes(trim(onnx.load(path)).SerializeToString(deterministic=True))
    """
    stripped = onnx.ModelProto()
    stripped.CopyFrom(proto)
    strip(stripped)
    if not _can_be_rebuilt(stripped):
        return stripped
    try:
        trimmed = _rebuilt(stripped)
    except Exception:  # noqa: BLE001 - the library stumbles over some valid models
        return stripped
    return min(stripped, trimmed, key=lambda one: one.ByteSize())


def unify_domains(proto: onnx.ModelProto) -> None:
    """Spell the domain of ONNX's own operators in one way, in place: there are two."""
    nodes = (node for graph in graphs_of(proto.graph) for node in graph.node)
    for one in (*proto.opset_import, *nodes):
        if one.domain == "ai.onnx":
            one.domain = ""


def strip(proto: onnx.ModelProto) -> None:
    """Remove what a model tells about itself and the machine that made it, in place."""
    unify_domains(proto)
    del proto.metadata_props[:]
    proto.ClearField("doc_string")
    for graph in graphs_of(proto.graph):
        del graph.metadata_props[:]
        del graph.value_info[:]
        graph.ClearField("doc_string")
        for node in graph.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
        for value in [*graph.input, *graph.output, *graph.initializer]:
            del value.metadata_props[:]
            value.ClearField("doc_string")


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and every graph inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for one in [*inner, *attribute.graphs]:
                yield from graphs_of(one)


def _can_be_rebuilt(proto: onnx.ModelProto) -> bool:
    """Whether the library reads everything that the model holds."""
    sparse = any(graph.sparse_initializer for graph in graphs_of(proto.graph))
    return not (sparse or proto.functions or proto.training_info)


def _rebuilt(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    model = ir.serde.deserialize_model(proto)
    # In a graph inside a node an identity may be the one way to give an outer value.
    nested = sum(1 for _ in graphs_of(proto.graph)) > 1
    with _silent():
        before = None
        while before != (before := _extent(model)):
            if not nested:
                common.IdentityEliminationPass()(model)
            fold_constants_ir(model, output_size_limit=FEW, should_fold=_folds)
            common.RemoveUnusedNodesPass()(model)
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.DeduplicateInitializersPass(size_limit=EVERY)(model)
        common.RemoveUnusedOpsetsPass()(model)
    trimmed: onnx.ModelProto = ir.serde.serialize_model(model)
    strip(trimmed)  # the passes note what they did
    return trimmed


def _extent(model: ir.Model) -> tuple[int, int]:
    return len(model.graph), len(model.graph.initializers)


def _folds(node: ir.Node) -> bool:
    """Whether the result of constants alone is stored in their place."""
    values = [one.const_value for one in node.inputs if one is not None]
    known = [value for value in values if value is not None]
    if node.domain not in {"", "ai.onnx"} or len(node.outputs) != 1 or len(known) < len(values):
        return False
    few = all(value.size <= FEW for value in known)
    if node.op_type in MOVES:
        return few or all(len(one.uses()) == 1 for one in node.inputs[:1] if one is not None)
    exact = node.op_type in SMALL and all(value.dtype.name in EXACT for value in known)
    return few and exact and _extent_of(node.op_type, known) <= FEW


def _extent_of(operator: str, known: list[ir.TensorProtocol]) -> int:
    """Count the values that an operator makes of few, where that is not few too."""
    if operator == "Expand":
        return math.prod(max(1, int(size)) for size in known[1].numpy().ravel())
    if operator == "Range":
        start, stop, step = (int(value.numpy()) for value in known)
        return abs(stop - start) // abs(step) + 1 if step else EVERY
    return 0


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the library's remarks about single tensors off the user's terminal."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
