"""Torch-Pruning's dependency graph, behind the few calls that pruning needs.

Fang et al., "DepGraph: Towards Any Structural Pruning", https://arxiv.org/abs/2301.12900.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch_pruning
from torch import nn

from deploykit.errors import CompressionError

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


class Graph:
    """Which channels of a module must go together.

    The module is put in evaluation mode and every parameter is made to require a gradient:
    the library traces through autograd and does not see frozen layers otherwise.
    """

    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        self.module = module.eval().requires_grad_(True)
        self.names = {part: name for name, part in module.named_modules()}
        self._graph = torch_pruning.DependencyGraph()
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                # Parameters outside layers are reported by name when their group is left alone.
                warnings.simplefilter("ignore")
                self._graph.build_dependency(module, example_inputs=example, verbose=False)
        except Exception as error:
            raise CompressionError(
                f"prune: the model cannot be traced ({type(error).__name__}: {error}); remove the "
                "prune section, or make the model's forward pass run on one tensor"
            ) from error

    def groups(self) -> list[Any]:
        """Return every group with all its channels; a group is a list of (dependency, indices)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(self._graph.get_all_groups(root_module_types=LAYERS))

    def group(self, root: str, channels: Sequence[int]) -> Any:
        """Return the group of layer ``root`` for some of its channels."""
        layer = self.module.get_submodule(root)
        pruner = self._graph.get_pruner_of_module(layer)
        return self._graph.get_pruning_group(layer, pruner.prune_out_channels, list(channels))

    def modules(self) -> list[nn.Module]:
        """Return the layers and the graph's own markers of operations."""
        return [part for part in self._graph.module2node if isinstance(part, nn.Module)]

    def root(self, group: Any) -> str:
        """Return the module name of the layer that stands for the group."""
        name: str = self.names[group[0].dep.target.module]
        return name

    def width(self, group: Any) -> int:
        """Return the output channels of the group's root."""
        return int(self._graph.get_out_channels(group[0].dep.target.module))

    def divisions(self, group: Any) -> int:
        """Return into how many equal parts grouped layers divide the channels."""
        found = [1]
        for dependency, _ in group:
            layer = dependency.target.module
            depthwise = getattr(layer, "groups", 1) == getattr(layer, "out_channels", 0)
            if isinstance(layer, nn.modules.conv._ConvNd) and not depthwise:
                found.append(layer.groups)
        return max(found)

    def narrows_input(self, dependency: Any) -> bool:
        """Tell whether the dependency takes inputs, not outputs, from a layer."""
        handler = dependency.handler
        return bool(self._graph.is_in_channel_pruning_fn(handler)) and not bool(
            self._graph.is_out_channel_pruning_fn(handler)
        )

    def layers(self, group: Any) -> Iterator[tuple[str, nn.Module, bool]]:
        """Yield name, layer and whether its inputs are meant, for each named layer."""
        for dependency, _ in group:
            layer = dependency.target.module
            if layer in self.names:
                yield self.names[layer], layer, self.narrows_input(dependency)

    def label(self, group: Any) -> str:
        """Name the layers whose outputs the group holds."""
        names = [
            name
            for name, layer, inputs in self.layers(group)
            if isinstance(layer, LAYERS) and not inputs
        ]
        return ", ".join(dict.fromkeys(names))
