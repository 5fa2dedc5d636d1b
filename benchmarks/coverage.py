"""Which models are pruned, rebuilt, exported and answered alike: `make bench-coverage`.

The models are the 85 of torchvision that Torch-Pruning publishes as its own coverage, with
random weights. Each goes the whole way: half of the channels pruned, saved, rebuilt in a fresh
process with equal bits, written as ONNX, answered by ONNX Runtime as torch answers at batches of
1, 2 and 7. Of the detectors it is the backbone and the heads that make the raw boxes, listed apart.

Nothing is timed but for information: `--jobs` models go at once. Results are kept model by model in
`--folder`; an interrupted run goes on where it was, as long as the code is the same. `--models a,b`
runs a few.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from table import Figure, code_key, publish
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from vision_operators import define_operators

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.data.pixels import normalize
from deploykit.exporter import export_onnx
from deploykit.models.weights import load_tensors
from deploykit.prune import prune_channels
from deploykit.publish import write_json
from deploykit.structure import load_candidate, save_candidate
from deploykit.widths import changed_widths, read_widths, set_widths

WHOLE = """
alexnet vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14 convnext_tiny convnext_small convnext_base
convnext_large densenet121 densenet169 densenet201 densenet161 efficientnet_b0 efficientnet_b1
efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l googlenet inception_v3 mnasnet0_5
mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf
regnet_y_32gf regnet_y_128gf resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d
resnext101_32x8d wide_resnet50_2 wide_resnet101_2 fcn_resnet50 fcn_resnet101 deeplabv3_resnet50
deeplabv3_resnet101 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large squeezenet1_0
squeezenet1_1 vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn raft_large swin_t
swin_s swin_b shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
"""
BOXES = """
ssdlite320_mobilenet_v3_large ssd300_vgg16 fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fcos_resnet50_fpn
keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn_v2
"""
MODELS, DETECTORS = WHOLE.split(), BOXES.split()
FOLDER = Path("runs/coverage")
STOPPED = threading.Event()
RATIO, BATCHES, PROMISED = 0.5, (1, 2, 7), 70
# Largest difference of an output, relative to the largest output of the batch.
TOLERANCE = 1e-3
STEPS = ("prune", "rebuild", "export", "parity")
PREPROCESS = {"mean": [0.5], "std": [0.25], "channels": 3}


@dataclass
class Result:
    """How far a model came.

    Attributes:
        reached: the last of `STEPS` that held, or ``""``.
        error: why it went no further.
        channels: outputs of all its convolutions and linear layers, before and after.
        left_alone: groups that kept all their channels.
        difference: largest difference between ONNX Runtime and torch, relative.
    """

    name: str
    reached: str = ""
    error: str = ""
    pixels: int = 0
    channels: tuple[int, int] = (0, 0)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    left_alone: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it went the whole way, with channels removed."""
        return self.reached == STEPS[-1] and self.channels[1] < self.channels[0]


class Detector(nn.Module):
    """Backbone and heads of a detector: images in, raw scores and boxes of all places out."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, images: Tensor) -> Any:
        """Answer ``(N, 3, H, W)``."""
        return self.head(list(self.backbone(images).values()))


def pixels_of(name: str) -> int:
    """Return the side of the images: small, since coverage does not depend on it."""
    sides = {"inception_v3": 96, "raft_large": 128, "vit_h_14": 56, "ssd300_vgg16": 300}
    return sides.get(name, 128 if name in DETECTORS else 64)


def arguments_of(name: str) -> dict[str, Any]:
    """Return what the factory of a model is called with, so that it loads no weights."""
    if name.startswith("vit"):
        return {"image_size": pixels_of(name)}
    if name in {"googlenet", "inception_v3"}:
        return {"aux_logits": False, "init_weights": False}
    if name.startswith(("fcn", "deeplab", "lraspp")) or name in DETECTORS:
        return {"weights_backbone": None}
    return {}


def build(name: str) -> nn.Module:
    """Build a model with random weights; a detector without what chooses the boxes."""
    from torchvision import models

    torch.manual_seed(0)
    module = models.get_model(name, weights=None, **arguments_of(name))
    for part in module.modules():  # a head that starts at zero would answer nothing
        if isinstance(part, nn.Linear) and not part.weight.any():
            part.reset_parameters()
    return (Detector(module) if name in DETECTORS else module).eval()


def inputs_of(name: str, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random images, two of each sample for optical flow."""
    generator, side = torch.Generator().manual_seed(seed), pixels_of(name)
    count = 2 if name.startswith("raft") else 1
    return tuple(torch.randn(batch, 3, side, side, generator=generator) for _ in range(count))


def is_classifier(name: str) -> bool:
    """Tell whether one image gives one tensor, as a candidate of deploykit does."""
    others = ("raft", "fcn", "deeplab", "lraspp")
    return name not in DETECTORS and not name.startswith(others)


