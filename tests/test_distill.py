"""A smaller model learns from the trained one, or the trained one from another."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_resume_run import broken_files, run_until
from tiny_run import RECIPE, read_recipe, sha256

import deploykit
from deploykit.data import dataset_from_arrays, load_dataset
from deploykit.distill import distill, student_plan
from deploykit.errors import ModelError
from deploykit.job import run_recipe
from deploykit.making import train_stage
from deploykit.models import fold_normalization
from deploykit.models.build import call_factory
from deploykit.models.normalization import renormalized
from deploykit.recipe import parse_recipe
from deploykit.recipe.sections import DistillSection, GroupSection, ModelSection, TrainSection
from deploykit.runtime import zero_point_and_scale
from deploykit.start import initial_candidate, student_candidate, teacher_candidate
from deploykit.structure import example_input, load_candidate
from deploykit.train import Training
from deploykit.work import Work

slow = pytest.mark.slow

STUDENT = "distill: {student: {name: digits-cnn, arguments: {widths: [8, 8]}}, epochs: 1"
DISTILLED = RECIPE.replace("prune:", f"{STUDENT}, unless_it_pays: keep}}\nprune:")


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(DISTILLED)
    return file


@pytest.fixture
def recipe(recipe_file):
    return read_recipe(recipe_file)


def data_of(recipe):
    return load_dataset(recipe.data, task=recipe.task, seed=recipe.seed, base=None)


def with_student(recipe, **changes):
    student = recipe.distill.student.model_copy(update=changes)
    return recipe.model_copy(
        update={"distill": recipe.distill.model_copy(update={"student": student})}
    )


# the recipe


def test_paths_of_students_and_teachers_are_relative_to_the_recipe(tmp_path):
    text = DISTILLED.replace(
        "train: {", "train: {teacher: {name: nets.py:big, weights: b.pt}, "
    ).replace("student: {name: digits-cnn, ", "student: {name: nets.py:small, weights: s.pt, ")
    file = tmp_path / "tiny.yaml"
    file.write_text(text)
    recipe = read_recipe(file)
    assert recipe.train.teacher.name == f"{tmp_path}/nets.py:big"
    assert recipe.train.teacher.weights == str(tmp_path / "b.pt")
    assert recipe.distill.student.name == f"{tmp_path}/nets.py:small"
    assert recipe.distill.student.weights == str(tmp_path / "s.pt")


def test_student_trains_as_train_says_but_for_its_own_keys():
    base = TrainSection(
        epochs=7,
        batch_size=3,
        groups=(GroupSection(modules=("layer1.*",)),),
        label_smoothing=0.1,
    )
    section = DistillSection(student=ModelSection(name="mlp"), epochs=2, lr=0.5)
    plan = student_plan(base, section)
    assert (plan.epochs, plan.batch_size, plan.label_smoothing) == (2, 3, 0.1)
    assert plan.optimizer.lr == 0.5
    assert plan.groups == (), "they name modules of the teacher"
    assert student_plan(base, section.model_copy(update={"lr": None})).optimizer == base.optimizer


# what is wrong is said before anything is trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet21"}, r"^distill\.student\.name: expected one of .*got 'resnet21'"),
        ({"arguments": {"depth": 3}}, r"^distill\.student\.arguments: .*depth"),
        ({"weights": "/absent.safetensors"}, r"^distill\.student\.weights: no such file"),
    ],
)
def test_student_that_cannot_be_built_is_refused_at_once(recipe, changes, message):
    with pytest.raises(ModelError, match=message):
        initial_candidate(with_student(recipe, **changes), data_of(recipe), None)


def test_weights_of_a_student_for_other_classes_are_refused(recipe, tmp_path):
    arguments = recipe.distill.student.arguments
    foreign = call_factory(
        "digits-cnn", arguments, classes=7, sample_shape=(8, 8, 1), base=tmp_path
    )
    save_file(foreign.state_dict(), tmp_path / "seven.safetensors")
    wrong = with_student(recipe, weights=str(tmp_path / "seven.safetensors"))
    with pytest.raises(ModelError, match=r"^distill\.student\.weights: .*tells 7 classes apart"):
        initial_candidate(wrong, data_of(recipe), None)


def test_teacher_that_cannot_be_built_is_refused_at_once(tmp_path, deploykit):
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("train: {", "train: {teacher: {name: resnet21}, "))
    for words in (["--check"], ["--out", tmp_path / "run"]):
        done = deploykit("compress", file, *words)
        assert done.code == 3
        assert "train.teacher.name: expected one of" in done.err
    assert not (tmp_path / "run").exists()


def test_patterns_of_later_stages_name_modules_of_the_student(recipe):
    prune = recipe.prune.model_copy(update={"protect": ("absent.*",)})
    with pytest.raises(ModelError, match="absent"):
        initial_candidate(recipe.model_copy(update={"prune": prune}), data_of(recipe), None)


# normalization

SHAPE = (8, 8, 3)
COLOURS = {"mean": [0.2, 0.5, 0.7], "std": [0.2, 0.25, 0.3], "channels": 3}
SHARED = {"mean": [0.4], "std": [0.25], "channels": 3}


def normalized(pixels, preprocess):
    zero, scale = zero_point_and_scale(preprocess)
    return torch.from_numpy(((pixels - zero) * scale).astype(np.float32)).permute(0, 3, 1, 2)


def test_renormalized_module_answers_as_if_it_were_fed_its_own_way():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SHAPE))
    expected = net(normalized(pixels, COLOURS))
    other = renormalized(net, takes=COLOURS, given=SHARED)
    assert torch.allclose(other(normalized(pixels, SHARED)), expected, atol=1e-5)
    assert not torch.allclose(net(normalized(pixels, SHARED)), expected, atol=1e-2)


def test_module_that_is_fed_its_own_way_stays_as_it_is():
    net = torch.nn.Flatten()
    assert renormalized(net, takes=COLOURS, given=dict(COLOURS)) is net
    assert renormalized(net, takes=None, given=None) is net


NETS = """
from torch import nn


