"""Where the time of a model goes: every node that ONNX Runtime executes, in place."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifacts import OnnxModel
from deploykit.errors import ModelError, first_line
from deploykit.measure.session import example_feed

WARM_UP_RUNS = 3
KERNEL = "_kernel_time"  # how the profiler ends the name of an executed node
DISTURBED = 0.25  # share of the runs, at most, in which something else took the core


@dataclass(frozen=True)
class NodeTime:
    """One node as ONNX Runtime executes it.

    Attributes:
        name: of the optimized node, see `fusion`.
        operator: ONNX operator; ``Reorder...`` are ONNX Runtime's own changes of layout.
        microseconds: mean of the undisturbed runs, the profiler's own time included.
        reads: names of the nodes whose outputs it reads.
    """

    name: str
    operator: str
    microseconds: float
    reads: tuple[str, ...]


class Profiler:
    """A model that is run under ONNX Runtime's own profiler.

    Args:
        model: bytes of an ONNX file.
        feed: its inputs.
        threads: threads inside an operator.

    Raises:
        ModelError: ONNX Runtime cannot open it.
    """

    def __init__(self, model: bytes, feed: Mapping[str, np.ndarray], threads: int) -> None:
        import onnxruntime

        self._feed, self._folder = feed, tempfile.TemporaryDirectory(prefix="deploykit-")
        self._optimized = Path(self._folder.name) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        options.optimized_model_filepath = str(self._optimized)
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises a dozen types of its own
            self._folder.cleanup()
            raise ModelError(f"ONNX Runtime cannot open the model: {first_line(error)}") from error

    @classmethod
    def of(cls, model: OnnxModel, *, threads: int, batch_size: int = 1) -> Profiler:
        """Open a model's file and feed it an example.

        Raises:
            ModelError: the file is missing, or ONNX Runtime cannot open it.
        """
        try:
            return cls(model.path.read_bytes(), example_feed(model, batch_size), threads)
        except OSError as error:
            raise ModelError(
                f"{model.path}: ONNX Runtime cannot open the model: {error.strerror}"
            ) from error

    def run(self, times: int) -> None:
        """Run the model so many times."""
        for _ in range(times):
            self._session.run(None, self._feed)

    def runs_in(self, seconds: float, most: int) -> int:
        """Warm up, and return how many runs fill so many seconds: 1 to ``most``."""
        self.run(WARM_UP_RUNS)
        start = time.perf_counter()
        self.run(1)
        return min(most, max(1, math.ceil(seconds / (time.perf_counter() - start))))

    def readers(self) -> dict[str, tuple[str, ...]]:
        """Return the nodes that each node of the optimized graph reads from, by name."""
        import onnx

        graph = onnx.load(self._optimized).graph
        producers = {tensor: node.name for node in graph.node for tensor in node.output}
        return {
            node.name: tuple(producers[tensor] for tensor in node.input if tensor in producers)
            for node in graph.node
        }

    def finish(self) -> dict[tuple[str, str], np.ndarray]:
        """Return what each node took in each run so far: (name, operator) -> microseconds."""
        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text())
        self._folder.cleanup()
        found: dict[tuple[str, str], list[int]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
                node = (event["name"].removesuffix(KERNEL), event["args"]["op_name"])
                found.setdefault(node, []).append(event["dur"])
        return {node: np.array(durations) for node, durations in found.items()}


def profile_nodes(
    model: OnnxModel, *, threads: int, batch_size: int = 1, runs: int = 100
) -> list[NodeTime]:
    """Time every node of a model in place.

    Args:
        model: any model that ONNX Runtime opens on the CPU.
        threads: threads inside an operator.
        batch_size: samples a run.
        runs: runs that are averaged.

    Returns:
        The nodes in the order of execution.

    Raises:
        ModelError: ONNX Runtime cannot open it.
    """
    profiler = Profiler.of(model, threads=threads, batch_size=batch_size)
    profiler.run(WARM_UP_RUNS + runs)
    reads = profiler.readers()
    return [
        NodeTime(name, operator, _undisturbed(durations[WARM_UP_RUNS:]), reads.get(name, ()))
        for (name, operator), durations in profiler.finish().items()
    ]


def _undisturbed(durations: np.ndarray) -> float:
    """Return the mean of the faster runs; a median of whole microseconds is too coarse."""
    kept = max(1, round(len(durations) * (1 - DISTURBED)))
    return float(np.sort(durations)[:kept].mean())
