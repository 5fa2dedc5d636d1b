"""Layers stay in float where measurement says that integers make them no faster."""

import json
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from test_prune_stage import candidate_of
from tiny_run import RECIPE, measure_quickly

from deploykit import mixed_precision
from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.job import run_recipe
from deploykit.measure import Latency
from deploykit.mixed_precision import BORDERS, Mixture, fastest_mixture, layers_to_try
from deploykit.quantize import calibrate, random_samples
from deploykit.recipe import load_recipe
from deploykit.recipe.paths import with_absolute_paths
from deploykit.targets import TARGETS

slow = pytest.mark.slow
TARGET = TARGETS["cpu-x86-vnni"]
LAYERS = ("0", "3", "7")


@pytest.fixture
def candidate(tmp_path):
    return candidate_of("net", tmp_path)


def latency(ratio):
    return Latency(1.0, 1.1, ratio, (ratio * 0.99, ratio * 1.01), 20, 1, 0.02)


@pytest.fixture
def measured(monkeypatch):
    """Pretend that layers gain so much in float, and that models are so fast."""

    def pretend(gains, speeds):
        monkeypatch.setattr(mixed_precision, "_gains", lambda *_: gains)

        def measure(models, **_):
            ratios = [1.0, 1.0, *speeds]
            return {name: {"1": latency(one)} for name, one in zip(models, ratios, strict=True)}

        monkeypatch.setattr(mixed_precision, "measure_latency", measure)

    return pretend


# which layers are worth a try


def worth(kept, gains, border):
    """What a choice gains, borders paid: the model takes integers, its end may be either."""
    states = [False, *(layer in kept for layer in gains)]
    borders = sum(one != other for one, other in pairwise(states))
    return sum(gains[layer] for layer in kept) - border * borders


@pytest.mark.parametrize("seed", range(5))
def test_each_choice_is_the_best_at_its_price_of_a_border(seed):
    random = torch.Generator().manual_seed(seed)
    gains = {str(i): float(torch.randn((), generator=random)) * 0.03 for i in range(7)}
    choices = [(), *layers_to_try(gains)]
    subsets = [
        tuple(layer for layer, kept in zip(gains, bits, strict=True) if kept)
        for bits in product((False, True), repeat=7)
    ]
    for border in BORDERS:
        best = max(worth(kept, gains, border) for kept in subsets)
        assert max(worth(kept, gains, border) for kept in choices) == pytest.approx(best)


def test_nothing_is_tried_where_integers_win_everywhere():
    assert layers_to_try({"a": -0.1, "b": -0.001}) == []


def test_layer_between_two_that_gain_goes_with_them_where_borders_are_dear():
    gains = {"a": 0.1, "b": -0.005, "c": 0.1, "d": -0.2}
    assert layers_to_try(gains) == [("a", "c"), ("a", "b", "c")]


# what is measured decides


def test_fastest_choice_counts(candidate, measured, tmp_path):
    measured({"0": 0.1, "3": -0.005, "7": 0.1}, [1.2])
    record = tmp_path / "record.json"
    found = fastest_mixture(candidate, target=TARGET, threads=1, record=record)
    assert (found.keep_float, found.speedup) == (("0", "7"), 1.2)
    assert found.told == "; 0, 7 in float, 1.20x faster for it"
    measured({}, [])
    again = fastest_mixture(candidate, target=TARGET, threads=1, record=record)
    assert again == found, "what was measured before is read"
    assert json.loads(record.read_text())["tried"] == {"0, 7": 1.2}


@pytest.mark.parametrize("speed", [1.055, 1.02, 0.9])
def test_choice_that_is_not_clearly_faster_is_none(candidate, measured, speed):
    measured({"0": 0.1, "3": -0.1, "7": -0.1}, [speed])
    found = fastest_mixture(candidate, target=TARGET, threads=1)
    assert found == Mixture(tried={"0": speed})
    assert found.told == ""


def test_all_layers_in_float_are_no_mixture(candidate, measured):
    measured({"0": 0.1, "3": 0.1, "7": 0.1}, [])
    assert fastest_mixture(candidate, target=TARGET, threads=1) == Mixture()


def test_layers_of_the_mixture_run_in_float(candidate, tmp_path):
    samples = random_samples(candidate)
    mixed = calibrate(candidate, samples, target=TARGET, keep_float=("0",))
    fusion = fused_operators(export_onnx(mixed, tmp_path / "mixed.onnx", name="m"), threads=1)
    assert [layer.name for layer in fusion.floating] == ["0"]
    assert fusion.integer == ("3", "5", "7"), "5 is a mean, written as a convolution"


def test_real_measurement_names_layers_of_the_model(candidate, monkeypatch):
    monkeypatch.setattr(mixed_precision, "SECONDS", 0.05)
    found = fastest_mixture(candidate, target=TARGET, threads=1)
    assert set(found.keep_float) < set(LAYERS)
    assert found.speedup >= 1


def test_noise_fits_what_the_model_takes(candidate):
    samples = random_samples(candidate)
    spec = candidate.signature.inputs[0]
    assert (samples.dtype, samples.shape[1:]) == (spec.dtype, tuple(spec.shape[1:]))
    floats = replace(spec, dtype="float32", shape=(-1, 7))
    arrays = replace(candidate, signature=replace(candidate.signature, inputs=(floats,)))
    assert (random_samples(arrays).dtype, random_samples(arrays).shape) == ("float32", (8, 7))


@slow
def test_run_leaves_layers_in_float_and_says_so(tmp_path, monkeypatch):
    measure_quickly(monkeypatch)
    monkeypatch.setattr(
        "deploykit.integers.fastest_mixture", lambda *_, **__: Mixture(("convs.0",), 1.3)
    )
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE[: RECIPE.index("prune:")] + RECIPE[RECIPE.index("quantize:") :])
    mixed = run_recipe(parsed(file, "quantize.mix=true", "quantize.mode=ptq"), tmp_path / "mixed")
    (decision,) = mixed.report["decisions"]
    assert "convs.0 in float, 1.30x faster for it" in decision["why"]
    floats = mixed.report["details"]["fusion"]["float"]
    assert [layer["name"] for layer in floats] == ["convs.0"]
    whole = run_recipe(parsed(file, "quantize.mode=ptq"), tmp_path / "whole")
    assert whole.report["details"]["fusion"]["float"] == []


def parsed(file, *changes):
    return with_absolute_paths(load_recipe(file, changes), file.parent)
