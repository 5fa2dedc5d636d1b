"""Which channels of a module must go together, and their removal."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deploykit.errors import CompressionError
from deploykit.prune.trace import PLAIN, Axes, Example, Labels, Trace, as_inputs, trace
from deploykit.widths import is_count, is_custom, match_tensors

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
Removal = Mapping[str, Sequence[int]]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Channels of one layer and all that hangs on them.

    Attributes:
        root: module name of the layer that stands for the group.
        label: names of all layers whose outputs the group holds.
        units: outputs of the root that go together, ``(units, channels)``, ascending.
        layers: names of all modules that lose something.
        reason: why the channels have to stay, or ``""``.
    """

    root: str
    label: str
    units: Labels
    layers: frozenset[str]
    reason: str

    @property
    def width(self) -> int:
        """Outputs of the root."""
        return int(self.units.size)

    @property
    def block(self) -> int:
        """Neighbouring channels that go together, as those of one head do."""
        first = self.units[0]
        return int(np.argmax(np.append(np.diff(first) != 1, True))) + 1

    @property
    def divisions(self) -> int:
        """Equal parts of the root's outputs that each lose the same."""
        return int(self.units.shape[1]) // self.block


class Graph:
    """The groups of a module, as one forward pass on an example shows them.

    Dimensions that are cut into parts, such as features into heads, are seen in two ways: as
    parts that go whole, and as channels that go in every part. A set of channels says by itself
    which is meant.

    Raises:
        CompressionError: the module does not run.
    """

    def __init__(self, module: nn.Module, example: Example) -> None:
        self.module, inputs = module, as_inputs(example)
        try:
            found = trace(module, inputs)
            traces = [found, trace(module, inputs, whole_parts=True)] if found.parts else [found]
        except Exception as error:
            raise CompressionError(
                f"prune: the model cannot be traced ({type(error).__name__}: {error}); remove the "
                "prune section, or make the model's forward pass run on the example"
            ) from error
        self.views = [View(module, found) for found in traces]

    def groups(self) -> list[list[Group]]:
        """Return every group; where it may go in two ways, whole parts come first."""
        wholes = {group.root: group for view in self.views[1:] for group in view.cut_groups()}
        return [
            [wholes[group.root], group] if group.root in wholes else [group]
            for group in self.views[0].groups()
        ]

    def strangers(self) -> dict[str, str]:
        """Say which layers stand in no group, and why."""
        found, view = {}, self.views[0]
        for name, layer in self.module.named_modules():
            if not isinstance(layer, LAYERS) or name in view.outputs:
                continue
            if not view.uses(layer):
                found[name] = "the example does not reach it"
            elif layer._parameters.get("weight") is None:  # else it is that of another layer, too
                found[name] = "its weight is computed from others"
        return found

    def places(self, group: Group) -> Iterator[tuple[str, int, Labels]]:
        """Yield tensor, dimension and the number of the unit at each index, -1 for none."""
        place, _ = self._view_of(group.root, group.units[0].tolist())
        view = self.views[place]
        number = np.full(view.size, -1)
        number[view.outputs[group.root][group.units[:, 0]]] = np.arange(len(group.units))
        for name, axes in view.leaves.items():
            for dim, axis in enumerate(axes):
                if (number[axis] >= 0).any():
                    yield name, dim, number[axis]

    def remove(self, module: nn.Module, removal: Removal, adjusted: Iterable[str] = ()) -> None:
        """Take channels, by root, out of ``module``, which is built like the graph's own.

        Args:
            module: altered in place.
            removal: outputs of each root; each set must be closed under what goes together.
            adjusted: roots with which the counts go that the model's own modules hold.
        """
        counts = [count for root in adjusted for count in self._counts(module, root, removal)]
        shrink_tensors(module, self.losses(removal))
        for view, gone in self._closed(removal):
            for (name, attribute), axes in view.shapes.items():
                kept = tuple(int((~gone[axis]).sum()) for axis in axes)
                if kept != tuple(map(len, axes)):
                    value = kept if attribute == "normalized_shape" else kept[0]
                    setattr(module.get_submodule(name), attribute, value)
        for name, attribute, value in counts:
            setattr(module.get_submodule(name), attribute, value)

    def losses(self, removal: Removal) -> dict[str, dict[int, Labels]]:
        """Return what each tensor loses: indices by dimension."""
        lost: dict[str, dict[int, Labels]] = {}
        for view, gone in self._closed(removal):
            for name, axes in view.leaves.items():
                for dim, axis in enumerate(axes):
                    indices = np.flatnonzero(gone[axis])
                    if len(indices):
                        before = lost.setdefault(name, {}).get(dim, indices)
                        lost[name][dim] = np.union1d(before, indices)
        return lost

    def kept_in_norms(self, removal: Removal) -> list[list[Mask]]:
        """Return what stays of the dimensions that each normalization of a pass spans."""
        kept = [[np.ones(len(axis), bool) for axis in axes] for axes in self.views[0].normalized]
        for view, gone in self._closed(removal):
            for masks, axes in zip(kept, view.normalized, strict=True):
                for mask, axis in zip(masks, axes, strict=True):
                    mask &= ~gone[axis]
        return kept

    def _closed(self, removal: Removal) -> list[tuple["View", Mask]]:
        """Return which components go, in each view."""
        gone: dict[int, Mask] = {}
        for root, channels in removal.items():
            place, components = self._view_of(root, channels)
            gone.setdefault(place, np.zeros(self.views[place].size, bool))[components] = True
        return [(self.views[place], mask) for place, mask in gone.items()]

    def _view_of(self, root: str, channels: Sequence[int]) -> tuple[int, Labels]:
        for place, view in enumerate(self.views):
            axis = view.outputs[root]
            components = np.unique(axis[list(channels)])
            if np.isin(axis, components).sum() == len(channels):
                return place, components
        raise ValueError(f"{root}: channels {list(channels)} cannot go without others")

    def _counts(self, module: nn.Module, root: str, removal: Removal) -> list[tuple[str, str, int]]:
        """Find the numbers of the model's own module around a group that count its channels."""
        place, components = self._view_of(root, removal[root])
        view, lost = self.views[place], self.losses({root: removal[root]})
        owner = common_module(lost)
        sizes = {
            len(view.leaves[name][dim]): len(view.leaves[name][dim]) - len(indices)
            for name, dims in lost.items()
            for dim, indices in dims.items()
        }
        units = len(np.unique(view.outputs[root]))
        if place:  # heads are counted where a name says so: their features may be as many
            sizes.pop(units, None)
        return [
            (owner, key, units - len(components) if heads else sizes[value])
            for key, value in vars(module.get_submodule(owner)).items()
            if is_custom(module.get_submodule(owner)) and is_count(key, value)
            for heads in [place > 0 and value == units and "head" in key and "dim" not in key]
            if heads or value in sizes
        ]


