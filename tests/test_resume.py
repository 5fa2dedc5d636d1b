import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import (
    SignalAfter,
    same_bits,
    state_of,
    tiny_net,
    tiny_plan,
    tiny_training,
)

from deploykit.errors import DeploykitError, Interrupted, ModelError, UsageError
from deploykit.recipe.sections import (
    AverageSection,
    EarlyStoppingSection,
    GroupSection,
    OptimizerSection,
    ScheduleSection,
)
from deploykit.train import fit, learner, loop, stop_on_signals
from deploykit.train.average import WeightAverage
from deploykit.train.batches import Batches

PLANS = {
    "sgd-ema": tiny_plan(),
    "adamw-swa": tiny_plan(
        optimizer=OptimizerSection(name="adamw", lr=0.01),
        average=AverageSection(name="swa", start=0.3),
    ),
    "rmsprop-accumulated": tiny_plan(
        optimizer=OptimizerSection(name="rmsprop", lr=0.002),
        accumulate=2,
        average=None,
        gradient_clip=1.0,
    ),
    "adam-thawing-plateau-best": tiny_plan(
        optimizer=OptimizerSection(name="adam", lr=0.01),
        schedule=ScheduleSection(name="plateau", patience=1),
        groups=(GroupSection(modules=("layer1",), thaw_epoch=1),),
        average=None,
        keep="best",
    ),
}


@cache
def uninterrupted(plan):
    net = tiny_net()
    result = fit(net, tiny_training(plan=plan), stage="train")
    return state_of(net), result


def interrupted_then_resumed(plan, folder, stop):
    training = tiny_training(folder, plan=plan)
    with stop_on_signals(), pytest.raises(Interrupted):
        fit(tiny_net(), replace(training, progress=stop), stage="train")
    net = tiny_net()
    torch.manual_seed(99)  # whatever the process drew before must not matter
    return state_of(net), net, fit(net, training, stage="train")


def without_seconds(result):
    return [replace(record, seconds=0.0) for record in result.history]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize(
    "stop",
    [{"epochs": 1}, {"epochs": 2}, {"steps": 1}, {"steps": 3}, {"steps": 5}, {"steps": 7}],
    ids=str,
)
def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path, plan, stop):
    expected, course = uninterrupted(plan)
    _, net, result = interrupted_then_resumed(plan, tmp_path, SignalAfter(**stop))
    assert same_bits(state_of(net), expected)
    assert without_seconds(result) == without_seconds(course)
    assert result.trained == course.trained


def test_training_interrupted_at_every_step_equals_uninterrupted(tmp_path):
    expected, _ = uninterrupted(tiny_plan())
    training = tiny_training(tmp_path)
    for _ in range(40):
        net = tiny_net()
        try:
            with stop_on_signals():
                fit(net, replace(training, progress=SignalAfter(steps=1)), stage="train")
            break
        except Interrupted:
            continue
    assert same_bits(state_of(net), expected)


def _skip(*_args, **_kwargs):
    return None


def _undirected_order(self, _epoch):
    return np.random.permutation(len(self._split))[: self.samples]  # noqa: NPY002


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (loop, "seed_device", _skip),
        (Batches, "_order", _undirected_order),
        (WeightAverage, "load", _skip),
        (learner, "load_optimizer_tensors", _skip),
    ],
    ids=["dropout", "order", "average", "momentum"],
)
def test_resume_test_notices_forgotten_state(tmp_path, monkeypatch, owner, name, fault):
    """The negative control of the tests above."""
    monkeypatch.setattr(owner, name, fault)
    np.random.seed(0)  # noqa: NPY002
    expected, _ = uninterrupted(tiny_plan())
    _, net, _ = interrupted_then_resumed(tiny_plan(), tmp_path, SignalAfter(steps=7))
    assert not same_bits(state_of(net), expected)


def test_interruption_names_place_and_what_is_kept(tmp_path):
    with (
        stop_on_signals(),
        pytest.raises(Interrupted, match=r"train, epoch 1, step 2: stopped by SIGTERM; --resume"),
    ):
        fit(tiny_net(), tiny_training(tmp_path, progress=SignalAfter(steps=7)), stage="train")
    with stop_on_signals(), pytest.raises(Interrupted, match="nothing is kept"):
        fit(tiny_net(), tiny_training(progress=SignalAfter(steps=7)), stage="train")


