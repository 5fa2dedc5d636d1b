"""ResNet-20 on CIFAR-10, from published weights to integers: `make bench-cifar10`.

Runs `recipes/cifar10_resnet20.yaml`, which takes about an hour on two cores; `--run FOLDER`
reads a finished run in its place.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
from table import Figure, publish

from deploykit.artifacts import JsonDict, OnnxModel, Signature, TensorSpec
from deploykit.exporter import export_onnx
from deploykit.job import read_data
from deploykit.measure import Latency, evaluate_onnx, measure_latency
from deploykit.run_folder import RunFolder
from deploykit.start import initial_candidate

ROOT = Path(__file__).parents[1]
DEPLOYKIT = str(Path(sys.executable).with_name("deploykit"))
INTEGERS = "integers"  # input of the model without normalization


def published_accuracy(run: RunFolder, folder: Path, limit: int | None) -> float:
    """Return the test accuracy of the weights that the run began with."""
    recipe = run.recipe()
    data = recipe.data if limit is None else recipe.data.model_copy(update={"limit": limit})
    recipe = recipe.model_copy(update={"data": data})
    dataset = read_data(recipe)
    candidate = initial_candidate(recipe, dataset, None)
    model = export_onnx(candidate, folder / "published.onnx", name="published")
    return evaluate_onnx(model, dataset.test, threads=recipe.threads).accuracy


def without_normalization(model: OnnxModel, path: Path) -> OnnxModel:
    """Write the model that begins where the shipped one has its first integers.

    The shipped model reads pixels ``(N, H, W, C)``, turns them to ``(N, C, H, W)`` and
    dequantizes them; this one takes those integers, turned already, and dequantizes them as
    any layer does: a fused kernel reads them as they are.
    """
    proto = onnx.load(model.path)
    graph, (spec,) = proto.graph, model.signature.inputs
    (turn,) = [node for node in graph.node if node.input[:1] == [spec.name]]
    (first,) = [node for node in graph.node if turn.output[0] in node.input]
    if (turn.op_type, first.op_type) != ("Transpose", "DequantizeLinear"):
        raise ValueError(f"expected pixels as the first integers, got {first.op_type}")
    batch, height, width, channels = spec.shape
    turned = TensorSpec(INTEGERS, spec.dtype, (batch, channels, height, width))
    first.input[0] = INTEGERS
    graph.node.remove(turn)
    graph.input[0].CopyFrom(
        onnx.helper.make_tensor_value_info(
            INTEGERS, onnx.TensorProto.UINT8, ["batch", *turned.shape[1:]]
        )
    )
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    return replace(model, path=path, signature=replace(model.signature, inputs=(turned,)))


def normalization_cost(
    shipped: OnnxModel, folder: Path, threads: int, *, seconds: float, precision: float
) -> Latency:
    """Compare the shipped model, as baseline, with the one without normalization at batch 1."""
    models = {"shipped": shipped, "bare": without_normalization(shipped, folder / "bare.onnx")}
    measured = measure_latency(
        models,
        threads=threads,
        baseline="shipped",
        batch_sizes=(1,),
        precision=precision,
        seconds_per_model=seconds,
    )
    return measured["bare"]["1"]


def shipped_model(run: RunFolder, report: JsonDict) -> OnnxModel:
    """Return the final model of a finished run."""
    about = report["details"]["model"]
    signature = Signature.from_json(about["signature"])
    return OnnxModel(run.onnx(report["final"]["name"]), signature, about["opset"])


def main() -> int:
    """Run the recipe, or read a run of it, and hold it to what it promises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run of the recipe")
    parser.add_argument("--trial", action="store_true", help="few samples; keeps no table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deploykit-") as name:
        folder = Path(name)
        path = options.run or folder / "run"
        if options.run is None:
            recipe = "recipes/cifar10_resnet20.yaml"
            subprocess.run([DEPLOYKIT, "compress", recipe, "--out", path], cwd=ROOT, check=True)
        run = RunFolder(path)
        report = json.loads((path / "report.json").read_text())
        published = published_accuracy(run, folder, 500 if options.trial else None)
        cost = normalization_cost(
            shipped_model(run, report),
            folder,
            report["threads"],
            seconds=2 if options.trial else 30,
            precision=0.05 if options.trial else 0.003,
        )
    return tell(report, published, cost, keep=not options.trial)


def tell(report: JsonDict, published: float, cost: Latency, *, keep: bool) -> int:
    """Publish the figures."""
    baseline, final, fusion = report["baseline"], report["final"], report["details"]["fusion"]
    drop, (low, high) = report["drop"]["value"], report["drop"]["interval"]
    first, last = cost.interval
    figures = [
        Figure("published weights, test accuracy", published, "{:.2%}"),
        Figure("fine-tuned fp32, test accuracy", baseline["accuracy"], "{:.2%}", at_least=0.88),
        Figure("final, test accuracy", final["accuracy"], "{:.2%}"),
        Figure("test accuracy lost", drop, "{:.2%}", at_most=0.01),
        Figure("layers that run in integers", len(fusion["integer"]), "{:d}"),
        Figure("layers that stayed in float", len(fusion["float"]), "{:d}", at_most=0),
        Figure("fp32 latency, batch 1", baseline["latency_ms"]["1"], "{:.3f} ms"),
        Figure("final latency, batch 1", final["latency_ms"]["1"], "{:.3f} ms"),
        Figure("final / fp32 latency, batch 1", 1 / final["speedup"]["1"], "{:.2f}x", at_most=0.65),
        Figure("final / fp32 latency, batch 32", 1 / final["speedup"]["32"], "{:.2f}x"),
        Figure("fp32 / final ONNX size", baseline["size_bytes"] / final["size_bytes"], "{:.2f}x"),
        Figure("normalization's share of the latency", 1 - 1 / cost.ratio, "{:.2%}", at_most=0.03),
        Figure(
            "compress, wall time",
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
            f"of normalization's share: {1 - 1 / first:.2%} to {1 - 1 / last:.2%}.",
        ],
        keep=keep,
    )


if __name__ == "__main__":
    sys.exit(main())
