"""From an ONNX file that came from elsewhere to a bundle: proven, and in integers if that pays."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from deploykit import runtime
from deploykit.artifacts import JsonDict, OnnxModel
from deploykit.bundle import Format, Golden, kind_of, told_as_deploykit, write_bundle
from deploykit.data import Dataset
from deploykit.environment import environment
from deploykit.errors import UsageError
from deploykit.foreign.border import LAYOUTS
from deploykit.foreign.intake import Foreign, take_in
from deploykit.foreign.integers import holds_integers
from deploykit.foreign.limits import read_model
from deploykit.foreign.making import Made, make
from deploykit.foreign.proof import SIZES, answers
from deploykit.measure import Evaluation, evaluate_onnx, peak_memory_bytes, size_bytes
from deploykit.progress import Progress, SilentProgress
from deploykit.publish import refuse_existing
from deploykit.ship import (
    FIRST_VERSION,
    GOLDEN_STEPS,
    check_version,
    companions,
    format_of,
)
from deploykit.statistics import paired_drop
from deploykit.targets import (
    CPU,
    Target,
    integers_for,
    resolve_target,
    suited_targets,
    why_not_here,
)

QUANTIZE = ("auto", "ptq", "fp16-weights", "none")
MAX_DROP = 0.01
GOLDEN_SAMPLES = 16
BATCHES = ("1", "32")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def export_foreign(
    model: Path,
    out: Path,
    *,
    data: str | Path | Dataset,
    target: str | None = None,
    quantize: str = "auto",
    max_drop: float = MAX_DROP,
    layout: str | None = None,
    name: str | None = None,
    version: str = FIRST_VERSION,
    format: Format | None = None,
    native: bool = False,
    mobile: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the bundle of a classifier that came from elsewhere as an ONNX file.

    The file is first opened in a process with limits. What ships is proven against the file as it
    was given; integers ship only if they hold ``max_drop`` on the validation split and, with
    ``auto``, if they are faster on this machine. The test split is read once, at the end.

    Args:
        model: the ONNX file: float32 ``(N, C, H, W)``, ``(N, H, W, C)`` or arrays, or raw uint8
            images; logits or probabilities ``(N, classes)`` out.
        out: the bundle's folder, or its zip file.
        data: a YAML file with a recipe's ``data`` section, a folder of one folder a class,
            ``digits``, or the samples. Its ``normalize`` is what the model was trained with.
        target: where it will run; default: this machine's CPU.
        quantize: ``auto``; ``ptq``: integers, however fast; ``fp16-weights``: weights in two bytes,
            computed in float32; ``none``: floats as they are.
        max_drop: largest loss of validation accuracy; 0 to 1.
        layout: ``nchw`` or ``nhwc``, where the sizes of the input do not tell.
        name: of the bundle; default: the file's.
        version: of the model, by which a server tells it from others of its name.
        format: see `deploykit.ship.export_run`.
        native: likewise.
        mobile: likewise.
        force: replace a bundle that stands at ``out``.
        progress: who is told what was found and decided; default: nobody.

    Returns:
        ``out``.

    Raises:
        UsageError: ``out`` stands already, or an argument is none that is known.
        ModelError: the file cannot be used, or not in integers where they were asked for.
        DataError: the data cannot be used.
        VerificationError: what was made does not answer as the file does.
        BudgetError: what was asked for breaks ``max_drop``.

    Example:
        >>> export_foreign(Path("net.onnx"), Path("bundles/net"), data="photos/")
    """
    format = format or format_of(out)
    refuse_existing(out, force, kind_of(format))
    check_version(version)
    wanted = resolve_target(target or "cpu")
    _check_words(quantize, wanted, max_drop, layout)
    called = _name(name, model)
    told = progress or SilentProgress()
    foreign = take_in(read_model(model), str(model), data, layout)
    for warning in foreign.dataset.warnings:
        told.message(f"warning: {warning}")
    with told_as_deploykit(), TemporaryDirectory(prefix="deploykit-") as scratch:
        floats, made = make(foreign, wanted, quantize, max_drop, Path(scratch), called)
        told.message(_as_given(floats.validation))
        told.message(made.why)
        here = why_not_here(wanted) is None
        outputs = _validation_answers(foreign, made.model)
        if _are_probabilities(outputs):
            told.message(
                "warning: the answers look like probabilities already, which readers of the "
                "bundle make flat by a softmax of their own; export the model without its last "
                "operator"
            )
        return write_bundle(
            made.model,
            out,
            name=called,
            version=version,
            target=wanted.name,
            threads=foreign.recipe.threads,
            task=foreign.recipe.task,
            measured=_measured(foreign, floats, made, here=here, target=wanted),
            measured_on=environment() if here else None,
            verified_on={
                **environment(),
                "targets": _targets(foreign, made, wanted),
            },
            tolerance=_tolerance(made, outputs),
            golden=_golden(foreign, made.model),
            companions=companions(wanted, native=native, mobile=mobile),
            format=format,
            force=force,
        )


