"""Channels of zeros round depthwise layers up, and the model answers as before."""

from dataclasses import replace

import pytest
import torch
from tiny_layers import Between
from torch import nn

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.errors import CompressionError
from deploykit.prune import align_widths
from deploykit.prune.align import Growth, grow_tensors
from deploykit.quantization.graphs import set_graph_mode, training_graph
from deploykit.structure import load_candidate, save_candidate
from deploykit.targets import TARGETS

SHAPE = (8, 8, 3)


def candidate_of(module, factory="net.py:build"):
    return Candidate(
        module.eval(),
        Signature(
            (TensorSpec("image", "uint8", (-1, *SHAPE)),),
            (TensorSpec("logits", "float32", (-1, 5)),),
            tuple("abcde"),
            {"mean": [0.5], "std": [0.5], "channels": 3},
        ),
        {
            "model": {"name": factory, "arguments": {}},
            "classes": 5,
            "sample_shape": list(SHAPE),
        },
        "train",
    )


def depthwise(channels, *rest):
    return [
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.BatchNorm2d(channels),
        *rest,
    ]


def settled(module):
    """Give BatchNorms statistics that are not those of a fresh one."""
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(8, 3, 8, 8) + 1)
    return module


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Joined(nn.Module):
    """The depthwise channels stand in the middle of what the head reads."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 12, 3)
        self.deep, self.three = nn.Conv2d(12, 12, 1, groups=12), nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(21, 5)

    def forward(self, x):
        parts = [self.one(x), torch.relu(self.deep(self.two(x))), self.three(x)]
        return self.head(torch.cat(parts, 1).mean((2, 3)))


class Counting(nn.Module):
    """Its own code counts on the width."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1, groups=12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.deep(self.conv(x)).mean((2, 3)).reshape(len(x), 12))


class Asserting(Between):
    """Its own code insists on the width."""

    def forward(self, x):
        assert self.first(x).shape[1] == 12
        return super().forward(x)


@pytest.mark.parametrize(
    "layers",
    [
        depthwise(12, nn.ReLU()),
        depthwise(12, nn.Hardswish()),
        depthwise(12, nn.Sigmoid()),
        depthwise(12, nn.PReLU(12)),
        depthwise(12, Gate()),
        [*depthwise(12), *depthwise(12, nn.SiLU())],
    ],
)
def test_wider_model_answers_as_before(layers):
    torch.manual_seed(0)
    candidate = candidate_of(settled(Between(*layers, width=12, readers=12)))
    wider = align_widths(candidate, 16)
    assert wider.module.first.out_channels == wider.module.last.in_channels == 16
    assert wider.module.between[0].groups == 16
    assert candidate.module.first.out_channels == 12, "the candidate stays as it was"
    with torch.no_grad():
        expected, found = candidate.module(images()), wider.module(images())
    assert torch.allclose(found, expected, atol=1e-6)
    assert wider.structure["widths"]["between.0"]["groups"] == 16


def test_channels_in_the_middle_of_a_join_grow_there():
    torch.manual_seed(0)
    candidate = candidate_of(Joined())
    wider = align_widths(candidate, 8)
    assert wider.module.head.in_features == 4 + 16 + 5
    assert not wider.module.head.weight[:, 16:20].any()
    with torch.no_grad():
        assert torch.allclose(wider.module(images()), candidate.module(images()), atol=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        Between(nn.ReLU(), width=12, readers=12),
        Between(*depthwise(16), width=16, readers=16),
        Between(*depthwise(12), nn.GroupNorm(3, 12), width=12, readers=12),
        Between(*depthwise(12), nn.Softmax(1), width=12, readers=12),
        Counting(),
        Asserting(*depthwise(12), width=12, readers=12),
    ],
    ids=[
        "no depthwise layer",
        "full blocks",
        "normalized together",
        "softmax",
        "counted",
        "asserted",
    ],
)
def test_what_cannot_or_need_not_grow_stays(module):
    assert align_widths(candidate_of(module), 16) is None


def test_shared_values_are_not_joined_by_zero():
    candidate = candidate_of(Between(*depthwise(12), width=12, readers=12))
    assert align_widths(candidate, 16) is not None
    shared = {**candidate.structure, "clustered": ["first.weight"]}
    assert align_widths(replace(candidate, structure=shared), 16) is None


def test_zeros_that_are_read_tell(monkeypatch):
    """Negative control: growth that is not zero all through is seen and taken back."""
    import deploykit.prune.align as align

    def careless(module, growth: Growth):
        grow_tensors(module, growth)
        module.last.weight.data[:, -1] = 1
        module.between[1].bias.data[-1] = 1

    monkeypatch.setattr(align, "grow_tensors", careless)
    assert align_widths(candidate_of(Between(*depthwise(12), width=12, readers=12)), 16) is None


def test_what_cannot_be_traced_stays(monkeypatch):
    def refuse(*_):
        raise CompressionError("prune: the model cannot be traced")

    monkeypatch.setattr("deploykit.prune.align.Graph", refuse)
    assert align_widths(candidate_of(Between(*depthwise(12), width=12, readers=12)), 16) is None


def test_wider_candidate_is_rebuilt(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 12, 3), "
        "nn.Conv2d(12, 12, 3, groups=12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))"
    )
    module = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    wider = align_widths(candidate_of(module), 16)
    save_candidate(wider, tmp_path / "saved")
    loaded = load_candidate(tmp_path / "saved", base=tmp_path)
    assert loaded.module[1].groups == 16
    with torch.no_grad():
        assert torch.equal(loaded.module(images()), wider.module(images()))


def test_wider_model_trains_integers():
    torch.manual_seed(0)
    candidate = candidate_of(settled(Between(*depthwise(12, nn.ReLU()), width=12, readers=12)))
    wider = align_widths(candidate, 16)
    graph = training_graph(wider.module, images(), TARGETS["cpu-x86-vnni"], {})
    set_graph_mode(graph, True, frozenset())
    answer = graph(images())
    answer.square().sum().backward()
    assert answer.isfinite().all()
    assert all(one.grad.isfinite().all() for one in graph.parameters() if one.grad is not None)
