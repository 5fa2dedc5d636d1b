import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import (
    TinyDataset,
    TinySplit,
    same_bits,
    state_of,
    tiny_dataset,
    tiny_net,
    tiny_plan,
    tiny_training,
)
from torch import nn

from deploykit.data.pixels import normalize
from deploykit.errors import DataError, ModelError, RecipeError
from deploykit.progress import SilentProgress
from deploykit.recipe.sections import (
    AugmentSection,
    AverageSection,
    EarlyStoppingSection,
    OptimizerSection,
    PruneSection,
    ScheduleSection,
    TrainSection,
)
from deploykit.train import evaluate, fit, recovery_plan, set_mode
from deploykit.train.freeze import match_groups
from deploykit.train.learner import fastest_layout
from deploykit.train.optimizer import build_optimizer

OPTIMIZERS = [
    OptimizerSection(name="sgd", lr=0.05),
    OptimizerSection(name="sgd", lr=0.05, nesterov=False),
    OptimizerSection(name="sgd", lr=0.1, momentum=0.0),
    OptimizerSection(name="adam", lr=0.02),
    OptimizerSection(name="adamw", lr=0.02),
    OptimizerSection(name="rmsprop", lr=0.003),
]


def linear_net(seed=0):
    """A net without BatchNorm and dropout: its gradients do not depend on the batches."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def linear_plan(**changes):
    values = {
        "epochs": 1,
        "average": None,
        "optimizer": OptimizerSection(lr=0.1, momentum=0.0, weight_decay=0.0),
        "schedule": ScheduleSection(name="constant"),
    }
    return tiny_plan(**{**values, **changes})


def train(net, training=None, **kwargs):
    return fit(net, training or tiny_training(), stage="train", **kwargs)


# Learning


@pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=lambda o: f"{o.name}-{o.momentum}-{o.nesterov}"
)
def test_every_optimizer_learns(optimizer):
    plan = tiny_plan(epochs=12, optimizer=optimizer, average=None, keep="best")
    net = tiny_net()
    result = train(net, tiny_training(count=96, plan=plan, augment=()))
    assert result.history[-1].loss < 0.6 * result.history[0].loss
    assert result.torch_accuracy > 0.8


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "one-cycle", "plateau"])
def test_history_shows_the_schedule(name):
    plan = tiny_plan(epochs=4, schedule=ScheduleSection(name=name, patience=1))
    rates = [record.lr for record in train(tiny_net(), tiny_training(plan=plan)).history]
    assert max(rates) <= 0.05
    assert (len(set(rates)) == 1) == (name == "constant")


def test_equal_seeds_give_equal_bits_and_others_do_not():
    nets = {}
    for key, seed, stage in [("a", 3, "x"), ("b", 3, "x"), ("c", 4, "x"), ("d", 3, "y")]:
        torch.rand(len(nets))  # what the caller draws does not matter
        nets[key] = (net := tiny_net())
        fit(net, tiny_training(seed=seed), stage=stage)
    assert same_bits(state_of(nets["a"]), state_of(nets["b"]))
    assert not same_bits(state_of(nets["a"]), state_of(nets["c"]))
    assert not same_bits(state_of(nets["a"]), state_of(nets["d"]))


def test_accumulated_batches_equal_one_large_batch():
    """Of 44 samples the last step has 8 and 4, which count by their size."""
    large, small = linear_net(), linear_net()
    for net, sizes in [(large, {"batch_size": 16}), (small, {"batch_size": 8, "accumulate": 2})]:
        train(net, tiny_training(count=44, plan=linear_plan(**sizes), augment=()))
    for left, right in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_gradient_clip_bounds_the_step():
    def step_length(clip):
        net = linear_net()
        before = nn.utils.parameters_to_vector(net.parameters()).detach()
        plan = linear_plan(batch_size=64, gradient_clip=clip)
        train(net, tiny_training(plan=plan))
        after = nn.utils.parameters_to_vector(net.parameters()).detach()
        return float((after - before).norm())

    assert step_length(None) > 0.02
    assert step_length(0.01) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_label_smoothing_holds_logits_back():
    def confidence(smoothing):
        net = linear_net()
        plan = linear_plan(epochs=30, label_smoothing=smoothing)
        train(net, tiny_training(plan=plan, augment=()))
        return float(net[1].weight.detach().norm())

    assert confidence(0.3) < confidence(0.0)


def test_norms_and_biases_do_not_decay():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm((2, 6, 6)), nn.Linear(6, 3)
    )
    section = OptimizerSection(weight_decay=0.5)
    optimizer = build_optimizer(net, section, match_groups(net, ()), fused=True)
    names = {parameter: name for name, parameter in net.named_parameters()}
    decayed = {
        names[parameter]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    assert decayed == {"0.weight", "3.weight"}


def test_loss_may_be_the_callers():
    seen = []

    def loss(outputs, targets, inputs):
        seen.append((outputs.shape, targets.shape, inputs.shape))
        return ((outputs - targets) ** 2).mean()

    train(linear_net(), tiny_training(plan=linear_plan()), loss=loss)
    assert seen[0] == ((8, 3), (8, 3), (8, 1, 8, 8))


def test_arrays_train_as_they_are():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    features = (random.normal(size=(60, 5)) + labels[:, None]).astype(np.float32)
    split = TinySplit("train", features, labels)
    dataset = TinyDataset(split, split, preprocess=None)
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    result = train(net, tiny_training(dataset=dataset, augment=(), plan=linear_plan(epochs=30)))
    assert result.torch_accuracy > 0.5
    with pytest.raises(RecipeError, match=r"data\.augment: expected images"):
        train(net, tiny_training(dataset=dataset, augment=(AugmentSection(name="flip"),)))


def test_augmented_pixels_stay_whole_numbers(monkeypatch):
    seen = []
    section = AugmentSection(name="rotate", degrees=20.0)

    def keep(batch, preprocess):
        seen.append(batch)
        return normalize(batch, preprocess)

    monkeypatch.setattr("deploykit.train.batches.normalize", keep)
    train(linear_net(), tiny_training(plan=linear_plan(), augment=(section,)))
    pixels = torch.cat(seen)
    assert torch.equal(pixels, pixels.round())
    assert pixels.min() >= 0
    assert pixels.max() <= 255
    assert pixels.max() > 1


class Rows(nn.Module):
    """Turns each sample into a row, by a view, which not every layout allows, or by a copy."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def forward(self, x):
        return x.reshape(len(x), -1) if self.copies else x.view(len(x), -1)


