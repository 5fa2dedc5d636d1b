"""A bundle in one zip file: the same files, the same proof, no way to hide anything in it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import make_bundle

from deploykit import runtime
from deploykit.bundle import load_bundle, verify_bundle
from deploykit.errors import BundleError, UsageError
from deploykit.inspection import inspect_folder
from deploykit.server.snapshot import take_snapshot

DESTINATION = "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("packed"), format="zip")


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# What it is.


def test_zip_holds_the_files_of_the_folder_stored_with_the_manifest_first(
    folder: Path, packed: Path
) -> None:
    with zipfile.ZipFile(packed) as archive:
        entries = archive.infolist()
        assert {entry.filename: archive.read(entry) for entry in entries} == files_of(folder)
    assert entries[0].filename == "manifest.json"
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}


def test_equal_inputs_give_equal_zip_files(packed: Path, tmp_path: Path) -> None:
    again = make_bundle(tmp_path / "elsewhere", format="zip")
    assert again.read_bytes() == packed.read_bytes()


def test_zip_is_verified_opened_served_and_inspected_as_the_folder_is(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    assert verify_bundle(packed) == verify_bundle(folder)
    image = folder / "golden" / "000.png"
    assert load_bundle(packed).predict(image).labels == load_bundle(folder).predict(image).labels
    take_snapshot(packed, tmp_path / "copy")
    assert files_of(tmp_path / "copy") == files_of(folder)
    assert inspect_folder(packed) == inspect_folder(folder)


def test_unzipped_by_any_tool_it_proves_itself(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "unzipped")
    done = subprocess.run(
        [sys.executable, tmp_path / "unzipped" / "run.py", "selftest"], capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_zip_file_reached_by_a_link_is_read(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "link.zip").symlink_to(packed)
    assert runtime.read_bundle(tmp_path / "link.zip") == runtime.read_bundle(packed)


# Tampering.


def flips_that_pass(data: bytes, step: int, path: Path) -> list[int]:
    passed = []
    for at in range(0, len(data), step):
        try:
            runtime.read_bundle(put(path, data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]))
            passed.append(at)
        except runtime.BrokenBundleError:
            pass
    return passed


def test_flip_of_any_byte_is_refused(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    assert flips_that_pass(data, 53, tmp_path / "flipped.zip") == []
    with zipfile.ZipFile(packed) as archive:
        end = archive.start_dir
    assert flips_that_pass(data[:40] + data[end:], 1, tmp_path / "flipped.zip") == []


def test_flip_test_goes_red_where_the_spelling_is_not_compared(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_is_packed", lambda *_: True)
    data = packed.read_bytes()
    passed = flips_that_pass(data, 1 if len(data) < 3000 else 7, tmp_path / "flipped.zip")
    with zipfile.ZipFile(packed) as archive:
        assert any(at > archive.start_dir for at in passed)


def rezipped(data: bytes, change: Callable[[zipfile.ZipFile], None], **options: int) -> bytes:
    """Write the same files with Python's zipfile, which knows more than `pack`, and a change."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as writer:  # type: ignore[call-overload]
        for name, content in runtime.unpack(data).items():
            writer.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
        change(writer)
    return file.getvalue()


def comment(archive: zipfile.ZipFile) -> None:
    archive.comment = b"hello"


