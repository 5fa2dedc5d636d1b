"""The demo, measured: `make bench-digits`; needs a quiet machine, about two minutes."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import Figure, publish

ROOT = Path(__file__).parents[1]
DEPLOYKIT = str(Path(sys.executable).with_name("deploykit"))
TRIAL = ("train.epochs=2", "prune.epochs=1", "quantize.epochs=1", "budget=null")


def seconds_of(*command: str | Path) -> float:
    """Run a command that must succeed; return its wall time, process start included."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    """Run the recipe and everything that the demo does after it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", action="store_true", help="a few epochs; keeps no table")
    trial = parser.parse_args().trial
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        run, bundle = Path(folder) / "run", Path(folder) / "bundle"
        recipe = "recipes/digits.yaml"
        changes = [word for change in TRIAL for word in ("--set", change)] if trial else []
        compress = seconds_of(DEPLOYKIT, "compress", recipe, "--out", run, *changes)
        demo = compress + seconds_of(DEPLOYKIT, "export", run, "--out", bundle)
        demo += seconds_of(DEPLOYKIT, "verify", bundle)
        image = bundle / "golden" / "000.png"
        demo += seconds_of(DEPLOYKIT, "predict", bundle, image)
        predict = [seconds_of(sys.executable, bundle / "run.py", "predict", image) for _ in "12345"]
        report = json.loads((run / "report.json").read_text())
    helping = [seconds_of(DEPLOYKIT, "--help") for _ in range(10)]
    baseline, final = report["baseline"], report["final"]
    low, high = report["drop"]["interval"]
    figures = [
        Figure("fp32 test accuracy", baseline["accuracy"], "{:.2%}", at_least=0.97),
        Figure("final test accuracy", final["accuracy"], "{:.2%}", at_least=0.97),
        Figure("test accuracy lost", report["drop"]["value"], "{:.2%}", at_most=0.01),
        Figure("fp32 / final latency, batch 1", final["speedup"]["1"], "{:.2f}x", at_least=1.5),
        Figure("fp32 / final latency, batch 32", final["speedup"]["32"], "{:.2f}x", at_least=1.5),
        Figure("final latency, batch 1", final["latency_ms"]["1"], "{:.3f} ms"),
        Figure("final latency, batch 32", final["latency_ms"]["32"], "{:.3f} ms"),
        Figure(
            "fp32 / final ONNX size",
            baseline["size_bytes"] / final["size_bytes"],
            "{:.2f}x",
            at_least=3,
        ),
        Figure("compress, wall time", compress, "{:.1f} s"),
        Figure("compress, export, verify and predict", demo, "{:.1f} s", at_most=90),
        Figure("run.py predict, best of 5", min(predict), "{:.2f} s", at_most=1),
        Figure("run.py predict, median of 5", statistics.median(predict), "{:.2f} s", at_most=1),
        Figure(
            "deploykit --help, median of 10", statistics.median(helping), "{:.2f} s", at_most=0.4
        ),
    ]
    return publish(
        "digits",
        figures,
        about="`recipes/digits.yaml` from a fresh start; accuracies and latencies are ONNX "
        f"Runtime's, {report['threads']} thread(s).",
        command="make bench-digits",
        details=[f"95% interval of the accuracy lost: {low:.2%} to {high:.2%}."],
        keep=not trial,
    )


if __name__ == "__main__":
    sys.exit(main())
