"""Integers for a graph that no torch module stands behind, by ONNX Runtime's own quantizer.

Weights have a scale a channel, activations one a tensor, as the target takes them; quantize and
dequantize pairs stand where ONNX Runtime fuses them. How the ranges of activations are best read
off their values is tried: `METHODS`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from deploykit.errors import CompressionError, first_line
from deploykit.foreign.pixels import Normalization
from deploykit.targets import Target
from deploykit.tools import load_tool
from deploykit.trim import graphs_of, trim

BATCH_SIZE = 16
# The whole range; all but the largest of values; the range that keeps most information.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "minmax": {"calibrate_method": "MinMax"},
    "percentile": {"calibrate_method": "Percentile", "CalibPercentile": 99.99},
    "entropy": {"calibrate_method": "Entropy"},
}
# What ONNX Runtime's CPU computes in integers, or moves as it is. Others would be rounded for
# nothing: normalizations, softmax, transposed convolutions, recurrent layers.
OPERATORS = (
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Split", "GlobalAveragePool"),
    *("AveragePool", "MaxPool", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Resize", "Pad"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather"),
)
BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})


class Batches:
    """Calibration samples as ONNX Runtime's quantizer asks for them, a batch at a time.

    Args:
        name: of the model's input.
        load: gives the samples at these places as the model takes them.
        count: how many there are.
    """

    def __init__(self, name: str, load: Callable[[np.ndarray], np.ndarray], count: int) -> None:
        self._name, self._load = name, load
        self._starts = range(0, count, BATCH_SIZE)
        self._count, self._next, self._end = count, 0, len(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give these batches only, next."""
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch by the input's name; None at the end."""
        if self._next >= self._end:
            return None
        start = self._starts[self._next]
        self._next += 1
        return {self._name: self._load(np.arange(start, min(start + BATCH_SIZE, self._count)))}


def quantized(
    proto: onnx.ModelProto,
    batches: Callable[[], Batches],
    target: Target,
    normalization: Normalization | None,
) -> dict[str, onnx.ModelProto]:
    """Return the model with integers, by each method of reading ranges.

    Args:
        proto: a float model; left as it is.
        batches: gives the calibration samples from the first one on.
        target: decides the integer types.
        normalization: of the input. Where pixels are the target's integers, they set its scale.

    Raises:
        CompressionError: ONNX Runtime cannot quantize it, or finds nothing to quantize.
    """
    taken = proto.graph.input[0].name
    with TemporaryDirectory(prefix="deploykit-") as folder, _quiet():
        try:
            return _by_each_method(proto, Path(folder), batches, target, taken, normalization)
        except CompressionError:
            raise
        except Exception as error:  # the quantizer raises whatever it stumbles over
            raise CompressionError(
                f"quantize: ONNX Runtime's quantizer fails: {first_line(error)[:300]}; ship floats "
                "with --quantize none"
            ) from error


def _by_each_method(
    proto: onnx.ModelProto,
    folder: Path,
    batches: Callable[[], Batches],
    target: Target,
    taken: str,
    normalization: Normalization | None,
) -> dict[str, onnx.ModelProto]:
    given, prepared = folder / "given.onnx", folder / "prepared.onnx"
    given.write_bytes(proto.SerializeToString())
    tool = load_tool("onnxruntime.quantization")
    shaping = load_tool("onnxruntime.quantization.shape_inference")
    shaping.quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
    found = {}
    for name, method in METHODS.items():
        written = folder / f"{name}.onnx"
        _quantize(tool, prepared, written, batches(), target, method, taken, normalization)
        found[name] = _read(written)
    return found


def _quantize(
    tool: Any,
    prepared: Path,
    written: Path,
    batches: Batches,
    target: Target,
    method: Mapping[str, Any],
    taken: str,
    normalization: Normalization | None,
) -> None:
    kinds = {"uint8": tool.QuantType.QUInt8, "int8": tool.QuantType.QInt8}
    options = {name: value for name, value in method.items() if name != "calibrate_method"}
    pair = None if normalization is None or target.symmetric else normalization.pair
    if pair is not None:
        scale, zero_point = np.array(pair[0], np.float32), np.array(pair[1], np.uint8)
        exact = {"quant_type": kinds["uint8"], "scale": scale, "zero_point": zero_point}
        options["TensorQuantOverrides"] = {taken: [exact]}
    tool.quantize_static(
        prepared,
        written,
        batches,
        quant_format=tool.QuantFormat.QDQ,
        op_types_to_quantize=list(OPERATORS),
        per_channel=True,
        reduce_range=target.weight_bits < 8,
        activation_type=kinds[target.activation_dtype],
        weight_type=kinds["int8"],
        calibrate_method=tool.CalibrationMethod[method["calibrate_method"]],
        extra_options={
            "ActivationSymmetric": target.symmetric,
            "CalibTensorRangeSymmetric": target.symmetric,
            "CalibStridedMinMax": 1,  # histograms are filled batch by batch
            "MatMulConstBOnly": True,
            "QuantizeBias": not target.symmetric,  # TensorRT knows no 32-bit integers
            "WeightSymmetric": True,
            **options,
        },
    )


def _read(written: Path) -> onnx.ModelProto:
    proto = trim(onnx.load(written))
    weights = {one.name for one in proto.graph.initializer if one.data_type in BYTES and one.dims}
    if not any(
        one.op_type == "DequantizeLinear" and one.input[0] in weights for one in proto.graph.node
    ):
        raise CompressionError(
            "quantize: expected a layer that integers can compute, got none; ship floats with "
            "--quantize none"
        )
    return proto


def holds_integers(proto: onnx.ModelProto) -> bool:
    """Whether a model computes in integers already, of whatever kind."""
    return any(
        node.op_type.startswith(("QLinear", "QGemm", "QAttention"))
        or node.op_type.endswith(("QuantizeLinear", "DequantizeLinear"))
        or "Integer" in node.op_type  # ConvInteger, MatMulIntegerToFloat
        for graph in graphs_of(proto.graph)
        for node in graph.node
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' remarks off the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
