"""Measurements, what is decided by them, and where they come from."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import STAGES

from deploykit import integers, stages
from deploykit.course import Course
from deploykit.decisions import Decision, check_budget, ptq_decision, stage_decision
from deploykit.errors import UsageError
from deploykit.making import judge_precision
from deploykit.measure import Evaluation
from deploykit.recipe.sections import BudgetSection, QuantizeSection
from deploykit.run_folder import RunFolder


def fake_stage(name, path, correct=(True, True, False, False), size=100):
    path.mkdir(exist_ok=True)
    file = path / f"{name}.onnx"
    file.write_bytes(name.encode() * (size // len(name)))
    correct = np.array(correct)
    evaluation = Evaluation(np.zeros(len(correct), int), correct, np.zeros((1, 1), int))
    return SimpleNamespace(
        name=name,
        model=SimpleNamespace(path=file),
        validation=evaluation,
        candidate=SimpleNamespace(notes={}, structure={}, module=None),
    )


def figures(ratio):
    latency = {
        "median_ms": 1 / ratio,
        "p90_ms": 2 / ratio,
        "ratio": ratio,
        "interval": [ratio * 0.9, ratio * 1.1],
        "rounds": 10,
        "threads": 1,
        "margin": 0.02,
    }
    return {"latency": {"1": latency, "32": latency}, "peak_memory_bytes": 1000}


RECIPE = SimpleNamespace(threads=1)


def test_measurements_are_written_before_they_are_returned_and_then_read_back(
    tmp_path, monkeypatch
):
    run, pair = RunFolder(tmp_path), [fake_stage(name, tmp_path / "onnx") for name in STAGES[:2]]
    taken = {"train": figures(1.0), "prune": figures(1.5)}
    monkeypatch.setattr(stages, "_measured", lambda *_: taken)
    assert stages.measure_stages(pair, RECIPE, run, None) == taken
    assert run.read_json("measurements.json")["stages"] == taken
    monkeypatch.setattr(stages, "_measured", None)  # would fail if it were called
    assert stages.measure_stages(pair, RECIPE, run, None) == taken


def test_measurements_of_other_models_are_taken_anew(tmp_path, monkeypatch):
    run, pair = RunFolder(tmp_path), [fake_stage(name, tmp_path / "onnx") for name in STAGES[:2]]
    monkeypatch.setattr(stages, "_measured", lambda *_: {"train": figures(1.0)})
    stages.measure_stages(pair, RECIPE, run, None)
    pair[1].model.path.write_bytes(b"another")
    monkeypatch.setattr(stages, "_measured", lambda *_: {"train": figures(2.0)})
    assert stages.measure_stages(pair, RECIPE, run, None) == {"train": figures(2.0)}


def test_replayed_measurements_take_the_place_of_new_ones(tmp_path, monkeypatch):
    run, pair = RunFolder(tmp_path), [fake_stage(name, tmp_path / "onnx") for name in STAGES[:2]]
    monkeypatch.setattr(stages, "_measured", None)
    told = {name: figures(number) for number, name in enumerate(STAGES, 1)}
    used = stages.measure_stages(pair, RECIPE, run, told)
    assert used == {name: told[name] for name in ("train", "prune")}
    assert run.read_json("measurements.json")["stages"] == used


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.95, True), (0.7, False), (1.5, True)],
    ids=["undecided", "slower", "faster"],
)
def test_integers_are_dropped_where_they_are_known_to_be_slower(tmp_path, ratio, kept):
    course = Course([fake_stage("train", tmp_path, size=400)])
    course.add(fake_stage("quantize", tmp_path))
    measured = {"train": figures(1.0), "quantize": figures(ratio)}
    judge_precision(course, SimpleNamespace(quantize=QuantizeSection()), measured)
    assert (course.final.name == "quantize") is kept


@pytest.mark.parametrize(("ratio", "told"), [(0.7, True), (0.95, False), (1.5, False)])
def test_halves_that_are_slower_are_kept_as_asked_and_said_to_be(tmp_path, ratio, told):
    course = Course([fake_stage("train", tmp_path, size=400)], reasons={"convert": "fp16"})
    course.add(fake_stage("convert", tmp_path))
    measured = {"train": figures(1.0), "convert": figures(ratio)}
    judge_precision(course, SimpleNamespace(quantize=None), measured)
    assert course.final.name == "convert"
    assert ("slower here" in course.reasons["convert"]) is told


def test_replayed_measurements_that_lack_a_stage_are_told(tmp_path):
    pair = [fake_stage(name, tmp_path / "onnx") for name in STAGES[:2]]
    with pytest.raises(UsageError, match="--latency-table: expected measurements of prune"):
        stages.measure_stages(pair, RECIPE, RunFolder(tmp_path), {"train": figures(1.0)})


def test_measurements_of_a_gpu_are_read(tmp_path):
    table = {"stages": {"train": {**figures(1.0), "peak_memory_bytes": None}}}
    file = tmp_path / "measurements.json"
    file.write_text(json.dumps(table))
    assert stages.read_measurements(file) == [table["stages"]]
    table["stages"]["train"]["peak_memory_bytes"] = "many"
    file.write_text(json.dumps(table))
    with pytest.raises(UsageError, match=r"expected the measurements\.json of a run"):
        stages.read_measurements(file)


def test_stage_decision_compares_with_the_stage_before(tmp_path):
    before = fake_stage("train", tmp_path, size=200)
    after = fake_stage("prune", tmp_path, correct=(True, False, False, False), size=100)
    decision = stage_decision(before, after, {"train": figures(1.0), "prune": figures(1.5)})
    assert decision.kept
    assert "speed 1.50x at batch 1, 1.50x at batch 32; 2.00x smaller" in decision.why
    assert "validation accuracy -25.00%" in decision.why


def test_ptq_is_kept_where_it_holds_the_budget(tmp_path):
    before = fake_stage("train", tmp_path)
    after = fake_stage("quantize", tmp_path, correct=(True, False, False, False))
    for budget, default, kept in (
        (BudgetSection(max_drop=0.25), 0.0, True),
        (BudgetSection(max_drop=0.2), 1.0, False),
        (None, 0.3, True),
        (BudgetSection(min_speedup=2.0), 0.1, False),
    ):
        decision = ptq_decision(before, after, budget, default)
        assert decision.kept is kept
        assert ("holds" if kept else "breaks") in decision.why


def test_ptq_has_to_hold_the_budget_with_its_confidence(tmp_path):
    before = fake_stage("train", tmp_path)
    after = fake_stage("quantize", tmp_path, correct=(True, False, False, False))
    sure = BudgetSection(max_drop=0.25, confidence=0.95)
    assert ptq_decision(before, after, BudgetSection(max_drop=0.25), 0.0).kept
    assert not ptq_decision(before, after, sure, 0.0).kept, "four samples prove nothing"


@pytest.mark.parametrize(
    ("mode", "holds", "made", "kept"),
    [
        ("ptq", False, ["calibrate"], "the recipe asks for ptq"),
        ("qat", True, ["train"], "qat: the recipe asks for qat"),
        ("auto", True, ["calibrate"], "ptq holds"),
        ("auto", False, ["calibrate", "train"], "qat: ptq breaks"),
    ],
)
def test_mode_says_whether_the_model_is_calibrated_or_trained(
    tmp_path, monkeypatch, mode, holds, made, kept
):
    seen = []
    baseline = fake_stage("train", tmp_path)
    worse = fake_stage("quantize", tmp_path, correct=(holds, True, False, False))
    monkeypatch.setattr(integers, "calibrate", lambda *_, **__: seen.append("calibrate"))
    monkeypatch.setattr(integers, "train_quantized", lambda *_, **__: seen.append("train"))

    def proved(_work, _started, make):
        make()
        return worse

    monkeypatch.setattr(integers, "proved", proved)
    work = SimpleNamespace(
        recipe=SimpleNamespace(
            quantize=QuantizeSection(mode=mode, align=False),
            seed=0,
            target="cpu",
            budget=None,
        ),
        dataset=SimpleNamespace(train=SimpleNamespace(load=np.zeros_like, __len__=lambda: 9)),
        home=RunFolder(tmp_path),
        training=None,
    )
    work.dataset.train = Rows(9)
    _, why = integers.quantize_stage(work, baseline, baseline)
    assert seen == made
    assert why.startswith(kept)


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def load(self, rows):
        return np.zeros((len(rows), 2), np.float32)


def test_budget_judges_validation_and_batch_one(tmp_path):
    before = fake_stage("train", tmp_path)
    after = fake_stage("quantize", tmp_path, correct=(True, False, False, False))
    measured = {"train": figures(1.0), "quantize": figures(1.6)}

    def passed(**values):
        found = check_budget(BudgetSection(**values), before, after, measured)
        assert found["metric"] == "accuracy"
        return found["passed"]

    assert passed(max_drop=0.25)
    assert not passed(max_drop=0.24)
    assert passed(min_speedup=1.6)
    assert not passed(min_speedup=1.61)
    assert not passed(max_drop=0.25, min_speedup=2.0)
    assert not passed(max_drop=0.25, confidence=0.95), "four samples prove nothing"
    assert check_budget(None, before, after, measured)["passed"]


def test_decision_is_plain_json():
    assert Decision("prune", kept=True, why="x").to_json() == {
        "stage": "prune",
        "kept": True,
        "why": "x",
    }
