"""The quantization stage: a candidate becomes integer arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from deploykit.artifacts import Candidate, JsonDict
from deploykit.errors import CompressionError
from deploykit.held_weights import projections
from deploykit.quantization.deployable import exact_inputs
from deploykit.quantization.graphs import (
    calibration_graph,
    freeze_statistics,
    quiet,
    read_parameters,
    set_graph_mode,
    training_graph,
)
from deploykit.quantization.quantizer import Parameters
from deploykit.recipe.sections import QuantizeSection
from deploykit.seeds import stable_seed
from deploykit.structure import example_input
from deploykit.targets import Target

if TYPE_CHECKING:
    from deploykit.train import Training

CALIBRATION_BATCH = 32


def calibrate(candidate: Candidate, samples: np.ndarray, *, target: Target) -> Candidate:
    """Quantize after training: watch the ranges of activations on raw training samples.

    Args:
        candidate: a float candidate.
        samples: as a client sends them, ``(n, H, W, C)`` uint8 for images; may be a memory map.
            They stream through in small batches and leave only histograms, so that memory does
            not grow with their number.
        target: decides the integer types.

    Raises:
        CompressionError: the model has nothing that runs in integers.
    """
    from deploykit.data.pixels import normalize

    exact = exact_inputs(candidate, target)
    graph = calibration_graph(candidate.module, example_input(candidate, batch=2), target, exact)
    with torch.no_grad(), quiet():
        for start in range(0, len(samples), CALIBRATION_BATCH):
            batch = torch.from_numpy(np.array(samples[start : start + CALIBRATION_BATCH]))
            graph(normalize(batch, candidate.signature.preprocess))
    return _quantized(candidate, candidate.module, read_parameters(graph), target, "ptq", {})


def calibration_rows(count: int, section: QuantizeSection, seed: int) -> np.ndarray:
    """Choose which of ``count`` training samples calibrate, in rising order."""
    generator = np.random.default_rng(stable_seed(seed, "quantize", "calibration"))
    return np.sort(generator.permutation(count)[: section.calibration_samples])


def train_quantized(
    candidate: Candidate,
    training: Training,
    section: QuantizeSection,
    *,
    target: Target,
    teacher: nn.Module | None = None,
) -> Candidate:
    """Quantize in training: the model learns weights and ranges that integers serve well.

    BatchNorm statistics and ranges stand still after ``section.freeze_statistics`` of the
    epochs (Krishnamoorthi 2018, section 4.2), so that the last epochs train the very
    arithmetic that ships.

    Args:
        candidate: a float candidate; left as it is.
        training: data and plan.
        section: epochs, rate, when statistics stand still.
        target: decides the integer types.
        teacher: a float module whose answers are learned from where the section says so; the
            candidate's own by default.

    Raises:
        CompressionError: the model has nothing that runs in integers.
    """
    from deploykit.train import distillation, fit, recovery_plan

    exact = exact_inputs(candidate, target)
    graph = training_graph(candidate.module, example_input(candidate, batch=2), target, exact)
    plan = recovery_plan(training.plan, section)
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
    module.load_state_dict(
        {name: trained.get(name, old) for name, old in module.state_dict().items()}
    )
    notes = {"recovery": [result.to_json()]}
    return _quantized(candidate, module, read_parameters(graph), target, "qat", notes)


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
    mode: str,
    notes: JsonDict,
) -> Candidate:
    if not parameters:
        raise CompressionError(
            "quantize: expected a model with convolutions or linear layers, got none that run in "
            "integers; remove the quantize section"
        )
    quantization = {
        "target": target.name,
        "mode": mode,
        "parameters": {key: list(value) for key, value in parameters.items()},
    }
    return Candidate(
        module=module,
        signature=candidate.signature,
        structure={**candidate.structure, "quantization": quantization},
        stage="quantize",
        notes=notes,
    )
