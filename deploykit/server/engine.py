"""One version of a model, opened for serving and proven before it answers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import runtime
from deploykit.bundle import told_as_deploykit
from deploykit.errors import MissingDependency
from deploykit.server.refusal import Refusal
from deploykit.targets import CPU, TARGETS

# A pool of threads that spins between runs takes the cores from those that parse requests.
CONFIG = {"session.intra_op.allow_spinning": "0"}
WARM_UP_S = 1.0  # a worker that takes a dead one's place is awaited
TIMED_RUNS = 10
# What a run costs beside the session: two threads wake each other, and share an interpreter.
HAND_OVER_S = 0.0002
PAYS = 1.05


@dataclass(frozen=True)
class ModelInfo:
    """What the server tells about one version of a model.

    Attributes:
        name: of the model.
        version: of the model.
        provider: execution provider that computes, as ONNX Runtime names it.
        manifest: of the bundle.
    """

    name: str
    version: str
    provider: str
    manifest: Mapping[str, Any]

    @property
    def labels(self) -> Sequence[str]:
        """The classes in the order of the logits; empty where they have no names."""
        labels: Sequence[str] = self.manifest["labels"]
        return labels


class Engine:
    """A session. It runs one batch at a time: nobody calls ``run`` twice at once.

    Attributes:
        batch: samples in a run that pay; more of them take as long a sample.
    """

    batch = 1

    def __init__(self, info: ModelInfo, session: Any) -> None:
        self.info, self._session = info, session
        source, result = info.manifest["inputs"][0], info.manifest["outputs"][0]
        self.dtype = np.dtype(source["dtype"])
        self.sample_shape = tuple(source["shape"][1:])
        self._input, self._output = source["name"], result["name"]
        self._on_cpu = info.provider == CPU

    def run(self, batch: np.ndarray, options: Any = None) -> np.ndarray:
        """Return the outputs of a batch.

        Args:
            batch: ``(N, ...)`` as the model takes it.
            options: onnxruntime.RunOptions; ``terminate`` set by another thread ends the run.

        Raises:
            Refusal: 422, the model does not take these values.
        """
        try:
            if self._on_cpu:
                outputs: np.ndarray = self._session.run(None, {self._input: batch}, options)[0]
                return outputs
            return self._run_bound(batch, options)
        except Exception as error:  # onnxruntime raises a class of its own for each fault
            raise Refusal(422, f"the model refused the input: {_cause(error)}") from error

    def _run_bound(self, batch: np.ndarray, options: Any) -> np.ndarray:
        """Let ONNX Runtime copy to and from the device by itself, once each."""
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._input, batch)
        binding.bind_output(self._output)
        self._session.run_with_iobinding(binding, options)
        outputs: np.ndarray = binding.copy_outputs_to_cpu()[0]
        return outputs


def open_engine(path: Path, *, threads: int, require_gpu: bool, max_batch: int) -> Engine:
    """Open a bundle, prove it by its golden samples and warm it.

    Args:
        path: the bundle's folder.
        threads: of a prediction on the CPU.
        require_gpu: whether the CPU is refused.
        max_batch: the largest batch that will be asked for.

    Raises:
        BundleError: the folder is not what its manifest says.
        VerificationError: the model gives other answers on this machine.
        MissingDependency: onnxruntime is too old, or a GPU is demanded and not there.
    """
    with told_as_deploykit():
        manifest, contents = runtime.read_bundle(path)
        session = _open(manifest, contents, threads)
        provider = session.get_providers()[0]
        if require_gpu and provider == CPU:
            raise MissingDependency(_why_no_gpu(manifest))
        prove = runtime.judge_here if provider == CPU else runtime.check_golden
        prove(manifest, contents, session)
    info = ModelInfo(manifest["name"], manifest["version"], provider, manifest)
    engine = Engine(info, session)
    engine.batch = _warm(engine, runtime.golden_inputs(contents), max_batch)
    return engine


def _open(manifest: Mapping[str, Any], contents: Mapping[str, bytes], threads: int) -> Any:
    """Open the model on the best provider of its target that is here, else on the CPU.

    ONNX Runtime falls back to the CPU without a word: the provider that it really uses is read
    from the session, and told wherever the model is.
    """
    target = TARGETS.get(manifest["target"])
    asked = target.providers if target is not None else (CPU,)
    providers = [name for name in asked if name in _available()] or [CPU]
    options = target.provider_options if target is not None else {}
    if providers[0] != CPU:
        import onnxruntime

        onnxruntime.preload_dlls()  # CUDA's libraries, where they came as Python packages
    return runtime.open_model(
        manifest,
        contents,
        threads,
        providers=providers,
        provider_options=options if providers[0] == asked[0] else {},
        config=CONFIG,
    )


def _available() -> list[str]:
    import onnxruntime

    found: list[str] = onnxruntime.get_available_providers()
    # What a machine without a GPU can do is known without trying, which would print a fault.
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists() and os.name == "posix":
        return [name for name in found if name == CPU]
    return found


def _why_no_gpu(manifest: Mapping[str, Any]) -> str:
    name, target = manifest["name"], manifest["target"]
    if TARGETS[target].providers[0] == CPU if target in TARGETS else True:
        return (
            f"{name}: expected a bundle for a GPU, as --require-gpu demands, got one for {target}; "
            "export it with --target cuda"
        )
    return (
        f"{name}: expected a GPU that onnxruntime can use, as --require-gpu demands, found none; "
        "install 'deploykit[gpu]' and the driver, or drop --require-gpu"
    )


def _warm(engine: Engine, inputs: np.ndarray, max_batch: int) -> int:
    """Run batches of powers of two, as far as time allows; return the size that pays.

    A larger batch than the smallest that is about as fast a sample as the best makes all of its
    requests wait for each other, and gains nothing.
    """
    batches: list[np.ndarray] = []
    size, stop = 1, time.perf_counter() + WARM_UP_S
    while size <= max_batch and time.perf_counter() < stop:
        batches.append(np.resize(inputs, (size, *inputs.shape[1:])))
        engine.run(batches[-1])  # memory is planned in the first run
        size *= 2
    # In turn, so that what disturbs the machine disturbs all sizes.
    rounds = [[_time(engine, batch) for batch in batches]]
    while len(rounds) < TIMED_RUNS and time.perf_counter() < stop:
        rounds.append([_time(engine, batch) for batch in batches])
    a_sample = {
        len(batch): (min(seconds) + HAND_OVER_S) / len(batch)
        for batch, *seconds in zip(batches, *rounds, strict=True)
    }
    enough = PAYS * min(a_sample.values())
    return next(size for size, seconds in a_sample.items() if seconds <= enough)


def _time(engine: Engine, batch: np.ndarray) -> float:
    started = time.perf_counter()
    engine.run(batch)
    return time.perf_counter() - started


def _cause(error: Exception) -> str:
    """Return what ONNX Runtime says, without its prefix of codes."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.rpartition(" : ")[2].rstrip(".")[:300]
