"""The model of a finished run, with the integers or the floats of another target."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit.artifacts import Candidate, JsonDict, OnnxModel
from deploykit.data import Dataset
from deploykit.data.arrays import ArraySamples
from deploykit.data.dataset import Split
from deploykit.data.table import rows_of
from deploykit.decisions import judged_drop
from deploykit.errors import BudgetError, DeploykitError, ModelError, VerificationError
from deploykit.exporter import export_onnx
from deploykit.job import read_data
from deploykit.measure import Evaluation, evaluate_onnx, size_bytes
from deploykit.precision import convert
from deploykit.quantize import calibrate
from deploykit.recipe.sections import QuantizeSection, Recipe
from deploykit.run_folder import RunFolder
from deploykit.statistics import paired_drop
from deploykit.structure import load_candidate, read_structure
from deploykit.targets import Target, integers_for
from deploykit.verify import verify_onnx


@dataclass(frozen=True)
class Retargeted:
    """A model made anew, and what is known of it.

    Attributes:
        model: its file.
        parity: ONNX Runtime against torch.
        measured: what differs from the run's measurements: accuracies, None where the data
            could not be read again, and the size.
    """

    model: OnnxModel
    parity: JsonDict
    measured: JsonDict


def make_for(
    run: RunFolder,
    recipe: Recipe,
    target: Target,
    precision: str,
    golden_inputs: np.ndarray,
    path: Path,
) -> Retargeted:
    """Quantize or convert the run's newest float candidate, and verify what comes out.

    Args:
        run: a finished one.
        recipe: the run's.
        target: of another integer scheme than the run's, or of another precision.
        precision: of the model: ``int8``, or one of a recipe's floats.
        golden_inputs: samples that prove a model of floats; one of integers is proven on those
            that calibrate it.
        path: the ONNX file to write.

    Raises:
        VerificationError: the run keeps no float candidate, its baseline was altered, or parity
            fails.
        BudgetError: the new model breaks the recipe's ``max_drop`` on the validation split.
        ModelError: the run's files are damaged.
    """
    source = _float_candidate(run, recipe, target)
    if precision == "int8":
        samples = _calibration(run, source)
        section = recipe.quantize or QuantizeSection()
        candidate = calibrate(
            source,
            samples,
            target=integers_for(target),
            keep_float=_kept_in_float(run, section),
            min_sqnr=section.min_sqnr,
        )
    else:
        samples = golden_inputs
        candidate = convert(source, precision)
    model = export_onnx(candidate, path, name=recipe.name)
    held = _split(np.array(samples[: recipe.verify.samples]))
    parity = verify_onnx(candidate, model, held, recipe.verify, threads=recipe.threads)
    accuracies = _accuracies(run, recipe, model, target)
    return Retargeted(model, parity.to_json(), {**accuracies, "size_bytes": size_bytes(model)})


def _float_candidate(run: RunFolder, recipe: Recipe, target: Target) -> Candidate:
    stage = _kept_stages(run, {"quantize", "convert"})[-1]
    if recipe.model.name.startswith("python:") and not run.candidate(stage).exists():
        raise VerificationError(
            f"{run.path}: expected a float candidate to make a model for {target.name}, got one "
            f"that was given as an object; compress it again with target={target.name!r}"
        )
    return load_candidate(run.candidate(stage), base=Path())


def _kept_stages(run: RunFolder, without: Collection[str] = ()) -> list[str]:
    """Name the stages that the shipped model has gone through, in order."""
    report = run.read_json("report.json") or {}
    kept: list[str] = [one["stage"] for one in report.get("decisions", ()) if one["kept"]]
    return ["train", *(stage for stage in kept if stage not in without)]


def _kept_in_float(run: RunFolder, section: QuantizeSection) -> Sequence[str]:
    """Name the layers that the run left in float, by the recipe's word or on its own."""
    if "quantize" not in _kept_stages(run):
        return section.keep_float
    kept: Sequence[str] = read_structure(run.candidate("quantize"))["quantization"]["keep_float"]
    return kept


def _calibration(run: RunFolder, candidate: Candidate) -> np.ndarray:
    """Map the stored samples into memory.

    Raises:
        ModelError: they are missing, or not such samples.
    """
    spec = candidate.signature.inputs[0]
    got: object
    try:
        samples: np.ndarray = np.load(run.calibration, mmap_mode="r", allow_pickle=False)
        got = f"{samples.dtype} {samples.shape}"
        if samples.dtype == spec.dtype and samples.shape[1:] == spec.shape[1:] and len(samples):
            return samples
    except (OSError, ValueError, EOFError) as error:
        got = getattr(error, "strerror", None) or error
    raise ModelError(
        f"{run.calibration}: expected {spec.dtype} samples of shape {spec.shape[1:]}, got {got}; "
        "run compress --resume"
    )


def _split(samples: np.ndarray) -> Split:
    """Let samples without labels stand where a split is read."""
    count, name = len(samples), "calibration"
    held = ArraySamples(samples, (), rows_of(name))
    return Split(name, name, np.zeros(count, np.int64), held, np.arange(count))


def _accuracies(run: RunFolder, recipe: Recipe, model: OnnxModel, target: Target) -> JsonDict:
    """Hold the model to the budget on validation, then read the test split."""
    dataset = _same_data(run, recipe)
    if dataset is None:
        return dict.fromkeys(("accuracy", "accuracy_drop", "accuracy_drop_interval"))
    baseline = OnnxModel(_baseline(run), model.signature, model.opset)

    def answers(split: Split) -> list[Evaluation]:
        return [evaluate_onnx(one, split, threads=recipe.threads) for one in (baseline, model)]

    allowed = None if recipe.budget is None else recipe.budget.max_drop
    lost = judged_drop(recipe.budget, *answers(dataset.validation))
    if allowed is not None and lost > allowed:
        raise BudgetError(
            f"budget: expected a validation drop of at most {allowed:.2%}, got {lost:.2%} when "
            f"made for {target.name}; run compress with --set target={target.name}"
        )
    before, after = answers(dataset.test)
    value, interval = paired_drop(before.correct, after.correct)
    return {
        "accuracy": after.accuracy,
        "accuracy_drop": value,
        "accuracy_drop_interval": list(interval),
    }


def _baseline(run: RunFolder) -> Path:
    """Return the file of the first stage that the run measured."""
    models = (run.read_json("measurements.json") or {}).get("models")
    return run.measured_model("train", models.get("train") if isinstance(models, dict) else None)


def _same_data(run: RunFolder, recipe: Recipe) -> Dataset | None:
    """Read the run's data again; None where they are gone or others by now."""
    try:
        dataset = read_data(recipe)
    except DeploykitError:
        return None
    return dataset if dataset.describe() == run.read_json("splits.json") else None
