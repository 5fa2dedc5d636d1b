"""Learning from another model's answers beside the labels.

Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from deploykit.recipe.sections import TrainSection
from deploykit.train.answers import KeptAnswers
from deploykit.train.learner import open_fabric
from deploykit.train.loop import Loss
from deploykit.train.plan import Training


class Taught(Protocol):
    """The section that says how much of the teacher's answers counts."""

    @property
    def temperature(self) -> float:
        """Divides the answers of both, so that the smaller probabilities tell something."""

    @property
    def share(self) -> float:
        """Of the loss that is the teacher's; the rest is the labels'."""


def distillation(
    teacher: nn.Module, training: Training, plan: TrainSection, taught: Taught
) -> Loss:
    """Return a loss that draws the answers to the labels and to those of ``teacher``.

    Args:
        teacher: a float module that takes what the student takes; copied.
        training: says on which device.
        plan: its label smoothing goes into the part of the labels.
        taught: temperature, and the teacher's share of the loss.
    """
    temperature, share = taught.temperature, taught.share
    device = open_fabric(training.device, plan.precision).device
    module = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    # On a GPU the teacher answers sooner than its answers could be looked up.
    kept = training.answers if device.type == "cpu" else None
    knowing = module if kept is None else KeptAnswers(module, kept)

    def loss(outputs: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            known = log_softmax(knowing(inputs) / temperature, dim=1)
        answered = log_softmax(outputs / temperature, dim=1)
        soft = kl_div(answered, known, reduction="batchmean", log_target=True)
        hard = cross_entropy(outputs, targets, label_smoothing=plan.label_smoothing)
        return share * temperature**2 * soft + (1 - share) * hard

    return loss
