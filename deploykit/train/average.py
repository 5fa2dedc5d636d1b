"""A running mean of the weights: EMA at every step, SWA at the end of the last epochs.

Running statistics are averaged with the weights. For SWA, whose mean lies far from each of
its members, they are then estimated anew: `Averaged Weights Lead to Wider Optima
<https://arxiv.org/abs/1803.05407>`_, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from deploykit.recipe.sections import AverageSection

STATISTICS = ("running_mean", "running_var")


class WeightAverage:
    """The mean of a module's weights over a stage.

    Args:
        module: what is trained; it stays the one that steps move.
        section: which mean.
        epochs: length of the stage.
        epoch_steps: optimizer steps of an epoch.
    """

    def __init__(
        self, module: nn.Module, section: AverageSection, *, epochs: int, epoch_steps: int
    ) -> None:
        self._section, self._epoch_steps = section, epoch_steps
        self._first_epoch = 0 if section.name == "ema" else math.floor(section.start * epochs)
        # Everything else (counters, ranges of observers) is not a quantity to average.
        live = {name: p.detach() for name, p in module.named_parameters()}
        live |= {n: b for n, b in module.named_buffers() if n.rpartition(".")[2] in STATISTICS}
        self._live = {name: value for name, value in live.items() if value.is_floating_point()}
        self._mean = {name: value.clone() for name, value in self._live.items()}

    def after_step(self, step: int) -> None:
        """Take in the weights after an optimizer step (of the stage, from 0)."""
        epoch, rest = divmod(step + 1, self._epoch_steps)
        if self._section.name == "ema":
            # Early on a long memory would hold mostly the starting weights.
            decay = min(self._section.decay, (1 + step) / (10 + step))
            self._take_in(get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
        elif rest == 0 and self.active(epoch - 1):
            blend = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
            self._take_in(blend, seen=epoch - 1 - self._first_epoch)

    def _take_in(self, blend: Callable[..., None], seen: int = 0) -> None:
        blend(list(self._mean.values()), list(self._live.values()), seen)

    def active(self, epoch: int) -> bool:
        """Tell whether the mean stands in for the weights at the end of an epoch."""
        return epoch >= self._first_epoch

    @property
    def needs_statistics(self) -> bool:
        """Whether running statistics have to be estimated for the mean."""
        return self._section.name == "swa" and any(
            name.rpartition(".")[2] in STATISTICS for name in self._mean
        )

    @torch.no_grad()
    def copy_into_module(self) -> None:
        """Put the mean in the place of the module's weights."""
        for name, value in self._live.items():
            value.copy_(self._mean[name])

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the mean by name."""
        return self._mean

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, value in self._mean.items():
            value.copy_(tensors[name])
