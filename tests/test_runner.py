"""What `run.py` tells of the machine that it runs on, and what it needs there."""

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_bundle import make_bundle

from deploykit import runtime
from deploykit.fleet.gather import Measurement

TOLD = {
    *("schema", "name", "version", "target", "digest", "device"),
    *("onnxruntime", "provider", "threads"),
}
DEVICE = {"name", "cpu", "machine", "cpu_target", "features", "cores", "os", "python"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("image"))


def bench(bundle, capsys, **changes):
    capsys.readouterr()
    runtime.bench(bundle, **{"threads": None, "as_json": True, "seconds": 0.01} | changes)
    return capsys.readouterr().out


# selftest


def test_selftest_tells_provider_version_cpu_and_features(tiny, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset({"avx2", "avx_vnni", "sse"}))
    monkeypatch.setattr(runtime, "detect_cpu", lambda: "cpu-x86-avx2")
    assert runtime.main(["selftest"], tiny) == 0
    _, ran_on, signature = capsys.readouterr().out.splitlines()
    assert ran_on == (
        f"CPUExecutionProvider of onnxruntime {onnxruntime.__version__}, 1 threads, "
        "on cpu-x86-avx2 (avx2 avx_vnni)"
    )
    assert signature == "no signature: the hashes stop accidents, not an attacker"


def test_unknown_features_are_told_as_unknown(tiny, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset())
    runtime.main(["selftest"], tiny)
    assert "(no features known)" in capsys.readouterr().out


def test_selftest_json_is_one_object(tiny, capsys):
    assert runtime.main(["selftest", "--json"], tiny) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == TOLD | {"files", "golden", "signature"}
    assert set(told["device"]) == DEVICE
    assert told["golden"] == {"samples": 3, "max_abs": 0.0, "grey_levels": 0.0, "passed": True}
    assert told["digest"] == json.loads((tiny / "manifest.json").read_bytes())["digest"]


@pytest.mark.parametrize("arguments", [["selftest"], ["selftest", "--json"]])
def test_a_signature_is_not_taken_for_a_checked_one(tmp_path, capsys, arguments):
    bundle = make_bundle(tmp_path)
    (bundle / "signature.json").write_text("{}")
    capsys.readouterr()
    assert runtime.main(arguments, bundle) == 0
    out = capsys.readouterr().out
    assert "signature.json was not checked" in out
    assert "no signature" not in out


# bench


def test_bench_json_is_what_the_page_of_devices_reads(tiny, capsys):
    out = bench(tiny, capsys, device="shelf")
    told = json.loads(out)
    assert set(told) == TOLD | {"latency", "memory", "golden", "accuracy"}
    read = Measurement.model_validate_json(out)
    assert (read.name, read.version, read.accuracy, read.threads) == ("tiny", "1.0", 0.5, 1)
    assert read.device.name == "shelf"
    assert read.device.cpu_target == runtime.detect_cpu()
    assert [row.batch for row in read.latency] == [1, 32]
    assert read.golden.samples == 3


def test_device_is_called_what_it_calls_itself(tiny, capsys, monkeypatch):
    monkeypatch.setattr(runtime.platform, "node", lambda: "pi")
    assert json.loads(bench(tiny, capsys))["device"]["name"] == "pi"
    monkeypatch.setattr(runtime.platform, "node", lambda: "")
    assert json.loads(bench(tiny, capsys))["device"]["name"] == "unnamed"


@pytest.mark.parametrize("name", ["", "x" * 81, "a\nb", "\x1b[31m"])
def test_names_of_devices_that_do_not_print_are_refused(tiny, capsys, name):
    with pytest.raises(SystemExit) as caught:
        runtime.main(["bench", f"--device={name}"], tiny)
    assert caught.value.code == 2
    assert "expected 1 to 80 printable characters" in capsys.readouterr().err


def test_nothing_is_timed_of_a_model_that_answers_otherwise(tiny, capsys, monkeypatch):
    true_run = runtime.run_model
    monkeypatch.setattr(runtime, "run_model", lambda *given: true_run(*given) + 1.0)
    with pytest.raises(runtime.SelftestError, match="outputs differ by 1"):
        bench(tiny, capsys)
    assert capsys.readouterr().out == ""
    passed = {"samples": 3, "max_abs": 0.0, "grey_levels": 0.0}
    monkeypatch.setattr(runtime, "check_golden", lambda *_: passed)
    assert json.loads(bench(tiny, capsys))["golden"]["passed"]  # with the check off it would be


def test_memory_that_the_system_does_not_tell_is_null(tiny, capsys, monkeypatch):
    memory = json.loads(bench(tiny, capsys))["memory"]
    assert memory["peak_bytes"] > 2**20
    monkeypatch.setattr(runtime, "resident_bytes", lambda: None)
    monkeypatch.setattr(runtime, "peak_bytes", lambda: None)
    assert json.loads(bench(tiny, capsys))["memory"] == {"peak_bytes": None, "model_bytes": None}
    assert "memory: peak unknown, of which the model unknown" in bench(tiny, capsys, as_json=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_that_is_taken_is_counted():
    before = runtime.resident_bytes()
    with mmap.mmap(-1, 2**25) as held:  # an array may lie where another was
        np.frombuffer(held, np.uint8)[:] = 1
        assert runtime.resident_bytes() - before > 0.9 * 2**25
    assert runtime.peak_bytes() >= runtime.resident_bytes()
    assert runtime._status_bytes("VmNothing") is None


def test_peak_is_known_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(runtime, "_status_bytes", lambda _: None)
    assert runtime.peak_bytes() > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert runtime.peak_bytes() is None


# an environment of its own


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the three packages that a bundle needs, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for module, package in (("numpy", "numpy"), ("onnxruntime", "onnxruntime"), ("PIL", "pillow")):
        found = Path(__import__(module).__file__).parent
        for path in (found, *found.parent.glob(f"{package}.libs")):  # with what a wheel brings
            (folder / path.name).symlink_to(path)
    return folder


def run_alone(packages, *command):
    """Run Python with the standard library and these packages alone."""
    return subprocess.run(
        [sys.executable, "-S", *map(str, command)],
        env={"PYTHONPATH": str(packages), "PATH": os.environ["PATH"]},
        cwd=packages,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["deploykit", "torch", "onnx", "numpy"])
def test_three_packages_are_all_that_there_is(packages, name):
    done = run_alone(packages, "-c", f"import {name}")
    assert (done.returncode == 0) is (name == "numpy")
    if name != "numpy":
        assert f"No module named '{name}'" in done.stderr


def test_bundle_from_a_zip_file_proves_itself_and_answers_with_three_packages(packages, tmp_path):
    zipped = make_bundle(tmp_path / "made").parent / "tiny.zip"
    make_zip(tmp_path / "made/tiny", zipped)
    folder = tmp_path / "unzipped"
    shutil.unpack_archive(zipped, folder)
    done = run_alone(packages, folder / "run.py", "selftest")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 golden samples answer as they did" in done.stdout
    done = run_alone(packages, folder / "run.py", "predict", folder / "golden/000.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"000\.png: \w+ 0\.\d{4}", done.stdout)


def make_zip(folder, path):
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    path.write_bytes(runtime.pack({name: (folder / name).read_bytes() for name in names}))
