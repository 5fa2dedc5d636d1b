"""A whole run that prunes too much at first, and backs off until its budget holds."""

import json

import pytest

from deploykit import job, pipeline
from deploykit.api import export
from deploykit.course import Course
from deploykit.errors import BudgetError, CompressionError, ModelError, VerificationError
from deploykit.inspection import inspect_folder
from deploykit.recipe import parse_recipe
from deploykit.run_folder import RunFolder
from deploykit.stages import read_measurements
from tests.tiny_run import measure_quickly, snapshot
from tests.tiny_training import tiny_training

pytestmark = pytest.mark.slow

RECIPE = """\
schema: 1
name: backing-off
task: image-classification
data: {source: digits, limit: 400}
model: {name: digits-cnn, arguments: {widths: [16, 32, 32]}}
train: {epochs: 3, batch_size: 16, optimizer: {name: adamw, lr: 0.01}}
prune: {channel_ratio: 0.9, channel_multiple: 4, epochs: 0, unless_it_pays: keep}
quantize: {mode: ptq, calibration_samples: 64, unless_it_pays: keep}
verify: {samples: 32, min_agreement: 0.7}
budget: {max_drop: 0.05, trials: 3}
"""


@pytest.fixture(scope="module")
def backed_off(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attempts")
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        return job.run_recipe(parse_recipe(RECIPE), folder / "run")


def test_it_prunes_less_until_the_budget_holds(backed_off):
    trials = backed_off.report["details"]["trials"]
    assert backed_off.report["budget"]["passed"]
    assert [one["passed"] for one in trials] == [*[False] * (len(trials) - 1), True]
    assert len(trials) > 1
    ratios = [(one["pruned"] or {"channel_ratio": 0.0})["channel_ratio"] for one in trials]
    assert ratios == [0.9, 0.45, 0.0][: len(trials)]
    assert trials[-1]["chosen"]


def test_the_run_holds_what_the_chosen_trial_made(backed_off):
    number = len(backed_off.report["details"]["trials"])
    trial = backed_off.path / "trials" / str(number)
    stages = [stage["name"] for stage in backed_off.report["stages"]]
    for stage in stages[1:]:
        for name in (f"onnx/{stage}.onnx", f"candidates/{stage}/model.safetensors"):
            assert (backed_off.path / name).read_bytes() == (trial / name).read_bytes()
    assert sorted(path.stem for path in (backed_off.path / "onnx").iterdir()) == sorted(stages)
    page = (backed_off.path / "report.html").read_text()
    assert 'id="trials"' in page
    assert "expected a validation drop of at most 5.00%" in page


def test_inspect_tells_every_trial(backed_off):
    told = inspect_folder(backed_off.path)
    number = len(backed_off.report["details"]["trials"])
    assert "trial 1: a drop of" in told
    assert [line.endswith("; chosen") for line in told.splitlines() if "trial " in line] == [
        *[False] * (number - 1),
        True,
    ]
    (backed_off.path / "report.json").rename(backed_off.path / "kept.json")
    try:
        assert "stages done: train, prune, quantize" in inspect_folder(backed_off.path)
    finally:
        (backed_off.path / "kept.json").rename(backed_off.path / "report.json")


def test_its_bundle_is_the_chosen_trials(backed_off, tmp_path):
    bundle = export(backed_off, out=tmp_path / "bundle")
    final = backed_off.report["final"]["name"]
    assert (bundle / "model.onnx").read_bytes() == (
        backed_off.path / f"onnx/{final}.onnx"
    ).read_bytes()


def test_resumed_it_decides_the_same(backed_off):
    before = snapshot(backed_off.path)
    again = job.run_recipe(parse_recipe(RECIPE), backed_off.path, resume=True)
    seconds = {"seconds"}
    for one, other in zip(again.report["stages"], backed_off.report["stages"], strict=True):
        assert {k: one[k] for k in one.keys() - seconds} == {
            k: other[k] for k in other.keys() - seconds
        }
    after = snapshot(backed_off.path)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert not {name for name in changed if name.endswith((".onnx", ".safetensors", "ments.json"))}


def test_recorded_latencies_replay_every_trial(backed_off, tmp_path, monkeypatch):
    replay = read_measurements(backed_off.path / "measurements.json")
    assert len(replay) == len(backed_off.report["details"]["trials"])
    monkeypatch.setattr("deploykit.stages._measured", None)
    run = job.run_recipe(parse_recipe(RECIPE), tmp_path / "run", replay=replay)
    for key in ("validation_accuracy", "latency_ms"):
        assert run.report["final"][key] == backed_off.report["final"][key]


@pytest.mark.parametrize("fault", [BudgetError, CompressionError, ModelError, VerificationError])
def test_only_the_first_trial_may_fail_the_run(tmp_path, monkeypatch, fault):
    """What a later one cannot make is one way less to hold the budget."""

    def make(_work, _base):
        raise fault("no such model")

    monkeypatch.setattr(pipeline, "make_stages", make)
    recipe, run, training = parse_recipe(RECIPE), RunFolder(tmp_path), tiny_training()
    work = pipeline.Work(recipe, run, run, training.dataset, training)
    attempt = pipeline._attempt(work, Course([]), None)
    trial = attempt(recipe, run, 2)
    assert (trial.outcome.passed, trial.outcome.failed) == (False, "no such model")
    told = trial.to_json()
    assert told["validation_accuracy"] is told["size_bytes"] is told["final"] is None
    with pytest.raises(fault, match="no such model"):
        attempt(recipe, run, 1)


def test_a_budget_that_no_trial_holds_fails_with_the_best_trade_offs(tmp_path, monkeypatch):
    measure_quickly(monkeypatch)
    impossible = RECIPE.replace("max_drop: 0.05", "max_drop: 0.05, min_speedup: 1000.0")
    with pytest.raises(BudgetError, match="expected 1000x the float model's speed") as caught:
        job.run_recipe(parse_recipe(impossible), tmp_path / "run")
    assert caught.value.exit_code == 4
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert not report["budget"]["passed"]
    assert sum(one["chosen"] for one in report["details"]["trials"]) == 1
    with pytest.raises(BudgetError):
        export(tmp_path / "run", out=tmp_path / "bundle")
