"""Peak memory of a model, taken in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from deploykit.artifacts import OnnxModel, Signature
from deploykit.errors import ModelError

_PROGRAM = "from deploykit.measure.memory import answer; answer()"


def peak_memory_bytes(model: OnnxModel, threads: int, batch_size: int = 32) -> int:
    """Return how much resident memory loading the model and predicting one batch adds.

    Args:
        model: any model that ONNX Runtime opens.
        threads: threads inside an operator.
        batch_size: samples in the batch.

    Returns:
        The peak of a fresh process above what it held once onnxruntime was imported; bytes.

    Raises:
        ModelError: the process failed.
    """
    order = {
        "path": str(model.path.absolute()),
        "signature": model.signature.to_json(),
        "opset": model.opset,
        "threads": threads,
        "batch_size": batch_size,
    }
    command = [sys.executable, "-P", "-c", _PROGRAM]
    # In a session of its own: Ctrl-C is for the caller, who stops at a safe place.
    done = subprocess.run(
        command,
        input=json.dumps(order),
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(f"{model.path}: its memory could not be measured: {reason}")
    return int(done.stdout)


def answer() -> None:
    """Be the fresh process: read the order from standard input, print the bytes."""
    import onnxruntime  # noqa: F401  what it takes to be imported does not count

    from deploykit.measure.session import example_feed, open_model
    from deploykit.runtime import peak_bytes

    order = json.load(sys.stdin)
    signature = Signature.from_json(order["signature"])
    model = OnnxModel(Path(order["path"]), signature, order["opset"])
    feed = example_feed(model, order["batch_size"])
    before = peak_bytes() or 0
    open_model(model, order["threads"]).run(None, feed)
    sys.stdout.write(str(max(0, (peak_bytes() or 0) - before)))