def test_finished_stage_is_not_trained_again(tmp_path, monkeypatch):
    first = tiny_net()
    result = fit(first, tiny_training(tmp_path), stage="train")
    monkeypatch.setattr(loop._Fit, "_epoch", None)
    second = tiny_net()
    assert fit(second, tiny_training(tmp_path), stage="train") == result
    assert same_bits(state_of(first), state_of(second))


def test_early_stopped_stage_stays_stopped(tmp_path, monkeypatch):
    plan = tiny_plan(
        epochs=9,
        optimizer=OptimizerSection(lr=1e-9),
        early_stopping=EarlyStoppingSection(patience=2),
        average=None,
    )
    result = fit(tiny_net(), tiny_training(tmp_path, plan=plan), stage="train")
    assert result.stopped_early
    assert len(result.history) < 9
    monkeypatch.setattr(loop._Fit, "_epoch", None)
    assert fit(tiny_net(), tiny_training(tmp_path, plan=plan), stage="train") == result


def stopped(folder, **changes):
    training = tiny_training(folder, progress=SignalAfter(steps=7), **changes)
    with stop_on_signals(), pytest.raises(Interrupted):
        fit(tiny_net(), training, stage="train")
    return folder / "train" / "state.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": tiny_plan(epochs=4)}, r"plan.epochs: 3 then, 4 now"),
        ({"seed": 4}, r"seed: 3 then, 4 now"),
        ({"augment": ()}, r"augment"),
        ({"count": 40}, r"data.train"),
    ],
)
def test_checkpoint_of_another_training_is_refused(tmp_path, changes, message):
    path = stopped(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message) as caught:
        fit(tiny_net(), tiny_training(tmp_path, **changes), stage="train")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_checkpoint_of_another_model_is_refused(tmp_path):
    stopped(tmp_path)
    net = tiny_net()
    net.linear = torch.nn.Linear(16, 3, bias=False)
    with pytest.raises(UsageError, match=r"model: "):
        fit(net, tiny_training(tmp_path), stage="train")


def test_damaged_checkpoint_is_refused_by_name(tmp_path):
    path = stopped(tmp_path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [whole[: int(len(whole) * share)] for share in np.linspace(0, 0.99, 12)]
    for place in [*range(0, 64, 7), *random.integers(0, len(whole), 60)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(DeploykitError, match=r"state\.safetensors"):
            fit(tiny_net(), tiny_training(tmp_path), stage="train")
    path.write_bytes(whole)
    fit(tiny_net(), tiny_training(tmp_path), stage="train")


def test_folder_or_pipe_in_place_of_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "train" / "state.safetensors"
    path.mkdir(parents=True)
    with pytest.raises(ModelError, match="got something else"):
        fit(tiny_net(), tiny_training(tmp_path), stage="train")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(ModelError, match="got something else"):
        fit(tiny_net(), tiny_training(tmp_path), stage="train")


SCRIPT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tiny_training import SilentProgress, tiny_net, tiny_plan, tiny_training
from deploykit.errors import Interrupted
from deploykit.train import fit, stop_on_signals

class Tell(SilentProgress):
    def step_done(self, epoch, loss, accuracy):
        print(epoch, flush=True)

folder = Path(sys.argv[1])
training = tiny_training(folder, progress=Tell(), plan=tiny_plan(epochs=int(sys.argv[2])))
net = tiny_net()
try:
    with stop_on_signals():
        fit(net, training, stage="train")
except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
save_file(net.state_dict(), folder / "end.safetensors")
"""


def start(folder, epochs):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(epochs)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


EPOCHS = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of an uninterrupted process."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, EPOCHS).communicate(timeout=120)[1] == ""
    return (folder / "end.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_process_resumes_to_the_same_bits(tmp_path, whole, number):
    process = start(tmp_path, EPOCHS)
    while process.stdout.readline() != "3\n":
        assert process.poll() is None
    time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert error.startswith("train, epoch")
        assert error.count("\n") == 1
    assert not (tmp_path / "end.safetensors").exists()

    output, error = (process := start(tmp_path, EPOCHS)).communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert int(output.split()[0]) >= 3
    assert (tmp_path / "end.safetensors").read_bytes() == whole
