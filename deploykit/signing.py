"""Sign a bundle with a private key, and check its signature with the public one.

What is signed is the manifest, whose hashes cover every other file, so that a signature is small
whatever the bundle. `model-signing <https://github.com/sigstore/model-transparency>`_ makes and
checks it, without network: ECDSA over a DSSE envelope, in a Sigstore bundle, which its own command
reads as well. It works on files, so it gets a private copy of the very bytes that were verified.

Loads without torch; `model-signing` is loaded when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploykit import runtime
from deploykit.artifacts import JsonDict
from deploykit.bundle import told_as_deploykit, verify_bundle
from deploykit.errors import MissingDependency, UsageError, VerificationError, first_line
from deploykit.publish import told_as_usage, write_atomic


def sign_bundle(path: Path, key: Path, *, force: bool = False) -> JsonDict:
    """Put a signature into a bundle that proves itself first; all else in it stays as it is.

    Killed at any moment, it leaves the bundle as it was or signed.

    Args:
        path: the bundle, a folder or a zip file.
        key: PEM file of a private key without password, on the curve P-256, P-384 or P-521. It is
            read once, so it may be a pipe that decrypts.
        force: replace the signature that stands there.

    Returns:
        The manifest that was signed.

    Raises:
        UsageError: the key cannot be used, the bundle is signed already or cannot be written.
        BundleError: the bundle is not what its manifest says.
        VerificationError: its model does not give the golden answers.
        MissingDependency: model-signing is not installed.
    """
    path = path.resolve()  # a link to a bundle stays one
    with told_as_deploykit():
        if runtime.read_signature(path) is not None and not force:
            raise UsageError(f"{path}: is signed already; replace the signature with --force")
    model_signing = _model_signing()
    config = model_signing.signing.Config().set_hashing_config(_hashing(model_signing))
    with _told_of_key(key, "private"):
        config.use_elliptic_key_signer(private_key=key)
    manifest = verify_bundle(path)
    with _private_copy(runtime.canonical_json(manifest)) as copy:
        file = copy.with_name(runtime.SIGNATURE)
        config.sign(copy, file)
        signature = file.read_bytes()
    _put(path, signature)
    return manifest


def check_manifest(manifest: Mapping[str, Any], signature: bytes | None, key: Path) -> None:
    """Check that the owner of a key has signed a manifest.

    Args:
        manifest: of a bundle whose files were verified against it.
        signature: the bytes of its ``signature.json``; None where there is none.
        key: PEM file of the public key; read once.

    Raises:
        UsageError: the key cannot be used.
        VerificationError: there is no signature, or not one of this manifest by this key.
        MissingDependency: model-signing is not installed.
    """
    if signature is None:
        raise VerificationError(
            f"expected a signature by the owner of {key}, found no {runtime.SIGNATURE}; fetch the "
            "signed bundle, or sign it: deploykit sign"
        )
    model_signing = _model_signing()
    verifier = model_signing.verifying.Config().set_hashing_config(_hashing(model_signing))
    with _told_of_key(key, "public"):
        verifier.use_elliptic_key_verifier(public_key=key)
    if why := _refusal(verifier, runtime.canonical_json(manifest), signature):
        raise VerificationError(
            f"{runtime.SIGNATURE}: expected a signature of this bundle by the owner of {key}, got "
            f"another ({why}); fetch the bundle again, or name the key of who signed it"
        )
    # A signature may say that it leaves files out. One that holds for any bytes says nothing.
    if not _refusal(verifier, b"another", signature):
        raise VerificationError(
            f"{runtime.SIGNATURE}: expected a signature of {runtime.MANIFEST}, got one that leaves "
            "it out; sign the bundle again: deploykit sign --force"
        )


def _refusal(verifier: Any, manifest: bytes, signature: bytes) -> str:
    """Say why a signature is not that of a manifest; nothing where it is."""
    with _private_copy(manifest) as copy:
        file = copy.with_name(runtime.SIGNATURE)
        file.write_bytes(signature)
        try:
            verifier.verify(copy, file)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's JSON sets off, it refuses
            return first_line(error)
    return ""


def _model_signing() -> Any:
    try:
        import model_signing
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "signatures need model-signing: pip install 'deploykit[sign]'"
        ) from error
    return model_signing


def _hashing(model_signing: Any) -> Any:
    """Return how files are hashed: each of them, none is left out."""
    return model_signing.hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)


@contextmanager
def _private_copy(manifest: bytes) -> Iterator[Path]:
    """Give a folder that holds a manifest and nothing else, in a folder that nobody else reads."""
    with told_as_usage(Path("TMPDIR")), TemporaryDirectory(prefix="deploykit-") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        (folder / runtime.MANIFEST).write_bytes(manifest)
        yield folder


@contextmanager
def _told_of_key(key: Path, kind: str) -> Iterator[None]:
    """Tell what is wrong with a key in one sentence."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{key}: cannot be read: {error.strerror or error}; name a PEM file"
        ) from error
    except TypeError as error:
        raise UsageError(
            f"{key}: expected a key without password, got an encrypted one; decrypt it on the way: "
            f"openssl pkey -in {key} | deploykit sign BUNDLE --key /dev/stdin"
        ) from error
    except Exception as error:
        raise UsageError(
            f"{key}: expected the PEM file of a {kind} key on the curve P-256, P-384 or P-521, got "
            "something else; docs/security.md tells how to make a pair"
        ) from error


def _put(path: Path, signature: bytes) -> None:
    """Let a signature appear in a bundle in one step."""
    if path.is_file():
        with told_as_deploykit():
            files = runtime.unpack(path.read_bytes())
        write_atomic(path, runtime.pack({**files, runtime.SIGNATURE: signature}))
        return
    # Beside the bundle: inside, what a killed process leaves would be a file too many.
    staged = path.with_name(f".{path.name}.{runtime.SIGNATURE}.tmp")
    write_atomic(staged, signature)
    with told_as_usage(path):
        staged.replace(path / runtime.SIGNATURE)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
