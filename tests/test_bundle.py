import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from tiny_bundle import array_model, golden_of, image_model, make_bundle

from deploykit import bundle_files, runtime
from deploykit.artifacts import OnnxModel, Signature
from deploykit.bundle import Golden, about_runner, load_bundle, verify_bundle
from deploykit.errors import (
    BundleError,
    DataError,
    DeploykitError,
    MissingDependency,
    UsageError,
    VerificationError,
)
from deploykit.inspection import inspect_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("original"))


@pytest.fixture
def tiny(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("arrays"), arrays=True)


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def reseal(folder, **changes):
    """Alter the manifest as its maker could: hashes and digest are right again."""
    manifest = json.loads((folder / "manifest.json").read_bytes()) | changes
    manifest["files"] = changes.get("files") or {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files_of(folder).items()
        if name != "manifest.json"
    }
    manifest["digest"] = runtime.digest_of(manifest)
    (folder / "manifest.json").write_bytes(runtime.canonical_json(manifest))


def refused(folder):
    """Return why ``verify_bundle`` refuses."""
    with pytest.raises(DeploykitError) as caught:
        verify_bundle(folder)
    assert caught.value.exit_code == 4
    return str(caught.value)


# What a bundle is.


def test_bundle_holds_what_its_contract_names(original):
    manifest = json.loads((original / "manifest.json").read_bytes())
    assert set(manifest) == set(runtime.KEYS)
    assert set(manifest["files"]) | {"manifest.json"} == set(files_of(original))
    assert {"model.onnx", "run.py", "README.md", "golden/000.png", "golden/expected.npz"} <= set(
        manifest["files"]
    )
    assert manifest["labels"] == ["circle", "square", "star"]
    assert manifest["inputs"] == [{"name": "image", "dtype": "uint8", "shape": [-1, 4, 4, 1]}]


