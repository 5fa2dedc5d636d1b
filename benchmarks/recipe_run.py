"""A run of a recipe that a benchmark measures: made now, or finished before."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET_BROKEN = 4
DEPLOYKIT = str(Path(sys.executable).with_name("deploykit"))


def read_options(description: str) -> argparse.Namespace:
    """Read ``--run`` and ``--trial``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run of the recipe")
    parser.add_argument("--trial", action="store_true", help="few samples; keeps no table")
    return parser.parse_args()


def finished_run(recipe: str, options: argparse.Namespace, folder: Path) -> Path:
    """Return the run that ``--run`` names, or make one in ``folder``."""
    if options.run is not None:
        return Path(options.run)
    path = folder / "run"
    done = subprocess.run([DEPLOYKIT, "compress", recipe, "--out", path], cwd=ROOT, check=False)
    if done.returncode not in (0, BUDGET_BROKEN):  # which the figures are to show
        raise SystemExit(done.returncode)
    return path
