"""JSON Schemas and examples of what a model takes and answers, with the bounds that are held.

Generators of requests read them as well as people. So an array of up to ``EXACT`` numbers is
described number by number; what is larger has an upper bound, and its size told in words,
because nobody generates 150,000 numbers inside bounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from deploykit.server.engine import ModelInfo
    from deploykit.server.settings import Settings

JsonDict = dict[str, Any]
EXACT = 1024
SMALL_BATCH = 3
MAX_NAMED_LABELS = 1000
# One grey pixel as a PNG file: the smallest image that every model takes.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


class Bodies:
    """What one version of a model takes and answers.

    Attributes:
        takes_images: whether clients send image files, too.
        classes: count of the model's classes, the largest ``top``.
    """

    def __init__(self, model: ModelInfo, settings: Settings) -> None:
        self._model, self._max_batch, self._max_body = model, settings.max_batch, settings.max_body
        self._input, self._output = model.manifest["inputs"][0], model.manifest["outputs"][0]
        self._shape: list[int] = list(self._input["shape"][1:])
        self._example: list[int] = [max(size, 1) for size in self._shape]
        self._dtype = np.dtype(self._input["dtype"])
        self._count = math.prod(self._example)
        self._varies = -1 in self._shape
        self._is_exact = not self._varies and self._count <= EXACT
        self.takes_images = model.manifest["preprocess"] is not None
        self.classes: int = self._output["shape"][-1]

    # What it takes

    def predict_bodies(self, schema: str) -> JsonDict:
        """Return the request bodies of ``/predict`` by content type; ``schema`` is the JSON's."""
        images = {
            "image/png": self._file() | {"x-example-command": f"echo {PIXEL} | base64 -d"},
            "image/jpeg": self._file(),
        }
        size = self._count * self._dtype.itemsize
        zeros = f"head -c {size} /dev/zero"
        raw = {
            "application/octet-stream": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": (
                        f"Little-endian {self._dtype.name}, row-major, {size} bytes a sample, "
                        f"1 to {self._max_batch} samples back to back."
                    ),
                    "minLength": size,
                    "maxLength": max(size, min(self._max_body, size * self._max_batch)),
                },
                "x-example-command": zeros,
            },
        }
        return {
            **(images if self.takes_images else {}),
            "application/json": {"schema": {"$ref": schema}} | self._predict_example(),
            "application/x-npy": self._file() | {"x-example-command": self._npy_command(zeros)},
            **({} if self._varies else raw),  # bytes alone do not tell a shape
        }

    def predict_json(self) -> JsonDict:
        """Return the schema of the JSON that ``/predict`` takes."""
        forms = [_object({"inputs": self._inputs()}), self._inputs()]
        if self.takes_images:
            image = {
                "type": "string",
                "description": "A PNG or JPEG file in base64.",
                "contentEncoding": "base64",
                "format": "base64-image",
                "maxLength": self._max_body,
                "examples": [PIXEL],
            }
            images = {"type": "array", "items": image, "minItems": 1, "maxItems": self._max_batch}
            forms = [_object({"image": image}), _object({"images": images}), *forms]
        return {"oneOf": forms}

    def infer_bodies(self, schema: str) -> JsonDict:
        """Return the request bodies of ``/infer`` by content type; ``schema`` is the JSON's."""
        size = self._count * self._dtype.itemsize
        head = json.dumps(
            {"inputs": [self._named() | {"parameters": {"binary_data_size": size}}]},
            separators=(",", ":"),
        )
        return {
            "application/json": {"schema": {"$ref": schema}} | self._infer_example(),
            "application/octet-stream": self._file()
            | {
                "x-example-command": _together(
                    f"printf %s {_quoted(head)}", f"head -c {size} /dev/zero"
                ),
                # As a parameter of the operation it would belong to JSON bodies, too.
                "x-example-headers": {"Inference-Header-Content-Length": str(len(head.encode()))},
            },
        }

    def infer_json(self) -> JsonDict:
        """Return the schema of an inference request in JSON."""
        output = {
            "name": {"const": self._output["name"]},
            "parameters": {
                "type": "object",
                "properties": {
                    "binary_data": {"type": "boolean"},
                    "classification": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                },
            },
        }
        optional = {
            "id": {"type": "string"},
            "parameters": {
                "type": "object",
                "properties": {
                    "binary_data_output": {"type": "boolean"},
                    "timeout": {
                        "type": "integer",
                        "minimum": 0,
                        "description": "Microseconds that the client will wait; 0: any.",
                    },
                },
            },
            "outputs": {"type": "array", "items": _record(output, ["name"]), "maxItems": 1},
        }
        tensors = {"type": "array", "items": self._tensor(), "minItems": 1, "maxItems": 1}
        return _record({"inputs": tensors, **optional}, ["inputs"])

    def _tensor(self) -> JsonDict:
        """Return the schema of the input.

        JSON Schema cannot say that ``data`` has as many numbers as ``shape`` says, so the first
        few batch sizes are written out; the others have bounds.
        """
        tensor = {
            "name": {"const": self._input["name"]},
            "datatype": {"const": datatype_of(self._dtype)},
            "shape": self._batch_shape(1),
            "data": {
                "description": (
                    "The numbers of the samples, row-major, flat or nested as `shape` says."
                ),
                "type": "array",
            },
        }
        if not self._varies:
            tensor["data"]["maxItems"] = self._count * self._max_batch
        if not self._is_exact:
            return _record(tensor)
        exact = range(1, 1 + min(SMALL_BATCH, self._max_batch))
        sizes = [
            {"shape": {"const": [size, *self._shape]}, "data": self._data(size, size)}
            for size in exact
        ]
        if self._max_batch > exact[-1]:
            least = exact[-1] + 1
            data = self._data(least, self._max_batch)
            sizes.append({"shape": self._batch_shape(least), "data": data})
        return _record(tensor) | {"anyOf": [{"properties": one} for one in sizes]}

    def _batch_shape(self, least: int) -> JsonDict:
        """Return the schema of the shape of ``least`` or more samples."""
        batch: JsonDict = {"type": "integer", "minimum": least, "maximum": self._max_batch}
        rank = 1 + len(self._shape)
        return {
            "type": "array",
            "prefixItems": [batch, *map(_size, self._shape)],
            "minItems": rank,
            "maxItems": rank,
        }

    def _data(self, least: int, most: int) -> JsonDict:
        """Return the schema of ``least`` to ``most`` samples, flat or nested."""
        number = number_of(self._dtype)
        flat = {
            "type": "array",
            "items": number,
            "minItems": least * self._count,
            "maxItems": most * self._count,
        }
        nested = {
            "type": "array",
            "items": _nested(self._shape, number),
            "minItems": least,
            "maxItems": most,
        }
        return {"anyOf": [flat, nested]}

    def _inputs(self) -> JsonDict:
        """Return the schema of nested numbers: a sample or a batch."""
        described = {
            "description": (
                f"Numbers nested as one sample, {tuple(self._shape)}, or as a batch of 1 to "
                f"{self._max_batch} of them."
            )
        }
        if not self._is_exact:
            return described | {"type": "array", "minItems": 1}
        sample = _nested(self._shape, number_of(self._dtype))
        batch = {"type": "array", "items": sample, "minItems": 1, "maxItems": self._max_batch}
        return described | {"anyOf": [sample, batch]}

    def _file(self) -> JsonDict:
        return {"schema": {"type": "string", "format": "binary", "maxLength": self._max_body}}

    # What it answers

    def answer(self, label: str) -> JsonDict:
        """Return the schema of what ``/predict`` answers; ``label`` refers to that of a label."""
        probability = {"type": "number", "minimum": 0, "maximum": 1}
        ranked = {"label": {"$ref": label}, "probability": probability}
        top = {
            "type": "array",
            "description": "The likeliest classes, best first; `top` says how many.",
            "items": _object(ranked),
            "minItems": 1,
            "maxItems": self.classes,
        }
        predictions = {
            "type": "array",
            "description": "One a sample, in order.",
            "items": _object({**ranked, "top": top}),
            "minItems": 1,
            "maxItems": self._max_batch,
        }
        model = {"model": {"const": self._model.name}, "version": {"type": "string"}}
        return _record({**model, "predictions": predictions})

    def label(self) -> JsonDict:
        """Return the schema of a label: its values where they are not too many."""
        labels = list(self._model.manifest["labels"]) or list(map(str, range(self.classes)))
        return {"enum": labels} if len(labels) <= MAX_NAMED_LABELS else {"type": "string"}

    def infer_answer(self) -> JsonDict:
        """Return the schema of an inference response in JSON."""
        integer = {"type": "integer", "minimum": 1}
        output = {
            "name": {"const": self._output["name"]},
            "datatype": {"enum": [datatype_of(np.dtype(self._output["dtype"])), "BYTES"]},
            "shape": {"type": "array", "items": integer, "minItems": 1},
            "data": {
                "type": "array",
                "description": "Numbers; with `classification` strings `value:index[:label]`.",
                "items": {"type": ["number", "string"]},
            },
            "parameters": {"type": "object"},
        }
        outputs = {
            "type": "array",
            "items": _object(output, ["name", "datatype", "shape"]),
            "minItems": 1,
            "maxItems": 1,
        }
        names = {"model_name": {"const": self._model.name}, "model_version": {"type": "string"}}
        return _object({**names, "id": {"type": "string"}, "outputs": outputs}, [*names, "outputs"])

    # Examples that work as they stand

    def _predict_example(self) -> JsonDict:
        if self.takes_images:
            return {"example": {"image": PIXEL}}
        if self._count > EXACT:
            return {}
        return {"example": {"inputs": np.zeros(self._example, self._dtype).tolist()}}

    def _infer_example(self) -> JsonDict:
        if self._count <= EXACT:
            data = np.zeros(self._count, self._dtype).tolist()
            return {"example": {"inputs": [self._named() | {"data": data}]}}
        head = json.dumps({"inputs": [self._named() | {"data": []}]}).removesuffix("]}]}")
        return {"x-example-command": _zeros(self._count, head, "]}]}")}

    def _named(self) -> JsonDict:
        """Return name, shape and datatype of an input of one sample."""
        return {
            "name": self._input["name"],
            "shape": [1, *self._example],
            "datatype": datatype_of(self._dtype),
        }

    def _npy_command(self, raw: str) -> str:
        """Return a command that writes a ``.npy`` file of one sample: its header is 128 bytes."""
        shape = (1, *self._example)
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        return _together(rf'''printf '\223NUMPY\001\000\166\000%-117s\n' "{about}"''', raw)


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the Open Inference Protocol's name of a dtype: ``FP32`` of float32."""
    if dtype.kind == "b":
        return "BOOL"
    return {"u": "UINT", "i": "INT", "f": "FP"}[dtype.kind] + str(8 * dtype.itemsize)


