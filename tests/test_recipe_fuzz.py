"""Whatever is written: a Recipe or a RecipeError, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit.errors import RecipeError
from deploykit.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from deploykit.recipe.schema import keys

START = "schema: 1\nname: tiny\ntask: classification\ndata: {source: d}\nmodel: {name: mlp}\n"
PATHS = [key.path.replace(".N.", ".0.") for key in keys()]
PIECES = [
    "a",
    ":",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\n",
    "\n  ",
    "\t",
    "&a",
    "*a",
    "!!int ",
    '"',
]
PIECES += [
    "'",
    "|",
    ">",
    "#",
    "?",
    "~",
    "1",
    "3e-3",
    ".nan",
    "---",
    "...",
    "%",
    "\0",
    "\ud800",
    "é",
]
PIECES += ["<<", "train", "epochs", "\x85", "\u2028", "\ufeff", "9" * 30]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["never", "best", "qat", "cpu", "3e-3", "0x1", "~", "null", ".5"])
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(PATHS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def accepts_or_explains(text: str, *overrides: str) -> None:
    try:
        recipe = parse_recipe(text, overrides)
    except RecipeError as error:
        problems = error.problems
    else:
        assert isinstance(recipe, Recipe)
        assert parse_recipe(dump_recipe(recipe)) == recipe
        return
    assert problems
    assert all(problem.isprintable() for problem in problems)


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=25).map("".join))
def test_any_text_is_accepted_or_explained(text: str) -> None:
    accepts_or_explains(text)
    accepts_or_explains(START + text)


@settings(max_examples=300)
@given(st.sampled_from(PATHS) | st.text(max_size=12), trees)
def test_any_value_of_any_key_is_accepted_or_explained(path: str, value: Any) -> None:
    try:
        written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix(
            "\n...\n"
        )
    except yaml.YAMLError:
        return
    accepts_or_explains(START, f"{path}={written}")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_file_is_accepted_or_explained(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError):
        load_recipe(path)


words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)


@settings(max_examples=200)
@given(
    st.dictionaries(
        words, st.booleans() | st.integers() | words | st.lists(st.integers()), max_size=5
    ),
    st.lists(words, max_size=4),
    st.floats(0, 1e300, exclude_min=True),
)
def test_what_is_dumped_loads_back_equal(
    arguments: dict[str, Any], classes: list[str], lr: float
) -> None:
    recipe = Recipe.model_validate(
        {
            "schema": 1,
            "name": "tiny",
            "task": "classification",
            "data": {"source": "d", "classes": tuple(classes)},
            "model": {"name": "mlp", "arguments": arguments},
            "train": {"optimizer": {"lr": lr}},
        }
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe
