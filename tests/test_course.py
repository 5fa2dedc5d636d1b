from types import SimpleNamespace

import pytest

from deploykit.course import Course
from deploykit.decisions import pays
from deploykit.errors import BudgetError
from deploykit.recipe.sections import PruneSection, QuantizeSection


def stage(name, folder, size=100):
    file = folder / f"{name}.onnx"
    file.write_bytes(b"x" * size)
    return SimpleNamespace(name=name, model=SimpleNamespace(path=file))


@pytest.fixture
def train(tmp_path):
    return stage("train", tmp_path)


@pytest.mark.parametrize(
    ("speedup", "size", "worth"),
    [
        (1.5, 100, True),  # faster
        (1.0, 50, True),  # smaller, and not slower
        (0.985, 50, True),  # nor by what a measurement can tell
        (0.965, 50, False),  # it may be slower
        (1.0, 100, False),  # nothing
        (1.01, 98, False),  # nothing that a measurement can tell
        (0.9, 10, False),  # slower, however small
    ],
)
def test_a_stage_pays_if_it_is_faster_or_smaller_without_being_slower(
    train, tmp_path, speedup, size, worth
):
    after = stage("prune", tmp_path, size)
    assert pays(speedup, train, after) is worth
    course = Course([train])
    course.add(after)
    course.judge(after, PruneSection(), speedup)
    assert ("prune" not in course.refused) is worth
    assert course.final.name == ("prune" if worth else "train")


def test_next_stage_is_made_from_the_last_one_kept(train, tmp_path):
    course = Course([train])
    course.add(stage("prune", tmp_path))
    course.judge(course.stages[-1], PruneSection(), 0.5)
    assert "does not pay: 0.50x the speed" in course.reasons["prune"]
    course.add(stage("quantize", tmp_path, 30))
    assert course.origin["quantize"] is train
    course.judge(course.stages[-1], QuantizeSection(), 2.0)
    assert course.final.name == "quantize"


def test_recipe_may_keep_what_does_not_pay(train, tmp_path):
    course = Course([train])
    course.add(stage("prune", tmp_path))
    course.judge(course.stages[-1], PruneSection(unless_it_pays="keep"), 0.5)
    assert course.final.name == "prune"


def test_recipe_may_demand_that_it_pays(train, tmp_path):
    course = Course([train])
    course.add(stage("quantize", tmp_path))
    with pytest.raises(BudgetError, match=r"quantize: expected a stage that pays, got 0\.50x"):
        course.judge(course.stages[-1], QuantizeSection(unless_it_pays="fail"), 0.5)
