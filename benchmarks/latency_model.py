"""Predicted against measured latency of pruned models: `make bench-latency_model`.

Five architectures as they ship on this CPU, in integers and in floats: widths are drawn at random
in the kernels' multiples and blocks are left out at random; what comes of it is predicted from the
profile of the whole model and the table of layers, then built, exported and timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from table import Figure, publish
from torch import nn

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.latency_model import LatencyCost
from deploykit.measure.layer_times import LayerTimes
from deploykit.models.digits_cnn import digits_cnn
from deploykit.models.resnet_cifar import resnet_cifar
from deploykit.prune.bounded import carry_out
from deploykit.prune.landscape import Landscape, Rules, explore, widths_below
from deploykit.prune.search import Plan
from deploykit.structure import example_input
from deploykit.targets import resolve_target

CLASSES = 10


def plain_net(*, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Convolutions one after the other, as VGG has them."""
    layers: list[nn.Module] = []
    before = sample_shape[-1]
    for width, pool in ((64, False), (64, True), (128, False), (128, True), (256, False)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        before = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(*layers, *head)


class Inverted(nn.Module):
    """An inverted bottleneck with a depthwise convolution (https://arxiv.org/abs/1801.04381)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, width, H, W)`` to the same shape."""
        return x + self.layers(x)


def mobile_net(*, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Inverted bottlenecks at two sizes."""
    stem = [nn.Conv2d(sample_shape[-1], 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    first = [Inverted(32, 128) for _ in range(3)]
    down = [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    second = [Inverted(64, 256) for _ in range(4)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*stem, *first, *down, *second, *head)


@dataclass(frozen=True)
class Architecture:
    """A model to predict: how it is built, and the size of its images."""

    name: str
    build: Callable[..., nn.Module]
    side: int
    channels: int = 3


ARCHITECTURES = (
    Architecture("digits-cnn", digits_cnn, 8, 1),
    Architecture("resnet20", lambda **shape: resnet_cifar(depth=20, **shape), 32),
    Architecture("resnet56", lambda **shape: resnet_cifar(depth=56, **shape), 32),
    Architecture("plain", plain_net, 32),
    Architecture("mobile", mobile_net, 96),
)


@dataclass(frozen=True)
class Case:
    """One pruned model: predicted and measured latency at batch 1, ms."""

    architecture: str
    precision: str
    whole: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1

    def line(self) -> str:
        """Return the case as a row."""
        return (
            f"| {self.architecture} | {self.precision} | {self.whole:.3f} | {self.predicted:.3f} "
            f"| {self.measured:.3f} | {self.error:+.1%} |"
        )


def candidate_of(architecture: Architecture) -> Candidate:
    """Return the architecture with random weights."""
    torch.manual_seed(0)
    shape = (architecture.side, architecture.side, architecture.channels)
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, *shape)),),
        (TensorSpec("logits", "float32", (-1, CLASSES)),),
        preprocess={"mean": [0.5], "std": [0.25], "channels": shape[-1]},
    )
    module = architecture.build(sample_shape=shape, classes=CLASSES).eval()
    structure = {"model": {"name": architecture.name, "arguments": {}}, "sample_shape": list(shape)}
    return Candidate(module, signature, structure, stage="train")


def draw(landscape: Landscape, multiple: int, generator: np.random.Generator) -> Plan:
    """Draw a width for half of the groups, and some blocks to go."""
    removed = tuple(block for block in landscape.blocks if generator.random() < 0.25)
    channels = {}
    for root, group in landscape.groups.items():
        inside = any(root.startswith(f"{block}.") for block in removed)
        widths = widths_below(group, multiple)
        if widths and not inside and generator.random() < 0.5:
            channels[root] = int(generator.choice(widths))
    return Plan(channels, removed, 0.0, 0.0, holds=True)


def cases(architecture: Architecture, count: int, times: LayerTimes) -> Iterator[Case]:
    """Yield pruned models of an architecture, in both precisions."""
    candidate, target = candidate_of(architecture), resolve_target("cpu")
    example = example_input(candidate, batch=2)
    rules = Rules("l2", (), target.channel_multiple, depth=True)
    landscape = explore(candidate.module, example, rules)
    generator = np.random.default_rng(0)
    plans = [draw(landscape, target.channel_multiple, generator) for _ in range(count)]
    for precision in ("int8", "fp32"):
        cost = LatencyCost(candidate, target, precision, times=times)
        for plan in plans:
            module, _ = carry_out(candidate.module, example, plan, landscape, rules)
            predicted = cost.predict(landscape.narrowed(plan.channels), plan.removed)
            measured = cost.measure(module, plan.removed)
            case = Case(architecture.name, precision, cost.model.measured_ms, predicted, measured)
            sys.stdout.write(f"{case.line()}\n")
            sys.stdout.flush()
            yield case


def main() -> int:
    """Predict, build, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trial", action="store_true", help="one small model; keeps no table")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the table of layers")
    options = parser.parse_args()
    chosen = ARCHITECTURES[:1] if options.trial else ARCHITECTURES
    times = LayerTimes.open(options.cache, threads=1)
    found = [case for one in chosen for case in cases(one, 1 if options.trial else 5, times)]
    figures = [
        Figure(
            f"{one.name}: median error",
            statistics.median(abs(case.error) for case in found if case.architecture == one.name),
            "{:.1%}",
            at_most=0.1,
        )
        for one in chosen
    ]
    figures.append(Figure("largest error", max(abs(case.error) for case in found), "{:.1%}"))
    figures.append(Figure("layers measured", times.measured, "{:d}"))
    head = ["| model | precision | whole, ms | predicted, ms | measured, ms | error |"]
    return publish(
        "latency_model",
        figures,
        about="Latency at batch 1, one thread, of models pruned at random: predicted before they "
        "were built, and measured.",
        command="make bench-latency_model",
        details=[*head, "|---|---|---|---|---|---|", *(case.line() for case in found)],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