@pytest.mark.parametrize("copies", [True, False])
def test_channels_are_innermost_where_the_module_takes_that(copies):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), Rows(copies), nn.LazyLinear(3))
    net(inputs := torch.randn(2, 3, 8, 8))
    before, drawn = state_of(net), torch.get_rng_state()
    assert (fastest_layout(net, inputs) == torch.channels_last) is copies
    assert same_bits(before, state_of(net))
    assert torch.equal(drawn, torch.get_rng_state())
    assert fastest_layout(nn.Linear(4, 3), torch.randn(2, 4)) == torch.contiguous_format


def test_module_that_views_the_features_of_grey_images_trains():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Rows(copies=False), nn.Linear(4 * 36, 3))
    plan = tiny_plan(epochs=12, average=None)
    assert train(net, tiny_training(count=96, plan=plan, augment=())).torch_accuracy > 0.8


def test_module_that_asks_for_its_version_trains():
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            assert metadata["version"] == 2
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    net = nn.Sequential(nn.Flatten(), Versioned(64, 3))
    train(net, tiny_training(plan=tiny_plan(epochs=2), augment=()))


def test_mixed_precision_trains_float_weights():
    plan = tiny_plan(epochs=6, precision="bf16", average=None)
    net = tiny_net()
    result = train(net, tiny_training(count=96, plan=plan))
    assert result.history[-1].loss < result.history[0].loss
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    other = tiny_net()
    train(other, tiny_training(count=96, plan=tiny_plan(epochs=6, average=None)))
    assert not same_bits(state_of(net), state_of(other))


@pytest.mark.skipif(torch.cuda.is_available(), reason="16 bits need a GPU")
def test_sixteen_bits_without_a_gpu_are_refused():
    with pytest.raises(RecipeError, match=r"train\.precision: expected 32 or bf16"):
        train(tiny_net(), tiny_training(plan=tiny_plan(precision="16")))


# Batches


def batch_sizes(count, batch_size):
    sizes = []
    net = linear_net()
    net.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    plan = linear_plan(batch_size=batch_size)
    validation = tiny_dataset().validation
    dataset = replace(tiny_dataset(count), validation=validation)
    train(net, tiny_training(dataset=dataset, plan=plan, augment=()))
    return sizes[1:-1]  # before them the layout is tried, after them validated


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(20, 8, [8, 8, 4]), (17, 8, [8, 8]), (16, 8, [8, 8]), (3, 8, [3]), (2, 1, [1, 1])],
)
def test_last_batch_is_kept_unless_it_holds_one_sample(count, batch_size, sizes):
    assert batch_sizes(count, batch_size) == sizes


def test_one_sample_is_too_few():
    with pytest.raises(DataError, match="at least 2 samples"):
        train(tiny_net(), tiny_training(count=1))


def test_fault_in_the_data_reaches_the_caller():
    class Broken(TinySplit):
        def load(self, indices):
            raise DataError("train.parquet, row 3: not an image")

    split = tiny_dataset().train
    dataset = replace(tiny_dataset(), train=Broken("train", split.images, split.labels))
    with pytest.raises(DataError, match="row 3"):
        train(tiny_net(), tiny_training(dataset=dataset))


