"""A run of a recipe that a benchmark measures: made now, or finished before."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from deploykit.recipe import load_recipe
from deploykit.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
BUDGET_BROKEN = 4
DEPLOYKIT = str(Path(sys.executable).with_name("deploykit"))
TRIAL = (
    "data.limit=500",
    "train.epochs=2",
    "prune.epochs=1",
    "quantize.epochs=1",
    "verify.min_agreement=0.5",
    "budget=null",
)


def read_options(description: str) -> argparse.Namespace:
    """Read ``--run`` and ``--trial``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run of the recipe")
    parser.add_argument("--trial", action="store_true", help="few samples; keeps no table")
    return parser.parse_args()


def finished_run(recipe: str, options: argparse.Namespace, scratch: Path) -> Path:
    """Return the run that ``--run`` names, or make one.

    It is kept in ``runs``: an interrupted one goes on, and a finished one is made anew. A trial
    makes a small one in ``scratch``.
    """
    if options.run is not None:
        return _same(Path(options.run), recipe)
    path = scratch / "run" if options.trial else ROOT / "runs" / Path(recipe).stem
    how = "--force" if (path / "report.json").exists() else "--resume"
    changes = [word for change in TRIAL for word in ("--set", change)] if options.trial else []
    command = [DEPLOYKIT, "compress", recipe, "--out", path, how, *changes]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode not in (0, BUDGET_BROKEN):  # which the figures are to show
        raise SystemExit(done.returncode)
    if not options.trial:
        print(f"the run is kept: --run {path} measures it again", flush=True)
    return path


def _same(path: Path, recipe: str) -> Path:
    """Return ``path`` if its run is one of ``recipe``, wherever data and weights lie."""
    wanted, found = (
        _without_folders(one.model_dump(mode="json"))
        for one in (load_recipe(ROOT / recipe), RunFolder(path).recipe())
    )
    other = [key for key in wanted if wanted[key] != found[key]]
    if other:
        raise SystemExit(
            f"--run {path}: expected a run of {recipe}, got another {', '.join(other)}; "
            "leave --run out to make one"
        )
    if not (path / "report.json").exists():
        raise SystemExit(
            f"--run {path}: expected a finished run, got one without report.json; finish it with "
            f"deploykit compress {recipe} --out {path} --resume"
        )
    return path


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) else value
