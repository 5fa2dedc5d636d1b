import copy
import warnings
from itertools import pairwise

import pytest
import torch
from tiny_training import SignalAfter, state_of, tiny_net, tiny_plan, tiny_training
from torch import nn

from deploykit.errors import Interrupted, ModelError
from deploykit.recipe.sections import GroupSection
from deploykit.train import fit, set_mode, stop_on_signals
from deploykit.train.freeze import match_groups

BACKBONE = ("conv1", "bn1", "layer1.*")


def thaw_at(epoch, modules=BACKBONE, **values):
    plan = tiny_plan(
        epochs=3,
        average=None,
        groups=(GroupSection(modules=modules, thaw_epoch=epoch, **values),),
    )
    return tiny_training(plan=plan)


def watch():
    """Return an ``on_epoch`` that keeps the state at the start of each epoch."""
    states = []
    return states, lambda module, _epoch, _epochs: states.append(state_of(module))


def moved(before, after):
    """Return what changed; exported graphs count batches in any mode, which nothing reads."""
    return {
        name
        for name in before
        if not name.endswith("num_batches_tracked") and not torch.equal(before[name], after[name])
    }


BACKBONE_STATE = {
    *("conv1.weight", "bn1.weight", "bn1.bias"),
    *("bn1.running_mean", "bn1.running_var"),
    *("layer1.0.weight", "layer1.1.weight", "layer1.1.bias"),
    *("layer1.1.running_mean", "layer1.1.running_var"),
}
HEAD_STATE = {"linear.weight", "linear.bias"}


def exported(net):
    """Return the net as an exported graph, and what sets modes in it."""
    example = torch.randn(4, 1, 8, 8)
    batch = torch.export.Dim("batch", min=2)
    net.train()
    graph = torch.export.export(net, (example,), dynamic_shapes=({0: batch},)).module()

    def set_graph_mode(module, training, frozen):
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                name = node.args[3].target.rpartition(".")[0]
                node.args = (*node.args[:5], training and name not in frozen, *node.args[6:])
            elif node.target is torch.ops.aten.dropout.default:
                node.args = (*node.args[:2], training)
        module.recompile()

    return graph, set_graph_mode


def plain(net):
    return net, set_mode


def copied(net):
    return copy.deepcopy(net), set_mode


def copied_graph(net):
    graph, set_graph_mode = exported(net)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's own
        return copy.deepcopy(graph), set_graph_mode


@pytest.mark.parametrize("kind", [plain, copied, exported, copied_graph])
@pytest.mark.parametrize("start", ["train", "eval"])
def test_frozen_parts_stand_still_and_thawed_ones_move(kind, start):
    module, mode = kind(tiny_net())
    mode(module, start == "train", frozenset())
    states, on_epoch = watch()
    fit(module, thaw_at(2), stage="train", set_mode=mode, on_epoch=on_epoch)
    states.append(state_of(module))
    assert moved(states[0], states[1]) == HEAD_STATE
    assert moved(states[1], states[2]) == HEAD_STATE
    # After two validations, each of which leaves evaluation mode behind.
    assert moved(states[2], states[3]) == HEAD_STATE | BACKBONE_STATE


@pytest.mark.parametrize("kind", [plain, exported])
@pytest.mark.parametrize("steps", [6, 12], ids=["while frozen", "while thawed"])
def test_freezing_survives_a_resume(tmp_path, kind, steps):
    training = thaw_at(2)
    training = type(training)(**{**vars(training), "checkpoints": tmp_path})
    stopping = type(training)(**{**vars(training), "progress": SignalAfter(steps=steps)})
    module, mode = kind(tiny_net())
    with stop_on_signals(), pytest.raises(Interrupted):
        fit(module, stopping, stage="train", set_mode=mode)
    module, mode = kind(tiny_net())
    states, on_epoch = watch()
    fit(module, training, stage="train", set_mode=mode, on_epoch=on_epoch)
    states.append(state_of(module))
    assert moved(states[-2], states[-1]) == HEAD_STATE | BACKBONE_STATE
    for before, after in pairwise(states[:-1]):
        assert moved(before, after) == HEAD_STATE


def test_freezing_test_notices_a_mode_left_by_validation():
    """The negative control: a loop that does not set the mode again after validating."""
    seen = []

    def once(module, training, frozen):
        if not training or not seen:
            set_mode(module, training, frozen)
        seen.append(training)

    states, on_epoch = watch()
    net = tiny_net()
    fit(net, thaw_at(0), stage="train", set_mode=once, on_epoch=on_epoch)
    assert "bn1.running_mean" in moved(states[0], states[1])
    assert "bn1.running_mean" not in moved(states[1], states[2])


