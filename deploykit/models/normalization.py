"""One mean and one standard deviation for all channels, the rest folded into the first layer."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from deploykit.artifacts import JsonDict
from deploykit.runtime import zero_point_and_scale

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
FLATTENINGS = ("flatten", "view", "reshape")


@dataclass(frozen=True)
class FirstLayer:
    """A layer that the input feeds; ``pixels`` inputs of a linear layer share a channel."""

    name: str
    pixels: int = 1


def fold_normalization(
    module: nn.Module, preprocess: Mapping[str, Any] | None, example: torch.Tensor
) -> tuple[nn.Module, Mapping[str, Any] | None, JsonDict]:
    """Rewrite per-channel normalization as one mean and one std and a changed first layer.

    Pixels can be the first quantized tensor only if all channels share scale and zero point.
    With ``x`` the normalized pixel of old and ``z`` that of new, ``x = factor * z + offset`` a
    channel: the factor goes into the weights, the offset into the bias. The outputs stay the
    same but for pixels at zero-padded borders, where zero now means the shared mean.

    Args:
        module: copied, never altered.
        preprocess: ``mean`` and ``std`` on the 0 to 1 scale; ``None`` for arrays.
        example: normalized input ``(N, C, H, W)``, N at least 2.

    Returns:
        The module, the preprocess to use from now on, and a note: ``folded``, ``layers``,
        ``bias_added`` (layers that had no bias), and ``why`` where nothing was folded. What
        cannot be folded comes back as it was.
    """
    if preprocess is None:
        return module, None, _note(why="arrays are not normalized")
    if len(set(preprocess["mean"])) == len(set(preprocess["std"])) == 1:
        return module, _shared(preprocess), _note(why="one mean and one std already")
    layers, why = find_first_layers(module, example)
    if not layers:
        return module, preprocess, _note(why=why)
    shared = _shared(preprocess)
    factor, offset = _change(preprocess, shared, example.shape[1])
    folded = copy.deepcopy(module)
    bias_added = [layer.name for layer in layers if folded.get_submodule(layer.name).bias is None]
    add_biases(folded, bias_added)
    for layer in layers:
        _fold(folded.get_submodule(layer.name), layer.pixels, factor, offset)
    return folded, shared, _note([layer.name for layer in layers], bias_added)


class Renormalized(nn.Module):
    """Takes images ``(N, C, H, W)`` that are normalized otherwise than its module expects.

    Args:
        module: what answers.
        factor: multiplies each channel, ``(C,)``.
        offset: is added to each channel then, ``(C,)``.
    """

    factor: torch.Tensor
    offset: torch.Tensor

    def __init__(self, module: nn.Module, factor: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__()
        self.inner = module
        self.register_buffer("factor", factor.float().view(1, -1, 1, 1))
        self.register_buffer("offset", offset.float().view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Answer."""
        answer: torch.Tensor = self.inner(x * self.factor + self.offset)
        return answer


def renormalized(
    module: nn.Module, *, takes: Mapping[str, Any] | None, given: Mapping[str, Any] | None
) -> nn.Module:
    """Return what answers as ``module`` does where the pixels are normalized otherwise.

    Args:
        module: shared with what is returned.
        takes: the preprocess that it was trained with; None for arrays.
        given: the preprocess of what it will be fed with.
    """
    if takes is None or given is None:
        return module
    if all(list(takes[key]) == list(given[key]) for key in ("mean", "std")):
        return module
    return Renormalized(module, *_change(takes, given, takes["channels"]))


def add_biases(module: nn.Module, names: list[str]) -> None:
    """Give each named layer that has none a bias of zeros, in place."""
    for name in names:
        layer = module.get_submodule(name)
        if layer.bias is None:
            channels = getattr(layer, "out_channels", getattr(layer, "out_features", None))
            bias = nn.Parameter(layer.weight.new_zeros(channels))
            layer.bias = bias.requires_grad_(layer.weight.requires_grad)


