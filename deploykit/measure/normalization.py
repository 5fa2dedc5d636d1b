"""What normalization costs: a model timed beside itself without it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifacts import JsonDict, OnnxModel, TensorSpec
from deploykit.fusion import load_proto, optimize
from deploykit.measure.latency import measure_latency

NORMALIZED = "normalized"  # input of the model that begins behind normalization


def measure_normalization(
    model: OnnxModel, *, threads: int, seconds_per_model: float = 1.0, precision: float = 0.005
) -> JsonDict | None:
    """Return the share of a model's latency at batch 1 that normalization takes.

    A model of images turns pixels ``(N, H, W, C)`` to ``(N, C, H, W)`` and dequantizes them. It
    takes turns with the same model that is handed what its first layer reads: the turned
    integers where ONNX Runtime fuses them into an integer kernel, normalized floats elsewhere.

    Args:
        model: with or without integers.
        threads: threads inside an operator.
        seconds_per_model: cap of the time it takes, for each of the two.
        precision: half the interval's width that is narrow enough.

    Returns:
        ``share``, 0 to 1 (noise may bring it below 0), and its 95% ``interval``; None if the
        model does not begin with normalization.

    Raises:
        ModelError: ONNX Runtime cannot open the model.
    """
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        bare = without_normalization(model, Path(folder) / "bare.onnx", threads=threads)
        if bare is None:
            return None
        measured = measure_latency(
            {"whole": model, "bare": bare},
            threads=threads,
            baseline="whole",
            batch_sizes=(1,),
            precision=precision,
            seconds_per_model=seconds_per_model,
        )["bare"]["1"]
    low, high = measured.interval
    return {"share": 1 - 1 / measured.ratio, "interval": [1 - 1 / low, 1 - 1 / high]}


def without_normalization(model: OnnxModel, path: Path, *, threads: int) -> OnnxModel | None:
    """Write the model that is handed what the first layer of ``model`` reads."""
    import onnx

    written = load_proto(model.path)
    (spec,) = model.signature.inputs
    found = _normalization(written.graph, spec.name)
    if found is None:
        return None
    turn, dequantize = found
    fused = all(
        node.name != dequantize.name for node in optimize(written, model.path, threads).graph.node
    )
    batch, height, width, channels = spec.shape
    fed = TensorSpec(
        NORMALIZED, spec.dtype if fused else "float32", (batch, channels, height, width)
    )
    _replace_input(written.graph, turn.output[0] if fused else dequantize.output[0], fed)
    onnx.checker.check_model(written, full_check=True)
    path.write_bytes(written.SerializeToString())
    return replace(model, path=path, signature=replace(model.signature, inputs=(fed,)))


def _normalization(graph: Any, image: str) -> tuple[Any, Any] | None:
    """Return the Transpose and the DequantizeLinear that a model of images begins with."""
    turns = [node for node in graph.node if image in node.input]
    firsts = [node for turn in turns for node in graph.node if turn.output[0] in node.input]
    if [node.op_type for node in (*turns, *firsts)] != ["Transpose", "DequantizeLinear"]:
        return None
    return turns[0], firsts[0]


def _replace_input(graph: Any, tensor: str, fed: TensorSpec) -> None:
    """Let the graph take ``fed`` where it reads ``tensor``, and drop what made that."""
    import onnx

    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == tensor:
                node.input[place] = fed.name
    _drop_dead(graph)
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(fed.dtype))
    shape: list[str | int | None] = ["batch", *fed.shape[1:]]
    graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(fed.name, dtype, shape))


def _drop_dead(graph: Any) -> None:
    """Remove the nodes that nothing reads."""
    read = {tensor.name for tensor in graph.output}
    for node in reversed(list(graph.node)):
        if read.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            read.update(node.input)
