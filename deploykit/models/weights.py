"""Weights from a file, checked whole before the first is loaded."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from deploykit.errors import ModelError

NESTS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "model.", "_orig_mod.")
LISTED = 20


def load_weights(module: nn.Module, path: Path, *, classes: int | None = None) -> None:
    """Load every weight of ``module`` from ``path``, or none.

    Args:
        module: altered in place, and only if everything fits.
        path: ``.safetensors``, or a torch file of plain tensors, which may stand under
            ``state_dict`` or ``model`` and bear prefixes such as ``module.``.
        classes: number of logits; makes the error about a foreign classifier plain.

    Raises:
        ModelError: unreadable, or not these weights; every fault is listed.
    """
    assign_weights(module, read_weights(path), path, classes=classes)


def read_weights(path: Path) -> dict[str, Any]:
    """Read the tensors of ``path`` by name, without running code from it.

    Raises:
        ModelError: no such file, or it holds something else than plain tensors.
    """
    if not path.is_file():
        raise ModelError(f"model.weights: no such file: {path}; put the weights there")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"model.weights: {path} is not a safetensors file ({error}); fetch or save it anew"
            ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage surfaces as nearly any exception
        raise ModelError(
            f"model.weights: {path} is damaged or holds more than plain tensors "
            f"({type(error).__name__}); save model.state_dict() with torch.save or safetensors"
        ) from error
    return _unnest(content, path)


def assign_weights(
    module: nn.Module, tensors: Mapping[str, Any], path: Path, *, classes: int | None = None
) -> None:
    """Load ``tensors`` into ``module``, or raise and leave it as it was.

    Raises:
        ModelError: names, shapes, dtypes or values do not fit; every fault is listed.
    """
    expected = module.state_dict()
    found = _strip_prefixes(tensors, expected)
    faults = _name_faults(found, expected) + _tensor_faults(found, expected, classes)
    if faults:
        raise ModelError(f"model.weights: {path} does not fit the model: " + "; ".join(faults))
    # Older torch did not store the batch counters of BatchNorm.
    load_tensors(module, {**expected, **found})


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load all tensors of ``module``, as the module of this version names and shapes them.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    # Versions of modules stand beside the names in torch's own dictionaries only, and modules
    # whose layout once changed (MNASNet) refuse tensors without.
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(module.state_dict(), "_metadata", None)
    module.load_state_dict(state)


def _unnest(content: object, path: Path) -> dict[str, Any]:
    for nest in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise ModelError(
            f"model.weights: {path}: expected tensors by name, got {type(content).__name__}; "
            "save model.state_dict()"
        )
    return {str(key): value for key, value in content.items()}


def _strip_prefixes(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Drop known prefixes that every name bears, as long as more names fit for it."""
    best = current = dict(found)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in current)), None):
        current = {key.removeprefix(prefix): value for key, value in current.items()}
        if len(current.keys() & expected.keys()) > len(best.keys() & expected.keys()):
            best = current
        if not all(current):
            break
    return best


def _name_faults(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    missing = [
        key for key in expected if key not in found and not key.endswith("num_batches_tracked")
    ]
    extra = [key for key in found if key not in expected]
    faults = []
    if missing:
        faults.append(f"missing {_listed(missing)}")
    if extra:
        faults.append(f"unknown {_listed(extra)}")
    return faults


def _tensor_faults(
    found: Mapping[str, Any], expected: Mapping[str, torch.Tensor], classes: int | None
) -> list[str]:
    faults = []
    for key, want in expected.items():
        if key in found:
            fault = _tensor_fault(found[key], want, classes)
            if fault:
                faults.append(f"{key}: {fault}")
    return faults[:LISTED] + ([f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else [])


def _tensor_fault(got: object, want: torch.Tensor, classes: int | None) -> str:
    if not isinstance(got, torch.Tensor):
        return f"expected a tensor, got {type(got).__name__}"
    if got.shape != want.shape:
        shapes = f"expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
        if _other_classes(got, want, classes):
            return (
                f"{shapes}: its classifier tells {len(got)} classes apart, the data have "
                f"{classes}; take weights for {classes} classes"
            )
        return shapes
    same_kind = got.is_floating_point() == want.is_floating_point()
    if not same_kind or torch.promote_types(got.dtype, want.dtype) != want.dtype:
        return f"expected {want.dtype}, got {got.dtype}"
    # Infinity is right where the model itself has it, as in a mask.
    if got.is_floating_point() and not bool((got.isfinite() | (got == want)).all()):
        return "holds NaN or infinity"
    return ""


def _other_classes(got: torch.Tensor, want: torch.Tensor, classes: int | None) -> bool:
    return (
        got.ndim == want.ndim > 0
        and want.shape[0] == classes != got.shape[0]
        and got.shape[1:] == want.shape[1:]
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