def test_digest_is_that_of_the_canonical_manifest_without_it(original):
    data = (original / "manifest.json").read_bytes()
    manifest = json.loads(data)
    digest = manifest.pop("digest")
    rest = json.dumps(
        manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    assert digest == hashlib.sha256(rest.encode()).hexdigest()


def test_identical_inputs_give_identical_bytes(original, tmp_path):
    assert files_of(make_bundle(tmp_path / "elsewhere")) == files_of(original)


def test_golden_files_need_no_pickle_and_hold_inputs_and_outputs(original):
    with np.load(original / "golden/expected.npz", allow_pickle=False) as arrays:
        assert arrays["inputs"].shape == (3, 4, 4, 1)
        assert arrays["outputs"].shape == (3, 3)


def test_readme_tells_how_to_run_and_what_was_measured(original, arrays):
    text = (original / "README.md").read_text()
    for part in ("python run.py predict golden/000.png", "| accuracy | 0.5 |", "circle, square"):
        assert part in text
    assert '"onnxruntime>=1.17.0" "pillow>=9.1"' in text
    assert "pillow" not in (arrays / "README.md").read_text()


def test_readme_admits_that_nothing_was_measured(tmp_path):
    text = (make_bundle(tmp_path, measured={}, measured_on=None) / "README.md").read_text()
    assert "Nothing was measured." in text
    assert "No latency was taken on the target." in text


@pytest.mark.parametrize(
    ("opset", "ir_version", "version"),
    [
        (17, 8, "1.16.0"),
        (20, 9, "1.17.0"),
        (20, 10, "1.18.0"),
        (21, 10, "1.18.0"),
        (22, 10, "1.21.0"),
    ],
)
def test_oldest_onnxruntime_follows_opset_and_ir_version(tmp_path, opset, ir_version, version):
    model = image_model(tmp_path / "m.onnx", opset=opset, ir_version=ir_version)
    assert verify_bundle(make_bundle(tmp_path, model=model))["min_onnxruntime"] == version


def test_opset_beyond_the_table_promises_only_the_release_that_verified_it(tmp_path):
    model = image_model(tmp_path / "m.onnx", opset=23, ir_version=11)
    import onnxruntime

    promised = verify_bundle(make_bundle(tmp_path, model=model))["min_onnxruntime"]
    assert onnxruntime.__version__.startswith(promised)


# Writing.


def test_existing_bundle_is_replaced_only_by_force(tiny):
    before = files_of(tiny)
    with pytest.raises(UsageError, match="--force"):
        make_bundle(tiny.parent)
    assert files_of(tiny) == before
    make_bundle(tiny.parent, force=True, version="2.0")
    assert verify_bundle(tiny)["version"] == "2.0"


def test_bundle_whose_model_answers_otherwise_never_appears(tmp_path):
    model = image_model(tmp_path / "m.onnx")
    golden = golden_of(model)
    wrong = Golden(golden.items, golden.inputs, golden.outputs + 1)
    with pytest.raises(VerificationError, match="differ by 1"):
        make_bundle(tmp_path, model=model, golden=wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_bundle_whose_signature_is_not_the_models_never_appears(tmp_path):
    model = image_model(tmp_path / "m.onnx")
    signature = Signature(
        model.signature.inputs,
        model.signature.outputs[:0] + model.signature.inputs,
        (),
        model.signature.preprocess,
    )
    with pytest.raises(BundleError, match="outputs: expected"):
        make_bundle(tmp_path, model=OnnxModel(model.path, signature, 20), golden=golden_of(model))
    assert not (tmp_path / "tiny").exists()


def test_not_a_number_is_refused_in_measurements(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_bundle(tmp_path, measured={"accuracy": float("nan")})
    assert not (tmp_path / "tiny").exists()


# Tampering.


@pytest.fixture
def small(tiny):
    """The same with next to nothing in the two files that are text."""
    for name in ("run.py", "README.md"):
        (tiny / name).write_text("short")
    reseal(tiny)
    runtime.read_bundle(tiny)
    return tiny


def indices(name, data, step):
    """Every byte of the manifest, every ``step``-th of the others."""
    return range(0, len(data), 1 if name == "manifest.json" else step)


def flipped_bytes_that_pass(folder, step):
    """Flip bytes one at a time; return the files in which a flip was let pass."""
    passed = set()
    for name, data in files_of(folder).items():
        for index in indices(name, data, step):
            flipped = data[:index] + bytes([data[index] ^ 0x20]) + data[index + 1 :]
            (folder / name).write_bytes(flipped)
            with suppress(runtime.BrokenBundleError):
                runtime.read_bundle(folder)
                passed.add(name)
        (folder / name).write_bytes(data)
    return passed


def test_flip_of_any_byte_is_refused(small):
    assert flipped_bytes_that_pass(small, 1) == set()


def test_flip_test_goes_red_without_the_hash_check(small, monkeypatch):
    monkeypatch.setattr(runtime, "_is_as_declared", lambda *_: True)
    assert flipped_bytes_that_pass(small, 101) == set(files_of(small)) - {"manifest.json"}


def test_flip_test_goes_red_without_the_digest_check(small, monkeypatch):
    monkeypatch.setattr(runtime, "digest_of", lambda manifest: manifest.get("digest"))
    assert flipped_bytes_that_pass(small, 10**6) == {"manifest.json"}


def test_tampered_bundle_is_refused_before_onnxruntime_is_reached(tiny, monkeypatch):
    (tiny / "model.onnx").write_bytes(b"")
    monkeypatch.setattr(runtime, "_onnxruntime", lambda: pytest.fail("onnxruntime was reached"))
    assert "model.onnx" in refused(tiny)
    with pytest.raises(BundleError):
        load_bundle(tiny)


def test_truncation_at_any_length_is_refused(small):
    for name, data in files_of(small).items():
        for length in indices(name, data, 1):
            (small / name).write_bytes(data[:length])
            with pytest.raises(runtime.BrokenBundleError):
                runtime.read_bundle(small)
        (small / name).write_bytes(data)
    runtime.read_bundle(small)


def test_appended_byte_is_refused(tiny):
    for name, data in files_of(tiny).items():
        (tiny / name).write_bytes(data + b"\n")
        assert name in refused(tiny)
        (tiny / name).write_bytes(data)


def remove_model(folder):
    (folder / "model.onnx").unlink()


def rename_model(folder):
    (folder / "model.onnx").rename(folder / "Model.onnx")


def add_file(folder):
    (folder / "golden/.DS_Store").touch()


def add_folder(folder):
    (folder / "empty").mkdir()


def add_strange_name(folder):
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\n")).touch()


def link_model(folder):
    (folder / "model.onnx").rename(folder.parent / "model.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "model.onnx")


def link_manifest(folder):
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")


def link_folder(folder):
    (folder / "golden").rename(folder.parent / "golden")
    (folder / "golden").symlink_to(folder.parent / "golden")


def hard_link_model(folder):
    os.link(folder / "model.onnx", folder.parent / "model.onnx")


def hard_link_manifest(folder):
    os.link(folder / "manifest.json", folder.parent / "manifest.json")


def fifo_for_model(folder):
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


def fifo_for_manifest(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def folder_for_model(folder):
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()


def giant_manifest(folder):
    (folder / "manifest.json").write_bytes(b'{"a":"' + b"x" * 2**21 + b'"}')


def deep_manifest(folder):
    (folder / "manifest.json").write_bytes(b"[" * 500_000)


def binary_manifest(folder):
    (folder / "manifest.json").write_bytes(b"\xff\x00\x80")


def empty_manifest(folder):
    (folder / "manifest.json").write_bytes(b"")


def list_for_manifest(folder):
    (folder / "manifest.json").write_bytes(b"[]")


def indented_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1, sort_keys=True))


def manifest_with_newline(folder):
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes() + b"\n")


def manifest_with_repeated_key(folder):
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'"threads":1', b'"threads":9,"threads":1'))


