"""Runs and bundles for targets that this machine is not."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tiny_run import CALIBRATED, measure_quickly, sha256

from deploykit import job
from deploykit.check import check_recipe
from deploykit.errors import BudgetError, UsageError, VerificationError
from deploykit.recipe import parse_recipe
from deploykit.runtime import detect_cpu
from deploykit.ship import export_run
from deploykit.stages import read_measurements
from deploykit.targets import TARGETS, about_integers, integers_for, suited_targets

pytestmark = pytest.mark.slow

ELSEWHERE = "cpu-arm64" if detect_cpu() != "cpu-arm64" else "cpu-x86-vnni"


def target_of(changes):
    return TARGETS[changes[0].removeprefix("target=")]


FOR = {
    "web": ("target=web",),
    "tensorrt": ("target=tensorrt",),
    "cuda": ("target=cuda", "quantize=null"),
    "another CPU": (f"target={ELSEWHERE}",),
}
HERE = TARGETS[detect_cpu()]
# Where sums have 16 bits, 8-bit weights overflow, and what is made of them cannot be proven.
RIGHT = {
    name: "quantize=null" in changes or HERE.takes_integers_of(integers_for(target_of(changes)))
    for name, changes in FOR.items()
}
PROVEN = {name: changes for name, changes in FOR.items() if RIGHT[name]}
REFUSED = {name: changes for name, changes in FOR.items() if not RIGHT[name]}
needs_other_integers = pytest.mark.skipif(
    bool(REFUSED), reason="integers other than this CPU's own cannot be proven on it"
)
UNKNOWN = {"1": None, "32": None}


def recipe_of(*changes):
    return parse_recipe(CALIBRATED, changes)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Run a recipe with these changes, once for all tests."""
    made = {}

    def make(*changes):
        if changes not in made:
            with pytest.MonkeyPatch.context() as patch:
                measure_quickly(patch)
                folder = tmp_path_factory.mktemp("runs") / "run"  # a failed one stays there
                made[changes] = job.run_recipe(recipe_of(*changes), folder)
        return made[changes]

    return make


def manifest_of(bundle):
    return json.loads((bundle / "manifest.json").read_text())


def kinds_of_weights(model):
    graph = onnx.load(model).graph
    return {tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1}


# A run for another target


@pytest.mark.parametrize("changes", PROVEN.values(), ids=PROVEN.keys())
def test_a_run_for_elsewhere_is_proven_here_and_claims_no_latency(make_run, changes, tmp_path):
    run = make_run(*changes)
    final, model = run.report["final"], run.report["details"]["model"]
    assert 0 <= final["accuracy"] <= 1
    assert final["latency_ms"] == final["speedup"] == UNKNOWN
    assert final["peak_memory_bytes"] is None
    why = run.report["decisions"][-1]["why"]
    assert "speed unknown, this machine is not the target" in why
    if model["quantized"]:
        assert about_integers(target_of(changes)) in why
    assert (run.path / "report.html").is_file()
    manifest = manifest_of(export_run(run.path, tmp_path / "bundle"))
    target = TARGETS[model["target"]]
    assert manifest["target"] == target.name
    assert manifest["measured"]["latency_ms"] == manifest["measured"]["speedup"] == UNKNOWN
    assert manifest["measured_on"] is None
    assert manifest["verified_on"]["targets"] == suited_targets(
        model["precision"], integers_for(target)
    )
    assert target.name in manifest["verified_on"]["targets"]
    assert manifest["verified_on"]["cpu_target"] == detect_cpu()


@pytest.mark.skipif(not REFUSED, reason="8-bit weights do not overflow on this CPU")
@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_a_run_whose_integers_overflow_here_is_refused(tmp_path, quick, changes):
    told = "weights of 8 bits can overflow the sums of this CPU .*: verify it on x86 with VNNI"
    with pytest.raises(VerificationError, match=told) as caught:
        job.run_recipe(recipe_of(*changes), tmp_path / "run")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "run/report.json").exists()


def test_a_run_for_this_cpu_has_latencies(make_run, tmp_path):
    run = make_run()
    assert all(run.report["final"]["latency_ms"].values())
    manifest = manifest_of(export_run(run.path, tmp_path / "bundle"))
    assert all(manifest["measured"]["latency_ms"].values())
    assert manifest["measured_on"] == run.report["environment"]
    assert detect_cpu() in manifest["verified_on"]["targets"]


def test_cuda_ships_halves_as_a_stage_of_its_own(make_run):
    run = make_run(*FOR["cuda"])
    assert [stage["name"] for stage in run.report["stages"]] == ["train", "convert"]
    assert run.report["details"]["model"]["precision"] == "fp16"
    assert kinds_of_weights(run.path / "onnx/convert.onnx") == {TensorProto.FLOAT16}
    assert (run.path / "candidates/convert/structure.json").is_file()


