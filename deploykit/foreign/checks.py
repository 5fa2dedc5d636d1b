"""What is looked at in a file from elsewhere, in a process of its own that may die of it.

`deploykit.foreign.limits` starts that process. Everything here treats the file as hostile; what
it refuses, it tells in one sentence.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from deploykit import runtime
from deploykit.artifacts import JsonDict, TensorSpec
from deploykit.errors import first_line
from deploykit.foreign.border import Border, free_batch, read_border
from deploykit.trim import graphs_of

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})  # ONNX Runtime's own
FLOATS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
)
# Elsewhere infinity may be meant: a mask, a bound.
LAYERS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"),
        *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "PRelu"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
BATCHES = (1, 2, 7)
ROUNDING = 1e-3  # of the largest answer: what a sample's answer may owe to its batch


class Refused(Exception):
    """The file cannot be used; the message is the rest of a sentence that names it."""


def answer() -> None:
    """Be the process: read the order from the command line, write what was found as JSON."""
    import onnxruntime  # noqa: F401  what it takes to be imported does not count

    order = json.loads(sys.argv[1])
    _limit(order)
    try:
        found = look_at(Path(order["path"]).read_bytes(), order["sample_shape"])
    except Refused as refusal:
        found = {"refused": str(refusal)}
    except MemoryError:
        found = {"refused": "expected a model that fits into the memory allowed, got a larger one"}
    sys.stdout.write(json.dumps(found))


def _limit(order: Mapping[str, Any]) -> None:
    """Allow so much more memory than is in use before the file is read, so much time, no file."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere address space cannot be limited so
        memory = int(statm.read_text().split()[0]) * resource.getpagesize() + order["memory_bytes"]
        _lower(resource.RLIMIT_AS, memory, memory)
    seconds = order["cpu_seconds"]
    _lower(resource.RLIMIT_CPU, seconds, seconds + 5)  # the first one tells
    _lower(resource.RLIMIT_FSIZE, 0, 0)
    _lower(resource.RLIMIT_CORE, 0, 0)


def _lower(kind: int, soft: int, hard: int) -> None:
    """Set a limit, or leave the lower one that the user's shell has set."""
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def look_at(data: bytes, sample_shape: list[int] | None) -> JsonDict:
    """Check a file's form and weights, open it and let it answer.

    Args:
        data: the file's bytes.
        sample_shape: of one sample, where the file leaves sizes open; without it such a file is
            not run.

    Returns:
        The border as JSON.

    Raises:
        Refused: the file cannot be used.
    """
    try:
        proto = onnx.load_model_from_string(data)
    except MemoryError:
        raise
    except Exception as error:  # protobuf has its own types, in C
        raise Refused("expected an ONNX file, got something else; export it again") from error
    _refuse_what_is_outside(proto)
    _refuse_newer(proto)
    _refuse_broken_weights(proto.graph)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except MemoryError:
        raise
    except Exception as error:  # by the checker, by shape inference, or by what they stumble on
        raise Refused(
            f"expected a valid ONNX model: {first_line(error)}; export it again"
        ) from error
    border = _border(proto)
    shape = tuple(sample_shape or border.input.shape[1:])
    if -1 in shape:
        return border.to_json()
    if border.fixed_batch:
        proto = free_batch(proto, border)
    return _run(proto, border, shape).to_json()


def _refuse_what_is_outside(proto: onnx.ModelProto) -> None:
    """Refuse what ONNX Runtime would look for elsewhere, or take from the file itself to run."""
    if proto.functions:
        raise Refused(
            f"expected operators, got {len(proto.functions)} functions of the model's own; inline "
            "them (onnx.inliner.inline_local_functions)"
        )
    if proto.training_info:
        raise Refused("expected a model for inference, got one with training steps; export that")
    if not proto.HasField("graph"):
        raise Refused("expected an ONNX file with a graph, got none; export it again")
    for graph in graphs_of(proto.graph):
        if graph.sparse_initializer:
            raise Refused("expected dense weights, got sparse initializers; export them dense")
        for name, tensor in tensors_of(graph):
            if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
                raise Refused(
                    f"expected every weight inside the file, got {name} in another one; save the "
                    "model as one file (onnx.save with save_as_external_data=False)"
                )
        for node in graph.node:
            if node.op_type.startswith("DynamicQuantize"):
                raise Refused(
                    f"expected answers that no other sample of a batch touches, got "
                    f"{node.op_type[:80]}, which scales by all of them; give the float file"
                )
            if node.domain not in DOMAINS:
                raise Refused(
                    f"expected operators of ONNX Runtime, got {node.op_type[:80]} of "
                    f"{node.domain[:80]!r}; export the model without custom operators"
                )


