"""A training stopped at any step, in one file: safetensors with JSON in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deploykit.artifacts import JsonDict
from deploykit.errors import ModelError, UsageError
from deploykit.publish import write_atomic

SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stands.

    Attributes:
        kinds: tensors by kind (weights, optimizer, ...) and name.
        state: JSON beside them.
    """

    kinds: Mapping[str, Mapping[str, Tensor]]
    state: JsonDict


def write_checkpoint(path: Path, checkpoint: Checkpoint, identity: JsonDict) -> None:
    """Write a checkpoint so that ``path`` holds the complete old or the complete new one.

    Args:
        path: file to write; its folder is made if need be.
        checkpoint: what to keep.
        identity: JSON that says whose checkpoint it is, see `read_checkpoint`.
    """
    # A copy each: tied weights share memory, which the format refuses.
    tensors = {
        f"{kind}/{name}": value.detach().to("cpu", copy=True).contiguous()
        for kind, part in checkpoint.kinds.items()
        for name, value in part.items()
    }
    header = json.dumps({"schema": SCHEMA, "identity": identity, "state": checkpoint.state})
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"header": header, "sha256": _digest(header, tensors)}
    write_atomic(path, save(tensors, metadata=metadata))


def read_checkpoint(path: Path, identity: JsonDict) -> Checkpoint | None:
    """Read a checkpoint, or return None if there is none.

    Raises:
        ModelError: the file is damaged.
        UsageError: it belongs to a training of another identity.
    """
    if not path.exists():
        return None
    header, tensors = _read_verified(path)
    found = {"schema": header.get("schema"), **header.get("identity", {})}
    differences = list(_differences(found, {"schema": SCHEMA, **_plain(identity)}))
    if differences:
        raise UsageError(
            f"{path}: expected a checkpoint of this very training, got another "
            f"({'; '.join(differences[:3])}); take back the change, or start anew with --force"
        )
    kinds: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        kinds[kind][name] = value
    return Checkpoint(kinds, header["state"])


def _read_verified(path: Path) -> tuple[JsonDict, dict[str, Tensor]]:
    fault = f"{path}: expected a complete checkpoint, got a damaged file"
    remedy = "remove it, and the stage starts anew"
    if not path.is_file():
        raise ModelError(f"{path}: expected a checkpoint, got something else; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{fault} ({error}); {remedy}") from error
    header = metadata.get("header", "")
    if metadata.get("sha256") != _digest(header, tensors):
        raise ModelError(f"{fault} (its checksum differs); {remedy}")
    value: JsonDict = json.loads(header)
    return value, tensors


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: JsonDict) -> JsonDict:
    """Return what JSON makes of a value: lists for tuples."""
    plain: JsonDict = json.loads(json.dumps(value))
    return plain


def _differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yield ``plan.epochs: 3 then, 5 now`` for every leaf that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif then != now:
        yield f"{where}: {_brief(then)} then, {_brief(now)} now"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
