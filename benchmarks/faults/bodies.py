"""Bad requests in sound HTTP: every form of body, wrong in every way that we could think of.

Each is whole, so each is owed an answer with a status that the OpenAPI document names.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from calls import LENGTH, Call, every_form, framed, infer_path, tensor, told
from served_models import Served

from deploykit.bundle_files import npy_bytes
from faults.files import broken_jpegs, broken_npys, broken_pngs
from faults.sockets import listed, scrambled
from faults.verdicts import Case, Documented

MIB = 2**20
# What may stand in a field of the protocol and is never right in most of them.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1.5, 2**31, 2**63, 2**64, 10**30, 1e300),
    *("", "x", "1", "\x00", "\ud800", "a" * 5000),
    *([], [None], [[]], [-1], [1] * 1000, {}, {"a": {}}),
)
METHODS = ("GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "FOO")


class BadBodies:
    """Makes cases for the models of a server.

    Attributes:
        documented: what the server's OpenAPI document says.
        max_batch: samples that a request may bring.
    """

    def __init__(self, documented: Documented, max_batch: int) -> None:
        self.documented, self.max_batch = documented, max_batch

    def case(self, kind: str, call: Call, **headers: str | None) -> Case:
        """Return a case of a call that is owed an answer."""
        statuses = self.documented.of(call.method, call.path)
        return Case(kind, (call.wire(**headers),), statuses, method=call.method)

    def listed(self, served: Served) -> Iterator[Case]:
        """Yield every fault that is listed here, for one model."""
        predict = f"/predict/{served.name}"
        for text in (*listed("json"), *_numbers(served)):
            for target in (predict, infer_path(served)):
                yield self.case("JSON", Call(target, text, {"content-type": "application/json"}))
            yield self.case("JSON", Call(predict, text))
        yield from self._shapes(served, predict)
        for body in (*broken_npys(served), *listed("files")):
            yield self.case(".npy and other files", Call(predict, body))
            yield self.case(
                ".npy and other files", Call(predict, body, {"content-type": "application/x-npy"})
            )
        yield from self._images(predict)
        yield from self._protocol(served)
        yield from self._packed(served)
        yield from self._around(served, predict)

    def scrambled(self, served: Served, count: int, drawn: random.Random) -> Iterator[Case]:
        """Yield so many good requests with changed bytes in their bodies."""
        forms = every_form(served)
        for _ in range(count):
            name = drawn.choice(sorted(forms))
            call = forms[name]
            within = 200 if drawn.random() < 0.5 else None  # heads of files are where it hurts
            changed = replace(call, body=scrambled(call.body, drawn, within))
            yield self.case(f"scrambled {name}", changed)

    def _shapes(self, served: Served, predict: str) -> Iterator[Case]:
        """Samples of a wrong count, shape or kind, raw, as numbers and as .npy."""
        one = served.samples[0]
        most = np.resize(served.samples, (self.max_batch + 1, *one.shape))
        wrong = [most, most[:0], one[:-1], one[..., np.newaxis, np.newaxis], one.ravel(), one[:0]]
        wrong += [
            np.stack([one[np.newaxis]] * 2),
            np.array(5, one.dtype),
            np.zeros((0, 0), one.dtype),
        ]
        for array in wrong:
            yield self.case("shapes", told(predict, {"inputs": array.tolist()}))
            yield self.case("shapes", Call(predict, npy_bytes(array)))
            data = {**tensor(served), "shape": list(array.shape), "data": array.tolist()}
            yield self.case("shapes", told(infer_path(served), {"inputs": [data]}))
        raw = {"content-type": "application/octet-stream"}
        for size in (0, 1, one.nbytes - 1, one.nbytes + 1, most.nbytes, 2 * one.nbytes - 1):
            yield self.case("shapes", Call(predict, most.tobytes()[:size], raw))
            yield self.case(
                "shapes", Call(infer_path(served), most.tobytes()[:size], {LENGTH: "0"})
            )

    def _images(self, predict: str) -> Iterator[Case]:
        for body in (*broken_pngs(), *broken_jpegs()):
            yield self.case("images", Call(predict, body))
            text = base64.b64encode(body).decode()
            yield self.case("images", told(predict, {"images": [text]}))

    def _protocol(self, served: Served) -> Iterator[Case]:
        """Every field of the protocol missing and with every odd value; wrong sizes and names."""
        raw = served.samples[:1].tobytes()
        good = {**tensor(served), "parameters": {"binary_data_size": len(raw)}}
        output = {"name": served.result.name, "parameters": {"binary_data": True}}
        target = infer_path(served)

        def ask(inputs: Any, outputs: Any = (output,), raw: bytes = raw, **more: Any) -> Case:
            head = {"inputs": inputs, "outputs": outputs, **more}
            return self.case("protocol", framed(target, head, raw))

        for key in good:
            yield ask([{name: value for name, value in good.items() if name != key}])
            for value in ODD_VALUES:
                yield ask([{**good, key: value}])
        for value in ODD_VALUES:
            yield ask(value)
            yield ask([good], value)
            yield ask([good], [value])
            yield ask([good], [{**output, "name": value}])
            yield ask([good], id=value)
            yield ask([good], parameters=value)
            yield ask([good], parameters={"binary_data_output": value})
            yield ask([good], parameters={"timeout": value})
            yield ask([{**good, "parameters": {"binary_data_size": value}}])
            for key in ("binary_data", "classification", "shared_memory_region"):
                yield ask([good], [{**output, "parameters": {key: value}}])
            yield ask([{**tensor(served), "data": value}], raw=b"")
            yield ask([{**good, "shape": [value] * len(good["shape"])}])
        for datatype in (
            "FP16",
            "FP64",
            "BF16",
            "BYTES",
            "BOOL",
            "INT64",
            "uint8",
            "FP32",
            "UINT8",
        ):
            yield ask([{**good, "datatype": f"{datatype}_"}])
            yield ask([{**tensor(served), "datatype": datatype, "data": ["a"]}], raw=b"")
        yield ask([good, good])
        yield ask([good], [output, output])
        yield ask([{**good, "data": [1]}])
        yield ask([good], raw=raw + b"x")
        yield ask([good], raw=raw[:-1])
        yield ask([good], raw=b"")
        yield from self._framing(target, json.dumps({"inputs": [good]}).encode(), raw)

    def _framing(self, target: str, text: bytes, raw: bytes) -> Iterator[Case]:
        """Wrong lengths of the JSON in front of the tensors."""
        for length in (
            *(
                "-1",
                "+1",
                "x",
                "",
                "0",
                "1",
                "1.5",
                "1e2",
                "9" * 30,
                "\x80",
                " ",
                "0x10",
                "٣",
                "5, 5",
            ),
            *(str(len(text) + by) for by in (-1, 1, len(raw), len(raw) + 1)),
        ):
            encoded = length.encode().decode("latin-1")
            yield self.case("protocol", Call(target, text + raw, {LENGTH: encoded}))
        yield self.case("protocol", Call(target, text + raw))
        yield self.case("protocol", Call(target, text + raw, {"content-type": "image/png"}))

    def _packed(self, served: Served) -> Iterator[Case]:
        """Compressed bodies: bombs, damaged ones, other codings."""
        forms = every_form(served)
        for call in (forms["numbers"], forms["binary tensor"], forms["raw samples"]):
            for coding, bodies in _packings(call.body):
                for body in bodies:
                    headers = {**call.headers, "content-encoding": coding}
                    yield self.case("packed", replace(call, body=body, headers=headers))

    def _around(self, served: Served, predict: str) -> Iterator[Case]:
        """Content types, methods, paths, queries and the repository."""
        forms = every_form(served)
        for call in forms.values():
            for content_type in texts("content_types"):
                yield self.case("content type", call, content_type=content_type)
        numbers = forms["numbers"]
        for top in texts("tops"):
            yield self.case("query", replace(numbers, target=f"{predict}?top={top}"))
        for path in (
            "/",
            "/predict",
            predict,
            infer_path(served),
            "/v2/repository/index",
            "/metrics",
        ):
            for method in METHODS:
                yield self.case("method", Call(path, b"", {}, method))
        for name in texts("names"):
            for path in (
                "/predict/{}",
                "/v2/models/{}/infer",
                "/v2/repository/models/{}/load",
                "/v2/models/{}",
            ):
                call = replace(numbers, target=path.format(name))
                documented = frozenset({400, 404, 405})
                yield replace(self.case("path", call), documented=documented)
        for content in (None, [], "x", {"path": "/etc/passwd"}, {"parameters": {"file:x": "AAAA"}}):
            for verb in ("unload", "load"):
                call = told(f"/v2/repository/models/nobody/{verb}", content)
                yield replace(self.case("repository", call), documented=frozenset({400, 404}))


def _packings(body: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Yield content codings with what they do not describe, or describe as a bomb."""
    packed, flat = gzip.compress(body, mtime=0), zlib.compress(body)
    bomb = gzip.compress(bytes(64 * MIB))
    yield "gzip", [bomb, gzip.compress(bomb), gzip.compress(b"") * 5000]
    yield "gzip", [b"", b"\x1f\x8b", body, flat, packed + b"x", packed + packed, packed[10:]]
    yield "gzip", [packed[:cut] for cut in (5, 15, -8, -4, -1)]
    yield "gzip", [packed[:at] + b"\x55\xff" + packed[at + 2 :] for at in (2, 3, 9, 12, 30, 60)]
    yield "gzip", [packed[:-4] + bytes(4), packed[:-8] + bytes(4) + packed[-4:]]
    yield (
        "deflate",
        [zlib.compress(bytes(64 * MIB)), flat[:-1], flat + b"x", flat[2:-6], b"", packed],
    )
    yield "gzip, gzip", [gzip.compress(packed), packed]
    for coding in ("br", "zstd", "compress", "x", "gzip;q=1", "gzip, deflate", "identity, gzip"):
        yield coding, [packed]
    for coding in ("GZIP", "*", " ", "identity", ","):
        yield coding, [packed, body]


def texts(name: str) -> list[str]:
    """Return entries of the corpus as `Call` takes them."""
    return [entry.decode("latin-1") for entry in listed(name)]


def _numbers(served: Served) -> Iterator[bytes]:
    """Yield a body for each odd number, which stands where a sample's first number belongs."""
    sample = json.dumps(served.samples[0].tolist()).encode()
    at = len(sample) - len(sample.lstrip(b"["))
    end = sample.index(b",", at)
    for number in listed("numbers"):
        changed = sample[:at] + number + sample[end:]
        yield b'{"inputs": ' + changed + b"}"
        head = json.dumps(tensor(served)).encode()[:-1]
        yield b'{"inputs": [' + head + b', "data": [' + changed + b"]}]}"
