"""int8 against fp32 on twelve torchvision architectures: `make bench-architectures`.

Images of 224 x 224, batch 1, one thread, ONNX Runtime on the CPU. Weights are fresh, so that
speed is what is measured; that it is not bought by destroying the model is shown by the
signal-to-quantization-noise ratio of the logits on images that calibration has not seen. Where
it falls short, layers stay in float, the most sensitive first, until it holds.

Fresh weights alone make a chaotic function, in which noise says nothing: behind each BatchNorm
of no shift, a ReLU magnifies what differs between two inputs by pi / (pi - 1) (Yang et al. 2019,
https://arxiv.org/abs/1902.08129), a hundred thousand times in 30 layers, and what rounding puts
into the first layer drowns the signal of the last. Training undoes that. Here the shifts are
set to 1, so that most values pass, and statistics settle on real images.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from table import Figure, publish
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from vision import define_operators

from deploykit.artifacts import Candidate, OnnxModel, Signature, TensorSpec
from deploykit.data.pixels import normalize
from deploykit.exporter import export_onnx
from deploykit.measure import Latency, measure_latency
from deploykit.models import build_model, fold_normalization
from deploykit.quantize import calibrate
from deploykit.recipe.sections import ModelSection
from deploykit.runtime import decode_image, open_session, run_model
from deploykit.sensitivity import layers_to_keep_float, quantization_sensitivity
from deploykit.targets import resolve_target

ROOT = Path(__file__).parents[1]
DATA = ROOT / "../shared/data/cifar10/validation.parquet"
SIDE, CLASSES, WANTED_DB, ROUNDS, BATCH = 224, 1000, 20.0, 6, 16
ARCHITECTURES = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "densenet121",
    "shufflenet_v2_x1_0",
    "googlenet",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
)
ARGUMENTS = {"googlenet": {"init_weights": True, "aux_logits": False}}
AT_LEAST = {"mobilenet_v3_small": 1.5, "mobilenet_v3_large": 1.5, "efficientnet_b0": 1.5}
PREPROCESS = {
    "height": SIDE,
    "width": SIDE,
    "channels": 3,
    "filter": "bicubic",
    "antialias": True,
    "fit": "stretch",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "exif": True,
    "alpha": "white",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        name: torchvision's.
        latency: of the int8 model, beside the fp32 one's.
        fp32_ms: median of the fp32 model, in ms.
        decibels: signal-to-quantization-noise ratio of the logits.
        centred: the same with the mean over the images taken off the signal.
        kept: layers that stay in float.
    """

    name: str
    latency: Latency
    fp32_ms: float
    decibels: float
    centred: float
    kept: tuple[str, ...]


def read_images(path: Path, count: int) -> np.ndarray:
    """Return the first rows' images, resized, uint8 ``(count, 224, 224, 3)``."""
    rows = pq.read_table(path, columns=["image"]).slice(0, count).column("image").to_pylist()
    return np.stack([decode_image(row["bytes"], PREPROCESS) for row in rows])


def fresh_candidate(name: str, images: np.ndarray) -> Candidate:
    """Return torchvision's model with fresh weights, its statistics settled on ``images``."""
    torch.manual_seed(0)
    section = ModelSection(name=f"torchvision:{name}", arguments=ARGUMENTS.get(name, {}))
    shape = (SIDE, SIDE, 3)
    module = build_model(section, classes=CLASSES, sample_shape=shape, base=ROOT).eval()
    module, preprocess, note = fold_normalization(module, PREPROCESS, torch.randn(2, 3, SIDE, SIDE))
    assert preprocess is not None
    settle(module, normalize(torch.from_numpy(images), preprocess))
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, *shape)),),
        (TensorSpec("logits", "float32", (-1, CLASSES)),),
        (),
        preprocess,
    )
    structure = {
        "model": {"name": section.name, "arguments": dict(section.arguments)},
        "classes": CLASSES,
        "sample_shape": list(shape),
        "input": note,
    }
    return Candidate(module, signature, structure, "train")


