"""Other ways to integers, in an environment of their own; `against_rivals.py` calls this.

Reads a folder with ``float.onnx`` (input: normalized pixels), ``ours.onnx``, ``whole.onnx`` (the
float model as deploykit ships it), ``calibration.npy`` and ``test.npy`` (raw pixels) and
``pixels.json``; writes ``answers.npz`` and ``times.json``. Every model is timed in the same rounds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
BATCHES = (1, 32)
SECONDS = {1: 0.05, 32: 0.2}  # of each model in a round


def main() -> None:
    """Quantize, answer the test rows, time."""
    folder, threads, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    pixels = json.loads((folder / "pixels.json").read_text())
    calibration = normalized(np.load(folder / "calibration.npy"), pixels)
    raw = np.load(folder / "test.npy")
    models = {
        "fp32": (onnxruntime_model(folder / "whole.onnx", threads), raw),
        "deploykit": (onnxruntime_model(folder / "ours.onnx", threads), raw),
        **{
            name: (run, normalized(raw, pixels))
            for name, run in rivals(folder, calibration, threads)
        },
    }
    answers = {name: answer(run, inputs) for name, (run, inputs) in models.items()}
    np.savez(folder / "answers.npz", **answers)
    (folder / "times.json").write_text(json.dumps(timed(models, rounds)))


def normalized(raw: np.ndarray, pixels: dict[str, list[float]]) -> np.ndarray:
    """Return float32 ``(n, C, H, W)`` of uint8 ``(n, H, W, C)``; this work is not timed."""
    mean, std = (np.array(pixels[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((raw / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def rivals(folder: Path, calibration: np.ndarray, threads: int) -> list[tuple[str, Run]]:
    """Return each rival's model, quantized by its own defaults for this kind of CPU."""
    return [
        ("ONNX Runtime static", onnxruntime_static(folder, calibration, threads)),
        ("NNCF on ONNX Runtime", nncf_onnxruntime(folder, calibration, threads)),
        ("NNCF on OpenVINO", nncf_openvino(folder, calibration, threads)),
    ]


def onnxruntime_model(path: Path, threads: int) -> Run:
    """Open an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]


def onnxruntime_static(folder: Path, calibration: np.ndarray, threads: int) -> Run:
    """ONNX Runtime's static quantization: u8 activations, s8 weights a channel, as on VNNI."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, path = folder / "float.onnx", folder / "static.onnx"
    name = onnxruntime.InferenceSession(source).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(np.split(calibration, range(32, len(calibration), 32)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            rows = next(self.rows, None)
            return None if rows is None else {name: rows}

    quant_pre_process(source, folder / "prepared.onnx")
    quantize_static(
        folder / "prepared.onnx",
        path,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return onnxruntime_model(path, threads)


def nncf_onnxruntime(folder: Path, calibration: np.ndarray, threads: int) -> Run:
    """NNCF's post-training quantization of an ONNX model."""
    import nncf
    import onnx

    model = onnx.load(folder / "float.onnx")
    name = model.graph.input[0].name
    data = nncf.Dataset([{name: row[None]} for row in calibration])
    onnx.save(nncf.quantize(model, data, subset_size=len(calibration)), folder / "nncf.onnx")
    return onnxruntime_model(folder / "nncf.onnx", threads)


def nncf_openvino(folder: Path, calibration: np.ndarray, threads: int) -> Run:
    """NNCF's post-training quantization of an OpenVINO model."""
    import nncf
    import openvino

    data = nncf.Dataset([row[None] for row in calibration])
    model = openvino.convert_model(folder / "float.onnx")
    model = nncf.quantize(model, data, subset_size=len(calibration))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def run(inputs: np.ndarray) -> np.ndarray:
        return np.array(request.infer({0: inputs}, share_inputs=True)[compiled.output(0)])

    return run


def answer(run: Run, inputs: np.ndarray) -> np.ndarray:
    """Return the class of each row, int64 ``(n,)``."""
    chunks = np.split(inputs, range(100, len(inputs), 100))
    return np.concatenate([run(chunk).argmax(1) for chunk in chunks])


def timed(models: dict[str, tuple[Run, np.ndarray]], rounds: int) -> dict[str, dict[str, list]]:
    """Return the mean milliseconds of a batch in each round, by model and batch size."""
    found: dict[str, dict[str, list]] = {name: {} for name in models}
    order = np.random.default_rng(0)
    for batch in BATCHES:
        feeds = {name: (run, inputs[:batch].copy()) for name, (run, inputs) in models.items()}
        for _ in range(rounds + 1):
            for name in order.permutation(list(feeds)):  # no model always behind the same one
                run, inputs = feeds[name]
                found[name].setdefault(str(batch), []).append(mean_ms(run, inputs, SECONDS[batch]))
        for times in found.values():
            del times[str(batch)][0]  # the round that warmed up
    return found


def mean_ms(run: Run, inputs: np.ndarray, seconds: float) -> float:
    """Return the mean time of a run over about so many seconds; milliseconds."""
    runs, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        run(inputs)
        runs += 1
    return 1000 * (time.perf_counter() - start) / runs


if __name__ == "__main__":
    main()
