"""Answers of the Open Inference Protocol: tensors, classes, and what is told of a model."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from deploykit.server.engine import ModelInfo
from deploykit.server.protocol import DATATYPE_OF, LENGTH_HEADER, InferRequest, Wanted
from deploykit.targets import CPU


def write_response(
    request: InferRequest, outputs: np.ndarray, info: ModelInfo
) -> tuple[bytes, dict[str, str]]:
    """Return the body of the answer, and its headers.

    Args:
        request: that is answered.
        outputs: ``(N, ...)`` as the model gave them.
        info: of the model that answered.
    """
    head: dict[str, Any] = {"model_name": info.name, "model_version": info.version}
    if request.id is not None:
        head["id"] = request.id
    tensor, raw = _tensor(request.wanted, outputs, info)
    head["outputs"] = [tensor]
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    if raw is None:
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(text))}
    return text + raw, headers


def _tensor(
    wanted: Wanted, outputs: np.ndarray, info: ModelInfo
) -> tuple[dict[str, Any], bytes | None]:
    """Return the output as JSON, and its bytes where they are wanted."""
    spec = info.manifest["outputs"][0]
    if wanted.classification:
        return _classes(wanted, outputs, info)
    tensor = {
        "name": spec["name"],
        "datatype": DATATYPE_OF[outputs.dtype.name],
        "shape": list(outputs.shape),
    }
    if not wanted.binary:
        flat = np.ascontiguousarray(outputs).ravel()
        tensor["data"] = flat.tolist() if flat.dtype == np.float16 else flat
        return tensor, None
    raw = outputs.astype(outputs.dtype.newbyteorder("<"), copy=False).tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    return tensor, raw


def _classes(
    wanted: Wanted, outputs: np.ndarray, info: ModelInfo
) -> tuple[dict[str, Any], bytes | None]:
    """Write the likeliest classes as ``value:index:label``, best first."""
    classes = outputs.shape[-1] if outputs.ndim > 1 else 1
    count = min(wanted.classification, classes)
    rows = outputs.reshape(-1, classes).astype(np.float64)  # booleans have no order to negate
    order = np.argsort(-rows, axis=-1, kind="stable")[:, :count]
    texts = [
        f"{row[i]:f}:{i}" + (f":{info.labels[i]}" if info.labels else "")
        for row, best in zip(rows, order, strict=True)
        for i in best
    ]
    tensor: dict[str, Any] = {
        "name": info.manifest["outputs"][0]["name"],
        "datatype": "BYTES",
        "shape": [*(outputs.shape[:-1] or outputs.shape), count],
    }
    if not wanted.binary:
        tensor["data"] = texts
        return tensor, None
    raw = b"".join(struct.pack("<I", len(text)) + text for text in map(str.encode, texts))
    tensor["parameters"] = {"binary_data_size": len(raw)}
    return tensor, raw


def metadata(info: ModelInfo, versions: Sequence[str]) -> dict[str, Any]:
    """Describe a model: its tensors, and where it computes."""
    return {
        "name": info.name,
        "versions": list(versions),
        "platform": "onnx_onnxv1",
        "inputs": [_described(spec) for spec in info.manifest["inputs"]],
        "outputs": [_described(spec) for spec in info.manifest["outputs"]],
        "properties": {
            "version": info.version,
            "provider": info.provider,
            "target": info.manifest["target"],
            "task": info.manifest["task"],
        },
        "labels": list(info.labels),
    }


def _described(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": spec["name"],
        "datatype": DATATYPE_OF.get(spec["dtype"]),
        "shape": spec["shape"],
    }


def config(info: ModelInfo, max_batch: int) -> dict[str, Any]:
    """Describe a model as Triton's model configuration does (model_config.proto)."""
    kind = "KIND_CPU" if info.provider == CPU else "KIND_GPU"
    return {
        "name": info.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_batch,
        "input": [_configured(spec) for spec in info.manifest["inputs"]],
        "output": [_configured(spec) for spec in info.manifest["outputs"]],
        "dynamic_batching": {},
        "instance_group": [{"name": info.name, "kind": kind, "count": 1}],
        "version_policy": {"specific": {"versions": [info.version]}},
        "parameters": {"provider": {"string_value": info.provider}},
    }


def _configured(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": spec["name"],
        "data_type": f"TYPE_{DATATYPE_OF.get(spec['dtype'])}",
        "dims": spec["shape"][1:],
    }


def statistics(info: ModelInfo, totals: Mapping[str, float]) -> dict[str, Any]:
    """Describe what a model did, as Triton's statistics extension does; times are ns.

    Args:
        info: of the model.
        totals: see ``Meters.totals``.
    """

    def duration(count: str, seconds: str) -> dict[str, int]:
        return {"count": int(totals[count]), "ns": int(1e9 * totals[seconds])}

    compute = duration("deploykit_compute_seconds_count", "deploykit_compute_seconds_sum")
    answered = int(totals["deploykit_queue_seconds_count"])
    none = {"count": answered, "ns": 0}
    return {
        "name": info.name,
        "version": info.version,
        "last_inference": int(1000 * totals["deploykit_last_answer_timestamp_seconds"]),
        "inference_count": int(totals["deploykit_samples_total"]),
        "execution_count": compute["count"],
        "inference_stats": {
            "success": duration("ok", "deploykit_request_seconds_sum"),
            "fail": {"count": int(totals["failed"]), "ns": 0},
            "queue": duration("deploykit_queue_seconds_count", "deploykit_queue_seconds_sum"),
            "compute_input": none,
            "compute_infer": compute,
            "compute_output": none,
        },
        "batch_stats": [],
    }
