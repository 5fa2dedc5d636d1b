"""The Run: the folder that ``compress`` writes and everything later reads."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifacts import Candidate, JsonDict
from deploykit.errors import ModelError, UsageError, VerificationError
from deploykit.publish import LOCK, publish_folder, write_atomic, write_json
from deploykit.recipe.sections import Recipe

CHUNK = 64  # samples that are read at once


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    ``recipe.yaml`` (resolved), ``splits.json``, ``measurements.json``, ``report.json``,
    ``report.html``, ``candidates/STAGE/``, ``onnx/STAGE.onnx`` (what was measured),
    ``golden/`` (samples for the bundle), ``calibration.npy``, ``checkpoints/``, ``logs/``, and
    ``trials/N/`` with the stages of each try to hold a budget.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where interrupted trainings go on from."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """What was said while the run was made."""
        return self.path / "logs" / "compress.log"

    @property
    def calibration(self) -> Path:
        """Raw training samples that other targets are calibrated with."""
        return self.path / "calibration.npy"

    def latencies(self, stage: str, keep_float: Sequence[str] = ()) -> Path:
        """Return the file of what ``stage`` has measured, written before it decides by it.

        Args:
            stage: which one.
            keep_float: patterns of the layers in float that it was measured with.
        """
        parts = ["latencies", *([stage] if stage != "prune" else [])]
        if keep_float:
            parts.append(sha256("\n".join(keep_float).encode()).hexdigest()[:8])
        return self.path / f"{'-'.join(parts)}.json"

    @property
    def golden(self) -> Path:
        """Samples with their expected answers, as the bundle will hold them."""
        return self.path / "golden"

    def onnx(self, stage: str) -> Path:
        """Return the file of the model that was measured for ``stage``."""
        return self.path / "onnx" / f"{stage}.onnx"

    def measured_model(self, stage: str, expected: str | None) -> Path:
        """Return the file of ``stage``, whose SHA-256 is the ``expected`` one.

        Raises:
            ModelError: it cannot be read.
            VerificationError: it is not the file that was measured.
        """
        path = self.onnx(stage)
        try:
            found = sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ModelError(
                f"{path}: cannot be read: {error.strerror}; run compress --resume"
            ) from error
        if found != expected:
            raise VerificationError(
                f"{path}: expected the model that was measured, found another; "
                "run compress --resume"
            )
        return path

    def candidate(self, stage: str) -> Path:
        """Return the folder of the candidate that ``stage`` made."""
        return self.path / "candidates" / stage

    def trial(self, number: int) -> RunFolder:
        """Return the folder of one try to hold the budget; it is made."""
        path = self.path / "trials" / str(number)
        path.mkdir(parents=True, exist_ok=True)
        return RunFolder(path)

    def adopt(self, trial: RunFolder, stages: Sequence[str], measured: JsonDict) -> None:
        """Take over what a trial made.

        Args:
            trial: its folder, which stays as it is.
            stages: those that it made.
            measured: what ``measurements.json`` says beside the trial's own.
        """
        (self.path / "onnx").mkdir(exist_ok=True)
        for stage in stages:
            write_atomic(self.onnx(stage), trial.onnx(stage).read_bytes())
            if trial.candidate(stage).is_dir():
                with publish_folder(self.candidate(stage), force=True, kind="candidate") as staging:
                    shutil.copytree(trial.candidate(stage), staging, dirs_exist_ok=True)
        for record in trial.path.glob("latencies*.json"):
            write_atomic(self.path / record.name, record.read_bytes())
        own = trial.read_json("measurements.json") or {}
        self.write_json("measurements.json", {**own, **measured})

    def is_empty(self) -> bool:
        """Whether a process that was killed at its very beginning may have left the folder."""
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        return all(
            entry.name == LOCK or fnmatch(entry.name, ".recipe.yaml.????????.tmp")
            for entry in self.path.iterdir()
        )

    def clear(self) -> None:
        """Remove everything but the lock that this process holds.

        The recipe goes last: it tells that the folder is a run, should this be interrupted.
        """
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == "recipe.yaml"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def recipe(self) -> Recipe:
        """Read the resolved recipe.

        Raises:
            ModelError: the folder is not a finished or begun run.
        """
        from deploykit.recipe import load_recipe

        if not (self.path / "recipe.yaml").is_file():
            raise ModelError(
                f"{self.path}: expected a run with recipe.yaml, found none; "
                "make one with deploykit compress RECIPE --out RUN"
            )
        return load_recipe(self.path / "recipe.yaml")

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the recipe with every default."""
        from deploykit.recipe import dump_recipe

        write_atomic(self.path / "recipe.yaml", dump_recipe(recipe).encode())

    def save_candidate(self, candidate: Candidate) -> None:
        """Publish ``candidate`` under its stage; one given as an object stays in memory."""
        from deploykit.structure import save_candidate

        if str(candidate.structure["model"]["name"]).startswith("python:"):
            return
        with publish_folder(
            self.candidate(candidate.stage), force=True, kind="candidate"
        ) as staging:
            save_candidate(candidate, staging)

    def save_calibration(
        self, load: Callable[[np.ndarray], np.ndarray], rows: np.ndarray
    ) -> np.ndarray:
        """Keep the samples of ``rows``, read and written in chunks, and return them mapped.

        Memory does not grow with their number.
        """
        write_atomic(self.calibration, _npy_pieces(load, rows))
        samples: np.ndarray = np.load(self.calibration, mmap_mode="r", allow_pickle=False)
        return samples

    def read_json(self, name: str) -> JsonDict | None:
        """Return the content of a JSON file of the run, or None where it is not there yet.

        Raises:
            ModelError: the file is damaged.
        """
        path = self.path / name
        try:
            content: JsonDict = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path}: expected JSON, got {error}; run compress again") from error
        if not isinstance(content, dict):
            raise ModelError(f"{path}: expected a JSON object, got another; run compress again")
        return content

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a JSON file of the run."""
        write_json(self.path / name, value)


def _npy_pieces(load: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of a ``.npy`` file of samples."""
    for start in range(0, len(rows), CHUNK):
        samples = np.ascontiguousarray(load(rows[start : start + CHUNK]))
        if start == 0:
            described = {
                "descr": np.lib.format.dtype_to_descr(samples.dtype),
                "fortran_order": False,
                "shape": (len(rows), *samples.shape[1:]),
            }
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, described)
            yield header.getvalue()
        yield samples.tobytes()


def check_same_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Refuse to resume a run under another recipe.

    Raises:
        UsageError: naming the first key that differs.
    """
    before, now = run.recipe().model_dump(mode="json"), recipe.model_dump(mode="json")
    difference = _first_difference(before, now, "")
    if difference is not None:
        key, old, new = difference
        raise UsageError(
            f"{run.path}: --resume expects the recipe that the run began with, got {key} = {new!r} "
            f"in place of {old!r}; restore it, or start anew with --force"
        )


def _first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}".strip("."))
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)