def tensors_of(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield the tensors of a graph and its nodes' attributes, not of graphs inside them."""
    for tensor in graph.initializer:
        yield repr(tensor.name[:80]), tensor
    for node in graph.node:
        called = f"{node.op_type[:80]} {node.name[:80]!r}"
        for attribute in node.attribute:
            sparse = [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])]
            sparse += attribute.sparse_tensors
            dense = [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
            for tensor in [*dense, *(part for one in sparse for part in (one.values, one.indices))]:
                yield called, tensor


def _refuse_newer(proto: onnx.ModelProto) -> None:
    if proto.ir_version > onnx.IR_VERSION:
        raise Refused(
            f"expected IR version {onnx.IR_VERSION} or older, got {proto.ir_version}; export with "
            "an older one"
        )
    newest = {"": onnx.defs.onnx_opset_version(), "ai.onnx": onnx.defs.onnx_opset_version()}
    for entry in proto.opset_import:
        limit = newest.get(entry.domain)
        if limit is not None and entry.version > limit:
            raise Refused(
                f"expected opset {limit} or older, got {entry.version}; export with an older one"
            )


def _refuse_broken_weights(graph: onnx.GraphProto) -> None:
    """Refuse NaN anywhere, and infinity in what a layer multiplies with."""
    for inner in graphs_of(graph):
        readers = {name: node for node in reversed(inner.node) for name in node.input}
        for called, tensor in tensors_of(inner):
            if tensor.data_type not in FLOATS:
                continue
            values, reader = _values(called, tensor), readers.get(tensor.name)
            multiplied = reader is not None and reader.op_type in LAYERS
            if np.isnan(values).any() or (multiplied and np.isinf(values).any()):
                layer = f" of {reader.op_type[:80]} {reader.name[:80]!r}" if reader else ""
                raise Refused(
                    f"expected finite weights, got NaN or infinity in {called}{layer}; train it "
                    "again with a lower rate"
                )


def _values(called: str, tensor: TensorProto) -> np.ndarray:
    try:
        values = numpy_helper.to_array(tensor)
    except MemoryError:
        raise
    except Exception as error:  # sizes that do not fit the bytes
        raise Refused(f"expected a valid ONNX model, got a damaged tensor in {called}") from error
    return values if values.dtype.kind == "f" else values.astype(np.float32)


def _border(proto: onnx.ModelProto) -> Border:
    try:
        return read_border(proto)
    except ValueError as error:
        raise Refused(str(error)) from error


def _run(proto: onnx.ModelProto, border: Border, shape: tuple[int, ...]) -> Border:
    """Open the model and hold its answers to what a bundle promises of them."""
    try:
        session = runtime.open_session(proto.SerializeToString())
    except runtime.RunnerError as error:
        reason = str(error).removeprefix(f"{runtime.MODEL}: ")
        raise Refused(f"expected a model that runs: {reason}; export it again") from error
    generator = np.random.default_rng(0)
    samples = generator.standard_normal((max(BATCHES), *shape)).astype(np.float32)
    if border.input.dtype == "uint8":
        samples = generator.integers(0, 256, samples.shape, np.uint8)
    answers = [_answers(session, border, samples[:batch]) for batch in BATCHES]
    single, repeated = answers[0], _answers(session, border, samples[:1])
    if not np.array_equal(single, repeated):
        raise Refused("expected equal answers to equal inputs, got others; remove what is random")
    largest = float(np.abs(answers[-1]).max())
    for batch, answered in zip(BATCHES, answers, strict=True):
        alone = [_answers(session, border, samples[i : i + 1]) for i in range(batch)]
        if float(np.abs(np.concatenate(alone) - answered).max()) > ROUNDING * largest:
            raise Refused(_batch_refusal(border, f"a batch of {batch} answers otherwise"))
    name, dtype = border.output.name, border.output.dtype
    return Border(
        TensorSpec(border.input.name, border.input.dtype, (-1, *shape)),
        TensorSpec(name, dtype, (-1, single.shape[1])),
        border.fixed_batch,
    )


def _answers(session: Any, border: Border, samples: np.ndarray) -> np.ndarray:
    try:
        answers: np.ndarray = session.run(None, {border.input.name: samples})[0]
    except Exception as error:  # whatever a kernel raises
        if border.fixed_batch or len(samples) > 1:
            why = f"a batch of {len(samples)} fails ({first_line(error)[:200]})"
            raise Refused(_batch_refusal(border, why)) from error
        raise Refused(f"expected a model that runs: {first_line(error)[:300]}") from error
    if answers.ndim != 2 or len(answers) != len(samples) or not answers.shape[1]:
        raise Refused(
            f"output {border.output.name[:80]!r}: expected (N, classes), got {answers.shape} for "
            f"{len(samples)} samples; flatten it in the model"
        )
    if not np.isfinite(answers).all():
        raise Refused(
            "expected finite answers, got NaN or infinity for random inputs; look for a division "
            "by zero or a logarithm in it"
        )
    return answers


def _batch_refusal(border: Border, why: str) -> str:
    fixed = f" a fixed batch of {border.fixed_batch}, and" if border.fixed_batch else ""
    return (
        f"input {border.input.name[:80]!r}: expected a batch of any size, got{fixed} {why}; export "
        "it with a dynamic batch (dynamic_shapes of torch.onnx.export)"
    )
