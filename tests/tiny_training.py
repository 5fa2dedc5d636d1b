"""A training small enough for unit tests: 8x8 images of three classes, a net of 250 weights."""

import signal
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from deploykit.progress import SilentProgress
from deploykit.recipe.sections import (
    AugmentSection,
    AverageSection,
    OptimizerSection,
    ScheduleSection,
    TrainSection,
)
from deploykit.train import Training

PREPROCESS = {
    "height": 8,
    "width": 8,
    "channels": 1,
    "filter": "bilinear",
    "antialias": True,
    "fit": "stretch",
    "mean": [0.5],
    "std": [0.5],
    "exif": True,
    "alpha": "white",
}


@dataclass(frozen=True)
class TinySplit:
    name: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def load(self, indices):
        return self.images[indices]


@dataclass(frozen=True)
class TinyDataset:
    train: TinySplit
    validation: TinySplit
    classes: tuple = ("left", "right", "bottom")
    preprocess: dict | None = field(default_factory=lambda: dict(PREPROCESS))


def tiny_split(name, count, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    images = random.integers(0, 120, (count, 8, 8, 1))
    images[labels == 0, :, :4] += 100
    images[labels == 1, :, 4:] += 100
    images[labels == 2, 4:, :] += 100
    return TinySplit(name, images.astype(np.uint8), labels.astype(np.int64))


def tiny_dataset(count=41, **kwargs):
    """41 samples leave a rest of one where batches have 8."""
    return TinyDataset(tiny_split("train", count, 1), tiny_split("validation", 30, 2), **kwargs)


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.nn.functional.avg_pool2d(self.layer1(x), 4)
        return self.linear(self.dropout(x.flatten(1)))


def tiny_net(seed=0):
    torch.manual_seed(seed)
    return TinyNet()


def tiny_plan(**changes):
    """Everything that has state: momentum, EMA, warm-up, groups are up to the test."""
    values = {
        "epochs": 3,
        "batch_size": 8,
        "optimizer": OptimizerSection(name="sgd", lr=0.05),
        "schedule": ScheduleSection(name="cosine", warmup=0.2),
        "average": AverageSection(name="ema", decay=0.9),
        "keep": "last",
    }
    return TrainSection(**{**values, **changes})


def tiny_training(checkpoints=None, *, count=41, **changes):
    values = {
        "dataset": tiny_dataset(count),
        "plan": tiny_plan(),
        "augment": (AugmentSection(name="flip"),),
        "seed": 3,
        "checkpoints": checkpoints,
        "device": "cpu",
    }
    return Training(**{**values, **changes})


class SignalAfter(SilentProgress):
    """Sends this process a signal after so many steps, or after so many epochs."""

    def __init__(self, *, steps=None, epochs=None):
        self.steps, self.epochs = steps, epochs

    def step_done(self, epoch, loss, accuracy):
        if self.steps is not None:
            self.steps -= 1
            if self.steps == 0:
                signal.raise_signal(signal.SIGTERM)

    def epoch_done(self, epoch, **values):
        if self.epochs == epoch + 1:
            signal.raise_signal(signal.SIGTERM)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
