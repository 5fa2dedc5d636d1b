"""A run on CIFAR-10 against other ways to integers: what `resnet20.py` and `resnet56.py` share."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from recipe_run import finished_run, read_options
from table import Figure, publish

from deploykit.artifacts import Candidate, JsonDict
from deploykit.exporter import export_onnx
from deploykit.job import read_data
from deploykit.latency_model import LatencyCost
from deploykit.measure.layer_times import LayerTimes
from deploykit.progress import ConsoleProgress
from deploykit.prune import prune
from deploykit.quantization.graphs import quiet
from deploykit.run_folder import RunFolder
from deploykit.statistics import paired_drop
from deploykit.structure import example_input, load_candidate
from deploykit.targets import resolve_target
from deploykit.train import Training, evaluate, fit, recovery_plan

RIVALS = Path(sys.executable).parents[1].with_name(f"{Path(sys.executable).parents[1].name}-rivals")
ROUNDS = 40
FASTER = 1.4  # than every rival at batch 1


@dataclass(frozen=True)
class Promise:
    """What a recipe is held to.

    Attributes:
        recipe: its file.
        max_drop: of test accuracy against the float model, 0 to 1.
        min_speedup: at batch 1 over the float model.
    """

    recipe: str
    max_drop: float
    min_speedup: float


def hold(name: str, promise: Promise) -> int:
    """Run the recipe, or read a run of it, set it beside its rivals, and hold it to the promise."""
    options = read_options(f"{promise.recipe} against other ways to integers")
    if not (RIVALS / "bin/python").exists():
        raise SystemExit(
            f"expected the others in {RIVALS}, got no such environment; make bench-{name}"
        )
    with tempfile.TemporaryDirectory(prefix="deploykit-") as scratch:
        folder = Path(scratch)
        path = finished_run(promise.recipe, options, folder)
        run, report = RunFolder(path), json.loads((path / "report.json").read_text())
        baseline = strongest(run, epochs=0 if options.trial else None)
        labels = hand_over(run, report, baseline, folder, 200 if options.trial else None)
        python, script = RIVALS / "bin/python", Path(__file__).with_name("rivals.py")
        rounds = 2 if options.trial else ROUNDS
        arguments = [folder, report["threads"], rounds]
        subprocess.run([python, script, *map(str, arguments)], check=True)
        answers = dict(np.load(folder / "answers.npz"))
        times = json.loads((folder / "times.json").read_text())
        cost = search_cost(run, report, folder / "cache")
    further = baseline.stage == "further"
    keep = not options.trial
    return tell(name, promise, report, answers, times, labels, further, cost, keep=keep)


def strongest(run: RunFolder, epochs: int | None = None) -> Candidate:
    """Return the float model that compression is held against.

    The run's own, or that after as many further epochs without compression as the stages behind
    it trained, whichever is better on validation. The further training is kept in the run's
    folder, and goes on where it was stopped.

    Args:
        run: a finished run.
        epochs: of the further training; as many as the run's by default.
    """
    recipe = run.recipe()
    start = load_candidate(run.candidate("train"), base=run.path)
    dataset = replace(read_data(recipe), preprocess=start.signature.preprocess)
    assert recipe.train is not None
    assert recipe.prune is not None
    assert recipe.quantize is not None
    spent = recipe.prune.steps * recipe.prune.epochs + recipe.quantize.epochs
    plan = recovery_plan(recipe.train, recipe.prune)
    plan = plan.model_copy(update={"epochs": spent if epochs is None else epochs})
    training = Training(
        dataset,
        augment=recipe.data.augment,
        seed=recipe.seed,
        checkpoints=run.checkpoints,
        progress=ConsoleProgress(),
    )
    further = replace(start, module=copy.deepcopy(start.module), stage="further")
    if plan.epochs:
        fit(further.module, training, stage="further", plan=plan)
    accuracies = [
        evaluate(one.module, dataset.validation, dataset.preprocess) for one in (start, further)
    ]
    return further if accuracies[1] > accuracies[0] else start


def search_cost(run: RunFolder, report: JsonDict, cache: Path) -> list[Figure]:
    """Return what the search for widths and blocks takes, with nothing measured before, and again.

    Nothing where the recipe does not prune to a latency.
    """
    recipe = run.recipe()
    if recipe.prune is None or recipe.prune.how_much[0] not in {"speedup", "latency_ms"}:
        return []
    start = load_candidate(run.candidate("train"), base=run.path)
    dataset = replace(read_data(recipe), preprocess=start.signature.preprocess)
    section, target = recipe.prune.model_copy(update={"epochs": 0}), resolve_target(recipe.target)
    seconds, measured = [], []
    for _ in range(2):
        times = LayerTimes.open(cache, recipe.threads)
        latency = LatencyCost(start, target, recipe.precision_on(target), times=times)
        begun = time.monotonic()
        prune(start, Training(dataset), section, target=target, latency=latency)
        seconds.append(time.monotonic() - begun)
        measured.append(times.measured)
    later = len(report["details"]["curves"]) - 1
    return [
        Figure("trainings", 1 + max(1, len(report["details"]["trials"])) * later, "{:.0f}"),
        Figure("search for widths and blocks", seconds[0], "{:.0f} s"),
        Figure("layers that it times", measured[0], "{:.0f}"),
        Figure("the search once more", seconds[1], "{:.0f} s"),
        Figure("layers that it times then", measured[1], "{:.0f}", at_most=0),
    ]


def hand_over(
    run: RunFolder, report: JsonDict, baseline: Candidate, folder: Path, limit: int | None
) -> np.ndarray:
    """Write what the rivals need; return the labels of the test rows."""
    recipe = run.recipe()
    if limit is not None:
        data = recipe.data.model_copy(update={"limit": limit})
        recipe = recipe.model_copy(update={"data": data})
    test = read_data(recipe).test
    write_float(baseline.module.eval(), example_input(baseline, batch=2), folder / "float.onnx")
    (folder / "pixels.json").write_text(json.dumps(dict(baseline.signature.preprocess or {})))
    np.save(folder / "calibration.npy", np.load(run.calibration, allow_pickle=False))
    np.save(folder / "test.npy", test.load(np.arange(len(test))))
    export_onnx(baseline, folder / "whole.onnx", name=recipe.name)
    (folder / "ours.onnx").write_bytes(run.onnx(report["final"]["name"]).read_bytes())
    return test.labels


def write_float(module: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write a plain float model, as a rival's user would: normalized pixels in, logits out."""
    with quiet():
        program = torch.onnx.export(
            module, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    assert program is not None
    onnx.save(program.model_proto, path)


def tell(
    name: str,
    promise: Promise,
    report: JsonDict,
    answers: dict[str, np.ndarray],
    times: dict[str, dict[str, list[float]]],
    labels: np.ndarray,
    further: bool,
    cost: list[Figure],
    *,
    keep: bool,
) -> int:
    """Publish the figures."""
    correct = {one: found == labels for one, found in answers.items()}
    milliseconds = {
        one: {batch: np.array(rounds) for batch, rounds in found.items()}
        for one, found in times.items()
    }
    ours = "deploykit"
    drop, (low, high) = paired_drop(correct["fp32"], correct[ours])
    figures = [
        Figure("fp32, test accuracy", correct["fp32"].mean(), "{:.2%}"),
        Figure("deploykit, test accuracy", correct[ours].mean(), "{:.2%}"),
        Figure("test accuracy lost", drop, "{:.2%}", at_most=promise.max_drop),
    ]
    for batch in ("1", "32"):
        ratio = float(np.median(milliseconds["fp32"][batch] / milliseconds[ours][batch]))
        least = promise.min_speedup if batch == "1" else None
        figures.append(
            Figure(f"fp32 / deploykit latency, batch {batch}", ratio, "{:.2f}x", at_least=least)
        )
    details = [
        f"95% interval of the accuracy lost: {low:.2%} to {high:.2%}. fp32 is the run's own float "
        f"model{further * ' after as many further epochs without compression'}, the better of the "
        "two on validation."
    ]
    for rival in [one for one in answers if one not in ("fp32", ours)]:
        for batch in ("1", "32"):
            ratio = float(np.median(milliseconds[rival][batch] / milliseconds[ours][batch]))
            least = FASTER if batch == "1" else None
            text = f"{rival} / deploykit latency, batch {batch}"
            figures.append(Figure(text, ratio, "{:.2f}x", at_least=least))
        lost, (low, high) = paired_drop(correct[rival], correct[ours])
        figures += [
            Figure(f"{rival}, test accuracy", correct[rival].mean(), "{:.2%}"),
            Figure(
                f"significantly less accurate than {rival}", float(low > 0), "{:.0f}", at_most=0
            ),
        ]
        details.append(f"{rival} to deploykit: {lost:.2%} lost (95%: {low:.2%} to {high:.2%}).")
    minutes = sum(one["seconds"] for one in report["stages"]) / 60
    figures += [Figure("stages of the run, wall time", minutes, "{:.0f} min"), *cost]
    return publish(
        name,
        figures,
        about=f"`{promise.recipe}` against post-training quantization by others, from the same "
        "float weights and calibration samples, timed in the same rounds by "
        f"{report['threads']} thread(s). What the rivals' normalization takes is not counted.",
        command=f"make bench-{name}",
        details=details,
        keep=keep,
    )
