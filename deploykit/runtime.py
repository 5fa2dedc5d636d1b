"""Verify a bundle, then predict with it, test it or time it.

This one file is ``deploykit.runtime`` and ships, byte for byte, as every bundle's ``run.py``.
It needs numpy and onnxruntime, and pillow where image files are read::

    python run.py selftest [--json]         the proof: hashes, golden samples
    python run.py predict FILE... [--json]  image files, or .npy where the model takes arrays
    python run.py bench [--json]            latency and memory on this machine

Exit codes: 0 done, 2 bad usage, 3 missing or undecodable input, 4 the bundle is broken or
failed its test, 5 Python or a package is missing or too old, 130 interrupted.

``manifest.json`` is canonical JSON: UTF-8, keys sorted, no white space, no NaN, no newline at
the end. Its ``digest`` is the SHA-256 of the canonical JSON of the manifest without that key,
and its ``files`` hold the size and SHA-256 of every other file. That stops accidents; against
an attacker, who can write a new manifest, it takes a signature.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import stat
import struct
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - a device may have any
    print("error: expected Python 3.10 or newer; name another: python3.12 run.py", file=sys.stderr)
    sys.exit(5)
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends quietly
try:
    import numpy as np
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: numpy cannot be loaded ({error}); pip install -U numpy", file=sys.stderr)
    sys.exit(5)

SCHEMA = 1
MANIFEST, MODEL, RUNNER, EXPECTED = "manifest.json", "model.onnx", "run.py", "golden/expected.npz"
SIGNATURE = "signature.json"  # the one file that may stand beside what the manifest names
MAX_MANIFEST_BYTES = 2**20
MAX_NAME = 200  # letters
MAX_FILE_BYTES = 2**31  # an ONNX file cannot be larger
MAX_SIGNATURE_BYTES = 2**16
MAX_ARCHIVE_BYTES = 2**32 - 1  # beyond that a zip file has another format
MAX_FILES = 10_000
MAX_INPUT_BYTES = 64 * 2**20
MAX_PIXELS = 25_000_000
MAX_THREADS = 1024
MAX_DEVICE_NAME = 80
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
CPU = ("CPUExecutionProvider",)
TOLD_SCHEMA = 1  # of what selftest and bench print as JSON
# These decide which kernels onnxruntime takes for integers and for half precision.
FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
# What the manifest holds; each value is the JSON type, or types, that stand there.
KEYS: Mapping[str, type | tuple[type, ...]] = {
    "schema": int,
    "name": str,
    "version": str,
    "target": str,
    "threads": int,
    "task": str,
    "opset": int,
    "min_onnxruntime": str,
    "inputs": list,
    "outputs": list,
    "preprocess": (dict, type(None)),
    "labels": list,
    "measured": dict,
    "measured_on": (dict, type(None)),
    "verified_on": dict,
    "tolerance": dict,
    "files": dict,
    "digest": str,
}
X86 = ("x86_64", "amd64", "x64", "i386", "i486", "i586", "i686", "x86")
CONFINED = (1, 24)  # onnxruntime before it opens weights outside of the folder that it is given
ENTRY_BYTES = 30  # before the name of a zip file's entry: APPNOTE.TXT 6.3.10, 4.3.7
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class RunnerError(ValueError):
    """Base of what this file raises; ``main`` prints it as one sentence."""

    exit_code = 1


class InputError(RunnerError):
    """What the client sent cannot be used."""

    exit_code = 3


class ImageError(InputError):
    """The bytes are not an image that can be decoded."""


class BrokenBundleError(RunnerError):
    """The folder is not what its manifest says."""

    exit_code = 4

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        extra: Sequence[str] = (),
        altered: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.extra, self.altered = tuple(missing), tuple(extra), tuple(altered)


class SelftestError(RunnerError):
    """The model does not answer as it did when the bundle was made."""

    exit_code = 4


class PackageError(RunnerError):
    """A package is missing or too old."""

    exit_code = 5


# Images: the one way from a file to the model's pixels, in training and everywhere else.


def decode_image(
    data: bytes, preprocess: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode a PNG or JPEG file into the pixels that the model takes.

    In this order: EXIF orientation applied; 16-bit grey keeps its high byte (as 16-bit colour
    does); transparency composited on white; converted to grey or RGB; for ``fit: cover`` the
    largest centred box of the target's shape is taken; resized by ``filter``, which
    ``antialias`` widens when it shrinks, across and then down.

    Args:
        data: the file's bytes.
        preprocess: ``height``, ``width``, ``channels`` (1 or 3), ``filter``, ``antialias``,
            ``fit``; see ``check_preprocess``.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        uint8 pixels of shape ``(height, width, channels)``.

    Raises:
        ImageError: the bytes are no PNG or JPEG image, or a damaged or too large one.
    """
    mode = "L" if preprocess["channels"] == 1 else "RGB"
    try:
        image = _open_image(data, max_pixels)
        image = _resize(_on_white(_upright(image)).convert(mode), preprocess)
    except (RunnerError, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen types on damaged bytes
        raise ImageError(f"expected a PNG or JPEG image, got a damaged one ({error})") from error
    pixels: np.ndarray = np.array(image, dtype=np.uint8)
    return pixels.reshape(preprocess["height"], preprocess["width"], preprocess["channels"])


def _open_image(data: bytes, max_pixels: int) -> Any:
    """Read the header by the decoder that the magic names: no other format gets a chance."""
    try:
        from PIL import JpegImagePlugin, PngImagePlugin
        from PIL.Image import Resampling, Transform, Transpose  # noqa: F401 - those of 9.1
    except ImportError as error:
        raise PackageError(
            f"image files need pillow 9.1 or newer ({_first_line(error)}); pip install -U pillow"
        ) from error
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        image: Any = PngImagePlugin.PngImageFile(io.BytesIO(data))
    elif data.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    else:
        raise ImageError(f"expected a PNG or JPEG image, got {len(data)} bytes of something else")
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"expected an image of at most {max_pixels} pixels, got {width} x {height}; shrink it"
        )
    image.load()
    return image


