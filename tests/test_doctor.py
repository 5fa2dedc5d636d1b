import json
import re
import subprocess
import sys

import pytest

from deploykit import doctor as module
from deploykit.doctor import doctor, render
from deploykit.environment import environment
from deploykit.targets import TARGETS


def test_doctor_answers_in_json_with_a_known_target():
    found = json.loads(json.dumps(doctor()))
    assert found["target"] in TARGETS
    assert found["targets"].keys() == TARGETS.keys()
    assert found["targets"][found["target"]] is None
    assert found["targets"]["web"]
    assert found["cores"] >= 1
    assert "CPUExecutionProvider" in found["providers"]
    assert found["versions"]["numpy"]


def test_rendering_names_target_and_versions():
    text = render(doctor())
    assert doctor()["target"] in text
    assert doctor()["versions"]["numpy"] in text


def test_rendering_holds_where_nothing_is_known():
    machine = {"cpu": None, "features": [], "cores": 1, "memory_bytes": None, "python": "3.11"}
    targets = {"cpu-arm64": None, "cuda": "no GPU"}
    offers = {
        "target": "cpu-arm64",
        "targets": targets,
        "providers": [],
        "gpus": [],
        "versions": {"torch": None},
    }
    text = render({**machine, **offers, "os": "x", "machine": "y"})
    assert "none: pip install onnxruntime" in text
    assert "not installed" in text
    assert re.search(r"target cpu-arm64 +runs natively\n", text)
    assert re.search(r"target cuda +no GPU\n", text)


def test_doctor_tells_what_every_measurement_tells():
    found, told = doctor(), environment()
    versions = told.pop("versions")
    assert told.items() <= found.items()
    assert versions.items() <= found["versions"].items()


def test_doctor_imports_no_torch():
    code = "import sys, deploykit.doctor as d; d.doctor(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("failure", [FileNotFoundError(), subprocess.TimeoutExpired("x", 1)])
def test_absent_or_stuck_gpu_driver_is_no_gpu(monkeypatch, failure):
    def fail(*_arguments, **_options):
        raise failure

    monkeypatch.setattr(module.subprocess, "run", fail)
    assert doctor()["gpus"] == []
