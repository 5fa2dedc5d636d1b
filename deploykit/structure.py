"""A candidate on disk: what it is made of as JSON, its weights as safetensors, no pickle.

A folder holds ``structure.json`` and ``model.safetensors``. The module is rebuilt in the order
in which it came to be: its own factory, the folded input, the replaced operators, the removed
blocks, the narrowed widths, the weights.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from deploykit.artifacts import Candidate, JsonDict, Signature
from deploykit.depth import remove_blocks
from deploykit.errors import ModelError
from deploykit.models.build import call_factory, drawing
from deploykit.models.modes import evaluating
from deploykit.models.normalization import add_biases
from deploykit.models.surgery import replace_operators
from deploykit.models.weights import assign_weights
from deploykit.publish import write_atomic, write_json
from deploykit.widths import set_widths

SCHEMA = 1
KEYS = {"schema", "versions", "weights_sha256", "stage", "structure", "signature", "probe", "notes"}
WEIGHTS, STRUCTURE = "model.safetensors", "structure.json"
# A probe tells a changed factory from the one that was saved; other kernels may differ in rounding.
PROBE_TOLERANCE = 1e-3


def save_candidate(candidate: Candidate, folder: Path) -> None:
    """Write ``candidate`` to ``folder``; the structure last, so that it vouches for the weights.

    Raises:
        ModelError: the candidate could not be rebuilt from what would be written.
    """
    name = candidate.structure["model"]["name"]
    if str(name).startswith("python:"):
        raise ModelError(
            f"model: {name} was given as an object and cannot be rebuilt in another process; "
            'pass factory="path/to/file.py:function", the function that builds it'
        )
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in candidate.module.state_dict().items()
    }
    weights = save(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STRUCTURE).unlink(missing_ok=True)  # never old words beside new weights
    write_atomic(folder / WEIGHTS, weights)
    write_json(
        folder / STRUCTURE,
        {
            "schema": SCHEMA,
            "versions": _versions(candidate.structure),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "stage": candidate.stage,
            "structure": dict(candidate.structure),
            "signature": candidate.signature.to_json(),
            "probe": _probe(candidate),
            "notes": dict(candidate.notes),
        },
    )


def load_candidate(folder: Path, *, base: Path) -> Candidate:
    """Rebuild the candidate in ``folder``; its outputs are those of the saved one, bit for bit.

    Args:
        folder: what `save_candidate` wrote.
        base: folder that a user's ``file.py:function`` is relative to; the recipe's.

    Raises:
        ModelError: damaged, written by a newer version, or no longer what its factory builds.
        MissingDependency: the factory's library is not installed.
    """
    content = _read(folder / STRUCTURE)
    _check_versions(folder, content["versions"])
    structure = content["structure"]
    module = rebuild(structure, base=base)
    tensors = _read_tensors(folder / WEIGHTS, content["weights_sha256"])
    assign_weights(module, tensors, folder / WEIGHTS, classes=structure["classes"])
    candidate = Candidate(
        module=module.eval(),
        signature=Signature.from_json(content["signature"]),
        structure=structure,
        stage=content["stage"],
        notes=content["notes"],
    )
    _check_probe(folder, candidate, content["probe"])
    return candidate


def read_structure(folder: Path) -> Mapping[str, Any]:
    """Return the structure of the candidate in ``folder``.

    Raises:
        ModelError: damaged, or written by a newer version.
    """
    structure: Mapping[str, Any] = _read(folder / STRUCTURE)["structure"]
    return structure


def rebuild(structure: Mapping[str, Any], *, base: Path) -> nn.Module:
    """Build the module that ``structure`` describes, with fresh weights.

    Raises:
        ModelError: the factory no longer builds a module that the structure fits.
    """
    # What a factory draws need not be among the weights.
    with drawing(structure["model"].get("seed", 0)):
        module = call_factory(
            structure["model"]["name"],
            structure["model"]["arguments"],
            classes=structure["classes"],
            sample_shape=tuple(structure["sample_shape"]),
            base=base,
        )
    try:
        add_biases(module, structure.get("input", {}).get("bias_added", []))
        replace_operators(module, structure.get("surgery", {}))
        remove_blocks(module, structure.get("removed", []))
        set_widths(module, structure.get("widths", {}))
    except AttributeError as error:
        raise ModelError(
            f"structure.json: {structure['model']['name']} builds another model now: {error}; "
            "restore the factory that the candidate was made with"
        ) from error
    return module


def example_input(candidate: Candidate, batch: int, seed: int = 0) -> torch.Tensor:
    """Return random float32 input for the candidate's module: ``(N, C, H, W)`` or ``(N, ...)``."""
    shape = tuple(candidate.structure["sample_shape"])
    if candidate.signature.takes_images:
        shape = (shape[2], *shape[:2])
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def _versions(structure: Mapping[str, Any]) -> dict[str, str]:
    names = ["deploykit", "torch"] + (["torchao"] if structure.get("quantization") else [])
    return {name: version(name) for name in names}


def _check_versions(folder: Path, written: Mapping[str, str]) -> None:
    """Refuse what a newer library wrote; older files are kept readable by the libraries."""
    for name, needed in written.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "0"
        if _release(found) < _release(needed):
            raise ModelError(
                f"{folder}: written with {name} {needed}, which {name} {found} cannot be relied "
                f"on to rebuild; pip install '{name}>={needed.partition('+')[0]}'"
            )


def _release(text: str) -> tuple[int, ...]:
    """Return major and minor of a version such as ``2.13.0+cpu``."""
    parts = text.partition("+")[0].split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)


def _read(path: Path) -> JsonDict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such candidate; let compress make it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: unreadable ({error}); let compress make it anew") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA or set(content) != KEYS:
        raise ModelError(
            f"{path}: expected a candidate of schema {SCHEMA} with {', '.join(sorted(KEYS))}, got "
            f"schema {found!r}; read it with the deploykit that wrote it"
        )
    read: JsonDict = content
    return read


def _read_tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: unreadable ({error}); let compress make it anew") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ModelError(
            f"{path}: not the weights that {STRUCTURE} was written for; let compress make it anew"
        )
    return load(data)


@torch.no_grad()
def _outputs(candidate: Candidate) -> torch.Tensor:
    """Answer a fixed random batch."""
    parameter = next(candidate.module.parameters(), torch.empty(0))
    with evaluating(candidate.module) as module:
        answer: torch.Tensor = module(
            example_input(candidate, batch=2).to(parameter.device, parameter.dtype)
        )
    return answer.float().cpu()


def _probe(candidate: Candidate) -> list[list[float]]:
    outputs = _outputs(candidate)
    if not bool(torch.isfinite(outputs).all()):
        raise ModelError("model: answers NaN or infinity; lower the learning rate and train anew")
    return [[float(value) for value in row.flatten()] for row in outputs]


def _check_probe(folder: Path, candidate: Candidate, probe: list[list[float]]) -> None:
    expected, got = torch.tensor(probe), _outputs(candidate).flatten(1)
    scale = max(1.0, float(expected.abs().max()))
    if expected.shape != got.shape or float((expected - got).abs().max()) > PROBE_TOLERANCE * scale:
        raise ModelError(
            f"{folder}: the rebuilt model answers otherwise than the saved one; its factory "
            f"({candidate.structure['model']['name']}) has changed, or this torch computes "
            "something else: restore them, or run compress anew"
        )
