"""Pruning by measured latency against pruning by counted channels: `make bench-pruning`.

ResNet-56 on CIFAR-10 as JPEG, from the weights of `recipes/cifar10_resnet56.yaml`. Torch-Pruning
removes inner channels of each block, the same share of every layer or ranked over all of them: as
few as bring the speed-up asked for, in integers and rounded to the kernels' block or not, or else
the share that is fastest. Ours is asked for the same latency as each of theirs. All win back
accuracy in the same training and are calibrated on the same samples. Then ours is asked for more
than channels alone can bring. Checkpoints and measured latencies are kept in `--folder`, so that
an interrupted benchmark goes on, as long as the code is the same.

The traps: two prunings by count that made integers slower when they were first measured, asked of
deploykit with its rounding of widths switched off. What it ships must not be slower.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from recipe_run import DEPLOYKIT, ROOT
from table import Figure, code_key, publish
from torch import Tensor, nn

from deploykit.artifacts import Candidate, OnnxModel
from deploykit.data import Dataset
from deploykit.environment import cache_folder
from deploykit.exporter import OPSET, export_onnx
from deploykit.job import read_data
from deploykit.latency_model import LatencyCost
from deploykit.measure import Evaluation, Latency, evaluate_onnx, measure_latency
from deploykit.measure.layer_times import LayerTimes
from deploykit.models.resnet_cifar import BasicBlock
from deploykit.progress import ConsoleProgress
from deploykit.prune import prune
from deploykit.quantize import calibrate
from deploykit.recipe import load_recipe
from deploykit.recipe.paths import with_absolute_paths
from deploykit.recipe.sections import PruneSection, Recipe
from deploykit.start import initial_candidate
from deploykit.statistics import paired_drop
from deploykit.structure import example_input
from deploykit.targets import resolve_target
from deploykit.train import Training, recover

RECIPE = ROOT / "recipes/cifar10_resnet56.yaml"
FOLDER = ROOT / "runs/pruning"
# Of integers over unpruned integers: asked of all, and of ours alone.
SPEEDUP, BEYOND = 1.2, 1.5
GRID = tuple(round(0.05 * place, 2) for place in range(1, 19))  # shares of the channels
SAME = 1.02  # latencies nearer than this are the same
SCOPES = ("uniform", "global")
CALIBRATION = 512
TRAPS = (("uniform", 0.3), ("global", 0.5))


@dataclass(frozen=True)
class Setting:
    """What all prunings share."""

    start: Candidate
    dataset: Dataset
    training: Training
    latency: LatencyCost
    epochs: int
    lr: float

    @property
    def recovery(self) -> PruneSection:
        """The training that follows each pruning."""
        return PruneSection(epochs=self.epochs, lr=self.lr)


def counted(
    module: nn.Module, example: Tensor, scope: str, ratio: float, multiple: int | None
) -> nn.Module:
    """Return a copy that Torch-Pruning has pruned, inner channels of the blocks only.

    It prunes the padded shortcuts of these nets wrongly, so the stream through them stays whole.

    Args:
        module: the whole model.
        example: of its input.
        scope: ``uniform`` or ``global``.
        ratio: share of the channels to remove.
        multiple: what it rounds widths to; None for not at all.
    """
    import torch_pruning

    pruned = copy.deepcopy(module).eval()
    inner = {id(part.conv1) for part in pruned.modules() if isinstance(part, BasicBlock)}
    layers = [part for part in pruned.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    torch_pruning.pruner.MagnitudePruner(
        pruned,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        round_to=multiple,
        ignored_layers=[part for part in layers if id(part) not in inner],
    ).step()
    return pruned


def as_fast(setting: Setting, scope: str, ms: float) -> tuple[float, nn.Module]:
    """Return the least share of channels whose removal is as fast as ``ms``, and the module.

    Rounded to the kernels' block or not, whichever is fast first; where none is, the fastest.
    """
    example, seen = example_input(setting.start, batch=2), []
    for ratio in GRID:
        for multiple in (setting.latency.target.channel_multiple, None):
            pruned = counted(setting.start.module, example, scope, ratio, multiple)
            found = setting.latency.measure(pruned)
            rounded = f", rounded to {multiple}" if multiple else ""
            print(f"Torch-Pruning, {scope}{rounded}: {ratio:.0%} gone, {found:.3f} ms", flush=True)
            if found <= ms * SAME:
                return ratio, pruned
            seen.append((found, ratio, pruned))
    _, ratio, module = min(seen, key=lambda one: one[0])
    return ratio, module


def ours(setting: Setting, asked: dict[str, float], name: str) -> Candidate:
    """Return ours, pruned to what is asked and trained."""
    section = setting.recovery.model_copy(update=asked)
    training = setting.training.in_folder(name)
    return prune(
        setting.start,
        training,
        section,
        target=setting.latency.target,
        latency=setting.latency,
    )


def theirs(setting: Setting, scope: str, ms: float) -> tuple[str, Candidate]:
    """Return Torch-Pruning's of a latency, trained, and what it is called."""
    ratio, module = as_fast(setting, scope, ms)
    teacher = setting.start.module
    stage = f"{scope}-{SPEEDUP:g}"
    recover(module, setting.training, setting.recovery, stage=stage, teacher=teacher, hold={})
    name = f"Torch-Pruning {scope} {ratio:.0%}"
    return name, replace(setting.start, module=module, stage="prune")