def _upright(image: Any) -> Any:
    """Apply the EXIF orientation, and nothing else of EXIF."""
    from PIL.Image import Transpose

    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(image.getexif().get(0x0112))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info  # transparency of palettes lives there
    return turned


def _on_white(image: Any) -> Any:
    """Drop transparency (on white) and the low byte of 16-bit grey."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey)
    if image.mode in {"LA", "PA", "RGBA"} or "transparency" in image.info:
        overlay = image.convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        white.alpha_composite(overlay)
        return white.convert("RGB")
    return image


def _resize(image: Any, preprocess: Mapping[str, Any]) -> Any:
    """Scale a grey or RGB image to the model's size."""
    from PIL.Image import Resampling, Transform

    size = width, height = preprocess["width"], preprocess["height"]
    box_width, box_height = float(image.width), float(image.height)
    if preprocess["fit"] == "cover":
        box_width = min(box_width, image.height * width / height)
        box_height = min(box_height, image.width * height / width)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    resample = Resampling[preprocess["filter"].upper()]
    if preprocess["antialias"]:
        # Across, then down: which of them Pillow does first depends on its version.
        across = (left, 0, left + box_width, image.height)
        rows = image.resize((width, image.height), resample, across)
        return rows.resize(size, resample, (0, top, width, top + box_height))
    matrix = (box_width / width, 0.0, left, 0.0, box_height / height, top)
    return image.transform(size, Transform.AFFINE, matrix, resample)


def check_preprocess(preprocess: Mapping[str, Any]) -> None:
    """Refuse a specification that this version would not follow to the letter.

    Raises:
        ValueError: a key is missing, unknown or has a value outside its range.
    """
    counts = dict.fromkeys(("height", "width"), range(1, 65536)) | {"channels": (1, 3)}
    allowed: dict[str, Any] = {
        **counts,
        "filter": FILTERS,
        "antialias": (True, False),
        "fit": ("stretch", "cover"),
        "exif": (True,),
        "alpha": ("white",),
    }
    if set(preprocess) != {*allowed, "mean", "std"}:
        raise ValueError(f"preprocess: expected the keys {sorted([*allowed, 'mean', 'std'])}")
    for key, values in allowed.items():
        value = preprocess[key]
        if value not in values or type(value) is not type(values[0]):  # 1 == 1.0 == True
            raise ValueError(f"preprocess.{key}: got {value!r}")
    if preprocess["filter"] == "lanczos" and not preprocess["antialias"]:
        raise ValueError("preprocess.antialias: lanczos needs true")
    zero_point_and_scale(preprocess)


