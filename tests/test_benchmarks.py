"""What the benchmarks rest on: promises are kept or tell, and broken files are seen."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HELPERS = {"table", "example", "recipe_run", "against_rivals", "rivals", "vision_operators"}


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
