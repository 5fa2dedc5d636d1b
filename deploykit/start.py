"""The float models that a run is given: built, and held to what every stage needs of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.artifacts import Candidate, JsonDict, Signature, TensorSpec
from deploykit.data import Dataset
from deploykit.data.pixels import normalize
from deploykit.errors import MissingDependency, ModelError, RecipeError, first_line
from deploykit.held_weights import check_protected
from deploykit.models.build import build_model, drawing
from deploykit.models.modes import evaluating
from deploykit.models.normalization import fold_normalization
from deploykit.models.patterns import match_modules
from deploykit.quantization.graphs import trace
from deploykit.quantization.layers import match_layers
from deploykit.recipe.sections import ModelSection, Recipe
from deploykit.seeds import stable_seed
from deploykit.structure import example_input
from deploykit.surgery import replaced
from deploykit.train.freeze import match_groups

SAME = 1e-3  # of the largest logit: what two ways to compute the same may differ by


def initial_candidate(recipe: Recipe, dataset: Dataset, module: nn.Module | None) -> Candidate:
    """Build the recipe's model, with one mean and one std where that can be.

    Args:
        recipe: with absolute paths.
        dataset: decides classes, shape and normalization.
        module: the model, where it was given as an object; copied, never altered.

    Raises:
        ModelError: a later stage could not use the model; said now, not after the training.
    """
    module = _build(recipe.model, recipe, dataset) if module is None else _copied(module)
    candidate = _folded(_plain(recipe.model, module, recipe, dataset), stage="train")
    _check_stages(recipe, dataset, candidate)
    return candidate


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"model: expected a module that can be copied, got {first_line(error)}; let it hold "
            "parameters and buffers only, no tensors computed from them: weight_norm and "
            "spectral_norm of torch.nn.utils.parametrizations, not those of torch.nn.utils"
        ) from error


def student_candidate(recipe: Recipe, dataset: Dataset) -> Candidate | None:
    """Build the student of the recipe's ``distill``, with one mean and one std where that can be.

    Raises:
        ModelError: it cannot be built, or a later stage could not use it.
    """
    if recipe.distill is None:
        return None
    with _told_of("distill.student"):
        module = _build(recipe.distill.student, recipe, dataset)
        candidate = _folded(
            _plain(recipe.distill.student, module, recipe, dataset), stage="distill"
        )
        _check_trace(candidate, dataset)
        return candidate


def teacher_candidate(recipe: Recipe, dataset: Dataset) -> Candidate | None:
    """Build the teacher that the recipe's ``train`` names; it takes what the data section says.

    Raises:
        ModelError: it cannot be built, or knows other classes.
    """
    if recipe.train is None or recipe.train.teacher is None:
        return None
    with _told_of("train.teacher"):
        module = _build(recipe.train.teacher, recipe, dataset)
        return _plain(recipe.train.teacher, module, recipe, dataset)


@contextmanager
def _told_of(section: str) -> Iterator[None]:
    """Let a fault of a further model name its own section in place of ``model``."""
    try:
        yield
    except (ModelError, MissingDependency) as error:
        message = str(error)
        told = message.removeprefix("model") if message.startswith("model") else f": {message}"
        raise type(error)(f"{section}{told}") from error


def _plain(section: ModelSection, module: nn.Module, recipe: Recipe, dataset: Dataset) -> Candidate:
    """Return a module as a candidate that takes what the data section says.

    Raises:
        ModelError: it does not answer with a logit a class.
    """
    classes = len(dataset.classes)
    signature = Signature(
        inputs=(_input_spec(dataset),),
        outputs=(TensorSpec("logits", "float32", (-1, classes)),),
        labels=dataset.classes,
        preprocess=dataset.preprocess,
    )
    structure: JsonDict = {
        "model": {
            "name": section.name,
            "arguments": section.arguments,
            "seed": stable_seed(recipe.seed, "weights"),
        },
        "classes": classes,
        "sample_shape": list(dataset.sample_shape),
    }
    candidate = Candidate(module, signature, structure, stage="train")
    _check_answer(candidate, example_input(candidate, batch=2), classes)
    return candidate


def _folded(plain: Candidate, stage: str) -> Candidate:
    """Return a candidate with one mean and one std where that can be."""
    module, preprocess, note = fold_normalization(
        plain.module, plain.signature.preprocess, example_input(plain, batch=2)
    )
    return replace(
        plain,
        module=module,
        signature=replace(plain.signature, preprocess=preprocess),
        structure={**plain.structure, "input": note},
        stage=stage,
        notes={"input": note},
    )


def _build(section: ModelSection, recipe: Recipe, dataset: Dataset) -> nn.Module:
    with drawing(stable_seed(recipe.seed, "weights")):
        return build_model(
            section,
            classes=len(dataset.classes),
            sample_shape=dataset.sample_shape,
            base=Path(),
        )


def _input_spec(dataset: Dataset) -> TensorSpec:
    if dataset.preprocess is None:
        return TensorSpec("features", "float32", (-1, *dataset.sample_shape))
    return TensorSpec("image", "uint8", (-1, *dataset.sample_shape))


def _check_answer(candidate: Candidate, example: Tensor, classes: int) -> None:
    """Refuse a model that does not answer with float32 logits, one a class, at any batch size."""
    name = candidate.structure["model"]["name"]
    for inputs in (example, example[:1]):
        try:
            with torch.no_grad(), evaluating(candidate.module) as module:
                answer = module(inputs)
        except Exception as error:  # a user's code may raise anything
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(
                f"model: {name}: expected a forward pass on input {tuple(inputs.shape)}, "
                f"got {why}; mend the model or the size of the data"
            ) from error
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        if got != (len(inputs), classes):
            raise ModelError(
                f"model: {name}: expected logits {(len(inputs), classes)}, one a class, got {got}; "
                "mend the model or the classes of the data"
            )
        if answer.dtype != torch.float32:
            raise ModelError(
                f"model: {name}: expected logits of float32, got "
                f"{str(answer.dtype).removeprefix('torch.')}; end the forward pass with .float()"
            )


def _check_trace(candidate: Candidate, dataset: Dataset) -> None:
    """Refuse a model whose trace answers otherwise than its own forward pass.

    Raises:
        ModelError: it cannot be traced, or the trace is another function.
    """
    graph = trace(candidate.module, example_input(candidate, batch=2))
    rows = np.arange(3) % len(dataset.train)
    preprocess = candidate.signature.preprocess
    inputs = normalize(torch.from_numpy(dataset.train.load(rows)), preprocess)
    with torch.no_grad(), evaluating(candidate.module) as module:
        expected, found = module(inputs), graph(inputs)
    largest = float(expected.nan_to_num(posinf=0, neginf=0).abs().max())
    margin = SAME * max(largest, 1)
    if not torch.allclose(found, expected, rtol=0, atol=margin, equal_nan=True):
        apart = float((found - expected).abs().max())
        raise ModelError(
            f"model: {candidate.structure['model']['name']}: expected torch.export's trace to "
            f"answer as the model does, got logits that differ by {apart:.2g}; let forward draw "
            "no random numbers and write into no part of a tensor"
        )


def _check_stages(recipe: Recipe, dataset: Dataset, candidate: Candidate) -> None:
    """Match the recipe with the data's kind and the models' layers, and trace the models."""
    if recipe.data.augment and not candidate.signature.takes_images:
        raise RecipeError(["data.augment: expected images to augment, got arrays; remove it"])
    if recipe.train is not None:
        match_groups(candidate.module, recipe.train.groups)
    _check_trace(candidate, dataset)
    teacher_candidate(recipe, dataset)
    student = student_candidate(recipe, dataset)
    if recipe.distill is None or recipe.distill.unless_it_pays == "drop":
        _check_patterns(recipe, candidate)
    if student is not None:
        _check_patterns(recipe, student)


def _check_patterns(recipe: Recipe, candidate: Candidate) -> None:
    """Match patterns with a model that may go on to be compressed."""
    if recipe.surgery is not None:
        operated, _ = replaced(candidate, recipe.surgery, [example_input(candidate, batch=2)])
        _check_patterns(recipe.model_copy(update={"surgery": None}), operated)
        if recipe.surgery.unless_it_pays != "drop":
            return
    module = candidate.module
    if recipe.prune is not None:
        match_modules(module, recipe.prune.protect, "prune.protect")
    if recipe.sparsify is not None:
        check_protected(module, recipe.sparsify.protect, "sparsify")
    if recipe.cluster is not None:
        check_protected(module, recipe.cluster.protect, "cluster")
    if recipe.quantize is not None and recipe.quantize.keep_float:
        graph = trace(module, example_input(candidate, batch=2)).graph
        match_layers(graph, recipe.quantize.keep_float)
