"""A run from its recipe to its report, and everything that may go wrong between two runs."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import CALIBRATED, STAGES, measure_quickly, recording_dataset, sha256, snapshot

from deploykit import integers, job, pipeline, stages
from deploykit.artifacts import OnnxModel
from deploykit.course import Course
from deploykit.decisions import Decision, check_budget, ptq_decision, stage_decision
from deploykit.errors import DataError, UsageError
from deploykit.making import judge_precision
from deploykit.measure import Evaluation, evaluate_onnx
from deploykit.publish import LOCK, lock_folder
from deploykit.recipe import dump_recipe, load_recipe
from deploykit.recipe.sections import BudgetSection, QuantizeSection
from deploykit.run_folder import RunFolder
from deploykit.structure import load_candidate

slow = pytest.mark.slow
NUMBER = (int, float)


# what a run leaves behind


@slow
def test_run_has_the_layout_of_the_contract(tiny_run):
    visible = {path.name for path in tiny_run.path.iterdir() if not path.name.startswith(".")}
    assert visible == {
        "recipe.yaml",
        "splits.json",
        "measurements.json",
        "report.json",
        "report.html",
        "candidates",
        "checkpoints",
        "logs",
        "onnx",
        "golden",
        "calibration.npy",
    }
    for stage in STAGES:
        files = {path.name for path in (tiny_run.path / "candidates" / stage).iterdir()}
        assert files == {"model.safetensors", "structure.json"}
    assert "report.html" not in (tiny_run.path / "report.html").read_text()[:20]


STAGE_FIELDS = {
    "name": str,
    "validation_accuracy": float,
    "latency_ms": dict,
    "size_bytes": int,
    "macs": int,
    "parameters": int,
    "seconds": NUMBER,
}


def contract_faults(report):
    """Return what in a report.json is not as the contract says."""
    faults = []

    def need(where, holder, fields):
        for name, kind in fields.items():
            if not isinstance(holder.get(name), kind) or isinstance(holder.get(name), bool):
                faults.append(f"{where}.{name}")

    top = {"schema": int, "name": str, "seed": int, "target": str, "threads": int}
    parts = {"environment": dict, "stages": list, "baseline": dict, "final": dict, "drop": dict}
    need("", report, {**top, **parts, "budget": dict, "decisions": list})
    need("environment", report["environment"], {"cpu": str, "versions": dict})
    for stage in report["stages"]:
        need("stages", stage, STAGE_FIELDS)
        need("latency_ms", stage["latency_ms"], {"1": float, "32": float})
    for name in ("baseline", "final"):
        need(name, report[name], {**STAGE_FIELDS, "accuracy": float})
    need("drop", report["drop"], {"value": NUMBER, "interval": list})
    if len(report["drop"].get("interval", ())) != 2:
        faults.append("drop.interval")
    need("budget", report["budget"], {"metric": str})
    faults += [
        f"budget.{key}" for key in ("max_drop", "min_speedup") if key not in report["budget"]
    ]
    if not isinstance(report["budget"].get("passed"), bool):
        faults.append("budget.passed")
    for decision in report["decisions"]:
        need("decisions", decision, {"stage": str, "why": str})
        if not isinstance(decision.get("kept"), bool):
            faults.append("decisions.kept")
    return faults


@slow
def test_report_keeps_the_contract(tiny_run):
    report = json.loads((tiny_run.path / "report.json").read_text())
    assert report == tiny_run.report
    assert contract_faults(report) == []
    assert report["schema"] == 1
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)
    assert {**report["stages"][0], "accuracy": report["baseline"]["accuracy"]} == report["baseline"]
    assert {**report["stages"][-1], "accuracy": report["final"]["accuracy"]} == report["final"]
    for stage in report["stages"]:
        file = tiny_run.path / "onnx" / f"{stage['name']}.onnx"
        assert stage["size_bytes"] == file.stat().st_size
    assert report["stages"][1]["macs"] < report["stages"][0]["macs"]
    assert report["stages"][1]["parameters"] < report["stages"][0]["parameters"]
    assert report["final"]["size_bytes"] < report["baseline"]["size_bytes"]
    assert report["details"]["normalization"]["share"] < 1


@slow
@pytest.mark.parametrize("key", ["seed", "drop", "decisions"])
def test_a_broken_report_would_be_seen(tiny_run, key):
    assert contract_faults({**tiny_run.report, key: {"decisions": [{}], "drop": {}}.get(key)})


@slow
def test_every_stage_is_decided_with_a_reason(tiny_run):
    decisions = [(one["stage"], one["kept"]) for one in tiny_run.report["decisions"]]
    assert decisions == [("prune", True), ("quantize", True)]
    whys = " | ".join(one["why"] for one in tiny_run.report["decisions"])
    assert "the recipe asks for qat" in whys
    assert "against prune: speed" in whys
    assert "batch 32" in whys


@slow
def test_test_split_is_read_by_the_report_alone(tiny_run):
    assert set(tiny_run.test_reads) == {"make_report"}


@slow
def test_another_reader_of_the_test_split_would_be_seen(tiny_run):
    dataset, reads = recording_dataset(tiny_run.recipe)
    signature = load_candidate(tiny_run.path / "candidates/train", base=tiny_run.path).signature
    evaluate_onnx(
        OnnxModel(tiny_run.path / "onnx/train.onnx", signature, 20), dataset.test, threads=1
    )
    assert set(reads) == {"somebody"}


@slow
def test_resolved_recipe_is_the_recipe_with_every_default(tiny_run):
    written = load_recipe(tiny_run.path / "recipe.yaml")
    assert written == tiny_run.recipe
    assert dump_recipe(written) == (tiny_run.path / "recipe.yaml").read_text()
    assert written.quantize.freeze_statistics == 0.5  # a default, written out


@slow
def test_candidates_of_every_stage_are_rebuilt(tiny_run):
    widths = [
        load_candidate(tiny_run.path / "candidates" / stage, base=tiny_run.path).structure
        for stage in STAGES
    ]
    assert "widths" not in widths[0]
    assert widths[1]["widths"] == widths[2]["widths"]
    assert widths[2]["quantization"]["mode"] == "qat"


# resuming


@slow
def test_finished_run_resumes_from_its_own_recipe_to_the_same_bytes(
    tiny_run, tmp_path, monkeypatch, deploykit
):
    """From checkpoints and recorded measurements: nothing is trained or timed again."""

    def refuse(*_arguments, **_options):
        raise AssertionError("measured again")

    copy = tiny_run.copy(tmp_path / "run")
    before = snapshot(copy)
    for gone in ("report.json", "report.html"):
        (copy / gone).unlink()
    shutil.rmtree(copy / "onnx")
    monkeypatch.setattr("deploykit.stages.measure_latency", refuse)
    done = deploykit("compress", copy / "recipe.yaml", "--out", copy, "--resume")
    assert done.code == 0, done.err
    after = snapshot(copy)
    same = set(before) - {"report.json", "report.html", "logs/compress.log"}
    same -= {name for name in same if name.startswith("checkpoints")}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    report = json.loads((copy / "report.json").read_text())
    assert report["decisions"] == tiny_run.report["decisions"]
    assert report["final"]["latency_ms"] == tiny_run.report["final"]["latency_ms"]


@slow
def test_resume_with_another_recipe_names_the_key_and_changes_nothing(tiny_run, deploykit):
    recipe = tiny_run.recipe_file
    done = deploykit(
        "compress", recipe, "--out", tiny_run.path, "--resume", "--set", "train.epochs=2"
    )
    assert done.code == 2
    assert "train.epochs = 2 in place of 1" in done.err


@slow
def test_resume_with_other_data_names_the_split(tiny_run, tmp_path, deploykit):
    copy = tiny_run.copy(tmp_path / "run")
    splits = json.loads((copy / "splits.json").read_text())
    splits["splits"]["validation"]["digest"] = "0" * 64
    (copy / "splits.json").write_text(json.dumps(splits))
    before = snapshot(copy)
    done = deploykit("compress", tiny_run.recipe_file, "--out", copy, "--resume")
    assert done.code == 3
    assert "the validation changed since the run began" in done.err
    assert snapshot(copy) == before


def test_splits_are_written_once_and_compared_ever_after(tmp_path):
    run = RunFolder(tmp_path)

    def dataset(digest, preprocess=None):
        described = {"splits": {"train": {"digest": digest}}, "preprocess": preprocess}
        return SimpleNamespace(describe=lambda: described)

    pipeline._keep_splits(run, dataset("a"))
    pipeline._keep_splits(run, dataset("a"))
    with pytest.raises(DataError, match="the train changed"):
        pipeline._keep_splits(run, dataset("b"))
    with pytest.raises(DataError, match="the preprocessing changed"):
        pipeline._keep_splits(run, dataset("a", preprocess={"height": 3}))


@pytest.mark.parametrize("leftovers", [[], [LOCK], [LOCK, ".recipe.yaml.0a1b2c3d.tmp"]])
@pytest.mark.parametrize("how", ["resume", "force"])
def test_run_that_was_killed_at_its_very_beginning_begins_anew(
    tmp_path, monkeypatch, leftovers, how
):
    out = tmp_path / "run"
    out.mkdir()
    for name in leftovers:
        (out / name).touch()
    began = started(monkeypatch, out, **{how: True})
    assert began == ["run"]
    assert (out / "recipe.yaml").is_file()
    assert {path.name for path in out.iterdir()} <= {LOCK, "recipe.yaml", "logs"}


@pytest.mark.parametrize("name", [".git", "notes.txt", "model.onnx"])
def test_folder_of_somebody_else_is_never_taken_for_a_run(tmp_path, monkeypatch, name):
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("mine")
    for how in ("resume", "force"):
        with pytest.raises(UsageError, match=r"exists already|something else"):
            started(monkeypatch, out, **{how: True})
    assert (out / name).read_text() == "mine"


def started(monkeypatch, out, recipe=None, **how):
    """Begin a run whose stages do nothing; return what was begun."""
    from deploykit.recipe import parse_recipe

    began = []

    def begin(*_arguments, **_options):
        began.append("run")
        return SimpleNamespace(to_json=dict)

    monkeypatch.setattr("deploykit.pipeline.run_stages", begin)
    monkeypatch.setattr("deploykit.start.initial_candidate", lambda *_arguments: None)
    dataset = SimpleNamespace(warnings=())
    job.run_recipe(recipe or parse_recipe(CALIBRATED), out, dataset=dataset, **how)
    return began


# two processes, and what stands in the way


def test_second_process_is_told_who_works_in_the_folder(tmp_path, monkeypatch):
    import os

    out = tmp_path / "run"
    started(monkeypatch, out)
    with lock_folder(out), pytest.raises(UsageError, match=f"process {os.getpid()} works in it"):
        started(monkeypatch, out, force=True)
    assert (out / "recipe.yaml").is_file(), "the run of the other process is whole"
    assert started(monkeypatch, out, force=True) == ["run"]


def test_run_that_another_process_made_meanwhile_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def late(*_arguments):
        out.mkdir()
        (out / "recipe.yaml").write_text("theirs")

    monkeypatch.setattr("deploykit.job.read_data", lambda _: SimpleNamespace(warnings=()))
    monkeypatch.setattr("deploykit.start.initial_candidate", late)
    from deploykit.recipe import parse_recipe

    with pytest.raises(UsageError, match="another process made it meanwhile"):
        job.run_recipe(parse_recipe(CALIBRATED), out)
    assert (out / "recipe.yaml").read_text() == "theirs"


def test_old_run_is_replaced_wholly_and_its_recipe_goes_last(tmp_path, monkeypatch):
    out = tmp_path / "run"
    started(monkeypatch, out)
    (out / "candidates/train").mkdir(parents=True)
    (out / "report.json").write_text("{}")
    (out / "link").symlink_to(tmp_path)
    gone = []
    real = type(out).unlink
    monkeypatch.setattr(
        type(out), "unlink", lambda path, **rest: (gone.append(path.name), real(path, **rest))[1]
    )
    RunFolder(out).clear()
    assert gone[-1] == "recipe.yaml"
    assert {path.name for path in out.iterdir()} == {LOCK}
    assert tmp_path.is_dir()


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device", str(tmp_path / "run/x"))

    monkeypatch.setattr("deploykit.job.LoggedProgress", full)
    with pytest.raises(UsageError, match=r"run/x: cannot be written: No space left on device"):
        started(monkeypatch, tmp_path / "run")


# measurements and decisions


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


@pytest.fixture(scope="module")
def broken_budget(tmp_path_factory):
    """A run whose model is not fast enough, and what stood on disk when it was decided."""
    from deploykit.recipe import parse_recipe

    out = tmp_path_factory.mktemp("broken") / "run"
    recipe = parse_recipe(CALIBRATED, ["budget.min_speedup=1000"])
    seen = []

    def deciding(*arguments, **options):
        seen.append(json.loads((out / "measurements.json").read_text())["stages"])
        return stage_decision(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        patch.setattr("deploykit.pipeline.stage_decision", deciding)
        with pytest.raises(pipeline.BudgetError) as caught:
            job.run_recipe(recipe, out)
    return SimpleNamespace(out=out, error=caught.value, seen=seen)


@slow
def test_broken_budget_is_an_error_after_everything_is_written(broken_budget):
    report = json.loads((broken_budget.out / "report.json").read_text())
    assert broken_budget.error.exit_code == 4
    assert "expected 1000x the float model's speed at batch 1" in str(broken_budget.error)
    assert report["budget"]["passed"] is False
    assert report["budget"]["min_speedup"] == 1000
    assert contract_faults(report) == []
    for name in ("report.html", "measurements.json", "golden/expected.npz", "onnx/quantize.onnx"):
        assert (broken_budget.out / name).is_file()


@slow
def test_measurements_are_on_disk_before_they_are_decided_by(broken_budget):
    assert [set(stages) for stages in broken_budget.seen] == [{"train", "quantize"}]


@slow
def test_run_beyond_its_budget_is_not_exported(broken_budget, tmp_path, deploykit):
    done = deploykit("export", broken_budget.out, "--out", tmp_path / "bundle")
    assert done.code == 4
    assert "its budget does not hold" in done.err
    assert not (tmp_path / "bundle").exists()


@slow
def test_force_replaces_nothing_before_the_new_inputs_are_known_to_be_good(
    tiny_run, tmp_path, deploykit
):
    copy = tiny_run.copy(tmp_path / "run")
    before = snapshot(copy)
    for fault in (
        "model.weights=gone.safetensors",
        "model.arguments.widths=[0]",
        "data.limit=10",
        "train.groups.0.modules=[nothing]",
        "prune.protect=[nothing]",
        "target=abacus",
    ):
        done = deploykit("compress", tiny_run.recipe_file, "--out", copy, "--force", "--set", fault)
        assert done.code in {2, 3}, fault
        assert snapshot(copy) == before, fault


# export


@slow
def test_bundle_holds_the_very_model_that_was_measured(tiny_run, tmp_path, deploykit):
    done = deploykit("export", tiny_run.path, "--out", tmp_path / "bundle")
    assert done.code == 0
    measured = tiny_run.path / "onnx/quantize.onnx"
    assert sha256(tmp_path / "bundle/model.onnx") == sha256(measured)
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["measured"]["accuracy"] == tiny_run.report["final"]["accuracy"]
    assert manifest["measured_on"] == tiny_run.report["environment"]


@slow
def test_two_exports_give_equal_bytes(tiny_run, tmp_path, deploykit):
    for name in ("one", "other"):
        assert deploykit("export", tiny_run.path, "--out", tmp_path / name).code == 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "other")


@slow
def test_other_integers_are_calibrated_anew_and_claim_no_latency(tiny_run, tmp_path, deploykit):
    made_for = tiny_run.report["details"]["model"]["target"]
    other = "cpu-x86-vnni" if made_for == "cpu-x86-avx2" else "cpu-x86-avx2"
    bundle = tmp_path / "bundle"
    done = deploykit("export", tiny_run.path, "--target", other, "--out", bundle)
    assert (done.code, done.err) == (0, "")
    assert deploykit("verify", bundle).code == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["target"] == other
    assert manifest["measured_on"] is None
    assert manifest["verified_on"]["cpu"] == tiny_run.report["environment"]["cpu"]
    measured = manifest["measured"]
    assert measured["latency_ms"] == measured["speedup"] == {"1": None, "32": None}
    assert measured["peak_memory_bytes"] is None
    assert 0 <= measured["accuracy"] <= 1
    assert measured["size_bytes"] == (bundle / "model.onnx").stat().st_size
    assert sha256(bundle / "model.onnx") != sha256(tiny_run.path / "onnx/quantize.onnx")
    assert weight_limits(bundle / "model.onnx") <= (63 if other == "cpu-x86-avx2" else 127)
    told = deploykit("inspect", bundle).out
    assert "latency at batch 1: not measured on the target" in told


def weight_limits(path):
    import onnx
    from onnx import numpy_helper

    tensors = [numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer]
    return max(
        int(np.abs(one.astype(int)).max())
        for one in tensors
        if one.dtype == np.int8 and one.ndim > 1
    )


@slow
def test_target_of_the_same_integers_ships_the_same_model(tiny_run, tmp_path, deploykit):
    if tiny_run.report["details"]["model"]["target"] == "cpu-x86-avx2":
        pytest.skip("no other target computes as this one")
    bundle = tmp_path / "bundle"
    assert deploykit("export", tiny_run.path, "--target", "cpu-arm64", "--out", bundle).code == 0
    assert sha256(bundle / "model.onnx") == sha256(tiny_run.path / "onnx/quantize.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["measured_on"] is None
    assert manifest["measured"]["latency_ms"] == {"1": None, "32": None}


@slow
def test_accuracy_of_other_integers_is_unknown_where_the_data_are_gone(
    broken_budget, tiny_run, tmp_path, monkeypatch
):
    from deploykit import retarget

    recipe = replace_budget(tiny_run.recipe, None)
    changed = SimpleNamespace(describe=lambda: {"other": "data"})
    monkeypatch.setattr(retarget, "read_data", lambda _: changed)
    run, model = RunFolder(tiny_run.path), None
    found = retarget._accuracies(run, recipe, model, None)
    assert found == {"accuracy": None, "accuracy_drop": None, "accuracy_drop_interval": None}

    def gone(_recipe):
        raise DataError("gone")

    monkeypatch.setattr(retarget, "read_data", gone)
    assert retarget._accuracies(run, recipe, model, None) == found


@slow
def test_other_integers_must_hold_the_budget_too(tiny_run, monkeypatch):
    from deploykit import retarget
    from deploykit.targets import TARGETS

    recipe = replace_budget(tiny_run.recipe, BudgetSection(max_drop=0.1))
    monkeypatch.setattr(retarget, "judged_drop", lambda *_: 0.2)
    signature = load_candidate(tiny_run.path / "candidates/train", base=tiny_run.path).signature
    model = OnnxModel(tiny_run.path / "onnx/train.onnx", signature, 20)
    with pytest.raises(pipeline.BudgetError, match=r"got 20.00% .*--set target=cpu-arm64"):
        retarget._accuracies(RunFolder(tiny_run.path), recipe, model, TARGETS["cpu-arm64"])


def replace_budget(recipe, budget):
    return recipe.model_copy(update={"budget": budget})


def test_decision_is_plain_json():
    assert Decision("prune", kept=True, why="x").to_json() == {
        "stage": "prune",
        "kept": True,
        "why": "x",
    }


def test_split_stand_in_loads_what_it_holds():
    from deploykit.retarget import _split

    samples = np.arange(12, dtype=np.float32).reshape(4, 3)
    split = _split(samples)
    assert len(split) == 4
    np.testing.assert_array_equal(split.load(np.array([2, 0])), samples[[2, 0]])
    assert replace(split, name="x").name == "x"
