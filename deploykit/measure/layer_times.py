"""What one layer costs at one width: a model of this layer alone, timed on its runtime."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.environment import environment
from deploykit.errors import UsageError
from deploykit.layer_shapes import LayerShape
from deploykit.measure.profile import Profiler
from deploykit.publish import write_json
from deploykit.seeds import stable_seed

ROUNDS = 12
SAMPLE_SECONDS = 0.002
MOST_RUNS = 20  # a round
SESSIONS = 64  # models that are open at once
OPSET = 20
LAYOUT = frozenset({"Transpose", "ReorderInput", "ReorderOutput"})  # of the borders of the model


# Times of one file are multiples of this layer's, so that they can be compared.
REFERENCE = LayerShape("conv", 32, 32, (16, 16), 1, (3, 3), (1, 1), (1, 1), (1, 1))


@dataclass
class LayerTimes:
    """Measured costs of layers at batch 1, kept on disk for the next run.

    Costs are multiples of a reference layer's, which is timed in the same rounds: a machine
    that slows down slows both. A file holds what was measured on one kind of machine with one
    version of ONNX Runtime and one number of threads.

    Attributes:
        threads: threads inside an operator.
        path: the file; None keeps nothing.
        costs: what is known, by the key of the shape.
        measured: how many shapes this object has measured.
        asked: the keys of the shapes that it was asked for.
    """

    threads: int
    path: Path | None = None
    costs: dict[str, float] = field(default_factory=dict)
    measured: int = 0
    asked: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path | None, threads: int) -> LayerTimes:
        """Read what this machine has measured before; a damaged file counts as none."""
        if folder is None:
            return cls(threads)
        about = environment()
        kind = [about["cpu"], about["features"], about["versions"]["onnxruntime"], threads, OPSET]
        path = folder / f"layers-{sha256(json.dumps(kind).encode()).hexdigest()[:16]}.json"
        return cls(threads, path, _read_costs(path))

    def ask(self, shapes: Iterable[LayerShape]) -> Mapping[LayerShape, float]:
        """Return the cost of each shape; what is not known is measured."""
        wanted = list(dict.fromkeys(shapes))
        self.asked.update(shape.key for shape in wanted)
        missing = [shape for shape in wanted if shape.key not in self.costs]
        for start in range(0, len(missing), SESSIONS):
            self.costs.update(_measure(missing[start : start + SESSIONS], self.threads))
        if missing:
            self.measured += len(missing)
            self._keep()
        return {shape: self.costs[shape.key] for shape in wanted}

    def _keep(self) -> None:
        if self.path is None:
            return
        # Another process may have measured meanwhile.
        merged = {**_read_costs(self.path), **self.costs}
        # Where it cannot be kept, as on a read-only disk, it is measured again another time.
        with suppress(OSError, UsageError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"schema": 1, "costs": dict(sorted(merged.items()))})


def _read_costs(path: Path) -> dict[str, float]:
    try:
        costs = json.loads(path.read_text(encoding="utf-8"))["costs"]
        return {str(key): float(value) for key, value in costs.items() if float(value) > 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _measure(shapes: Sequence[LayerShape], threads: int) -> dict[str, float]:
    """Time layers in interleaved rounds, each against the reference of its round."""
    runners = {
        shape: Profiler(layer_model(shape), _feed(shape), threads)
        for shape in dict.fromkeys([REFERENCE, *shapes])
    }
    runs = {shape: runner.runs_in(SAMPLE_SECONDS, MOST_RUNS) for shape, runner in runners.items()}
    generator = np.random.default_rng(stable_seed("layers"))
    order = list(runners)
    for _ in range(ROUNDS):
        for place in generator.permutation(len(order)):
            runners[order[place]].run(runs[order[place]])
    rounds = {shape: _by_round(runner, runs[shape]) for shape, runner in runners.items()}
    return {shape.key: float(np.median(rounds[shape] / rounds[REFERENCE])) for shape in shapes}


def _by_round(runner: Profiler, runs: int) -> np.ndarray:
    """Return what the layer took in each round; the first run of a round finds cold caches."""
    total = sum(
        durations for (_, operator), durations in runner.finish().items() if operator not in LAYOUT
    )
    by_round = np.asarray(total)[-ROUNDS * runs :].reshape(ROUNDS, runs)
    medians: np.ndarray = np.median(by_round[:, 1:] if runs > 1 else by_round, axis=1)
    return medians


def layer_model(shape: LayerShape) -> bytes:
    """Return an ONNX model of this layer alone, quantized as it ships."""
    from onnx import checker, helper, numpy_helper

    integer = shape.precision != "float32"
    nodes, constants = [], []

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def pair(name: str, dtype: str) -> list[str]:
        zero_point = 128 if dtype == "uint8" else 0
        return [
            constant(f"{name}.scale", np.float32(0.02)),
            constant(f"{name}.zero", np.array(zero_point, dtype)),
        ]

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    source, weight = "x", _weight(shape)
    axis = 1 if shape.kind != "conv" else 0
    if integer:
        source = node("DequantizeLinear", ["x", *pair("x", shape.precision)], "x.float")
        scales = [
            constant("w.scale", np.full(weight.shape[axis], 0.01, np.float32)),
            constant("w.zero", np.zeros(weight.shape[axis], np.int8)),
        ]
        integers = constant("w", weight.astype(np.int8))
        weights = node("DequantizeLinear", [integers, *scales], "w.float", axis=axis)
    else:
        weights = constant("w", weight.astype(np.float32) / 64)
    last = node(_operator(shape), [source, weights], "layer", **_attributes(shape))
    if integer:
        last = node("QuantizeLinear", [last, *pair("y", shape.precision)], "y")
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(shape.precision))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", dtype, _input_shape(shape))],
        [helper.make_tensor_value_info(last, dtype, [None] * (2 + len(shape.size)))],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _operator(shape: LayerShape) -> str:
    if shape.kind == "linear":
        return "MatMul" if shape.size else "Gemm"
    return "Conv" if shape.kind == "conv" else "ConvTranspose"


def _attributes(shape: LayerShape) -> dict[str, Any]:
    if shape.kind == "linear":
        return {}
    return {
        "kernel_shape": shape.kernel,
        "strides": shape.stride,
        "pads": shape.padding * 2,
        "dilations": shape.dilation,
        "group": shape.groups,
    }


def _weight(shape: LayerShape) -> np.ndarray:
    ends = {
        "conv": (shape.outputs, shape.inputs // shape.groups),
        "transposed": (shape.inputs, shape.outputs // shape.groups),
        "linear": (shape.inputs, shape.outputs),
    }[shape.kind]
    generator = np.random.default_rng(0)
    return generator.integers(-64, 64, (*ends, *shape.kernel))


def _input_shape(shape: LayerShape) -> tuple[int, ...]:
    if shape.kind == "linear":
        return (1, *shape.size, shape.inputs)
    return (1, shape.inputs, *shape.size)


def _feed(shape: LayerShape) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 100, _input_shape(shape))
    return {"x": values.astype(shape.precision)}
