"""A run's calibration samples: streamed to their file, read back as they are needed."""

import io
from hashlib import sha256

import numpy as np
import pytest

from deploykit.errors import ModelError, UsageError, VerificationError
from deploykit.publish import publish_folder
from deploykit.run_folder import CHUNK, RunFolder


def loader(values, asked):
    def load(rows):
        asked.append(len(rows))
        return values[rows]

    return load


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_calibration_file_is_what_numpy_writes_and_is_read_in_chunks(tmp_path, dtype, count):
    values = np.random.default_rng(0).integers(0, 255, (4 * CHUNK, 3, 2, 1)).astype(dtype)
    rows, asked = np.arange(count) + 5, []
    samples = RunFolder(tmp_path).save_calibration(loader(values, asked), rows)
    expected = io.BytesIO()
    np.save(expected, values[rows])
    assert (tmp_path / "calibration.npy").read_bytes() == expected.getvalue()
    assert isinstance(samples, np.memmap)
    np.testing.assert_array_equal(samples, values[rows])
    assert max(asked) <= CHUNK


def test_broken_read_leaves_the_old_calibration_and_no_other_file(tmp_path):
    run, values = RunFolder(tmp_path), np.zeros((3 * CHUNK, 2), np.uint8)
    run.save_calibration(loader(values, []), np.arange(10))
    before = run.calibration.read_bytes()

    def broken(rows):
        if rows[0] >= CHUNK:
            raise RuntimeError("the disk is gone")
        return values[rows]

    with pytest.raises(RuntimeError, match="gone"):
        run.save_calibration(broken, np.arange(3 * CHUNK))
    assert run.calibration.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.npy"]


def test_candidate_can_be_published_again_when_a_run_is_resumed(tmp_path):
    candidate = RunFolder(tmp_path).candidate("train")
    for content in (b"old", b"new"):
        with publish_folder(candidate, force=True, kind="candidate") as staging:
            (staging / "structure.json").write_bytes(content)
    assert (candidate / "structure.json").read_bytes() == b"new"


def test_folder_of_something_else_is_never_replaced(tmp_path):
    candidate = RunFolder(tmp_path).candidate("train")
    candidate.mkdir(parents=True)
    (candidate / "letters.txt").touch()
    with (
        pytest.raises(UsageError, match="something else"),
        publish_folder(candidate, force=True, kind="candidate"),
    ):
        pass


def test_only_the_model_that_was_measured_is_given(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ModelError, match=r"train\.onnx: cannot be read.*compress --resume"):
        run.measured_model("train", None)
    run.onnx("train").parent.mkdir()
    run.onnx("train").write_bytes(b"model")
    measured = sha256(b"model").hexdigest()
    assert run.measured_model("train", measured) == run.onnx("train")
    for expected in (sha256(b"other").hexdigest(), None):
        with pytest.raises(VerificationError, match=r"train\.onnx: expected the model that was"):
            run.measured_model("train", expected)
