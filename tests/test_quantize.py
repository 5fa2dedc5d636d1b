import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_quantized import (
    CHANNELS,
    CLASSES,
    PREPROCESS,
    TARGET,
    Net,
    Samples,
    array_candidate,
    candidate_of,
    conv,
    images,
    noise_ratio,
    plain,
    pooled,
    settled,
)
from tiny_training import TinyDataset, TinySplit
from torch import nn

from deploykit import exporter
from deploykit.artifacts import Candidate
from deploykit.errors import CompressionError, ModelError
from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.models.build import call_factory
from deploykit.quantization.deployable import candidate_graph, deployable
from deploykit.quantize import CALIBRATION_BATCH, calibrate, calibration_rows, train_quantized
from deploykit.recipe.sections import OptimizerSection, QuantizeSection, TrainSection, VerifySection
from deploykit.structure import load_candidate, save_candidate
from deploykit.targets import TARGETS
from deploykit.train import Training, fit
from deploykit.verify import verify_onnx

pytestmark = pytest.mark.slow

NET = """
import torch
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))

def net(classes):
    return Net(classes)
"""
PLAN = TrainSection(epochs=8, batch_size=16, optimizer=OptimizerSection(name="adamw", lr=0.02))
PARAMETERS = {
    ":add#0",
    ":avg_pool2d#0",
    "body.0:conv2d#0",
    "head:linear#0",
    "stem:conv2d#0",
}


def samples(name, count, seed):
    pixels, labels = images(count, seed)
    return TinySplit(name, pixels, labels)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factory")
    (folder / "net.py").write_text(NET)
    return folder


@pytest.fixture(scope="module")
def training():
    dataset = TinyDataset(
        samples("train", 160, 1),
        samples("validation", 100, 2),
        classes=tuple("abcde"),
        preprocess=PREPROCESS,
    )
    return Training(dataset, PLAN, seed=1, device="cpu")


@pytest.fixture(scope="module")
def trained(base, training):
    torch.manual_seed(0)
    module = call_factory(
        "net.py:net", {}, classes=CLASSES, sample_shape=(12, 12, CHANNELS), base=base
    )
    fit(module, training, stage="train")
    return candidate_of(module, model="net.py:net")


@pytest.fixture(scope="module")
def ptq(trained, training):
    return calibrate(trained, training.dataset.train.images, target=TARGET)


@pytest.fixture(scope="module")
def qat(trained, training):
    return train_quantized(trained, training, QuantizeSection(mode="qat", epochs=2), target=TARGET)


@pytest.fixture(params=["ptq", "qat"])
def quantized(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def answers(candidate, pixels):
    return deployable(candidate, candidate_graph(candidate))(torch.from_numpy(pixels)).numpy()


def accuracy(candidate, split):
    return (answers(candidate, split.images).argmax(1) == split.labels).mean()


def test_accuracy_stays_close_to_float(trained, quantized, training):
    validation = training.dataset.validation
    assert accuracy(trained, validation) > 0.9
    assert accuracy(quantized, validation) >= accuracy(trained, validation) - 0.03


def test_parameters_are_keyed_by_the_modules_that_produce_the_values(quantized):
    quantization = quantized.structure["quantization"]
    assert set(quantization["parameters"]) == PARAMETERS
    assert quantization["target"] == TARGET.name
    for scale, zero_point in quantization["parameters"].values():
        assert scale > 0
        assert 0 <= zero_point <= 255


def test_what_ends_in_a_relu_starts_at_zero(quantized):
    parameters = quantized.structure["quantization"]["parameters"]
    assert {parameters[key][1] for key in ("stem:conv2d#0", ":add#0", "body.0:conv2d#0")} == {0}


def test_every_layer_runs_in_integers_and_agrees(quantized, training, tmp_path):
    model = export_onnx(quantized, tmp_path / "m.onnx", name="tiny")
    verify_onnx(quantized, model, training.dataset.validation, VerifySection(), threads=1)
    report = fused_operators(model, threads=1)
    assert report.integer == ("stem", "body.0", "head")
    assert report.floating == ()


def test_the_float_candidate_is_left_alone(trained, qat, training):
    assert "quantization" not in trained.structure
    before = {name: value.clone() for name, value in trained.module.state_dict().items()}
    calibrate(trained, training.dataset.train.images[:40], target=TARGET)
    section = QuantizeSection(mode="qat", epochs=1)
    train_quantized(trained, training, section, target=TARGET)
    for name, value in trained.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(qat.module.stem.weight, trained.module.stem.weight)


def test_calibration_is_the_same_each_time(trained, ptq, training):
    again = calibrate(trained, training.dataset.train.images, target=TARGET)
    assert again.structure == ptq.structure


def test_quantization_aware_training_is_the_same_each_time(trained, qat, training):
    section = QuantizeSection(mode="qat", epochs=2)
    again = train_quantized(trained, training, section, target=TARGET)
    assert again.structure == qat.structure
    for name, value in qat.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)


