"""Slow operators give way to ones that cost nothing, and the model stays nearly what it was."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_run import measure_quickly, read_recipe
from tiny_training import same_bits, state_of, tiny_dataset, tiny_plan, tiny_training
from torch import nn
from torch.nn import functional

import deploykit
from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.errors import BudgetError, CompressionError
from deploykit.job import run_recipe
from deploykit.models.surgery import (
    count_slow_activations,
    find_activations,
    find_gates,
    remove_gate,
)
from deploykit.recipe.sections import SurgerySection
from deploykit.structure import load_candidate, save_candidate
from deploykit.surgery import operate, replaced

slow = pytest.mark.slow


class Squeeze(nn.Module):
    """Squeeze-and-excite in a spelling of its own."""

    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Linear(channels, 4), nn.Linear(4, channels)
        self.inner = nn.SiLU()

    def forward(self, x):
        return x * torch.sigmoid(self.up(self.inner(self.down(x.mean((2, 3))))))[..., None, None]


class WrittenSwish(nn.Module):
    def forward(self, x):
        return x * functional.relu6(x + 3) / 6


class Gated(nn.Module):
    """One gate before a grouped convolution, one behind a BatchNorm, one between additions."""

    def __init__(self):
        super().__init__()
        self.first, self.swish, self.gate1 = nn.Conv2d(1, 8, 3), WrittenSwish(), Squeeze(8)
        self.second, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.gate2, self.gate3, self.silu = Squeeze(8), Squeeze(8), nn.SiLU()
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.gate1(self.swish(self.first(x)))
        x = self.gate2(self.norm(self.second(x)))
        x = self.gate3(self.silu(x)) + x
        return self.last(x.mean((2, 3)))


FACTORY = """
import torch
from torch import nn

