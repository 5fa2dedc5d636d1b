"""ResNet-20 on every target: `make bench-targets`; five minutes where its run is finished.

Runs `recipes/cifar10_resnet20.yaml`, or reads a finished run of it (`--run FOLDER`), and exports it
for each target. A latency that cannot be taken on its target here is null; that of the web takes
playwright and Chromium.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from browser import BROWSERS, Seen, browser_answers, chromium
from recipe_run import finished_run, read_options
from table import Figure, publish

from deploykit import runtime
from deploykit.artifacts import JsonDict, OnnxModel, Signature
from deploykit.errors import DeploykitError
from deploykit.measure import measure_latency
from deploykit.run_folder import RunFolder
from deploykit.ship import export_run
from deploykit.targets import TARGETS, about_integers, resolve_target, why_not_here

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/cifar10_resnet20.yaml"
MADE_FOR = {
    "int8 for VNNI": "cpu-x86-vnni",
    "int8, 7-bit weights": "cpu-x86-avx2",
    "fp16": "cuda",
    "web": "web",
}
PACKAGES = ("numpy", "onnxruntime", "pillow")
STARTS = 5
ASKED = 200  # of a browser, one sample each
Latencies = dict[str, float]  # by batch size, ms


@dataclass(frozen=True)
class Row:
    """The model as it is made for one target.

    Attributes:
        name: in the table.
        target: where it is to run.
        model: its file.
        accuracy: on the test split, by ONNX Runtime; None where the data are gone.
        bundle_bytes: of the zip file that ships; None for the float model, which is in none.
    """

    name: str
    target: str
    model: OnnxModel
    accuracy: float | None
    bundle_bytes: int | None

    @property
    def model_bytes(self) -> int:
        """Size of the ONNX file."""
        return self.model.path.stat().st_size


@dataclass(frozen=True)
class Refused:
    """A target that the model could not be made for here.

    Attributes:
        name: in the table.
        target: where it was to run.
        why: in a sentence.
    """

    name: str
    target: str
    why: str


def float_row(run: RunFolder, report: JsonDict) -> Row:
    """Return the float model that the run began with, as it was measured."""
    signature = Signature.from_json(report["details"]["model"]["signature"])
    model = OnnxModel(run.onnx("train"), signature, report["details"]["model"]["opset"])
    target = resolve_target(report["target"]).name
    return Row("fp32", target, model, report["baseline"]["accuracy"], None)


def made_row(name: str, target: str, run: RunFolder, folder: Path) -> Row:
    """Export the run for a target.

    Raises:
        DeploykitError: it cannot be made for it, or not within the budget.
    """
    path = export_run(run.path, folder / f"{target}.zip", target=target, format="zip")
    manifest, contents = runtime.read_bundle(path)
    file = folder / f"{target}.onnx"
    file.write_bytes(contents[runtime.MODEL])
    model = OnnxModel(file, Signature.from_json(manifest), manifest["opset"])
    return Row(name, target, model, manifest["measured"]["accuracy"], path.stat().st_size)


def make_rows(run: RunFolder, report: JsonDict, folder: Path) -> tuple[list[Row], list[Refused]]:
    """Return the rows, and those that could not be made."""
    rows = [float_row(run, report)]
    refused: list[Refused] = []
    for name, target in MADE_FOR.items():
        try:
            rows.append(made_row(name, target, run, folder))
        except DeploykitError as error:
            refused.append(Refused(name, target, str(error)))
    return rows, refused


def time_rows(rows: Sequence[Row], threads: int, seconds: float) -> dict[str, Latencies]:
    """Time what runs on its target here: models of the CPU in the same rounds, others alone."""
    here = [row for row in rows if row.name == "fp32" or why_not_here(TARGETS[row.target]) is None]
    on_cpu = {row.name: row.model for row in here if TARGETS[row.target].providers == runtime.CPU}
    timed = measure_latency(on_cpu, threads=threads, baseline="fp32", seconds_per_model=seconds)
    for row in here:
        if row.name not in on_cpu:
            timed |= measure_latency(
                {row.name: row.model},
                threads=threads,
                baseline=row.name,
                seconds_per_model=seconds,
                target=TARGETS[row.target],
            )
    return {
        name: {batch: latency.median_ms for batch, latency in found.items()}
        for name, found in timed.items()
    }


def time_in_browser(bundle: Path, folder: Path) -> Latencies | None:
    """Time a site in Chromium, one thread, one sample at a time; None where there is no browser."""
    if find_spec("playwright") is None or not any(map(shutil.which, BROWSERS)):
        return None
    shutil.unpack_archive(bundle, folder)
    golden = sorted(path.read_bytes() for path in (folder / "golden").glob("[0-9]*"))
    files = (golden * ASKED)[:ASKED]
    with chromium() as browser:
        found = browser_answers(browser, folder, "alone", files, 1, Seen())
    return {"1": found["run_ms"]}


def pinned(package: str) -> str:
    """Return the requirement that `constraints.txt` has of a package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def start_up(bundle: Path, folder: Path) -> tuple[float, list[str]]:
    """Unzip, selftest and predict in an environment of three packages.

    Args:
        bundle: a zip file that is right for this CPU.
        folder: for the environment.

    Returns:
        The median of some goes, in seconds, and what it could import of that it should not.
    """
    subprocess.run([sys.executable, "-m", "venv", folder / "three"], check=True)
    python = folder / "three/bin/python"
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([python, *install, *map(pinned, PACKAGES)], check=True)
    found = [
        name
        for name in ("deploykit", "torch")
        if subprocess.run(
            [python, "-c", f"import {name}"], cwd=folder, capture_output=True
        ).returncode
        == 0
    ]
    return statistics.median(
        one_start(python, bundle, folder / str(i)) for i in range(STARTS)
    ), found


