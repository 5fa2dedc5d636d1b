"""Parts of a module that integers run slowly: where they are, and what stands in for them.

They are known by what they do, not by what they are called, so that any library's spelling of
hard-swish or of squeeze-and-excite is found.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from deploykit.depth import remove_blocks
from deploykit.layer_shapes import is_inside, layers_of
from deploykit.models.modes import evaluating

SLOW_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "mish": functional.mish,
}
# What a module may raise that wants other shapes or more arguments.
REFUSALS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
TOLERANCE = 1e-3  # of the largest value, where the same is computed in another order


@dataclass
class Gate:
    """A squeeze-and-excite: a module that multiplies each channel by a number it computes.

    Attributes:
        writers: convolutions and BatchNorms that write its input.
        readers: convolutions that read its output.
        products: sum of input times output, by channel ``(C,)``.
        squares: sum of the squared input, by channel.
    """

    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    products: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    @property
    def gain(self) -> Tensor:
        """The constant factor that comes nearest to it (least squares), ``(C,)``."""
        squares = torch.as_tensor(self.squares)
        return torch.where(squares > 0, self.products / squares, 1.0).float()


def replace_operators(module: nn.Module, surgery: Mapping[str, Iterable[str]]) -> None:
    """Put ReLU6 in place of the modules under ``relu6``, nothing in place of ``removed``.

    Raises:
        AttributeError: there is no such module.
    """
    remove_blocks(module, surgery.get("removed", ()))
    for name in surgery.get("relu6", ()):
        module.get_submodule(name)
        module.set_submodule(name, nn.ReLU6())


def find_activations(module: nn.Module) -> list[str]:
    """Return the names of the modules that compute SiLU, hard-swish or Mish."""
    parts = module.named_modules(remove_duplicate=False)
    return [name for name, part in parts if name and _is_slow_activation(part)]


def _is_slow_activation(part: nn.Module) -> bool:
    if [*part.children(), *part.parameters(), *part.buffers()]:
        return False
    # Samples and channels of other values each: what looks at neighbours tells itself apart.
    x = torch.linspace(-8, 8, 384).reshape(2, 3, 8, 8)
    try:
        with torch.no_grad():
            y = copy.deepcopy(part).eval()(x.clone())
    except REFUSALS:
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return False
    return any(torch.allclose(y, one(x), atol=1e-5) for one in SLOW_ACTIVATIONS.values())


def count_slow_activations(module: nn.Module, example: Tensor) -> int:
    """Count the calls of SiLU, hard-swish and Mish in one forward pass, in modules or not."""
    counting = _Counting()
    with torch.no_grad(), evaluating(module), counting:
        module(example)
    return sum(counting.calls[name] for name in SLOW_ACTIVATIONS)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls by the operator's name; what works in place counts as the same."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls[operator.overloadpacket.__name__.removesuffix("_")] += 1
        return operator(*args, **(kwargs or {}))


def find_gates(module: nn.Module, batches: Iterable[Tensor]) -> dict[str, Gate]:
    """Return the squeeze-and-excites of a module, by name, as they act on some inputs.

    Such a module holds layers, all of which see one value a channel; it takes an image, and
    gives the same image times a factor a channel and sample (Hu et al. 2018, section 3).

    Args:
        module: left as it is.
        batches: its inputs, ``(N, ...)`` each.
    """
    watch = _Watch(module)
    parts = [(name, part) for name, part in module.named_modules() if name]
    hooks = [part.register_forward_hook(watch.hook(name)) for name, part in parts]
    try:
        with torch.no_grad(), evaluating(module):
            for batch in batches:
                module(batch)
                watch.forget()
    finally:
        for hook in hooks:
            hook.remove()
    inner = watch.gates.keys()
    return {
        name: gate
        for name, gate in watch.gates.items()
        if not is_inside(name.rpartition(".")[0], inner)
    }


class _Watch:
    """Follows forward passes: which modules are gates, who writes for them, who reads them."""

    def __init__(self, module: nn.Module) -> None:
        layers = layers_of(module)
        self._layers = {
            name: [layer for layer in layers if layer.startswith(f"{name}.")]
            for name, _ in module.named_modules()
        }
        self._pooled: dict[str, bool] = {}
        # Weak, so that a pass takes no more memory than it does unwatched.
        self._written: list[tuple[str, ReferenceType[Tensor]]] = []
        self._given: list[tuple[str, ReferenceType[Tensor]]] = []
        self._other: set[str] = set()
        self.gates: dict[str, Gate] = {}

    def forget(self) -> None:
        """Let the tensors of a pass go."""
        self._written.clear()
        self._given.clear()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Return the forward hook of a module."""

        def after(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
                self._pooled[name] = False
                return
            if isinstance(part, nn.modules.conv._ConvNd | nn.Linear):
                self._pooled[name] = self._pooled.get(name, True) and _is_pooled(inputs[0])
                for gate, tensor in self._given:
                    if tensor() is inputs[0] and name not in self.gates[gate].readers:
                        self.gates[gate].readers.append(name)
            elif self._layers[name]:
                self._judge(name, inputs[0], output)
            if isinstance(part, nn.modules.conv._ConvNd | _BatchNorm):
                self._written.append((name, ref(output)))

        return after

    def _judge(self, name: str, x: Tensor, y: Tensor) -> None:
        if name in self._other:
            return
        pooled = all(self._pooled.get(layer, False) for layer in self._layers[name])
        products = _products(x, y) if pooled else None
        if products is None:
            self._other.add(name)
            self.gates.pop(name, None)
            return
        gate = self.gates.setdefault(name, Gate())
        gate.products, gate.squares = gate.products + products[0], gate.squares + products[1]
        gate.writers += [
            writer
            for writer, tensor in self._written
            if tensor() is x and writer not in gate.writers
        ]
        self._given.append((name, ref(y)))


def _is_pooled(x: Tensor) -> bool:
    return x.ndim == 2 or (x.ndim > 2 and x[0, 0].numel() == 1)


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the sums of x y and x x a channel, if y is x times a factor a channel and sample."""
    if x.shape != y.shape or x.ndim != 4 or _is_pooled(x) or x.data_ptr() == y.data_ptr():
        return None
    x, y = x.double(), y.double()  # what fresh weights answer can be tiny
    products, squares = (x * y).sum((2, 3)), x.square().sum((2, 3))
    factor = torch.where(squares > 0, products / squares, 0.0)[..., None, None]
    if float((y - factor * x).abs().max()) > TOLERANCE * float(y.abs().max()):
        return None
    return products.sum(0), squares.sum(0)


def remove_gate(module: nn.Module, name: str, gate: Gate, example: Tensor) -> str:
    """Take a gate out of a module in place, its mean factor folded into a neighbour's weights.

    Returns:
        The layer that took the factor, or ``""`` where none could and the gate stays.
    """
    for layer, side in [*((one, 1) for one in gate.readers), *((one, 0) for one in gate.writers)]:
        trial = copy.deepcopy(module)
        trial.set_submodule(name, _Constant(gate.gain))
        expected = _answer(trial, example)
        trial.set_submodule(name, nn.Identity())
        if not _scale(trial.get_submodule(layer), gate.gain, side):
            continue
        found = _answer(trial, example)
        if float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
            module.set_submodule(name, nn.Identity())
            _scale(module.get_submodule(layer), gate.gain, side)
            return layer
    return ""


class _Constant(nn.Module):
    """Multiplies each channel of ``(N, C, H, W)`` by a constant."""

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return x * self.gain[:, None, None]


@torch.no_grad()
def _scale(layer: nn.Module, gain: Tensor, side: int) -> bool:
    """Multiply inputs (1) or outputs (0) of a layer by a factor a channel; False if it cannot."""
    weight = layer.weight
    if not isinstance(weight, Tensor) or getattr(layer, "transposed", False):
        return False
    if side == 0:
        weight.mul_(gain.reshape(-1, *[1] * (weight.ndim - 1)))
        if isinstance(layer.bias, Tensor):
            layer.bias.mul_(gain)
        return True
    groups = int(layer.groups)  # type: ignore[arg-type]
    each = gain.reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
    weight.mul_(each.reshape(*each.shape, *[1] * (weight.ndim - 2)))
    return True


def _answer(module: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(module):
        answer: Tensor = module(example)
    return answer
