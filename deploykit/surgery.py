"""The surgery stage: operators that integers run slowly give way to ones that cost nothing.

ONNX Runtime computes hard-swish and SiLU on integers as two operators each; ReLU6 vanishes into
the range of the integers before it. Squeeze-and-excite reads and writes its whole tensor once
more. EfficientNet-Lite left out both for this
reason (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deploykit.artifacts import Candidate, JsonDict
from deploykit.errors import CompressionError
from deploykit.layer_shapes import is_inside
from deploykit.models.patterns import match_modules
from deploykit.models.surgery import (
    count_slow_activations,
    find_activations,
    find_gates,
    remove_gate,
    replace_operators,
)
from deploykit.recipe.sections import SurgerySection
from deploykit.seeds import stable_seed
from deploykit.structure import example_input

if TYPE_CHECKING:
    from deploykit.train import Training

SAMPLES, BATCH = 256, 32  # of the training split, that say what a gate does in the mean


def operate(candidate: Candidate, training: Training, section: SurgerySection) -> Candidate:
    """Replace what integers run slowly, and train the others to live with it.

    Args:
        candidate: a float candidate; left as it is, the teacher where the section says so.
        training: data and plan for the recovery.
        section: what is replaced, and what stays whole.

    Returns:
        The candidate; ``structure["surgery"]`` names what was replaced, ``notes["surgery"]``
        that and what was left alone, with the reason.

    Raises:
        CompressionError: there is nothing to replace.
    """
    from deploykit.train import recover

    samples = _samples(candidate, training)
    operated, left_alone = replaced(candidate, section, samples)
    surgery = operated.structure["surgery"]
    recovery = recover(
        operated.module,
        training,
        section,
        stage="surgery",
        teacher=candidate.module,
        hold={},
    )
    relu6, removed = len(surgery["relu6"]), len(surgery["removed"])
    why = f"{relu6} activations became ReLU6, {removed} squeeze-and-excites went"
    why += _reasons(left_alone, "; left alone: ")
    notes: JsonDict = {
        "surgery": {**surgery, "left_alone": left_alone},
        "why": why,
        "recovery": recovery,
    }
    return replace(operated, notes=notes)


def replaced(
    candidate: Candidate, section: SurgerySection, batches: list[Tensor]
) -> tuple[Candidate, dict[str, str]]:
    """Replace what the section names in a copy, without training.

    Args:
        candidate: a float candidate; left as it is.
        section: what is replaced, and what stays whole.
        batches: inputs of the module, that say what a gate does in the mean.

    Returns:
        The candidate, and by module why it was left alone.

    Raises:
        CompressionError: there is nothing to replace, or a pattern fits no module.
    """
    module, example = copy.deepcopy(candidate.module), example_input(candidate, batch=2)
    protected = match_modules(module, section.protect, "surgery.protect")
    left_alone: dict[str, str] = {}
    removed = []
    if section.squeeze_excite:
        for name, gate in find_gates(module, batches).items():
            if name in protected:
                left_alone[name] = "the recipe protects it"
            elif remove_gate(module, name, gate, example):
                removed.append(name)
            else:
                left_alone[name] = "no layer beside it can take its mean factor"
    relu6 = []
    if section.activations:
        found = [name for name in find_activations(module) if not is_inside(name, removed)]
        relu6 = [name for name in found if name not in protected]
        left_alone |= dict.fromkeys(sorted(set(found) - set(relu6)), "the recipe protects it")
    if not relu6 and not removed:
        raise CompressionError(
            "surgery: expected modules that compute hard-swish or SiLU, or squeeze-and-excites, "
            f"got none{_reasons(left_alone, ': ')}; remove the section"
        )
    surgery = {"relu6": relu6, "removed": removed}
    replace_operators(module, surgery)
    protected_calls = len(left_alone.keys() & set(find_activations(module)))
    if section.activations and count_slow_activations(module, example) > protected_calls:
        left_alone[""] = "hard-swish or SiLU is also called where no module stands for it"
    structure = {**candidate.structure, "surgery": surgery}
    return replace(candidate, module=module, structure=structure, stage="surgery"), left_alone


def _reasons(left_alone: dict[str, str], before: str) -> str:
    """Say what was left alone and why, to end a sentence; nothing where nothing was."""
    told = ", ".join(f"{name} ({why})" if name else why for name, why in left_alone.items())
    return f"{before}{told}" if told else ""


def _samples(candidate: Candidate, training: Training) -> list[Tensor]:
    from deploykit.data.pixels import normalize

    split = training.dataset.train
    generator = np.random.default_rng(stable_seed(training.seed, "surgery"))
    rows = np.sort(generator.permutation(len(split))[:SAMPLES])
    return [
        normalize(torch.from_numpy(split.load(part)), candidate.signature.preprocess)
        for part in np.split(rows, range(BATCH, len(rows), BATCH))
    ]
