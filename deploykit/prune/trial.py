"""Proof that removing channels is what it should be, before a model is touched.

Proven is: the pruned model computes what the model would if those channels were not there. The
reference is the model in its full shape, with the channels at zero in every parameter that makes
or reads them, and with each layer or group normalization told to leave them out of its mean and
variance. A wrong removal pairs channels that do not belong together; often the shapes still fit
and nothing else tells. So each removal is tried on a twin of the model, with random parameters:
there neither dead nor equal channels hide a wrong pair, and the two outputs agree to rounding or
not at all.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deploykit.cost import count_parameters
from deploykit.errors import first_line
from deploykit.models.attention import plain_attention
from deploykit.prune.graph import Graph, Mask, Removal, undone
from deploykit.prune.trace import Example, as_inputs, tensors_of

# Relative to the largest output; true removals agree to about 1e-14 in float64.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
# A model of more parameters is tried in float32: two copies of it in float64 would take gigabytes.
LARGE = 2**27


class Twin:
    """A copy of a module with random parameters, on which removals are tried and undone.

    Attributes:
        adjusted: roots whose removal changes counts that the model's own modules hold.
    """

    def __init__(self, module: nn.Module, example: Example) -> None:
        generator = torch.Generator().manual_seed(0)
        self.adjusted: set[str] = set()
        self._inputs = tuple(_random_input(tensor, generator) for tensor in as_inputs(example))
        twin = _randomized(copy.deepcopy(module).cpu().float().eval(), generator)
        twin.zero_grad(set_to_none=True)
        self._dtype = torch.float64 if count_parameters(twin) <= LARGE else torch.float32
        try:
            self._graph = self._open(twin)
        except Exception:  # noqa: BLE001 - the model makes float32 tensors of its own
            self._dtype = torch.float32
            self._graph = self._open(twin)
        self._outputs = self._run()
        self._effects = self._find_effects()
        self._trains_more = self._finds_more_in_training()

    def fault(self, removal: Removal) -> str:
        """Say what is wrong with removing these channels, by root, or return ``""``.

        A single group that fails is tried once more with the counts that the model's own modules
        hold (`adjusted`).
        """
        fault = self._fault(removal, self.adjusted & set(removal))
        if not fault or len(removal) > 1 or self.adjusted.intersection(removal):
            return fault
        if self._fault(removal, removal):
            return fault
        self.adjusted.update(removal)
        return ""

    def faults(self, removal: Removal) -> dict[str, str]:
        """Say what is wrong with each group, by root; groups without a fault are left out.

        All are tried together first, then in halves: parameters are random, so that faults of
        two groups do not make up for each other.
        """
        fault = self.fault(removal) if removal else ""
        if not fault or len(removal) == 1:
            return dict.fromkeys(removal, fault) if fault else {}
        roots = list(removal)
        halves = [roots[: len(roots) // 2], roots[len(roots) // 2 :]]
        found = {
            root: reason
            for half in halves
            for root, reason in self.faults({root: removal[root] for root in half}).items()
        }
        if found or not self.fault(removal):  # one of them may have been adjusted since
            return found
        return dict.fromkeys(halves[1], "it can be pruned alone, but not together with others")

    def _fault(self, removal: Removal, adjusted: Iterable[str]) -> str:
        if any(self._effects.get(root) is False for root in removal):
            return "its channels have no effect that could be checked"
        try:
            with undone(self._graph.module):
                self._graph.remove(self._graph.module, removal, adjusted)
                pruned = self._run()
                if self._trains_more:
                    self._train()
            with self._silenced(removal), _Norms(self._graph.kept_in_norms(removal)):
                silenced = self._run()
        except Exception as error:  # noqa: BLE001 - a wrongly pruned model may fail in any way
            reason = first_line(error)[:120]
            return f"the pruned model does not run ({type(error).__name__}: {reason})"
        return self._difference(pruned, silenced)

    def _difference(self, pruned: Sequence[Tensor], silenced: Sequence[Tensor]) -> str:
        if [x.shape for x in pruned] != [x.shape for x in self._outputs]:
            return "it changes the shape of the model's output"
        changed = False
        for whole, small, silent in zip(self._outputs, pruned, silenced, strict=True):
            size = _largest(whole) * TOLERANCES[self._dtype]
            changed |= _largest(silent - whole) > size
            # Written so that NaN counts as a fault.
            if not _largest(small - silent) <= size:
                return "removing its channels does not equal setting them to zero"
        return "" if changed else "its channels have no effect that could be checked"

    def _open(self, twin: nn.Module) -> Graph:
        twin = twin.to(self._dtype)
        self._inputs = tuple(
            x.to(self._dtype) if x.is_floating_point() else x for x in self._inputs
        )
        return Graph(twin, self._inputs)

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        with plain_attention():
            outputs = tree_leaves(self._graph.module(*self._inputs))
        return [x for x in outputs if isinstance(x, Tensor)]

    @torch.no_grad()
    def _train(self) -> None:
        """Run a copy as in training, where parts may run that evaluation leaves out."""
        copy.deepcopy(self._graph.module).train()(*self._inputs)

    def _finds_more_in_training(self) -> bool:
        """Tell whether training runs, and may read parameters that evaluation does not."""
        read = self._graph.views[0].leaves
        if all(name in read for name, _ in self._graph.module.named_parameters()):
            return False
        try:
            self._train()
        except Exception:  # noqa: BLE001 - nor would it run unpruned
            return False
        return True

    def _find_effects(self) -> dict[str, bool]:
        """Tell for each root whether the output depends on its channels, by one gradient.

        Groups are tried together, where the effect of one would cover for another without any.
        """
        module = self._graph.module
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            with torch.enable_grad(), plain_attention():
                outputs = tree_leaves(module(*self._inputs))
                learned = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
                weights = [torch.randn(x.shape, generator=_seeded()).to(x) for x in learned]
                torch.autograd.backward(learned, weights)
            gradients = {name: p.grad for name, p in module.named_parameters()}
        except RuntimeError:  # no gradient passes: `_difference` still compares outputs
            return {}
        finally:
            module.requires_grad_(False)
            for parameter in module.parameters():
                parameter.grad = None
        found = {root: gradients.get(f"{root}.weight") for root in self._graph.views[0].outputs}
        return {root: g is not None and _largest(g) > 0 for root, g in found.items()}

    @contextmanager
    @torch.no_grad()
    def _silenced(self, removal: Removal) -> Iterator[None]:
        """Set the channels to zero wherever they are made or read, for as long as it lasts."""
        tensors = dict(tensors_of(self._graph.module))
        saved = []
        try:
            for name, dims in self._graph.losses(removal).items():
                if name.endswith("running_var"):
                    continue
                for dim, indices in dims.items():
                    tensor, index = tensors[name].detach(), torch.from_numpy(indices)
                    saved.append((tensor, dim, index, tensor.index_select(dim, index)))
                    tensor.index_fill_(dim, index, 0)
            yield
        finally:
            for tensor, dim, index, values in reversed(saved):
                tensor.index_copy_(dim, index, values)


class _Norms(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets layer and group normalization see the kept channels only, call by call."""

    def __init__(self, kept: Sequence[Sequence[Mask]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = iter(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::native_layer_norm":
            x, shape, weight, bias, eps = args
            return _normalized(x, next(self._kept), len(shape), weight, bias, eps)
        if name == "aten::native_group_norm":
            x, weight, bias, _, channels, _, groups, eps = args
            (kept,) = next(self._kept)
            parts = x.reshape(len(x), groups, channels // groups, -1)
            wide = np.broadcast_to(kept.reshape(groups, -1, 1), parts.shape[1:])
            y, mean, deviation = _normalized(parts, [wide], 2, None, None, eps)
            affine = [v if v is None else v.view(-1, *[1] * (x.ndim - 2)) for v in (weight, bias)]
            return _affine(y.reshape(x.shape), *affine), mean, deviation
        return func(*args, **(kwargs or {}))


def _normalized(
    x: Tensor, kept: Sequence[Mask], dims: int, weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize the last ``dims`` dimensions by the mean and variance of what is kept."""
    mask = torch.from_numpy(np.array(kept[0]))
    for other in kept[1:]:
        mask = mask.unsqueeze(-1) & torch.from_numpy(np.array(other))
    mask, over = mask.to(x), tuple(range(-dims, 0))
    # The groups of a group normalization are a dimension of the mask, and keep equally many.
    count = mask.sum(over, keepdim=True)
    mean = (x * mask).sum(over, keepdim=True) / count
    variance = ((x - mean).square() * mask).sum(over, keepdim=True) / count
    return _affine((x - mean) * (variance + eps).rsqrt() * mask, weight, bias), mean, variance


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _random_input(example: Tensor, generator: torch.Generator) -> Tensor:
    """Return two samples: random numbers, or the first sample of what is no measurement."""
    if not example.is_floating_point():
        return example[:1].expand(2, *example.shape[1:]).clone()
    return torch.randn(2, *example.shape[1:], generator=generator)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


@torch.no_grad()
def _randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give every parameter and statistic a random value that keeps signals alive."""
    for name, tensor in tensors_of(module):
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.ndim > 1:
            # A table such as position embeddings, (1, tokens, features), has no inputs.
            fan_in = tensor[0].numel() if len(tensor) > 1 else 1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
        elif name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
        else:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module