# On disk

FRESH = """
import sys, torch
from pathlib import Path
from deploykit.exporter import export_onnx
from deploykit.quantization.deployable import candidate_graph, deployable
from deploykit.structure import load_candidate
folder, base, out = map(Path, sys.argv[1:])
candidate = load_candidate(folder, base=base)
export_onnx(candidate, out / "fresh.onnx", name="tiny")
pixels = torch.load(out / "pixels.pt", weights_only=True)
with torch.no_grad():
    answer = deployable(candidate, candidate_graph(candidate))(pixels)
torch.save(answer, out / "answer.pt")
"""


def test_a_saved_candidate_answers_and_exports_the_same_in_a_fresh_process(qat, base, tmp_path):
    pixels = images(16, seed=7)[0]
    save_candidate(qat, tmp_path / "c")
    torch.save(torch.from_numpy(pixels), tmp_path / "pixels.pt")
    command = [sys.executable, "-W", "error", "-c", FRESH]
    done = subprocess.run(
        [*command, str(tmp_path / "c"), str(base), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    answer = torch.load(tmp_path / "answer.pt", weights_only=True)
    assert np.array_equal(answer, answers(qat, pixels))
    here = tmp_path / "elsewhere"
    here.mkdir()
    export_onnx(qat, here / "here.onnx", name="tiny")
    assert (here / "here.onnx").read_bytes() == (tmp_path / "fresh.onnx").read_bytes()


def with_parameters(candidate, change):
    quantization = candidate.structure["quantization"]
    parameters = dict(quantization["parameters"])
    change(parameters)
    structure = {
        **candidate.structure,
        "quantization": {**quantization, "parameters": parameters},
    }
    return replace(candidate, structure=structure)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("stem:conv2d#0"), r"\['stem:conv2d#0'\] missing and none unknown"),
        (lambda p: p.update({"tail:conv2d#0": [0.1, 0]}), r"none missing and \['tail:conv2d#0'\]"),
        (
            lambda p: p.update({"stem:conv2d#1": p.pop("stem:conv2d#0")}),
            r"\['stem:conv2d#0'\] missing and \['stem:conv2d#1'\] unknown",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(ptq, base, tmp_path, change, message):
    save_candidate(with_parameters(ptq, change), tmp_path)
    with pytest.raises(CompressionError, match=message) as caught:
        candidate_graph(load_candidate(tmp_path, base=base))
    assert caught.value.layer
    assert "\n" not in str(caught.value)


# What calibration reads


class Counted:
    """Samples that remember how many were read at once."""

    def __init__(self, values):
        self.values, self.largest = values, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        found = self.values[rows]
        self.largest = max(self.largest, len(found))
        return found


def test_calibration_reads_a_few_samples_at_a_time(trained):
    many = Counted(images(CALIBRATION_BATCH * 4 + 5)[0])
    calibrate(trained, many, target=TARGET)
    assert many.largest == CALIBRATION_BATCH


def test_calibration_rows_are_distinct_sorted_and_stable():
    section = QuantizeSection(calibration_samples=50)
    rows = calibration_rows(200, section, seed=3)
    assert len(set(rows.tolist())) == 50
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, calibration_rows(200, section, seed=3))
    assert not np.array_equal(rows, calibration_rows(200, section, seed=4))
    assert len(calibration_rows(20, section, seed=3)) == 20


def test_a_model_without_layers_is_refused():
    candidate = candidate_of(Net(lambda net, x: x.flatten(1)[:, :CLASSES]))
    with pytest.raises(CompressionError, match="convolutions, linear layers"):
        calibrate(candidate, images(8)[0], target=TARGET)


def test_a_model_that_cannot_be_traced_is_refused_in_one_sentence(capfd):
    def forward(net, x):
        return net.fc(x.flatten(1) if x.sum() > 0 else -x.flatten(1))

    candidate = candidate_of(Net(forward, fc=nn.Linear(432, CLASSES)))
    with pytest.raises(ModelError, match="data-dependent") as caught:
        calibrate(candidate, images(8)[0], target=TARGET)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# Inputs


def test_arrays_are_quantized_like_any_other_tensor(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES))
    candidate = array_candidate(net.eval(), (20,))
    values = np.random.default_rng(0).normal(size=(200, 20)).astype(np.float32)
    quantized = calibrate(candidate, values, target=TARGET)
    assert "input:0" in quantized.structure["quantization"]["parameters"]
    model = export_onnx(quantized, tmp_path / "m.onnx", name="tiny")
    parity = verify_onnx(quantized, model, Samples(values), VerifySection(), threads=1)
    assert parity.max_steps <= 2
    assert len(fused_operators(model, threads=1).integer) == 2
    with torch.no_grad():
        expected = net(torch.from_numpy(values))
        assert noise_ratio(expected, candidate_graph(quantized)(torch.from_numpy(values))) < 0.01


