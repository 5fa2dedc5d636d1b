"""What this machine offers: CPU, target, execution providers, versions, GPU."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from deploykit import __version__
from deploykit.artifacts import JsonDict
from deploykit.targets import cpu_flags, detect_cpu

# Features that decide how fast int8 and half precision are.
X86_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
ARM_FLAGS = ("asimd", "asimddp", "i8mm", "bf16", "sve")
RUNNING = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "onnx", "onnxscript")
TRAINING = ("torch", "torchao", "torch-pruning", "lightning-fabric", "kornia", "safetensors")
OPTIONAL = ("torchvision", "timm")


def doctor() -> JsonDict:
    """Examine this machine.

    Returns:
        ``cpu``, ``flags``, ``cores``, ``memory_bytes``, ``target``, ``providers``, ``gpus``,
        ``versions``, ``system``; what cannot be found out is ``None`` or empty.
    """
    return {
        "cpu": cpu_model(),
        "flags": [flag for flag in X86_FLAGS + ARM_FLAGS if flag in cpu_flags()],
        "cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
        "target": detect_cpu(),
        "providers": _providers(),
        "gpus": _gpus(),
        "versions": versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def render(found: Mapping[str, Any]) -> str:
    """Write what ``doctor`` found for a reader."""
    gibibytes = "unknown" if found["memory_bytes"] is None else found["memory_bytes"] / 2**30
    rows = {
        "system": found["system"],
        "cpu": found["cpu"] or "unknown",
        "cores": found["cores"],
        "memory": f"{gibibytes:.1f} GiB" if isinstance(gibibytes, float) else gibibytes,
        "features": " ".join(found["flags"]) or "none known",
        "target": found["target"],
        "providers": ", ".join(found["providers"]) or "none: pip install onnxruntime",
        "gpus": "; ".join(found["gpus"]) or "none found",
        **{package: version for package, version in found["versions"].items() if version},
    }
    missing = [package for package, version in found["versions"].items() if not version]
    rows["not installed"] = ", ".join(missing) or "nothing"
    width = max(len(key) for key in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def versions() -> dict[str, str | None]:
    """Return the versions of deploykit, Python and the packages in use, importing none."""
    found: dict[str, str | None] = {"deploykit": __version__, "python": platform.python_version()}
    for package in RUNNING + TRAINING + OPTIONAL:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cpu_model() -> str | None:
    """Return the CPU's name as its maker spells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or None


def usable_cores() -> int:
    """Return how many cores this process may use; containers often get fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _providers() -> list[str]:
    """Return the execution providers that the installed onnxruntime was built with."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _gpus() -> list[str]:
    """Return name, memory and driver of each NVIDIA GPU, as ``nvidia-smi`` tells."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
