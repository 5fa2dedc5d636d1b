"""The float model that a run starts from: built, and held to what every stage needs of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deploykit.artifacts import Candidate, JsonDict, Signature, TensorSpec
from deploykit.data import Dataset
from deploykit.errors import ModelError, RecipeError
from deploykit.models.build import build_model
from deploykit.models.modes import evaluating
from deploykit.models.normalization import fold_normalization
from deploykit.prune.groups import match_modules
from deploykit.quantization.graphs import trace
from deploykit.quantization.rules import match_layers
from deploykit.recipe.sections import Recipe
from deploykit.seeds import stable_seed
from deploykit.structure import example_input
from deploykit.train.freeze import match_groups


def initial_candidate(recipe: Recipe, dataset: Dataset, module: nn.Module | None) -> Candidate:
    """Build the recipe's model, with one mean and one std where that can be.

    Args:
        recipe: with absolute paths.
        dataset: decides classes, shape and normalization.
        module: the model, where it was given as an object; copied, never altered.

    Raises:
        ModelError: a later stage could not use the model; said now, not after the training.
    """
    classes = len(dataset.classes)
    signature = Signature(
        inputs=(_input_spec(dataset),),
        outputs=(TensorSpec("logits", "float32", (-1, classes)),),
        labels=dataset.classes,
        preprocess=dataset.preprocess,
    )
    structure: JsonDict = {
        "model": {"name": recipe.model.name, "arguments": recipe.model.arguments},
        "classes": classes,
        "sample_shape": list(dataset.sample_shape),
    }
    module = _build(recipe, dataset) if module is None else copy.deepcopy(module)
    plain = Candidate(module, signature, structure, stage="train")
    example = example_input(plain, batch=2)
    _check_answer(plain, example, classes)
    folded, preprocess, note = fold_normalization(module, dataset.preprocess, example)
    candidate = replace(
        plain,
        module=folded,
        signature=replace(signature, preprocess=preprocess),
        structure={**structure, "input": note},
        notes={"input": note},
    )
    _check_stages(recipe, candidate, example)
    return candidate


def _build(recipe: Recipe, dataset: Dataset) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed(recipe.seed, "weights"))
        return build_model(
            recipe.model,
            classes=len(dataset.classes),
            sample_shape=dataset.sample_shape,
            base=Path(),
        )


def _input_spec(dataset: Dataset) -> TensorSpec:
    if dataset.preprocess is None:
        return TensorSpec("features", "float32", (-1, *dataset.sample_shape))
    return TensorSpec("image", "uint8", (-1, *dataset.sample_shape))


def _check_answer(candidate: Candidate, example: Tensor, classes: int) -> None:
    name = candidate.structure["model"]["name"]
    try:
        with torch.no_grad(), evaluating(candidate.module) as module:
            answer = module(example)
    except Exception as error:  # a user's code may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(
            f"model: {name}: expected a forward pass on input {tuple(example.shape)}, "
            f"got {why}; mend the model or the size of the data"
        ) from error
    got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if got != (len(example), classes):
        raise ModelError(
            f"model: {name}: expected logits {(len(example), classes)}, one a class, got {got}; "
            "mend the model or the classes of the data"
        )


def _check_stages(recipe: Recipe, candidate: Candidate, example: Tensor) -> None:
    """Match the recipe with the data's kind and the model's layers, and trace the model."""
    if recipe.data.augment and not candidate.signature.takes_images:
        raise RecipeError(["data.augment: expected images to augment, got arrays; remove it"])
    if recipe.train is not None:
        match_groups(candidate.module, recipe.train.groups)
    if recipe.prune is not None:
        match_modules(candidate.module, recipe.prune.protect)
    graph = trace(candidate.module, example)
    if recipe.quantize is not None:
        match_layers(graph.graph, recipe.quantize.keep_float)
