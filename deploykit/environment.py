"""What a measurement was taken on: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from deploykit.artifacts import JsonDict
from deploykit.runtime import cpu_features, cpu_name, usable_cores

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
        "features": cpu_features(),
        "cores": usable_cores(),
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


def installed_version(*names: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
