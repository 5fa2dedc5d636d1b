"""Optimizers, with weight decay where it belongs, and their state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.recipe.sections import OptimizerSection
from deploykit.train.freeze import Groups, owner


def build_optimizer(
    module: nn.Module, section: OptimizerSection, groups: Groups, *, fused: bool
) -> torch.optim.Optimizer:
    """Make the optimizer of a stage over all parameters, frozen ones included.

    A frozen parameter has no gradient and so neither moves nor decays; its state begins
    when it thaws. Every parameter group carries its share of the rate as ``lr_factor``.

    Args:
        module: what is trained.
        section: algorithm and its numbers.
        groups: factors of the learning rate.
        fused: use torch's fused kernels where it has them.
    """
    cells: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        decay = section.weight_decay if _decays(module, name, parameter) else 0.0
        cells.setdefault((groups.lr_factor(name), decay), []).append(parameter)
    parameters = [
        {"params": members, "lr_factor": factor, "weight_decay": decay, "lr": section.lr * factor}
        for (factor, decay), members in cells.items()
    ]
    return _create(parameters, section, fused)


def _create(
    parameters: list[dict[str, Any]], section: OptimizerSection, fused: bool
) -> torch.optim.Optimizer:
    lr, momentum = section.lr, section.momentum
    match section.name:
        case "sgd":
            nesterov = section.nesterov and momentum > 0
            optimizer = torch.optim.SGD(
                parameters, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused
            )
            return _with_momentum(optimizer) if momentum > 0 else optimizer
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, fused=fused)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum, foreach=True)


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Begin with momenta of zero, which changes no step.

    Left to itself torch makes them at the first gradient, and its fused kernel fails where
    a thawed parameter has none yet while others do.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Tell weights from norms and biases; by shape, since exported graphs keep only names."""
    if parameter.ndim <= 1 or name.rpartition(".")[2].endswith("bias"):
        return False
    return not isinstance(module.get_submodule(owner(name)), nn.LayerNorm | nn.RMSNorm)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group its share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as ``parameter name/key`` -> tensor."""
    names: dict[Tensor, str] = {value: name for name, value in module.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        by_parameter.setdefault(name, {})[field] = value
    names = {parameter: name for name, parameter in module.named_parameters()}
    # torch numbers the parameters in the order of its groups.
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_parameter[name] for index, name in enumerate(order) if name in by_parameter}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
