"""A run that is killed or stopped, again and again, ends as one that never was."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from safetensors import safe_open
from tiny_run import STAGES, sha256

from deploykit.recipe import load_recipe

# Kills or stops its own process at a named moment: deterministic, and as real as from outside.
DRIVER = """
import os, signal, sys
from functools import partial
import deploykit.latency_model
import deploykit.measure
import deploykit.stages
from deploykit.progress import ConsoleProgress

kind, event, number = sys.argv[1].split(":")
del sys.argv[1]
counts = {}

def at(name, real):
    def told(self, *arguments, **options):
        seen = f"{name} {arguments[0]}" if name in ("stage_started", "message") else name
        counts[seen] = counts.get(seen, 0) + 1
        if seen == event and counts[seen] == int(number):
            os.kill(os.getpid(), getattr(signal, kind))
        return real(self, *arguments, **options)
    return told

for name in ("stage_started", "step_done", "message"):
    setattr(ConsoleProgress, name, at(name, getattr(ConsoleProgress, name)))
for name in ("measure_latency", "measure_normalization"):
    quick = partial(getattr(deploykit.stages, name), seconds_per_model=0.05)
    setattr(deploykit.stages, name, quick)
deploykit.latency_model.SECONDS = 0.05
deploykit.measure.Latency.decided = deploykit.measure.Latency.shown = 1.0
from deploykit.cli import main
main()
"""
MOMENTS = {
    "in a step of train": ("SIGKILL:step_done:5", -9),
    "stopped in train": ("SIGTERM:step_done:9", 143),
    "between the stages": ("SIGKILL:stage_started prune-1:1", -9),
    "stopped in quantize": ("SIGINT:stage_started quantize:1", 130),
    "while it is measured": ("SIGKILL:message measuring latency:1", -9),
}


def broken_files(run: Path) -> list[str]:
    """Return the visible files of a run that are not whole."""
    broken = []
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in file.relative_to(run).parts):
            continue
        try:
            read(file)
        except Exception:  # noqa: BLE001 - whatever the reader of the kind raises
            broken.append(str(file.relative_to(run)))
    return broken


def read(file: Path) -> None:
    if file.name == "recipe.yaml":
        load_recipe(file)
    elif file.suffix == ".json":
        json.loads(file.read_text())
    elif file.suffix == ".onnx":
        onnx.checker.check_model(onnx.load(file), full_check=True)
    elif file.suffix == ".safetensors":
        with safe_open(file, "numpy") as tensors:
            assert list(tensors.keys())
    if file.name == "structure.json":
        weights = file.with_name("model.safetensors")
        assert sha256(weights) == json.loads(file.read_text())["weights_sha256"]


def run_until(moment: str, recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["compress", str(recipe), "--out", str(out), "--resume"]
    return subprocess.run(
        [sys.executable, "-c", DRIVER, moment, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DEPLOYKIT_DEBUG": ""},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_that_was_killed_and_stopped_ends_in_the_same_model(tiny_run, tmp_path):
    out = tmp_path / "run"
    for name, (moment, code) in MOMENTS.items():
        done = run_until(moment, tiny_run.recipe_file, out)
        assert done.returncode == code, f"{name}: {done.stderr}"
        assert "Traceback" not in done.stderr
        if code > 0:
            stopped = r"error: .*stopped by SIG(TERM|INT); --resume goes on from here\n$"
            assert re.search(stopped, done.stderr), done.stderr
        assert broken_files(out) == [], name
        assert not (out / "report.json").exists()
    log = (out / "logs/compress.log").read_text()
    assert "train: 1 epochs of 14 steps, 9 done before" in log, "the checkpoint was used"
    done = run_until("SIGKILL:never:1", tiny_run.recipe_file, out)
    assert done.returncode == 0, done.stderr
    assert broken_files(out) == []
    for stage in STAGES:
        model = f"onnx/{stage}.onnx"
        assert sha256(out / model) == sha256(tiny_run.path / model), stage
    report = json.loads((out / "report.json").read_text())
    assert report["final"]["accuracy"] == tiny_run.report["final"]["accuracy"]
    assert not [path for path in out.rglob(".*") if path.name != ".lock"], "nothing is left over"


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    ["onnx/prune.onnx", "candidates/train/model.safetensors", "report.json", "recipe.yaml"],
)
def test_half_a_file_would_be_seen(tiny_run, tmp_path, file):
    copy = tiny_run.copy(tmp_path / "run")
    assert broken_files(copy) == []
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: len(data) // 2])
    assert file.replace("model.safetensors", "structure.json") in broken_files(copy)