class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
    def forward(self, x):
        pooled = torch.relu(self.down(nn.functional.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.up(pooled))

def build(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Hardswish(), Squeeze(), nn.Conv2d(16, 16, 3, stride=2),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )
"""


@pytest.fixture
def gated():
    torch.manual_seed(0)
    return Gated().eval()


def images(count=6):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def gated_candidate(module):
    shape = (8, 8, 1)
    return Candidate(
        module,
        Signature(
            (TensorSpec("image", "uint8", (-1, *shape)),),
            (TensorSpec("logits", "float32", (-1, 3)),),
            ("left", "right", "bottom"),
            tiny_dataset().preprocess,
        ),
        {"model": {"name": "gated.py:Gated", "arguments": {}}, "sample_shape": list(shape)},
        "train",
    )


# what is found


def test_activations_are_known_by_what_they_compute(gated):
    assert find_activations(gated) == ["swish", "gate1.inner", "gate2.inner", "gate3.inner", "silu"]
    assert find_activations(nn.Sequential(nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Flatten())) == []


def test_gate_that_looks_at_other_channels_is_no_activation():
    class SpatialGate(nn.Module):
        def forward(self, x):
            return x * x.mean(1, keepdim=True).sigmoid()

    class BatchGate(nn.Module):
        def forward(self, x):
            return x * x.mean(0, keepdim=True).sigmoid()

    assert find_activations(nn.Sequential(SpatialGate(), BatchGate(), nn.SiLU())) == ["2"]


def test_one_activation_in_two_places_is_found_in_both():
    shared = nn.SiLU()
    assert find_activations(nn.Sequential(shared, nn.ReLU(), shared)) == ["0", "2"]


def test_calls_are_counted_wherever_they_stand(gated):
    assert count_slow_activations(gated, images()) == 4
    assert count_slow_activations(nn.Sequential(nn.ReLU()), images()) == 0


def test_gates_are_known_by_what_they_do(gated):
    gates = find_gates(gated, [images(), images(2)])
    assert list(gates) == ["gate1", "gate2", "gate3"]
    assert (gates["gate1"].readers, gates["gate1"].writers) == (["second"], [])
    assert (gates["gate2"].readers, gates["gate2"].writers) == ([], ["norm"])
    assert all(float(one.gain.min()) > 0 and float(one.gain.max()) < 1 for one in gates.values())


def test_layer_that_sees_the_image_is_no_gate():
    class Attention(Squeeze):
        def __init__(self):
            super().__init__(8)
            self.spatial = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return x * torch.sigmoid(self.spatial(x))

    module = nn.Sequential(nn.Conv2d(1, 8, 3), Attention(), nn.Conv2d(8, 8, 1))
    assert find_gates(module, [images()]) == {}


# what takes its place


@pytest.mark.parametrize(("name", "layer"), [("gate1", "second"), ("gate2", "norm")])
def test_mean_factor_of_a_gate_goes_into_a_neighbour(gated, name, layer):
    gate = find_gates(gated, [images()])[name]
    before = gated(images())
    assert remove_gate(gated, name, gate, images(2)) == layer
    assert isinstance(gated.get_submodule(name), nn.Identity)
    found = float((gated(images()) - before).detach().std() / before.detach().std())
    assert found < 0.05
    gated.get_submodule(layer).weight.data /= gate.gain.mean()  # without the factor
    assert float((gated(images()) - before).detach().std() / before.detach().std()) > 2 * found


def test_gate_without_such_a_neighbour_stays_and_is_named(gated):
    candidate = gated_candidate(gated)
    operated, left_alone = replaced(candidate, SurgerySection(), [images()])
    assert operated.structure["surgery"] == {
        "relu6": ["swish", "gate3.inner", "silu"],
        "removed": ["gate1", "gate2"],
    }
    assert left_alone == {"gate3": "no layer beside it can take its mean factor"}
    assert count_slow_activations(operated.module, images()) == 0
    assert count_slow_activations(gated, images()) == 4, "the candidate stays as it was"


def test_factor_that_others_would_miss_is_not_folded():
    """A convolution reads the gate's output, but so does a sum: its weights are not all."""

    class Residual(Gated):
        def forward(self, x):
            x = self.gate1(self.swish(self.first(x)))
            return self.last((self.norm(self.second(x)) + x).mean((2, 3)))

    torch.manual_seed(0)
    module = Residual().eval()
    gate = find_gates(module, [images()])["gate1"]
    assert gate.readers == ["second"]
    before = state_of(module)
    assert remove_gate(module, "gate1", gate, images(2)) == ""
    assert same_bits(state_of(module), before)


def test_protected_and_unwanted_parts_stay(gated):
    candidate = gated_candidate(gated)
    section = SurgerySection(protect=("gate*", "silu"))
    operated, left_alone = replaced(candidate, section, [images()])
    assert operated.structure["surgery"] == {"relu6": ["swish"], "removed": []}
    assert set(left_alone.values()) == {"the recipe protects it"}
    operated, _ = replaced(candidate, SurgerySection(activations=False), [images()])
    assert operated.structure["surgery"]["relu6"] == []


def test_calls_that_no_module_stands_for_are_told():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(functional.silu(self.act(self.conv(x))).mean((2, 3)))

    _, left_alone = replaced(gated_candidate(Written()), SurgerySection(), [images()])
    assert "no module stands for it" in left_alone[""]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (SurgerySection(protect=("*",)), "surgery: expected modules"),
        (SurgerySection(protect=("gatte*",)), r"surgery\.protect: 'gatte\*' fits no module"),
        (SurgerySection(activations=False, squeeze_excite=False), "remove the section"),
    ],
)
def test_nothing_to_replace_is_said(gated, section, message):
    with pytest.raises(CompressionError, match=message):
        replaced(gated_candidate(gated), section, [images()])


# the stage


def test_recovery_trains_what_was_replaced(gated):
    training = tiny_training(plan=tiny_plan(average=None))
    operated = operate(gated_candidate(gated), training, SurgerySection(epochs=1))
    assert operated.stage == "surgery"
    assert operated.notes["why"] == (
        "3 activations became ReLU6, 2 squeeze-and-excites went; "
        "left alone: gate3 (no layer beside it can take its mean factor)"
    )
    assert len(operated.notes["recovery"]) == 1