def zero_point_and_scale(preprocess: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the normalization inside the model: ``x = (pixel - zero_point) * scale``.

    Args:
        preprocess: ``mean`` and ``std`` on the 0 to 1 scale, one number or one a channel.

    Returns:
        ``zero_point`` = round(255 mean), int32 in 0..255, and ``scale`` = 1 / (255 std),
        float32; both of shape ``(1,)`` or ``(channels,)``.

    Raises:
        ValueError: another count of numbers, or a number outside its range.
    """
    mean = np.asarray(preprocess["mean"], dtype=np.float64)
    std = np.asarray(preprocess["std"], dtype=np.float64)
    for key, values in (("mean", mean), ("std", std)):
        if values.shape not in {(1,), (preprocess["channels"],)}:
            raise ValueError(f"preprocess.{key}: expected 1 or {preprocess['channels']} numbers")
    if not (np.all((mean >= 0) & (mean <= 1)) and np.all((std > 0) & np.isfinite(std))):
        raise ValueError("preprocess: expected 0 <= mean <= 1 and std > 0")
    mean, std = np.broadcast_arrays(mean, std)
    return np.rint(255 * mean).astype(np.int32), (1 / (255 * std)).astype(np.float32)


# The manifest and the files: everything is read once, and what was verified is what is used.


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of a JSON value that hashes are taken of."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the manifest without its own digest."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def read_bundle(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read a bundle and verify every byte of it but its signature.

    Args:
        path: the bundle, a folder or a zip file that `pack` wrote; it may be reached by a link,
            but holds none.

    Returns:
        The manifest, and the verified bytes of every other file by name.

    Raises:
        BrokenBundleError: there is anything else than its manifest says.
    """
    with _told_of(path):
        files = _open_files(path)
        manifest = parse_manifest(files.read(MANIFEST, MAX_MANIFEST_BYTES))
        present = files.names()
        _check_names(manifest["files"], present)
        if SIGNATURE in present:
            _read_signature(files)
        contents = {
            name: files.read(name, entry["bytes"]) for name, entry in manifest["files"].items()
        }
        altered = [
            name
            for name, entry in manifest["files"].items()
            if not _is_as_declared(contents[name], entry)
        ]
        if altered:
            raise BrokenBundleError(
                f"differs from its manifest: {', '.join(altered)}; fetch the bundle again",
                altered=altered,
            )
    return manifest, contents


def read_signature(path: Path) -> bytes | None:
    """Return the signature that stands in a bundle, unchecked; None where there is none.

    Raises:
        BrokenBundleError: it cannot be read.
    """
    with _told_of(path):
        files = _open_files(path)
        return _read_signature(files) if SIGNATURE in files.names() else None


def about_signature(path: Path) -> str:
    """Say what a signature that nobody has checked is worth."""
    if read_signature(path) is None:
        return "no signature: the hashes stop accidents, not an attacker"
    return f"{SIGNATURE} was not checked: deploykit verify --key PUBLIC.pem checks it"


def _read_signature(files: _Folder | _Archive) -> bytes:
    data = files.read(SIGNATURE, MAX_SIGNATURE_BYTES)
    if len(data) > MAX_SIGNATURE_BYTES:
        raise BrokenBundleError(
            f"{SIGNATURE}: expected at most {MAX_SIGNATURE_BYTES} bytes; sign the bundle again",
            altered=[SIGNATURE],
        )
    return data


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Tell which bundle cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise BrokenBundleError(f"{path}: expected a bundle, found no {name}", [name]) from error
    except OSError as error:
        raise BrokenBundleError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except RunnerError as error:
        error.args = (f"{path}: {error}",)
        raise


def _open_files(path: Path) -> _Folder | _Archive:
    return _Archive(path) if path.is_file() else _Folder(path)


class _Folder:
    """The files of a bundle that is a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> set[str]:
        return _list_files(self._path)

    def read(self, name: str, limit: int) -> bytes:
        return _read_file(self._path, name, limit)


class _Archive:
    """The files of a bundle that is a zip file: read at once, and never unpacked to a disk."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_ARCHIVE_BYTES:
                raise BrokenBundleError(f"expected at most {MAX_ARCHIVE_BYTES} bytes, got {size}")
            # No more is asked for than is there: memory is taken before it is filled.
            self._files = unpack(file.read(size + 1))

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str, limit: int) -> bytes:
        if name not in self._files:
            raise BrokenBundleError(f"expected a bundle, found no {name}", [name])
        return self._files[name][: limit + 1]


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return files as a zip file: stored, the manifest first; equal files give equal bytes.

    Every entry is a plain file of 1980-01-01 (APPNOTE.TXT 6.3.10, without extras and comments).

    Raises:
        ValueError: they are more than such a file can hold, or a name is not ASCII.
    """
    entries: list[bytes] = []
    index: list[bytes] = []
    at = 0
    try:
        for name in sorted(files, key=lambda name: (name != MANIFEST, name)):
            data, spelled = files[name], name.encode("ascii")
            size = len(data)
            about = (20, 0, 0, 0, 33, zlib.crc32(data), size, size, len(spelled), 0)
            entry = struct.pack("<4s5H3I2H", b"PK\3\4", *about)
            entries += [entry, spelled, data]
            mode = (stat.S_IFREG | 0o644) << 16
            made_by = 20 | 3 << 8  # a system that knows modes
            index += [
                struct.pack("<4s6H3I5H2I", b"PK\1\2", made_by, *about, 0, 0, 0, mode, at),
                spelled,
            ]
            at += len(entry) + len(spelled) + size
        count, length = len(files), sum(map(len, index))
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, at, 0)
    except struct.error as error:
        raise ValueError("a zip file holds less than 4 GiB in 65,536 files") from error
    return b"".join([*entries, *index, end])


def unpack(data: bytes) -> dict[str, bytes]:
    """Return the files of a zip file, if it is what `pack` makes of them, byte for byte.

    So nothing can hide in it: no second entry of a name, no gap, no other size in one header than
    in another.

    Raises:
        BrokenBundleError: it is not.
    """
    files: dict[str, bytes] = {}
    at = 0
    with suppress(struct.error, UnicodeDecodeError):
        while data.startswith(b"PK\3\4", at) and len(files) < MAX_FILES:
            size, name_size = struct.unpack_from("<I4xH", data, at + 18)
            start = at + ENTRY_BYTES + name_size
            name = data[at + ENTRY_BYTES : start].decode("ascii")
            if name in files:
                break
            files[name] = data[start : start + size]
            at = start + size
    if not _is_packed(files, data):
        raise BrokenBundleError(
            "expected a bundle's folder, or a zip file as deploykit writes it; fetch the bundle "
            "again, or unzip it and name the folder"
        )
    return files


def _is_packed(files: Mapping[str, bytes], data: bytes) -> bool:
    try:
        return pack(files) == data
    except ValueError:
        return False


def _is_as_declared(data: bytes, entry: Mapping[str, Any]) -> bool:
    same_hash: bool = hashlib.sha256(data).hexdigest() == entry["sha256"]
    return same_hash and len(data) == entry["bytes"]


def _read_file(folder: Path, name: str, limit: int) -> bytes:
    """Read a plain file of at most ``limit`` bytes; one byte more tells that it is larger."""
    flags = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # not every system has each
    descriptor = os.open(folder / name, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenBundleError(f"{name}: expected a plain file", altered=[name])
        if status.st_nlink > 1:
            raise BrokenBundleError(
                f"{name}: expected a file of its own, found a hard link; copy the bundle",
                altered=[name],
            )
        return file.read(min(limit, status.st_size) + 1)


def _list_files(folder: Path) -> set[str]:
    """Name everything below ``folder``; an empty folder is named with a slash at its end."""
    names, pending = set(), [""]
    while pending:
        prefix = pending.pop()
        entries = list(os.scandir(folder / prefix))
        for entry in entries:
            if entry.is_symlink():
                raise BrokenBundleError(f"{prefix + entry.name!r}: expected no link")
            if entry.is_dir():
                pending.append(f"{prefix}{entry.name}/")
            else:
                names.add(prefix + entry.name)
        if not entries:
            names.add(prefix)
        if len(names) + len(pending) > MAX_FILES:
            raise BrokenBundleError(f"expected at most {MAX_FILES} files")
    return names


def _check_names(declared: Mapping[str, Any], present: set[str]) -> None:
    missing = sorted(set(declared) - present)
    extra = sorted(present - set(declared) - {MANIFEST, SIGNATURE})
    if missing or extra:
        found = [f"lacks {name}" for name in missing] + [f"has {name!r} too" for name in extra]
        listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        remedy = "fetch the bundle again" if missing else "remove what is not the bundle's"
        raise BrokenBundleError(f"differs from its manifest: {listed}; {remedy}", missing, extra)


def parse_manifest(data: bytes) -> dict[str, Any]:
    """Return the manifest that ``data`` spells.

    Raises:
        BrokenBundleError: not canonical JSON, of another schema, or not what a manifest holds.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BrokenBundleError(f"{MANIFEST}: expected at most {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(data)
        # Repeated keys, white space, NaN: whatever is not canonical comes back different.
        canonical = canonical_json(manifest) == data
        digest = digest_of(manifest) if isinstance(manifest, dict) else ""
    except (ValueError, RecursionError):
        canonical = False
    if not canonical or not isinstance(manifest, dict):
        raise BrokenBundleError(f"{MANIFEST}: expected canonical JSON; fetch the bundle again")
    schema = manifest.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        remedy = "a newer deploykit reads it" if newer else "export the bundle again"
        raise BrokenBundleError(f"{MANIFEST}: schema: expected {SCHEMA}, got {schema!r}; {remedy}")
    if manifest.get("digest") != digest:
        raise BrokenBundleError(
            f"{MANIFEST}: digest: differs from the content; fetch the bundle again"
        )
    try:
        _check_manifest(manifest)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise BrokenBundleError(f"{MANIFEST}: {error}") from error
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, LookupError or the like where a value is not what the schema says."""
    if set(manifest) != set(KEYS):
        raise ValueError(f"expected the keys {', '.join(KEYS)}")
    for key, types in KEYS.items():
        if not isinstance(manifest[key], types) or isinstance(manifest[key], bool):
            raise ValueError(f"{key}: got {manifest[key]!r}")
    for key in ("name", "version", "target", "task"):
        if not manifest[key].isprintable() or len(manifest[key]) > MAX_NAME:
            raise ValueError(f"{key}: expected printable text, got {manifest[key][:MAX_NAME]!r}")
    if not 1 <= manifest["threads"] <= MAX_THREADS:
        raise ValueError(f"threads: expected 1 to {MAX_THREADS}, got {manifest['threads']}")
    if not _are_names(manifest["labels"]) or len(set(manifest["labels"])) < len(manifest["labels"]):
        raise ValueError("labels: expected distinct strings")
    if len(manifest["inputs"]) != 1 or len(manifest["outputs"]) != 1:
        raise ValueError("expected one input and one output")
    for spec in (*manifest["inputs"], *manifest["outputs"]):
        if not re.fullmatch(r"[a-z]+\d*", spec["dtype"]):  # numpy evaluates what has a comma
            raise ValueError(f"expected a dtype, got {spec['dtype']!r}")
        np.dtype(spec["dtype"])
        if set(spec) != {"name", "dtype", "shape"} or not all(
            type(n) is int for n in spec["shape"]
        ):
            raise ValueError(f"expected name, dtype and shape, got {spec!r}")
    if manifest["labels"] and len(manifest["labels"]) != manifest["outputs"][0]["shape"][-1]:
        raise ValueError("labels: expected one a class")
    _check_values(manifest)
    version_tuple(manifest["min_onnxruntime"])
    if manifest["preprocess"] is not None:
        check_preprocess(manifest["preprocess"])
    _check_files(manifest["files"])


def _is_size(value: Any) -> bool:
    """Whether a value is a number from 0 that a float can hold; a boolean is no number."""
    return type(value) in {int, float} and 0 <= value <= sys.float_info.max


def _is_size_or_null(value: Any) -> bool:
    return value is None or _is_size(value)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_size_or_null, value.values()))


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


# What is read of the manifest's parts, all but the first where it is there: how to tell it, in
# words and by a test.
VALUES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "tolerance.max_abs": ("a number from 0", _is_size),
    "tolerance.scale": ("a number from 0 or null", _is_size_or_null),
    "tolerance.steps": ("a number from 0 or null", _is_size_or_null),
    "tolerance.top1": ("true or false", lambda value: isinstance(value, bool)),
    "measured.accuracy": ("a number from 0 or null", _is_size_or_null),
    "measured.latency_ms": ("numbers from 0 or null by batch size", _are_sizes),
    "verified_on.targets": ("a list of names", _are_names),
    "verified_on.cpu_target": ("a name", _is_name),
}


def _check_values(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where a value inside a part is not what is read there."""
    for key, (expected, holds) in VALUES.items():
        part, _, name = key.partition(".")
        value = manifest[part].get(name)
        needed = key == "tolerance.max_abs" or name in manifest[part]
        if needed and not holds(value):
            raise ValueError(f"{key}: expected {expected}, got {value!r}")


def _check_files(files: Mapping[str, Any]) -> None:
    for name, entry in files.items():
        if len(name) > 200 or not FILE_NAME.fullmatch(name) or name in {MANIFEST, SIGNATURE}:
            raise ValueError(f"files: expected plain relative names, got {name!r}")
        size = entry["bytes"]
        if set(entry) != {"bytes", "sha256"} or type(size) is not int:
            raise ValueError(f"files: {name}: expected bytes and sha256")
        if not 0 <= size <= MAX_FILE_BYTES:
            raise ValueError(f"files: {name}: expected at most {MAX_FILE_BYTES} bytes, got {size}")
    if len({name.casefold() for name in (*files, MANIFEST, SIGNATURE)}) < len(files) + 2:
        raise ValueError("files: expected names that differ in more than case")
    for name in (MODEL, RUNNER, EXPECTED):
        if name not in files:
            raise ValueError(f"files: expected {name} among them")


# The model.


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: ``1.31.1rc2`` gives ``(1, 31, 1)``."""
    match = re.match(r"\d{1,6}(\.\d{1,6})*", version)
    if match is None:
        raise ValueError(f"expected a version such as 1.17.0, got {version!r}")
    return tuple(int(part) for part in match[0].split("."))


@cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags of this machine's CPU, in lower case; empty where unknown."""
    try:
        with Path("/proc/cpuinfo").open(errors="replace") as lines:
            for line in lines:  # the first core's alone: some machines have hundreds
                key, _, value = line.partition(":")
                if key.strip().lower() in {"flags", "features"}:
                    return frozenset(value.lower().split())
    except OSError:
        pass
    return frozenset()


def detect_cpu(flags: Collection[str] | None = None, machine: str | None = None) -> str:
    """Name the CPU target of this machine, or of one with these feature flags.

    That of another kind than x86 and 64-bit ARM is called after it, and no bundle is made for it.
    """
    machine = (machine or platform.machine()).lower()
    if machine in {"arm64", "aarch64"}:
        return "cpu-arm64"
    if machine not in X86:
        return f"cpu-{machine}"
    flags = cpu_flags() if flags is None else flags
    return "cpu-x86-vnni" if {"avx512_vnni", "avx_vnni"} & set(flags) else "cpu-x86-avx2"


def open_session(
    model: bytes,
    threads: int = 1,
    providers: Sequence[str] = CPU,
    provider_options: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
) -> Any:
    """Open verified model bytes.

    Args:
        model: an ONNX file without external data.
        threads: threads inside an operator.
        providers: execution providers, best first; the first one is demanded.
        provider_options: of the first provider.
        config: more entries of the session's configuration.

    Raises:
        PackageError: onnxruntime is missing or lacks the provider.
        BrokenBundleError: onnxruntime cannot open the model.
    """
    ort = _onnxruntime()
    # The key of weights in another file; a text is whole in the bytes of a model.
    if version_tuple(ort.__version__) < CONFINED and b"location" in model:
        raise PackageError(
            f"{MODEL}: may ask for weights in files outside of the bundle, which onnxruntime "
            f"{ort.__version__} would open; install it: pip install 'onnxruntime>=1.24'"
        )
    if providers[0] not in ort.get_available_providers():
        raise PackageError(
            f"{providers[0]}: expected one of {', '.join(ort.get_available_providers())}; "
            "install the onnxruntime package that has it"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # A bundle's model is one file. Below a file nothing exists, so external data stay shut.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(Path(__file__) / "none")
    )
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    try:
        best, *others = providers
        asked = [(best, dict(provider_options or {})), *others]
        return ort.InferenceSession(model, options, providers=asked)
    except Exception as error:
        raise BrokenBundleError(
            f"{MODEL}: onnxruntime {ort.__version__} cannot open it: {_first_line(error)}"
        ) from error


def open_bundle(manifest: Mapping[str, Any], contents: Mapping[str, bytes], threads: int) -> Any:
    """Open the model of a bundle that ``read_bundle`` verified.

    On another kind of CPU than the one that verified the bundle, the golden samples are run
    first: see ``judge_here``.

    Raises:
        PackageError: onnxruntime is older than the model needs.
        BrokenBundleError: the model does not open, or has another border than the manifest.
        SelftestError: the model answers otherwise on this kind of CPU.
    """
    session = open_model(manifest, contents, threads)
    verified = manifest["verified_on"]
    if detect_cpu() != verified.get("cpu_target", manifest["target"]):
        judge_here(manifest, contents, session)
    return session


def open_model(
    manifest: Mapping[str, Any], contents: Mapping[str, bytes], threads: int, **how: Any
) -> Any:
    """Open the model of a bundle, whatever it answers here, and check its border.

    Args:
        manifest: of the bundle.
        contents: its verified files.
        threads: of a prediction.
        how: more arguments of ``open_session``.

    Raises:
        PackageError: onnxruntime is older than the model needs.
        BrokenBundleError: the model does not open, or has another border than the manifest.
    """
    installed, needed = _onnxruntime().__version__, manifest["min_onnxruntime"]
    if version_tuple(installed) < version_tuple(needed):
        raise PackageError(
            f"{manifest['name']}: expected onnxruntime {needed} or newer, found {installed}; "
            f"install it: pip install 'onnxruntime>={needed}'"
        )
    session = open_session(contents[MODEL], threads, **how)
    for key, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        found = [(node.name, _dtype_of(node.type), _shape_of(node.shape)) for node in nodes]
        expected = [(spec["name"], spec["dtype"], spec["shape"]) for spec in manifest[key]]
        if found != expected:
            raise BrokenBundleError(f"{MODEL}: {key}: expected {expected}, got {found}")
    return session


def _onnxruntime() -> Any:
    # Where onnxruntime was built to report its use, it would on every machine of every user.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise PackageError(
            f"onnxruntime cannot be loaded ({_first_line(error)}); install it: pip install -U "
            "onnxruntime"
        ) from error
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def _dtype_of(onnx_type: str) -> str:
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _shape_of(shape: Sequence[int | str | None]) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in shape]


