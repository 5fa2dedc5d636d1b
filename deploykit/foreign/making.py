"""What may ship of a model from elsewhere: floats, halves or integers; proven, timed, chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from deploykit import runtime
from deploykit.artifacts import JsonDict, OnnxModel
from deploykit.errors import BudgetError, CompressionError, DataError, VerificationError
from deploykit.foreign.intake import Foreign
from deploykit.foreign.integers import Batches, holds_integers, quantized
from deploykit.foreign.proof import (
    HALF,
    SIZES,
    Agreement,
    answers,
    compare,
    demand,
    largest_value,
    overflow_remedy,
)
from deploykit.measure import Evaluation, Latency, evaluate_onnx, measure_latency
from deploykit.precision import EXACTNESS
from deploykit.recipe.sections import QuantizeSection
from deploykit.statistics import paired_drop
from deploykit.targets import (
    Target,
    about_integers,
    integers_for,
    resolve_target,
    why_not_here,
)

FEW = 8  # samples that tell of single values
FLOAT_REFERENCE = {"session.disable_quant_qdq": "1"}  # pairs stay, and floats between them


@dataclass(frozen=True)
class Made:
    """A model that may ship.

    Attributes:
        precision: ``fp32``, ``fp16``, ``fp16-weights`` or ``int8``.
        model: its file.
        validation: its answers to the validation split.
        agreement: with the file as it was given.
        allowed_steps: what its answers may be off elsewhere, in steps of its output.
        kernels: of integers, with their floats.
        latency: by batch size, beside the floats' in the same rounds; None off the target.
        why: the decision in words.
        notes: how it came to be.
    """

    precision: str
    model: OnnxModel
    validation: Evaluation
    agreement: Agreement
    allowed_steps: float
    kernels: Agreement | None = None
    latency: dict[str, Latency] | None = None
    why: str = ""
    notes: JsonDict = field(default_factory=dict)


def make(
    foreign: Foreign, target: Target, quantize: str, max_drop: float, folder: Path, name: str
) -> tuple[Made, Made]:
    """Return the floats, and what ships.

    Args:
        foreign: the model and its samples.
        target: where it will run.
        quantize: ``auto``, ``ptq``, ``fp16-weights`` or ``none``.
        max_drop: largest loss of validation accuracy.
        folder: to write the files in.
        name: of the model.

    Raises:
        CompressionError: ``ptq``, and there is nothing to quantize; or the model came with
            integers, and something else is asked for.
        VerificationError: what was made does not answer as the file does.
        BudgetError: what has to ship breaks ``max_drop``.
    """
    threads = foreign.recipe.threads
    floats = make_floats(foreign, folder / "fp32.onnx", name)
    if holds_integers(foreign.core):
        (only,) = _timed([_given_integers(foreign, floats, target, quantize)], target, threads)
        return only, replace(only, why="int8 ships, as the file was given")
    if quantize == "none":
        (only,) = _timed([floats], target, threads)
        return only, replace(only, why="fp32 ships, as asked for")
    if quantize == "fp16-weights":
        other = _in_two_bytes(foreign, "fp16-weights", folder / "fp16-weights.onnx", name)
    elif target.precision == "fp16":
        other = make_halves(foreign, floats, folder / "fp16.onnx", name)
    else:
        try:
            other = make_integers(foreign, floats, integers_for(target), folder, name)
        except CompressionError as error:
            if quantize == "ptq":
                raise
            (only,) = _timed([floats], target, threads)
            return only, replace(only, why=f"fp32 ships: {error}")
    lost, (low, high) = paired_drop(floats.validation.correct, other.validation.correct)
    cost = (
        f"{other.precision} costs {lost:.2%} of validation accuracy "
        f"(95%: {low:.2%} to {high:.2%}), {max_drop:.2%} allowed"
    )
    if other.precision == "int8" and (told := about_integers(target)):
        cost += f"; {told}"
    demanded = quantize != "auto" or target.precision == "fp16"
    if demanded and lost > max_drop:
        raise BudgetError(
            f"quantize: {cost}; allow more with --max-drop, or ship floats with --quantize none"
        )
    floats, other = _timed([floats, other], target, threads)
    return floats, _chosen(floats, other, cost, holds=lost <= max_drop, demanded=demanded)


def _chosen(floats: Made, other: Made, cost: str, *, holds: bool, demanded: bool) -> Made:
    """Keep what holds and is faster; where no latency can be taken here, what holds."""
    speed = "speed unknown, this machine is not the target"
    faster = True
    if other.latency is not None:
        latency = other.latency["1"]
        faster = latency.verdict == "faster"
        speed = (
            f"speed {latency.ratio:.2f}x at batch 1 (95%: {latency.interval[0]:.2f} to "
            f"{latency.interval[1]:.2f})"
        )
    if demanded or (holds and faster):
        return replace(other, why=f"{other.precision} ships: {cost}; {speed}")
    return replace(floats, why=f"fp32 ships, {other.precision} does not pay: {cost}; {speed}")


def _timed(models: list[Made], target: Target, threads: int) -> list[Made]:
    """Time models against the first one, if this machine is the target."""
    if why_not_here(target) is not None:
        return models
    measured = measure_latency(
        {one.precision: one.model for one in models},
        threads=threads,
        baseline=models[0].precision,
        target=target,
    )
    return [replace(one, latency=measured[one.precision]) for one in models]


def make_floats(foreign: Foreign, path: Path, name: str) -> Made:
    """Write the model as it was given, with the border of a bundle.

    Raises:
        VerificationError: it does not answer as the file does.
    """
    allowed = EXACTNESS["fp32"].steps
    model = foreign.write(foreign.core, path, name, dequantize=True)
    made = _proven(foreign, "fp32", model, allowed, allowed)
    demand(made.agreement, foreign.recipe.verify, "export the model anew, in opset 20")
    return made


def make_halves(foreign: Foreign, floats: Made, path: Path, name: str) -> Made:
    """Write the model in floats of two bytes, which it computes in.

    Raises:
        VerificationError: a value is too large for them, or the answers are others.
    """
    samples = foreign.dataset.validation.load(np.arange(min(FEW, len(foreign.dataset.validation))))
    proto = onnx.load(floats.model.path)
    value, layer = largest_value(proto, samples, foreign.recipe.threads)
    if not value < HALF:
        raise VerificationError(
            f"fp16: expected values below {HALF:g}, got {value:.4g} at {layer}, which overflows; "
            "ship fp32 with --quantize none"
        )
    return _in_two_bytes(foreign, "fp16", path, name)


def _in_two_bytes(foreign: Foreign, precision: str, path: Path, name: str) -> Made:
    """Write the model in another precision of floats.

    Raises:
        VerificationError: the answers are others.
    """
    steps = EXACTNESS[precision].steps
    model = foreign.write(foreign.core, path, name, dequantize=False, precision=precision)
    made = _proven(foreign, precision, model, steps, steps)
    demand(made.agreement, foreign.recipe.verify, "ship fp32 with --quantize none")
    return made


def make_integers(foreign: Foreign, floats: Made, target: Target, folder: Path, name: str) -> Made:
    """Write the model in integers, calibrated by whichever method keeps most accuracy.

    Raises:
        CompressionError: nothing of it can be quantized.
        VerificationError: its integers do not answer as their floats do.
    """
    load, count = foreign.calibration(QuantizeSection().calibration_samples)
    taken = foreign.core.graph.input[0].name
    found = quantized(
        foreign.core, lambda: Batches(taken, load, count), target, foreign.normalization
    )
    allowed = foreign.recipe.verify.max_steps
    candidates = []
    for method, core in found.items():
        path = folder / f"{method}.onnx"
        model = foreign.write(core, path, name, dequantize=not target.symmetric)
        made = _proven(foreign, "int8", model, None, allowed)
        notes = {"calibration": method, "methods_tried": len(found)}
        candidates.append(replace(made, notes=notes))
    best = max(candidates, key=lambda one: one.validation.accuracy)  # the first among equals
    kernels = _kernels(foreign, best.model)
    demand(kernels, foreign.recipe.verify, overflow_remedy(target))
    return replace(best, kernels=kernels)


def _given_integers(foreign: Foreign, made: Made, target: Target, quantize: str) -> Made:
    """Take a model that came with integers, if they are right on this CPU.

    Raises:
        CompressionError: something else was asked for, or another target, where nothing proves it.
        VerificationError: its integers do not answer as their floats do.
    """
    here = resolve_target("cpu")
    if quantize not in {"auto", "none"} or target.name not in {here.name, "web"}:
        raise CompressionError(
            f"{foreign.where}: expected a float model to be made for {target.name} with --quantize "
            f"{quantize}, got one that holds integers already; give the float file, or ship it as "
            f"it is: --target {here.name} --quantize none"
        )
    kernels = _kernels(foreign, made.model)
    demand(kernels, foreign.recipe.verify, "give the float file, whose integers fit this CPU then")
    allowed = foreign.recipe.verify.max_steps
    return replace(made, precision="int8", kernels=kernels, allowed_steps=allowed)


def _proven(
    foreign: Foreign, precision: str, model: OnnxModel, held_to: float | None, allowed: float
) -> Made:
    """Compare a file with the given one on the validation split, and evaluate it."""
    split, threads = foreign.dataset.validation, foreign.recipe.threads
    fixed = foreign.border.fixed_batch
    count = min(foreign.recipe.verify.samples, len(split))
    count -= count % (fixed or 1)
    if not count:
        raise DataError(
            f"{split.name}: expected at least {fixed} samples, the batch that {foreign.where} "
            f"demands, got {len(split)}"
        )
    given = runtime.open_session(foreign.given, threads)
    expected = answers(given, split, count, foreign.prepare, (fixed,) if fixed else SIZES)
    shipped = runtime.open_session(model.path.read_bytes(), threads)
    answered = answers(shipped, split, count)
    if foreign.softmax:
        answered = runtime.softmax(answered).astype(np.float32)
    agreement = compare(f"{precision} with the file as given", expected, answered, held_to)
    validation = evaluate_onnx(model, split, threads=threads)
    return Made(precision, model, validation, agreement, allowed)


def _kernels(foreign: Foreign, model: OnnxModel) -> Agreement:
    """Compare ONNX Runtime's integer kernels with the floats that they stand for."""
    split, threads = foreign.dataset.validation, foreign.recipe.threads
    data, count = model.path.read_bytes(), min(foreign.recipe.verify.samples, len(split))
    reference = runtime.open_session(data, threads, config=FLOAT_REFERENCE)
    return compare(
        "integer kernels with the floats they stand for",
        answers(reference, split, count),
        answers(runtime.open_session(data, threads), split, count),
        foreign.recipe.verify.max_steps,
    )
