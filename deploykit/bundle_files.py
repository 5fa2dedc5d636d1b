"""The bytes of a bundle's files: golden samples, their archive, the sealed manifest."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit import runtime

# First onnxruntime release that implements an opset, and one that reads an IR version, after
# https://onnxruntime.ai/docs/reference/compatibility.html. What is newer than these is
# promised only for the release that verified the bundle.
ONNXRUNTIME_BY_OPSET = {19: "1.16.0", 20: "1.17.0", 21: "1.18.0", 22: "1.21.0"}
ONNXRUNTIME_BY_IR = {9: "1.16.0", 10: "1.18.0"}
MAX_GOLDEN = 1000


@dataclass(frozen=True)
class Golden:
    """Samples that prove a bundle wherever it is opened.

    Attributes:
        items: as a client has them: the bytes of a PNG or JPEG file, or an array.
        inputs: what the model is fed, ``(N, ...)``; for images uint8 ``(N, H, W, C)``.
        outputs: what it answered, ``(N, classes)``.
    """

    items: Sequence[bytes | np.ndarray]
    inputs: np.ndarray
    outputs: np.ndarray


def min_onnxruntime(model: bytes) -> str:
    """Return the first release that reads the model's opset and IR version."""
    import onnx
    import onnxruntime

    proto = onnx.load_model_from_string(model)
    opset = max(entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"})
    needs = (
        ONNXRUNTIME_BY_OPSET.get(max(opset, min(ONNXRUNTIME_BY_OPSET))),
        ONNXRUNTIME_BY_IR.get(max(proto.ir_version, min(ONNXRUNTIME_BY_IR))),
    )
    known = [version for version in needs if version is not None]
    if len(known) < len(needs):
        return ".".join(str(n) for n in runtime.version_tuple(onnxruntime.__version__))
    return max(known, key=runtime.version_tuple)


def golden_files(golden: Golden) -> dict[str, bytes]:
    """Name the golden samples: ``golden/000.png`` and so on, and their expected tensors."""
    count = len(golden.items)
    if not count == len(golden.inputs) == len(golden.outputs) or not 0 < count <= MAX_GOLDEN:
        raise ValueError(
            f"golden: expected 1 to {MAX_GOLDEN} items, inputs and outputs each, got {count}, "
            f"{len(golden.inputs)} and {len(golden.outputs)}"
        )
    files = {}
    for index, item in enumerate(golden.items):
        data = item if isinstance(item, bytes) else npy_bytes(item)
        files[f"golden/{index:03d}.{_suffix(data)}"] = data
    return files | {runtime.EXPECTED: npz_bytes(inputs=golden.inputs, outputs=golden.outputs)}


def _suffix(data: bytes) -> str:
    for magic, suffix in ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpg"), (b"\x93NUMPY", "npy")):
        if data.startswith(magic):
            return suffix
    raise ValueError("golden: expected PNG, JPEG or .npy bytes")


def npy_bytes(array: np.ndarray) -> bytes:
    """Return ``array`` as a ``.npy`` file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), (1, 0), allow_pickle=False)
    return file.getvalue()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """Return ``arrays`` as a ``.npz`` file: stored, without the time of day."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(arrays.items()):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, npy_bytes(array))
    return file.getvalue()


def seal(manifest: Mapping[str, Any], contents: Mapping[str, bytes]) -> bytes:
    """Return the manifest's bytes, with the hashes of the files and its own digest."""
    files = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in contents.items()
    }
    # Once through JSON: keys that were numbers sort as the strings that they become.
    sealed = json.loads(json.dumps({**manifest, "files": files}, allow_nan=False))
    return runtime.canonical_json({**sealed, "digest": runtime.digest_of(sealed)})
