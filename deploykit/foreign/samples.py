"""The samples that judge a model from elsewhere: a recipe's data, in the size that it takes."""

from __future__ import annotations

import json
from pathlib import Path

from deploykit.data import Dataset
from deploykit.data.load import load_dataset
from deploykit.errors import DataError, ModelError, RecipeError
from deploykit.foreign.border import Border
from deploykit.recipe import Recipe, load_recipe, parse_recipe
from deploykit.recipe.paths import with_absolute_paths

IMAGES, ARRAYS = "image-classification", "classification"
# What a file of data alone lacks to be a recipe, and what of one is not asked for.
FILLED = ("schema=1", "name=model", "model={name: mlp}")


def read_recipe(data: str | Path | Dataset, task: str) -> Recipe:
    """Read what names the samples.

    Args:
        data: a YAML file with a recipe's ``data`` section (a whole recipe has one), a folder of
            one folder a class, ``digits``, or the samples themselves.
        task: of the model, where the file names none.

    Raises:
        RecipeError: the file has faults.
    """
    if isinstance(data, Dataset):
        return _recipe_of({"source": "python"}, ARRAYS if data.preprocess is None else IMAGES)
    if str(data) == "digits":
        return _recipe_of({"source": "digits"}, task)
    path = Path(data)
    if path.is_dir():
        return _recipe_of({"source": "imagefolder", "train": str(path)}, task)
    try:
        recipe = load_recipe(path, FILLED)
    except RecipeError:
        recipe = load_recipe(path, (*FILLED, f"task={task}"))
    return with_absolute_paths(recipe, path.parent)


def _recipe_of(section: dict[str, str], task: str) -> Recipe:
    text = json.dumps({"data": section})  # which is YAML too
    return with_absolute_paths(parse_recipe(text, (*FILLED, f"task={task}"), "--data"), Path())


def read_samples(recipe: Recipe, border: Border, layout: str | None) -> Dataset:
    """Read the samples, in the size and the colours of the model where the recipe leaves them open.

    Args:
        recipe: with absolute paths.
        border: of the model.
        layout: of its images, ``nchw`` or ``nhwc``; None where it takes arrays.

    Raises:
        DataError: anything is wrong with the data.
    """
    section = recipe.data
    if layout is not None:
        height, width, channels = image_sizes(border.input.shape[1:], layout)
        known: dict[str, object] = {}
        if section.size is None and -1 not in (height, width):
            known["size"] = (height, width)
        if section.channels is None and channels in (1, 3):
            known["channels"] = channels
        section = section.model_copy(update=known)
    return load_dataset(section, task=recipe.task, seed=recipe.seed, base=Path())


def image_sizes(sizes: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """Return height, width and channels of an image as the model takes it."""
    channels, height, width = sizes if layout == "nchw" else (sizes[2], sizes[0], sizes[1])
    return height, width, channels


def model_shape(dataset: Dataset, layout: str | None) -> tuple[int, ...]:
    """Return the shape of one sample as the model takes it."""
    if layout != "nchw":
        return dataset.sample_shape
    height, width, channels = dataset.sample_shape
    return channels, height, width


def check_fit(dataset: Dataset, border: Border, layout: str | None, where: str) -> None:
    """Refuse samples that the model does not take, or classes that it does not know.

    Raises:
        DataError: naming both.
    """
    wanted, got = border.input.shape[1:], model_shape(dataset, layout)
    fits = len(wanted) == len(got) and all(
        size in (-1, found) for size, found in zip(wanted, got, strict=True)
    )
    if not fits:
        raise DataError(
            f"data: expected samples of shape {wanted}, which {where} takes, got {got}; set "
            "data.size and data.channels, or name other data"
        )
    classes = border.output.shape[1]
    if classes not in (-1, len(dataset.classes)):
        raise DataError(
            f"data: expected {classes} classes, which {where} tells apart, got "
            f"{len(dataset.classes)}; name them all, in its order, with data.classes"
        )


def check_task(recipe: Recipe, border: Border, where: str) -> None:
    """Refuse images for a model of arrays.

    Raises:
        ModelError: the input is no batch of images.
    """
    if recipe.task == IMAGES and len(border.input.shape) != 4:
        raise ModelError(
            f"{where}: input {border.input.name!r}: expected a batch of images with 4 axes, got "
            f"{len(border.input.shape)}; set task: {ARRAYS} in the data's file"
        )
    if recipe.task != IMAGES and border.input.dtype != "float32":
        raise ModelError(
            f"{where}: input {border.input.name!r}: expected float32 arrays, got "
            f"{border.input.dtype}; set task: {IMAGES} in the data's file"
        )
