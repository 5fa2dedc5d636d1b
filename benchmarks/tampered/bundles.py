"""A small bundle, the two forms that it ships in, and what an alteration of it is."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploykit import runtime
from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.bundle import Golden, write_bundle

Files = Mapping[str, bytes]
SIDE, CLASSES, GOLDEN = 4, 3, 3
PREPROCESS: dict[str, Any] = {
    "height": SIDE,
    "width": SIDE,
    "channels": 1,
    "filter": "bilinear",
    "antialias": True,
    "fit": "stretch",
    "mean": [0.5],
    "std": [0.5],
    "exif": True,
    "alpha": "white",
}


@dataclass(frozen=True)
class Mutation:
    """One alteration.

    Attributes:
        kind: of the alteration, for the table.
        name: what exactly was done.
        make: writes the altered bundle into an empty folder and returns its path.
        judge: who has to refuse it: ``hashes`` (whoever reads the bundle), ``runner`` (`deploykit
            verify`, which knows the runner) or ``key`` (whoever has the public key).
    """

    kind: str
    name: str
    make: Callable[[Path], Path]
    judge: str = "hashes"


def folder_of(files: Files, place: Path) -> Path:
    """Write a bundle's files as a folder in ``place``."""
    folder = place / "bundle"
    folder.mkdir()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def file_of(data: bytes, place: Path) -> Path:
    """Write the bytes of a zip file in ``place``."""
    path = place / "bundle.zip"
    path.write_bytes(data)
    return path


def as_folder(kind: str, name: str, files: Files, judge: str = "hashes") -> Mutation:
    """Return the alteration that is a folder of these files."""
    return Mutation(kind, f"{name}, in a folder", partial(folder_of, files), judge)


def as_zip(kind: str, name: str, files: Files, judge: str = "hashes") -> Mutation:
    """Return the alteration that is a sound zip file of these files."""
    return Mutation(kind, f"{name}, in a zip file", partial(file_of, runtime.pack(files)), judge)


def seal(files: Files, **changes: Any) -> dict[str, bytes]:
    """Return the files with a manifest that is right about them again, as an attacker can."""
    rest = {name: data for name, data in files.items() if name not in UNNAMED}
    declared = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in rest.items()
    }
    manifest = {**json.loads(files[runtime.MANIFEST]), "files": declared, **changes}
    return {**files, runtime.MANIFEST: spell(manifest)}


UNNAMED = (runtime.MANIFEST, runtime.SIGNATURE)


def spell(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest with its digest, canonical."""
    return runtime.canonical_json({**manifest, "digest": runtime.digest_of(manifest)})


def read_files(folder: Path) -> dict[str, bytes]:
    """Return every file of a bundle's folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def small_bundle(folder: Path) -> Path:
    """Write a bundle of a linear model on images of 4 x 4 pixels."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32)
    inputs = random.integers(0, 256, (GOLDEN, SIDE, SIDE, 1), dtype=np.uint8)
    model = _model(folder / "model.onnx", weight)
    session = runtime.open_session(model.path.read_bytes())
    golden = Golden([_png(pixels) for pixels in inputs], inputs, runtime.run_model(session, inputs))
    return write_bundle(
        model,
        folder / "small",
        name="small",
        version="1",
        target=runtime.detect_cpu(),
        threads=1,
        task="image-classification",
        measured={"accuracy": 0.5, "latency_ms": {"1": 0.1, "32": None}},
        measured_on=None,
        verified_on={},
        tolerance={"max_abs": 1e-3, "top1": True, "steps": None, "scale": None},
        golden=golden,
    )


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(file, "PNG")
    return file.getvalue()


def _model(path: Path, weight: np.ndarray) -> OnnxModel:
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    borders = [
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
    ]
    graph = helper.make_graph(nodes, "small", *borders, [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, SIDE, SIDE, 1)),),
        (TensorSpec("logits", "float32", (-1, CLASSES)),),
        tuple("abc"),
        PREPROCESS,
    )
    return OnnxModel(path, signature, 20)