def prunings(setting: Setting, scopes: tuple[str, ...]) -> Iterator[tuple[str, Candidate]]:
    """Yield theirs and ours, trained: ours after each of theirs, at its latency."""
    for scope in scopes:
        name, rival = theirs(setting, scope, setting.latency.model.measured_ms / SPEEDUP)
        yield name, rival
        asked = {"latency_ms": setting.latency.measure(rival.module)}
        print(f"deploykit: to {asked['latency_ms']:.3f} ms, as {name}", flush=True)
        yield f"deploykit as {name}", ours(setting, asked, f"deploykit-as-{scope}")
    yield f"deploykit {BEYOND:g}x", ours(setting, {"speedup": BEYOND}, f"deploykit-{BEYOND:g}")


def shipped(setting: Setting, candidate: Candidate, path: Path) -> OnnxModel:
    """Calibrate and export."""
    rows = np.arange(min(CALIBRATION, len(setting.dataset.train)))
    samples = setting.dataset.train.load(rows)
    quantized = calibrate(candidate, samples, target=setting.latency.target)
    return export_onnx(quantized, path, name="pruned")


def trap(scope: str, ratio: float, whole: OnnxModel, folder: Path) -> tuple[Figure, str]:
    """Ask deploykit for a pruning that is a trap; return the speed of what ships over ``whole``.

    The text says whether the pruning was kept.
    """
    run = folder / f"trap-{scope}"
    changes = [
        "train=null",
        f"prune={{channel_ratio: {ratio}, scope: {scope}, channel_multiple: 1, epochs: 0}}",
        "quantize={mode: ptq}",
        "budget=null",
        "data.limit=1000",
        "verify.min_agreement=0.5",
    ]
    settings = [part for change in changes for part in ("--set", change)]
    subprocess.run([DEPLOYKIT, "compress", RECIPE, "--out", run, *settings], check=True)
    report = json.loads((run / "report.json").read_text())
    final = OnnxModel(run / f"onnx/{report['final']['name']}.onnx", whole.signature, OPSET)
    models = {"whole": whole, "trap": final}
    measured = measure_latency(models, threads=1, baseline="whole", batch_sizes=(1,))
    kept = next(one["kept"] for one in report["decisions"] if one["stage"] == "prune")
    text = f"{ratio:.0%} of the channels, {scope}, no rounding: speed of what ships"
    figure = Figure(text, measured["trap"]["1"].ratio, "{:.2f}x", at_least=1 / SAME)
    return figure, f"{text}: the pruning was {'kept' if kept else 'dropped'}."


