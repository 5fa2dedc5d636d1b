"""One int8 model on two kinds of CPU: `make bench-portability`, about five minutes.

ResNet-56 is calibrated twice, with 8-bit weights (as for x86 with VNNI) and with 7-bit ones (as
for x86 without). Both bundles then answer the same images twice: as this machine computes, and in
a process from which all that AVX2 lacks is hidden (`without_vnni.c`). A machine that cannot hide it
gives the first half alone, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from table import Figure, publish

from deploykit import runtime
from deploykit.artifacts import OnnxModel, Signature
from deploykit.data import load_dataset
from deploykit.measure import measure_latency
from deploykit.recipe import parse_recipe
from deploykit.runtime import cpu_flags

ROOT = Path(__file__).parents[1]
DEPLOYKIT = (sys.executable, "-c", "from deploykit.cli import main; main()")
RECIPE = """\
schema: 1
name: portability
task: image-classification
target: cpu-x86-vnni
data:
  source: parquet
  train: {data}/train.parquet
  validation: {data}/validation.parquet
  test: {data}/test.parquet
  size: [32, 32]
  channels: 3
  normalize: {{mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
  limit: {limit}
model: {{name: resnet56, weights: {weights}}}
quantize: {{mode: ptq}}
"""
MODELS = {"fp32": "run/onnx/train.onnx", "8-bit": "8-bit/model.onnx", "7-bit": "7-bit/model.onnx"}


def run(*command: object, **options: Any) -> str:
    """Run a command that must succeed; return what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, **options)
    return done.stdout


def make_models(folder: Path, data: Path, weights: Path, limit: int) -> None:
    """Compress once and export twice; keep the validation images and their labels."""
    recipe = RECIPE.format(data=data.resolve(), weights=weights.resolve(), limit=limit)
    (folder / "recipe.yaml").write_text(recipe)
    run(*DEPLOYKIT, "compress", folder / "recipe.yaml", "--out", folder / "run")
    run(*DEPLOYKIT, "export", folder / "run", "--out", folder / "8-bit")
    run(*DEPLOYKIT, "export", folder / "run", "--target", "cpu-x86-avx2", "--out", folder / "7-bit")
    section = parse_recipe(recipe)
    split = load_dataset(section.data, task=section.task, seed=0, base=Path()).validation
    np.savez(folder / "images.npz", images=split.load(np.arange(len(split))), labels=split.labels)


def examine(folder: Path) -> dict[str, Any]:
    """Answer and time everything in this process, on whatever CPU it believes to be on."""
    with np.load(folder / "images.npz") as held:
        images, labels = held["images"], held["labels"]
    manifest, contents = runtime.read_bundle(folder / "8-bit")
    signature = Signature.from_json(manifest)
    models = {name: OnnxModel(folder / file, signature, 20) for name, file in MODELS.items()}
    found: dict[str, Any] = {"correct": {}, "answers": {}}
    for name, model in models.items():
        session = runtime.open_session(model.path.read_bytes())
        logits = [runtime.run_model(session, images[i : i + 50]) for i in range(0, len(images), 50)]
        answers = np.concatenate(logits).argmax(axis=1)
        found["answers"][name] = answers.tolist()
        found["correct"][name] = float((answers == labels).mean())
    try:
        runtime.check_golden(manifest, contents, runtime.open_session(contents["model.onnx"]))
        found["refusal"] = ""
    except runtime.SelftestError as error:
        found["refusal"] = str(error)
    timed = measure_latency(models, threads=1, baseline="fp32", batch_sizes=(1,))
    found["latency_ms"] = {name: one["1"].median_ms for name, one in timed.items()}
    found["speedup"] = {name: one["1"].ratio for name, one in timed.items()}
    return found


def examine_elsewhere(folder: Path, hidden: bool) -> dict[str, Any] | None:
    """Examine in a fresh process; None where this machine cannot hide what it has."""
    settings = dict(os.environ)
    if hidden:
        compiler = shutil.which("cc")
        if compiler is None or "cpuid_fault" not in cpu_flags():
            return None
        library, source = folder / "without_vnni.so", Path(__file__).with_name("without_vnni.c")
        run(compiler, "-O1", "-shared", "-fPIC", source, "-o", library)
        settings["LD_PRELOAD"] = str(library)
    answer: dict[str, Any] = json.loads(
        run(sys.executable, __file__, "--examine", folder, env=settings)
    )
    return answer


def figures_of(here: dict[str, Any], there: dict[str, Any] | None) -> list[Figure]:
    """Put both CPUs side by side; only this one's figures where there is no other."""
    examined = {"with VNNI": here} | ({} if there is None else {"without": there})
    figures = [
        figure
        for name in MODELS
        for cpu, found in examined.items()
        for figure in (
            Figure(f"{name}, accuracy {cpu}", found["correct"][name], "{:.2%}"),
            Figure(f"{name}, batch 1 {cpu}", found["latency_ms"][name], "{:.3f} ms"),
            Figure(f"{name}, fp32 / this {cpu}", found["speedup"][name], "{:.2f}x"),
        )
    ]
    lost = {bits: here["correct"]["fp32"] - here["correct"][bits] for bits in ("8-bit", "7-bit")}
    figures += [
        Figure(f"{bits}, accuracy lost with VNNI", value, "{:+.2%}", at_most=0.01)
        for bits, value in lost.items()
    ]
    return figures if there is None else [*figures, *_compared(here, there)]


def _compared(here: dict[str, Any], there: dict[str, Any]) -> list[Figure]:
    def same(name: str) -> float:
        return float(np.mean(np.equal(here["answers"][name], there["answers"][name])))

    return [
        Figure("7-bit, equal answers on both", same("7-bit"), "{:.2%}", at_least=1),
        Figure("8-bit, equal answers on both", same("8-bit"), "{:.2%}"),
        Figure("8-bit bundle refused with VNNI", bool(here["refusal"]), "{:d}", at_most=0),
        Figure("8-bit bundle refused without", bool(there["refusal"]), "{:d}", at_least=1),
    ]


def main() -> int:
    """Make the models, examine them on both CPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", action="store_true", help="a few images; keeps no table")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/cifar10")
    parser.add_argument(
        "--weights",
        type=Path,
        default=ROOT / "../shared/weights/resnet56-cifar10jpeg.safetensors",
    )
    parser.add_argument("--examine", type=Path, help="a folder of models, in this very process")
    options = parser.parse_args()
    if options.examine is not None:
        json.dump(examine(options.examine), sys.stdout)
        return 0
    with tempfile.TemporaryDirectory(prefix="deploykit-") as scratch:
        folder = Path(scratch)
        make_models(folder, options.data, options.weights, 300 if options.trial else 3000)
        here = examine_elsewhere(folder, hidden=False)
        there = examine_elsewhere(folder, hidden=True)
    assert here is not None
    told = "This machine cannot hide VNNI: it takes Linux, cpuid_fault in /proc/cpuinfo, and cc."
    return publish(
        "portability",
        figures_of(here, there),
        about="ResNet-56 on 3,000 validation images of CIFAR-10 (JPEG), calibrated on 512 training "
        "images; ONNX Runtime, 1 thread. Without VNNI: the same machine, in a process from which "
        "AVX-512, VNNI and AMX are hidden.",
        command="make bench-portability",
        details=[told if there is None else f"Golden samples without VNNI: {there['refusal']}."],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
