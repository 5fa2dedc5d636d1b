"""A run of the whole pipeline in seconds: 300 digits, a narrow net, one epoch a stage."""

import hashlib
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.data import load_dataset
from deploykit.data.dataset import Dataset, Samples
from deploykit.measure import measure_latency, measure_normalization
from deploykit.publish import LOCK
from deploykit.recipe import load_recipe
from deploykit.recipe.paths import with_absolute_paths
from deploykit.recipe.sections import Recipe

RECIPE = """\
schema: 1
name: tiny
task: image-classification
data: {source: digits, limit: 300}
model: {name: digits-cnn, arguments: {widths: [16, 16, 16]}}
train: {epochs: 1, batch_size: 16, optimizer: {name: adamw, lr: 0.01}}
prune: {channel_ratio: 0.3, channel_multiple: 4, epochs: 1, unless_it_pays: keep}
quantize: {mode: qat, epochs: 1, calibration_samples: 64, unless_it_pays: keep}
verify: {samples: 32, min_agreement: 0.8}
"""
# The quickest run that exports: nothing is trained, and a dense net is calibrated.
CALIBRATED = """\
schema: 1
name: calibrated
task: image-classification
data: {source: digits, limit: 300}
model: {name: mlp, arguments: {hidden: [16]}}
quantize: {mode: ptq, calibration_samples: 64, unless_it_pays: keep}
verify: {samples: 32, min_agreement: 0.8}
"""
STAGES = ("train", "prune", "quantize")

# Figures that are measured in no time; no test asks how good they are.
QUICK = {
    name: partial(measure, seconds_per_model=0.05)
    for name, measure in (
        ("measure_latency", measure_latency),
        ("measure_normalization", measure_normalization),
    )
}


def measure_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let every stage be measured in no time."""
    for name, measure in QUICK.items():
        patch.setattr(f"deploykit.stages.{name}", measure)
    patch.setattr("deploykit.stages.peak_memory_bytes", lambda *_: 2**20)  # starts a process
    patch.setattr("deploykit.latency_model.SECONDS", 0.05)


@dataclass(frozen=True)
class RecordingSamples:
    """Passes samples on and notes which function of the pipeline asked for them."""

    inner: Samples
    reads: list[str] = field(default_factory=list)

    @property
    def digests(self) -> tuple[bytes, ...]:
        return self.inner.digests

    def origin(self, row: int, /) -> str:
        return self.inner.origin(row)

    def load(self, rows: np.ndarray) -> np.ndarray:
        self._note()
        return self.inner.load(rows)

    def raw(self, row: int) -> bytes:
        self._note()
        return self.inner.raw(row)

    def _note(self) -> None:
        import inspect

        callers = [frame.function for frame in inspect.stack()]
        known = {"make_report", "run_stages"}
        self.reads.append(next((name for name in callers if name in known), "somebody"))


@dataclass(frozen=True)
class TinyRun:
    """A finished run, the recipe it was made with, and who read its test split."""

    path: Path
    recipe_file: Path
    recipe: Recipe
    dataset: Dataset
    report: dict[str, Any]
    test_reads: tuple[str, ...]

    def copy(self, folder: Path) -> Path:
        """Copy the run to ``folder``, to be altered."""
        return Path(shutil.copytree(self.path, folder))


def read_recipe(path: Path) -> Recipe:
    return with_absolute_paths(load_recipe(path), path.parent)


def recording_dataset(recipe: Recipe) -> tuple[Dataset, list[str]]:
    dataset = load_dataset(recipe.data, task=recipe.task, seed=recipe.seed, base=Path())
    samples = RecordingSamples(dataset.test.samples)
    return replace(dataset, test=replace(dataset.test, samples=samples)), samples.reads


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    """Return what stands in a folder: the digest of each file, the kind of everything else."""
    return {
        str(path.relative_to(folder)): sha256(path)
        if path.is_file() and not path.is_symlink()
        else "other"
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts and path.name != LOCK
    }
