from dataclasses import replace

import pytest
import torch
from tiny_training import PREPROCESS, SignalAfter, same_bits, state_of, tiny_training
from torch.nn.functional import cross_entropy

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.errors import CompressionError, Interrupted, ModelError
from deploykit.interrupt import stop_on_signals
from deploykit.prune import prune
from deploykit.prune.cost import MacsCost
from deploykit.prune.stage import loss_gradients
from deploykit.recipe.sections import PruneSection
from deploykit.structure import example_input, load_candidate, save_candidate
from deploykit.targets import TARGETS
from deploykit.train.distill import distillation

TARGET = TARGETS["cpu-x86-avx2"]
FACTORY = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))
def deep(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *(Block(width) for _ in range(3)),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3),
    )
def net(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3),
    )
"""


@pytest.fixture
def candidate(tmp_path):
    return candidate_of("net", tmp_path)


@pytest.fixture
def deep(tmp_path):
    return candidate_of("deep", tmp_path)


def candidate_of(factory, folder):
    (folder / "net.py").write_text(FACTORY)
    scope = {}
    exec(FACTORY, scope)
    torch.manual_seed(0)
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, 8, 8, 1)),),
        (TensorSpec("logits", "float32", (-1, 3)),),
        ("left", "right", "bottom"),
        PREPROCESS,
    )
    model = {"name": f"net.py:{factory}", "arguments": {}}
    structure = {"model": model, "classes": 3, "sample_shape": [8, 8, 1]}
    return Candidate(scope[factory](), signature, structure, "train")


def section(**changes):
    values = {"channel_ratio": 0.5, "channel_multiple": 4, "epochs": 1, "lr": 0.01}
    return PruneSection(**{**values, **changes})


def test_each_step_removes_its_share_and_recovers(candidate):
    pruned = prune(candidate, tiny_training(), section(steps=2), target=TARGET)
    assert pruned.stage == "prune"
    assert pruned.notes["prune"]["achieved_ratio"] == 0.5
    assert pruned.notes["prune"]["left_alone"] == {"7": "it carries the model's output"}
    assert [course["stage"] for course in pruned.notes["recovery"]] == ["prune-1", "prune-2"]
    widths = pruned.module[0].out_channels, pruned.module[3].out_channels
    assert sum(widths) == 16
    assert all(width % 4 == 0 for width in widths)


def test_stage_leaves_its_candidate_as_it_was(candidate):
    before = state_of(candidate.module)
    prune(candidate, tiny_training(), section(), target=TARGET)
    assert same_bits(before, state_of(candidate.module))
    assert "widths" not in candidate.structure


def test_pruned_candidate_is_rebuilt_from_its_factory(candidate, tmp_path):
    pruned = prune(candidate, tiny_training(), section(), target=TARGET)
    save_candidate(pruned, tmp_path / "c")
    loaded = load_candidate(tmp_path / "c", base=tmp_path)
    sample = example_input(pruned, batch=3)
    assert torch.equal(loaded.module(sample), pruned.module.eval()(sample))
    assert loaded.notes["prune"]["parameters"][1] < loaded.notes["prune"]["parameters"][0]


def test_pruning_a_pruned_candidate_again_keeps_its_earlier_widths(candidate, tmp_path):
    once = prune(candidate, tiny_training(), section(epochs=0, protect=("0",)), target=TARGET)
    twice = prune(once, tiny_training(), section(epochs=0, protect=("7",)), target=TARGET)
    assert [twice.module[i].out_channels for i in (0, 3)] == [8, 8]
    save_candidate(twice, tmp_path / "c")
    loaded = load_candidate(tmp_path / "c", base=tmp_path)
    assert same_bits(state_of(loaded.module), state_of(twice.module))


def test_width_multiple_comes_from_the_target(candidate):
    pruned = prune(candidate, tiny_training(), section(channel_multiple=None), target=TARGET)
    assert pruned.module[0].out_channels % TARGET.channel_multiple == 0


def test_stage_without_recovery_trains_nothing(candidate):
    pruned = prune(candidate, tiny_training(), section(epochs=0), target=TARGET)
    assert pruned.notes["recovery"] == []


def test_interrupted_pruning_resumes_to_the_same_bits(candidate, tmp_path):
    whole = prune(candidate, tiny_training(tmp_path / "a"), section(steps=2), target=TARGET)
    broken = tiny_training(tmp_path / "b", progress=SignalAfter(steps=8))
    with stop_on_signals(), pytest.raises(Interrupted):
        prune(candidate, broken, section(steps=2), target=TARGET)
    resumed = prune(candidate, tiny_training(tmp_path / "b"), section(steps=2), target=TARGET)
    assert same_bits(state_of(whole.module), state_of(resumed.module))


def test_taylor_gradients_are_those_of_the_mean_loss(candidate):
    training = tiny_training(augment=())
    gradients = loss_gradients(candidate.module, training)
    split = training.dataset.train
    pixels = torch.from_numpy(split.images).permute(0, 3, 1, 2).float()
    module = candidate.module.eval()
    outputs = module((pixels - 128) * torch.tensor(1 / 127.5))
    torch.nn.functional.cross_entropy(outputs, torch.from_numpy(split.labels)).backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-6)


def test_taylor_pruning_runs_on_the_training_samples(candidate):
    chosen = section(importance="taylor", epochs=0)
    first = prune(candidate, tiny_training(), chosen, target=TARGET)
    second = prune(candidate, tiny_training(), chosen, target=TARGET)
    assert same_bits(state_of(first.module), state_of(second.module))


# To a bound


def bounded(**changes):
    values = {"channel_multiple": 4, "epochs": 0}
    return PruneSection(**{**values, **changes})


class Milliseconds:
    """Multiply-accumulates for milliseconds; a model that was built takes ``off`` times more."""

    def __init__(self, candidate, off=1.0):
        self.macs = MacsCost.of(candidate.module, example_input(candidate, batch=2))
        self.off, self.whole, self.measured = off, candidate.module, []

    def predict(self, widths, removed=()):
        return self.macs.predict(widths, removed) / 1000

    def measure(self, module, removed=()):
        off = 1.0 if module is self.whole else self.off
        self.measured.append(off * self.macs.measure(module, removed) / 1000)
        return self.measured[-1]


@pytest.mark.parametrize("factory", ["net", "deep"])
@pytest.mark.parametrize("depth", [True, False])
def test_multiply_accumulates_fall_by_what_was_asked(tmp_path, factory, depth):
    candidate = candidate_of(factory, tmp_path)
    pruned = prune(candidate, tiny_training(), bounded(macs=1.5, depth=depth), target=TARGET)
    before, after = pruned.notes["prune"]["macs"]
    assert before / after >= 1.5
    assert depth or not pruned.notes["prune"]["removed"]
    (bound,) = pruned.notes["prune"]["bounds"]
    assert bound["measured"] <= bound["bound"] == pytest.approx(before / 1.5)
    assert bound["predicted"] == pytest.approx(bound["measured"])


def test_removed_blocks_are_left_out_again_when_rebuilt(deep, tmp_path):
    pruned = prune(deep, tiny_training(), bounded(macs=2.5, channel_multiple=16), target=TARGET)
    assert pruned.structure["removed"]
    save_candidate(pruned, tmp_path / "c")
    loaded = load_candidate(tmp_path / "c", base=tmp_path)
    sample = example_input(pruned, batch=3)
    with torch.no_grad():
        assert torch.equal(loaded.module(sample), pruned.module.eval()(sample))


def test_structure_without_its_removed_blocks_would_not_load(deep, tmp_path):
    pruned = prune(deep, tiny_training(), bounded(macs=2.5, channel_multiple=16), target=TARGET)
    whole = {key: value for key, value in pruned.structure.items() if key != "removed"}
    save_candidate(replace(pruned, structure=whole), tmp_path / "c")
    with pytest.raises(ModelError):
        load_candidate(tmp_path / "c", base=tmp_path)


def test_model_that_measures_slower_than_predicted_is_pruned_further(deep):
    whole = Milliseconds(deep).measure(deep.module)
    slow = Milliseconds(deep, off=1.2)
    section = bounded(latency_ms=whole / 1.5)
    prune(deep, tiny_training(), section, target=TARGET, latency=slow)
    assert slow.measured[-1] <= 1.02 * whole / 1.5
    assert len(slow.measured) > 2
    exact = Milliseconds(deep)
    prune(deep, tiny_training(), section, target=TARGET, latency=exact)
    assert len(exact.measured) == 2


def test_bound_that_cannot_be_held_is_refused_with_what_can_be(deep):
    with pytest.raises(CompressionError, match=r"expected a model of at most .* got .* ask for"):
        prune(deep, tiny_training(), bounded(macs=1000.0), target=TARGET)


def test_protected_modules_keep_their_widths_and_their_blocks(deep):
    section = bounded(macs=1.3, protect=("2", "3"))
    pruned = prune(deep, tiny_training(), section, target=TARGET)
    assert set(pruned.notes["prune"]["removed"]) <= {"4"}
    assert pruned.module[2].first.out_channels == pruned.module[3].first.out_channels == 16


def test_steps_reach_the_bound_by_equal_factors(deep):
    section = bounded(macs=2.25, steps=2, epochs=1)
    pruned = prune(deep, tiny_training(), section, target=TARGET)
    first, second = (bound["bound"] for bound in pruned.notes["prune"]["bounds"])
    assert first / second == pytest.approx(1.5)
    assert [course["stage"] for course in pruned.notes["recovery"]] == ["prune-1", "prune-2"]


def test_sensitivities_rise_as_a_group_narrows(deep):
    pruned = prune(deep, tiny_training(), bounded(macs=1.2), target=TARGET)
    groups = pruned.notes["prune"]["sensitivity"]["groups"]
    assert groups
    for group in groups:
        harms = [group["divergence"][key] for key in sorted(group["divergence"], key=int)]
        assert harms == sorted(harms, reverse=True)


def test_distillation_asks_for_the_answers_of_the_teacher(candidate):
    training = tiny_training()
    loss = distillation(candidate.module, training, training.plan, section(share=0.75))
    inputs, targets = example_input(candidate, batch=5), torch.eye(3)[[0, 1, 2, 0, 1]]
    with torch.no_grad():
        known = candidate.module.eval()(inputs)
    alike, opposed = loss(known, targets, inputs), loss(-known, targets, inputs)
    assert alike == pytest.approx(float(0.25 * cross_entropy(known, targets)), rel=1e-4)
    assert opposed > alike


def test_recovery_may_learn_from_the_whole_model(candidate):
    plain = prune(candidate, tiny_training(), section(), target=TARGET)
    taught = prune(candidate, tiny_training(), section(distill=True), target=TARGET)
    assert not same_bits(state_of(plain.module), state_of(taught.module))