def manifest_with_nan(folder):
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'"accuracy":0.5', b'"accuracy":NaN'))


def manifest_without_digest(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["digest"]
    (folder / "manifest.json").write_bytes(runtime.canonical_json(manifest))


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def no_folder(folder):
    shutil.rmtree(folder)


def file_for_folder(folder):
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (remove_model, "lacks model.onnx"),
        (rename_model, "lacks model.onnx, has 'Model.onnx' too"),
        (add_file, "has 'golden/.DS_Store' too"),
        (add_folder, "has 'empty/' too"),
        (add_strange_name, r"has '\udcff\n' too"),
        (link_model, "'model.onnx': expected no link"),
        (link_manifest, "manifest.json: cannot be read"),
        (link_folder, "'golden': expected no link"),
        (hard_link_model, "model.onnx: expected a file of its own, found a hard link"),
        (hard_link_manifest, "manifest.json: expected a file of its own, found a hard link"),
        (fifo_for_model, "model.onnx: expected a plain file"),
        (fifo_for_manifest, "manifest.json: expected a plain file"),
        (folder_for_model, "lacks model.onnx, has 'model.onnx/' too"),
        (giant_manifest, "expected at most 1048576 bytes"),
        (deep_manifest, "expected canonical JSON"),
        (binary_manifest, "expected canonical JSON"),
        (empty_manifest, "expected canonical JSON"),
        (list_for_manifest, "expected canonical JSON"),
        (indented_manifest, "expected canonical JSON"),
        (manifest_with_newline, "expected canonical JSON"),
        (manifest_with_repeated_key, "expected canonical JSON"),
        (manifest_with_nan, "expected canonical JSON"),
        (manifest_without_digest, "digest"),
        (no_manifest, "expected a bundle, found no manifest.json"),
        (no_folder, "expected a bundle"),
        (file_for_folder, "expected a bundle's folder, or a zip file"),
    ],
)
def test_tampered_folder_is_refused_in_one_sentence(tiny, tamper, told, capsys):
    tamper(tiny)
    why = refused(tiny)
    assert told in why
    assert "\n" not in why
    assert runtime.main(["selftest"], tiny) == 4
    assert runtime.main(["predict", "x.png"], tiny) == 4
    assert capsys.readouterr().err.count("\n") == 2


def test_error_lists_missing_extra_and_altered_files(tiny):
    rename_model(tiny)
    with pytest.raises(BundleError) as caught:
        verify_bundle(tiny)
    assert (caught.value.missing, caught.value.extra) == (("model.onnx",), ("Model.onnx",))
    (tiny / "Model.onnx").rename(tiny / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError) as caught:
        load_bundle(tiny)
    assert caught.value.altered == ("model.onnx",)


