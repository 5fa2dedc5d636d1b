"""int8 against fp32 on twelve torchvision architectures: `make bench-architectures`.

Images of 224 x 224, batch 1, one thread, ONNX Runtime on the CPU. Weights are fresh, so that
speed is what is measured; that it is not bought by destroying the model is shown by the
signal-to-quantization-noise ratio of the logits on images that calibration has not seen. Where
it falls short, layers stay in float, the most sensitive first, until it holds; so do those that
are not faster in integers. Depthwise layers are filled up to full blocks of channels.

Fresh weights alone make a chaotic function, in which noise says nothing: behind each BatchNorm
of no shift, a ReLU magnifies what differs between two inputs by pi / (pi - 1) (Yang et al. 2019,
https://arxiv.org/abs/1902.08129), a hundred thousand times in 30 layers, and what rounding puts
into the first layer drowns the signal of the last. Training undoes that. Here the shifts are
set to 1, so that most values pass, and statistics settle on real images. A head of zeros, as
torchvision's ViT has, gets weights of unit fan-in.

Where there are operators that integers run slowly, the same is measured once more after they gave
way (`surgery` in recipes): speed against the untouched fp32 model, noise against the operated one
in floats. What accuracy that costs, fresh weights cannot tell.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from table import Figure, code_key, publish
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from vision_operators import define_operators

from deploykit.artifacts import Candidate, OnnxModel, Signature, TensorSpec
from deploykit.data.pixels import normalize
from deploykit.errors import CompressionError
from deploykit.exporter import OPSET, export_onnx
from deploykit.measure import Latency, measure_latency
from deploykit.mixed_precision import fastest_mixture
from deploykit.models import build_model, fold_normalization
from deploykit.prune import align_widths
from deploykit.quantize import calibrate
from deploykit.recipe.sections import ModelSection, SurgerySection
from deploykit.runtime import decode_image, open_session, run_model
from deploykit.surgery import replaced
from deploykit.targets import resolve_target

ROOT = Path(__file__).parents[1]
DATA = ROOT / "../shared/data/cifar10/validation.parquet"
FOLDER = ROOT / "runs/architectures"
SIDE, CLASSES, WANTED_DB, ROUNDS, BATCH = 224, 1000, 20.0, 3, 16
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
OPERATED = "-after-surgery"
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
        decibels: signal-to-quantization-noise ratio of the logits.
        centred: the same with the mean over the images taken off the signal.
        kept: layers that stay in float.
        fp32_ms: median of the fp32 model, in ms.
        int8_ms: median of the int8 model, in ms.
        speedup: ratio of the two in the same rounds.
        interval: its 95% interval.
        operated: the same after surgery; None where that has nothing to replace.
    """

    name: str
    decibels: float
    centred: float
    kept: tuple[str, ...]
    fp32_ms: float = math.nan
    int8_ms: float = math.nan
    speedup: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    operated: Outcome | None = None

    def line(self) -> str:
        """Return the details below the table."""
        low, high = self.interval
        after = "" if self.operated is None else f"\n{self.operated.line()}"
        timed = f"{self.fp32_ms:.2f} to {self.int8_ms:.2f} ms (95%: {low:.2f} to {high:.2f}x)"
        return (
            f"- {self.name}: {timed}; {self.decibels:.1f} dB, {self.centred:.1f} dB without the "
            f"logits' mean; in float: {', '.join(self.kept) or 'no layer'}{after}"
        )


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
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
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


def make_models(name: str, seen: np.ndarray, unseen: np.ndarray, folder: Path) -> Outcome:
    """Write the model in float and in integers, and after surgery where there is any to do."""
    candidate = fresh_candidate(name, seen)
    outcome = quiet_model(candidate, name, seen, unseen, folder)
    batches = normalize(torch.from_numpy(seen), candidate.signature.preprocess).split(BATCH)
    try:
        operated, _ = replaced(candidate, SurgerySection(), batches)
    except CompressionError:
        return outcome
    settle(operated.module, torch.cat(batches))
    after = quiet_model(operated, f"{name}{OPERATED}", seen, unseen, folder)
    return replace(outcome, operated=after)


def quiet_model(
    candidate: Candidate, name: str, seen: np.ndarray, unseen: np.ndarray, folder: Path
) -> Outcome:
    """Write a candidate in float and in integers that are quiet enough on unseen images."""
    paths = model_paths(name, folder)
    fp32 = export_onnx(candidate, paths["fp32"], name=name)
    expected, target, wanted = answers(fp32, unseen), resolve_target("cpu"), WANTED_DB
    candidate = align_widths(candidate, target.channel_multiple) or candidate
    faster = fastest_mixture(candidate, target=target, threads=1).keep_float

    def noise_of(quantized: Candidate) -> np.ndarray:
        return expected - answers(export_onnx(quantized, paths["int8"], name=name), unseen)

    quantized = calibrate(candidate, seen, target=target, keep_float=faster)
    noise = noise_of(quantized)
    for _ in range(ROUNDS):
        if ratio_db(expected, noise) >= WANTED_DB:
            break
        try:
            quantized = calibrate(
                candidate, seen, target=target, keep_float=faster, min_sqnr=wanted
            )
        except CompressionError:  # floats do not bring it; the table shows how far it came
            break
        noise = noise_of(quantized)
        wanted += max(WANTED_DB - ratio_db(expected, noise), 0) + 0.5
    kept = tuple(quantized.structure["quantization"]["keep_float"])
    centred = ratio_db(expected - expected.mean(0), noise)
    return Outcome(name, ratio_db(expected, noise), centred, kept)


