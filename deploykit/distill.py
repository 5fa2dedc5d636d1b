"""The distillation stage: a smaller model learns from the trained one and goes on in its place.

Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from deploykit.artifacts import Candidate
from deploykit.models.normalization import renormalized
from deploykit.recipe.sections import DistillSection, TrainSection

if TYPE_CHECKING:
    from deploykit.train import Training


def distill(
    candidate: Candidate, student: Candidate, training: Training, section: DistillSection
) -> Candidate:
    """Let ``student`` learn from the labels and from the answers of ``candidate``.

    Args:
        candidate: the trained float model; left as it is.
        student: an untrained one, or one with weights of its own; left as it is.
        training: data and plan; pixels are normalized as the student takes them.
        section: epochs, rate, temperature and the teacher's share of the loss.

    Returns:
        The trained student, with its own factory in ``structure``.
    """
    from deploykit.train import distillation, fit

    names = [one.structure["model"]["name"] for one in (student, candidate)]
    notes = {**student.notes, "why": f"{names[0]} in place of {names[1]}"}
    if section.epochs == 0:
        return replace(student, notes=notes)
    takes, given = candidate.signature.preprocess, student.signature.preprocess
    training = replace(training, dataset=replace(training.dataset, preprocess=given))
    teacher = renormalized(candidate.module, takes=takes, given=given)
    plan = student_plan(training.plan, section)
    module = copy.deepcopy(student.module)
    loss = distillation(teacher, training, plan, section)
    result = fit(module, training, stage="distill", plan=plan, loss=loss)
    return replace(student, module=module, notes={**notes, "fit": result.to_json()})


def student_plan(train: TrainSection, section: DistillSection) -> TrainSection:
    """Return how the student trains: as ``train``, but for the section's keys.

    Groups of modules are the other model's, and so is its teacher.
    """
    lr = section.lr or train.optimizer.lr
    return train.model_copy(
        update={
            "epochs": section.epochs,
            "optimizer": train.optimizer.model_copy(update={"lr": lr}),
            "schedule": section.schedule or train.schedule,
            "groups": (),
            "teacher": None,
        }
    )
