"""Relative paths of a recipe, made absolute once, so that a run can be read from anywhere."""

from pathlib import Path

from deploykit.recipe.sections import ModelSection, Recipe, Section


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Return ``recipe`` with every path absolute.

    Args:
        recipe: paths in it are relative to ``base``.
        base: the folder of the recipe's file.
    """
    base = base.resolve()
    data, train, distill = recipe.data, recipe.train, recipe.distill
    new_data = data.model_copy(
        update={
            "source": _file_function(data.source, base),
            **{key: _path(getattr(data, key), base) for key in ("train", "validation", "test")},
        }
    )
    updates: dict[str, Section] = {"data": new_data, "model": _model(recipe.model, base)}
    if train is not None and train.teacher is not None:
        updates["train"] = train.model_copy(update={"teacher": _model(train.teacher, base)})
    if distill is not None:
        updates["distill"] = distill.model_copy(update={"student": _model(distill.student, base)})
    return recipe.model_copy(update=updates)


def _model(section: ModelSection, base: Path) -> ModelSection:
    return section.model_copy(
        update={
            "name": _file_function(section.name, base),
            "weights": _path(section.weights, base),
        }
    )


def _path(value: str | float | None, base: Path) -> str | float | None:
    return str(base / value) if isinstance(value, str) else value


def _file_function(name: str, base: Path) -> str:
    """Make the path of ``path/to/file.py:function`` absolute; other names are no paths."""
    file, colon, function = name.rpartition(":")
    return f"{base / file}:{function}" if colon and file.endswith(".py") else name