def figures_of(
    accuracies: dict[str, Evaluation], latencies: dict[str, dict[str, Latency]]
) -> tuple[list[Figure], list[str]]:
    """Return accuracy and speed of each pruning, and how ours compares at the same latency."""
    figures, details = [], []
    for name, found in accuracies.items():
        ratio = latencies[name]["1"].ratio
        figures += [
            Figure(f"{name}: test accuracy", found.accuracy, "{:.2%}"),
            Figure(f"{name}: int8 speed at batch 1 over unpruned int8", ratio, "{:.2f}x"),
        ]
        rival = name.removeprefix("deploykit as ")
        if rival != name:
            lost, (low, high) = paired_drop(accuracies[rival].correct, found.correct)
            faster = ratio / latencies[rival]["1"].ratio
            figures += [
                Figure(f"{name}: accuracy lost against it", lost, "{:.2%}", at_most=0),
                Figure(f"{name}: speed over it", faster, "{:.2f}x", at_least=1 / SAME),
            ]
            details.append(f"{name}: {lost:.2%} lost (95%: {low:.2%} to {high:.2%}).")
    return figures, details


def read_setting(options: argparse.Namespace) -> tuple[Recipe, Setting]:
    """Load data and weights."""
    recipe = with_absolute_paths(load_recipe(RECIPE), RECIPE.parent)
    if options.trial:
        data = recipe.data.model_copy(update={"limit": 500})
        recipe = recipe.model_copy(update={"data": data})
    dataset = read_data(recipe)
    start = initial_candidate(recipe, dataset, None)
    dataset = replace(dataset, preprocess=start.signature.preprocess)
    assert recipe.train is not None
    plan = recipe.train.model_copy(update={"average": None})
    folder = None if options.trial else options.folder / code_key(options.epochs, options.lr)
    training = Training(
        dataset,
        plan=plan,
        augment=recipe.data.augment,
        seed=recipe.seed,
        checkpoints=folder,
        progress=ConsoleProgress(),
    )
    times = LayerTimes.open(cache_folder(), recipe.threads)
    record = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "latencies.json"
    latency = LatencyCost(start, resolve_target("cpu"), "int8", times=times, record=record)
    return recipe, Setting(start, dataset, training, latency, options.epochs, options.lr)


def main() -> int:
    """Prune, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2, help="recovery of each pruning")
    parser.add_argument("--lr", type=float, default=0.01, help="its peak rate")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="checkpoints, to go on where it was stopped"
    )
    parser.add_argument("--trial", action="store_true", help="few samples; keeps no table")
    options = parser.parse_args()
    if options.trial:
        options.epochs = 0
    recipe, setting = read_setting(options)
    with tempfile.TemporaryDirectory(prefix="deploykit-") as name:
        folder = Path(name)
        models = {"unpruned": shipped(setting, setting.start, folder / "unpruned.onnx")}
        traps = [trap(scope, ratio, models["unpruned"], folder) for scope, ratio in TRAPS]
        for label, candidate in prunings(setting, SCOPES):
            models[label] = shipped(setting, candidate, folder / f"{len(models)}.onnx")
        accuracies = {
            label: evaluate_onnx(model, setting.dataset.test, threads=recipe.threads)
            for label, model in models.items()
        }
        latencies = measure_latency(
            models, threads=recipe.threads, baseline="unpruned", batch_sizes=(1,), precision=0.01
        )
    figures, details = figures_of(accuracies, latencies)
    figures += [figure for figure, _ in traps]
    details += [text for _, text in traps]
    return publish(
        "pruning",
        figures,
        about=f"ResNet-56, CIFAR-10 as JPEG, {options.epochs} epochs of recovery after each "
        "pruning, integers by calibration, one thread; Torch-Pruning removes as few channels as "
        f"bring {SPEEDUP:g}x, or else are fastest, and ours is asked for the latency of each.",
        command="make bench-pruning",
        details=details,
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
