"""Export and serve on an NVIDIA GPU: `make gpu-check`; without one it says so and is done.

Runs the tests that need a GPU, then prints what one server answers on CUDA and on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from calls import binary_call
from served_models import KEPT, read_options, read_served, resnet20_bundle
from server_run import QUIET, serving
from table import ROOT, Figure, publish

from deploykit import export
from deploykit.doctor import doctor
from deploykit.load import closed_loop, run_load
from deploykit.targets import TARGETS, why_not_here

CONNECTIONS, SECONDS, TRIAL_S = 16, 10.0, 2.0
BATCHES = (1, 32)


def throughput(bundle: Path, flags: tuple[str, ...], seconds: float) -> dict[int, float]:
    """Return the images a second that a server answers, by the images of a request."""
    served = read_served(bundle, max(BATCHES))
    found = {}
    queue = ("--queue", str(2 * CONNECTIONS * max(BATCHES)))  # as much as may wait: none is refused
    with serving(bundle, flags=(*QUIET, *queue, *flags)) as server:
        for size in BATCHES:
            request = binary_call(served, served.samples[:size]).request
            run_load(closed_loop(server.url, request, CONNECTIONS, seconds / 5))
            load = run_load(closed_loop(server.url, request, CONNECTIONS, seconds))
            if set(load.statuses) != {200} or load.errors:
                raise RuntimeError(f"{bundle}: expected 200s, got {load.statuses} {load.errors}")
            found[size] = size * load.goodput
    return found


def main() -> int:
    """Check, where there is something to check."""
    options = read_options(__doc__.splitlines()[0])
    gpus, missing = doctor()["gpus"], why_not_here(TARGETS["cuda"])
    if not gpus:
        print("gpu-check: skipped: there is no NVIDIA GPU here")
        return 0
    if missing:
        print(f"gpu-check: {'; '.join(gpus)}, but {missing}; pip install 'deploykit[gpu]'")
        return 1
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "tests"]
    failed = subprocess.run(tests, cwd=ROOT, check=False).returncode
    seconds = TRIAL_S if options.trial else SECONDS
    on_cpu = throughput(resnet20_bundle(), (), seconds)
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        bundle = export(KEPT / "run", out=Path(folder) / "cuda", target="cuda")
        on_gpu = throughput(bundle, ("--require-gpu",), seconds)
    figures = [Figure("tests on the GPU that failed", failed, "{:d}", at_most=0)]
    for size in BATCHES:
        for where, found in (("CUDA", on_gpu), ("the CPU", on_cpu)):
            name = f"images a second on {where}, {size} a request"
            figures.append(Figure(name, found[size], "{:.0f}"))
    return publish(
        "gpu_check",
        figures,
        about=f"ResNet-20 on {'; '.join(gpus)} (fp16) and on the CPU (int8): one worker, "
        f"{CONNECTIONS} connections in a closed loop, `/v2` binary.",
        command="make gpu-check",
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
