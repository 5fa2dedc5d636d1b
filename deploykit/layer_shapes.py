"""The shapes of a module's layers: all that their cost depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deploykit.models.attention import splitting_attention
from deploykit.models.modes import evaluating
from deploykit.widths import LayerWidths, input_width, output_width


@dataclass(frozen=True)
class LayerShape:
    """A convolution or a linear layer.

    Attributes:
        kind: convolution, transposed convolution or linear layer.
        inputs: channels or features that it reads.
        outputs: channels or features that it makes.
        size: spatial size of its input; of a linear layer the axes between batch and features.
        groups: of a convolution; 1 elsewhere.
        kernel: spatial size of the weight; empty for a linear layer, like the three below.
        stride: step between windows.
        padding: added on both sides.
        dilation: step within a window.
        precision: dtype of the activations that it reads: ``float32``, ``uint8`` or ``int8``.
        calls: how often a sample goes through it, as windows of an image or levels of a pyramid
            do; smaller calls count by their share of the multiply-accumulates.
    """

    kind: Literal["conv", "transposed", "linear"]
    inputs: int
    outputs: int
    size: tuple[int, ...] = ()
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    precision: str = "float32"
    calls: float = 1.0

    @property
    def key(self) -> str:
        """Return the shape of one call as text, the same in every process."""
        one = {name: value for name, value in asdict(self).items() if name != "calls"}
        return json.dumps(one, sort_keys=True, separators=(",", ":"))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        places = self.size
        if self.kind == "conv":
            spans = zip(self.size, self.kernel, self.stride, self.padding, self.dilation,
                        strict=True)  # fmt: skip
            places = tuple(
                (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
                for size, kernel, stride, padding, dilation in spans
            )
        weights = self.inputs * self.outputs // self.groups * math.prod(self.kernel)
        return round(weights * math.prod(places) * self.calls)

    def with_widths(self, widths: LayerWidths) -> LayerShape:
        """Return the layer with other widths, as `read_widths` gives them."""
        groups = widths.get("groups", 1)
        assert isinstance(groups, int)
        inputs, outputs = input_width(widths), output_width(widths)
        return replace(self, inputs=inputs, outputs=outputs, groups=groups)


def layers_of(module: nn.Module) -> list[str]:
    """Return the names of a module's convolutions and linear layers, in order."""
    kinds = nn.modules.conv._ConvNd | nn.Linear
    return [name for name, layer in module.named_modules() if isinstance(layer, kinds)]


def layer_shapes(module: nn.Module, example: Tensor) -> dict[str, LayerShape]:
    """Return the shape of each convolution and linear layer that a forward pass calls.

    Of a layer that is called several times it is the largest one. Attention counts as the layers
    that stand for it once heads are gone.

    Args:
        module: left as it is.
        example: float input ``(N, ...)``.
    """
    with splitting_attention(module):
        noted = _note_shapes(module, example)
    return {name: _largest(calls) for name, calls in noted.items()}


def _largest(calls: Sequence[LayerShape]) -> LayerShape:
    largest = max(calls, key=lambda call: call.macs)
    once = replace(largest, calls=1.0).macs
    return replace(largest, calls=sum(call.macs for call in calls) / once) if once else largest


def _note_shapes(module: nn.Module, example: Tensor) -> dict[str, list[LayerShape]]:
    shapes: dict[str, list[LayerShape]] = {}

    def note(name: str) -> Any:
        def hook(
            layer: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], _output: Tensor
        ) -> None:
            rows, *read = (inputs[0] if inputs else named["input"]).shape
            # Windows or frames may stand in the first axis beside the samples.
            shape = replace(_shape(layer, tuple(read)), calls=rows / len(example))
            shapes.setdefault(name, []).append(shape)

        return hook

    hooks = [
        module.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        for name in layers_of(module)
    ]
    try:
        with torch.no_grad(), evaluating(module):
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _shape(layer: Any, read: tuple[int, ...]) -> LayerShape:
    if isinstance(layer, nn.Linear):
        return LayerShape("linear", layer.in_features, layer.out_features, read[:-1])
    return LayerShape(
        "transposed" if layer.transposed else "conv",
        layer.in_channels,
        layer.out_channels,
        read[1:],
        layer.groups,
        tuple(layer.kernel_size),
        tuple(layer.stride),
        _padding(layer),
        tuple(layer.dilation),
    )


def _padding(layer: Any) -> tuple[int, ...]:
    if isinstance(layer.padding, tuple):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    pairs = zip(layer.kernel_size, layer.dilation, strict=True)
    return tuple(step * (size - 1) // 2 for size, step in pairs)


def is_inside(layer: str, modules: Any) -> bool:
    """Whether a module is one of those named, or stands in one of them."""
    return any(layer == module or layer.startswith(f"{module}.") for module in modules)