def one_start(python: Path, bundle: Path, folder: Path) -> float:
    """Return the wall time of the three commands, each a process of its own; seconds."""
    sample = min(name for name in runtime.read_bundle(bundle)[1] if name.startswith("golden/0"))
    folder.mkdir()
    begun = time.perf_counter()
    for command in (
        ["-m", "zipfile", "-e", bundle, folder],
        [folder / "run.py", "selftest"],
        [folder / "run.py", "predict", folder / sample],
    ):
        subprocess.run([python, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def table_of(
    rows: Sequence[Row], timed: Mapping[str, Latencies], refused: Sequence[Refused]
) -> Iterator[str]:
    """Write the rows side by side."""
    yield "| model | target | test accuracy | batch 1, ms | batch 32, ms | ONNX, kB | bundle, kB |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        latencies = timed.get(row.name, {})
        cells = [
            row.name,
            row.target,
            "unknown" if row.accuracy is None else f"{row.accuracy:.2%}",
            *(f"{latencies[b]:.3f}" if b in latencies else "null" for b in ("1", "32")),
            f"{row.model_bytes / 1000:.0f}",
            "" if row.bundle_bytes is None else f"{row.bundle_bytes / 1000:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"
    for one in refused:
        yield f"| {one.name} | {one.target} | null | null | null | null | null |"


def remarks(
    rows: Sequence[Row], timed: Mapping[str, Latencies], refused: Sequence[Refused]
) -> Iterator[str]:
    """Say of each figure that was not taken why it was not, and which integers are others' own."""
    yield from (f"{one.name}: null: it could not be made here: {one.why}." for one in refused)
    for row in rows:
        if told := about_integers(TARGETS[row.target]):
            yield f"{row.name}: {told}."
        if row.name not in timed:
            why = why_not_here(TARGETS[row.target])
            none = " and playwright or Chromium is missing here" if row.target == "web" else ""
            yield f"Latency of {row.name}: null: {why}{none}."


def figures_of(
    rows: Sequence[Row],
    timed: Mapping[str, Latencies],
    refused: Sequence[Refused],
    checkpoint_bytes: int,
    started: tuple[float, list[str]],
) -> list[Figure]:
    """Return what is promised, and sizes against what a user had before."""
    whole, *others = rows
    seconds, importable = started
    figures = [
        Figure("targets that it could not be made for", len(refused), "{:d}", at_most=0),
        Figure("unzip, selftest and predict, three packages", seconds, "{:.2f} s", at_most=2),
        Figure("of deploykit and torch importable there", len(importable), "{:d}", at_most=0),
        Figure("torch checkpoint (safetensors)", checkpoint_bytes / 1000, "{:.0f} kB"),
        Figure("fp32 ONNX", whole.model_bytes / 1000, "{:.0f} kB"),
    ]
    for row in others:
        lost = math.nan
        if row.accuracy is not None and whole.accuracy is not None:
            lost = whole.accuracy - row.accuracy
        figures.append(Figure(f"{row.name}: test accuracy lost", lost, "{:+.2%}"))
        if row.name in timed and row.target.startswith("cpu-"):
            ratio = timed["fp32"]["1"] / timed[row.name]["1"]
            figures.append(Figure(f"{row.name}: fp32 / this, batch 1", ratio, "{:.2f}x"))
        smaller = whole.model_bytes / row.model_bytes
        figures.append(Figure(f"{row.name}: fp32 ONNX / ONNX", smaller, "{:.2f}x"))
        if row.bundle_bytes is not None and row.target != "web":  # which brings its runtime along
            figures += [
                Figure(f"{row.name}: {what} / bundle", size / row.bundle_bytes, "{:.2f}x")
                for what, size in (
                    ("fp32 ONNX", whole.model_bytes),
                    ("torch checkpoint", checkpoint_bytes),
                )
            ]
    return figures


def main() -> int:
    """Export a run for every target and set them side by side."""
    options = read_options(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(prefix="deploykit-") as scratch:
        folder = Path(scratch)
        path = finished_run(RECIPE, options, folder)
        run, report = RunFolder(path), json.loads((path / "report.json").read_text())
        rows, refused = make_rows(run, report, folder)
        timed = time_rows(rows, report["threads"], 2 if options.trial else 30)
        if any(row.target == "web" for row in rows):
            in_browser = time_in_browser(folder / "web.zip", folder / "site")
            timed |= {} if in_browser is None else {"web": in_browser}
        started = start_up(export_run(path, folder / "here.zip", format="zip"), folder)
        checkpoint_bytes = (run.candidate("train") / "model.safetensors").stat().st_size
        details = [*table_of(rows, timed, refused), "", *remarks(rows, timed, refused)]
        figures = figures_of(rows, timed, refused, checkpoint_bytes, started)
    return publish(
        "targets",
        figures,
        about=f"`{RECIPE}`, exported for every target. Latency: ONNX Runtime, {report['threads']} "
        "thread(s), models of the CPU in the same rounds; of the web onnxruntime-web in Chromium, "
        "one thread, batch 1; null where this machine is not the target. A bundle is the zip file "
        "with model, proof and runner; for the web, with page and runtime.",
        command="make bench-targets",
        details=details,
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
