"""A step of quantization-aware training against a float step: `make bench-qat_step`.

ResNet-20 at batch 128, forward, backward and SGD; the two take turns, so that a machine that
slows down slows both. `--profile` says where the time of each goes instead.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from example import CLASSES, resnet20_candidate
from table import Figure, publish
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from deploykit.quantization.deployable import exact_inputs
from deploykit.quantization.graphs import freeze_statistics, set_graph_mode, training_graph
from deploykit.statistics import median_ratio_interval
from deploykit.structure import example_input
from deploykit.targets import resolve_target
from deploykit.train.freeze import set_mode
from deploykit.train.learner import fastest_layout


def make_step(module: nn.Module, batch: int) -> Callable[[], None]:
    """Return a function that does one training step, laid out and updated as `fit` does it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 3, 32, 32, generator=generator)
    inputs = inputs.contiguous(memory_format=fastest_layout(module, inputs))
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True
    )

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(module(inputs), labels))
        optimizer.step()

    return step


def make_steps(batch: int) -> dict[str, Callable[[], None]]:
    """Return the steps to compare: float, and quantized before and after the freeze."""
    candidate, target = resnet20_candidate(), resolve_target("cpu")
    set_mode(candidate.module, training=True)
    example, exact = example_input(candidate, batch=2), exact_inputs(candidate, target)
    graphs = [training_graph(candidate.module, example, target, exact) for _ in range(2)]
    for graph in graphs:
        set_graph_mode(graph, True, frozenset())
    steps = {
        "float": make_step(copy.deepcopy(candidate.module), batch),
        "qat": make_step(graphs[0], batch),
        "frozen": make_step(graphs[1], batch),
    }
    steps["frozen"]()  # ranges are learned before they stand still
    freeze_statistics(graphs[1])
    return steps


def seconds_of(step: Callable[[], None]) -> float:
    """Time one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def show_profile(steps: dict[str, Callable[[], None]]) -> None:
    """Print where the time of a step goes, by operator."""
    for name, step in steps.items():
        step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
        rows = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        sys.stdout.write(f"{name}\n{rows}\n")


def main() -> int:
    """Compare the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", action="store_true", help="few, small steps; keeps no table")
    parser.add_argument("--profile", action="store_true", help="print the operators' times")
    options = parser.parse_args()
    batch, rounds = (16, 6) if options.trial else (128, 30)
    steps = make_steps(batch)
    if options.profile:
        show_profile(steps)
        return 0
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            seconds = seconds_of(step)
            if turn >= 2:  # the first ones allocate
                times[name].append(seconds)
    figures = [
        Figure(f"{name} step, median", 1000 * statistics.median(found), "{:.0f} ms")
        for name, found in times.items()
    ]
    details = []
    for name, what in (("qat", "QAT step"), ("frozen", "QAT step, statistics frozen")):
        ratio, (low, high) = median_ratio_interval(
            torch.tensor(times[name]).numpy(), torch.tensor(times["float"]).numpy()
        )
        figures.append(Figure(f"{what} / float step", ratio, "{:.2f}x", at_most=2))
        details.append(f"{what} / float step, 95% interval: {low:.2f} to {high:.2f}.")
    return publish(
        "qat_step",
        figures,
        about=f"One training step of ResNet-20 at batch {batch} (forward, backward, SGD), "
        f"{torch.get_num_threads()} torch thread(s), medians of {rounds} interleaved rounds.",
        command="make bench-qat_step",
        details=details,
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