def printable(text: str) -> str:
    """Return a stranger's text with a question mark for whatever a terminal would obey or hide."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_model(session: Any, batch: np.ndarray) -> np.ndarray:
    """Return the logits, float32 ``(N, classes)``, of a batch as the model's input takes it.

    Raises:
        SelftestError: the model cannot be run, or gave something that is no number.
    """
    try:
        logits: np.ndarray = session.run(None, {session.get_inputs()[0].name: batch})[0]
    except Exception as error:  # onnxruntime has its own types, in C
        raise SelftestError(f"{MODEL}: cannot be run: {_first_line(error)}") from error
    if not np.all(np.isfinite(logits)):
        raise SelftestError(f"{MODEL}: expected finite outputs, got NaN or infinity")
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return float64 probabilities over the last axis; no logit overflows."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponents = np.exp(shifted)
    probabilities: np.ndarray = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities


def rank(probabilities: np.ndarray, labels: Sequence[str], count: int = 3) -> list[dict[str, Any]]:
    """Name the ``count`` likeliest classes of one sample, best first."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [
        {"label": labels[i] if labels else str(i), "probability": float(probabilities[i])}
        for i in order
    ]


# Samples.


def read_sample(data: bytes, manifest: Mapping[str, Any]) -> np.ndarray:
    """Turn a client's file into one sample of the model's input, without the batch axis.

    Args:
        data: an image file where the manifest has ``preprocess``, else a ``.npy`` file.
        manifest: of the bundle.

    Raises:
        InputError: the bytes cannot be used; ImageError where an image is expected.
    """
    if manifest["preprocess"] is not None:
        return decode_image(data, manifest["preprocess"])
    spec = manifest["inputs"][0]
    array, shape = parse_npy(data), tuple(spec["shape"][1:])
    if array.shape != shape or not np.can_cast(array.dtype, spec["dtype"], "same_kind"):
        raise InputError(
            f"expected {spec['dtype']} of shape {shape}, got {array.dtype} of shape {array.shape}"
        )
    return cast_finite(array, spec["dtype"])


