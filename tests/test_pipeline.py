"""A run from its recipe to its report, and everything that may go wrong between two runs."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_run import (
    CALIBRATED,
    RECIPE,
    STAGES,
    measure_quickly,
    read_recipe,
    recording_dataset,
    snapshot,
)

from deploykit import job, pipeline
from deploykit.artifacts import OnnxModel
from deploykit.decisions import stage_decision
from deploykit.errors import DataError, UsageError
from deploykit.measure import evaluate_onnx
from deploykit.publish import LOCK, lock_folder
from deploykit.recipe import dump_recipe, load_recipe
from deploykit.run_folder import RunFolder
from deploykit.stages import Stage, describe
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
def test_a_resumed_stage_took_what_its_epochs_did(tiny_run):
    """Its own process only read them from a checkpoint."""
    history = [{"seconds": 5.0}, {"seconds": 6.0}]
    notes = {"fit": {"torch_accuracy": 0.5, "history": history}}
    candidate = replace(
        load_candidate(tiny_run.path / "candidates" / "train", base=tiny_run.path), notes=notes
    )
    model = OnnxModel(tiny_run.path / "onnx" / "train.onnx", candidate.signature, 20)
    stage = Stage(
        candidate, model, parity=None, validation=SimpleNamespace(accuracy=0.5), seconds=1
    )
    unmeasured = {"latency": {"1": None, "32": None}, "peak_memory_bytes": None}
    assert describe(stage, unmeasured)["seconds"] == 11
    assert describe(replace(stage, seconds=12.5), unmeasured)["seconds"] == 12.5


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


# a budget that does not hold


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


@slow
@pytest.mark.parametrize(("shown", "kept"), [(0.965, False), (1.1, True)])
def test_pruning_is_judged_by_the_speed_that_was_shown(tmp_path, monkeypatch, shown, kept):
    measure_quickly(monkeypatch)
    # In doubt for the rounds: what is not shown says nothing here.
    monkeypatch.setattr("deploykit.measure.Latency.decided", 1.0)
    monkeypatch.setattr("deploykit.measure.Latency.shown", shown)
    file = tmp_path / "tiny.yaml"
    file.write_text(
        RECIPE.replace("epochs: 1, unless_it_pays: keep}\nquantize", "epochs: 0}\nquantize")
    )
    run = job.run_recipe(read_recipe(file), tmp_path / "run")
    decision = next(one for one in run.report["decisions"] if one["stage"] == "prune")
    assert decision["kept"] is kept
