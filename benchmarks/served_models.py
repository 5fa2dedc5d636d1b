"""The models that the benchmarks of serving serve; latency does not hang on the weights.

ResNet-20 comes from the whole way from module to bundle, with fresh weights and noise for images,
and is kept in `runs/serving-model`; the others are made of ONNX nodes in a second.
"""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploykit import compress, export, runtime
from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.bundle import Golden, verify_bundle, write_bundle
from deploykit.errors import DeploykitError
from deploykit.targets import TARGETS

KEPT = Path(__file__).parents[1] / "runs" / "serving-model"
FEATURES, WIDTH, CLASSES = 512, 3072, 10
GOLDEN = 4


def read_options(about: str, **more: dict[str, Any]) -> argparse.Namespace:
    """Read ``--bundle``, ``--trial`` and whatever else a benchmark takes.

    Args:
        about: the benchmark, in a line.
        more: arguments of ``add_argument`` by the option's name.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--trial", action="store_true", help="under a minute; keeps no table")
    parser.add_argument(
        "--bundle", type=Path, metavar="FOLDER", help="default: ResNet-20 in int8, made once"
    )
    for name, how in more.items():
        parser.add_argument(f"--{name}", **how)
    return parser.parse_args()


def served_bundle(options: argparse.Namespace) -> Path:
    """Return the bundle that ``--bundle`` names, or ResNet-20 in int8, which is made once."""
    return Path(options.bundle) if options.bundle is not None else resnet20_bundle()


def about_model(options: argparse.Namespace) -> str:
    """Say what is served."""
    if options.bundle is None:
        return "ResNet-20 in int8 for 32x32 images, with fresh weights"
    manifest, _ = runtime.read_bundle(options.bundle)
    return f"{manifest['name']} {manifest['version']} for {manifest['target']}"


def resnet20_bundle(folder: Path = KEPT) -> Path:
    """Return a bundle of ResNet-20 quantized to int8; it is made where there is no sound one."""
    bundle = folder / "bundle"
    try:
        verify_bundle(bundle)
    except DeploykitError:
        run = compress(
            "resnet20",
            {"train": _noise(256), "validation": _noise(64), "test": _noise(64)},
            out=folder / "run",
            name="resnet20",
            normalize={"mean": (0.5,), "std": (0.25,)},
            quantize={"mode": "ptq"},
            verify={"min_agreement": 0.01},  # noise has no classes to agree on
            force=True,
        )
        export(run, out=bundle, force=True)
    return bundle


def _noise(count: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return pixels, np.arange(count) % CLASSES


def wide_bundle(folder: Path) -> Path:
    """Write a float net of three wide layers: one sample costs it nearly as much as many."""
    widths = (FEATURES, WIDTH, WIDTH, CLASSES)
    random = np.random.default_rng(0)
    nodes, weights, source = [], [], "x"
    for layer, shape in enumerate(itertools.pairwise(widths)):
        last = layer == len(widths) - 2
        weight = random.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"weight{layer}"))
        product = "logits" if last else f"product{layer}"
        nodes.append(helper.make_node("MatMul", [source, f"weight{layer}"], [product]))
        if not last:
            source = f"hidden{layer}"
            nodes.append(helper.make_node("Relu", [product], [source]))
    borders = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])]
        for name, size in (("x", FEATURES), ("logits", CLASSES))
    ]
    graph = helper.make_graph(nodes, "wide", *borders, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    signature = Signature(
        (TensorSpec("x", "float32", (-1, FEATURES)),),
        (TensorSpec("logits", "float32", (-1, CLASSES)),),
    )
    inputs = random.normal(size=(GOLDEN, FEATURES)).astype(np.float32)
    source_file = folder / "wide.onnx"
    source_file.write_bytes(model.SerializeToString())
    return _write(OnnxModel(source_file, signature, 20), inputs, folder / "wide", name="wide")


def raised_bundle(bundle: Path, destination: Path, version: str, by: float) -> Path:
    """Write a bundle of the same model whose logits are all higher, as another version."""
    manifest, contents = runtime.read_bundle(bundle)
    model = onnx.load_model_from_string(contents[runtime.MODEL])
    result = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_low" if name == result else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(by), "raised_by"))
    model.graph.node.append(helper.make_node("Add", [f"{result}_low", "raised_by"], [result]))
    source_file = destination.with_suffix(".onnx")
    source_file.write_bytes(model.SerializeToString())
    raised = OnnxModel(source_file, Signature.from_json(manifest), manifest["opset"])
    inputs = runtime.golden_inputs(contents)[:GOLDEN]
    return _write(raised, inputs, destination, name=manifest["name"], version=version)


def _write(
    model: OnnxModel, inputs: np.ndarray, destination: Path, *, name: str, version: str = "1.0"
) -> Path:
    outputs = runtime.run_model(runtime.open_session(model.path.read_bytes()), inputs)
    images = model.signature.takes_images
    return write_bundle(
        model,
        destination,
        name=name,
        version=version,
        target=runtime.detect_cpu(),
        threads=1,
        task="image-classification" if images else "classification",
        measured={},
        measured_on=None,
        verified_on={"targets": list(TARGETS)},
        tolerance={"max_abs": 1e-3, "top1": True},
        golden=Golden([png(one) for one in inputs] if images else list(inputs), inputs, outputs),
    )


def png(pixels: np.ndarray) -> bytes:
    """Return pixels ``(H, W, C)`` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Served:
    """What clients know of a served model, and the answers that they must get.

    Attributes:
        name: of the model.
        version: of the model.
        source: its input.
        result: its output.
        samples: ``(N, ...)`` as the model takes them.
        logits: ``(N, ...)``, each computed alone.
    """

    name: str
    version: str
    source: TensorSpec
    result: TensorSpec
    samples: np.ndarray
    logits: np.ndarray


def read_served(bundle: Path, count: int = 8) -> Served:
    """Open a bundle and answer ``count`` samples of noise with it, one by one."""
    manifest, contents = runtime.read_bundle(bundle)
    source, result = (TensorSpec.from_json(manifest[key][0]) for key in ("inputs", "outputs"))
    random, shape = np.random.default_rng(1), (count, *source.shape[1:])
    if source.dtype == "uint8":
        samples: np.ndarray = random.integers(0, 256, shape, dtype=np.uint8)
    else:
        samples = random.normal(size=shape).astype(source.dtype)
    session = runtime.open_model(manifest, contents, 1)
    logits = np.concatenate([runtime.run_model(session, one[np.newaxis]) for one in samples])
    return Served(manifest["name"], manifest["version"], source, result, samples, logits)


def agreeing(bundle: Path, served: Served, batches: Sequence[int] = (2, 3, 8, 16, 32)) -> bool:
    """Whether the model gives the very same bits in a batch as alone."""
    manifest, contents = runtime.read_bundle(bundle)
    session = runtime.open_model(manifest, contents, 1)
    count = len(served.samples)
    for size in batches:
        rows = np.arange(size) % count
        found = runtime.run_model(session, served.samples[rows])
        if not np.array_equal(found, served.logits[rows]):
            return False
    return True
