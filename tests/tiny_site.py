"""Bundles for browsers, made in a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import golden_of, make_bundle, png_bytes

from deploykit import runtime
from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.bundle import Golden
from deploykit.bundle_files import seal
from deploykit.web import site_files


def make_site(folder: Path, **changes: Any) -> Path:
    """Write a bundle with its page at ``folder / "tiny"``; ``changes`` as in ``make_bundle``."""
    return make_bundle(folder, **{"target": "web", "companions": [site_files], **changes})


def make_digits_site(folder: Path) -> Path:
    """Write one that knows scikit-learn's digits."""
    folder.mkdir(parents=True, exist_ok=True)
    model, pixels = digits_model(folder / "digits.onnx")
    inputs = pixels[:4]
    outputs = runtime.run_model(runtime.open_session(model.path.read_bytes()), inputs)
    golden = Golden([png_bytes(one) for one in inputs], inputs, outputs)
    return make_site(folder, model=model, golden=golden, name="digits")


def digits_model(path: Path) -> tuple[OnnxModel, np.ndarray]:
    """Learn all digits by a linear model; return it and the digits, uint8 (N, 8, 8, 1)."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    learned = LogisticRegression(C=0.01, max_iter=200)
    learned.fit(pixels.reshape(-1, 64) / 255, digits.target)
    held = {"scale": 1 / 255, "weight": learned.coef_.T, "bias": learned.intercept_}
    initializers = [numpy_helper.from_array(np.float32(one), name) for name, one in held.items()]
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["flat"]),
        helper.make_node("Mul", ["flat", "scale"], ["x"]),
        helper.make_node("Gemm", ["x", "weight", "bias"], ["logits"]),
    ]
    borders = [
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 8, 8, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
    ]
    graph = helper.make_graph(nodes, "digits", *borders, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return OnnxModel(path, _digits_signature(), 20), pixels


def _digits_signature() -> Signature:
    from tiny_bundle import PREPROCESS

    return Signature(
        (TensorSpec("image", "uint8", (-1, 8, 8, 1)),),
        (TensorSpec("logits", "float32", (-1, 10)),),
        tuple("0123456789"),
        {**PREPROCESS, "height": 8, "width": 8},
    )


def reseal(site: Path, **changes: Any) -> None:
    """Write a manifest that fits what now stands in the folder; ``changes`` replace its keys."""
    manifest = json.loads((site / "manifest.json").read_bytes())
    contents = {name: (site / name).read_bytes() for name in manifest["files"]}
    rest = {key: one for key, one in manifest.items() if key not in {"files", "digest"}}
    (site / "manifest.json").write_bytes(seal({**rest, **changes}, contents))


def array_site(folder: Path) -> Path:
    """Write one that takes 3 numbers."""
    from tiny_bundle import array_model

    folder.mkdir(parents=True, exist_ok=True)
    model = array_model(folder / "rows.onnx")
    return make_site(folder, model=model, golden=golden_of(model), task="classification")
