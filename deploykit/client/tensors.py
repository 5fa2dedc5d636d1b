"""Tensors over HTTP: the binary extension of the Open Inference Protocol.

A body is JSON and then the raw tensors in the order in which the JSON lists them, little-endian,
row-major, without padding. A header tells the length of the JSON.
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

HEADER_LENGTH = "Inference-Header-Content-Length"
DATATYPES = {
    "BOOL": np.dtype("?"),
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


def encode_inputs(inputs: Mapping[str, Array]) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body that ask for every output, in binary.

    Args:
        inputs: arrays by the name of the input, with the batch axis first.

    Raises:
        TypeError: an array of something that the protocol has no datatype for.
    """
    about: list[dict[str, Any]] = []
    tensors: list[bytes] = []
    for name, array in inputs.items():
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _NAMES:
            raise TypeError(f"{name}: expected an array of {', '.join(DATATYPES)}, got {dtype}")
        tensors.append(array.astype(dtype).tobytes())
        about.append(
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": _NAMES[dtype],
                "parameters": {"binary_data_size": len(tensors[-1])},
            }
        )
    head = json.dumps({"inputs": about, "parameters": {"binary_data_output": True}}).encode()
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    return headers, b"".join([head, *tensors])


def decode_outputs(header_length: str | None, body: bytes) -> dict[str, Array]:
    """Return the outputs by name.

    Args:
        header_length: the header of that name, in bytes; None for a body that is all JSON.
        body: of the answer.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: not what the protocol says.
    """
    length = len(body) if header_length is None else int(header_length)
    rest = memoryview(body)[length:]
    outputs: dict[str, Array] = {}
    for about in json.loads(body[:length])["outputs"]:
        dtype, shape = DATATYPES[about["datatype"]], tuple(about["shape"])
        if "data" in about:
            outputs[about["name"]] = np.array(about["data"], dtype).reshape(shape)
            continue
        size = about["parameters"]["binary_data_size"]
        if size != math.prod(shape) * dtype.itemsize or size > len(rest):
            raise ValueError(f"{about['name']}: {size} bytes are not its shape {shape}")
        # a copy: arrays of a caller are aligned, may be written to, and keep no body alive
        outputs[about["name"]] = np.frombuffer(rest[:size], dtype).reshape(shape).copy()
        rest = rest[size:]
    if len(rest):
        raise ValueError(f"{len(rest)} bytes belong to no output")
    return outputs
