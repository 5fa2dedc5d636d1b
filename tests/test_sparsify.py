"""Zeros and shared values among the weights: made, and kept by all training that follows."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_prune_stage import candidate_of
from test_resume_run import broken_files, run_until
from tiny_run import RECIPE, measure_quickly, read_recipe, sha256
from tiny_training import SignalAfter, same_bits, state_of, tiny_training

import deploykit
from deploykit.cluster import cluster, clustered, shared_values
from deploykit.errors import CompressionError, Interrupted, RecipeError
from deploykit.exporter import export_onnx
from deploykit.held_weights import check_protected, layer_weights, projections
from deploykit.interrupt import stop_on_signals
from deploykit.job import run_recipe
from deploykit.quantize import train_quantized
from deploykit.recipe import parse_recipe
from deploykit.recipe.sections import (
    ClusterSection,
    OptimizerSection,
    QuantizeSection,
    SparsifySection,
)
from deploykit.sparsify import masks, sparsify
from deploykit.structure import load_candidate, save_candidate
from deploykit.targets import TARGETS
from deploykit.train import fit, recovery_plan

slow = pytest.mark.slow
TARGET = TARGETS["cpu-x86-vnni"]
LAYERS = ["0.weight", "3.weight", "7.weight"]


@pytest.fixture
def candidate(tmp_path):
    return candidate_of("net", tmp_path)


def zeros_section(**changes):
    return SparsifySection(**{"ratio": 0.75, "epochs": 1, "lr": 0.05, **changes})


def few_section(**changes):
    return ClusterSection(**{"bits": 2, "epochs": 1, "lr": 0.05, **changes})


def weights_of(candidate):
    parameters = dict(candidate.module.named_parameters())
    return {name: parameters[name].detach() for name in LAYERS}


def values_of(candidate):
    return {name: len(torch.unique(weight)) for name, weight in weights_of(candidate).items()}


# which weights


def test_weights_of_layers_are_those_of_convolutions_and_linear_layers(candidate):
    assert list(layer_weights(candidate.module)) == LAYERS
    assert list(layer_weights(candidate.module, protect=("0", "7"))) == ["3.weight"]
    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.LayerNorm(8))
    assert list(layer_weights(attention)) == ["0.in_proj_weight", "0.out_proj.weight"]
    assert list(layer_weights(attention, protect=("0",))) == []


@pytest.mark.parametrize(
    ("protect", "message"),
    [(("absent*",), r"sparsify\.protect: 'absent\*' fits no module"), (("*",), "got none")],
)
def test_pattern_that_protects_nothing_or_everything_is_refused(candidate, protect, message):
    with pytest.raises(CompressionError, match=message):
        check_protected(candidate.module, protect, "sparsify")


def test_smallest_weights_of_all_layers_go():
    weights = {"a": torch.tensor([[1.0, -4.0]]), "b": torch.tensor([[-2.0, 3.0, 5.0, 6.0]])}
    kept = masks(weights, 0.5, "global")
    assert kept["a"].tolist() == [[0, 1]]
    assert kept["b"].tolist() == [[0, 0, 1, 1]]
    kept = masks(weights, 0.5, "uniform")
    assert kept["a"].tolist() == [[0, 1]]
    assert kept["b"].tolist() == [[0, 0, 1, 1]]
    assert masks(weights, 1 / 3, "global")["a"].tolist() == [[0, 1]]
    assert masks(weights, 1 / 4, "uniform")["b"].tolist() == [[0, 1, 1, 1]]


def test_no_layer_loses_all_of_its_weights():
    weights = {"small": torch.full((4, 4), 0.1), "large": torch.ones(4, 4)}
    kept = masks(weights, 0.5, "global")
    assert int(kept["small"].sum()) == 1
    assert int(kept["large"].sum()) == 16


def test_a_tied_weight_is_held_under_each_of_its_names(candidate):
    """A graph knows it by one of them only."""
    twice = torch.nn.Linear(8, 8)
    with torch.no_grad():
        twice.weight[::2] = 0
    module = torch.nn.Sequential(twice, torch.nn.ReLU(), twice)
    structure = {**candidate.structure, "sparse": ["0.weight"]}
    held = projections(replace(candidate, module=module, structure=structure))
    assert list(held) == ["0.weight", "2.weight"]
    assert torch.equal(held["2.weight"](torch.ones(8, 8)) == 0, twice.weight == 0)


# k-means


def test_shared_values_are_the_means_of_their_members():
    values = np.array([0.0, 0.1, 0.2, 5.0, 5.2, 9.0])
    assert shared_values(values, 3) == pytest.approx([0.1, 5.1, 9.0])


def test_each_weight_takes_the_nearest_value():
    weight = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    result = clustered(weight, 16)
    values = np.unique(result)
    assert len(values) <= 16
    assert np.abs(weight - result).max() <= np.abs(weight[..., None] - values).min(-1).max() + 1e-6


def test_zeros_keep_a_value_of_their_own():
    weight = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    weight[np.abs(weight) < 1] = 0
    result = clustered(weight, 4, keep_zeros=True)
    assert len(np.unique(result)) == 4
    assert np.array_equal(result == 0, weight == 0)
    assert np.array_equal(
        clustered(np.zeros((2, 3), np.float32), 4, keep_zeros=True), [[0] * 3] * 2
    )


# what training keeps


OPTIMIZERS = ["sgd", "adam", "adamw", "rmsprop"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zero_and_other_weights_learn(candidate, optimizer):
    plan = tiny_training().plan.model_copy(
        update={"optimizer": OptimizerSection(name=optimizer, lr=0.01)}
    )
    start = sparsify(candidate, tiny_training(), zeros_section(epochs=0))
    sparse = sparsify(candidate, tiny_training(plan=plan), zeros_section())
    before, after = weights_of(start), weights_of(sparse)
    total = sum(weight.numel() for weight in after.values())
    assert sum(int((weight == 0).sum()) for weight in after.values()) == round(0.75 * total)
    for name in LAYERS:
        assert torch.equal(before[name] == 0, after[name] == 0)
        assert not torch.equal(before[name], after[name])
    assert sparse.notes["sparsify"].keys() == set(LAYERS)
    assert "75.0% of the weights are zero" in sparse.notes["why"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_shared_values_stay_shared_and_learn(candidate, optimizer):
    plan = tiny_training().plan.model_copy(
        update={"optimizer": OptimizerSection(name=optimizer, lr=0.01)}
    )
    start = cluster(candidate, tiny_training(), few_section(epochs=0))
    shared = cluster(candidate, tiny_training(plan=plan), few_section())
    assert set(values_of(shared).values()) == {4}
    for name in LAYERS:
        before, after = weights_of(start)[name], weights_of(shared)[name]
        assert not torch.equal(before, after)
        groups = [torch.unique(weight, return_inverse=True)[1] for weight in (before, after)]
        pairs = torch.unique(torch.stack([group.flatten() for group in groups]), dim=1)
        assert pairs.shape[1] == 4, "each group moved as one"


def test_training_that_holds_nothing_would_move_them(candidate):
    sparse = sparsify(candidate, tiny_training(), zeros_section(epochs=0))
    shared = cluster(candidate, tiny_training(), few_section(epochs=0))
    for one, name in ((sparse, "sparsify"), (shared, "cluster")):
        plan = recovery_plan(tiny_training().plan, zeros_section())
        fit(one.module, tiny_training(), stage=name, plan=plan)
    assert not any(bool((weight == 0).any()) for weight in weights_of(sparse).values())
    assert min(values_of(shared).values()) > 4


def test_shared_gradient_is_the_sum_over_the_members_by_their_number(candidate):
    shared = cluster(candidate, tiny_training(), few_section(epochs=0))
    weight = weights_of(shared)["3.weight"]
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    projected = projections(shared)["3.weight"](gradient)
    for value in torch.unique(weight):
        members = weight == value
        expected = gradient[members].double().sum() / members.sum()
        assert torch.equal(torch.unique(projected[members]), expected.float().view(1))
    again = projections(shared)["3.weight"](projected)
    assert torch.equal(again, projected), "a projection"


def test_zeros_of_a_sparse_model_stay_zero_when_it_is_clustered(candidate):
    sparse = sparsify(candidate, tiny_training(), zeros_section())
    both = cluster(sparse, tiny_training(), few_section())
    for name in LAYERS:
        assert torch.equal(weights_of(sparse)[name] == 0, weights_of(both)[name] == 0)
    assert max(values_of(both).values()) == 4


def test_protected_modules_stay_whole(candidate):
    sparse = sparsify(candidate, tiny_training(), zeros_section(protect=("3",), epochs=0))
    shared = cluster(candidate, tiny_training(), few_section(protect=("3",), epochs=0))
    for one in (sparse, shared):
        assert torch.equal(weights_of(one)["3.weight"], weights_of(candidate)["3.weight"])
    assert sparse.structure["sparse"] == shared.structure["clustered"] == ["0.weight", "7.weight"]


def test_the_candidate_is_left_alone(candidate):
    before = state_of(candidate.module)
    cluster(sparsify(candidate, tiny_training(), zeros_section()), tiny_training(), few_section())
    assert same_bits(state_of(candidate.module), before)
    assert "sparse" not in candidate.structure


def test_distillation_may_help_the_recovery(candidate):
    plain = sparsify(candidate, tiny_training(), zeros_section())
    taught = sparsify(candidate, tiny_training(), zeros_section(distill=True))
    assert not same_bits(state_of(plain.module), state_of(taught.module))


@pytest.mark.parametrize("stage", ["sparsify", "cluster"])
def test_stage_that_was_stopped_ends_in_the_same_bits(candidate, tmp_path, stage):
    make = {"sparsify": sparsify, "cluster": cluster}[stage]
    section = {"sparsify": zeros_section, "cluster": few_section}[stage](epochs=2)
    whole = make(candidate, tiny_training(), section)
    stopping = tiny_training(tmp_path / "c", progress=SignalAfter(steps=8))
    with stop_on_signals(), pytest.raises(Interrupted, match=stage):
        make(candidate, stopping, section)
    resumed = make(candidate, tiny_training(tmp_path / "c"), section)
    assert same_bits(state_of(whole.module), state_of(resumed.module))


def test_candidate_is_rebuilt_with_its_zeros(candidate, tmp_path):
    both = cluster(
        sparsify(candidate, tiny_training(), zeros_section()), tiny_training(), few_section()
    )
    save_candidate(both, tmp_path / "c")
    loaded = load_candidate(tmp_path / "c", base=tmp_path)
    assert same_bits(state_of(loaded.module), state_of(both.module))
    assert loaded.structure == both.structure
    assert projections(loaded).keys() == set(LAYERS)


# integers


def integer_weights(path):
    """Return the int8 weights of a file, as ONNX Runtime decodes them."""
    proto = onnx.load(path)
    wanted = {node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"} - {
        node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"
    }
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return [stored[name] for name in wanted if name in stored and stored[name].ndim > 1]


@slow
def test_zeros_and_shared_values_outlive_quantization_aware_training(candidate, tmp_path):
    training = tiny_training()
    both = cluster(sparsify(candidate, training, zeros_section()), training, few_section())
    section = QuantizeSection(mode="qat", epochs=2, lr=0.05)
    quantized = train_quantized(both, training, section, target=TARGET)
    before, after = weights_of(both), weights_of(quantized)
    for name in LAYERS:
        assert torch.equal(before[name] == 0, after[name] == 0)
        assert not torch.equal(before[name], after[name]), "it has learned"
    assert max(values_of(quantized).values()) == 4
    plain = {key: value for key, value in quantized.structure.items() if key != "clustered"}
    plain.pop("sparse")
    unpacked = replace(quantized, structure=plain)
    export_onnx(unpacked, tmp_path / "m.onnx", name="tiny")
    integers = {weight.shape: weight for weight in integer_weights(tmp_path / "m.onnx")}
    for weight in after.values():
        found = integers[tuple(weight.shape)]
        assert not found[weight.numpy() == 0].any(), "the integer of a zero is 0"
        assert all(len(np.unique(channel)) <= 4 for channel in found)


# a whole run


def test_clusters_of_eight_bits_beside_integers_are_refused():
    with pytest.raises(RecipeError, match=r"cluster\.bits: expected 2 or 4 beside quantize"):
        parse_recipe(RECIPE, ["cluster.bits=8"])
    assert parse_recipe(RECIPE, ["cluster.bits=8", "quantize=null"]).cluster.bits == 8


SIZED = (
    RECIPE[: RECIPE.index("prune:")]
    + (
        "sparsify: {ratio: 0.8, epochs: 1, scope: uniform}\n"
        "cluster: {bits: 4, epochs: 1, distill: true}\n"
    )
    + RECIPE[RECIPE.index("quantize:") :]
)
SIZED = SIZED.replace("[16, 16, 16]", "[16, 32, 32]")
STAGES = ("train", "sparsify", "cluster", "quantize")


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sized")
    file = folder / "tiny.yaml"
    file.write_text(SIZED)
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        # As fast before as after: that so few rounds say so is a matter of luck.
        patch.setattr("deploykit.measure.Latency.shown", 1.0)
        return run_recipe(read_recipe(file), folder / "run"), file


@slow
def test_each_stage_makes_the_file_smaller_and_the_report_says_what_for(sized):
    report = sized[0].report
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)
    assert all(one["kept"] for one in report["decisions"]), report["decisions"]
    sizes = [stage["size_bytes"] for stage in report["stages"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[1] > 2.5
    for decision in report["decisions"][:2]:
        assert "for size alone" in decision["why"]
    assert report["details"]["sparsify"]["convs.1.weight"] == pytest.approx(0.8, abs=0.01)
    assert report["details"]["cluster"]["convs.1.weight"] <= 16
    assert "for size alone" in (sized[0].path / "report.html").read_text()
    record = json.loads((sized[0].path / "latencies-sparsify.json").read_text())
    assert [key.split()[0] for key in record["speedups"]] == ["sparsify"]


@slow
def test_bundle_of_packed_weights_verifies_and_answers(sized, tmp_path):
    bundle = deploykit.export(sized[0], out=tmp_path / "bundle")
    done = subprocess.run(
        [sys.executable, "run.py", "selftest"], cwd=bundle, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    other = deploykit.export(sized[0], out=tmp_path / "halves", target="cuda")
    dense = 2 * sum(weight.numel() for weight in sized_weights(sized[0]).values())
    assert (other / "model.onnx").stat().st_size < dense, "halves of the clustered model"


def sized_weights(run):
    candidate = load_candidate(run.path / "candidates/cluster", base=run.path)
    return layer_weights(candidate.module)


@slow
@pytest.mark.timeout(600)
def test_run_that_was_stopped_ends_in_the_same_model(sized, tmp_path):
    out = tmp_path / "run"
    assert run_until("SIGINT:stage_started cluster:1", sized[1], out).returncode == 130
    assert broken_files(out) == []
    done = run_until("SIGKILL:never:1", sized[1], out)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        model = f"onnx/{stage}.onnx"
        assert sha256(out / model) == sha256(sized[0].path / model), stage


@slow
def test_zeros_that_make_no_smaller_file_are_dropped(tmp_path, quick):
    file = tmp_path / "tiny.yaml"
    text = RECIPE[: RECIPE.index("prune:")] + RECIPE[RECIPE.index("verify:") :]
    file.write_text(f"{text}sparsify: {{ratio: 0.01, epochs: 0}}\n")
    run = run_recipe(read_recipe(file), tmp_path / "run")
    assert run.report["final"]["name"] == "train"
    assert "does not pay" in run.report["decisions"][0]["why"]