def entry(**changes):
    return {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest(), **changes}


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../b",
        "a//b",
        "./a",
        "",
        ".hidden",
        "a\\b",
        "a\0b",
        "C:x",
        "ü",
        "a\n",
    ],
)
def test_manifest_may_not_name_files_outside_the_bundle(tiny, name):
    manifest = json.loads((tiny / "manifest.json").read_bytes())
    reseal(tiny, files={**manifest["files"], name: entry()})
    assert "expected plain relative names" in refused(tiny)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema": 2}, "schema: expected 1, got 2; a newer deploykit"),
        ({"schema": True}, "schema: expected 1"),
        ({"schema": 1.0}, "schema: expected 1"),
        ({"surprise": 1}, "expected the keys"),
        ({"threads": 0}, "threads"),
        ({"threads": "1"}, "threads"),
        ({"threads": True}, "threads"),
        ({"labels": ["a", "b", 3]}, "labels"),
        ({"labels": ["a"]}, "labels: expected one a class"),
        ({"labels": ["a", "b", "a"]}, "labels: expected distinct strings"),
        ({"inputs": []}, "one input"),
        ({"inputs": [{"name": "image"}]}, "manifest.json"),
        ({"inputs": [None]}, "manifest.json"),
        ({"outputs": [{"name": "l", "dtype": "strange", "shape": [-1, 3]}]}, "strange"),
        ({"outputs": [{"name": "l", "dtype": "float32", "shape": []}]}, "manifest.json"),
        ({"outputs": [{"name": "l", "dtype": "(,)i4", "shape": [-1, 3]}]}, "expected a dtype"),
        ({"schema": 0}, "schema: expected 1, got 0; export the bundle again"),
        ({"name": "tiny\x1b[2K\rsigned by the owner\x1b[8m"}, "name: expected printable text"),
        ({"version": "1\n2"}, "version: expected printable text"),
        ({"target": "x" * 201}, "target: expected printable text"),
        ({"tolerance": {}}, "tolerance.max_abs"),
        ({"tolerance": {"max_abs": -1}}, "tolerance.max_abs"),
        ({"tolerance": {"max_abs": "1"}}, "manifest.json"),
        ({"tolerance": {"max_abs": True}}, "tolerance.max_abs: expected a number from 0, got True"),
        ({"tolerance": {"max_abs": 10**400}}, "tolerance.max_abs"),
        ({"tolerance": {"max_abs": 1, "scale": "x"}}, "tolerance.scale: expected a number"),
        ({"tolerance": {"max_abs": 1, "scale": True}}, "tolerance.scale"),
        ({"tolerance": {"max_abs": 1, "steps": [2]}}, "tolerance.steps"),
        ({"tolerance": {"max_abs": 1, "top1": 1}}, "tolerance.top1: expected true or false, got 1"),
        ({"measured": {"accuracy": "x"}}, "measured.accuracy: expected a number from 0 or null"),
        ({"measured": {"accuracy": False}}, "measured.accuracy"),
        ({"measured": {"latency_ms": [1]}}, "measured.latency_ms"),
        ({"measured": {"latency_ms": None}}, "measured.latency_ms"),
        ({"measured": {"latency_ms": {"1": "fast"}}}, "measured.latency_ms"),
        ({"verified_on": {"targets": 5}}, "verified_on.targets: expected a list of names, got 5"),
        ({"verified_on": {"targets": None}}, "verified_on.targets"),
        ({"verified_on": {"targets": [5]}}, "verified_on.targets"),
        ({"verified_on": {"cpu_target": 5}}, "verified_on.cpu_target"),
        ({"min_onnxruntime": "new"}, "expected a version"),
        ({"preprocess": {}}, "preprocess"),
        ({"preprocess": None}, "expected a .npy file"),
        ({"files": {"model.onnx": entry()}}, "expected run.py among them"),
        ({"files": {"a": entry(), "A": entry()}}, "differ in more than case"),
        ({"files": {"a": entry(bytes=2**40)}}, "expected at most"),
        ({"files": {"a": entry(bytes=-1)}}, "expected at most"),
        ({"files": {"a": entry(bytes=1.0)}}, "bytes and sha256"),
        ({"files": {"a": entry(mode=1)}}, "bytes and sha256"),
        ({"files": {"a": None}}, "manifest.json"),
        ({"files": {"manifest.json": entry()}}, "plain relative names"),
    ],
)
def test_well_hashed_nonsense_is_refused(tiny, changes, told):
    reseal(tiny, **changes)
    why = refused(tiny)
    assert told in why
    assert "\n" not in why


@pytest.mark.parametrize("depth", [900, 992, 1000, 20_000])
def test_deep_manifest_is_refused(tiny, depth):
    """Python's parser goes a few steps deeper than what writes JSON again."""
    manifest = json.loads((tiny / "manifest.json").read_bytes())
    text = runtime.canonical_json({**manifest, "measured": {"a": 0}})
    (tiny / "manifest.json").write_bytes(text.replace(b"0", b"[" * depth + b"]" * depth, 1))
    assert "\n" not in refused(tiny)


