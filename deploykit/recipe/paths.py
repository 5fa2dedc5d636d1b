"""Relative paths of a recipe, made absolute once, so that a run can be read from anywhere."""

from pathlib import Path

from deploykit.recipe.sections import Recipe


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Return ``recipe`` with every path absolute.

    Args:
        recipe: paths in it are relative to ``base``.
        base: the folder of the recipe's file.
    """
    base = base.resolve()
    data, model = recipe.data, recipe.model
    new_data = data.model_copy(
        update={
            "source": _file_function(data.source, base),
            **{key: _path(getattr(data, key), base) for key in ("train", "validation", "test")},
        }
    )
    new_model = model.model_copy(
        update={
            "name": _file_function(model.name, base),
            "weights": _path(model.weights, base),
        }
    )
    return recipe.model_copy(update={"data": new_data, "model": new_model})


def _path(value: str | float | None, base: Path) -> str | float | None:
    return str(base / value) if isinstance(value, str) else value


def _file_function(name: str, base: Path) -> str:
    """Make the path of ``path/to/file.py:function`` absolute; other names are no paths."""
    file, colon, function = name.rpartition(":")
    return f"{base / file}:{function}" if colon and file.endswith(".py") else name
