from pathlib import Path

import pytest

from deploykit.recipe import parse_recipe
from deploykit.recipe.document import EXAMPLE, key_list, page
from deploykit.recipe.schema import keys, nearest_key

ROOT = Path(__file__).parents[1]


def test_page_is_up_to_date() -> None:
    assert (ROOT / "docs/recipe.md").read_text() == page(), "run: make docs"


def test_example_is_a_recipe() -> None:
    assert parse_recipe(EXAMPLE).name == "digits"


def test_every_key_stands_in_page_and_list_with_type_default_and_meaning() -> None:
    listed, written = key_list(), page()
    for key in keys():
        assert key.takes
        assert key.default
        assert key.about
        if "." in key.path or not key.is_section:
            assert f"| `{key.path}` |" in written
            assert f"  {key.path}: " in listed
        else:
            assert f"\n## {key.path}\n" in written


@pytest.mark.parametrize("width", [80, 60])
def test_list_keeps_to_the_width(width: int) -> None:
    assert max(map(len, key_list(width).splitlines())) <= width


def test_keys_come_in_running_order() -> None:
    tops = [key.path for key in keys() if "." not in key.path]
    stages = ["train", "distill", "surgery", "prune", "sparsify", "cluster", "quantize"]
    assert tops[-10:] == ["model", *stages, "verify", "budget"]


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        (("trian",), "train"),
        (("train", "optimiser"), "train.optimizer"),
        (("data", "augment", 0, "pading"), "data.augment.0.padding"),
        (("prune", "momentum"), "train.optimizer.momentum"),
        (("quantize", "warmup"), "quantize.schedule.warmup"),
        (("nothing-like-it",), None),
    ],
)
def test_nearest_key_is_a_sibling_or_else_of_the_same_name(
    path: tuple[str | int, ...], nearest: str | None
) -> None:
    assert nearest_key(path) == nearest
