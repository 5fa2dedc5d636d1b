"""The Python functions: a model and arrays of the user's own, without any YAML."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import measure_quickly
from torch import nn

import deploykit
from deploykit.errors import (
    DataError,
    ModelError,
    RecipeError,
    UsageError,
    VerificationError,
)
from deploykit.structure import load_candidate

VERIFY = {"samples": 16, "min_agreement": 0.5}


class Net(nn.Module):
    """A user's own: dropout and BatchNorm, so that a forgotten mode would show."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.linear = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.linear(self.drop(x.mean(dim=(2, 3))))


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = generator.integers(0, 60, (count, 8, 8)) + 90 * y[:, None, None]
    return x.astype(np.uint8), y


def arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"train": images(60, 0), "validation": images(30, 1), "test": images(30, 2)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a user's module, and the module with its state from before."""
    torch.manual_seed(0)
    net = Net()
    net.norm.eval()  # a mode of its own, that must stay
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        run = deploykit.compress(
            net,
            arrays(),
            out=str(tmp_path_factory.mktemp("api") / "run"),
            name="mine",
            train={"epochs": 4, "batch_size": 10, "optimizer": {"name": "adamw", "lr": 0.02}},
            quantize={
                "mode": "ptq",
                "calibration_samples": 60,
                "unless_it_pays": "keep",
            },
            verify=VERIFY,
        )
    return run, net, before


@pytest.mark.slow
def test_run_of_a_module_is_a_run_like_any_other(trained):
    run, _, _ = trained
    assert run.report == json.loads((run.path / "report.json").read_text())
    assert run.report["name"] == "mine"
    assert run.report["final"]["accuracy"] > 0.8
    assert [stage["name"] for stage in run.report["stages"]] == ["train", "quantize"]
    assert not (run.path / "candidates").exists(), "no other process could rebuild it"


@pytest.mark.slow
def test_module_of_the_user_is_not_altered(trained):
    _, net, before = trained
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (net.training, net.norm.training, net.drop.training) == (True, False, True)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.slow
def test_exported_bundle_predicts_what_the_run_measured(trained, tmp_path):
    run, _, _ = trained
    path = deploykit.export(run, out=tmp_path / "bundle")
    x, y = arrays()["test"]
    answers = deploykit.load_bundle(path).predict(x[..., np.newaxis])
    accuracy = np.mean(
        [label == str(truth) for label, truth in zip(answers.labels, y, strict=True)]
    )
    assert accuracy == pytest.approx(run.report["final"]["accuracy"])
    assert answers.logits.shape == (30, 3)
    with pytest.raises(UsageError, match="exists already"):
        deploykit.export(str(run.path), out=path)
    assert deploykit.export(str(run.path), out=str(path), force=True) == path


@pytest.mark.slow
def test_object_cannot_be_made_anew_for_other_integers(trained, tmp_path):
    run, _, _ = trained
    made_for = run.report["details"]["model"]["target"]
    # Without VNNI every other CPU gets the same integers.
    other = "tensorrt" if made_for == "cpu-x86-avx2" else "cpu-x86-avx2"
    with pytest.raises(VerificationError, match=f"compress it again with target='{other}'"):
        deploykit.export(run, out=tmp_path / "bundle", target=other)
    assert not (tmp_path / "bundle").exists()


FILE = """
from torch import nn
from neighbour import WIDTH


def net(classes, sample_shape, depth=1):
    pixels = sample_shape[0] * sample_shape[1] * sample_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, WIDTH), nn.Linear(WIDTH, classes))
"""


@pytest.mark.slow
def test_named_factory_is_rebuilt_in_another_process(tmp_path, monkeypatch, quick):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("WIDTH = 16\n")
    monkeypatch.chdir(tmp_path)
    run = deploykit.compress("mine.py:net", arrays(), out="run", verify=VERIFY)
    here = load_candidate(run.path / "candidates/train", base=Path())
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    code = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from deploykit.structure import load_candidate\n"
        "module = load_candidate(Path(sys.argv[1]), base=Path()).module\n"
        "x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)\n"
        "print(module(x).detach().numpy().tobytes().hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str((run.path / "candidates/train").absolute())],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stdout.strip() == here.module(x).detach().numpy().tobytes().hex()


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (3, UsageError, "got int"),
        ({"train": images(9, 0)}, UsageError, r"got \['train'\]"),
        ({**arrays(), "extra": images(9, 0)}, UsageError, "extra"),
        ({**arrays(), "train": 3}, UsageError, r"data: train: expected \(x, y\), got int"),
        ({**arrays(), "test": images(9, 0)[:1]}, UsageError, r"data: test: expected \(x, y\)"),
        ({**arrays(), "train": (images(9, 0)[0], [0, 1])}, DataError, "9 samples and 2 labels"),
        (
            {name: (x / 2.0, y) for name, (x, y) in arrays().items()},
            ModelError,
            r"expected a forward pass on input \(2, 8, 8\)",
        ),
    ],
)
def test_bad_data_are_one_sentence(tmp_path, data, error, words):
    with pytest.raises(error, match=words):
        deploykit.compress(Net(), data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"train": {"epoch": 3}}, RecipeError, "did you mean .*epochs"),
        ({"train": {"epochs": -1}}, RecipeError, "train.epochs: expected"),
        ({"train": {"epochs": torch.tensor(3)}}, UsageError, "plain numbers"),
        ({"target": "abacus"}, UsageError, "abacus"),
        ({"name": "My Model"}, RecipeError, "name"),
        ({"augment": [{"name": "flop"}]}, RecipeError, "augment"),
        ({"prune": {"protect": ["layer9"]}}, ModelError, "layer9"),
        ({"train": {"groups": [{"modules": ["layer9"]}]}}, ModelError, "layer9"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, settings, error, words):
    with pytest.raises(error, match=words):
        deploykit.compress(Net(), arrays(), out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


class Squeezing(Net):
    """Loses the batch of one as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).unsqueeze(0).squeeze()


class Wide(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()


class Computed(Net):
    """Holds a tensor computed from its parameters, as the old weight_norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.doubled = 2 * next(self.parameters())


class Drawing(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Squeezing(), r"expected logits \(1, 3\), one a class, got \(3,\)"),
        (Wide(), "expected logits of float32, got float64"),
        (Computed(), "a module that can be copied"),
        (Drawing(), "trace to answer as the model does"),
        (Net(classes=5), r"expected logits \(2, 3\), one a class, got \(2, 5\)"),
        (nn.Linear(3, 3), "expected a forward pass"),
        (nn.LSTM(8, 3), "model"),
        ("no.py:net", "no such file"),
        ("resnet57", "expected one of"),
    ],
)
def test_bad_models_are_one_sentence(tmp_path, monkeypatch, model, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=words):
        deploykit.compress(model, arrays(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dataset_brings_its_own_normalization(tmp_path):
    from deploykit.data import dataset_from_arrays

    data = dataset_from_arrays(*arrays().values())
    with pytest.raises(UsageError, match="normalize: expected none beside a Dataset"):
        deploykit.compress(Net(), data, out=tmp_path / "run", normalize={"mean": (0.1,)})


def test_no_module_hides_a_public_function():
    """Importing deploykit.NAME would put the module in the function's place."""
    modules = {path.stem for path in Path(deploykit.__file__).parent.iterdir()}
    assert modules.isdisjoint(set(deploykit.__all__))
    assert "bundle" in modules
