"""Extra files for mobile builds: the same answers, equal bytes, no place of the machine."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_bundle import make_bundle

from deploykit import mobile, runtime
from deploykit.errors import ExportError, VerificationError
from deploykit.mobile import MODEL, OPERATORS, mobile_files

PROGRAM = """
import hashlib, sys
from pathlib import Path
from deploykit import runtime
from deploykit.mobile import mobile_files
files = mobile_files(*runtime.read_bundle(Path(sys.argv[1])))
sys.stdout.write(" ".join(hashlib.sha256(files[name]).hexdigest() for name in sorted(files)))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("mobile"))


def test_the_model_in_the_other_format_answers_the_golden_samples(bundle):
    manifest, contents = runtime.read_bundle(bundle)
    files = mobile_files(manifest, contents)
    assert set(files) == {MODEL, OPERATORS}
    found = runtime.check_golden(manifest, contents, runtime.open_session(files[MODEL]))
    assert found["samples"] == 3
    assert files[MODEL][4:8] == b"ORTM"


def test_operators_are_listed_without_the_place_of_the_model(bundle):
    listed = mobile_files(*runtime.read_bundle(bundle))[OPERATORS].decode()
    assert "ai.onnx;" in listed
    assert "/" not in listed


def test_a_fresh_process_writes_equal_bytes(bundle):
    order = [sys.executable, "-c", PROGRAM, str(bundle)]
    runs = [subprocess.run(order, capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout


def test_a_bundle_carries_them(tmp_path):
    out = make_bundle(tmp_path, companions=[mobile_files])
    manifest, _ = runtime.read_bundle(out)
    assert {MODEL, OPERATORS} <= set(manifest["files"])


def test_a_file_with_other_answers_is_refused(bundle, monkeypatch):
    manifest, contents = runtime.read_bundle(bundle)
    convert, model = mobile._convert, onnx.load_model_from_string(contents[runtime.MODEL])
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.array([1, 0, 0], np.float32), "bias"))
    other = model.SerializeToString()
    monkeypatch.setattr(mobile, "_convert", lambda _, path: convert(other, path))
    with pytest.raises(VerificationError, match=r"model.ort: golden: outputs differ"):
        mobile_files(manifest, contents)


def test_a_model_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ExportError, match="cannot write it"):
        mobile._convert(b"\x00" * 50, Path(tmp_path) / "model.ort")
