"""Widths of layers as plain numbers: read from a pruned module, set on a fresh one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deploykit.artifacts import JsonDict
from deploykit.models.attention import HeadAttention, can_replace, replace_attention

# What pruning changes on a layer; torch's own layers keep their sizes under these names.
ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_parameters",
    "num_channels",
    "normalized_shape",
    "embedding_dim",
)
LayerWidths = Mapping[str, int | list[int]]
Widths = Mapping[str, LayerWidths]


def read_widths(module: nn.Module) -> dict[str, dict[str, int | list[int]]]:
    """Return what pruning may change of each module, by module name.

    Torch's layers have width attributes. Of a model's own modules these are the whole numbers
    that they hold, since some count channels, and the shapes of parameters outside any layer.
    """
    found = {}
    for name, part in module.named_modules():
        if can_replace(part):  # it reads as what stands for it once heads are gone
            part = HeadAttention(part)
            found[f"{name}.in_proj"] = _widths(part.in_proj)
        found[name] = _widths(part)
    return {name: widths for name, widths in found.items() if widths}


def input_width(widths: LayerWidths) -> int:
    """Return the input channels of a convolution, or the input features of a linear layer."""
    width = widths["in_channels"] if "in_channels" in widths else widths["in_features"]
    assert isinstance(width, int)
    return width


def output_width(widths: LayerWidths) -> int:
    """Return the output channels of a convolution, or the output features of a linear layer."""
    width = widths["out_channels"] if "out_channels" in widths else widths["out_features"]
    assert isinstance(width, int)
    return width


def changed_widths(before: Widths, after: Widths) -> JsonDict:
    """Return the widths of the modules that differ, as they are ``after``."""
    return {name: dict(widths) for name, widths in after.items() if before.get(name) != widths}


def set_widths(module: nn.Module, widths: Widths) -> None:
    """Resize the named layers of ``module`` in place; their new weights are zeros.

    Raises:
        AttributeError: there is no such layer, or it has no such width.
    """
    replace_attention(
        module, [name.removesuffix(".in_proj") for name in widths if name.endswith(".in_proj")]
    )
    resized: dict[tuple[Tensor, tuple[int, ...]], Tensor] = {}
    for name, attributes in widths.items():
        layer = module.get_submodule(name)
        own: dict[str, tuple[int, ...]] = {}
        for key, value in attributes.items():
            old = getattr(layer, key)
            shape = tuple(value) if isinstance(value, list) else None
            if shape is not None and isinstance(old, Tensor):
                own[key] = shape
            else:
                setattr(layer, key, value if shape is None else shape)
        for key, shape in {**_shapes(layer), **own}.items():
            _resize(layer, key, shape, resized)


def match_tensors(layer: nn.Module) -> None:
    """Make the width attributes of one of torch's layers those that its tensors have."""
    match layer:
        case nn.modules.conv._ConvNd():
            first, second = layer.weight.shape[:2]
            if layer.groups == layer.in_channels > 1:  # depthwise
                per = layer.out_channels // layer.in_channels
                layer.groups = first if layer.transposed else first // per
            ends = (second * layer.groups, first)
            layer.in_channels, layer.out_channels = ends[::-1] if layer.transposed else ends
        case nn.Linear():
            layer.out_features, layer.in_features = layer.weight.shape
        case nn.modules.batchnorm._NormBase():
            known = layer.weight if layer.running_mean is None else layer.running_mean
            if known is not None:
                layer.num_features = len(known)
        case nn.PReLU():
            layer.num_parameters = len(layer.weight)
        case nn.Embedding():
            layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def is_custom(layer: nn.Module) -> bool:
    """Tell whether a module is a model's own, rather than one of torch's."""
    return not type(layer).__module__.startswith("torch.nn.")


def _widths(layer: nn.Module) -> dict[str, int | list[int]]:
    kinds = (
        nn.modules.conv._ConvNd
        | nn.Linear
        | nn.modules.batchnorm._NormBase
        | nn.PReLU
        | nn.LayerNorm
        | nn.GroupNorm
        | nn.Embedding
    )
    keys = [key for key in ATTRIBUTES if isinstance(layer, kinds) and hasattr(layer, key)]
    values = {key: getattr(layer, key) for key in keys}
    if is_custom(layer):
        values |= {key: value for key, value in vars(layer).items() if is_count(key, value)}
        shape = vars(layer).get("normalized_shape")
        if isinstance(shape, tuple) and all(type(size) is int for size in shape):
            values["normalized_shape"] = shape  # a LayerNorm of the model's own
    implied = _shapes(layer)
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    for key, tensor in tensors:
        if implied.get(key, ()) != tuple(tensor.shape):
            values[key] = tuple(tensor.shape)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def is_count(key: str, value: object) -> bool:
    """Tell whether an attribute of a model's own module may count its channels."""
    return type(value) is int and not key.startswith("_")


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
        case nn.LayerNorm():
            return dict.fromkeys(("weight", "bias"), tuple(layer.normalized_shape))
        case nn.GroupNorm():
            return dict.fromkeys(("weight", "bias"), (layer.num_channels,))
        case nn.Embedding():
            return {"weight": (layer.num_embeddings, layer.embedding_dim)}
    return {}


def _resize(
    layer: nn.Module,
    key: str,
    shape: tuple[int, ...],
    resized: dict[tuple[Tensor, tuple[int, ...]], Tensor],
) -> None:
    """Give a layer zeros of another shape; layers that shared a tensor share its new one."""
    old = getattr(layer, key, None)
    if old is None or tuple(old.shape) == shape:
        return
    if (old, shape) not in resized:
        new = torch.zeros(shape, dtype=old.dtype, device=old.device)
        learned = isinstance(old, nn.Parameter)
        resized[old, shape] = nn.Parameter(new, old.requires_grad) if learned else new
    setattr(layer, key, resized[old, shape])
