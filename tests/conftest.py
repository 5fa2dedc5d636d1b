"""What tests of the pipeline and the commands share."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from deploykit.cli import main

settings.register_profile("house", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("house")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let a test and its fixtures draw the same numbers whichever test was before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep measurements of these tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOYKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def deploykit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process."""
    monkeypatch.setenv("DEPLOYKIT_DEBUG", "")  # --debug sets it for its own process
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["deploykit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        captured = capsys.readouterr()
        return Outcome(code if isinstance(code, int) else 1, captured.out, captured.err)

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure latencies in no time."""
    from tiny_run import measure_quickly

    measure_quickly(monkeypatch)


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in whose modules are of common names; each that is run leaves a mark."""
    folder, found = tmp_path / "modules", tmp_path / "marks"
    folder.mkdir()
    found.mkdir()
    for name in ("json", "onnx", "numpy", "resource", "asyncio"):
        (folder / f"{name}.py").write_text(f"open({str(found / name)!r}, 'w')")
    monkeypatch.chdir(folder)
    return found


@pytest.fixture(scope="session")
def served_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for servers that no test alters."""
    from tiny_bundle import make_bundle

    return make_bundle(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator["object"]:
    """One run of all three stages that no test alters."""
    from tiny_run import RECIPE, TinyRun, measure_quickly, read_recipe, recording_dataset, snapshot

    from deploykit.job import run_recipe

    folder = tmp_path_factory.mktemp("tiny")
    recipe_file: Path = folder / "tiny.yaml"
    recipe_file.write_text(RECIPE)
    recipe = read_recipe(recipe_file)
    dataset, reads = recording_dataset(recipe)
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        run = run_recipe(recipe, folder / "run", dataset=dataset, commands=["deploykit compress"])
    before = snapshot(run.path)
    yield TinyRun(run.path, recipe_file, recipe, dataset, run.report, tuple(reads))
    assert snapshot(run.path) == before, "a test altered the shared run"