def number_of(dtype: np.dtype[Any]) -> JsonDict:
    """Return the schema of one number that fits into ``dtype``."""
    if dtype.kind == "b":
        return {"type": "boolean"}
    if dtype.kind == "f":
        largest = float(np.finfo(dtype).max)
        return {"type": "number", "minimum": -largest, "maximum": largest}
    bounds = np.iinfo(dtype)
    return {"type": "integer", "minimum": int(bounds.min), "maximum": int(bounds.max)}


def _object(properties: JsonDict, required: Sequence[str] | None = None) -> JsonDict:
    """Return the schema of an object with these keys and no other; all are required by default."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }


def _record(properties: JsonDict, required: Sequence[str] | None = None) -> JsonDict:
    """Return the schema of an object with these keys and perhaps others, which do not matter."""
    schema = _object(properties, required)
    del schema["additionalProperties"]
    return schema


def _size(size: int) -> JsonDict:
    """Return the schema of one size of a shape; -1 varies."""
    return {"type": "integer", "minimum": 1} if size == -1 else {"const": size}


def _nested(shape: Sequence[int], item: JsonDict) -> JsonDict:
    """Return the schema of arrays nested as ``shape``."""
    for size in reversed(shape):
        item = {"type": "array", "items": item, "minItems": size, "maxItems": size}
    return item


# Commands for a POSIX shell that write an example to standard output.


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _together(*commands: str) -> str:
    return "{ " + "; ".join(commands) + "; }"


def _zeros(count: int, before: str, after: str) -> str:
    """Write ``count`` zeros with commas between two texts: as a line they would be too long."""
    zeros = f"yes 0 | head -n {count - 1} | tr '\\n' ','"
    return _together(f"printf %s {_quoted(before)}", zeros, f"printf %s {_quoted('0' + after)}")