class Twice(nn.Module):
    '''The input feeds a sum: nothing takes its normalization in.'''

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        return self.head((x + self.conv(x)).mean((2, 3)))


def twice(classes):
    return Twice(classes)
"""


def colours(count=90):
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pixels = random.integers(0, 80, (count, *SHAPE))
    pixels[np.arange(count), :, :, labels] += 120
    return pixels.astype(np.uint8), labels


@pytest.fixture
def coloured(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    x, y = colours()
    return dataset_from_arrays(
        (x, y),
        (x[:30], y[:30]),
        (x[:30], y[:30]),
        mean=tuple(COLOURS["mean"]),
        std=tuple(COLOURS["std"]),
    )


@slow
def test_student_may_take_another_normalization_than_its_teacher(
    tmp_path, coloured, quick, monkeypatch
):
    """And whatever comes after it is trained, calibrated and proven with the student's."""
    monkeypatch.chdir(tmp_path)
    run = deploykit.compress(
        "nets.py:twice",
        coloured,
        out=tmp_path / "run",
        train={"epochs": 1, "batch_size": 16},
        distill={
            "student": {"name": "mlp", "arguments": {"hidden": [8]}},
            "epochs": 3,
            "lr": 0.05,
            "unless_it_pays": "keep",
        },
        quantize={
            "mode": "qat",
            "epochs": 1,
            "distill": True,
            "calibration_samples": 32,
            "unless_it_pays": "keep",
        },
        verify={"min_agreement": 0.8},
    )
    before, after = (
        load_candidate(tmp_path / "run/candidates" / stage, base=tmp_path)
        for stage in ("train", "distill")
    )
    assert before.signature.preprocess["mean"] == COLOURS["mean"]
    assert len(after.signature.preprocess["mean"]) == 1
    assert run.report["details"]["input"]["folded"]
    assert run.report["final"]["validation_accuracy"] > 0.9


# the stage


@slow
def test_student_without_epochs_is_taken_as_it_is(recipe):
    dataset = data_of(recipe)
    teacher, student = initial_candidate(recipe, dataset, None), student_candidate(recipe, dataset)
    section = recipe.distill.model_copy(update={"epochs": 0})
    assert distill(teacher, student, Training(dataset), section).module is student.module


