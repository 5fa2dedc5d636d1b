"""Widths of layers as plain numbers: read from a pruned module, set on a fresh one."""

from collections.abc import Mapping

import torch
from torch import nn

from deploykit.artifacts import JsonDict

# What pruning changes on a layer; torch's own layers keep their sizes under these names.
ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_parameters",
)


def read_widths(module: nn.Module) -> dict[str, dict[str, int]]:
    """Return the width attributes of each convolution, linear and norm layer by module name."""
    layers = nn.modules.conv._ConvNd | nn.Linear | nn.modules.batchnorm._NormBase | nn.PReLU
    return {
        name: {key: getattr(layer, key) for key in ATTRIBUTES if hasattr(layer, key)}
        for name, layer in module.named_modules()
        if isinstance(layer, layers)
    }


def output_width(widths: Mapping[str, int]) -> int:
    """Return the output channels of a convolution, or the output features of a linear layer."""
    return widths["out_channels"] if "out_channels" in widths else widths["out_features"]


def changed_widths(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]
) -> JsonDict:
    """Return the widths of the layers that differ, as they are ``after``."""
    return {name: dict(widths) for name, widths in after.items() if before.get(name) != widths}


def set_widths(module: nn.Module, widths: Mapping[str, Mapping[str, int]]) -> None:
    """Resize the named layers of ``module`` in place; their new weights are zeros.

    Raises:
        AttributeError: there is no such layer, or it has no such width.
    """
    for name, attributes in widths.items():
        layer = module.get_submodule(name)
        for key, value in attributes.items():
            getattr(layer, key)
            setattr(layer, key, value)
        for key, shape in _shapes(layer).items():
            _resize(layer, key, shape)


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that the layer's widths ask for."""
    match layer:
        case nn.modules.conv._ConvNd():
            ends = (layer.out_channels, layer.in_channels // layer.groups)
            if layer.transposed:
                ends = (layer.in_channels, layer.out_channels // layer.groups)
            return {"weight": (*ends, *layer.kernel_size), "bias": (layer.out_channels,)}
        case nn.Linear():
            shape = (layer.out_features, layer.in_features)
            return {"weight": shape, "bias": (layer.out_features,)}
        case nn.modules.batchnorm._NormBase():
            names = ("weight", "bias", "running_mean", "running_var")
            return dict.fromkeys(names, (layer.num_features,))
        case nn.PReLU():
            return {"weight": (layer.num_parameters,)}
    raise AttributeError(f"{type(layer).__name__} has no width")


def _resize(layer: nn.Module, key: str, shape: tuple[int, ...]) -> None:
    old = getattr(layer, key, None)
    if old is None or tuple(old.shape) == shape:
        return
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        setattr(layer, key, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(layer, key, new)