def cast_finite(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Return ``array`` as ``dtype``.

    Raises:
        InputError: something in it is no number, or too large for ``dtype``. Integers would hide
            it: NaN becomes one of them like any other, and the answer looks like an answer.
    """
    with np.errstate(over="ignore"):
        cast: np.ndarray = array.astype(dtype)
    if not np.all(np.isfinite(cast)):
        raise InputError(
            f"expected finite numbers, got NaN or infinity in {cast.dtype}; mend the sample"
        )
    return cast


def parse_npy(data: bytes) -> np.ndarray:
    """Return the array of a ``.npy`` file; no pickle, and no more memory than the file has.

    Raises:
        InputError: the bytes are no such file.
    """
    file = io.BytesIO(data)
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(file)](file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
            raise ValueError("its size is not what its header says")
        array = np.frombuffer(data, dtype, offset=file.tell())
        return array.reshape(shape, order="F" if fortran_order else "C")
    except Exception as error:  # numpy raises a dozen types on damaged headers
        raise InputError(f"expected a .npy file ({_first_line(error)})") from error


def read_input(path: str, manifest: Mapping[str, Any]) -> np.ndarray:
    """Read the sample that a file holds.

    Raises:
        InputError: with the file's name.
    """
    try:
        if "\0" in path or not Path(path).exists():
            raise InputError("no such file")
        if not Path(path).is_file():
            raise InputError("expected a file, got a folder, a pipe or a device; save it first")
        with Path(path).open("rb") as file:
            data = file.read(MAX_INPUT_BYTES + 1)
        if len(data) > MAX_INPUT_BYTES:
            raise InputError(f"expected at most {MAX_INPUT_BYTES} bytes")
        return read_sample(data, manifest)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except InputError as error:
        error.args = (f"{path}: {error}",)
        raise


# The proof.


def check_golden(
    manifest: Mapping[str, Any], contents: Mapping[str, bytes], session: Any
) -> dict[str, Any]:
    """Run the golden samples and compare with what was stored when the bundle was made.

    Decoded files must equal the stored inputs; one grey level is let pass and reported, since
    JPEG decoders may differ by that. The model is run on the stored inputs, at once and one
    by one. Its outputs may differ by ``tolerance.max_abs``; where ``tolerance.top1`` is true
    the answers must be the same, unless the stored ones are nearer to each other than one step
    of the output's scale (``max_abs`` where the output has none).

    Returns:
        ``samples``, ``max_abs`` (largest difference of outputs), ``grey_levels`` (largest
        difference of decoded pixels).

    Raises:
        SelftestError: a difference is larger than allowed.
    """
    expected = _read_expected(contents[EXPECTED])
    inputs, outputs = expected["inputs"], expected["outputs"]
    names = sorted(name for name in contents if name.startswith("golden/") and name != EXPECTED)
    if not len(names) == len(inputs) == len(outputs) > 0:
        raise SelftestError(f"golden: expected {len(inputs)} samples, found {len(names)}")
    grey_levels = max(
        _compare_input(name, contents[name], stored, manifest)
        for name, stored in zip(names, inputs, strict=True)
    )
    singles = np.concatenate([run_model(session, inputs[i : i + 1]) for i in range(len(inputs))])
    max_abs = max(
        _check_outputs(manifest["tolerance"], names, outputs, found)
        for found in (singles, run_model(session, inputs))
    )
    return {"samples": len(names), "max_abs": max_abs, "grey_levels": grey_levels}


def judge_here(
    manifest: Mapping[str, Any], contents: Mapping[str, bytes], session: Any
) -> dict[str, Any]:
    """Run the golden samples, and say so where the bundle was made for another kind of CPU.

    The same integers can give other answers there: x86 without VNNI adds products of 8-bit
    numbers up in 16 bits, which overflow. One line on standard error tells that this CPU is
    none that the bundle names but gives the same answers.

    Returns:
        What ``check_golden`` returns.

    Raises:
        SelftestError: a difference is larger than allowed.
    """
    here, target, verified = detect_cpu(), manifest["target"], manifest["verified_on"]
    about = f"{manifest['name']}: made for {target}, and this CPU is {here}"
    try:
        found = check_golden(manifest, contents, session)
    except SelftestError as error:
        if here in {target, verified.get("cpu_target")}:
            raise
        raise SelftestError(
            f"{about}, which answers otherwise: {error}; export it with --target {here}"
        ) from error
    if here not in verified.get("targets", [target]):
        print(f"warning: {about}; the golden samples hold here", file=sys.stderr)
    return found


def _compare_input(
    name: str, data: bytes, stored: np.ndarray, manifest: Mapping[str, Any]
) -> float:
    """Return the largest difference of a decoded sample from the stored one."""
    try:
        difference = _largest(read_sample(data, manifest), stored)
    except InputError as error:
        raise SelftestError(f"{name}: {error}") from error
    if not difference <= (0 if manifest["preprocess"] is None else 1):
        raise SelftestError(f"{name}: decodes differently here, by {difference:g}")
    return difference


def golden_inputs(contents: Mapping[str, bytes]) -> np.ndarray:
    """Return the inputs of the golden samples, ``(N, ...)`` as the model takes them."""
    return _read_expected(contents[EXPECTED])["inputs"]


def _read_expected(data: bytes) -> dict[str, np.ndarray]:
    import zipfile

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise SelftestError(f"{EXPECTED}: expected stored, not compressed, arrays")
            return {key: parse_npy(archive.read(f"{key}.npy")) for key in ("inputs", "outputs")}
    except SelftestError:
        raise
    except Exception as error:  # zipfile raises a dozen types on damaged files
        raise SelftestError(f"{EXPECTED}: cannot be read: {_first_line(error)}") from error


def _largest(left: np.ndarray, right: np.ndarray) -> float:
    if left.shape != right.shape:
        return math.inf
    return float(np.max(np.abs(left.astype(np.float64) - right.astype(np.float64)), initial=0))


def _check_outputs(
    tolerance: Mapping[str, Any], names: Sequence[str], expected: np.ndarray, found: np.ndarray
) -> float:
    """Return the largest difference, or raise SelftestError where it is not allowed."""
    largest, allowed = _largest(expected, found), tolerance["max_abs"]
    if not largest <= allowed:
        raise SelftestError(f"golden: outputs differ by {largest:.4g}, allowed is {allowed:.4g}")
    near = tolerance.get("scale") or allowed
    for name, old, new in zip(names, expected, found, strict=True):
        lost = float(old.max() - old.flat[int(new.argmax())])
        if tolerance.get("top1") and lost > near:
            raise SelftestError(
                f"{name}: expected class {old.argmax()}, got {new.argmax()}, and it is no near-tie"
            )
    return largest


# This machine.


def describe_device(name: str | None = None) -> dict[str, Any]:
    """Describe this machine; what cannot be found out is None or empty.

    Args:
        name: what it is called; default: what it calls itself in its network.
    """
    return {
        "name": name or platform.node() or "unnamed",
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cpu_target": detect_cpu(),
        "features": cpu_features(),
        "cores": usable_cores(),
        "os": f"{platform.system()} {platform.release()}".strip(),
        "python": platform.python_version(),
    }


def cpu_features() -> list[str]:
    """Name those features of this CPU that decide how fast it computes; empty where unknown."""
    return [flag for flag in FEATURES if flag in cpu_flags()]


def cpu_name() -> str | None:
    """Return the CPU's model name as its maker writes it; that of the board on some of ARM."""
    with suppress(OSError), Path("/proc/cpuinfo").open(errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name":
                return value.strip()
    with suppress(OSError):
        return Path("/proc/device-tree/model").read_text(errors="replace").strip("\0\n ")
    return platform.processor() or None


def usable_cores() -> int | None:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def resident_bytes() -> int | None:
    """Return how much memory of this process is resident; None where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int | None:
    """Return the highest resident memory of this process so far; None where nothing tells."""
    highest = _status_bytes("VmHWM")
    if highest is not None:
        return highest
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    # Not on Linux: there it starts at what the *parent* held when it started this process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _status_bytes(key: str) -> int | None:
    """Return a figure of Linux about this process."""
    with suppress(OSError), Path("/proc/self/status").open(errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name == key:
                return 1024 * int(value.split()[0])
    return None


# The commands.


def selftest(folder: Path, as_json: bool = False) -> None:
    """Verify the files, run the golden samples, and say what they ran on."""
    manifest, contents = read_bundle(folder)
    signature = about_signature(folder)
    session = open_model(manifest, contents, manifest["threads"])
    golden = judge_here(manifest, contents, session)
    told = _about(manifest, session, manifest["threads"], describe_device())
    if as_json:
        proof = {"files": len(contents), "golden": _passed(golden), "signature": signature}
        print(json.dumps({**told, **proof}))
        return
    if golden["grey_levels"]:
        print("note: this image decoder differs from the bundle's by one grey level")
    print(
        f"{manifest['name']} {manifest['version']}: {len(contents)} files as in the manifest; "
        f"{golden['samples']} golden samples answer as they did (largest difference "
        f"{golden['max_abs']:.3g}, allowed {manifest['tolerance']['max_abs']:.3g})"
    )
    features = " ".join(told["device"]["features"]) or "no features known"
    print(
        f"{told['provider']} of onnxruntime {told['onnxruntime']}, {told['threads']} threads, "
        f"on {told['device']['cpu_target']} ({features})"
    )
    print(signature)


def _about(
    manifest: Mapping[str, Any], session: Any, threads: int, device: Mapping[str, Any]
) -> dict[str, Any]:
    """Say what was run on what."""
    return {
        "schema": TOLD_SCHEMA,
        **{key: manifest[key] for key in ("name", "version", "target", "digest")},
        "device": device,
        "onnxruntime": _onnxruntime().__version__,
        "provider": session.get_providers()[0],
        "threads": threads,
    }


def _passed(golden: Mapping[str, Any]) -> dict[str, Any]:
    return {**golden, "passed": True}  # what fails never gets here


def predict(folder: Path, files: Sequence[str], as_json: bool) -> None:
    """Print the likeliest classes of each file."""
    manifest, contents = read_bundle(folder)
    session = open_bundle(manifest, contents, manifest["threads"])
    answers: list[dict[str, Any]] = []
    for file in files:
        probabilities = softmax(run_model(session, read_input(file, manifest)[np.newaxis]))[0]
        top = rank(probabilities, manifest["labels"])
        answers.append({"file": file, **top[0], "top": top})
    if as_json:
        print(json.dumps(answers))  # ASCII, whatever the terminal takes
        return
    for answer in answers:
        best, *others = (f"{one['label']} {one['probability']:.4f}" for one in answer["top"])
        more = f" ({', '.join(others)})" if others else ""
        print(f"{answer['file']}: {printable(best + more)}")


def bench(
    folder: Path,
    threads: int | None,
    as_json: bool,
    seconds: float = 2.0,
    *,
    device: str | None = None,
) -> None:
    """Print the latency at batch 1 and 32 on the golden inputs, and memory.

    The golden samples are run first: figures of a model that answers otherwise mean nothing.

    Args:
        folder: the bundle.
        threads: of a prediction; default: those of the manifest.
        as_json: print one JSON object, for `deploykit report --devices`.
        seconds: how long each batch size is timed, at least.
        device: what this machine is called; default: its own name.
    """
    manifest, contents = read_bundle(folder)
    threads = threads or manifest["threads"]
    _onnxruntime()  # what it takes to be imported is not the model's
    before = resident_bytes()
    session = open_model(manifest, contents, threads)
    grown = _growth(before, resident_bytes())
    golden = judge_here(manifest, contents, session)
    inputs = golden_inputs(contents)
    rows = [
        {"batch": size, "threads": threads, **_time(session, inputs, size, seconds)}
        for size in (1, 32)
    ]
    memory = {"peak_bytes": peak_bytes(), "model_bytes": grown}
    if as_json:
        told = {
            **_about(manifest, session, threads, describe_device(device)),
            "latency": rows,
            "memory": memory,
            "golden": _passed(golden),
            "accuracy": manifest["measured"].get("accuracy"),
        }
        print(json.dumps(told))
        return
    for row in rows:
        print(
            f"batch {row['batch']}: median {row['median_ms']:.3f} ms, p90 {row['p90_ms']:.3f} ms, "
            f"{row['samples_per_second']:.0f} samples/s ({threads} threads, {row['runs']} runs)"
        )
    print(f"memory: peak {_mib(memory['peak_bytes'])}, of which the model {_mib(grown)}")


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"


def _time(session: Any, inputs: np.ndarray, size: int, seconds: float) -> dict[str, Any]:
    """Run batches of ``size`` samples for some seconds."""
    batch = np.resize(inputs, (size, *inputs.shape[1:]))
    times_ms: list[float] = []
    for _ in range(3):
        run_model(session, batch)  # memory is planned in the first runs
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times_ms) < 5:
        start = time.perf_counter()
        run_model(session, batch)
        times_ms.append(1000 * (time.perf_counter() - start))
    median, p90 = (float(value) for value in np.percentile(times_ms, (50, 90)))
    rate = 1000 * size / median
    return {
        "median_ms": median,
        "p90_ms": p90,
        "samples_per_second": rate,
        "runs": len(times_ms),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Verify and run this bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("selftest", help="verify hashes and golden samples")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command = commands.add_parser("predict", help="classify files")
    command.add_argument("files", nargs="+", metavar="FILE", help="image, or .npy array")
    command.add_argument("--json", action="store_true", help="print one JSON array")
    command = commands.add_parser("bench", help="measure the model on this machine")
    command.add_argument("--threads", type=_threads, metavar="N", help="default: as measured")
    command.add_argument("--device", type=device_name, metavar="NAME", help="of this machine")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _threads(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MAX_THREADS):
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_THREADS}, got {text!r}")
    return int(text)


def device_name(text: str) -> str:
    """Return what a machine may be called in a report of several.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    if not (0 < len(text) <= MAX_DEVICE_NAME and text.isprintable()):
        raise argparse.ArgumentTypeError(
            f"expected 1 to {MAX_DEVICE_NAME} printable characters, got {text!r}"
        )
    return text


def main(arguments: Sequence[str] | None = None, folder: Path | None = None) -> int:
    """Run one command on the bundle in ``folder`` (that of this file) and return its exit code."""
    options = _parser().parse_args(arguments)
    folder = folder or Path(__file__).absolute().parent
    try:
        if options.command == "selftest":
            selftest(folder, options.json)
        elif options.command == "predict":
            predict(folder, options.files, options.json)
        else:
            bench(folder, options.threads, options.json, device=options.device)
        sys.stdout.flush()
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # what is read tells its own; a disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try once more
        print(f"error: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" ends quietly
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    sys.exit(main())
