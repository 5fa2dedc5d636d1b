"""Manifests that say something else, or the same in another spelling."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from deploykit import runtime
from tampered.bundles import Files, spell

DEEP = 100_000
SECRET = b"a file beside the bundle"
# Where a reader that joins them to the bundle's folder would read or write something else.
NAMES = (
    *("../outside/secret", "..", ".", "/etc/passwd", "/dev/zero", "/proc/self/environ", "//x"),
    *("golden/../../outside/secret", "golden/..", "./model.onnx", "golden//000.png", "a/./b"),
    *("", " ", "model.onnx ", " model.onnx", "model.onnx\n", "model.onnx\0", "model.onnx\0.png"),
    *("..\\outside\\secret", "golden\\000.png", "C:x", "C:\\x", "\\\\host\\share", "model.onnx:x"),
    *(".hidden", "golden/.hidden", "-rf", "~", "~/x", "$HOME", "%2e%2e/x", "a" * 201, "a/" * 90),
    *("\u00fc", "model\u2024onnx", "\u202egnp.000", "mode\u0131.onnx", "\ud800", "\ufeffx"),
    *("manifest.json", "signature.json", "golden/", "/", "file:///etc/passwd", "http://x/y"),
)
COLLIDING = (
    *("MODEL.ONNX", "Model.onnx", "GOLDEN/000.png", "Run.py", "Manifest.json", "Signature.json"),
)
# The same value in another spelling, or one that two readers may read differently.
SPELLINGS = {
    '"schema":1': '"schema":1.0',
    '"threads":1': '"threads":9,"threads":1',
    '"name":': '"name":"other","name":',
    '"opset":20': '"opset":2e1',
    '"accuracy":0.5': '"accuracy":NaN',
    '"top1":true': '"top1":True',
    '"small"': '"\\u0073mall"',
    '{"digest"': '{/**/"digest"',
    '"version":"1"}': '"version":"1",}',
    "run.py": "run\\u002epy",
    '"labels":["a"': '"labels":["\\ud800"',
}
PLANTED = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "a number": b"1",
    "binary": b"\xff\x00\x80",
    "deep lists": b"[" * DEEP,
    "deep lists, closed": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "deep in a key": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "giant text": b'{"a":"' + b"x" * 2**21 + b'"}',
    "giant list": b"[" + b"1," * 2**20 + b"1]",
    "giant number": b'{"a":' + b"9" * 2**19 + b"}",
    "giant white space": b" " * 2**23,
    "zeros": bytes(2**20),
}


def altered_manifests(files: Files, drawn: random.Random) -> Iterator[tuple[str, str, Files]]:
    """Yield bundles whose manifest, and nothing else, was altered."""
    manifest = json.loads(files[runtime.MANIFEST])
    kinds = {
        "manifest in another spelling": _spelled(files[runtime.MANIFEST], manifest, drawn),
        "manifest with a stale digest": _stale(manifest),
        "names in a sealed manifest": _named(manifest),
        "nonsense in a sealed manifest": _nonsense(manifest),
    }
    for kind, altered in kinds.items():
        for name, data in altered:
            if data != files[runtime.MANIFEST]:
                yield kind, name, {**files, runtime.MANIFEST: data}


def _spelled(
    data: bytes, manifest: Mapping[str, Any], drawn: random.Random
) -> Iterator[tuple[str, bytes]]:
    text = data.decode()
    shuffled = dict(drawn.sample(list(manifest.items()), len(manifest)))
    yield "indented", json.dumps(manifest, indent=1, sort_keys=True).encode()
    yield "with spaces", json.dumps(manifest, sort_keys=True).encode()
    yield "keys shuffled", json.dumps(shuffled, separators=(",", ":")).encode()
    mores = {"newline": "\n", "space": " ", "0": "\0", "brace": "}", "more": "{}"}
    for told, more in mores.items():
        yield f"{told} behind", f"{text}{more}".encode()
        yield f"{told} before", f"{more}{text}".encode()
    for codec in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32"):
        yield codec, text.encode(codec)
    for old, new in SPELLINGS.items():
        yield f"{old} as {new}", text.replace(old, new, 1).encode()
    for told, planted in PLANTED.items():
        yield told, planted


def _stale(manifest: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    for key in manifest:
        for value in (None, 0, "x", [], {}, True):
            yield f"{key}: {value}", runtime.canonical_json({**manifest, key: value})
        rest = {other: content for other, content in manifest.items() if other != key}
        yield f"without {key}", runtime.canonical_json(rest)
    yield "upper case", runtime.canonical_json({**manifest, "digest": manifest["digest"].upper()})
    for name, entry in manifest["files"].items():
        other = hashlib.sha256(name.encode()).hexdigest()
        for changed in ({**entry, "sha256": other}, {**entry, "bytes": entry["bytes"] + 1}):
            files = {**manifest["files"], name: changed}
            yield f"{name}: {changed}", runtime.canonical_json({**manifest, "files": files})


def _named(manifest: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Name files that lie elsewhere, with the right hash of one that is really there."""
    secret = {"bytes": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest()}
    for name in (*NAMES, *COLLIDING):
        try:
            yield repr(name), spell({**manifest, "files": {**manifest["files"], name: secret}})
        except UnicodeEncodeError:  # no JSON in UTF-8 can spell it but as \ud800
            yield repr(name), json.dumps({**manifest, "files": {name: secret}}).encode()


def _nonsense(manifest: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    changes: list[dict[str, Any]] = [
        *({"schema": value} for value in (0, 2, 99, -1, True, 1.0, "1", None, [1], 10**30)),
        *({"threads": value} for value in (0, -1, 1025, 10**9, "1", None, True, 1.5)),
        *({"labels": value} for value in (["a"], ["a", "a", "b"], [1, 2, 3], "abc", {}, None)),
        *({"inputs": value} for value in ([], [None], [{}], manifest["inputs"] * 2, {}, "x")),
        *({"outputs": value} for value in ([], [[]], [{"name": "logits"}], None)),
        *({"tolerance": {"max_abs": value}} for value in (-1, None, "1", True, 10**400, [])),
        *({"preprocess": value} for value in ({}, [], {"height": 4}, "x", 1)),
        *({"min_onnxruntime": value} for value in ("", "new", "x1", "-1", None, 1)),
        *({"files": value} for value in ({}, [], None, {"model.onnx": None}, "x", {"x": {}})),
        *({key: 1} for key in ("surprise", "Schema", "")),
    ]
    for change in changes:
        yield str(change)[:60], spell({**manifest, **change})
    for size in (-1, 2**31 + 1, 2**63, 10**40, 1.0, "1", None, True):
        entry = {**manifest["files"][runtime.MODEL], "bytes": size}
        files = {**manifest["files"], runtime.MODEL: entry}
        yield f"{runtime.MODEL} of {size} bytes", spell({**manifest, "files": files})