def surgery_recipe(tmp_path, surgery, rest=""):
    (tmp_path / "net.py").write_text(FACTORY)
    file = tmp_path / "gated.yaml"
    file.write_text(
        "schema: 1\nname: gated\ntask: image-classification\n"
        "data: {source: digits, limit: 300}\nmodel: {name: 'net.py:build'}\n"
        "train: {epochs: 1, batch_size: 16, optimizer: {name: adamw, lr: 0.01}}\n"
        f"surgery: {surgery}\n"
        "quantize: {mode: ptq, calibration_samples: 64, unless_it_pays: keep}\n"
        f"verify: {{samples: 32, min_agreement: 0.8}}\n{rest}"
    )
    return file


def test_candidate_is_rebuilt_in_a_fresh_process(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    sys.path.insert(0, str(tmp_path))
    try:
        import net
    finally:
        sys.path.pop(0)
    candidate = gated_candidate(net.build(3))
    structure = {
        "model": {"name": "net.py:build", "arguments": {}},
        "classes": 3,
        "sample_shape": [8, 8, 1],
        "input": {},
    }
    candidate = Candidate(candidate.module, candidate.signature, structure, "train")
    operated, _ = replaced(candidate, SurgerySection(), [images()])
    save_candidate(operated, tmp_path / "saved")
    loaded = load_candidate(tmp_path / "saved", base=tmp_path)
    assert torch.equal(loaded.module(images()), operated.module.eval()(images()))
    assert find_gates(loaded.module, [images()]) == {}
    assert find_activations(loaded.module) == []


@slow
@pytest.mark.timeout(600)
def test_run_ships_a_model_without_slow_operators(tmp_path):
    file = surgery_recipe(tmp_path, "{epochs: 1, unless_it_pays: keep}")
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        run = run_recipe(read_recipe(file), tmp_path / "run")
    details = json.loads((run.path / "report.json").read_text())["details"]
    assert details["surgery"]["removed"] == ["2"]
    operators = details["fusion"]["operators"]
    assert not {"QLinearSigmoid", "QLinearMul", "HardSwish", "QuickGelu"} & operators.keys()
    bundle = deploykit.export(run, out=tmp_path / "bundle")
    told = subprocess.run(
        [sys.executable, "run.py", "selftest"], cwd=bundle, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr


@slow
@pytest.mark.timeout(600)
def test_surgery_that_costs_more_than_the_budget_allows_is_dropped(tmp_path, monkeypatch):
    measure_quickly(monkeypatch)
    monkeypatch.setattr("deploykit.course.pays", lambda *_: True)
    monkeypatch.setattr("deploykit.making.judged_drop", lambda *_: 0.2)
    budget = "budget: {max_drop: 0.1, trials: 1}\n"
    file = surgery_recipe(tmp_path, "{epochs: 0}", budget)
    report = run_recipe(read_recipe(file), tmp_path / "run").report
    (surgery,) = [one for one in report["decisions"] if one["stage"] == "surgery"]
    assert not surgery["kept"]
    assert "a drop of 20.00%, 10.00% allowed" in surgery["why"]
    file = surgery_recipe(tmp_path, "{epochs: 0, unless_it_pays: fail}", budget)
    with pytest.raises(BudgetError, match=r"surgery: expected a stage that pays, got a drop"):
        run_recipe(read_recipe(file), tmp_path / "other")


@slow
def test_model_without_slow_operators_is_refused_before_it_is_trained(tmp_path):
    file = surgery_recipe(tmp_path, "{epochs: 0}")
    text = file.read_text().replace("'net.py:build'", "digits-cnn")
    file.write_text(text)
    with pytest.raises(CompressionError, match="surgery: expected modules that compute"):
        run_recipe(read_recipe(file), tmp_path / "run")
    assert not (tmp_path / "run/candidates").exists()
