"""Which modules stand still, and until when.

A group names modules by shell patterns; a module's parts belong to it, and the first group
that fits counts. Modules are known by the names of what they hold (parameters and buffers),
so that a module and the graph exported from it are frozen by the same words.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from deploykit.errors import ModelError
from deploykit.recipe.sections import GroupSection


def set_mode(module: nn.Module, training: bool, frozen: frozenset[str] = frozenset()) -> None:
    """Put a module into training or evaluation, its frozen statistics always into the latter.

    Args:
        module: an ordinary module; exported graphs bring a function of their own.
        training: whether dropout drops and BatchNorm uses the batch's statistics.
        frozen: names of modules whose running statistics must not move.
    """
    module.train(training)
    for name, child in module.named_modules():
        if name in frozen and isinstance(getattr(child, "running_mean", None), Tensor):
            child.eval()


@dataclass(frozen=True)
class Groups:
    """The groups of a plan, matched with a module.

    Attributes:
        sections: as the recipe has them.
        members: the group (index into ``sections``) of each module that is in one.
        held: parameters that were frozen before training began and stay so.
    """

    sections: tuple[GroupSection, ...]
    members: Mapping[str, int]
    held: frozenset[str]

    def of_parameter(self, name: str) -> int | None:
        """Return the group of a parameter, or None."""
        return self.members.get(owner(name))

    def lr_factor(self, name: str) -> float:
        """Return what multiplies the learning rate of a parameter."""
        group = self.of_parameter(name)
        return 1.0 if group is None else self.sections[group].lr_factor

    def frozen_modules(self, epoch: int) -> frozenset[str]:
        """Return the modules that stand still in an epoch."""
        thawed = {
            index
            for index, section in enumerate(self.sections)
            if section.thaw_epoch != "never" and section.thaw_epoch <= epoch
        }
        return frozenset(name for name, group in self.members.items() if group not in thawed)

    def trained(self, module: nn.Module, epoch: int) -> tuple[str, ...]:
        """Return the names of the parameters that learn in an epoch."""
        frozen = self.frozen_modules(epoch)
        return tuple(
            name
            for name, _ in module.named_parameters()
            if name not in self.held and owner(name) not in frozen
        )


def match_groups(module: nn.Module, sections: Sequence[GroupSection]) -> Groups:
    """Find the modules that each group's patterns name.

    Raises:
        ModelError: a pattern fits no module, or nothing learns in the first epoch.
    """
    owners = _owners(module)
    names = sorted({parent for name in owners for parent in _parents(name)})
    for index, section in enumerate(sections):
        for pattern in section.modules:
            _require_match(f"train.groups[{index}].modules", pattern, names)
    matches = {name: _first_match(name, sections) for name in owners}
    members = {name: index for name, index in matches.items() if index is not None}
    held = frozenset(name for name, p in module.named_parameters() if not p.requires_grad)
    groups = Groups(tuple(sections), members, held)
    if not groups.trained(module, epoch=0):
        raise ModelError(
            "train.groups: expected some parameters to learn in epoch 0, got none; "
            "let a group thaw at epoch 0"
        )
    return groups


def owner(tensor_name: str) -> str:
    """Return the name of the module that holds a parameter or buffer."""
    return tensor_name.rpartition(".")[0]


def _owners(module: nn.Module) -> tuple[str, ...]:
    tensors = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    return tuple(dict.fromkeys(owner(name) for name in tensors))


def _parents(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it."""
    while name:
        yield name
        name = owner(name)
    yield ""


def _first_match(name: str, sections: Sequence[GroupSection]) -> int | None:
    for index, section in enumerate(sections):
        if any(
            fnmatchcase(part, pattern) for part in _parents(name) for pattern in section.modules
        ):
            return index
    return None


def _require_match(where: str, pattern: str, names: Sequence[str]) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    near = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.3) or names[1:4]
    raise ModelError(
        f"{where}: expected a pattern that fits a module, got {pattern!r}; "
        f"the nearest names are {', '.join(near)}"
    )