# What is kept


def test_best_epoch_is_kept_and_the_first_among_equals():
    plan = tiny_plan(epochs=8, keep="best", average=None, optimizer=OptimizerSection(lr=0.3))
    training = tiny_training(plan=plan)
    net = tiny_net()
    result = train(net, training)
    accuracies = [record.validation_accuracy for record in result.history]
    assert result.kept_epoch == accuracies.index(max(accuracies))
    dataset = training.dataset
    assert evaluate(net, dataset.validation, dataset.preprocess) == max(accuracies)


def test_last_epoch_is_kept_on_request():
    training = tiny_training(plan=tiny_plan(epochs=4, keep="last"))
    net = tiny_net()
    result = train(net, training)
    dataset = training.dataset
    assert result.kept_epoch == 3
    assert evaluate(net, dataset.validation, dataset.preprocess) == result.torch_accuracy


def test_early_stopping_counts_epochs_without_gain():
    plan = tiny_plan(
        epochs=50,
        average=None,
        optimizer=OptimizerSection(lr=1e-9),
        early_stopping=EarlyStoppingSection(patience=3),
    )
    result = train(tiny_net(), tiny_training(plan=plan, augment=()))
    assert result.stopped_early
    accuracies = [record.validation_accuracy for record in result.history]
    assert max(accuracies[-3:]) <= max(accuracies[:-3])


def test_no_epochs_leave_the_weights_alone():
    net = tiny_net()
    before = state_of(net)
    result = train(net, tiny_training(plan=tiny_plan(epochs=0)))
    assert same_bits(before, state_of(net))
    assert (result.history, result.kept_epoch, result.torch_accuracy) == ((), None, None)


# Averages


class Keep(SilentProgress):
    """Copies the weights after every step and at the end of every epoch."""

    def __init__(self, net):
        self.net, self.steps, self.epochs = net, [], []

    def step_done(self, epoch, loss, accuracy):
        self.steps.append(state_of(self.net))

    def epoch_done(self, epoch, **values):
        self.epochs.append(state_of(self.net))


def averaged(section, **changes):
    net = tiny_net()
    start, keep = state_of(net), Keep(net)
    plan = tiny_plan(epochs=4, average=section, **changes)
    train(net, tiny_training(plan=plan, progress=keep))
    return net, start, keep


def test_ema_is_the_moving_average_of_weights_and_statistics():
    net, mean, keep = averaged(AverageSection(name="ema", decay=0.8))
    for step, state in enumerate(keep.steps):
        decay = min(0.8, (1 + step) / (10 + step))
        mean = {name: decay * mean[name] + (1 - decay) * state[name] for name in state}
    for name in ("conv1.weight", "bn1.running_mean", "bn1.running_var", "linear.bias"):
        torch.testing.assert_close(net.state_dict()[name], mean[name])


def test_swa_is_the_mean_of_the_last_epochs():
    net, _, keep = averaged(AverageSection(name="swa", start=0.5))
    for name in ("conv1.weight", "bn1.weight", "linear.bias"):
        mean = (keep.epochs[2][name] + keep.epochs[3][name]) / 2
        torch.testing.assert_close(net.state_dict()[name], mean)


def test_swa_estimates_its_statistics_anew():
    """With weights that jump, the mean's statistics are not the mean of the statistics."""
    wild = {"optimizer": OptimizerSection(lr=0.5), "batch_size": 2}
    net, _, keep = averaged(AverageSection(name="swa", start=0.25), **wild)
    blended = sum(state["layer1.1.running_var"] for state in keep.epochs[1:]) / 3
    seen = []
    net.layer1[0].register_forward_hook(lambda module, args, out: seen.append(out))
    dataset = tiny_dataset()
    evaluate(net, dataset.train, dataset.preprocess)
    true = seen[0].var((0, 2, 3))
    estimated = net.state_dict()["layer1.1.running_var"]
    assert (estimated - true).norm() < 0.5 * (blended - true).norm()


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_averages_only_look_on(name):
    """The weights that steps move are those of a training without an average."""
    _, _, with_average = averaged(AverageSection(name=name, start=0.0))
    _, _, without = averaged(None)
    for left, right in zip(with_average.steps, without.steps, strict=True):
        assert same_bits(left, right)


# Faults


def nan_in_epoch(epoch):
    calls = []

    def loss(outputs, targets, inputs):
        calls.append(None)
        value = nn.functional.cross_entropy(outputs, targets)
        return value * math.nan if len(calls) > 5 * epoch else value

    return loss