def second_manifest(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("manifest.json", b"{}")


def outside(archive: zipfile.ZipFile) -> None:
    archive.writestr("../outside", b"x")


def link(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("link")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    archive.writestr(entry, b"/etc/passwd")


def extra(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("more")
    entry.extra = b"\x99\x99\x02\x00hi"
    archive.writestr(entry, b"x")


@pytest.mark.parametrize("change", [comment, second_manifest, outside, link, extra])
def test_what_other_tools_can_put_into_a_zip_file_is_refused(
    change: Callable[[zipfile.ZipFile], None], packed: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="as deploykit writes it"):
        load_bundle(put(tmp_path / "other.zip", rezipped(packed.read_bytes(), change)))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\0",
        lambda data: b"MZ" + data,
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"PK\3\4" * 100_000,
        lambda data: runtime.pack({}),
        lambda data: runtime.pack(dict.fromkeys(map(str, range(10_001)), b"")),
    ],
    ids=["behind", "before", "cut", "half", "empty", "heads", "no files", "too many"],
)
def test_more_or_less_than_the_files_is_refused(
    change: Callable[[bytes], bytes], packed: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="expected a bundle"):
        load_bundle(put(tmp_path / "other.zip", change(packed.read_bytes())))


def test_a_file_that_the_manifest_does_not_name_is_refused(packed: Path, tmp_path: Path) -> None:
    files = {**runtime.unpack(packed.read_bytes()), "more": b""}
    with pytest.raises(BundleError, match="has 'more' too"):
        load_bundle(put(tmp_path / "more.zip", runtime.pack(files)))


def test_names_outside_of_the_bundle_are_refused_and_nothing_is_written(
    packed: Path, tmp_path: Path
) -> None:
    files = {**runtime.unpack(packed.read_bytes()), "../escaped": b"x"}
    (tmp_path / "in").mkdir()
    with pytest.raises(BundleError):
        take_snapshot(put(tmp_path / "in" / "x.zip", runtime.pack(files)), tmp_path / "in" / "to")
    assert not (tmp_path / "escaped").exists()


# The place of a signature.


def test_a_signature_is_the_one_file_that_no_manifest_names(folder: Path, tmp_path: Path) -> None:
    signed = Path(shutil.copytree(folder, tmp_path / "signed"))
    (signed / runtime.SIGNATURE).write_bytes(b"anything")
    assert runtime.read_bundle(signed) == runtime.read_bundle(folder)
    assert runtime.read_signature(signed) == b"anything"
    assert runtime.read_signature(folder) is None
    packed = runtime.pack(files_of(signed))
    assert runtime.read_signature(put(tmp_path / "signed.zip", packed)) == b"anything"


@pytest.mark.parametrize("plant", ["large", "link", "pipe", "folder"])
def test_what_stands_in_the_place_of_a_signature_is_a_small_plain_file(
    plant: str, folder: Path, tmp_path: Path
) -> None:
    signed = Path(shutil.copytree(folder, tmp_path / "signed"))
    place = signed / runtime.SIGNATURE
    plants: dict[str, Callable[[], object]] = {
        "large": lambda: place.write_bytes(bytes(runtime.MAX_SIGNATURE_BYTES + 1)),
        "link": lambda: place.symlink_to("/etc/passwd"),
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
    }
    plants[plant]()
    with pytest.raises(runtime.BrokenBundleError):
        runtime.read_bundle(signed)


def test_a_manifest_cannot_name_the_signature(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][runtime.SIGNATURE] = {"bytes": 0, "sha256": ""}
    manifest["digest"] = runtime.digest_of(manifest)
    with pytest.raises(runtime.BrokenBundleError, match=r"signature\.json"):
        runtime.parse_manifest(runtime.canonical_json(manifest))


# Where it stands.


def test_zip_file_replaces_only_the_zip_file_of_a_bundle(packed: Path, tmp_path: Path) -> None:
    place = tmp_path / DESTINATION
    place.write_bytes(packed.read_bytes())
    with pytest.raises(UsageError, match="exists already"):
        make_bundle(tmp_path, format="zip")
    assert make_bundle(tmp_path, format="zip", force=True) == place
    place.write_bytes(b"a thesis")
    with pytest.raises(UsageError, match="expected the zip file of a bundle"):
        make_bundle(tmp_path, format="zip", force=True)
    assert place.read_bytes() == b"a thesis"


def test_folder_and_zip_file_do_not_replace_each_other(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    with pytest.raises(UsageError, match="to replace"):
        make_bundle(tmp_path, format="zip", force=True)
    shutil.rmtree(tmp_path / DESTINATION)
    make_bundle(tmp_path, format="zip")
    with pytest.raises(UsageError, match="to replace"):
        make_bundle(tmp_path, force=True)


def test_failed_proof_leaves_no_zip_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise runtime.SelftestError("golden: no")

    monkeypatch.setattr(runtime, "judge_here", fail)
    with pytest.raises(Exception, match="golden: no"):
        make_bundle(tmp_path, format="zip")
    assert not (tmp_path / DESTINATION).exists()