def find_first_layers(module: nn.Module, example: torch.Tensor) -> tuple[list[FirstLayer], str]:
    """Name the layers that the input feeds, or say why the input feeds something else too.

    Returns:
        The layers and ``""``, or no layer and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(copy.deepcopy(module).eval(), (example,))
    except Exception as error:  # noqa: BLE001 - any model code may run here, and no fold is safe
        return [], f"the model cannot be traced ({type(error).__name__})"
    weights = exported.graph_signature.inputs_to_parameters
    (source,) = exported.graph_signature.user_inputs
    graph_input = next(n for n in _nodes(exported.graph_module) if n.name == source)
    found = []
    for user, pixels in _consumers(graph_input, example):
        layer = _layer(user, pixels, weights, module)
        if layer is None:
            return [], f"the input feeds {user.target}, not only layers that can take it in"
        found.append(layer)
    return found, "" if found else "the input feeds no layer"


def _nodes(graph_module: GraphModule) -> Iterator[Node]:
    yield from graph_module.graph.nodes


def _consumers(graph_input: Node, example: torch.Tensor) -> Iterator[tuple[Node, int]]:
    """Yield each user of the input, with pixels a channel where it reads them flattened, or 0."""
    pixels = math.prod(example.shape[2:])
    flat = (len(example), example.shape[1] * pixels)
    for user in graph_input.users:
        shape = tuple(getattr(user.meta.get("val"), "shape", ()))
        if _operator(user) in FLATTENINGS and shape == flat:
            yield from ((reader, pixels) for reader in user.users)
        else:
            yield user, 0


def _layer(
    user: Node, pixels: int, weights: Mapping[str, str], module: nn.Module
) -> FirstLayer | None:
    """Return the layer that ``user`` computes, if its weight is a layer's own and used once."""
    wanted = ("linear",) if pixels else CONVOLUTIONS
    weight = user.args[1] if len(user.args) > 1 else None
    if _operator(user) not in wanted or not isinstance(weight, Node) or len(weight.users) != 1:
        return None
    name, _, attribute = weights.get(weight.name, "").rpartition(".")
    if attribute != "weight":
        return None
    layer = module.get_submodule(name)
    known = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return FirstLayer(name, max(pixels, 1)) if known else None


def _operator(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", "")).rpartition(".")[2]


def _shared(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the statistics by their means, the zero point a whole pixel value."""
    mean = round(255 * sum(preprocess["mean"]) / len(preprocess["mean"])) / 255
    std = sum(preprocess["std"]) / len(preprocess["std"])
    return {**preprocess, "mean": [mean], "std": [std]}


def _change(
    old: Mapping[str, Any], new: Mapping[str, Any], channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``factor`` and ``offset`` a channel, float64: old = factor * new + offset."""
    zero, scale = (torch.as_tensor(v, dtype=torch.float64) for v in zero_point_and_scale(old))
    new_zero, new_scale = (
        torch.as_tensor(v, dtype=torch.float64) for v in zero_point_and_scale(new)
    )
    factor, offset = scale / new_scale, (new_zero - zero) * scale
    return factor.reshape(-1).expand(channels), offset.reshape(-1).expand(channels)


@torch.no_grad()
def _fold(layer: nn.Module, pixels: int, factor: torch.Tensor, offset: torch.Tensor) -> None:
    """Change weight and bias of a convolution or linear layer, in float64 and in place."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    outputs, inputs = weight.shape[:2]
    groups = getattr(layer, "groups", 1)
    kernel = (1,) * (weight.ndim - 2)
    # (outputs, inputs, 1...): for each weight the statistics of the channel that it reads.
    factor, offset = (
        values.repeat_interleave(pixels)
        .reshape(groups, inputs)
        .repeat_interleave(outputs // groups, 0)
        .reshape(outputs, inputs, *kernel)
        for values in (factor, offset)
    )
    wide = weight.double()
    bias.copy_(bias.double() + (wide * offset).flatten(1).sum(1))
    weight.copy_(wide * factor)


def _note(
    layers: list[str] | None = None, bias_added: list[str] | None = None, why: str = ""
) -> JsonDict:
    note: JsonDict = {
        "folded": bool(layers),
        "layers": layers or [],
        "bias_added": bias_added or [],
    }
    return {**note, "why": why} if why else note
