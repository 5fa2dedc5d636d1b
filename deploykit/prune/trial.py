"""Proof that removing channels is what it should be, before a model is touched.

Removing channels rightly gives the same outputs as setting them to zero. A wrong removal,
for instance across a shortcut that shifts channels, pairs channels that do not belong together;
often the shapes still fit and nothing else tells. So each removal is tried on a twin of the
model, in float64 and with random parameters: there neither dead nor equal channels hide a
wrong pair, and the two outputs agree to rounding or not at all.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.prune.graph import Graph

# Relative to the largest output; true removals agree to about 1e-14 in float64.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
CHECKED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.PReLU,
)


class Twin:
    """A copy of a module with random parameters, on which removals are tried and undone."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self._batch = torch.randn(2, *example.shape[1:], generator=generator)
        twin = _randomized(copy.deepcopy(module).cpu().float().eval(), generator)
        self._dtype = torch.float64
        try:
            self._graph = self._open(twin)
        except RuntimeError:  # the model makes float32 tensors of its own
            self._dtype = torch.float32
            self._graph = self._open(twin)
        self._outputs = self._run()

    def fault(self, removal: Mapping[str, Sequence[int]]) -> str:
        """Say what is wrong with removing these channels, by root, or return ``""``."""
        try:
            groups = [self._graph.group(root, channels) for root, channels in removal.items()]
            reasons = [reason for group in groups if (reason := _unknown(self._graph, group))]
            if reasons:
                return reasons[0]
            with self._undone():
                for group in groups:
                    _silence(self._graph, group)
                silenced = self._run()
            with self._undone():
                for root, channels in removal.items():
                    # Indices shift where groups meet, so each is asked for when its turn comes.
                    self._graph.group(root, channels).prune(record_history=False)
                pruned = self._run()
        except Exception as error:  # noqa: BLE001 - a wrongly pruned model may fail in any way
            return f"the pruned model does not run ({type(error).__name__}: {_first_line(error)})"
        return self._difference(pruned, silenced)

    def _difference(self, pruned: Tensor, silenced: Tensor) -> str:
        if pruned.shape != self._outputs.shape:
            return "it carries the model's output"
        size = float(self._outputs.abs().max()) * TOLERANCES[self._dtype]
        # Written so that NaN counts as a fault.
        if not float((silenced - self._outputs).abs().max()) > size:
            return "its channels have no effect that could be checked"
        if not float((pruned - silenced).abs().max()) <= size:
            return "removing its channels does not equal setting them to zero"
        return ""

    def _open(self, twin: nn.Module) -> Graph:
        twin = twin.to(self._dtype)
        self._batch = self._batch.to(self._dtype)
        with torch.no_grad():
            twin(self._batch)
        return Graph(twin, self._batch)

    @torch.no_grad()
    def _run(self) -> Tensor:
        outputs: Tensor = self._graph.module(self._batch)
        return outputs

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Restore every module afterwards, the graph's own markers included."""
        saved = [(module, _snapshot(module)) for module in self._graph.modules()]
        try:
            yield
        finally:
            for module, state in saved:
                module.__dict__.clear()
                module.__dict__.update(state)


def _snapshot(module: nn.Module) -> dict[str, Any]:
    # Lists and dicts are altered in place by the library; tensors are replaced.
    return {
        key: copy.copy(value) if isinstance(value, dict | list) else value
        for key, value in module.__dict__.items()
    }


@torch.no_grad()
def _randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give every parameter and statistic a random value that keeps signals alive."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.ndim > 1:
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
        elif name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
        else:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


def _unknown(graph: Graph, group: Any) -> str:
    """Name a layer of the group of which removing is not the same as setting to zero."""
    for dependency, _ in group:
        layer = dependency.target.module
        if isinstance(layer, nn.Parameter):
            return "a parameter outside of any layer follows its channels"
        if layer in graph.names and not isinstance(layer, CHECKED) and _has_tensors(layer):
            return f"{graph.names[layer]} ({type(layer).__name__}) mixes or scales its channels"
    return ""


def _has_tensors(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters()) or any(True for _ in layer.buffers())


@torch.no_grad()
def _silence(graph: Graph, group: Any) -> None:
    """Set the group's channels to zero where they are made and where they are read."""
    for dependency, channels in group:
        layer = dependency.target.module
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            _silence_layer(layer, torch.tensor(channels), graph.narrows_input(dependency))
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for key in ("weight", "bias", "running_mean"):
                _zero(layer, key, (torch.tensor(channels),))


def _silence_layer(layer: nn.Module, channels: Tensor, inputs: bool) -> None:
    weight = layer.get_parameter("weight")
    groups = getattr(layer, "groups", 1)
    transposed = getattr(layer, "transposed", False)
    if not inputs:
        _zero(layer, "bias", (channels,))
    if inputs == transposed:
        _zero(layer, "weight", (channels,))
        return
    # The second dimension counts within a group: (groups, first / groups, second, ...).
    second = weight.shape[1]
    split = (groups, weight.shape[0] // groups, *weight.shape[1:])
    index = (channels // second, slice(None), channels % second)
    _zero(layer, "weight", index, split)


def _zero(
    layer: nn.Module, key: str, index: tuple[Any, ...], split: tuple[int, ...] | None = None
) -> None:
    """Replace a tensor of the layer by a copy that is zero at ``index``."""
    old = getattr(layer, key, None)
    if old is None:
        return
    new = old.detach().clone()
    (new if split is None else new.view(split))[index] = 0
    setattr(layer, key, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]
