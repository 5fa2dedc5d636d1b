"""What computes on a device: bound inputs and outputs, and the provider that is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import make_bundle

from deploykit import runtime
from deploykit.errors import MissingDependency
from deploykit.server.engine import Engine, ModelInfo, open_engine
from deploykit.server.refusal import Refusal
from deploykit.targets import CPU, CUDA, TARGETS, why_not_here

needs_gpu = pytest.mark.skipif(why_not_here(TARGETS["cuda"]) is not None, reason="needs CUDA")
NEAR = {"max_abs": 1e-2, "top1": False, "steps": None, "scale": None}


def opened(path: Path, **options: Any) -> Engine:
    return open_engine(path, **{"threads": 1, "require_gpu": False, "max_batch": 4} | options)


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 4, 4, 1), np.uint8)


def test_bound_tensors_give_the_same_bits(tmp_path: Path) -> None:
    """The CPU's provider can be bound too, so that the way of a device is tested everywhere."""
    manifest, contents = runtime.read_bundle(make_bundle(tmp_path))
    session = runtime.open_model(manifest, contents, 1)
    plain = Engine(ModelInfo("tiny", "1.0", CPU, manifest), session)
    bound = Engine(ModelInfo("tiny", "1.0", "a device", manifest), session)
    for count in (1, 3, 2):
        assert bound.run(pixels(count)).tobytes() == plain.run(pixels(count)).tobytes()
    with pytest.raises(Refusal, match="the model refused the input"):
        bound.run(np.zeros((1, 5, 5, 1), np.uint8))


def test_a_bundle_for_a_cpu_is_refused_where_a_gpu_is_demanded(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="export it with --target cuda"):
        opened(make_bundle(tmp_path), require_gpu=True)


@pytest.mark.skipif(why_not_here(TARGETS["cuda"]) is None, reason="needs a machine without CUDA")
def test_a_bundle_for_a_gpu_computes_on_the_cpu_where_there_is_none_and_says_so(
    tmp_path: Path,
) -> None:
    bundle = make_bundle(tmp_path, target="cuda")
    assert opened(bundle).info.provider == CPU
    with pytest.raises(MissingDependency, match="found none; install 'deploykit"):
        opened(bundle, require_gpu=True)


@pytest.mark.gpu
@needs_gpu
def test_a_bundle_for_a_gpu_computes_on_it_close_to_the_cpu(tmp_path: Path) -> None:
    engine = opened(make_bundle(tmp_path, target="cuda", tolerance=NEAR), require_gpu=True)
    assert engine.info.provider == CUDA
    on_cpu = opened(make_bundle(tmp_path / "cpu"))
    for count in (1, 4):
        found, expected = engine.run(pixels(count)), on_cpu.run(pixels(count))
        np.testing.assert_allclose(found, expected, atol=NEAR["max_abs"])


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
def test_what_is_exported_for_a_gpu_is_proven_on_it(
    tiny_run: Any, tmp_path: Path, deploykit: Any
) -> None:
    bundle = tmp_path / "bundle"
    assert deploykit("export", tiny_run.path, "--target", "cuda", "--out", bundle).code == 0
    assert opened(bundle, require_gpu=True).info.provider == CUDA