def settle(module: nn.Module, inputs: torch.Tensor) -> None:
    """Give every BatchNorm a shift of 1 and the statistics of ``inputs``, in place."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    for norm in norms:
        nn.init.ones_(norm.bias)
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in inputs.split(BATCH):
            module(batch)
    module.eval()


def answers(model: OnnxModel, images: np.ndarray) -> np.ndarray:
    """Return the logits, ``(n, classes)``."""
    session = open_session(model.path.read_bytes(), torch.get_num_threads())
    parts = range(0, len(images), BATCH)
    return np.concatenate([run_model(session, images[start : start + BATCH]) for start in parts])


def ratio_db(signal: np.ndarray, noise: np.ndarray) -> float:
    """Return the ratio of two powers, in dB."""
    return 10 * math.log10(float(np.square(signal).sum()) / float(np.square(noise).sum()))


def quantized_well(
    candidate: Candidate, fp32: OnnxModel, seen: np.ndarray, unseen: np.ndarray, path: Path
) -> tuple[OnnxModel, float, float, tuple[str, ...]]:
    """Return an int8 model whose noise is low enough, its noise, and what stays in float."""
    target, expected = resolve_target("cpu"), answers(fp32, unseen)
    kept: tuple[str, ...] = ()
    wanted = WANTED_DB
    for _ in range(ROUNDS):
        quantized = calibrate(candidate, seen, target=target, keep_float=kept)
        model = export_onnx(quantized, path, name="int8")
        noise = expected - answers(model, unseen)
        found = ratio_db(expected, noise)
        if found >= WANTED_DB:
            break
        wanted += max(0.5, WANTED_DB - found) if kept else 0.5
        sensitivity = quantization_sensitivity(quantized, seen[:32])
        kept = layers_to_keep_float(quantized, sensitivity, wanted_db=wanted)
    return model, found, ratio_db(expected - expected.mean(0), noise), kept


def run_architecture(
    name: str, seen: np.ndarray, unseen: np.ndarray, folder: Path, seconds: float
) -> Outcome:
    """Quantize, hold the noise, and time."""
    candidate = fresh_candidate(name, seen)
    fp32 = export_onnx(candidate, folder / f"{name}.fp32.onnx", name=name)
    int8, found, centred, kept = quantized_well(
        candidate, fp32, seen, unseen, folder / f"{name}.int8.onnx"
    )
    measured = measure_latency(
        {"fp32": fp32, "int8": int8},
        threads=1,
        baseline="fp32",
        batch_sizes=(1,),
        precision=0.01,
        seconds_per_model=seconds,
    )
    fp32_ms = measured["fp32"]["1"].median_ms
    return Outcome(name, measured["int8"]["1"], fp32_ms, found, centred, kept)


def figures_of(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Return what is promised."""
    figures = []
    for one in outcomes:
        bound = AT_LEAST.get(one.name, 1.0)
        figures += [
            Figure(f"{one.name}: speed", one.latency.ratio, "{:.2f}x", at_least=bound),
            Figure(f"{one.name}: signal to noise", one.decibels, "{:.1f} dB", at_least=WANTED_DB),
        ]
    mean = math.exp(sum(math.log(one.latency.ratio) for one in outcomes) / len(outcomes))
    return [*figures, Figure("speed, geometric mean", mean, "{:.2f}x", at_least=1.8)]


def main() -> int:
    """Run the architectures, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=ARCHITECTURES, help="these; keeps no table")
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR-10 as parquet")
    parser.add_argument("--images", type=int, default=64, help="to calibrate, and as many to judge")
    parser.add_argument("--trial", action="store_true", help="one, few images; keeps no table")
    options = parser.parse_args()
    library = define_operators()
    names, count = options.names, options.images
    if options.trial:
        names, count = ["mobilenet_v3_small"], 16
    images = read_images(options.data, 2 * count)
    seen, unseen = images[:count], images[count:]
    outcomes, details = [], []
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        for name in names:
            start = time.monotonic()
            one = run_architecture(name, seen, unseen, Path(folder), 1 if options.trial else 5)
            outcomes.append(one)
            low, high = one.latency.interval
            details.append(
                f"- {name}: {one.fp32_ms:.2f} to {one.latency.median_ms:.2f} ms (95%: {low:.2f} to "
                f"{high:.2f}x); {one.decibels:.1f} dB, {one.centred:.1f} dB without the logits' "
                f"mean; in float: {', '.join(one.kept) or 'no layer'}"
            )
            print(f"{details[-1]}; {time.monotonic() - start:.0f} s", flush=True)
    del library
    return publish(
        "architectures",
        figures_of(outcomes),
        about="int8 against fp32 in ONNX Runtime on torchvision's architectures at 224 x 224, "
        f"fresh weights, batch 1, one thread; noise on {count} CIFAR-10 images, resized, that "
        f"calibration on {count} others has not seen.",
        command="make bench-architectures",
        details=details,
        keep=not options.trial and tuple(names) == ARCHITECTURES,
    )


if __name__ == "__main__":
    sys.exit(main())
