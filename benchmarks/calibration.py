"""Peak memory of calibration at 500 and at 5,000 samples: `make bench-calibration`.

Each is measured in a process of its own, which writes the samples to the run's folder as
`compress` does, reads them back as a memory map and calibrates ResNet-20.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from table import Figure, publish

MIB = 2**20


def calibrate_once(count: int, folder: Path) -> dict[str, int]:
    """Calibrate with so many random images; return this process's peak memory, in bytes."""
    from example import SHAPE, resnet20_candidate

    from deploykit.quantize import calibrate
    from deploykit.run_folder import RunFolder
    from deploykit.targets import resolve_target

    candidate = resnet20_candidate()

    def load(rows: np.ndarray) -> np.ndarray:
        pixels = [np.random.default_rng(row).integers(0, 256, SHAPE, np.uint8) for row in rows]
        return np.stack(pixels)

    before = peak_bytes()
    samples = RunFolder(folder).save_calibration(load, np.arange(count))
    calibrate(candidate, samples, target=resolve_target("cpu"))
    return {"before": before, "peak": peak_bytes()}


def peak_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def measure(count: int) -> dict[str, int]:
    """Calibrate in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        command = [sys.executable, __file__, "--count", str(count), "--folder", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def main() -> int:
    """Compare a small and a large number of samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trial", action="store_true", help="few samples; keeps no table")
    parser.add_argument("--count", type=int, help="calibrate in this process, print its memory")
    parser.add_argument("--folder", type=Path, help="with --count: where the samples are kept")
    options = parser.parse_args()
    if options.count is not None:
        json.dump(calibrate_once(options.count, options.folder), sys.stdout)
        return 0
    few, many = (64, 640) if options.trial else (500, 5000)
    found = {count: measure(count) for count in (few, many)}
    figures = [
        Figure(f"peak memory, {count:,} samples", one["peak"] / MIB, "{:.0f} MiB")
        for count, one in found.items()
    ]
    growth = found[many]["peak"] / found[few]["peak"] - 1
    figures.append(Figure("growth", growth, "{:+.1%}", at_most=0.05))
    return publish(
        "calibration",
        figures,
        about="Calibration of ResNet-20 on 32 x 32 images, samples streamed through "
        "the run's calibration.npy; peak resident memory of a fresh process, libraries and "
        "mapped pages included.",
        command="make bench-calibration",
        details=[f"Before calibration: {found[few]['before'] / MIB:.0f} MiB."],
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