def test_loss_that_is_not_finite_names_place_and_remedy_and_spares_the_checkpoint(tmp_path):
    training = tiny_training(tmp_path, count=40)
    path = tmp_path / "train" / "state.safetensors"
    kept = []

    class Look(SilentProgress):
        def step_done(self, epoch, loss, accuracy):
            if epoch == 1:
                kept.append(path.read_bytes())

    message = r"train, epoch 2, step 0: expected finite numbers, got a loss of nan; lower"
    with pytest.raises(ModelError, match=message):
        train(tiny_net(), replace(training, progress=Look()), loss=nan_in_epoch(2))
    assert path.read_bytes() != kept[-1]  # the one of epoch 1, which was good
    net = tiny_net()
    train(net, training)
    whole = tiny_net()
    train(whole, tiny_training(count=40))
    assert same_bits(state_of(net), state_of(whole))


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    """The gradient of the last step may overflow where its loss did not."""

    def loss(outputs, targets, inputs):
        return (outputs.sum() * 0 + 1e-30).sqrt() * 0 + (outputs * 0).abs().sqrt().sum()

    with pytest.raises(
        ModelError, match=r"epoch 0, step 1: expected finite numbers, got others in"
    ):
        train(
            linear_net(),
            tiny_training(tmp_path, plan=linear_plan(batch_size=64)),
            loss=loss,
        )
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("net", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))])
def test_outputs_that_are_not_one_logit_a_class_are_refused(net):
    net = nn.Sequential(nn.Conv2d(1, 1, 1), net)
    with pytest.raises(ModelError, match=r"expected the model to return logits \(8, 3\)"):
        train(net)


def test_empty_split_has_no_accuracy():
    split = tiny_dataset().validation
    empty = TinySplit("validation", split.images[:0], split.labels[:0])
    with pytest.raises(DataError, match=r"data\.validation"):
        evaluate(tiny_net(), empty, None)


# What is left behind


def test_fit_leaves_no_trace_in_the_process(tmp_path):
    torch.use_deterministic_algorithms(False)
    state = torch.get_rng_state()
    net = tiny_net()
    torch.set_rng_state(state)
    train(net, tiny_training(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert not any(module.training for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["state.safetensors"]


def test_modes_are_set_by_the_given_function_alone():
    """Exported graphs refuse train() and eval()."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear_net()

        def forward(self, x):
            return self.inner(x)

        def train(self, mode=True):
            raise NotImplementedError

    modes = []
    train(
        Graph(),
        tiny_training(plan=linear_plan(epochs=2)),
        set_mode=lambda module, training, frozen: modes.append(training),
        on_epoch=lambda module, epoch, epochs: modes.append((epoch, epochs)),
    )
    assert modes == [True, (0, 2), False, True, (1, 2), False, False]


def test_evaluate_counts_the_largest_logits():
    dataset = tiny_dataset()
    net = tiny_net()
    set_mode(net, False)
    pixels = torch.from_numpy(dataset.validation.images)
    answers = net(normalize(pixels, dataset.preprocess)).argmax(1).numpy()
    expected = float((answers == dataset.validation.labels).mean())
    for batch_size in (1, 7, 256):
        accuracy = evaluate(net, dataset.validation, dataset.preprocess, batch_size=batch_size)
        assert accuracy == pytest.approx(expected)


def test_result_is_json_for_the_report():
    result = train(tiny_net())
    value = json.loads(json.dumps(result.to_json()))
    assert value["stage"] == "train"
    assert value["torch_accuracy"] == result.torch_accuracy
    assert len(value["history"]) == 3
    assert value["trained"][0]["parameters"][0] == "conv1.weight"


def test_progress_hears_every_step_and_epoch():
    heard = []

    class Listen(SilentProgress):
        def stage_started(self, stage, epochs, steps, done):
            heard.append((stage, epochs, steps, done))

        def step_done(self, epoch, loss, accuracy):
            heard.append(epoch)

        def stage_ended(self):
            heard.append("end")

    train(tiny_net(), tiny_training(plan=tiny_plan(epochs=2), progress=Listen()))
    assert heard == [("train", 2, 5, 0), *[0] * 5, *[1] * 5, "end"]


# Recovery


def test_recovery_trains_everything_gently():
    base = TrainSection(
        batch_size=64,
        optimizer=OptimizerSection(name="adamw", lr=0.01),
        average=AverageSection(name="ema"),
        early_stopping=EarlyStoppingSection(),
        label_smoothing=0.1,
    )
    plan = recovery_plan(base, PruneSection(epochs=2))
    assert (plan.epochs, plan.batch_size, plan.label_smoothing) == (2, 64, 0.1)
    assert plan.optimizer.name == "adamw"
    assert plan.optimizer.lr == pytest.approx(0.001)
    assert (plan.groups, plan.average, plan.early_stopping) == ((), None, None)
    assert recovery_plan(base, PruneSection(lr=0.5)).optimizer.lr == 0.5
    assert recovery_plan(None, PruneSection()).optimizer.lr == pytest.approx(0.001)