class View:
    """One trace, its labels drawn together to components of what must go together."""

    def __init__(self, module: nn.Module, found: Trace) -> None:
        component, self._reasons = found.components()
        parameters = dict(module.named_parameters())
        self.size = int(component.max()) + 1

        def drawn(axes: Axes) -> Axes:
            return tuple(component[axis] for axis in axes)

        self.leaves = {name: drawn(axes) for name, axes in found.leaves.items()}
        self.shapes = {key: drawn(axes) for key, axes in found.shapes.items()}
        self.normalized = [drawn(axes) for axes in found.normalized]
        self._used = {id(parameters[name]) for name in self.leaves if name in parameters}
        self._cut = np.zeros(self.size, bool)
        for part in found.parts:
            self._cut[component[part]] = True
        self._plain = int(component[PLAIN])
        self._cut[self._plain] = False
        self.outputs = {
            name: _made(layer, self.leaves[key])
            for name, layer in module.named_modules()
            if isinstance(layer, LAYERS)
            for key in [f"{name}.weight" if name else "weight"]
            if key in self.leaves
        }

    def uses(self, layer: nn.Module) -> bool:
        """Tell whether the pass read a layer's parameters."""
        return any(id(parameter) in self._used for parameter in layer.parameters())

    def groups(self) -> list[Group]:
        """Return a group for each layer whose outputs no earlier layer stands for."""
        owner = np.full(self.size, -1)
        for number, axis in reversed(list(enumerate(self.outputs.values()))):
            owner[axis] = number
        owner[self._plain] = -1
        layers, labels = self._members(owner)
        return [
            self._group(root, axis, owner[axis] == number, layers[number], labels[number])
            for number, (root, axis) in enumerate(self.outputs.items())
            if number in labels
        ]

    def cut_groups(self) -> list[Group]:
        """Return the groups of dimensions that are cut into parts and may go."""
        return [
            group
            for group in self.groups()
            if not group.reason and self._cut[self.outputs[group.root]].any()
        ]

    def _members(self, owner: Labels) -> tuple[dict[int, set[str]], dict[int, list[str]]]:
        """Return the modules and the makers of channels, by the number of their group's root."""
        layers: dict[int, set[str]] = {}
        labels: dict[int, list[str]] = {}
        for name, axes in self.leaves.items():
            for axis in axes:
                for number in np.unique(owner[axis]).tolist():
                    layers.setdefault(number, set()).add(name.rpartition(".")[0])
        for name, axis in self.outputs.items():
            for number in np.unique(owner[axis]).tolist():
                labels.setdefault(number, []).append(name)
        labels.pop(-1, None)
        return layers, labels

    def _group(
        self, root: str, axis: Labels, own: Mask, layers: set[str], label: Sequence[str]
    ) -> Group:
        units = _units(axis)
        reasons = (self._reasons[one] for one in np.unique(axis).tolist() if one in self._reasons)
        reason = next(reasons, "")
        if not reason and not own.all():
            reason = "some of its channels hang on those of another layer"
        if not reason and units is None:
            reason = "its channels hang together unevenly"
        units = np.arange(len(axis))[:, None] if units is None else units
        return Group(root, ", ".join(label), units, frozenset(layers), reason)


