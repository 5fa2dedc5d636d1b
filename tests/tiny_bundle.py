"""A bundle of a linear model on 4 x 4 grey images (or on 3 numbers), made in milliseconds."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.bundle import Golden, write_bundle
from deploykit.targets import TARGETS

LABELS = ("circle", "square", "star")
PREPROCESS: dict[str, Any] = {
    "height": 4,
    "width": 4,
    "channels": 1,
    "filter": "bilinear",
    "antialias": True,
    "fit": "stretch",
    "mean": [0.5],
    "std": [0.5],
    "exif": True,
    "alpha": "white",
}


def png_bytes(pixels: np.ndarray, **options: Any) -> bytes:
    """Encode (H, W), (H, W, 1) or (H, W, 3) pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
        file, "PNG", **options
    )
    return file.getvalue()


def image_model(path: Path, *, opset: int = 20, ir_version: int = 9) -> OnnxModel:
    weight = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Mul", ["flat", "scale"], ["x"]),
        helper.make_node("Gemm", ["x", "weight", "bias"], ["logits"]),
    ]
    initializers = [
        numpy_helper.from_array(np.float32(1 / 255), "scale"),
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.zeros(3, np.float32), "bias"),
    ]
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, 4, 4, 1)),),
        (TensorSpec("logits", "float32", (-1, 3)),),
        LABELS,
        PREPROCESS,
    )
    return _write(path, nodes, initializers, signature, opset, ir_version)


def array_model(path: Path) -> OnnxModel:
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["logits"])]
    weight = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    signature = Signature(
        (TensorSpec("x", "float32", (-1, 3)),), (TensorSpec("logits", "float32", (-1, 2)),)
    )
    return _write(path, nodes, [numpy_helper.from_array(weight, "weight")], signature, 20, 9)


def _write(
    path: Path,
    nodes: list[Any],
    initializers: list[Any],
    signature: Signature,
    opset: int,
    ir_version: int,
) -> OnnxModel:
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    borders = [
        [
            helper.make_tensor_value_info(s.name, kinds[s.dtype], ["batch", *s.shape[1:]])
            for s in specs
        ]
        for specs in (signature.inputs, signature.outputs)
    ]
    graph = helper.make_graph(nodes, "tiny", *borders, initializers)
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return OnnxModel(path, signature, opset)


def golden_of(model: OnnxModel, count: int = 3) -> Golden:
    generator = np.random.default_rng(2)
    spec = model.signature.inputs[0]
    items: list[Any]
    if model.signature.takes_images:
        inputs = generator.integers(0, 256, (count, *spec.shape[1:]), dtype=np.uint8)
        items = [png_bytes(pixels) for pixels in inputs]
    else:
        inputs = generator.normal(size=(count, *spec.shape[1:])).astype(np.float32)
        items = list(inputs)
    session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {spec.name: inputs})[0]
    return Golden(items, inputs, outputs)


def make_bundle(folder: Path, *, arrays: bool = False, **changes: Any) -> Path:
    """Write a bundle at ``folder / "tiny"``; ``changes`` replace arguments of write_bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    make = array_model if arrays else image_model
    model = changes.pop("model", None) or make(folder / "source.onnx")
    arguments: dict[str, Any] = {
        "name": "tiny",
        "version": "1.0",
        "target": "cpu-x86-avx2",
        "threads": 1,
        "task": "classification" if arrays else "image-classification",
        "measured": {"accuracy": 0.5, "latency_ms": {1: 0.1, 32: 0.2, 4: None}},
        "measured_on": {"cpu": "a | b"},
        "verified_on": {"cpu": "c", "targets": list(TARGETS)},
        "tolerance": {"max_abs": 1e-4, "top1": True, "steps": None, "scale": None},
        "golden": changes.get("golden") or golden_of(model),
    }
    return write_bundle(model, folder / "tiny", **(arguments | changes))