def _targets(foreign: Foreign, made: Made, wanted: Target) -> list[str]:
    """Name the targets that the model is right for; a stranger's integers are, where they ran."""
    if holds_integers(foreign.core):
        return sorted({resolve_target("cpu").name, wanted.name})
    return suited_targets(made.precision, integers_for(wanted))


def _check_words(quantize: str, target: Target, max_drop: float, layout: str | None) -> None:
    if quantize not in QUANTIZE:
        raise UsageError(f"--quantize: expected {', '.join(QUANTIZE)}, got {quantize!r}")
    if quantize == "ptq" and target.precision != "int8":
        raise UsageError(
            f"--quantize: expected auto, fp16-weights or none for target {target.name}, which has "
            f"no integer kernels and ships {target.precision}, got ptq"
        )
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"--layout: expected {' or '.join(LAYOUTS)}, got {layout!r}")
    if not 0 <= max_drop <= 1:
        raise UsageError(f"--max-drop: expected 0 <= x <= 1, got {max_drop}")


def _name(name: str | None, model: Path) -> str:
    """Return the bundle's name: as asked for, or the file's in the letters that names have."""
    found = name
    if found is None:
        found = re.sub(r"[^a-z0-9._-]+", "-", model.stem.lower()).lstrip("._-")[:64]
    if not NAME.fullmatch(found):
        raise UsageError(
            f"--name: expected lower case letters, digits, '.', '_' and '-', got {found[:80]!r}"
        )
    return found


def _measured(
    foreign: Foreign, floats: Made, made: Made, *, here: bool, target: Target
) -> JsonDict:
    """Read the test split, and say what the manifest tells; what was not taken here is null."""
    threads, test = foreign.recipe.threads, foreign.dataset.test
    before, after = (evaluate_onnx(one.model, test, threads=threads) for one in (floats, made))
    drop, interval = paired_drop(before.correct, after.correct)
    latency = made.latency or {}
    on_cpu = here and target.providers == (CPU,)
    return {
        "accuracy": after.accuracy,
        "baseline_accuracy": before.accuracy,
        "accuracy_drop": drop,
        "accuracy_drop_interval": list(interval),
        "validation_accuracy": made.validation.accuracy,
        "latency_ms": {b: latency[b].median_ms if b in latency else None for b in BATCHES},
        "speedup": {b: latency[b].ratio if b in latency else None for b in BATCHES},
        "size_bytes": size_bytes(made.model),
        "baseline_size_bytes": len(foreign.given),
        "peak_memory_bytes": peak_memory_bytes(made.model, threads) if on_cpu else None,
        "precision": made.precision,
        "decision": made.why,
        "parity": made.agreement.to_json(),
        **({"kernels": made.kernels.to_json()} if made.kernels else {}),
        **made.notes,
        "source": _source(foreign),
    }


def _source(foreign: Foreign) -> JsonDict:
    """Name the file as it was given, and what was changed at its border."""
    fixed = foreign.border.fixed_batch
    return {
        "sha256": hashlib.sha256(foreign.given).hexdigest(),
        "softmax_removed": foreign.softmax,
        **({"fixed_batch": fixed} if fixed else {}),
    }


def _as_given(validation: Evaluation) -> str:
    """Tell how the floats answer: samples that are not the model's own show at once."""
    return (
        f"as given: {validation.accuracy:.2%} right of {len(validation.correct)} validation "
        "samples (if you expected more, see normalize and the order of classes)"
    )


def _validation_answers(foreign: Foreign, model: OnnxModel) -> np.ndarray:
    split, threads = foreign.dataset.validation, foreign.recipe.threads
    session = runtime.open_session(model.path.read_bytes(), threads)
    return answers(session, split, min(foreign.recipe.verify.samples, len(split)), sizes=SIZES[-1:])


def _are_probabilities(outputs: np.ndarray) -> bool:
    sums = outputs.sum(axis=1)
    return bool(outputs.min() >= 0 and np.abs(sums - 1).max() < 1e-3)


def _tolerance(made: Made, outputs: np.ndarray) -> JsonDict:
    """Return how far a golden answer may be off, in steps that an 8-bit output would have."""
    steps = min(GOLDEN_STEPS, made.allowed_steps)
    scale = max(float(np.ptp(outputs)) / 255, float(np.finfo(np.float32).tiny))
    return {"max_abs": steps * scale, "steps": steps, "scale": scale, "top1": True}


def _golden(foreign: Foreign, model: OnnxModel) -> Golden:
    """Take some validation samples, classes in turn, with the answers of what ships."""
    split = foreign.dataset.validation
    turn = np.zeros(len(split), np.int64)
    for label in np.unique(split.labels):
        members = np.flatnonzero(split.labels == label)
        turn[members] = np.arange(len(members))
    chosen = np.sort(np.lexsort((np.arange(len(split)), turn))[:GOLDEN_SAMPLES])
    inputs = split.load(chosen)
    session = runtime.open_session(model.path.read_bytes(), foreign.recipe.threads)
    items = [split.raw(int(place)) for place in chosen]
    return Golden(items, inputs, runtime.run_model(session, inputs))
