import pytest
import torch
from tiny_training import PREPROCESS, SignalAfter, same_bits, state_of, tiny_training

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.errors import Interrupted
from deploykit.interrupt import stop_on_signals
from deploykit.prune import prune
from deploykit.prune.stage import loss_gradients
from deploykit.recipe.sections import PruneSection
from deploykit.structure import example_input, load_candidate, save_candidate
from deploykit.targets import TARGETS

TARGET = TARGETS["cpu-x86-avx2"]
FACTORY = """
from torch import nn
def net(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3),
    )
"""


@pytest.fixture
def candidate(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    scope = {}
    exec(FACTORY, scope)
    torch.manual_seed(0)
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, 8, 8, 1)),),
        (TensorSpec("logits", "float32", (-1, 3)),),
        ("left", "right", "bottom"),
        PREPROCESS,
    )
    model = {"name": "net.py:net", "arguments": {}}
    structure = {"model": model, "classes": 3, "sample_shape": [8, 8, 1]}
    return Candidate(scope["net"](), signature, structure, "train")


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
