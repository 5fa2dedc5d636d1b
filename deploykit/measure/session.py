"""A model under measurement: opened as the bundle's runner opens it, fed by its signature."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploykit import runtime
from deploykit.artifacts import OnnxModel
from deploykit.errors import MissingDependency, ModelError
from deploykit.seeds import stable_seed
from deploykit.targets import Target


def open_model(model: OnnxModel, threads: int, target: Target | None = None) -> Any:
    """Open an ONNX file in ONNX Runtime, on the CPU or as ``target`` says.

    Raises:
        ModelError: the file is missing, or ONNX Runtime cannot open it.
        MissingDependency: ONNX Runtime is missing or lacks the provider.
    """
    try:
        data = model.path.read_bytes()
        if target is None:
            return runtime.open_session(data, threads)
        return runtime.open_session(data, threads, target.providers, target.provider_options)
    except OSError as error:
        raise ModelError(f"{model.path}: expected an ONNX file, got {error.strerror}") from error
    except runtime.PackageError as error:
        raise MissingDependency(str(error)) from error
    except runtime.RunnerError as error:
        raise ModelError(f"{model.path}: {error}") from error


def example_feed(model: OnnxModel, batch_size: int) -> dict[str, np.ndarray]:
    """Make random inputs of the model's signature; the same for every call.

    Floats are normal, integers uniform over their range: no kernel that ships here is faster
    for some values than for others.
    """
    generator = np.random.default_rng(stable_seed("example", batch_size))
    feed: dict[str, np.ndarray] = {}
    for spec in model.signature.inputs:
        shape = tuple(batch_size if size == -1 else size for size in spec.shape)
        dtype = np.dtype(spec.dtype)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            feed[spec.name] = generator.integers(limits.min, limits.max, shape, dtype, True)
        else:
            feed[spec.name] = generator.standard_normal(shape).astype(dtype)
    return feed