def test_exported_graph_trains_as_the_module_does():
    net, (graph, mode) = tiny_net(), exported(tiny_net())
    plan = tiny_plan(average=None, epochs=2)
    net.dropout.p = 0.0
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.dropout.default:
            node.args = (node.args[0], 0.0, True)
    left = fit(net, tiny_training(plan=plan), stage="train")
    right = fit(graph, tiny_training(plan=plan), stage="train", set_mode=mode)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(graph.state_dict()[name], value)
    assert [e.loss for e in left.history] == pytest.approx([e.loss for e in right.history])


def test_never_means_never():
    net = tiny_net()
    before = state_of(net)
    result = fit(net, thaw_at("never"), stage="train")
    assert moved(before, state_of(net)) == HEAD_STATE
    assert [span.parameters for span in result.trained] == [("linear.weight", "linear.bias")]


def test_result_says_what_trained_when():
    result = fit(tiny_net(), thaw_at(1), stage="train")
    first, second = result.trained
    assert (first.first_epoch, first.last_epoch, set(first.parameters)) == (0, 0, HEAD_STATE)
    assert (second.first_epoch, second.last_epoch) == (1, 2)
    assert second.parameters == tuple(name for name, _ in tiny_net().named_parameters())


def test_parameters_are_as_free_after_training_as_before():
    net = tiny_net()
    net.conv1.requires_grad_(False)
    before = net.conv1.weight.clone()
    fit(net, thaw_at("never", modules=("layer1",)), stage="train")
    free = {name: p.requires_grad for name, p in net.named_parameters()}
    assert [name for name, grad in free.items() if not grad] == ["conv1.weight"]
    assert torch.equal(net.conv1.weight, before)


@pytest.mark.parametrize(
    ("pattern", "members"),
    [
        ("layer1", {"layer1.0", "layer1.1"}),
        ("layer1.*", {"layer1.0", "layer1.1"}),
        ("*bn*", {"bn1"}),
        ("conv?", {"conv1"}),
        ("l*", {"layer1.0", "layer1.1", "linear"}),
    ],
)
def test_pattern_names_modules_and_all_inside(pattern, members):
    groups = match_groups(tiny_net(), [GroupSection(modules=(pattern,), lr_factor=0.5)])
    assert groups.members.keys() == members


def test_first_pattern_that_fits_counts():
    sections = [
        GroupSection(modules=("layer1.1",), thaw_epoch=2),
        GroupSection(modules=("layer1",), lr_factor=0.5),
    ]
    groups = match_groups(tiny_net(), sections)
    assert groups.members == {"layer1.1": 0, "layer1.0": 1}
    assert groups.lr_factor("layer1.0.weight") == 0.5
    assert groups.lr_factor("linear.weight") == 1.0
    assert groups.frozen_modules(1) == {"layer1.1"}
    assert groups.frozen_modules(2) == frozenset()


def test_pattern_without_a_module_is_refused_with_near_names():
    section = GroupSection(modules=("bn1", "layr1.*"))
    message = r"train\.groups\[0\]\.modules: .*got 'layr1\.\*'; the nearest names are layer1"
    with pytest.raises(ModelError, match=message):
        fit(tiny_net(), tiny_training(plan=tiny_plan(groups=(section,))), stage="train")


def test_a_plan_in_which_nothing_learns_is_refused():
    with pytest.raises(ModelError, match="expected some parameters to learn in epoch 0"):
        fit(tiny_net(), thaw_at(1, modules=("*",)), stage="train")


def test_frozen_dropout_still_drops_and_frozen_statistics_do_not_move():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    set_mode(net, True, frozenset({"0", "1"}))
    assert not net[0].training
    assert net[1].training
    set_mode(net, False, frozenset())
    assert not net[1].training


def test_group_learns_at_its_own_rate():
    """Without momentum the first step is proportional to the rate."""

    def first_step(factor):
        plan = tiny_plan(
            epochs=1,
            average=None,
            batch_size=41,
            optimizer={"name": "sgd", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0},
            groups=(GroupSection(modules=("linear",), lr_factor=factor),),
        )
        net = tiny_net()
        before = state_of(net)
        fit(net, tiny_training(plan=plan), stage="train")
        return {name: net.state_dict()[name] - before[name] for name in ("linear.bias", "bn1.bias")}

    full, half = first_step(1.0), first_step(0.5)
    torch.testing.assert_close(half["linear.bias"], full["linear.bias"] / 2)
    torch.testing.assert_close(half["bn1.bias"], full["bn1.bias"])