def _made(layer: nn.Module, weight: Axes) -> Labels:
    """Return the outputs of a layer whose weight has these axes."""
    if not getattr(layer, "transposed", False):
        return weight[0]
    if layer.groups == layer.in_channels:
        return np.repeat(weight[0], len(weight[1]))
    return np.tile(weight[1], int(layer.groups))  # type: ignore[arg-type]


def _units(axis: Labels) -> Labels | None:
    """Return which outputs go together, if they stand in equal parts of equal blocks."""
    _, first, counts = np.unique(axis, return_index=True, return_counts=True)
    if len(set(counts.tolist())) != 1:
        return None
    ordered = axis[np.sort(first)]
    units = np.stack([np.flatnonzero(axis == component) for component in ordered])
    group = Group("", "", units, frozenset(), "")
    if units.shape[1] % group.block:
        return None
    regular = np.arange(units.size).reshape(group.divisions, len(units), group.block)
    return units if np.array_equal(regular.swapaxes(0, 1).reshape(units.shape), units) else None


def common_module(tensors: Iterable[str]) -> str:
    """Name the innermost module that holds all these tensors."""
    paths = [name.split(".")[:-1] for name in tensors]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


@torch.no_grad()
def shrink_tensors(module: nn.Module, losses: Mapping[str, Mapping[int, Labels]]) -> None:
    """Replace tensors of ``module`` by smaller ones."""
    smaller = {}
    for name, dims in losses.items():
        holder, _, key = name.rpartition(".")
        new = getattr(module.get_submodule(holder), key).detach()
        for dim, indices in dims.items():
            kept = np.setdiff1d(np.arange(new.shape[dim]), indices)
            new = new.index_select(dim, torch.from_numpy(kept).to(new.device))
        smaller[name] = new
    replace_tensors(module, smaller)


def replace_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace tensors of ``module`` by others, by name, wherever they are shared."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((part, key))
    for name, new in tensors.items():
        holder, _, key = name.rpartition(".")
        old: Any = getattr(module.get_submodule(holder), key)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for owner, attribute in owners[id(old)]:
            setattr(owner, attribute, new)
    for part in module.modules():
        match_tensors(part)


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Take back afterwards what `Graph.remove` does to ``module`` inside."""
    saved = [(part, _snapshot(part)) for part in module.modules()]
    try:
        yield
    finally:
        for part, state in saved:
            part.__dict__.clear()
            part.__dict__.update(state)


def _snapshot(part: nn.Module) -> dict[str, Any]:
    # Dictionaries are altered in place; tensors are replaced.
    return {
        key: copy.copy(value) if isinstance(value, dict | list) else value
        for key, value in part.__dict__.items()
    }
