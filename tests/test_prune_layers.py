"""Every family of layers: pruned rightly, rebuilt bit for bit, and a planted mistake is refused."""

import math

import pytest
import torch
from tiny_layers import (
    FAMILIES,
    Between,
    Does,
    GroupedQueries,
    Shuffle,
    TiedAttention,
    TorchAttention,
    Vision,
    WrittenAttention,
)
from torch import nn
from torch.nn import functional

from deploykit.models.attention import HeadAttention
from deploykit.prune import layer_rules, moves, prune_channels, rules
from deploykit.prune.trace import plain
from deploykit.prune.trial import Twin
from deploykit.widths import changed_widths, read_widths, set_widths

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make(build):
    torch.manual_seed(0)
    return build()


def prune(module, example=IMAGE, **options):
    return prune_channels(module, example, channel_ratio=0.5, scope="uniform", **options)


def answers(module, *inputs):
    with torch.no_grad():
        return module.eval()(*inputs)


def unequal(x):
    return torch.cat(x.split([4, 12], 1)[::-1], 1)


def rebuilt(build, module, pruned):
    """Return the pruned module as another process would make it."""
    fresh = build()
    set_widths(fresh, changed_widths(read_widths(module), read_widths(pruned)))
    fresh.load_state_dict(pruned.state_dict())
    return fresh


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_pruned_and_rebuilt_bit_equal(family):
    build, widths = FAMILIES[family]
    module = make(build)
    pruned, notes = prune(module)
    assert {name: notes.widths[name][1] for name in widths if name in notes.widths} == widths
    assert torch.equal(answers(rebuilt(build, module, pruned), IMAGE), answers(pruned, IMAGE))


@pytest.mark.parametrize(
    ("build", "whole", "narrowed"),
    [
        (lambda: Vision(TiedAttention), "attention.qkv", "up"),
        (lambda: Between(*(Shuffle() for _ in range(4))), "first", "between.0.branch.0"),
        (lambda: Between(Does(unequal)), "first", "last"),
        (lambda: Between(Does(lambda x: x.flip(1))), "first", "last"),
        (lambda: Between(Does(lambda x: x + torch.ones(16, 1, 1))), "first", "last"),
        (lambda: Between(Does(lambda x: x.cumsum(1))), "first", "last"),
        (lambda: Vision(GroupedQueries), "attention.qkv", "up"),
    ],
)
def test_what_cannot_be_pruned_is_named_and_the_rest_goes_on(build, whole, narrowed):
    module = make(build)
    pruned, notes = prune(module)
    assert any(whole in label.split(", ") for label in notes.left_alone)
    assert all(notes.left_alone.values())
    assert (
        pruned.get_submodule(whole).weight.shape[0] == module.get_submodule(whole).weight.shape[0]
    )
    assert narrowed in notes.widths


def test_what_an_unknown_operator_does_is_named():
    _, notes = prune(make(lambda: Between(Does(lambda x: x.flip(1)))))
    assert notes.left_alone["first"] == "between.0: no pruning through the operator flip"


def test_layer_that_the_example_does_not_reach_is_left_alone():
    module = make(lambda: Between())
    module.spare = nn.Linear(16, 16)
    pruned, notes = prune(module)
    assert notes.left_alone["spare"] == "the example does not reach it"
    assert pruned.spare.out_features == 16


def test_layer_with_a_computed_weight_is_named():
    norm = nn.utils.parametrizations.weight_norm
    _, notes = prune(make(lambda: Between(norm(nn.Conv2d(16, 16, 3)), nn.Conv2d(16, 16, 1))))
    assert notes.left_alone["between.0"] == "its weight is computed from others"
    assert notes.widths == {"between.1": (16, 8), "last": (8, 4)}


def test_layers_of_one_weight_are_not_taken_for_computed_ones():
    module = make(lambda: Between(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)))
    module.between[1].weight = module.between[0].weight
    pruned, notes = prune(module)
    assert "between.1" not in notes.left_alone
    assert pruned.between[1].weight is pruned.between[0].weight
    assert pruned.between[0].out_channels == pruned.between[1].out_channels == 8


@pytest.mark.parametrize(
    "first",
    [
        lambda x: functional.layer_norm(x, x.shape[-1:]),
        lambda x: functional.group_norm(x, 1),
    ],
)
def test_norm_of_what_no_layer_made_is_in_nobodys_way(first):
    build = lambda: nn.Sequential(Does(first), Between(nn.GroupNorm(4, 16)))  # noqa: E731
    _, notes = prune(make(build))
    assert notes.widths["1.first"] == (16, 8)


