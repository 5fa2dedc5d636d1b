"""The BentoML project in serving/ brings all that a server needs, and is built without network."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_bundle import make_bundle

ROOT = Path(__file__).parents[1]
SERVING = ROOT / "serving"


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if line)
    }


REQUIREMENTS = pins(SERVING / "requirements.txt")


# requirements


def test_requirements_are_pinned_as_everything_was_tested() -> None:
    assert REQUIREMENTS.items() <= pins(ROOT / "constraints.txt").items()


def needs(name: str) -> set[str]:
    """Return what an installed package needs; onnxruntime-gpu stands in for onnxruntime."""
    try:
        declared = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        declared = metadata.requires(f"{name}-gpu") or []
    found = [Requirement(one) for one in declared]
    return {
        canonicalize_name(one.name)
        for one in found
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def test_requirements_hold_all_that_they_need_and_no_torch() -> None:
    needed = set().union(*map(needs, REQUIREMENTS))
    assert needed <= set(REQUIREMENTS)
    assert REQUIREMENTS.keys().isdisjoint({"torch", "deploykit", "onnx", "scikit-learn"})
    assert {"onnx", "numpy"} <= needs("onnxscript"), "needs() sees nothing"


def packages_loaded_by(modules: str) -> set[str]:
    code = f"import {modules}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    homes = metadata.packages_distributions()
    tops = {name.split(".")[0] for name in done.stdout.split()} & set(homes)
    return {canonicalize_name(homes[top][0]) for top in tops}


def test_server_and_client_load_nothing_but_the_requirements() -> None:
    server = packages_loaded_by(
        "deploykit.cli, deploykit.client, deploykit.server.service, deploykit.server.supervisor, "
        "deploykit.server.worker, onnxruntime, PIL"
    )
    assert "bentoml" in server
    # httpx takes brotli where it is, setuptools hooks itself into every start of Python, and the
    # onnxruntime for GPUs is another package.
    others = {"deploykit", "onnxruntime-gpu", "brotli", "setuptools"}
    assert server - {*REQUIREMENTS, *others} == set()
    assert "pyarrow" in packages_loaded_by("pyarrow")


# BentoML


def bentofile() -> dict[str, Any]:
    return dict(yaml.safe_load((SERVING / "bentofile.yaml").read_text()))


def test_bentofile_names_files_that_exist_and_asks_no_network() -> None:
    found = bentofile()
    assert found["service"] == "service:service"
    assert "import service as service" in (SERVING / "service.py").read_text()
    assert found["python"]["lock_packages"] is False
    assert (SERVING / found["python"]["requirements_txt"]).exists()
    for pattern in found["include"]:
        assert (SERVING / pattern.partition("/*")[0]).exists(), pattern


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with a bundle and deploykit's wheel in it."""
    copy = tmp_path / "serving"
    shutil.copytree(SERVING, copy, ignore=shutil.ignore_patterns("*.whl", "__pycache__"))
    for bundle in (copy / "bundles").glob("*/"):
        shutil.rmtree(bundle)
    make_bundle(copy / "bundles")
    (copy / "bundles/source.onnx").unlink()
    with zipfile.ZipFile(copy / "wheels/deploykit-0-py3-none-any.whl", "w") as wheel:
        for file in (ROOT / "deploykit").rglob("*"):
            if "__pycache__" not in file.parts:
                wheel.write(file, file.relative_to(ROOT))
    return copy


def build(project: Path, home: Path) -> subprocess.CompletedProcess[str]:
    nowhere = "http://127.0.0.1:9"
    return subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--output", "tag"],
        cwd=project,
        env={
            **{key: value for key, value in os.environ.items() if key != "DEPLOYKIT_BUNDLES"},
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
            "PIP_NO_INDEX": "1",
            "BENTOML_HOME": str(home),
            "BENTOML_DO_NOT_TRACK": "True",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_bento_is_built_without_network_and_holds_what_it_serves(
    project: Path, tmp_path: Path
) -> None:
    done = build(project, tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    (source,) = (tmp_path / "home/bentos").glob("deploykit/*/src")
    held = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    assert {"service.py", "bundles/tiny/manifest.json", "bundles/tiny/model.onnx"} <= held
    assert "wheels/deploykit-0-py3-none-any.whl" in held


@pytest.mark.slow
def test_bento_without_a_bundle_is_refused(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / "bundles/tiny")
    done = build(project, tmp_path / "home")
    assert done.returncode != 0
    assert "DEPLOYKIT_BUNDLES: expected paths of bundles" in done.stdout + done.stderr


@pytest.mark.slow
def test_service_runs_from_the_wheel_where_deploykit_is_not_installed(project: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        f"sys.path += {[sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]!r}\n"
        "assert importlib.util.find_spec('deploykit') is None\n"
        "from service import service\n"
        "from deploykit.server.pages import page\n"
        "print(service.name, sys.modules['deploykit'].__file__, len(page('/')[0]) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=project,
        env={**os.environ, "PYTHONPATH": "", "BENTOML_HOME": str(project / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, file, has_page = done.stdout.split()
    assert (name, has_page) == ("deploykit", "True")
    assert ".whl/" in file
