"""Models as a server describes them: digits, photographs and rows of numbers."""

from typing import Any

from deploykit.server.engine import ModelInfo

CPU = "CPUExecutionProvider"


def image_model(name: str, side: int, channels: int, labels: list[str]) -> ModelInfo:
    preprocess = {"height": side, "width": side, "channels": channels}
    return _model(name, "uint8", [side, side, channels], labels, len(labels), preprocess)


def array_model(name: str, dtype: str, shape: list[int], classes: int = 3) -> ModelInfo:
    return _model(name, dtype, shape, [], classes, None)


def _model(
    name: str, dtype: str, shape: list[int], labels: list[str], classes: int, preprocess: Any
) -> ModelInfo:
    manifest = {
        "inputs": [{"name": "input", "dtype": dtype, "shape": [-1, *shape]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, classes]}],
        "labels": labels,
        "preprocess": preprocess,
    }
    return ModelInfo(name, "1.0", CPU, manifest)


DIGITS = image_model("digits", 8, 1, [str(digit) for digit in range(10)])
PHOTOS = image_model(
    "photos", 224, 3, [f"a rather long name of a thing, number {i}" for i in range(1000)]
)
ROWS = array_model("rows", "float32", [4])