def test_a_cpu_ships_the_floats_that_the_recipe_asks_for(make_run):
    run = make_run("quantize=null", "precision=bf16")
    assert all(run.report["final"]["latency_ms"].values())
    assert kinds_of_weights(run.path / "onnx/convert.onnx") == {TensorProto.BFLOAT16}


# A speed that cannot be measured here


def test_a_speed_that_this_machine_cannot_measure_is_refused_before_any_work(tmp_path):
    recipe = recipe_of("target=web", "budget.min_speedup=1.5")
    told = r"budget.min_speedup: expected a machine that is web.*--latency-table"
    with pytest.raises(BudgetError, match=told) as caught:
        job.run_recipe(recipe, tmp_path / "run")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "run").exists()
    with pytest.raises(BudgetError, match=told):
        check_recipe(recipe)


def table_of(run, **changes):
    """Read the measurements of a run, as if they had been taken otherwise."""
    stages = read_measurements(run.path / "measurements.json")[0]
    return {name: {**measured, **changes} for name, measured in stages.items()}


BROWSER = {"cpu": "of a phone"}


@pytest.mark.parametrize("measured_on", [BROWSER, None], ids=["told", "not told"])
def test_latencies_taken_on_the_target_judge_it_here(make_run, tmp_path, measured_on):
    stages = table_of(make_run(), target="web", measured_on=measured_on)
    fast = {**stages["quantize"]["latency"]["1"], "ratio": 3.0}
    stages["quantize"]["latency"]["1"] = fast
    recipe = recipe_of("target=web", "budget.min_speedup=1.5")
    run = job.run_recipe(recipe, tmp_path / "run", replay=[stages])
    assert run.report["budget"]["passed"]
    assert run.report["final"]["speedup"]["1"] == 3.0
    manifest = manifest_of(export_run(run.path, tmp_path / "bundle"))
    assert manifest["measured_on"] == run.report["details"]["measured_on"] == measured_on
    told = measured_on is not None
    assert manifest["measured"]["speedup"]["1"] == (3.0 if told else None)
    assert (manifest["measured"]["latency_ms"] == UNKNOWN) is not told
    assert (manifest["measured"]["peak_memory_bytes"] is None) is not told


def test_measurements_tell_where_they_were_taken(make_run):
    run = make_run()
    for measured in table_of(run).values():
        assert measured["target"] == detect_cpu()
        assert measured["measured_on"] == run.report["environment"]


@pytest.mark.parametrize("change", [f"target={ELSEWHERE}", "threads=2"])
def test_latencies_taken_otherwise_are_refused_before_any_work(make_run, tmp_path, change):
    told = rf"--latency-table: expected latencies on .*, got some on {detect_cpu()} with 1;"
    recipe, replay = recipe_of(change), [table_of(make_run())]
    with pytest.raises(UsageError, match=told):
        job.run_recipe(recipe, tmp_path / "run", replay=replay)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=told):
        check_recipe(recipe, replay)


def test_a_table_with_a_machine_of_no_kind_is_refused(make_run, tmp_path):
    file = tmp_path / "measurements.json"
    file.write_text(json.dumps({"stages": table_of(make_run(), measured_on="here")}))
    with pytest.raises(UsageError, match=r"expected the measurements\.json of a run"):
        read_measurements(file)


def test_a_table_of_latencies_counts_for_the_check_too(make_run, deploykit, tmp_path):
    (tmp_path / "r.yaml").write_text(CALIBRATED)
    ask = ["compress", tmp_path / "r.yaml", "--check", "--set", "target=web"]
    ask += ["--set", "budget.min_speedup=1.5"]
    assert deploykit(*ask).code == 4
    table = tmp_path / "measurements.json"
    for target, code in (("web", 0), ("cuda", 2)):
        table.write_text(json.dumps({"stages": table_of(make_run(), target=target)}))
        assert deploykit(*ask, "--latency-table", table).code == code


def test_a_drop_is_judged_anywhere(make_run):
    assert make_run(*FOR["web"], "budget.max_drop=0.9").report["budget"]["passed"]


# A bundle for another target than the run's


@pytest.mark.parametrize("target", ["cpu-x86-vnni", "cpu-x86-avx2", "cpu-arm64", "web"])
def test_integers_go_to_every_cpu_from_any(make_run, deploykit, tmp_path, target):
    done = deploykit("export", make_run().path, "--target", target, "--out", tmp_path / "bundle")
    assert done.code == 0, done.err
    told = about_integers(TARGETS[target])
    assert (told in done.err.replace("\n", " ")) if told else "overflow" not in done.err
    manifest = manifest_of(tmp_path / "bundle")
    assert manifest["target"] == target
    assert target in manifest["verified_on"]["targets"]


