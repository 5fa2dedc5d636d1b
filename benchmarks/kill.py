"""kill -9 at random moments, then `--resume`: `make bench-kill`, about half an hour.

Every run is a shortened `recipes/digits.yaml`. Each is killed once, at a moment drawn from the
seed; what lies in its folder must be whole; resumed, it must end in the very model of a run
that nobody touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from safetensors import safe_open
from table import Figure, publish

from deploykit.recipe import load_recipe

ROOT = Path(__file__).parents[1]
DEPLOYKIT = str(Path(sys.executable).with_name("deploykit"))
SHORT = ("train.epochs=3", "prune.epochs=2", "quantize.epochs=2", "budget=null")
SEED = 0


@dataclass(frozen=True)
class Kill:
    """What one kill left, and what its resumed run came to.

    Attributes:
        moment: seconds after the process was started.
        seen: what stood in the folder: the last words of the log.
        files: how many files were looked at.
        broken: those that were not whole.
        same: whether the resumed run ended in the model of the uninterrupted one.
    """

    moment: float
    seen: str
    files: int
    broken: tuple[str, ...]
    same: bool

    def line(self, number: int) -> str:
        """Return the kill as a row."""
        whole = f"{self.files} files whole" if not self.broken else f"BROKEN: {self.broken}"
        end = "same model" if self.same else "ANOTHER MODEL"
        return f"| {number} | {self.moment:.2f} s | {self.seen} | {whole} | {end} |"


def start(run: Path) -> subprocess.Popen[bytes]:
    """Start `compress --resume` in a process group of its own."""
    options = [word for change in SHORT for word in ("--set", change)]
    command = [DEPLOYKIT, "compress", "recipes/digits.yaml", "--out", run, "--resume", *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    _, said = process.communicate()
    if process.returncode:
        last = (said.decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"compress: expected exit code 0, got {process.returncode}: {last}")


def model_hash(run: Path) -> str:
    """Return the hash of a finished run's model."""
    report = json.loads((run / "report.json").read_text())
    return str(report["details"]["model"]["sha256"])


def killed_run(run: Path, moment: float) -> bool:
    """Start a run and kill it; False if it was done before."""
    process = start(run)
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    finish(process)
    return False


def published_files(run: Path) -> Iterator[Path]:
    """Yield the files that bear their final name, in folders that do."""
    for path in sorted(run.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(run).parts)
        if path.is_file() and not hidden:
            yield path


def is_whole(path: Path) -> bool:
    """Read a file as its readers do; every kind that a run publishes is known."""
    try:
        if path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                return all(file.get_tensor(name).size >= 0 for name in file.keys())  # noqa: SIM118
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".yaml":
            load_recipe(path)
        elif path.suffix == ".npy":
            with path.open("rb") as file:
                np.load(file, allow_pickle=False)
        elif path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return all(arrays[name].size >= 0 for name in arrays.files)
        elif path.suffix == ".html":
            return path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".png":
            return path.read_bytes().endswith(b"IEND\xaeB`\x82")
        else:
            return path.suffix == ".log"
    except Exception:  # noqa: BLE001 - whatever its reader raises, the file is not whole
        return False
    return True


def last_words(run: Path) -> str:
    """Return what the run had told last."""
    log = run / "logs" / "compress.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return lines[-1].partition(" ")[2][:50].replace("|", "/") if lines else "nothing told yet"


def kill_and_resume(run: Path, moment: float, expected: str) -> Kill | None:
    """Kill a run, look at what is there, resume it; None if it was done before."""
    if not killed_run(run, moment):
        return None
    files = list(published_files(run))
    broken = tuple(str(file.relative_to(run)) for file in files if not is_whole(file))
    seen = last_words(run)
    finish(start(run))
    return Kill(moment, seen, len(files), broken, model_hash(run) == expected)


def kills(count: int, folder: Path) -> Iterator[Kill]:
    """Yield so many kills, at moments spread over the time that a run takes."""
    began = time.perf_counter()
    finish(start(folder / "whole"))
    seconds = time.perf_counter() - began
    expected = model_hash(folder / "whole")
    drawn, found = random.Random(SEED), 0
    for attempt in range(10 * count):
        if found == count:
            return
        kill = kill_and_resume(folder / str(attempt), drawn.uniform(0, seconds), expected)
        if kill is None:  # this run was faster than the first: the moment lies after its end
            continue
        found += 1
        sys.stdout.write(f"{kill.line(found)}\n")
        sys.stdout.flush()
        yield kill


def main() -> int:
    """Kill and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--trial", action="store_true", help="two kills; keeps no table")
    options = parser.parse_args()
    count = 2 if options.trial else options.kills
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        found = list(kills(count, Path(folder)))
    figures = [
        Figure("kills", len(found), "{:d}", at_least=count),
        Figure("resumed to the same model", sum(kill.same for kill in found), "{:d}", count),
        Figure("broken files", sum(len(kill.broken) for kill in found), "{:d}", at_most=0),
    ]
    rows = [kill.line(number) for number, kill in enumerate(found, 1)]
    return publish(
        "kill",
        figures,
        about=f"SIGKILL to `deploykit compress recipes/digits.yaml --resume` "
        f"({', '.join(SHORT)}) at random moments, seed {SEED}; then `--resume` to the end.",
        command="make bench-kill",
        details=["| kill | at | last told | found | resumed to |", "|---|---|---|---|---|", *rows],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