def test_labels_do_not_steer_the_terminal(tiny, capsys):
    reseal(tiny, labels=["\x1b[8m", "\u202e", "c"])
    assert (
        runtime.main(["predict", *[str(tiny / f"golden/00{i}.png") for i in range(3)]], tiny) == 0
    )
    assert set("\x1b\u202e").isdisjoint(capsys.readouterr().out)
    assert set("\x1b\u202e").isdisjoint(inspect_folder(tiny))


def test_what_was_not_measured_may_be_null_or_absent(tiny):
    loose = {"max_abs": 1}
    for measured in ({}, {"accuracy": None, "latency_ms": {"1": None}}):
        for tolerance in (loose, {**loose, "scale": None, "steps": None}):
            reseal(tiny, measured=measured, tolerance=tolerance, verified_on={})
            verify_bundle(tiny)


def test_swap_between_verification_and_load_changes_nothing(tiny, monkeypatch):
    real = runtime.read_bundle

    def read_then_swap(folder):
        found = real(folder)
        (tiny / "model.onnx").write_bytes(b"swapped")
        (tiny / "golden/expected.npz").write_bytes(b"swapped")
        return found

    monkeypatch.setattr(runtime, "read_bundle", read_then_swap)
    verify_bundle(tiny)


def test_bundle_behind_a_link_is_read(tiny):
    (tiny.parent / "current").symlink_to(tiny)
    assert verify_bundle(tiny.parent / "current")["name"] == "tiny"


# What verify sees and a runner cannot vouch for.


def test_altered_runner_is_refused_although_its_hash_is_right(tiny):
    (tiny / "run.py").write_text("print('all is well')")
    reseal(tiny)
    assert "expected the runner of deploykit" in refused(tiny)


def test_runner_of_another_version_is_known_by_its_hash(tiny):
    (tiny / "run.py").write_text("print('older')")
    reseal(tiny, verified_on={"deploykit": "0.0.9"})
    manifest = verify_bundle(tiny)
    assert manifest["verified_on"] == {"deploykit": "0.0.9"}
    assert "run.py is that of deploykit '0.0.9'" in about_runner(manifest)


def test_runner_of_this_version_was_compared_which_needs_no_word(tiny):
    assert about_runner(verify_bundle(tiny)) == ""


