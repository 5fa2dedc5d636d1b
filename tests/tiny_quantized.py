"""Nets for 12x12 colour images of five classes, and candidates made of them."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.runtime import detect_cpu
from deploykit.targets import TARGETS

TARGET = TARGETS[detect_cpu()]  # whose integers the tests run here
SIDE, CHANNELS, CLASSES = 12, 3, 5
PREPROCESS = {
    "height": SIDE,
    "width": SIDE,
    "channels": CHANNELS,
    "filter": "bilinear",
    "antialias": True,
    "fit": "stretch",
    "mean": [0.5],
    "std": [0.25],
    "exif": True,
    "alpha": "white",
}
EXAMPLE = torch.zeros(2, CHANNELS, SIDE, SIDE)


class Net(nn.Module):
    """A net written in one expression: ``forward`` gets the net and its input."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def conv(before, after, size=3, **kwargs):
    return nn.Conv2d(before, after, size, padding=size // 2, **kwargs)


def pooled(x):
    return functional.adaptive_avg_pool2d(x, 1).flatten(1)


def plain():
    """Convolution, BatchNorm and ReLU twice, each with constants of its own."""
    return Net(
        lambda net, x: net.fc(
            pooled(functional.relu(net.n2(net.c2(functional.relu(net.n1(net.c1(x)))))))
        ),
        c1=conv(CHANNELS, 8, bias=False),
        n1=nn.BatchNorm2d(8, eps=0.1, momentum=0.3),
        c2=conv(8, 8),
        n2=nn.BatchNorm2d(8),
        fc=nn.Linear(8, CLASSES),
    )


def images(count=96, seed=0):
    """Images whose mean colours tell their class, uint8 (n, 12, 12, 3), and the classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    colours = np.random.default_rng(99).integers(20, 160, (CLASSES, 1, 1, CHANNELS))
    pixels = colours[labels] + random.integers(0, 90, (count, SIDE, SIDE, CHANNELS))
    return pixels.astype(np.uint8), labels


class Samples:
    """The part of a Split that verification reads."""

    name = "validation"

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def load(self, indices):
        return self.values[indices]


def settled(module, seed=0):
    """Seed a module's weights and let its statistics settle; in evaluation mode."""
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    module.train()
    with torch.no_grad():
        for _ in range(10):
            module(torch.randn(16, *EXAMPLE.shape[1:]))
        for name, parameter in module.named_parameters():
            if name.startswith("n"):  # scale and shift that differ from channel to channel
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def candidate_of(module, *, preprocess=PREPROCESS, model="none.py:none"):
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, SIDE, SIDE, CHANNELS)),),
        (TensorSpec("logits", "float32", (-1, CLASSES)),),
        tuple("abcde"),
        preprocess,
    )
    structure = {
        "model": {"name": model, "arguments": {}},
        "classes": CLASSES,
        "sample_shape": [SIDE, SIDE, CHANNELS],
    }
    return Candidate(module, signature, structure, "train")


def array_candidate(module, shape):
    """A candidate that takes float arrays ``(N, *shape)`` as they are."""
    signature = Signature(
        (TensorSpec("features", "float32", (-1, *shape)),),
        (TensorSpec("logits", "float32", (-1, CLASSES)),),
        tuple("abcde"),
    )
    structure = {
        "model": {"name": "none.py:none", "arguments": {}},
        "classes": CLASSES,
        "sample_shape": list(shape),
    }
    return Candidate(module, signature, structure, "train")


def noise_ratio(expected, answered):
    """Power of the error over that of the signal's deviation; 0 is perfect."""
    expected, answered = np.asarray(expected), np.asarray(answered)
    return float(((expected - answered) ** 2).mean() / expected.var())
