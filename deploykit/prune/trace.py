"""Which channels of a model's tensors stand for the same thing, read off one forward pass.

Every index of every dimension of a parameter or buffer gets a label. While the model runs on an
example, each operator hands the labels of its inputs to its outputs and ties those that must go
together: the channels of a sum, the outputs of a layer and the inputs of the next. What no rule
of `deploykit.prune.rules` covers keeps all its channels. Labels are a finer form of the
dependencies of Fang et al., "DepGraph", https://arxiv.org/abs/2301.12900: they follow single
channels through any order of reshapes, joins and cuts, and need no graph of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from deploykit.models.attention import plain_attention
from deploykit.models.modes import evaluating

Labels = npt.NDArray[np.int64]
Axes = tuple[Labels, ...]
Arguments = dict[str, Any]
Example = Tensor | tuple[Tensor, ...]

# The label of what is no channel: samples, pixels, tokens, single entries.
PLAIN = 0


class Trace:
    """Labels of one forward pass.

    Attributes:
        whole_parts: how a dimension that is cut in two, as features into heads, may shrink:
            by whole parts (heads), or by the same channels of every part.
        leaves: labels of the parameters and buffers that the pass used, by name.
        shapes: labels of the dimensions that an attribute counts, such as a LayerNorm's
            ``normalized_shape``, by module name and attribute.
        normalized: labels of the dimensions that each normalization of the pass spans.
        parts: labels of dimensions that were cut.
    """

    def __init__(self, module: nn.Module, *, whole_parts: bool) -> None:
        self.whole_parts = whole_parts
        self.leaves: dict[str, Axes] = {}
        self.shapes: dict[tuple[str, str], Axes] = {}
        self.normalized: list[Axes] = []
        self.parts: list[Labels] = []
        self.inside: list[str] = []
        self.module = module
        self._names = {id(tensor): name for name, tensor in tensors_of(module)}
        self._axes: Any = WeakIdKeyDictionary()
        self._count = PLAIN + 1
        self._ties: list[Labels] = []
        self._fixed: dict[str, list[Labels]] = {}

    def axes(self, tensor: Tensor) -> Axes:
        """Return the labels of each dimension of ``tensor``."""
        if tensor in self._axes:
            known: Axes = self._axes[tensor]
            return known
        name = self._names.get(id(tensor))
        if name is None or not tensor.is_floating_point():
            return tuple(plain(size) for size in tensor.shape)
        if name not in self.leaves:
            self.leaves[name] = tuple(map(self._new, tensor.shape))
        return self.leaves[name]

    def assign(self, tensor: Tensor, axes: Sequence[Labels]) -> None:
        """Remember the labels of an operator's result."""
        if [len(axis) for axis in axes] != list(tensor.shape):
            raise ValueError(f"labels {[len(axis) for axis in axes]} for {tuple(tensor.shape)}")
        if any(map(varied, axes)):
            self._axes[tensor] = tuple(axes)

    def tie(self, first: Labels, second: Labels) -> Labels:
        """Demand that channels go together, index by index; return their labels."""
        first, second = np.broadcast_arrays(first, second)
        both = (first != PLAIN) & (second != PLAIN)
        if both.any():
            self._ties.append(np.stack([first[both], second[both]]))
        self.fix(np.where(both, PLAIN, first + second), "it meets a dimension that cannot shrink")
        merged: Labels = np.where(first != PLAIN, first, second)
        return merged

    def tie_rows(self, rows: Labels) -> Labels:
        """Tie all entries of each row of ``(n, m)`` labels; return the ``n`` labels."""
        self.tie(rows[:, :1], rows[:, 1:])
        return rows[:, 0]

    def tie_broadcast(self, axes: Sequence[Axes], shape: Sequence[int]) -> list[Labels]:
        """Tie the dimensions of tensors that are broadcast to ``shape``; return its labels."""
        joined = []
        for place, size in enumerate(shape, -len(shape)):
            found = [one[place] for one in axes if -place <= len(one) and len(one[place]) == size]
            labels = found[0] if found else plain(size)
            for other in found[1:]:
                labels = self.tie(labels, other)
            joined.append(labels)
        return joined

    def keep_all(self, tensors: Sequence[Tensor], reason: str) -> None:
        """Keep all channels of these tensors for ``reason``."""
        for tensor in tensors:
            for axis in self.axes(tensor):
                self.fix(axis, reason)

    def fix(self, labels: Labels, reason: str) -> None:
        """Keep these channels for ``reason``."""
        if varied(labels):
            self._fixed.setdefault(reason, []).append(labels[labels != PLAIN])

    def where(self) -> str:
        """Name the module that is running."""
        return self.inside[-1] if self.inside and self.inside[-1] else "the model"

    def components(self) -> tuple[Labels, dict[int, str]]:
        """Return the component of each label, and why a component keeps its channels."""
        ties = np.concatenate([plain((2, 0)), *self._ties], axis=1)
        ones = np.ones(ties.shape[1], dtype=np.int8)
        graph = coo_array((ones, (ties[0], ties[1])), shape=(self._count, self._count))
        _, component = connected_components(graph, directed=False)
        component = component.astype(np.int64)
        reasons: dict[int, str] = {}
        for reason, labels in self._fixed.items():
            for found in np.unique(component[np.concatenate(labels)]).tolist():
                reasons.setdefault(found, reason)
        return component, reasons

    def _new(self, size: int) -> Labels:
        """Return fresh labels; a dimension of one entry has no channel to lose."""
        if size == 1:
            return plain(1)
        self._count += size
        return np.arange(self._count - size, self._count, dtype=np.int64)


def trace(module: nn.Module, inputs: Sequence[Tensor], *, whole_parts: bool = False) -> Trace:
    """Run ``module`` once in evaluation mode and return the labels."""
    from deploykit.prune.rules import follow

    labels = Trace(module, whole_parts=whole_parts)
    with torch.no_grad(), evaluating(module), _naming(module, labels.inside), plain_attention():
        with _Recorder(labels, follow):
            outputs = module(*inputs)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                for axis in labels.axes(output):
                    labels.fix(axis, "it carries the model's output")
    return labels


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the labels through every operator that runs."""

    def __init__(self, labels: Trace, follow: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._labels, self._follow = labels, follow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._follow(self._labels, func, args, kwargs or {}, result)
        return result


@contextmanager
def _naming(module: nn.Module, inside: list[str]) -> Iterator[None]:
    """Keep the names of the running modules in ``inside``, the innermost last."""
    hooks = []
    try:
        for name, part in module.named_modules():

            def enter(*_: Any, name: str = name) -> None:
                inside.append(name)

            def leave(*_: Any) -> None:
                inside.pop()

            hooks.append(part.register_forward_pre_hook(enter))
            hooks.append(part.register_forward_hook(leave))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """Return the arguments of a module's forward pass."""
    return (example,) if isinstance(example, Tensor) else example


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and every saved buffer, with a name."""
    yield from module.named_parameters()
    for name, part in module.named_modules():
        for key, tensor in part.named_buffers(recurse=False):
            # What is not saved with the weights could not be restored.
            if key not in part._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, tensor


def plain(size: int | tuple[int, ...]) -> Labels:
    """Return labels of a dimension without channels."""
    return np.zeros(size, dtype=np.int64)


def varied(labels: Labels) -> bool:
    """Tell whether any of the labels is a channel's."""
    return bool(labels.any())
