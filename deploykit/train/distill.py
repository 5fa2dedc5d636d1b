"""Learning from another model's answers beside the labels.

Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from deploykit.recipe.sections import TrainSection
from deploykit.train.answers import KeptAnswers
from deploykit.train.learner import open_fabric
from deploykit.train.loop import Loss
from deploykit.train.plan import Training

TEMPERATURE = 4.0  # softens both answers, so that the smaller probabilities tell something
SHARE = 0.9  # of the loss that is the teacher's


def distillation(teacher: nn.Module, training: Training, plan: TrainSection) -> Loss:
    """Return a loss that draws the answers to the labels and to those of ``teacher``.

    Args:
        teacher: a float module that takes what the student takes; copied.
        training: says on which device.
        plan: its label smoothing goes into the part of the labels.
    """
    device = open_fabric(training.device, plan.precision).device
    module = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    # On a GPU the teacher answers sooner than its answers could be looked up.
    kept = training.answers if device.type == "cpu" else None
    knowing = module if kept is None else KeptAnswers(module, kept)

    def loss(outputs: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            known = log_softmax(knowing(inputs) / TEMPERATURE, dim=1)
        answered = log_softmax(outputs / TEMPERATURE, dim=1)
        soft = kl_div(answered, known, reduction="batchmean", log_target=True)
        hard = cross_entropy(outputs, targets, label_smoothing=plan.label_smoothing)
        return SHARE * TEMPERATURE**2 * soft + (1 - SHARE) * hard

    return loss
