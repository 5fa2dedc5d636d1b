"""The quantization stage: a candidate becomes integer arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from deploykit.artifacts import Candidate, JsonDict
from deploykit.errors import CompressionError
from deploykit.held_weights import projections
from deploykit.models.weights import load_tensors
from deploykit.quantization.deployable import exact_inputs, leave_recurrence_in_float
from deploykit.quantization.graphs import (
    calibration_graph,
    freeze_statistics,
    quiet,
    read_parameters,
    set_graph_mode,
    trace,
    training_graph,
)
from deploykit.quantization.layers import match_layers
from deploykit.quantization.rules import Parameters
from deploykit.recipe.sections import QuantizeSection
from deploykit.seeds import stable_seed
from deploykit.sensitivity import (
    layers_to_keep_float,
    quantization_sensitivity,
    signal_to_noise,
)
from deploykit.structure import example_input
from deploykit.targets import Target

if TYPE_CHECKING:
    from deploykit.train import Training

CALIBRATION_BATCH = 32
RANDOM_SAMPLES = 8
JUDGED = 32  # samples that tell how much roundings cost
MARGINS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # dB more, where the estimate fell short


def calibrate(
    candidate: Candidate,
    samples: np.ndarray,
    *,
    target: Target,
    keep_float: Sequence[str] = (),
    min_sqnr: float | None = None,
) -> Candidate:
    """Quantize after training: watch the ranges of activations on raw training samples.

    Args:
        candidate: a float candidate.
        samples: as a client sends them, ``(n, H, W, C)`` uint8 for images; may be a memory map.
            They stream through in small batches and leave only histograms, so that memory does
            not grow with their number.
        target: decides the integer types.
        keep_float: shell patterns over the names of modules whose layers stay in float.
        min_sqnr: smallest signal-to-quantization-noise ratio of the logits, in dB, on the first
            of ``samples``. More layers stay in float, the most sensitive first, until it holds;
            ``structure.quantization.keep_float`` names them all, the notes what each costs.

    Raises:
        CompressionError: the model has nothing that runs in integers, a pattern fits no layer,
            or integers in no layer leave ``min_sqnr``.
    """
    kept = _kept(candidate, keep_float)
    quantized = _calibrated(candidate, samples, target, kept)
    if min_sqnr is None:
        return quantized
    judged = np.array(samples[:JUDGED])
    found = signal_to_noise(candidate, quantized, judged)
    if found >= min_sqnr:
        return replace(quantized, notes={"rounding": {"sqnr_db": round(found, 2)}})
    # To first order, what a rounding costs depends on no other: once is enough.
    sensitivity = quantization_sensitivity(quantized, judged)
    for margin in MARGINS:
        chosen = layers_to_keep_float(quantized, sensitivity, wanted_db=min_sqnr + margin)
        if sensitivity.weights.keys() <= set(chosen):
            break
        mixed = _calibrated(candidate, samples, target, frozenset(chosen))
        found = signal_to_noise(candidate, mixed, judged)
        if found >= min_sqnr:
            notes = {"rounding": {"sqnr_db": round(found, 2), **sensitivity.to_json()}}
            return replace(mixed, notes=notes)
    raise CompressionError(
        f"quantize.min_sqnr: expected at most {found:.1f}, which the fewest layers in integers "
        f"reach, got {min_sqnr:g}; lower it, train the quantization (mode: qat), or remove the "
        "quantize section"
    )


def _calibrated(
    candidate: Candidate, samples: np.ndarray, target: Target, kept: frozenset[str]
) -> Candidate:
    from deploykit.data.pixels import normalize

    exact, example = exact_inputs(candidate, target), example_input(candidate, batch=2)
    graph = calibration_graph(candidate.module, example, target, exact, kept)
    with torch.no_grad(), quiet():
        for start in range(0, len(samples), CALIBRATION_BATCH):
            batch = torch.from_numpy(np.array(samples[start : start + CALIBRATION_BATCH]))
            graph(normalize(batch, candidate.signature.preprocess))
    return _quantized(candidate, candidate.module, read_parameters(graph), target, kept, "ptq", {})


def calibration_rows(count: int, section: QuantizeSection, seed: int) -> np.ndarray:
    """Choose which of ``count`` training samples calibrate, in rising order."""
    generator = np.random.default_rng(stable_seed(seed, "quantize", "calibration"))
    return np.sort(generator.permutation(count)[: section.calibration_samples])


def random_samples(candidate: Candidate) -> np.ndarray:
    """Return noise as a client would send it, where ranges do not matter but latencies do."""
    generator, spec = np.random.default_rng(0), candidate.signature.inputs[0]
    shape = (RANDOM_SAMPLES, *spec.shape[1:])
    if spec.dtype == "uint8":
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape).astype(spec.dtype)


def train_quantized(
    candidate: Candidate,
    training: Training,
    section: QuantizeSection,
    *,
    target: Target,
    teacher: nn.Module | None = None,
    keep_float: Sequence[str] = (),
) -> Candidate:
    """Quantize in training: the model learns weights and ranges that integers serve well.

    BatchNorm statistics and ranges stand still after ``section.freeze_statistics`` of the
    epochs (Krishnamoorthi 2018, section 4.2), so that the last epochs train the very
    arithmetic that ships.

    Args:
        candidate: a float candidate.
        training: data, seed and device.
        section: how long, and at which rate.
        target: decides the integer types.
        keep_float: shell patterns over the names of modules whose layers stay in float.
        teacher: a float module whose answers are learned from where the section says so; the
            candidate's own by default.

    Raises:
        CompressionError: the model has nothing that runs in integers, or a pattern fits no layer.
    """
    from deploykit.train import distillation, fit, recovery_plan

    exact, example = exact_inputs(candidate, target), example_input(candidate, batch=2)
    kept = _kept(candidate, keep_float)
    graph = training_graph(candidate.module, example, target, exact, kept)
    # What observes ranges reads float32.
    plan = recovery_plan(training.plan, section).model_copy(update={"precision": "32"})
    taught = None
    if section.distill:
        taught = distillation(teacher or candidate.module, training, plan, section)
    result = fit(
        graph,
        training,
        stage="quantize",
        plan=plan,
        loss=taught,
        set_mode=set_graph_mode,
        on_epoch=_freezing(section, plan.epochs),
        hold=projections(candidate),
    )
    module = copy.deepcopy(candidate.module)
    trained = graph.state_dict()
    # What the graph has no use for (num_batches_tracked) stays as it was.
    load_tensors(
        module, {name: trained.get(name, old) for name, old in module.state_dict().items()}
    )
    notes = {"recovery": [result.to_json()]}
    return _quantized(candidate, module, read_parameters(graph), target, kept, "qat", notes)


def _kept(candidate: Candidate, patterns: Sequence[str]) -> frozenset[str]:
    if not patterns:
        return frozenset()
    graph = trace(candidate.module, example_input(candidate, batch=2)).graph
    return match_layers(graph, patterns, all_there=not candidate.structure.get("removed"))


def _freezing(section: QuantizeSection, epochs: int) -> Callable[[nn.Module, int, int], None]:
    first_frozen = max(1, round(section.freeze_statistics * epochs))

    def on_epoch(graph: nn.Module, epoch: int, _epochs: int) -> None:
        if epoch >= first_frozen:
            freeze_statistics(graph)

    return on_epoch


def _quantized(
    candidate: Candidate,
    module: nn.Module,
    parameters: dict[str, Parameters],
    target: Target,
    keep_float: frozenset[str],
    mode: str,
    notes: JsonDict,
) -> Candidate:
    quantization = {
        "target": target.name,
        "mode": mode,
        "keep_float": sorted(keep_float),
        "parameters": {key: list(value) for key, value in parameters.items()},
    }
    quantized = Candidate(
        module=module,
        signature=candidate.signature,
        structure={**candidate.structure, "quantization": quantization},
        stage="quantize",
        notes=notes,
    )
    if not parameters and leave_recurrence_in_float(quantized) is None:
        raise CompressionError(
            "quantize: expected a model with convolutions, linear layers or a wide LSTM, got none "
            "that run in integers; remove the quantize section"
        )
    return quantized
