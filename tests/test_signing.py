"""A signature tells the owner's bundle from one that somebody sealed anew."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from tampered.bundles import read_files, seal
from tampered.sealed import Keys, make_keys
from tiny_bundle import make_bundle

from deploykit import runtime, signing
from deploykit.bundle import verify_bundle
from deploykit.errors import (
    BundleError,
    DeploykitError,
    MissingDependency,
    UsageError,
    VerificationError,
)
from deploykit.signing import check_manifest, sign_bundle

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PUBLIC, PLAIN = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.NoEncryption()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "owner")


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("unsigned"))


@pytest.fixture(scope="module")
def original(unsigned: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(unsigned, tmp_path_factory.mktemp("signed") / "tiny"))
    sign_bundle(folder, keys.private)
    return folder


@pytest.fixture
def signed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def bare(unsigned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unsigned, tmp_path / "bare"))


def refusal(path: Path, key: Path) -> str:
    """Return why a bundle is refused, which is one sentence that names it."""
    with pytest.raises((BundleError, VerificationError)) as caught:
        verify_bundle(path, key)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def write(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# What a signature is.


def test_signed_bundle_is_taken_by_who_has_the_public_key(signed: Path, keys: Keys) -> None:
    assert verify_bundle(signed, keys.public) == verify_bundle(signed)


def test_signing_adds_one_file_and_changes_none(original: Path, unsigned: Path) -> None:
    files = read_files(original)
    assert len(files.pop(runtime.SIGNATURE)) < 4096
    assert files == read_files(unsigned)


def test_a_zip_file_is_signed_as_the_folder_is(unsigned: Path, keys: Keys, tmp_path: Path) -> None:
    packed = tmp_path / "tiny.zip"
    packed.write_bytes(runtime.pack(read_files(unsigned)))
    sign_bundle(packed, keys.private)
    assert verify_bundle(packed, keys.public) == verify_bundle(unsigned)
    files = runtime.unpack(packed.read_bytes())
    assert len(files.pop(runtime.SIGNATURE)) < 4096
    assert files == read_files(unsigned)


def test_a_signature_holds_in_the_other_form_too(signed: Path, keys: Keys, tmp_path: Path) -> None:
    packed = tmp_path / "tiny.zip"
    packed.write_bytes(runtime.pack(read_files(signed)))
    assert verify_bundle(packed, keys.public) == verify_bundle(signed, keys.public)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_keys_on_three_curves_sign(curve: ec.EllipticCurve, bare: Path, tmp_path: Path) -> None:
    key = ec.generate_private_key(curve)
    (tmp_path / "private.pem").write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))
    (tmp_path / "public.pem").write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    sign_bundle(bare, tmp_path / "private.pem")
    verify_bundle(bare, tmp_path / "public.pem")


def test_model_signing_reads_the_signature_by_itself(signed: Path, keys: Keys) -> None:
    from model_signing import verifying

    verifier = verifying.Config().set_ignore_unsigned_files(True)
    verifier.use_elliptic_key_verifier(public_key=keys.public)
    verifier.verify(signed, signed / runtime.SIGNATURE)
    (signed / runtime.MANIFEST).write_bytes(b"{}")
    with pytest.raises(ValueError, match="mismatch"):
        verifier.verify(signed, signed / runtime.SIGNATURE)


def test_signing_and_checking_ask_no_network(
    bare: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sign_bundle(bare, keys.private)
    verify_bundle(bare, keys.public)


# What is refused.


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = make_keys(tmp_path, "other")
    assert "by the owner of" in refusal(signed, other.public)


def test_missing_signature_is_refused(unsigned: Path, keys: Keys) -> None:
    assert "found no signature.json" in refusal(unsigned, keys.public)


def test_a_change_of_any_file_is_refused(signed: Path, keys: Keys) -> None:
    for name, data in read_files(signed).items():
        if name != runtime.SIGNATURE:
            (signed / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            refusal(signed, keys.public)
            (signed / name).write_bytes(data)
    verify_bundle(signed, keys.public)


@pytest.mark.parametrize(
    "alter",
    [
        lambda files: {**files, "README.md": b"trust me"},
        lambda files: {**files, "more": b""},
        lambda files: {name: data for name, data in files.items() if name != "README.md"},
    ],
    ids=["altered", "one more", "one less"],
)
def test_what_is_sealed_anew_is_refused_by_the_signature_alone(
    alter: Callable[[dict[str, bytes]], dict[str, bytes]], signed: Path, keys: Keys
) -> None:
    write(signed, seal(alter(read_files(signed))))
    verify_bundle(signed)  # the hashes stop no attacker
    assert "Signature mismatch" in refusal(signed, keys.public)


def test_a_signature_of_another_bundle_is_refused(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", version="2.0")
    sign_bundle(other, keys.private)
    shutil.copy(other / runtime.SIGNATURE, signed)
    assert "Signature mismatch" in refusal(signed, keys.public)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{}", b"null", b"[" * 60_000, b"\xff", b'{"verificationMaterial": {}}', b"text"],
)
def test_garbage_is_no_signature(garbage: bytes, signed: Path, keys: Keys) -> None:
    (signed / runtime.SIGNATURE).write_bytes(garbage)
    assert "expected a signature of this bundle" in refusal(signed, keys.public)


def test_an_altered_signature_is_refused_or_says_the_same(signed: Path, keys: Keys) -> None:
    file = signed / runtime.SIGNATURE
    data, manifest = file.read_bytes(), runtime.read_bundle(signed)[0]
    refused = 0
    for at in range(0, len(data), 61):
        file.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        try:
            assert verify_bundle(signed, keys.public) == manifest
        except VerificationError:
            refused += 1
    assert refused > 10


def leave_out(manifest: bytes, keys: Keys, place: Path) -> bytes:
    """Sign as the library lets the owner of a key do: all files but the manifest."""
    from model_signing import hashing, signing

    (place / "copy").mkdir()
    (place / "copy" / runtime.MANIFEST).write_bytes(manifest)
    ignoring = hashing.Config().set_ignored_paths(paths=[runtime.MANIFEST])
    config = signing.Config().set_hashing_config(ignoring)
    config.use_elliptic_key_signer(private_key=keys.private)
    config.sign(place / "copy", place / "signature")
    return (place / "signature").read_bytes()


def test_a_signature_that_leaves_the_manifest_out_is_refused(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    from model_signing import verifying

    signature = leave_out((signed / runtime.MANIFEST).read_bytes(), keys, tmp_path)
    lax = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    lax.verify(tmp_path / "copy", tmp_path / "signature")  # the library alone takes it
    (signed / runtime.SIGNATURE).write_bytes(signature)
    assert "leaves it out" in refusal(signed, keys.public)


def test_the_model_is_not_opened_before_the_signature_holds(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_onnxruntime", lambda: pytest.fail("onnxruntime was reached"))
    refusal(signed, make_keys(tmp_path, "other").public)


def test_what_was_verified_is_what_is_checked(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runtime.read_bundle

    def read_then_swap(path: Path) -> object:
        found = real(path)
        (path / runtime.MANIFEST).write_bytes(b"{}")
        return found

    monkeypatch.setattr(runtime, "read_bundle", read_then_swap)
    verify_bundle(signed, keys.public)


# Keys.


def test_no_key_is_taken_for_one(signed: Path, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("-----BEGIN PRIVATE KEY-----\nno\n")
    (tmp_path / "empty.pem").touch()
    others = {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "k1": ec.generate_private_key(ec.SECP256K1()),
    }
    for name, key in others.items():
        (tmp_path / f"{name}-private.pem").write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))
        public = key.public_key().public_bytes(PEM, PUBLIC)
        (tmp_path / f"{name}-public.pem").write_bytes(public)
    for check, wrong in ((verify_bundle, keys.private), (force_sign, keys.public)):
        for key in (wrong, *sorted(tmp_path.glob("*.pem")), tmp_path / "absent", tmp_path):
            with pytest.raises(UsageError) as caught:
                check(signed, key)
            assert str(caught.value).startswith(str(key))
            assert "\n" not in str(caught.value)


def force_sign(path: Path, key: Path) -> None:
    sign_bundle(path, key, force=True)


def test_an_encrypted_key_is_refused_with_the_way_to_decrypt_it(bare: Path, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    encrypted = tmp_path / "encrypted.pem"
    how = serialization.BestAvailableEncryption(b"secret")
    encrypted.write_bytes(key.private_bytes(PEM, PKCS8, how))
    with pytest.raises(UsageError, match=r"openssl pkey -in .*encrypted\.pem \|"):
        sign_bundle(bare, encrypted)


def test_a_key_may_come_through_a_pipe(bare: Path, keys: Keys) -> None:
    for act, key in ((sign_bundle, keys.private), (verify_bundle, keys.public)):
        reading, writing = os.pipe()
        os.write(writing, key.read_bytes())
        os.close(writing)
        act(bare, Path(f"/dev/fd/{reading}"))
        os.close(reading)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_documented_commands_make_a_pair(bare: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
    block = re.search(r"^```\n(openssl ecparam.*?)```$", text, re.DOTALL | re.MULTILINE)
    assert block
    commands = block[1].replace("topk8", "topk8 -passout pass:secret").replace("rm plain.pem", "")
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    piped = (
        f"openssl pkey -in private.pem -passin pass:secret | {sys.executable} -c "
        f"'from deploykit.cli import main; main()' sign {bare} --key /dev/stdin"
    )
    subprocess.run(["sh", "-ec", piped], cwd=tmp_path, check=True, capture_output=True)
    verify_bundle(bare, tmp_path / "public.pem")


def test_without_the_package_both_say_what_to_install(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for act, key in ((force_sign, keys.private), (verify_bundle, keys.public)):
        with pytest.raises(MissingDependency, match=r"pip install 'deploykit\[sign\]'") as caught:
            act(signed, key)
        assert caught.value.exit_code == 5
    verify_bundle(signed)


# Where it is put.


def test_a_signature_is_replaced_only_by_force(signed: Path, tmp_path: Path) -> None:
    other, before = make_keys(tmp_path, "other"), read_files(signed)
    with pytest.raises(UsageError, match="--force"):
        sign_bundle(signed, other.private)
    assert read_files(signed) == before
    sign_bundle(signed, other.private, force=True)
    verify_bundle(signed, other.public)


def test_what_does_not_prove_itself_is_not_signed(bare: Path, keys: Keys) -> None:
    manifest = json.loads((bare / runtime.MANIFEST).read_bytes())
    files = read_files(bare)
    for broken in (
        {**files, runtime.MODEL: b"broken"},
        seal({**files, runtime.MODEL: b"broken"}),
        seal(files, labels=manifest["labels"][1:]),
    ):
        write(bare, broken)
        with pytest.raises(DeploykitError) as caught:
            sign_bundle(bare, keys.private)
        assert caught.value.exit_code == 4
        assert read_files(bare) == broken


def test_links_to_a_bundle_stay_links(bare: Path, keys: Keys, tmp_path: Path) -> None:
    packed = tmp_path / "tiny.zip"
    packed.write_bytes(runtime.pack(read_files(bare)))
    for place in (bare, packed):
        link = tmp_path / f"to-{place.name}"
        link.symlink_to(place)
        sign_bundle(link, keys.private)
        assert link.is_symlink()
        verify_bundle(place, keys.public)


def test_killed_before_the_end_the_bundle_is_as_it_was(
    bare: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, _: Path) -> None:
        assert path.parent == bare.parent  # inside, it would be a file too many
        raise KeyboardInterrupt

    before = read_files(bare)
    with monkeypatch.context() as patch:
        patch.setattr(signing.Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sign_bundle(bare, keys.private)
    assert read_files(bare) == before
    sign_bundle(bare, keys.private)
    assert [path.name for path in bare.parent.iterdir()] == [bare.name]


def test_a_full_disk_is_told_in_a_sentence(
    bare: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = read_files(bare)
    monkeypatch.setattr(signing.Path, "write_bytes", full)
    with pytest.raises(UsageError, match="No space left on device"):
        sign_bundle(bare, keys.private)
    monkeypatch.undo()
    assert read_files(bare) == before


def test_the_manifest_alone_is_checked_where_the_files_were(signed: Path, keys: Keys) -> None:
    manifest, _ = runtime.read_bundle(signed)
    signature = runtime.read_signature(signed)
    check_manifest(manifest, signature, keys.public)
    for altered in ({**manifest, "name": "other"}, {}):
        with pytest.raises(VerificationError, match="expected a signature of this bundle"):
            check_manifest(altered, signature, keys.public)


# The commands.


def test_commands_sign_and_check(
    deploykit: Callable[..., object], bare: Path, keys: Keys, tmp_path: Path
) -> None:
    other = make_keys(tmp_path, "other")
    outcomes = [
        deploykit("verify", bare, "--key", keys.public),
        deploykit("sign", bare, "--key", keys.public),
        deploykit("sign", bare, "--key", keys.private),
        deploykit("sign", bare, "--key", keys.private),
        deploykit("sign", bare, "--key", keys.private, "--force"),
        deploykit("verify", bare, "--key", keys.public),
        deploykit("verify", bare, "--key", other.public),
        deploykit("verify", bare),
    ]
    assert [one.code for one in outcomes] == [4, 2, 0, 2, 0, 0, 4, 0]  # type: ignore[attr-defined]
    assert "not checked" in outcomes[-1].out  # type: ignore[attr-defined]
