"""What the benchmarks rest on: promises are kept or tell, and broken files are seen."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save

from deploykit.recipe import dump_recipe, load_recipe
from deploykit.recipe.paths import with_absolute_paths
from deploykit.targets import TARGETS

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
HELPERS = {
    *("table", "example", "recipe_run", "against_rivals", "rivals", "vision_operators"),
    *("server_run", "served_models", "calls", "wire", "ledger", "gpu_check", "static_server"),
}


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark as running it would: its folder is where it finds the others."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load_file(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_file


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported_and_is_described(path, load):
    load(path.stem)
    if path.stem not in HELPERS:
        assert f"make bench-{path.stem}`" in (BENCHMARKS / "README.md").read_text()


@pytest.mark.parametrize(
    ("value", "bounds", "holds"),
    [
        (1.5, {"at_least": 1.5}, True),
        (1.49, {"at_least": 1.5}, False),
        (0.01, {"at_most": 0.01}, True),
        (0.011, {"at_most": 0.01}, False),
        (float("nan"), {"at_least": 0}, False),
        (float("nan"), {}, True),
    ],
)
def test_table_is_kept_and_exits_1_when_a_promise_falls_short(
    load, tmp_path, capsys, value, bounds, holds
):
    table = load("table")
    figure = table.Figure("speed", value, "{:.2f}x", **bounds)
    code = table.publish(
        "x", [figure], about="About.", command="make bench-x", details=["More."], folder=tmp_path
    )
    assert code == (0 if holds else 1)
    kept = (tmp_path / "x.md").read_text()
    assert "| speed |" in kept
    assert "`make bench-x`" in kept
    assert kept.endswith("More.\n")
    assert ("NO" in kept) is not holds
    assert "speed" in capsys.readouterr().out


def test_trial_keeps_nothing(load, tmp_path):
    table = load("table")
    table.publish("x", [], about="", command="", keep=False, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_written_file_is_seen(load, tmp_path):
    kill = load("kill")
    np.save(tmp_path / "a.npy", np.arange(100))
    np.savez(tmp_path / "b.npz", x=np.arange(100))
    (tmp_path / "c.safetensors").write_bytes(save({"x": np.arange(100)}))
    (tmp_path / "d.json").write_text(json.dumps({"x": [1, 2, 3]}))
    (tmp_path / "e.html").write_text("<html></html>\n")
    files = sorted(tmp_path.iterdir())
    assert all(kill.is_whole(file) for file in files)
    for file in files:
        file.write_bytes(file.read_bytes()[:-10])
        assert not kill.is_whole(file), file.name
    assert not kill.is_whole(tmp_path / "absent.json")


def test_hidden_files_are_not_taken_for_published_ones(load, tmp_path):
    kill = load("kill")
    for name in ("a.json", ".a.json.0123abcd.tmp", ".b.0123abcd.staging/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in kill.published_files(tmp_path)] == ["a.json"]


def examined(eight_bit, refusal):
    answers = {"fp32": [0, 1], "8-bit": eight_bit, "7-bit": [0, 1]}
    ones = dict.fromkeys(answers, 1.0)
    return {
        "answers": answers,
        "correct": ones,
        "latency_ms": ones,
        "speedup": ones,
        "refusal": refusal,
    }


def test_portability_promises_what_both_cpus_can_show(load):
    portability = load("portability")
    here, there = examined([0, 1], ""), examined([1, 1], "differs")
    assert all(figure.holds for figure in portability.figures_of(here, None))
    assert all(figure.holds for figure in portability.figures_of(here, there))
    there["answers"]["7-bit"] = [1, 1]
    there["refusal"] = ""
    fallen = [one.name for one in portability.figures_of(here, there) if not one.holds]
    assert fallen == ["7-bit, equal answers on both", "8-bit bundle refused without"]


def test_a_result_of_other_code_or_settings_has_another_key(load, tmp_path, monkeypatch):
    table = load("table")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "deploykit").mkdir()
    file = tmp_path / "deploykit" / "a.py"
    file.write_text("a = 1")
    first = table.code_key(64)
    assert table.code_key(64) == first
    assert table.code_key(16) != first
    file.write_text("a = 2")
    assert table.code_key(64) != first


def test_a_run_of_another_recipe_is_no_run_of_this_one(load, tmp_path):
    """Wherever data and weights lie."""
    runs = load("recipe_run")
    recipe = with_absolute_paths(load_recipe(ROOT / "recipes/cifar10_resnet56.yaml"), tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    options = argparse.Namespace(run=tmp_path, trial=False)
    with pytest.raises(SystemExit, match="expected a finished run"):
        runs.finished_run("recipes/cifar10_resnet56.yaml", options, tmp_path)
    (tmp_path / "report.json").write_text("{}")
    assert runs.finished_run("recipes/cifar10_resnet56.yaml", options, tmp_path) == tmp_path
    pruned = recipe.prune.model_copy(update={"speedup": 9.0})
    other = dump_recipe(recipe.model_copy(update={"prune": pruned}))
    (tmp_path / "recipe.yaml").write_text(other)
    with pytest.raises(SystemExit, match="got another prune"):
        runs.finished_run("recipes/cifar10_resnet56.yaml", options, tmp_path)


@pytest.mark.parametrize(("ms", "found"), [(0.7, (0.3, None)), (0.55, (0.4, 16)), (0.0, (0.9, 16))])
def test_rivals_lose_as_few_channels_as_the_latency_allows(load, monkeypatch, ms, found):
    """Rounded to the kernels' block or not; where nothing is as fast, the fastest."""
    pruning = load("pruning")
    monkeypatch.setattr(pruning, "example_input", lambda *_, **__: None)
    monkeypatch.setattr(pruning, "counted", lambda _m, _e, _s, ratio, rounded: (ratio, rounded))
    faster = {(0.4, 16): 0.5}
    latency = SimpleNamespace(
        target=TARGETS["cpu-x86-vnni"],
        measure=lambda one: faster.get(
            one, 1 - one[0] + (one[1] is not None) * 0.1 * (one[0] < 0.9)
        ),
    )
    setting = SimpleNamespace(start=SimpleNamespace(module=None), latency=latency)
    assert pruning.as_fast(setting, "uniform", ms) == (found[0], found)


@pytest.mark.parametrize(("right", "held"), [((1, 1, 1, 0), True), ((1, 0, 0, 0), False)])
def test_ours_is_held_to_the_rival_whose_latency_it_was_asked_for(load, right, held):
    pruning = load("pruning")
    answers = {"unpruned": (1, 1, 1, 1), "other": (1, 1, 1, 0), "deploykit as other": right}
    accuracies = {
        name: SimpleNamespace(correct=np.array(one, bool), accuracy=np.mean(one))
        for name, one in answers.items()
    }
    speeds = {"unpruned": 1.0, "other": 1.2, "deploykit as other": 1.21}
    latencies = {name: {"1": SimpleNamespace(ratio=ratio)} for name, ratio in speeds.items()}
    figures, (detail,) = pruning.figures_of(accuracies, latencies)
    promised = {figure.name: figure.holds for figure in figures if figure.promise}
    assert promised == {
        "deploykit as other: accuracy lost against it": held,
        "deploykit as other: speed over it": True,
    }
    assert f"{0.0 if held else 0.5:.2%} lost" in detail
