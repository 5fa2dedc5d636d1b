"""Good requests for a served model, in every form that the server takes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from served_models import Served, png

from deploykit.bundle_files import npy_bytes
from deploykit.load import Request

LENGTH = "inference-header-content-length"
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}


@dataclass(frozen=True)
class Call:
    """A request, not yet in bytes."""

    target: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def wire(self, **changes: str | None) -> bytes:
        """Return the request's bytes.

        Args:
            changes: headers that are set, with ``_`` for ``-``, or left out where None.
        """
        replaced = {key.replace("_", "-"): value for key, value in changes.items()}
        headers: dict[str, str | None] = {
            "host": "localhost",
            "content-length": str(len(self.body)),
            **self.headers,
            **replaced,
        }
        lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
        head = "\r\n".join([f"{self.method} {self.target} HTTP/1.1", *lines, "", ""])
        return head.encode("latin-1") + self.body

    @property
    def request(self) -> Request:
        """The request for a load."""
        return Request(self.method, self.target, self.headers, self.body)


def infer_path(served: Served) -> str:
    """Return where the Open Inference Protocol runs a model."""
    return f"/v2/models/{served.name}/infer"


def tensor(served: Served, count: int = 1) -> dict[str, Any]:
    """Return the description of an input of ``count`` samples, without its data."""
    shape = [count, *served.samples.shape[1:]]
    datatype = DATATYPES[served.source.dtype]
    return {"name": served.source.name, "shape": shape, "datatype": datatype}


def binary_call(served: Served, samples: np.ndarray, **more: str) -> Call:
    """Ask by the binary extension for a binary answer.

    Args:
        served: the model.
        samples: ``(N, ...)``.
        more: fields of the request, such as ``id``.
    """
    raw = samples.tobytes()
    sized = {**tensor(served, len(samples)), "parameters": {"binary_data_size": len(raw)}}
    wanted = {"name": served.result.name, "parameters": {"binary_data": True}}
    return framed(infer_path(served), {"inputs": [sized], "outputs": [wanted], **more}, raw)


def framed(target: str, head: Any, raw: bytes = b"") -> Call:
    """Return JSON with raw tensors behind it."""
    text = json.dumps(head).encode()
    return Call(target, text + raw, {LENGTH: str(len(text))})


def json_call(served: Served, samples: np.ndarray) -> Call:
    """Ask by the Open Inference Protocol with nested lists of numbers."""
    return told(infer_path(served), {"inputs": [tensor(served, len(samples)) | listed(samples)]})


def listed(samples: np.ndarray) -> dict[str, Any]:
    """Return samples as the protocol's JSON has them."""
    return {"data": samples.tolist()}


def told(target: str, content: Any) -> Call:
    """Return a call with JSON as its body."""
    return Call(target, json.dumps(content).encode(), {"content-type": "application/json"})


def raw_call(served: Served, samples: np.ndarray) -> Call:
    """Ask `/predict` with samples back to back."""
    headers = {"content-type": "application/octet-stream"}
    return Call(f"/predict/{served.name}", samples.tobytes(), headers)


def predict_call(served: Served, samples: np.ndarray) -> Call:
    """Ask `/predict` with nested lists of numbers."""
    return told(f"/predict/{served.name}", {"inputs": samples.tolist()})


def npy_call(served: Served, samples: np.ndarray) -> Call:
    """Ask `/predict` with a .npy file."""
    headers = {"content-type": "application/x-npy"}
    return Call(f"/predict/{served.name}", npy_bytes(samples), headers)


def png_call(served: Served, sample: np.ndarray) -> Call:
    """Ask `/predict` with a PNG file of pixels ``(H, W, C)``."""
    return Call(f"/predict/{served.name}", png(sample), {"content-type": "image/png"})


def base64_call(served: Served, samples: np.ndarray) -> Call:
    """Ask `/predict` with PNG files in base64."""
    images = [base64.b64encode(png(one)).decode() for one in samples]
    return told(f"/predict/{served.name}", {"images": images})


def every_form(served: Served) -> dict[str, Call]:
    """Return one good request of each form."""
    one, two = served.samples[:1], served.samples[:2]
    found = {
        "binary tensor": binary_call(served, one),
        "tensor in JSON": json_call(served, two),
        "raw samples": raw_call(served, two),
        "numbers": predict_call(served, one),
        ".npy": npy_call(served, two),
    }
    if served.source.dtype == "uint8":
        found |= {"PNG": png_call(served, one[0]), "base64": base64_call(served, two)}
    return found


def logits_of(body: bytes, json_bytes: str | None) -> tuple[dict[str, Any], bytes]:
    """Return the JSON of a binary answer, and the bytes of its one tensor."""
    size = len(body) if json_bytes is None else int(json_bytes)
    head: dict[str, Any] = json.loads(body[:size])
    return head, body[size:]
