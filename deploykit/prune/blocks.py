"""Whole residual blocks that can go: what they add to their input is left out.

A block that returns its input plus something can be replaced by its input; removing some costs
little (Veit et al., "Residual Networks Behave Like Ensembles of Relatively Shallow Networks",
https://arxiv.org/abs/1605.06431), and depth is time that narrower layers do not give back.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.depth import aliases, remove_blocks
from deploykit.layer_shapes import is_inside
from deploykit.models.modes import evaluating

TOLERANCE = 1e-5  # relative; a block that passes its input on does so to rounding


def removable_blocks(module: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Name the innermost modules that return their input plus what their layers make of it.

    Each is proven: with the weights of its layers at zero it returns its input, and so does the
    whole model answer as with the block replaced by its input.

    Args:
        module: takes ``example``; left as it is.
        example: float input ``(N, ...)``.
    """
    found: list[str] = []
    inputs = _inputs(module, example)
    for name, block in reversed(list(module.named_modules())):
        inner = any(other.startswith(f"{name}.") for other in found)
        if name and not inner and name in inputs and _passes_on(block, inputs[name]):
            found.append(name)
    return tuple(name for name in reversed(found) if _can_go(module, name, example))


def _inputs(module: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Return what each module that holds layers reads, if it returns one tensor of that shape."""
    seen: dict[str, list[Tensor | None]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            same = (
                len(inputs) == 1
                and isinstance(inputs[0], Tensor)
                and isinstance(output, Tensor)
                and inputs[0].shape == output.shape
            )
            seen.setdefault(name, []).append(inputs[0] if same else None)

        return hook

    holding = [(name, part) for name, part in module.named_modules() if len(_layers(part)) > 1]
    hooks = [part.register_forward_hook(note(name)) for name, part in holding if name]
    try:
        with torch.no_grad(), evaluating(module):
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    # What is called twice cannot be taken out of one place.
    return {
        name: calls[0] for name, calls in seen.items() if len(calls) == 1 and calls[0] is not None
    }


def _layers(module: nn.Module) -> list[nn.Module]:
    kinds = nn.modules.conv._ConvNd | nn.Linear
    return [part for part in module.modules() if isinstance(part, kinds)]


def _passes_on(block: nn.Module, inputs: Tensor) -> bool:
    """Whether the block returns its input where its layers make nothing of it."""
    silent = _silenced(block)
    # Values that a clip at the end lets through, as the block is fed after another clip.
    probe = inputs.abs()
    try:
        with torch.no_grad():
            output = silent(probe)
    except Exception:  # noqa: BLE001 - it may want arguments by name, which the hook does not see
        return False
    return bool((output - probe).abs().max() <= TOLERANCE * probe.abs().max().clamp(min=1e-6))


def _silenced(block: nn.Module) -> nn.Module:
    """Return a copy whose layers and norms make zeros."""
    silent = copy.deepcopy(block).eval()
    for part in silent.modules():
        if isinstance(part, nn.modules.conv._ConvNd | nn.Linear):
            part.weight.data.zero_()
            if part.bias is not None:
                part.bias.data.zero_()
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.bias, part.running_mean):
                if tensor is not None:
                    tensor.data.zero_()
    return silent


def _can_go(module: nn.Module, name: str, example: Tensor) -> bool:
    """Whether the model answers the same without the block as with the block made silent."""
    if _shares(module, name):
        return False
    silent, without = copy.deepcopy(module).eval(), copy.deepcopy(module).eval()
    silenced = _silenced(silent.get_submodule(name))
    for alias in aliases(silent, name):
        silent.set_submodule(alias, silenced)
    # A model may hold it where no name leads to, as in a list: there it would still run.
    without.get_submodule(name).register_forward_pre_hook(_refuse)
    remove_blocks(without, [name])
    with torch.no_grad():
        try:
            expected, got = silent(example), without(example)
        except Exception:  # noqa: BLE001 - a model without one of its blocks may fail in any way
            return False
    largest = expected.abs().max().clamp(min=1e-6)
    return expected.shape == got.shape and bool((expected - got).abs().max() <= 1e-4 * largest)


def _shares(module: nn.Module, name: str) -> bool:
    """Whether a parameter of the block is another's too, which needs it when the block is gone."""
    inside = {id(parameter) for parameter in module.get_submodule(name).parameters()}
    names = aliases(module, name)
    return any(
        id(parameter) in inside and not is_inside(other, names)
        for other, parameter in module.named_parameters(remove_duplicate=False)
    )


def _refuse(*_: object) -> None:
    raise RuntimeError("the block still runs")