def test_model_with_external_data_is_never_opened(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weight.bin").write_bytes(np.ones((3, 2), np.float32).tobytes())
    proto = onnx.load(array_model(tmp_path / "m.onnx").path)
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weight.bin")
    with pytest.raises(runtime.BrokenBundleError, match="cannot open it"):
        runtime.open_session(proto.SerializeToString())
    # An older one would open what an absolute name says, or any; it is not given the model.
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(runtime.PackageError, match=r"outside .* 1\.23\.2 .* 'onnxruntime>=1\.24'"):
        runtime.open_session(proto.SerializeToString())
    runtime.open_session(array_model(tmp_path / "m.onnx").path.read_bytes())


# Golden samples.


def replace_golden(folder, inputs=None, outputs=None, **changes):
    with np.load(folder / "golden/expected.npz") as old:
        arrays = {"inputs": old["inputs"], "outputs": old["outputs"]}
    arrays |= {k: v for k, v in (("inputs", inputs), ("outputs", outputs)) if v is not None}
    (folder / "golden/expected.npz").write_bytes(bundle_files.npz_bytes(**arrays))
    reseal(folder, **changes)


def golden_of_bundle(folder):
    with np.load(folder / "golden/expected.npz") as arrays:
        return arrays["inputs"], arrays["outputs"]


def test_outputs_within_the_tolerance_pass_and_beyond_it_fail(tiny):
    _, outputs = golden_of_bundle(tiny)
    replace_golden(tiny, outputs=outputs + np.float32(0.9e-4))
    verify_bundle(tiny)
    replace_golden(tiny, outputs=outputs + np.float32(1.1e-4))
    with pytest.raises(VerificationError, match=r"allowed is 0\.0001"):
        verify_bundle(tiny)
    replace_golden(tiny, outputs=outputs * np.float32("nan"))
    with pytest.raises(VerificationError):
        verify_bundle(tiny)


def test_changed_answer_fails_unless_it_was_a_near_tie(tiny):
    _, outputs = golden_of_bundle(tiny)
    best, second = np.sort(outputs[0])[::-1][:2]
    swapped = outputs.copy()
    swapped[0, outputs[0].argsort()[-2]] = best + (best - second)  # second now leads as far
    loose = {"max_abs": 10.0, "top1": True, "steps": 1.0, "scale": 0.1}
    replace_golden(tiny, outputs=swapped, tolerance=loose)
    with pytest.raises(VerificationError, match=r"golden/000\.png: expected class \d, got \d"):
        verify_bundle(tiny)
    replace_golden(tiny, tolerance={**loose, "scale": float(best - second) * 2})
    verify_bundle(tiny)
    replace_golden(tiny, tolerance={**loose, "top1": False})
    verify_bundle(tiny)


def test_one_grey_level_is_noted_and_two_are_refused(tiny, capsys):
    inputs, _ = golden_of_bundle(tiny)
    loose = {"max_abs": 10.0, "top1": False, "steps": None, "scale": None}
    replace_golden(tiny, inputs=inputs ^ 1, tolerance=loose)
    assert runtime.main(["selftest"], tiny) == 0
    assert "by one grey level" in capsys.readouterr().out
    replace_golden(tiny, inputs=inputs ^ 2, tolerance=loose)
    assert runtime.main(["selftest"], tiny) == 4
    assert "decodes differently here, by 2" in capsys.readouterr().err


def test_missing_samples_and_broken_archives_fail(tiny):
    inputs, outputs = golden_of_bundle(tiny)
    replace_golden(tiny, inputs=inputs[:2], outputs=outputs[:2])
    with pytest.raises(VerificationError, match="expected 2 samples, found 3"):
        verify_bundle(tiny)
    np.savez_compressed(tiny / "golden/expected.npz", inputs=inputs, outputs=outputs)
    reseal(tiny)
    with pytest.raises(VerificationError, match="stored"):
        verify_bundle(tiny)
    (tiny / "golden/expected.npz").write_bytes(b"PK")
    reseal(tiny)
    with pytest.raises(VerificationError, match="cannot be read"):
        verify_bundle(tiny)
    whole = bundle_files.npz_bytes(inputs=inputs, outputs=outputs)
    encrypted = bytearray(whole)
    encrypted[6] |= 1
    encrypted[whole.index(b"PK\1\2") + 8] |= 1
    (tiny / "golden/expected.npz").write_bytes(encrypted)
    reseal(tiny)
    with pytest.raises(VerificationError, match="cannot be read"):
        verify_bundle(tiny)


def test_golden_inputs_that_the_model_does_not_take_fail(tiny):
    inputs, _ = golden_of_bundle(tiny)
    replace_golden(tiny, inputs=inputs.astype(np.int64))
    with pytest.raises(VerificationError, match=r"model\.onnx: cannot be run"):
        verify_bundle(tiny)


def test_too_old_onnxruntime_is_a_missing_dependency(tiny):
    reseal(tiny, min_onnxruntime="99.0")
    with pytest.raises(MissingDependency, match=r"expected onnxruntime 99\.0 or newer"):
        verify_bundle(tiny)


def test_model_that_gives_nan_is_refused(tmp_path):
    model = array_model(tmp_path / "m.onnx")
    proto = onnx.load(model.path)
    proto.graph.initializer[0].CopyFrom(
        helper.make_tensor("weight", TensorProto.FLOAT, [3, 2], [float("nan")] * 6)
    )
    model.path.write_bytes(proto.SerializeToString())
    with pytest.raises(VerificationError, match="finite"):
        make_bundle(tmp_path, arrays=True, model=model)


# Prediction.


def test_paths_bytes_and_arrays_give_the_same_answers(tiny):
    bundle = load_bundle(tiny)
    inputs, outputs = golden_of_bundle(tiny)
    paths = sorted((tiny / "golden").glob("*.png"))
    batch = bundle.predict(inputs)
    assert len(batch) == 3
    assert np.array_equal(batch.logits, outputs)
    assert np.allclose(batch.probabilities.sum(axis=1), 1)
    for samples in (paths, [str(p) for p in paths], [p.read_bytes() for p in paths], list(inputs)):
        answers = bundle.predict(samples)
        assert answers.labels == batch.labels
        assert np.array_equal(answers.logits, batch.logits)
    for one in (paths[0], bytearray(paths[0].read_bytes()), (path for path in paths[:1])):
        assert bundle.predict(one).labels == batch.labels[:1]
    assert [one["label"] for one in batch.top(2)[0]] == ["star", "circle"]


def test_many_samples_go_in_batches(tiny, arrays):
    inputs, _ = golden_of_bundle(tiny)
    bundle = load_bundle(tiny)
    few = bundle.predict(inputs).labels
    assert bundle.predict(np.resize(inputs, (99, 4, 4, 1))).labels == few * 33
    assert load_bundle(arrays).predict(np.zeros((100, 3))).logits.shape == (100, 2)


class Unlistable:
    """As a tensor without axes: it has the method, but nothing to go through."""

    def __iter__(self):
        raise TypeError("iteration over a 0-d tensor")


@pytest.mark.parametrize(
    "samples",
    [
        [],
        np.zeros((0, 4, 4, 1), np.uint8),
        np.zeros((4, 4, 1), np.float32),
        np.zeros((4, 4, 1), np.int64),
        np.zeros((5, 4, 1), np.uint8),
        np.zeros((), np.uint8),
        b"no image",
        Path("absent.png"),
        bytearray(b"no image"),
        [0.1] * 8,
        [[0.1] * 8],
        3,
        None,
        [None],
        Unlistable(),
    ],
)
def test_unusable_samples_are_data_errors(original, samples):
    with pytest.raises(DataError):
        load_bundle(original).predict(samples)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_sample_that_holds_no_number_is_told_by_its_place(arrays, value):
    good, bad = np.zeros(3), np.array([0, value, 0])
    for samples in (np.stack([good, good, bad]), [good, good, bad], [np.stack([good, good]), bad]):
        with pytest.raises(DataError, match="sample 2: expected finite numbers, got NaN or inf"):
            load_bundle(arrays).predict(samples)


def test_threads_can_be_chosen(original):
    options = load_bundle(original, threads=2).session.get_session_options()
    assert options.intra_op_num_threads == 2


def test_bundle_is_loaded_and_verified_without_torch_and_onnx(original):
    code = (
        "import sys; from deploykit.bundle import load_bundle, verify_bundle; "
        "load_bundle(sys.argv[1]); verify_bundle(sys.argv[1]); "
        "sys.exit(bool({'torch', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(original)], check=False).returncode == 0


# On a machine of its own.


def pinned(package):
    """Return the tested version: of the constraints file, else the one installed here."""
    constraints = ROOT / "constraints.txt"
    text = constraints.read_text() if constraints.exists() else ""
    found = re.search(rf"^{package}==([^\s;]+)", text, re.MULTILINE)
    return f"{package}=={found[1] if found else metadata.version(package)}"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Make an environment that holds numpy, onnxruntime and pillow, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    runtimes = [pinned(p) for p in ("onnxruntime", "onnxruntime-gpu") if is_installed(p)]
    version = runtimes[0].partition("==")[2]
    packages = [pinned("numpy"), pinned("pillow"), f"onnxruntime=={version}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def is_installed(package):
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
def test_runner_needs_only_numpy_onnxruntime_and_pillow(bare_python, tiny, arrays):
    absent = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, sys.argv[1:])))"
    for folder, sample in ((tiny, "golden/000.png"), (arrays, "golden/000.npy")):
        for command in (
            [bare_python, "-c", absent, "deploykit", "torch", "onnx"],
            [bare_python, "run.py", "selftest"],
            [bare_python, "run.py", "predict", sample, "--json"],
        ):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)[0]["file"] == sample


# another kind of CPU


def test_loading_on_another_cpu_is_judged_by_the_golden_samples(tmp_path, monkeypatch, capsys):
    bundle = make_bundle(tmp_path, verified_on={"targets": ["cpu-x86-avx2"]})
    capsys.readouterr()
    monkeypatch.setattr(runtime, "detect_cpu", lambda: "cpu-arm64")
    load_bundle(bundle)
    verify_bundle(bundle)
    assert capsys.readouterr().err.count("this CPU is cpu-arm64; the golden samples hold") == 2
    true_run = runtime.run_model
    monkeypatch.setattr(runtime, "run_model", lambda *given: true_run(*given) + 1.0)
    for read in (load_bundle, verify_bundle):
        with pytest.raises(VerificationError, match="export it with --target cpu-arm64"):
            read(bundle)
