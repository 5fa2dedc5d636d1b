"""onnxruntime-web, as it lies in this package: compressed, and held to its recorded hashes.

A page may ask no other host, and export has to work without a network, so the files of one npm
release are kept in ``vendor/``. To renew them, with the integrity that ``npm view
onnxruntime-web@VERSION dist.integrity`` tells::

    python -m deploykit.web.vendored [--version VERSION --integrity sha512-...]

Without options the release that is recorded is fetched again. After a renewal MAX_OPSET may have to
change; tests/browser tells.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import lzma
import sys
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from deploykit.errors import BundleError
from deploykit.publish import write_atomic

FOLDER = Path(__file__).parent / "vendor"
RECORD = FOLDER / "vendor.json"
TARBALL = "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{version}.tgz"
# WebAssembly on CPUs alone: the script with its loader inside, and the runtime.
SCRIPTS = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
NOTICES = ("LICENSE", "ThirdPartyNotices.txt")  # not in the npm package; those of the Python one
MAX_OPSET = 26


@cache
def vendored_files() -> Mapping[str, bytes]:
    """Return the files of onnxruntime-web by the names that a site has for them.

    Raises:
        BundleError: a file is missing or not the one that was recorded.
    """
    # Not every web server knows .mjs, and browsers run no script of another type.
    return {
        name.replace(".mjs", ".js"): _unpack(FOLDER / f"{name}.xz", entry["sha256"])
        for name, entry in read_record()["files"].items()
    }


def read_record() -> dict[str, Any]:
    """Return what is recorded of the vendored files."""
    record: dict[str, Any] = json.loads(RECORD.read_bytes())
    return record


def _unpack(path: Path, sha256: str) -> bytes:
    try:
        data = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise BundleError(
            f"{path}: expected a file of onnxruntime-web, got {error}; install deploykit again",
            altered=[path.name],
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleError(
            f"{path}: expected the file of onnxruntime-web that {RECORD.name} records, got "
            "another; install deploykit again",
            altered=[path.name],
        )
    return data


def renew(tarball: bytes, version: str, integrity: str) -> None:
    """Write ``vendor/`` from the npm package of a release.

    Args:
        tarball: the package, as the registry sends it.
        version: of the release.
        integrity: of the tarball, as npm spells it: ``sha512-`` and base64.

    Raises:
        BundleError: the tarball is another.
    """
    found = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    if found != integrity:
        raise BundleError(f"onnxruntime-web {version}: expected {integrity}, got {found}")
    originals = {**_scripts(tarball), **_notices()}
    FOLDER.mkdir(exist_ok=True)
    for name, data in originals.items():
        packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
        write_atomic(FOLDER / f"{name}.xz", packed)
    record = {
        "package": "onnxruntime-web",
        "version": version,
        "integrity": integrity,
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in originals.items()
        },
    }
    write_atomic(RECORD, f"{json.dumps(record, indent=2)}\n".encode())


def _scripts(tarball: bytes) -> dict[str, bytes]:
    """Read the scripts into memory; nothing is unpacked on the disk."""
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
        members = {name: archive.extractfile(f"package/dist/{name}") for name in SCRIPTS}
        return {name: member.read() for name, member in members.items() if member is not None}


def _notices() -> dict[str, bytes]:
    from importlib.util import find_spec

    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    return {name: Path(spec.origin).with_name(name).read_bytes() for name in NOTICES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch a release, the recorded one by default, and write its files."""
    recorded = read_record()
    parser = argparse.ArgumentParser(prog="deploykit.web.vendored", description="Renew vendor/.")
    parser.add_argument("--version", default=recorded["version"])
    parser.add_argument("--integrity", default=recorded["integrity"])
    parser.add_argument("--tarball", type=Path, help="the package, fetched before")
    options = parser.parse_args(arguments)
    if options.tarball is not None:
        tarball = options.tarball.read_bytes()
    else:
        with urllib.request.urlopen(TARBALL.format(version=options.version)) as response:
            tarball = response.read()
    renew(tarball, options.version, options.integrity)
    return 0


if __name__ == "__main__":
    sys.exit(main())