def test_integers_become_halves_for_cuda(make_run, tmp_path):
    bundle = export_run(make_run().path, tmp_path / "bundle", target="cuda")
    manifest = manifest_of(bundle)
    assert kinds_of_weights(bundle / "model.onnx") == {TensorProto.FLOAT16}
    assert manifest["verified_on"]["targets"] == list(TARGETS)
    assert manifest["measured"]["latency_ms"] == UNKNOWN
    assert manifest["measured"]["accuracy"] is not None
    assert manifest["measured"]["size_bytes"] == (bundle / "model.onnx").stat().st_size


@needs_other_integers
def test_integers_become_symmetric_for_tensorrt(make_run, tmp_path):
    bundle = export_run(make_run().path, tmp_path / "bundle", target="tensorrt")
    assert {"tensorrt", detect_cpu()} <= set(manifest_of(bundle)["verified_on"]["targets"])
    graph = onnx.load(bundle / "model.onnx").graph
    zero_points = {
        node.input[2] for node in graph.node if node.op_type in {"QuantizeLinear"} and node.input[2]
    }
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert zero_points
    for name in zero_points:
        assert stored[name].dtype == np.int8
        assert not stored[name].any()


def test_a_run_for_cuda_ships_float32_to_cpus(make_run, tmp_path):
    run = make_run(*FOR["cuda"])
    bundle = export_run(run.path, tmp_path / "bundle", target="cpu")
    assert sha256(bundle / "model.onnx") == sha256(run.path / "onnx/train.onnx")
    assert manifest_of(bundle)["verified_on"]["targets"] == list(TARGETS)


def test_floats_that_the_recipe_asks_for_go_everywhere_as_they_are(make_run, tmp_path):
    run = make_run("quantize=null", "precision=bf16")
    for target in ("web", "cuda"):
        bundle = export_run(run.path, tmp_path / target, target=target)
        assert sha256(bundle / "model.onnx") == sha256(run.path / "onnx/convert.onnx")


def test_a_model_given_as_an_object_cannot_be_made_anew(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits
    from torch import nn

    import deploykit

    measure_quickly(monkeypatch)
    x, y = load_digits(return_X_y=True)
    x = x.astype("float32")
    run = deploykit.compress(
        nn.Linear(64, 10),
        {"train": (x[:200], y[:200]), "validation": (x[200:300], y[200:300])},
        out=tmp_path / "run",
        verify={"min_agreement": 0.8},
    )
    with pytest.raises(VerificationError, match="given as an object; compress it again"):
        export_run(run.path, tmp_path / "bundle", target="cuda")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("file", ["onnx/train.onnx", "measurements.json"])
def test_a_baseline_other_than_the_measured_one_is_refused(make_run, tmp_path, file):
    copy = shutil.copytree(make_run().path, tmp_path / "run")
    if file == "measurements.json":
        (copy / file).write_text('{"models": []}')
    else:
        model = onnx.load(copy / file)
        model.doc_string = "another"
        onnx.save(model, copy / file)
    with pytest.raises(VerificationError, match="expected the model that was measured, found"):
        export_run(copy, tmp_path / "bundle", target="cuda")
    assert not (tmp_path / "bundle").exists()


@needs_other_integers
def test_layers_that_the_run_left_in_float_stay_there_for_another_target(make_run, tmp_path):
    run = make_run()
    structure = run.path / "candidates/quantize/structure.json"
    before = structure.read_text()
    content = json.loads(before)
    layer = sorted(
        key.partition(":")[0] for key in content["structure"]["quantization"]["parameters"]
    )[-1]
    content["structure"]["quantization"]["keep_float"] = [layer]  # as a later trial may have found
    structure.write_text(json.dumps(content))
    try:
        bundle = export_run(run.path, tmp_path / "bundle", target="cpu-x86-avx2")
    finally:
        structure.write_text(before)
    whole = export_run(run.path, tmp_path / "whole", target="cpu-x86-avx2")
    floats = [kinds_of_weights(one / "model.onnx") for one in (whole, bundle)]
    assert [TensorProto.FLOAT in kinds for kinds in floats] == [False, True]


@needs_other_integers
def test_an_accuracy_that_nobody_could_judge_is_told(make_run, deploykit, tmp_path, monkeypatch):
    run = make_run()
    ask = ["export", run.path, "--target", "cpu-x86-avx2", "--out"]
    assert "warning" not in deploykit(*ask, tmp_path / "known").err
    monkeypatch.setattr("deploykit.retarget._same_data", lambda *_: None)
    found = deploykit(*ask, tmp_path / "unknown")
    assert found.code == 0
    assert "its accuracy is unknown and was held to no budget" in found.err.replace("\n", " ")
