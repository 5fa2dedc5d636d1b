"""Equal steps give equal bits, whatever ran before in the process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels and leave the caller's random state as it was.

    On a GPU an operator without such a kernel runs all the same: there the promise of
    equal bits is not made.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng([device] if on_gpu else []), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=lenient)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def seed_device(device: torch.device, seed: int) -> None:
    """Seed what dropout draws from.

    `torch.manual_seed` would do, but costs 0.2 ms a call where GPUs are not initialized.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
