"""What a measurement was taken on: the machine and the versions."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from deploykit.artifacts import JsonDict
from deploykit.runtime import cpu_flags

# These decide which kernels ONNX Runtime takes for integers and for half precision.
X86_FEATURES = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve")
# Distributions that provide a package, the first that is installed counts.
PACKAGES = {
    "deploykit": ("deploykit",),
    "torch": ("torch",),
    "torchao": ("torchao",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "numpy": ("numpy",),
}


def environment() -> JsonDict:
    """Describe this machine and the installed versions, without importing what it names.

    Returns:
        ``{"cpu", "features", "cores", "physical_cores", "memory_bytes", "os", "machine",
        "python", "versions"}``; what cannot be found out is None. ``cores`` counts those that
        this process may use.
    """
    return {
        "cpu": cpu_name(),
        "features": [flag for flag in X86_FEATURES + ARM_FEATURES if flag in cpu_flags()],
        "cores": _usable_cores(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}".strip(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: installed_version(*names) for name, names in PACKAGES.items()},
    }


def cache_folder() -> Path:
    """Return where measurements of this machine are kept: ``DEPLOYKIT_CACHE``, or the user's."""
    if chosen := os.environ.get("DEPLOYKIT_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "deploykit"


def cpu_name() -> str | None:
    """Return the CPU's model name as its maker writes it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name":
                return value.strip()
    return platform.processor() or None


def _usable_cores() -> int | None:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def installed_version(*names: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
