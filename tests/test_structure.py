import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.errors import ModelError
from deploykit.models import fold_normalization
from deploykit.models.build import call_factory, drawing
from deploykit.prune import prune_channels
from deploykit.structure import example_input, load_candidate, save_candidate
from deploykit.widths import changed_widths, read_widths

PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "channels": 3}
NET = """
import torch
from torch import nn

class Net(nn.Module):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 2:  # as torchvision's MNASNet
            raise ValueError("weights of an unknown version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def __init__(self, width, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.up = nn.ConvTranspose2d(width, 24, 2)
        self.act = nn.PReLU(24)
        self.head = nn.Linear(24, classes)
        self.noise = torch.randn(1)  # a constant, but none of the weights

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)) + self.noise)
        x = self.act(self.up(self.depthwise(x)))
        return self.head(x.mean((2, 3)))

def net(classes, width=16):
    return Net(width, classes)
"""


def candidate_of(name, base, arguments=None, *, size=8):
    """Return a candidate that was folded and pruned, its statistics moved."""
    torch.manual_seed(0)
    arguments = arguments or {}
    shape = (size, size, 3)
    with drawing(5):
        module = call_factory(name, arguments, classes=10, sample_shape=shape, base=base)
    module(torch.randn(4, 3, size, size))
    folded, preprocess, note = fold_normalization(module, PREPROCESS, torch.zeros(2, 3, size, size))
    pruned, _ = prune_channels(folded, torch.randn(2, 3, size, size), channel_ratio=0.4)
    structure = {
        "model": {"name": name, "arguments": arguments, "seed": 5},
        "classes": 10,
        "sample_shape": list(shape),
        "input": note,
        "widths": changed_widths(read_widths(folded), read_widths(pruned)),
        "quantization": {"stem": {"scale": 0.125}},
    }
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, *shape)),),
        (TensorSpec("logits", "float32", (-1, 10)),),
        tuple("abcdefghij"),
        preprocess,
    )
    return Candidate(pruned, signature, structure, "prune", {"prune": {"seen": True}})


@pytest.fixture
def base(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.fixture
def saved(base):
    candidate = candidate_of("net.py:net", base, {"width": 32})
    save_candidate(candidate, base / "c")
    return candidate


FRESH = """
import sys, torch
from pathlib import Path
from deploykit.structure import load_candidate
candidate = load_candidate(Path(sys.argv[1]), base=Path(sys.argv[2]))
with torch.no_grad():
    torch.save(candidate.module(torch.load(sys.argv[3], weights_only=True)), sys.argv[4])
"""


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("net.py:net", {"width": 32}, 8),
        ("digits-cnn", {"widths": [8, 16]}, 8),
        ("resnet20", {}, 16),
    ],
)
def test_candidate_answers_bit_equal_in_a_fresh_process(base, name, arguments, size):
    candidate = candidate_of(name, base, arguments, size=size)
    assert candidate.structure["widths"]
    assert candidate.structure["input"]["bias_added"]
    save_candidate(candidate, base / "c")
    sample = example_input(candidate, batch=5, seed=3)
    torch.save(sample, base / "x.pt")
    subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            FRESH,
            *(str(base / p) for p in ("c", "", "x.pt", "y.pt")),
        ],
        check=True,
        timeout=120,
    )
    with torch.no_grad():
        expected = candidate.module.eval()(sample)
    assert torch.equal(torch.load(base / "y.pt", weights_only=True), expected)


def test_candidate_keeps_all_its_words(base, saved):
    loaded = load_candidate(base / "c", base=base)
    assert loaded.structure == saved.structure
    assert loaded.signature == saved.signature
    assert loaded.stage == "prune"
    assert loaded.notes == {"prune": {"seen": True}}


def test_saving_twice_writes_identical_bytes(base, saved):
    save_candidate(saved, base / "d")
    for file in ("model.safetensors", "structure.json"):
        assert (base / "c" / file).read_bytes() == (base / "d" / file).read_bytes()


def test_saving_leaves_the_modes_of_the_module(base, saved):
    saved.module.train()
    saved.module.norm.eval()
    save_candidate(saved, base / "d")
    assert saved.module.training
    assert not saved.module.norm.training


def test_saving_over_a_candidate_replaces_it(base, saved):
    nn.init.ones_(saved.module.head.bias)
    save_candidate(saved, base / "c")
    loaded = load_candidate(base / "c", base=base)
    assert bool((loaded.module.head.bias == 1).all())


def test_save_that_dies_between_the_files_leaves_no_candidate(base, saved, monkeypatch):
    def die(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr("deploykit.structure.write_json", die)
    with pytest.raises(KeyboardInterrupt):
        save_candidate(saved, base / "c")
    with pytest.raises(ModelError, match="no such candidate"):
        load_candidate(base / "c", base=base)


def test_module_without_a_factory_is_refused_with_the_remedy(base, saved):
    structure = {**saved.structure, "model": {"name": "python:Net", "arguments": {}}}
    with pytest.raises(ModelError, match=r"factory=\"path/to/file.py:function\""):
        save_candidate(Candidate(saved.module, saved.signature, structure, "train"), base / "d")
    assert not (base / "d").exists()


def test_module_that_answers_nan_is_refused(base, saved):
    nn.init.constant_(saved.module.head.bias, torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        save_candidate(saved, base / "d")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema 2"),
        (lambda c: c.pop("signature"), "expected a candidate of schema 1"),
        (lambda c: c["versions"].update(torch="99.1.0+cpu"), r"pip install 'torch>=99.1.0'"),
        (lambda c: c["versions"].update(torchao="99.1.0"), "torchao"),
        (lambda c: c["versions"].update(absent="1.0"), "absent"),
        (lambda c: c["structure"]["widths"].pop("stem"), r"stem.weight: expected shape"),
        (lambda c: c["structure"]["widths"]["head"].update(in_features=3), "head.weight"),
        (lambda c: c["structure"]["widths"].update(gone={"in_features": 3}), "gone"),
        (lambda c: c["structure"]["widths"].update(act={"num_features": 3}), "num_features"),
        (lambda c: c["structure"]["input"].update(bias_added=[]), "unknown stem.bias"),
        (lambda c: c["structure"]["model"].update(arguments={"depth": 3}), "depth"),
        (lambda c: c["structure"]["model"].update(name="net.py:other"), "other"),
        (lambda c: c.update(weights_sha256="0" * 64), "not the weights"),
        (lambda c: c["probe"][0].__setitem__(0, 1e6), "answers otherwise"),
    ],
)
def test_structure_that_does_not_fit_is_refused(base, saved, change, message):
    edit(base / "c" / "structure.json", change)
    with pytest.raises(ModelError, match=message):
        load_candidate(base / "c", base=base)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", "[" * 100_000])
def test_structure_that_is_no_candidate_is_refused(base, saved, text):
    (base / "c" / "structure.json").write_text(text)
    with pytest.raises(ModelError, match=r"structure.json"):
        load_candidate(base / "c", base=base)


def test_weights_with_one_flipped_bit_are_refused(base, saved):
    path = base / "c" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not the weights"):
        load_candidate(base / "c", base=base)


def test_missing_weights_are_refused(base, saved):
    (base / "c" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="unreadable"):
        load_candidate(base / "c", base=base)


def test_factory_that_computes_something_else_is_refused(base, saved):
    """The same shapes, another activation: only the probe can tell."""
    (base / "net.py").write_text(NET.replace("torch.relu", "torch.sigmoid"))
    with pytest.raises(ModelError, match=r"answers otherwise.*net.py:net"):
        load_candidate(base / "c", base=base)
