"""The Open Inference Protocol over REST, with the binary extension and classification.

Sources: https://github.com/kserve/open-inference-protocol, and the extensions binary data and
classification of https://github.com/triton-inference-server/server/tree/main/docs/protocol.
A body is JSON, perhaps followed by raw tensors in the order of the inputs: little-endian,
row-major, without padding; then the header Inference-Header-Content-Length tells the JSON's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.server.engine import ModelInfo
from deploykit.server.refusal import Refusal
from deploykit.server.tensors import checked, kind_of, numbers, parse_json, told

LENGTH_HEADER = "inference-header-content-length"
DATATYPE_OF = {
    **{f"int{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"UINT{bits}" for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the client wants the output.

    Attributes:
        binary: raw after the JSON, else numbers in it.
        classification: so many likeliest classes in place of the tensor; 0: the tensor.
    """

    binary: bool = False
    classification: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request to infer, checked against the model.

    Attributes:
        samples: ``(N, ...)`` as the model takes them.
        wanted: how to answer.
        id: given back with the answer.
        timeout_s: the client's own deadline; None: the server's.
    """

    samples: np.ndarray
    wanted: Wanted
    id: str | None = None
    timeout_s: float | None = None


def parse_request(
    body: bytes, json_bytes: str | None, info: ModelInfo, max_batch: int
) -> InferRequest:
    """Read and check the body of an infer request.

    Args:
        body: unpacked.
        json_bytes: the header Inference-Header-Content-Length; None: there is none.
        info: of the model that is asked.
        max_batch: samples that one request may bring.

    Raises:
        Refusal: 400 with what was expected and what was found.
    """
    spec = info.manifest["inputs"][0]
    head_bytes = count_json_bytes(json_bytes, len(body))
    if json_bytes is not None and head_bytes == 0:
        samples = _from_bytes(memoryview(body), [1, *_fixed(spec)], spec)
        return InferRequest(samples, Wanted(binary=True))
    head = parse_json(body[:head_bytes] if head_bytes < len(body) else body)
    if not isinstance(head, dict):
        raise Refusal(400, f"body: expected a JSON object, got {kind_of(head)}")
    parameters = _object(head.get("parameters", {}), "parameters")
    samples = _read_input(head.get("inputs"), memoryview(body)[head_bytes:], spec)
    if not 1 <= len(samples) <= max_batch:
        raise Refusal(
            400, f"inputs.shape: expected a batch of 1 to {max_batch} samples, got {len(samples)}"
        )
    request_id = head.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise Refusal(400, f"id: expected text, got {kind_of(request_id)}")
    return InferRequest(
        samples,
        _read_wanted(head.get("outputs"), parameters, info),
        request_id,
        _read_timeout(parameters),
    )


def count_json_bytes(header: str | None, total: int) -> int:
    """Return how many bytes of a body are JSON.

    Args:
        header: Inference-Header-Content-Length; None: there is none.
        total: bytes of the body.

    Raises:
        Refusal: 400, the header is no number, or one larger than the body.
    """
    if header is None:
        return total
    if not (header.isascii() and header.isdecimal() and len(header) < 20 and int(header) <= total):
        raise Refusal(
            400,
            f"Inference-Header-Content-Length: expected 0 to {total}, the bytes of the body, "
            f"got {header[:40]!r}",
        )
    return int(header)


def _fixed(spec: Mapping[str, Any]) -> list[int]:
    """Return the shape of a sample, for a body that names none."""
    shape: list[int] = spec["shape"][1:]
    if -1 in shape:
        raise Refusal(400, f"{spec['name']}: expected a shape, for its sizes may vary: {shape}")
    return shape


def _read_input(inputs: Any, raw: memoryview, spec: Mapping[str, Any]) -> np.ndarray:
    """Read the one tensor that the model takes."""
    if not isinstance(inputs, list) or len(inputs) != 1:
        found = f"{len(inputs)} of them" if isinstance(inputs, list) else kind_of(inputs)
        raise Refusal(400, f"inputs: expected a list of one, {spec['name']!r}, got {found}")
    tensor = _object(inputs[0], "inputs[0]")
    name, datatype = tensor.get("name"), tensor.get("datatype")
    if name != spec["name"]:
        raise Refusal(400, f"inputs[0].name: expected {spec['name']!r}, got {told(name)}")
    if datatype != DATATYPE_OF.get(spec["dtype"]):
        raise Refusal(
            400, f"{name}.datatype: expected {DATATYPE_OF.get(spec['dtype'])}, got {told(datatype)}"
        )
    shape = _read_shape(tensor.get("shape"), spec)
    parameters = _object(tensor.get("parameters", {}), f"{name}.parameters")
    if "shared_memory_region" in parameters:
        raise Refusal(400, f"{name}: expected the tensor in the body; shared memory is not offered")
    size = parameters.get("binary_data_size")
    if size is None:
        if len(raw):
            raise Refusal(400, f"body: expected no bytes after the JSON, got {len(raw)}")
        return numbers(tensor.get("data"), shape, np.dtype(spec["dtype"]), f"{name}.data")
    if "data" in tensor:
        raise Refusal(400, f"{name}: expected data or binary_data_size, got both")
    if type(size) is not int or size != len(raw):
        raise Refusal(
            400, f"{name}.binary_data_size: expected {len(raw)}, the bytes sent, got {told(size)}"
        )
    return _from_bytes(raw, shape, spec)


def _read_shape(shape: Any, spec: Mapping[str, Any]) -> list[int]:
    expected: list[int] = spec["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise Refusal(400, f"{spec['name']}.shape: expected {expected}, got {told(shape)}")
    fits = len(shape) == len(expected) and all(
        wanted in (-1, found) for wanted, found in zip(expected, shape, strict=True)
    )
    if not fits or 0 in shape[1:]:
        raise Refusal(400, f"{spec['name']}.shape: expected {expected}, got {told(shape)}")
    return shape


def _from_bytes(raw: memoryview, shape: Sequence[int], spec: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(spec["dtype"])
    needed = math.prod(shape) * dtype.itemsize
    if len(raw) != needed:
        raise Refusal(
            400,
            f"{spec['name']}: expected {needed} bytes for {list(shape)} of {dtype}, got {len(raw)}",
        )
    return checked(np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape), spec["name"])


def _read_wanted(outputs: Any, parameters: Mapping[str, Any], info: ModelInfo) -> Wanted:
    """Read how the one output is wanted."""
    binary = _flag(parameters.get("binary_data_output", False), "binary_data_output")
    if outputs is None:
        return Wanted(binary)
    if not isinstance(outputs, list):
        raise Refusal(400, f"outputs: expected a list, got {kind_of(outputs)}")
    if not outputs:
        return Wanted(binary)
    name = info.manifest["outputs"][0]["name"]
    if len(outputs) != 1:
        raise Refusal(400, f"outputs: expected one, {name!r}, got {len(outputs)}")
    output = _object(outputs[0], "outputs[0]")
    if output.get("name") != name:
        raise Refusal(400, f"outputs[0].name: expected {name!r}, got {told(output.get('name'))}")
    own = _object(output.get("parameters", {}), "outputs[0].parameters")
    if "shared_memory_region" in own:
        raise Refusal(400, f"{name}: expected no shared memory, which is not offered")
    count = own.get("classification", 0)
    if type(count) is not int or not 0 <= count < 2**31:
        raise Refusal(400, f"{name}.classification: expected an integer from 0, got {told(count)}")
    return Wanted(_flag(own.get("binary_data", binary), "binary_data"), count)


def _read_timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return the seconds that the client will wait; Triton counts microseconds, 0 is none."""
    asked = parameters.get("timeout", 0)
    if type(asked) is not int or asked < 0:
        raise Refusal(400, f"parameters.timeout: expected microseconds from 0, got {told(asked)}")
    return min(asked, 2**53) / 1e6 or None


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise Refusal(400, f"{where}: expected true or false, got {told(value)}")
    return value


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(400, f"{where}: expected a JSON object, got {kind_of(value)}")
    return value
