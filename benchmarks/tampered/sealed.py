"""Alterations by somebody who writes a new manifest too: only a signature tells."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from onnx import TensorProto

from deploykit import runtime
from deploykit.signing import sign_bundle
from tampered.bundles import Files, Mutation, as_folder, as_zip, folder_of, seal
from tampered.contents import Amount, flipped

BASE64 = string.ascii_letters + string.digits
LOCATIONS = (
    *("../elsewhere/weight.bin", "/etc/passwd", "weight.bin", "run.py", "golden/../run.py"),
    *("../outside/secret", "/dev/zero", "", "model.onnx"),
)


@dataclass(frozen=True)
class Keys:
    """A pair of keys, as PEM files."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str) -> Keys:
    """Write a pair of keys on the curve P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    keys = Keys(folder / f"{name}-private.pem", folder / f"{name}-public.pem")
    encoding = serialization.Encoding.PEM
    keys.private.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    keys.public.write_bytes(
        key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return keys


def signature_of(files: Files, keys: Keys, place: Path) -> bytes:
    """Return the signature of a bundle of these files."""
    place.mkdir()
    folder = folder_of(files, place)
    sign_bundle(folder, keys.private)
    return (folder / runtime.SIGNATURE).read_bytes()


@dataclass(frozen=True)
class Signatures:
    """What an attacker may find.

    Attributes:
        own: of the bundle, by its owner's key.
        moved: of another bundle, by the same key.
        foreign: of the bundle, by another key.
    """

    own: bytes
    moved: bytes
    foreign: bytes


def sealed_anew(
    files: Files, signatures: Signatures, drawn: random.Random, amount: Amount
) -> Iterator[Mutation]:
    """Yield bundles whose manifest is right about what was altered."""
    for name, altered in _runners(files, drawn, amount):
        yield as_folder("sealed anew: the runner", name, seal(altered), "runner")
    signed = {**files, runtime.SIGNATURE: signatures.own}
    for name, altered in _altered(signed, drawn, amount):
        yield as_folder("sealed anew, under the old signature", name, altered, "key")
        yield as_zip("sealed anew, under the old signature", name, altered, "key")
    for name, signature in _signatures(signatures, drawn, amount):
        if signature == signatures.own:  # both keys sign the same words
            continue
        altered = {**files, runtime.SIGNATURE: signature}
        yield as_folder("signature altered or another's", name, altered, "key")
        yield as_zip("signature altered or another's", name, altered, "key")
    yield as_folder("without a signature", "as it was", files, "key")
    yield as_zip("without a signature", "as it was", files, "key")


def external_data(files: Files) -> Iterator[Mutation]:
    """Yield bundles whose model asks for weights elsewhere, behind the old manifest."""
    for location in LOCATIONS:
        altered = {**files, runtime.MODEL: _external(files[runtime.MODEL], location)}
        yield as_folder("external data", repr(location), altered)
        yield as_zip("external data", repr(location), altered)


def _external(model: bytes, location: str) -> bytes:
    proto = onnx.load_model_from_string(model)
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    return bytes(proto.SerializeToString())


def _runners(
    files: Files, drawn: random.Random, amount: Amount
) -> Iterator[tuple[str, dict[str, bytes]]]:
    runner = files[runtime.RUNNER]
    others = {
        "all is well": b"print('all is well')\n",
        "empty": b"",
        "one line more": runner + b"\nimport os\n",
        "cut": runner[:-1],
        "line ends": runner.replace(b"\n", b"\r\n"),
    }
    for name, other in others.items():
        yield name, {**files, runtime.RUNNER: other}
    for _ in range(amount.drawn):
        at = drawn.randrange(len(runner))
        yield f"byte {at}", {**files, runtime.RUNNER: flipped(runner, at, drawn)}


def _altered(
    signed: Files, drawn: random.Random, amount: Amount
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Alter files or the manifest's words, and seal them; the signature stays."""
    named = [name for name in signed if name not in {runtime.MANIFEST, runtime.SIGNATURE}]
    for _ in range(amount.drawn):
        name = drawn.choice(named)
        at = drawn.randrange(len(signed[name]))
        altered = {**signed, name: flipped(signed[name], at, drawn)}
        yield f"{name}, byte {at}", seal(altered)
    for location in LOCATIONS:
        model = _external(signed[runtime.MODEL], location)
        yield f"weights in {location!r}", seal({**signed, runtime.MODEL: model})
    yield "one file more", seal({**signed, "more": b"more"})
    yield "one less", seal({name: data for name, data in signed.items() if name != "README.md"})
    yield (
        "two golden samples swapped",
        seal(
            {
                **signed,
                "golden/000.png": signed["golden/001.png"],
                "golden/001.png": signed["golden/000.png"],
            }
        ),
    )
    manifest = json.loads(signed[runtime.MANIFEST])
    for change in (
        {"labels": manifest["labels"][::-1]},
        {"name": "other"},
        {"version": "2"},
        {"threads": 2},
        {"tolerance": {"max_abs": 1e30}},
        {"measured": {"accuracy": 1.0}},
        {"verified_on": {**manifest["verified_on"], "deploykit": "0.0.1"}},
        {"min_onnxruntime": "1.0"},
        {"preprocess": {**manifest["preprocess"], "filter": "nearest"}},
    ):
        yield str(change)[:60], seal(signed, **change)


def _signatures(
    signatures: Signatures, drawn: random.Random, amount: Amount
) -> Iterator[tuple[str, bytes]]:
    own = signatures.own
    yield "of another bundle", signatures.moved
    yield "by another key", signatures.foreign
    yield from GARBAGE.items()
    for part in ("payload", "sig"):
        for _ in range(amount.drawn // 2):
            yield f"its {part}", _other_character(own, part, drawn)
        yield f"the other's {part}", _with_part(own, signatures.foreign, part)
        yield f"the moved one's {part}", _with_part(own, signatures.moved, part)
    for _ in range(amount.drawn // 10):
        length = drawn.randrange(len(own))
        yield f"cut to {length} bytes", own[:length]


GARBAGE = {
    "empty": b"",
    "an object": b"{}",
    "a list": b"[]",
    "null": b"null",
    "text": b"signed, the owner",
    "binary": b"\xff\x00\x80",
    "deep": b"[" * 60_000,
    "no envelope": b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}',
    "too large": bytes(runtime.MAX_SIGNATURE_BYTES + 1),
}


def _place(signature: bytes, part: str) -> tuple[int, int]:
    """Return where the Base64 text of a part stands."""
    text = str(_part(json.loads(signature), part)).encode()
    start = signature.index(text)
    return start, start + len(text)


def _part(signature: dict[str, object], part: str) -> object:
    envelope: dict[str, object] = signature["dsseEnvelope"]  # type: ignore[assignment]
    if part == "payload":
        return envelope["payload"]
    return envelope["signatures"][0]["sig"]  # type: ignore[index]


def _with_part(signature: bytes, other: bytes, part: str) -> bytes:
    (start, stop), (from_, to) = _place(signature, part), _place(other, part)
    return signature[:start] + other[from_:to] + signature[stop:]


def _other_character(signature: bytes, part: str, drawn: random.Random) -> bytes:
    """Change a character that stands for six bits of the part; the last ones may stand for less."""
    start, stop = _place(signature, part)
    at = drawn.randrange(start, stop - 4)
    other = drawn.choice([one for one in BASE64.encode() if one != signature[at]])
    return signature[:at] + bytes([other]) + signature[at + 1 :]