class OwnNorm(nn.Module):
    """A LayerNorm as models write it themselves."""

    def __init__(self, features):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.rand(features)),
            nn.Parameter(torch.rand(features)),
        )
        self.normalized_shape = (features,)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, self.normalized_shape, self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


def test_norm_of_the_models_own_is_rebuilt():
    build = lambda: Between(OwnNorm(16))  # noqa: E731
    module = make(build)
    pruned, _ = prune(module)
    assert pruned.between[0].normalized_shape == (8,)
    assert torch.equal(answers(rebuilt(build, module, pruned), IMAGE), answers(pruned, IMAGE))


# attention


def test_whole_heads_go_where_the_model_lets_them():
    pruned, _ = prune(make(lambda: Vision(TorchAttention)))
    attention = pruned.attention.inner
    assert isinstance(attention, HeadAttention)
    assert (attention.num_heads, attention.head_dim) == (2, 4)
    assert (attention.in_proj.in_features, attention.out_proj.in_features) == (8, 8)
    pruned, _ = prune(make(lambda: Vision(WrittenAttention)))
    attention = pruned.attention
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 4, 8)
    assert attention.table.shape == (9, 2)
    assert pruned.features == 8


def test_model_equals_the_one_with_those_heads_at_zero():
    module = make(lambda: Vision(WrittenAttention))
    pruned, _ = prune(module, protect=["patch", "up", "head", "down"])
    rows = module.attention.qkv.weight[:16]
    kept = [
        next(i for i in range(16) if torch.equal(rows[i], row))
        for row in pruned.attention.qkv.weight[:8]
    ]
    gone = torch.tensor([i for i in range(16) if i not in kept])
    assert sorted({i // 4 for i in gone.tolist()}) == sorted(set(range(4)) - {i // 4 for i in kept})
    with torch.no_grad():
        module.attention.proj.weight[:, gone] = 0
    assert torch.allclose(answers(pruned, IMAGE), answers(module, IMAGE), atol=1e-6)


def test_features_of_heads_go_where_heads_cannot():
    class OneHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
            return self.proj(x.transpose(1, 2).flatten(2))

    module = make(lambda: Vision(OneHead))
    pruned, _ = prune(module)
    assert pruned.attention.qkv.out_features == 24
    kept = pruned.attention.qkv.bias[:2]
    assert torch.isin(kept, module.attention.qkv.bias[:4]).all()


def test_protected_attention_keeps_what_it_reads():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.memory = nn.Linear(8, 16), nn.Linear(8, 16)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            query, memory = self.query(x), self.memory(x)
            return self.head(self.attention(query, memory, memory, need_weights=False)[0])

    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    pruned, _ = prune(make(Cross), tokens, protect=["attention"])
    assert pruned.memory.out_features == pruned.query.out_features == 16
    pruned, _ = prune(make(Cross), tokens)
    assert pruned.memory.out_features == pruned.query.out_features == 8


def test_taylor_keeps_the_heads_that_the_loss_depends_on():
    module = make(lambda: Vision(TorchAttention))
    gradients = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    gradients["attention.inner.in_proj_weight"].view(3, 4, 4, 16)[:, [1, 3]] = 1.0
    pruned, _ = prune(module, importance="taylor", gradients=gradients, protect=["patch", "up"])
    rows = [16 * part + 4 * head + i for part in range(3) for head in (1, 3) for i in range(4)]
    before = module.attention.inner.in_proj_weight
    assert torch.equal(pruned.attention.inner.in_proj.weight, before[rows])


def test_attention_that_keeps_its_heads_stays_torchs_own():
    pruned, notes = prune(make(lambda: Vision(TorchAttention)), protect=["attention", "patch"])
    assert type(pruned.attention.inner) is nn.MultiheadAttention
    assert "up" in notes.widths


# several inputs and outputs


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 16)
        self.image = nn.Conv2d(3, 16, 3)
        self.joint = nn.Linear(32, 12)
        self.first, self.second = nn.Linear(12, 4), nn.Linear(12, 2)

    def forward(self, image, words):
        image = self.image(image).mean((2, 3))
        joint = self.joint(torch.cat([image, self.words(words).mean(1)], 1)).relu()
        return {"first": self.first(joint), "rest": (self.second(joint), [joint.sum(1)])}


def test_model_of_several_inputs_and_outputs_is_pruned():
    module, inputs = make(Several), (IMAGE, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    pruned, notes = prune(module, inputs)
    assert notes.widths == {"image": (16, 8), "joint": (12, 6)}
    assert set(notes.left_alone) == {"first", "second"}
    again = rebuilt(Several, module, pruned)
    expected, got = (answers(net, *inputs) for net in (pruned, again))
    assert torch.equal(expected["first"], got["first"])
    assert torch.equal(expected["rest"][1][0], got["rest"][1][0])


def test_tensors_that_layers_share_are_pruned_once():
    class Shared(Between):
        def __init__(self):
            super().__init__(nn.Conv2d(16, 16, 1))
            self.twin = nn.Conv2d(16, 16, 1)
            self.twin.weight = self.between[0].weight

        def forward(self, x):
            x = self.first(x)
            return self.head(self.last(self.between(x) + self.twin(x)).mean((2, 3)))

    pruned, _ = prune(make(Shared))
    assert pruned.twin.weight is pruned.between[0].weight
    assert pruned.twin.weight.shape[:2] == (8, 8)
    assert (pruned.twin.in_channels, pruned.twin.out_channels) == (8, 8)


def test_buffer_that_is_not_saved_keeps_its_channels():
    def build():
        module = Between(Does(lambda x: x))
        module.register_buffer("scale", torch.rand(16, 1, 1), persistent=False)
        module.between[0].function = lambda x: x * module.scale
        return module

    _, notes = prune(make(build))
    assert "first" in notes.left_alone


# negative controls: a mistake in the rules is planted, the trial has to find it


def believe(trace, arguments, result):
    """Say that every channel stays where it is, as far as shapes allow."""
    source = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
    trace.assign(result, [axis[: len(axis)] for axis in trace.axes(source)])


def backwards(trace, arguments, result):
    """Say that tensors are joined in the opposite order."""
    moves.join(trace, {**arguments, "tensors": arguments["tensors"][::-1]}, result)


def unequal_groups(trace, arguments, result):
    """Forget that groups must stay equal."""
    x, w = trace.axes(arguments["input"]), trace.axes(arguments["weight"])
    trace.tie(x[1].reshape(arguments["groups"], -1), w[1])
    trace.assign(result, [x[0], w[0], *map(plain, result.shape[2:])])


def loose_heads(trace, arguments, result):
    """Forget that query, key and value lose the same heads."""
    (*query, tokens, _), value = trace.axes(arguments["query"]), trace.axes(arguments["value"])
    trace.assign(result[0], [*query, tokens, value[-1]])


def unscaled(trace, arguments, result):
    """Forget that attention divides by the number of features."""
    layer_rules.attention(trace, {**arguments, "scale": 1.0}, result)


def shifted_norm(trace, arguments, result):
    """Pair a normalization's weights with the channels before them."""
    axes = list(trace.axes(arguments["input"]))
    for name in ("weight", "bias"):
        trace.tie(axes[-1], trace.axes(arguments[name])[0].take(range(-1, len(axes[-1]) - 1)))
    trace.normalized.append((axes[-1],))
    layer_rules.counted(trace, "normalized_shape", (axes[-1],))
    trace.assign(result[0], axes)


def apart(trace, arguments, result):
    """Forget that the pieces of a split stay equal."""
    axes, size = list(trace.axes(arguments["self"])), result[0].shape[1]
    for place, piece in enumerate(result):
        trace.assign(piece, [axes[0], axes[1][place * size :][:size], *axes[2:]])


PLANTED = {
    "flip": (lambda: Between(Does(lambda x: x.flip(1))), believe, "first"),
    "roll": (lambda: Between(Does(lambda x: x.roll(3, 1))), believe, "first"),
    "_softmax": (lambda: Between(Does(lambda x: x.softmax(1))), believe, "first"),
    "mean": (lambda: Between(Does(lambda x: x - x.mean(1, keepdim=True))), rules.total, "first"),
    "cat": (
        lambda: Between(Does(lambda x: torch.cat([x, x[:, :4]], 1)), readers=20),
        backwards,
        "first",
    ),
    "convolution": (lambda: Between(nn.Conv2d(16, 16, 1, groups=2)), unequal_groups, "first"),
    "native_layer_norm": (FAMILIES["layer norm over channels"][0], shifted_norm, "first"),
    "split": (FAMILIES["chunk"][0], apart, "first"),
    "_scaled_dot_product_flash_attention_for_cpu": (
        lambda: Vision(lambda: HeadsOf(WrittenAttention())),
        unscaled,
        "attention.inner.qkv",
    ),
}


class HeadsOf(nn.Module):
    """Attention whose heads cannot go, only the features in them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        inner.table = nn.Parameter(torch.randn(9, 1))

    def forward(self, x):
        n, tokens, _ = x.shape
        qkv = self.inner.qkv(x).reshape(n, tokens, 3, 4, -1).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.inner.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("large", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("operator", PLANTED)
def test_trial_refuses_a_removal_that_a_wrong_rule_asks_for(operator, large, monkeypatch):
    build, wrong, root = PLANTED[operator]
    monkeypatch.setitem(rules.RULES, operator, wrong)
    if large:
        monkeypatch.setattr("deploykit.prune.trial.LARGE", 0)
    module = make(build)
    pruned, notes = prune(module)
    reason = next(why for label, why in notes.left_alone.items() if root in label.split(", "))
    assert "does not equal setting them to zero" in reason or "does not run" in reason
    before, after = (len(net.get_submodule(root).weight) for net in (module, pruned))
    assert before == after


def test_trial_refuses_a_norm_that_counts_channels_that_are_gone(monkeypatch):
    """The other way round: with plain statistics as reference, no true removal would pass."""
    monkeypatch.setattr("deploykit.prune.trial._Norms", lambda kept: torch.no_grad())
    _, notes = prune(make(FAMILIES["layer norm over channels"][0]))
    assert notes.left_alone["first"] == "removing its channels does not equal setting them to zero"


def test_twin_refuses_channels_that_cannot_go_alone():
    module = make(FAMILIES["grouped"][0])
    assert "cannot go without others" in Twin(module, (IMAGE,)).fault({"between.0": [0]})
    assert Twin(module, (IMAGE,)).fault({"between.0": [0, 8, 16, 24]}) == ""


def test_one_faulty_group_among_many_is_found(monkeypatch):
    layers = [nn.Conv2d(16, 16, 1) for _ in range(6)]
    layers.insert(3, Does(lambda x: x.flip(1)))
    monkeypatch.setitem(rules.RULES, "flip", believe)
    _, notes = prune(make(lambda: Between(*layers)))
    assert set(notes.left_alone) == {"between.2", "head"}
    assert len(notes.widths) == 7


def test_scores_of_a_head_are_those_of_all_its_channels():
    module = make(lambda: Vision(WrittenAttention))
    with torch.no_grad():
        for part in range(3):
            module.attention.qkv.weight[part * 16 + 4 : part * 16 + 12] *= 100
    pruned, _ = prune(module, protect=["patch", "up"])
    rows = [*range(4, 12), *range(20, 28), *range(36, 44)]
    assert torch.equal(pruned.attention.qkv.weight, module.attention.qkv.weight[rows])
    assert math.prod(pruned.attention.table.shape) == 18


def tied():
    module = Between(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
    module.between[2].weight = module.between[0].weight
    return module


def test_layers_of_one_weight_share_it_when_they_are_rebuilt():
    module = make(tied)
    pruned, notes = prune(module)
    assert "between.0" in notes.widths
    between = rebuilt(tied, module, pruned).between
    assert between[0].weight is between[2].weight


class Gain(nn.Conv2d):
    """A layer of torch's with a parameter of its own."""

    def __init__(self):
        super().__init__(16, 24, 3)
        self.gain = nn.Parameter(torch.rand(24, 1, 1) + 0.5)

    def forward(self, x):
        return super().forward(x) * self.gain


def test_layer_of_torchs_with_a_parameter_of_its_own_is_rebuilt_bit_equal():
    def build():
        return Between(Gain(), readers=24)

    module = make(build)
    pruned, notes = prune(module)
    assert notes.widths["between.0"] == (24, 12)
    assert torch.equal(answers(rebuilt(build, module, pruned), IMAGE), answers(pruned, IMAGE))


def test_module_that_asks_attention_for_its_features_is_pruned():
    class Scaled(TorchAttention):
        def forward(self, x):
            return super().forward(x * self.inner.embed_dim**0.5)

    _, notes = prune(make(lambda: Vision(Scaled)))
    assert "up" in notes.widths