@slow
def test_share_and_temperature_count(recipe):
    dataset = data_of(recipe)
    teacher, student = initial_candidate(recipe, dataset, None), student_candidate(recipe, dataset)
    training = Training(
        replace(dataset, preprocess=student.signature.preprocess), recipe.train, seed=1
    )
    weights = [
        distill(
            teacher, student, training, recipe.distill.model_copy(update=update)
        ).module.state_dict()["linear.weight"]
        for update in ({}, {}, {"share": 0.5}, {"temperature": 1.0})
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


@slow
def test_train_learns_from_a_teacher_beside_the_labels(recipe, tmp_path):
    """With the whole loss the teacher's, its answers decide: one that always says 3."""
    dataset = data_of(recipe)
    arguments = {"widths": [8]}
    knowing = call_factory(
        "digits-cnn", arguments, classes=10, sample_shape=(8, 8, 1), base=tmp_path
    )
    for parameter in knowing.parameters():
        torch.nn.init.zeros_(parameter)
    knowing.linear.bias.data[3] = 50.0
    save_file(knowing.state_dict(), tmp_path / "three.safetensors")
    text = RECIPE.replace(
        "train: {",
        "train: {teacher: {name: digits-cnn, share: 1.0, arguments: {widths: [8]}, "
        f"weights: {tmp_path / 'three.safetensors'}}}, keep: last, ",
    )
    taught = parse_recipe(text, (), "tiny")
    start, teacher = initial_candidate(taught, dataset, None), teacher_candidate(taught, dataset)
    training = Training(dataset, taught.train)
    work = Work(taught, None, None, dataset, training, teacher)
    trained = train_stage(start, work)
    with torch.no_grad():
        answers = trained.module.eval()(example_input(trained, batch=16)).argmax(1)
    assert answers.eq(3).all()


FRESH = """
import sys, torch
from pathlib import Path
from deploykit.structure import example_input, load_candidate
candidate = load_candidate(Path(sys.argv[1]), base=Path())
with torch.no_grad():
    torch.save(candidate.module(example_input(candidate, batch=5, seed=3)), sys.argv[2])
"""


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    from tiny_run import measure_quickly

    folder = tmp_path_factory.mktemp("distilled")
    file = folder / "tiny.yaml"
    file.write_text(DISTILLED)
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        return run_recipe(read_recipe(file), folder / "run")


@slow
def test_what_ships_is_made_of_the_student(distilled, tmp_path):
    report = distilled.report
    assert [stage["name"] for stage in report["stages"]] == [
        "train",
        "distill",
        "prune",
        "quantize",
    ]
    first, second = report["stages"][:2]
    assert second["parameters"] < first["parameters"]
    assert second["size_bytes"] < first["size_bytes"]
    assert "digits-cnn in place of digits-cnn" in report["decisions"][0]["why"]
    assert list(report["details"]["curves"]) == ["train", "distill", "prune-1", "quantize"]
    for stage in ("distill", "prune", "quantize"):
        structure = load_candidate(distilled.path / "candidates" / stage, base=tmp_path).structure
        assert structure["model"]["arguments"] == {"widths": [8, 8]}


@slow
def test_student_is_rebuilt_bit_equal_in_a_fresh_process(distilled, tmp_path):
    folder = distilled.path / "candidates/distill"
    candidate = load_candidate(folder, base=tmp_path)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(folder), str(tmp_path / "y.pt")],
        check=True,
        timeout=120,
    )
    with torch.no_grad():
        expected = candidate.module(example_input(candidate, batch=5, seed=3))
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)


@slow
@pytest.mark.timeout(600)
def test_distillation_that_was_stopped_ends_in_the_same_model(distilled, recipe_file, tmp_path):
    out = tmp_path / "run"
    assert run_until("SIGINT:stage_started distill:1", recipe_file, out).returncode == 130
    assert broken_files(out) == []
    done = run_until("SIGKILL:never:1", recipe_file, out)
    assert done.returncode == 0, done.stderr
    for stage in ("train", "distill", "prune", "quantize"):
        model = f"onnx/{stage}.onnx"
        assert sha256(out / model) == sha256(distilled.path / model), stage


@slow
def test_student_that_does_not_pay_is_dropped(tmp_path, quick):
    file = tmp_path / "tiny.yaml"
    text = RECIPE[: RECIPE.index("prune:")] + RECIPE[RECIPE.index("verify:") :]
    big = "distill: {student: {name: digits-cnn, arguments: {widths: [64, 128, 128]}}, epochs: 1}"
    file.write_text(f"{text}{big}\n")
    run = run_recipe(read_recipe(file), tmp_path / "run")
    assert run.report["final"]["name"] == "train"
    (decision,) = run.report["decisions"]
    assert not decision["kept"]
    assert "does not pay" in decision["why"]
    record = json.loads((run.path / "latencies-distill.json").read_text())
    ((key, speedup),) = record["speedups"].items()
    assert (key.split()[0], speedup < 1) == ("distill", True)
    bundle = deploykit.export(run, out=tmp_path / "bundle", target="cuda")
    assert (bundle / "model.onnx").stat().st_size < (run.path / "onnx/distill.onnx").stat().st_size


def test_folded_module_can_be_fed_as_before_it_was_folded():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    folded, preprocess, _ = fold_normalization(net, COLOURS, torch.zeros(2, 3, 8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SHAPE))
    as_teacher = renormalized(folded, takes=preprocess, given=COLOURS)
    assert torch.allclose(
        as_teacher(normalized(pixels, COLOURS)), net(normalized(pixels, COLOURS)), atol=1e-4
    )
