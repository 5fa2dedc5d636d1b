"""What a pruned model costs: multiply-accumulates, or what the runtime is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from deploykit.layer_shapes import LayerShape, is_inside, layer_shapes
from deploykit.widths import Widths


class Cost(Protocol):
    """Prices a model by the widths of its layers."""

    def predict(self, widths: Widths, removed: Collection[str] = ()) -> float:
        """Return the cost with these widths, without the modules that were removed."""

    def measure(self, module: nn.Module, removed: Collection[str] = ()) -> float:
        """Return the cost of a module that was built."""


@dataclass(frozen=True)
class MacsCost:
    """Multiply-accumulates of one sample, to compare with: they say little about latency.

    Attributes:
        shapes: of the layers as they are.
        example: float input ``(N, ...)``.
    """

    shapes: Mapping[str, LayerShape]
    example: Tensor

    @classmethod
    def of(cls, module: nn.Module, example: Tensor) -> MacsCost:
        """Read the layers of a module."""
        return cls(layer_shapes(module, example), example)

    def predict(self, widths: Widths, removed: Collection[str] = ()) -> float:
        """See `Cost`."""
        return float(
            sum(
                (shape.with_widths(widths[name]) if name in widths else shape).macs
                for name, shape in self.shapes.items()
                if not is_inside(name, removed)
            )
        )

    def measure(self, module: nn.Module, removed: Collection[str] = ()) -> float:
        """See `Cost`."""
        return float(sum(shape.macs for shape in layer_shapes(module, self.example).values()))
