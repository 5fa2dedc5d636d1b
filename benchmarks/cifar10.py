"""ResNet-20 on CIFAR-10, from published weights to integers: `make bench-cifar10`.

Runs `recipes/cifar10_resnet20.yaml`, which takes half an hour on two cores; `--run FOLDER`
reads a finished run in its place.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

from recipe_run import finished_run, read_options
from table import Figure, publish

from deploykit.artifacts import JsonDict, OnnxModel, Signature
from deploykit.exporter import export_onnx
from deploykit.job import read_data
from deploykit.measure import evaluate_onnx, measure_normalization
from deploykit.run_folder import RunFolder
from deploykit.start import initial_candidate


def published_accuracy(run: RunFolder, folder: Path, limit: int | None) -> float:
    """Return the test accuracy of the weights that the run began with."""
    recipe = run.recipe()
    data = recipe.data if limit is None else recipe.data.model_copy(update={"limit": limit})
    recipe = recipe.model_copy(update={"data": data})
    dataset = read_data(recipe)
    candidate = initial_candidate(recipe, dataset, None)
    model = export_onnx(candidate, folder / "published.onnx", name="published")
    return evaluate_onnx(model, dataset.test, threads=recipe.threads).accuracy


def shipped_model(run: RunFolder, report: JsonDict) -> OnnxModel:
    """Return the final model of a finished run."""
    about = report["details"]["model"]
    signature = Signature.from_json(about["signature"])
    return OnnxModel(run.onnx(report["final"]["name"]), signature, about["opset"])


def main() -> int:
    """Run the recipe, or read a run of it, and hold it to what it promises."""
    options = read_options(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(prefix="deploykit-") as name:
        folder = Path(name)
        path = finished_run("recipes/cifar10_resnet20.yaml", options, folder)
        run = RunFolder(path)
        report = json.loads((path / "report.json").read_text())
        published = published_accuracy(run, folder, 500 if options.trial else None)
        cost = measure_normalization(
            shipped_model(run, report),
            threads=report["threads"],
            seconds_per_model=2 if options.trial else 30,
            precision=0.05 if options.trial else 0.003,
        )
    if cost is None:
        raise ValueError("expected a model that begins with normalization, got another")
    return tell(report, published, cost, keep=not options.trial)


def tell(report: JsonDict, published: float, cost: JsonDict, *, keep: bool) -> int:
    """Publish the figures."""
    baseline, final, fusion = report["baseline"], report["final"], report["details"].get("fusion")
    drop, (low, high) = report["drop"]["value"], report["drop"]["interval"]
    share, (least, most) = cost["share"], cost["interval"]

    def count(kind: str) -> float:
        return len(fusion[kind]) if fusion else math.nan  # integers that were refused

    figures = [
        Figure("published weights, test accuracy", published, "{:.2%}"),
        Figure("fine-tuned fp32, test accuracy", baseline["accuracy"], "{:.2%}", at_least=0.88),
        Figure("final, test accuracy", final["accuracy"], "{:.2%}"),
        Figure("test accuracy lost", drop, "{:.2%}", at_most=0.01),
        Figure("layers that run in integers", count("integer"), "{:.0f}"),
        Figure("layers that stayed in float", count("float"), "{:.0f}", at_most=0),
        Figure("fp32 latency, batch 1", baseline["latency_ms"]["1"], "{:.3f} ms"),
        Figure("final latency, batch 1", final["latency_ms"]["1"], "{:.3f} ms"),
        Figure("final / fp32 latency, batch 1", 1 / final["speedup"]["1"], "{:.2f}x", at_most=0.65),
        Figure("final / fp32 latency, batch 32", 1 / final["speedup"]["32"], "{:.2f}x"),
        Figure("fp32 / final ONNX size", baseline["size_bytes"] / final["size_bytes"], "{:.2f}x"),
        Figure("normalization's share of the latency", share, "{:.2%}", at_most=0.03),
        Figure(
            "stages of the run, wall time",
            sum(one["seconds"] for one in report["stages"]) / 60,
            "{:.0f} min",
        ),
    ]
    return publish(
        "cifar10",
        figures,
        about="`recipes/cifar10_resnet20.yaml`: accuracies and latencies are ONNX Runtime's, "
        f"{report['threads']} thread(s); the test rows are read after the last decision.",
        command="make bench-cifar10",
        details=[
            f"95% interval of the accuracy lost: {low:.2%} to {high:.2%}; "
            f"of normalization's share: {least:.2%} to {most:.2%}.",
        ],
        keep=keep,
    )


if __name__ == "__main__":
    sys.exit(main())
