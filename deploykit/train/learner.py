"""What a training moves: weights, the optimizer's state, their mean, on one device."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from deploykit.errors import RecipeError
from deploykit.held_weights import Projection
from deploykit.models.weights import load_tensors
from deploykit.recipe.sections import TrainSection
from deploykit.train.average import WeightAverage
from deploykit.train.freeze import Groups
from deploykit.train.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_rate,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS: Mapping[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}


class Learner:
    """A module under training on a `Fabric` (device and precision).

    Args:
        module: trained in place, moved to the fabric's device.
        plan: optimizer, precision, clipping, average.
        groups: which parameters learn when, and at what share of the rate.
        fabric: see `open_fabric`.
        epoch_steps: optimizer steps of an epoch.
        layout: memory layout that inputs are handed over in, see `fastest_layout`.
        hold: projections of parameters that must not move freely.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: TrainSection,
        groups: Groups,
        *,
        fabric: Fabric,
        epoch_steps: int,
        layout: torch.memory_format = torch.contiguous_format,
        hold: Mapping[str, Projection] | None = None,
    ) -> None:
        self.module = module.to(fabric.device)
        self._hold = hold or {}
        self._fabric, self._groups, self._clip = fabric, groups, plan.gradient_clip
        self._layout = layout
        # Fused kernels unscale 16-bit gradients themselves: too late to clip them.
        fused = plan.precision != "16"
        self._optimizer = build_optimizer(module, plan.optimizer, groups, fused=fused)
        self._model, self._stepper = fabric.setup(module, self._optimizer)
        self.average = (
            WeightAverage(module, plan.average, epochs=plan.epochs, epoch_steps=epoch_steps)
            if plan.average
            else None
        )

    def thaw(self, epoch: int) -> None:
        """Let those parameters learn whose turn it is."""
        learning = set(self._groups.trained(self.module, epoch))
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in learning)
            parameter.grad = None

    def release(self, device: torch.device) -> None:
        """Give the module back as it came: on its device, its parameters as free as before."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name not in self._groups.held)
            parameter.grad = None
        self.module.to(device)

    def forward(self, inputs: Tensor) -> Any:
        """Return the module's outputs, computed in the plan's precision."""
        return self._model(inputs.contiguous(memory_format=self._layout))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        self._fabric.backward(loss)

    def update(self, step: int, lr: float) -> None:
        """Move the weights by the gradients added since the last update.

        Args:
            step: optimizer step of the stage, from 0.
            lr: learning rate, before the groups' factors.
        """
        set_rate(self._optimizer, lr)
        # A graph lacks what its module never reads.
        held = {name: one for name, one in self.module.named_parameters() if name in self._hold}
        for name, parameter in held.items():
            if parameter.grad is not None:
                parameter.grad.copy_(self._hold[name](parameter.grad))
        if self._clip is not None:
            self._fabric.clip_gradients(
                self._model, self._stepper, max_norm=self._clip, error_if_nonfinite=False
            )
        self._stepper.step()
        self._stepper.zero_grad()
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.copy_(self._hold[name](parameter))
        if self.average is not None:
            self.average.after_step(step)

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of weights and buffers."""
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def first_not_finite(self) -> str | None:
        """Return the name of a parameter that holds NaN or infinity."""
        for name, parameter in self.module.named_parameters():
            if not bool(parameter.isfinite().all()):
                return name
        return None

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return all that a resumed training needs, by kind and name."""
        return {
            "weights": self.module.state_dict(),
            "optimizer": optimizer_tensors(self._optimizer, self.module),
            "average": {} if self.average is None else self.average.tensors(),
        }

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `tensors` gave."""
        load_tensors(self.module, tensors["weights"])
        load_optimizer_tensors(self._optimizer, self.module, tensors["optimizer"])
        if self.average is not None:
            self.average.load(tensors["average"])

    def scaler(self) -> dict[str, Any]:
        """Return the state of 16-bit loss scaling as JSON; empty where there is none."""
        state: dict[str, Any] = self._fabric.strategy.precision.state_dict()
        return state

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Put back what `scaler` gave."""
        self._fabric.strategy.precision.load_state_dict(state)


@torch.no_grad()
def fastest_layout(module: nn.Module, inputs: Tensor) -> torch.memory_format:
    """Return the memory layout of images in which the module trains fastest.

    Convolutions run faster with the channels innermost: it takes a fifth off a step of
    ResNet-20 on a CPU. Not every module takes that (a ``view`` of such a tensor fails), so it
    is tried on a copy.

    Args:
        module: left as it is.
        inputs: a batch of what it takes, on its device.
    """
    if inputs.ndim != 4:
        return torch.contiguous_format
    devices = [inputs.device] if inputs.is_cuda else []
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copying an exported graph warns of torch's own ways
            copy.deepcopy(module)(inputs.contiguous(memory_format=torch.channels_last))
    except Exception:  # noqa: BLE001 - a user's module may fail in any way
        return torch.contiguous_format
    return torch.channels_last


def open_fabric(device: str, precision: str) -> Fabric:
    """Choose device and precision.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``32``, ``bf16`` or ``16``.

    Raises:
        RecipeError: 16 bits without a GPU.
    """
    # Importing it takes over a second, most of it torch's compiler.
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if precision == "16" and not on_gpu:
        raise RecipeError(
            ["train.precision: expected 32 or bf16 where there is no GPU, got 16; change it"]
        )
    accelerator = "cuda" if on_gpu else "cpu"
    return Fabric(accelerator=accelerator, devices=1, precision=PRECISIONS[precision])