@torch.no_grad()
def settle(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Give BatchNorm the statistics of its inputs; random weights else drown every signal."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    module(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


@torch.no_grad()
def answers(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return all output tensors, numbered."""
    leaves = tree_leaves(module(*inputs))
    return {str(place): leaf.contiguous() for place, leaf in enumerate(leaves)}


def channels(module: nn.Module) -> int:
    """Count the outputs of all convolutions and linear layers, torch's attention among them."""
    layers = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    joined = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    return sum(layer.weight.shape[0] for layer in layers) + sum(
        part.in_proj_weight.shape[0] for part in joined if part.in_proj_weight is not None
    )


def prune(name: str, folder: Path) -> Result:
    """Prune a model, save it, and save what it answers."""
    module = build(name)
    settle(module, inputs_of(name, batch=4, seed=1))
    pruned, notes = prune_channels(
        module, inputs_of(name, batch=2), channel_ratio=RATIO, scope="uniform"
    )
    widths = changed_widths(read_widths(module), read_widths(pruned))
    if is_classifier(name):
        save_candidate(candidate_of(name, pruned, widths), folder / "candidate")
    else:
        write_json(folder / "widths.json", widths)
        save_file(pruned.state_dict(), folder / "weights.safetensors")
    save_file(answers(pruned, inputs_of(name, batch=2)), folder / "answers.safetensors")
    return Result(
        name,
        reached="prune",
        pixels=pixels_of(name),
        channels=(channels(module), channels(pruned)),
        parameters=notes.parameters,
        macs=notes.macs,
        left_alone=dict(notes.left_alone),
    )


def candidate_of(name: str, module: nn.Module, widths: dict[str, Any]) -> Candidate:
    """Describe a classifier as deploykit does."""
    side = pixels_of(name)
    return Candidate(
        module=module,
        signature=Signature(
            (TensorSpec("image", "uint8", (-1, side, side, 3)),),
            (TensorSpec("logits", "float32", (-1, 1000)),),
            tuple(map(str, range(1000))),
            PREPROCESS,
        ),
        structure={
            "model": {"name": f"torchvision:{name}", "arguments": arguments_of(name)},
            "classes": 1000,
            "sample_shape": [side, side, 3],
            "widths": widths,
        },
        stage="prune",
    )


def check(result: Result, folder: Path) -> Result:
    """Rebuild the pruned model, write it as ONNX and compare; `Result` says how far it came."""
    name, candidate = result.name, None
    if is_classifier(name):
        candidate = load_candidate(folder / "candidate", base=folder)
        module = candidate.module
    else:
        module = build(name)
        set_widths(module, json.loads((folder / "widths.json").read_text()))
        load_tensors(module, load_file(folder / "weights.safetensors"))
    expected = load_file(folder / "answers.safetensors")
    found = answers(module, inputs_of(name, batch=2))
    if not all(torch.equal(expected[key], found[key]) for key in expected):
        raise ValueError("the rebuilt model answers otherwise")
    if not any(float((leaf[0] - leaf[1]).abs().max()) > 0 for leaf in found.values()):
        raise ValueError("the model answers alike whatever it is shown: nothing is proven")
    result.reached = "rebuild"
    path = folder / "model.onnx"
    if candidate is None:
        export_plain(module, name, path)
    else:
        export_onnx(candidate, path, name=name)
    result.reached = "export"
    apart = difference(module, name, path)
    if not apart <= TOLERANCE:  # so that NaN fails
        raise ValueError(f"ONNX Runtime differs by {apart:.1e} of the largest output")
    result.difference = apart
    result.reached = "parity"
    return result


def export_plain(module: nn.Module, name: str, path: Path) -> None:
    """Write a module of several inputs or outputs, which is no candidate."""
    inputs = inputs_of(name, batch=2)
    batch = torch.export.Dim.DYNAMIC  # a named one is refused where samples are joined and cut
    torch.onnx.export(
        module,
        inputs,
        path,
        dynamo=True,
        opset_version=20,
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        external_data=False,
        verbose=False,
        # onnxscript 0.7 does not fold a split into parts whose number only the run knows.
        optimize=not name.startswith("raft"),
    )


@torch.no_grad()
def difference(module: nn.Module, name: str, path: Path) -> float:
    """Return the largest difference between ONNX Runtime and torch, relative, at all batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in session.get_inputs()]
    worst = 0.0
    for batch in BATCHES:
        read = inputs = inputs_of(name, batch, seed=2)
        if is_classifier(name):
            read = (pixels_in(inputs[0]),)
            inputs = (normalize(read[0], PREPROCESS),)
        feed = {key: value.numpy() for key, value in zip(names, read, strict=True)}
        pairs = zip(answers(module, inputs).values(), session.run(None, feed), strict=True)
        for expected, found in pairs:
            scale = float(expected.abs().max())
            apart = float((expected - torch.from_numpy(found)).abs().max()) / scale
            worst = apart if math.isnan(apart) else max(worst, apart)
    return worst


def pixels_in(images: Tensor) -> Tensor:
    """Return images as a client sends them: uint8, channels last."""
    return (images * 64 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def work(name: str, step: str, folder: Path, memory_gib: float) -> None:
    """Do one step in this process, within its memory, and write how far it came."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    torch.set_num_threads(1)
    library = define_operators()
    path = folder / "result.json"
    result = Result(name) if step == "prune" else read(path)
    try:
        result = prune(name, folder) if step == "prune" else check(result, folder)
    except BaseException as error:  # noqa: BLE001 - a model may fail in any way; the table says how
        result.error = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    write_json(path, vars(result))
    del library


def read(path: Path) -> Result:
    """Read a result."""
    return Result(**json.loads(path.read_text()))


def run(name: str, args: argparse.Namespace) -> Result:
    """Take one model all the way in processes of its own, unless that was done before."""
    folder = args.folder / name
    done = folder / "done.json"
    if done.exists() and (kept := json.loads(done.read_text()))["key"] == args.key:
        return Result(**kept["result"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start, result = time.monotonic(), Result(name)
    for step in ("prune", "check"):
        why = call(name, step, args)
        result = read(folder / "result.json") if (folder / "result.json").exists() else result
        result.error = result.error or why
        if result.error:
            break
    result.seconds = time.monotonic() - start
    shutil.rmtree(folder)  # the models are large
    folder.mkdir()
    write_json(done, {"key": args.key, "result": vars(result)})
    print(f"{name}: {'passed' if result.passed else cause(result)}", flush=True)
    return result


def call(name: str, step: str, args: argparse.Namespace) -> str:
    """Do one step in a process of its own; say what ended it early, or return ``""``.

    The processes come of a server that has imported the libraries and done nothing else.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["__main__", "onnxruntime", "onnxscript"])
    process = server.Process(target=work, args=(name, step, args.folder / name, args.memory_gib))
    process.start()
    stop = time.monotonic() + 60 * args.minutes
    while process.is_alive() and time.monotonic() < stop and not STOPPED.is_set():
        process.join(0.2)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    if process.exitcode and STOPPED.wait(0.5):  # Ctrl-C may have reached it first
        raise InterruptedError(name)
    if alive:
        return f"more than {args.minutes:g} minutes"
    return f"the process ended with {process.exitcode}" if process.exitcode else ""


def table_of(results: Sequence[Result]) -> list[str]:
    """Return a row a model, then why the others failed."""
    lines = ["| model | pixels | channels | parameters | MACs | whole groups | ORT differs | s |"]
    lines.append("|---" * 8 + "|")
    for found in results:
        shares = [
            f"{after / before:.2f} of {before:,}" if before else ""
            for before, after in (found.channels, found.parameters, found.macs)
        ]
        cells = [found.name, str(found.pixels), *shares, str(len(found.left_alone))]
        cells += [f"{found.difference:.0e}" if found.passed else "FAILED", f"{found.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [found for found in results if not found.passed]
    return (
        lines + [""] + [f"- {r.name}: after {r.reached or 'nothing'}: {cause(r)}" for r in failed]
    )


def cause(result: Result) -> str:
    """Say why a model did not pass."""
    return result.error or "nothing was pruned"


def main() -> int:
    """Run the models, print and keep the table; 1 when too few go the whole way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="some of the models, separated by commas")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results are kept")
    parser.add_argument("--jobs", type=int, default=2, help="models at once")
    parser.add_argument("--memory-gib", type=float, default=10, help="limit of one process")
    parser.add_argument("--minutes", type=float, default=30, help="limit of one process")
    parser.add_argument("--trial", action="store_true", help="two small models; keep nothing")
    args = parser.parse_args()
    names = args.models.split(",") if args.models else [*MODELS, *DETECTORS]
    args.key = code_key()
    if args.trial:
        names = ["squeezenet1_1", "lraspp_mobilenet_v3_large"]
        args.folder = Path(tempfile.mkdtemp(prefix="deploykit-"))
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            results = list(pool.map(run, names, repeat(args)))
        except KeyboardInterrupt:
            STOPPED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            sys.exit(f"stopped; what is done is kept in {args.folder}")
    first = [found for found in results if found.name not in DETECTORS]
    others = [found for found in results if found.name in DETECTORS]
    whole = len(names) == len(MODELS) + len(DETECTORS)
    ratios = [1 - found.channels[1] / found.channels[0] for found in first if found.passed]
    figures = [
        Figure(
            f"models of {len(first)} that go the whole way",
            sum(found.passed for found in first),
            "{:.0f}",
            at_least=PROMISED if whole else len(first),
        ),
        Figure("channels removed, mean over them", sum(ratios) / max(len(ratios), 1), "{:.1%}"),
        Figure(f"detectors of {len(others)}", sum(found.passed for found in others), "{:.0f}"),
    ]
    return publish(
        "coverage",
        figures,
        about="Models of torchvision with random weights, pruned by half (scope uniform), saved, "
        "rebuilt in a fresh process with equal bits, written as ONNX, and answered by ONNX Runtime "
        f"as by torch (within {TOLERANCE:g} of the largest output) at batches of "
        f"{', '.join(map(str, BATCHES))}. Channels are the outputs of all convolutions and linear "
        "layers, classifiers included; whole groups kept all of theirs.",
        command="make bench-coverage",
        details=[*table_of(first), "", "Backbones and heads of detectors:", "", *table_of(others)],
        keep=whole,
    )


if __name__ == "__main__":
    sys.exit(main())
