"""The rules of the house, read from its files."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deploykit
from deploykit.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deploykit"
TRAINING = {"distill", "surgery", "prune", "sparsify", "cluster", "quantize"}
STAGES = {"train", *TRAINING, "exporter", "measure", "verify", "bundle", "report"}
HEAVY = (
    "torch",
    "lightning_fabric",
    "bentoml",
    "onnxruntime",
    "onnx",
    "sklearn",
    "pyarrow",
    "kornia",
)
README = (ROOT / "README.md").read_text()


def imported(source: str) -> Iterator[str]:
    """Yield the full name of everything that is imported, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# imports


def foreign_imports(source: str) -> set[str]:
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime", "PIL"}
    return {name for name in imported(source) if name.split(".")[0] not in allowed}


def test_runner_imports_what_a_bundle_needs_and_nothing_else() -> None:
    assert foreign_imports((PACKAGE / "runtime.py").read_text()) == set()
    assert foreign_imports("def f():\n    from deploykit import errors") == {"deploykit.errors"}


def stage_imports(stage: str, source: str) -> set[str]:
    """Return the other stages that a file of ``stage`` imports without leave."""
    found = {name.split(".")[1] for name in imported(source) if name.startswith("deploykit.")}
    leave = {"train"} if stage in TRAINING else set()
    return (found & STAGES) - {stage} - leave


def test_stages_do_not_import_each_other() -> None:
    for file in PACKAGE.rglob("*.py"):
        stage = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if stage in STAGES:
            assert stage_imports(stage, file.read_text()) == set(), file
    assert stage_imports("exporter", "from deploykit.train import fit") == {"train"}
    assert stage_imports("measure", "def f():\n    from deploykit import verify") == {"verify"}
    assert stage_imports("prune", "from deploykit.train import fit") == set()


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["deploykit", "deploykit.cli", "deploykit.recipe"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}").isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["bundle", "runtime", "doctor", "publish"])
def test_what_deploys_loads_without_torch(module: str) -> None:
    assert loaded_by(f"import deploykit.{module}").isdisjoint({"torch", "lightning_fabric"})


def test_heavy_imports_would_be_seen() -> None:
    assert "onnxruntime" in loaded_by("import onnxruntime")


# pickles


def unsafe_loads(source: str) -> list[str]:
    """Return what in a file could read or write a pickle."""
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = [name for name in imported(source) if name.split(".")[0] in banned]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            if keywords.get("allow_pickle", "False") != "False":
                found.append(called)
            if called == "torch.load" and keywords.get("weights_only") != "True":
                found.append(called)
    return found


def test_nothing_reads_or_writes_pickles() -> None:
    for folder in ("deploykit", "benchmarks", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            assert unsafe_loads(file.read_text()) == [], file


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "numpy.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
    ],
)
def test_planted_pickle_is_seen(planted: str) -> None:
    assert unsafe_loads(planted)


# recipes and documents


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_parses_and_says_how_it_is_run(path: Path) -> None:
    load_recipe(path)
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith(f"# Run:    deploykit compress recipes/{path.name} --out ")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


def code_of(document: str) -> list[str]:
    """Return the lines of code blocks and the spans of inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(
        r"`([^`\n]+)`", document
    )


def test_python_names_of_the_readme_exist() -> None:
    names = set(re.findall(r"\bdeploykit\.([a-z_]+)\(", README))
    assert names
    assert all(hasattr(deploykit, name) for name in names), names


def test_no_module_bears_the_name_of_a_function_of_the_package() -> None:
    """Importing ``deploykit.x`` puts the module in the place of the function ``x``."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert modules.isdisjoint(set(deploykit.__all__) - {"__version__"})


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+|bench-%):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"):
        for line in code_of((ROOT / name).read_text()):
            words = line.split("  ")[0].split("#")[0].split()
            if words[:1] == ["make"]:
                used = {
                    word for word in words[1:] if "=" not in word and not word.startswith("bench-")
                }
                assert used <= targets, f"{name}: {line}"


# installation


def project() -> dict[str, object]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def test_constraints_pin_every_dependency_at_a_version_that_is_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [version for version in pinned.values() if "+" in version]
    by_name = {canonicalize_name(name): version for name, version in pinned.items()}
    table = project()
    extras = table["optional-dependencies"]
    groups = [table["dependencies"], *(extras[name] for name in ("dev", "serve", "sign"))]  # type: ignore[index]
    declared = [one for group in groups for one in group]  # type: ignore[attr-defined]
    for requirement in map(Requirement, declared):
        if requirement.name == "deploykit":  # an extra that brings another
            assert requirement.extras <= set(extras)  # type: ignore[call-overload]
            continue
        assert by_name[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_package_says_that_it_is_typed_and_carries_its_licence() -> None:
    assert (PACKAGE / "py.typed").exists()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )


def test_make_installs_once(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    assert "pip install" in make("-n", "test", f"VENV={venv}").stdout
    venv.mkdir()
    (venv / ".installed").touch()
    assert "pip install" not in make("-n", "test", f"VENV={venv}").stdout


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    done = make("test", f"VENV={tmp_path / 'venv'}", "PYTHON=")
    assert done.returncode != 0
    assert "deploykit needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


FAKE_MAKE = """#!/bin/sh
for target; do :; done
echo "make $target"
if [ "$target" = test ]; then echo "=== 3 passed in 1.20s ==="; echo "make: leaving"; fi
test "$target" != "$BROKEN"
"""


def continuous_integration(tmp_path: Path, broken: str) -> subprocess.CompletedProcess[str]:
    fake = tmp_path / "make"
    fake.write_text(FAKE_MAKE)
    fake.chmod(0o755)
    environment = {**os.environ, "BROKEN": broken, "TMPDIR": str(tmp_path)}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    return subprocess.run(
        [ROOT / ".ci/run"], capture_output=True, text=True, check=False, env=environment
    )


def test_ci_ends_with_the_closing_line_of_pytest_and_leaves_nothing(tmp_path: Path) -> None:
    done = continuous_integration(tmp_path, broken="")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "=== 3 passed in 1.20s ==="
    assert [path.name for path in tmp_path.iterdir()] == ["make"]


@pytest.mark.parametrize("step", ["lint", "types", "demo", "test"])
def test_ci_fails_when_a_step_fails(tmp_path: Path, step: str) -> None:
    done = continuous_integration(tmp_path, broken=step)
    assert done.returncode != 0
    assert f"failed: {step}" in done.stderr
