"""From a finished run to its bundle, for its own target and for others."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import sha256, snapshot

from deploykit import pipeline
from deploykit.artifacts import OnnxModel
from deploykit.errors import DataError
from deploykit.recipe.sections import BudgetSection
from deploykit.run_folder import RunFolder
from deploykit.structure import load_candidate
from deploykit.targets import TARGETS, about_integers

slow = pytest.mark.slow


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
def test_a_bundle_bears_the_version_that_it_is_given(tiny_run, tmp_path, deploykit):
    bundle = tmp_path / "bundle"
    assert deploykit("export", tiny_run.path, "--version", "1.10", "--out", bundle).code == 0
    assert json.loads((bundle / "manifest.json").read_text())["version"] == "1.10"
    for version in ("", "1/2", "1 2", "x" * 65):
        done = deploykit("export", tiny_run.path, "--version", version, "--out", tmp_path / "no")
        assert (done.code, "version: expected" in done.err) == (2, True)


@slow
def test_a_bundle_never_takes_the_place_of_a_run(tiny_run, tmp_path, deploykit):
    run = tiny_run.copy(tmp_path / "run")
    before = snapshot(run)
    for place, found in ((run, "a run"), (run / "candidates/train", "a candidate")):
        done = deploykit("export", run, "--out", place, "--force")
        assert done.code == 2
        assert f"expected a bundle to replace, found {found};" in done.err.replace("\n", " ")
    assert snapshot(run) == before


@slow
def test_a_run_never_takes_the_place_of_a_bundle(tiny_run, tmp_path, deploykit):
    bundle = tmp_path / "bundle"
    assert deploykit("export", tiny_run.path, "--out", bundle).code == 0
    before = snapshot(bundle)
    done = deploykit("compress", tiny_run.recipe_file, "--out", bundle, "--force")
    assert done.code == 2
    assert "expected a run to replace, found a bundle;" in done.err.replace("\n", " ")
    assert snapshot(bundle) == before


def lose(file):
    file.unlink()


def spoil(file):
    file.write_bytes(b"junk")


def empty(file):
    file.write_bytes(b"")


@slow
@pytest.mark.parametrize("damage", [lose, spoil, empty])
@pytest.mark.parametrize("name", ["003.png", "expected.npz"])
def test_damaged_golden_samples_are_told_with_a_remedy(tiny_run, tmp_path, deploykit, damage, name):
    run = tiny_run.copy(tmp_path / "run")
    damage(run / "golden" / name)
    done = deploykit("export", run, "--out", tmp_path / "bundle")
    assert done.code == 3
    assert "expected the run's golden samples, got damaged ones" in done.err.replace("\n", " ")
    assert "compress --resume" in done.err.replace("\n", " ")
    assert not (tmp_path / "bundle").exists()


@slow
def test_other_integers_are_calibrated_anew_and_claim_no_latency(tiny_run, tmp_path, deploykit):
    made_for = tiny_run.report["details"]["model"]["target"]
    if made_for == "cpu-x86-avx2":
        pytest.skip("weights of 8 bits, which all other targets have, overflow on this CPU")
    other = "cpu-x86-avx2"
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
    assert weight_limits(bundle / "model.onnx") <= 63
    told = deploykit("inspect", bundle).out
    assert "latency at batch 1: not measured on the target" in told


@slow
def test_integers_that_overflow_here_are_not_shipped(tiny_run, tmp_path, deploykit):
    if tiny_run.report["details"]["model"]["target"] != "cpu-x86-avx2":
        pytest.skip("8-bit weights do not overflow on this CPU")
    bundle = tmp_path / "bundle"
    done = deploykit("export", tiny_run.path, "--target", "tensorrt", "--out", bundle)
    assert done.code == 4
    told = done.err.replace("\n", " ")
    assert "weights of 8 bits can overflow the sums of this CPU (cpu-x86-avx2)" in told
    assert "verify it on x86 with VNNI or on ARM" in told
    assert not bundle.exists()


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
@pytest.mark.parametrize("target", ["cpu-x86-vnni", "cpu-arm64"])
def test_another_cpu_gets_the_integers_that_were_measured(tiny_run, tmp_path, deploykit, target):
    bundle = tmp_path / "bundle"
    done = deploykit("export", tiny_run.path, "--target", target, "--out", bundle)
    assert done.code == 0
    assert done.err.replace("\n", " ").strip() == about_integers(TARGETS[target])
    assert sha256(bundle / "model.onnx") == sha256(tiny_run.path / "onnx/quantize.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert target in manifest["verified_on"]["targets"]
    if target != tiny_run.report["details"]["model"]["target"]:
        assert manifest["measured_on"] is None
        assert manifest["measured"]["latency_ms"] == {"1": None, "32": None}
        assert manifest["measured"]["peak_memory_bytes"] is None


@slow
def test_a_browser_gets_the_integers_that_were_measured(tiny_run, tmp_path, deploykit):
    bundle, made_for = tmp_path / "site", tiny_run.report["details"]["model"]["target"]
    done = deploykit("export", tiny_run.path, "--target", "web", "--out", bundle)
    assert (done.code, done.err.strip()) == (0, about_integers(TARGETS["web"]))
    assert sha256(bundle / "model.onnx") == sha256(tiny_run.path / "onnx/quantize.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {made_for, "web"} <= set(manifest["verified_on"]["targets"])
    assert manifest["measured"]["latency_ms"] == {"1": None, "32": None}
    assert {"index.html", "web/deploykit.js"} <= set(manifest["files"])
    assert deploykit("verify", bundle).code == 0


@slow
def test_a_run_becomes_a_zip_file_too(tiny_run, tmp_path, deploykit):
    for name, *options in (["a.zip"], ["b", "--format", "zip"]):
        place = tmp_path / name
        assert deploykit("export", tiny_run.path, "--out", place, *options).code == 0
        assert deploykit("verify", place).code == 0
    assert sha256(tmp_path / "a.zip") == sha256(tmp_path / "b")


@slow
def test_accuracy_of_other_integers_is_unknown_where_the_data_are_gone(tiny_run, monkeypatch):
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


def test_split_stand_in_loads_what_it_holds():
    from deploykit.retarget import _split

    samples = np.arange(12, dtype=np.float32).reshape(4, 3)
    split = _split(samples)
    assert len(split) == 4
    np.testing.assert_array_equal(split.load(np.array([2, 0])), samples[[2, 0]])
    assert replace(split, name="x").name == "x"