def time_models(outcome: Outcome, folder: Path, seconds: float) -> Outcome:
    """Measure both models, in interleaved rounds."""
    images = TensorSpec("image", "uint8", (-1, SIDE, SIDE, 3))
    signature = Signature((images,), (TensorSpec("logits", "float32", (-1, CLASSES)),), ())
    paths = model_paths(outcome.name, folder)
    if outcome.operated is not None:
        paths["operated"] = model_paths(outcome.operated.name, folder)["int8"]
    found = measure_latency(
        {kind: OnnxModel(path, signature, OPSET) for kind, path in paths.items()},
        threads=1,
        baseline="fp32",
        batch_sizes=(1,),
        precision=0.01,
        seconds_per_model=seconds,
    )
    measured = {kind: latency["1"] for kind, latency in found.items()}
    timed = timed_outcome(outcome, measured["fp32"], measured["int8"])
    if outcome.operated is None:
        return timed
    after = timed_outcome(outcome.operated, measured["fp32"], measured["operated"])
    return replace(timed, operated=after)


def timed_outcome(outcome: Outcome, fp32: Latency, int8: Latency) -> Outcome:
    """Return the outcome with its times."""
    return replace(
        outcome,
        fp32_ms=fp32.median_ms,
        int8_ms=int8.median_ms,
        speedup=int8.ratio,
        interval=int8.interval,
    )


def model_paths(name: str, folder: Path) -> dict[str, Path]:
    """Return where the models of an architecture lie."""
    return {kind: folder / f"{name}.{kind}.onnx" for kind in ("fp32", "int8")}


def read_outcome(name: str, folder: Path, key: str) -> Outcome | None:
    """Return what this code has found of an architecture, or None."""
    try:
        kept = json.loads((folder / f"{name}.json").read_text())
    except FileNotFoundError:
        return None
    if kept.get("key") != key:
        return None
    known = kept["outcome"]
    operated = known.pop("operated", None)
    return Outcome(**known, operated=None if operated is None else Outcome(**operated))


def write_outcome(outcome: Outcome, folder: Path, key: str) -> None:
    """Keep what is known, for a benchmark that goes on later."""
    kept = {"key": key, "outcome": asdict(outcome)}
    (folder / f"{outcome.name}.json").write_text(json.dumps(kept))


def figures_of(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Return what is promised."""
    figures = []
    for one in outcomes:
        bound = AT_LEAST.get(one.name, 1.0)
        figures += [
            Figure(f"{one.name}: speed", one.speedup, "{:.2f}x", at_least=bound),
            Figure(f"{one.name}: signal to noise", one.decibels, "{:.1f} dB", at_least=WANTED_DB),
        ]
        if (after := one.operated) is not None:
            noise = Figure(
                f"{after.name}: signal to noise", after.decibels, "{:.1f} dB", at_least=WANTED_DB
            )
            figures += [Figure(f"{after.name}: speed", after.speedup, "{:.2f}x"), noise]
    mean = math.exp(sum(math.log(one.speedup) for one in outcomes) / len(outcomes))
    return [*figures, Figure("speed, geometric mean", mean, "{:.2f}x", at_least=1.8)]


def main() -> int:
    """Run the architectures, one after the other; models that this code has made are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=ARCHITECTURES, help="these; keeps no table")
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR-10 as parquet")
    parser.add_argument("--images", type=int, default=64, help="to calibrate, and as many to judge")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="models, and what is known")
    parser.add_argument("--trial", action="store_true", help="one, few images; keeps no table")
    options = parser.parse_args()
    library = define_operators()
    names, count, folder, seconds = options.names, options.images, options.folder, 5.0
    if options.trial:
        names, count, seconds = ["mobilenet_v3_small"], 16, 1.0
        folder = Path(tempfile.mkdtemp(prefix="deploykit-"))
    folder.mkdir(parents=True, exist_ok=True)
    key, outcomes = code_key(count), []
    for name in names:
        start, outcome = time.monotonic(), read_outcome(name, folder, key)
        if outcome is None:
            images = read_images(options.data, 2 * count)
            outcome = make_models(name, images[:count], images[count:], folder)
            write_outcome(outcome, folder, key)
        outcomes.append(time_models(outcome, folder, seconds))
        print(f"{outcomes[-1].line()}; {time.monotonic() - start:.0f} s", flush=True)
    del library
    return publish(
        "architectures",
        figures_of(outcomes),
        about="int8 against fp32 in ONNX Runtime on torchvision's architectures at 224 x 224, "
        f"fresh weights, batch 1, one thread; noise on {count} CIFAR-10 images, resized, that "
        f"calibration on {count} others has not seen.",
        command="make bench-architectures",
        details=[outcome.line() for outcome in outcomes],
        keep=not options.trial and tuple(names) == ARCHITECTURES,
    )


if __name__ == "__main__":
    sys.exit(main())