def test_pixels_with_a_scale_a_channel_are_quantized_again(trained, tmp_path):
    preprocess = {**PREPROCESS, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    signature = replace(trained.signature, preprocess=preprocess)
    candidate: Candidate = replace(trained, signature=signature)
    pixels = images(96)[0]
    quantized = calibrate(candidate, pixels, target=TARGET)
    assert "input:0" in quantized.structure["quantization"]["parameters"]
    model = export_onnx(quantized, tmp_path / "m.onnx", name="tiny")
    parity = verify_onnx(quantized, model, Samples(pixels), VerifySection(), threads=1)
    assert parity.max_steps <= 2
    assert fused_operators(model, threads=1).floating == ()
    assert noise_ratio(answers(candidate, pixels), answers(quantized, pixels)) < 0.01


def next_to_nothing(net):
    """Weights of zero, or hardly more behind a BatchNorm, beside a bias that matters."""
    with torch.no_grad():
        net.n1.weight[3], net.n1.bias[3] = 1e-7, 4.0
        net.fc.weight[1], net.fc.bias[1] = 0.0, 5.0
    return net


def lone_norm():
    """A BatchNorm that no layer takes in."""
    relu = nn.functional.relu
    return Net(
        lambda net, x: net.fc(pooled(relu(net.n1(relu(net.c1(x)))))),
        c1=conv(CHANNELS, 8),
        n1=nn.BatchNorm2d(8),
        fc=nn.Linear(8, CLASSES),
    )


@pytest.mark.parametrize("make", [plain, lone_norm])
@pytest.mark.parametrize("name", sorted({TARGET.name, "cpu-x86-avx2"}))  # right on this CPU
def test_a_bias_beside_hardly_any_weights_fits_its_integers(name, make, tmp_path):
    candidate = candidate_of(next_to_nothing(settled(make())))
    pixels = images(96)[0]
    quantized = calibrate(candidate, pixels, target=TARGETS[name])
    model = export_onnx(quantized, tmp_path / "m.onnx", name="tiny")
    parity = verify_onnx(quantized, model, Samples(pixels), VerifySection(), threads=1)
    assert parity.max_steps <= 2
    assert fused_operators(model, threads=1).floating == ()
    assert noise_ratio(answers(candidate, pixels), answers(quantized, pixels)) < 0.01


# Mixed precision


def test_a_layer_is_left_in_float_by_name_and_rebuilt_so(trained, training, base, tmp_path):
    pixels = training.dataset.train.images
    mixed = calibrate(trained, pixels, target=TARGET, keep_float=("body.*",))
    assert mixed.structure["quantization"]["keep_float"] == ["body.0"]
    model = export_onnx(mixed, tmp_path / "m.onnx", name="tiny")
    verify_onnx(mixed, model, training.dataset.validation, VerifySection(), threads=1)
    report = fused_operators(model, threads=1)
    assert (report.integer, [layer.name for layer in report.floating]) == (
        ("stem", "head"),
        ["body.0"],
    )
    save_candidate(mixed, tmp_path / "c")
    loaded = load_candidate(tmp_path / "c", base=base)
    assert np.array_equal(answers(loaded, pixels[:16]), answers(mixed, pixels[:16]))


def test_unguarded_float_weights_between_pairs_would_be_rounded(
    trained, training, monkeypatch, tmp_path
):
    pixels = training.dataset.train.images
    mixed = calibrate(trained, pixels, target=TARGET, keep_float=("body.0",))
    monkeypatch.setattr(exporter, "_keep_floats", lambda graph: None)
    model = export_onnx(mixed, tmp_path / "m.onnx", name="tiny")
    assert "body.0" in fused_operators(model, threads=1).integer


def test_training_leaves_a_layer_in_float_too(trained, training, tmp_path):
    section = QuantizeSection(mode="qat", epochs=1)
    mixed = train_quantized(trained, training, section, target=TARGET, keep_float=("stem",))
    model = export_onnx(mixed, tmp_path / "m.onnx", name="tiny")
    verify_onnx(mixed, model, training.dataset.validation, VerifySection(), threads=1)
    report = fused_operators(model, threads=1)
    assert (report.integer, len(report.floating)) == (("body.0", "head"), 1)
    assert report.floating[0].why == "its weights are floats"


def test_a_model_that_stays_in_float_altogether_is_refused(trained, training):
    with pytest.raises(CompressionError, match="none that run in integers"):
        calibrate(trained, training.dataset.train.images, target=TARGET, keep_float=("*",))


def test_a_pattern_that_fits_no_layer_is_refused_with_what_is_near(trained, training):
    with pytest.raises(CompressionError, match=r"'hed' fits no layer.*head"):
        calibrate(trained, training.dataset.train.images, target=TARGET, keep_float=("hed",))


def test_a_pattern_whose_layers_went_with_a_removed_block_is_no_fault(trained, training):
    shorter = replace(trained, structure={**trained.structure, "removed": ["gone"]})
    pixels = training.dataset.train.images
    mixed = calibrate(shorter, pixels, target=TARGET, keep_float=("gone.conv", "head"))
    assert mixed.structure["quantization"]["keep_float"] == ["head"]


def test_a_rate_that_integers_do_not_survive_is_named(trained, training):
    section = QuantizeSection(mode="qat", epochs=1, lr=1e30)
    with pytest.raises(ModelError, match=r"expected finite numbers.*lower the learning rate"):
        train_quantized(trained, training, section, target=TARGET)


def test_integers_are_trained_in_float32_whatever_the_float_model_was(trained, training):
    halves = replace(training, plan=PLAN.model_copy(update={"precision": "bf16"}))
    section = QuantizeSection(mode="qat", epochs=1)
    found = train_quantized(trained, halves, section, target=TARGET)
    assert found.structure["quantization"]["mode"] == "qat"


def test_a_structure_of_before_mixed_precision_still_loads(ptq, base, tmp_path):
    quantization = dict(ptq.structure["quantization"])
    assert quantization.pop("keep_float") == []
    old = replace(ptq, structure={**ptq.structure, "quantization": quantization})
    save_candidate(old, tmp_path)
    pixels = images(16, seed=7)[0]
    loaded = load_candidate(tmp_path, base=base)
    assert np.array_equal(answers(loaded, pixels), answers(ptq, pixels))
