"""What this machine offers: CPU, target, execution providers, versions, GPU."""

import subprocess
from collections.abc import Mapping
from typing import Any

from deploykit.artifacts import JsonDict
from deploykit.environment import environment, installed_version
from deploykit.runtime import detect_cpu
from deploykit.targets import TARGETS, why_not_here

# Beside those that every measurement names; the last two are optional.
PACKAGES = ("pillow", "onnxscript", "lightning-fabric", "kornia", "safetensors")
OPTIONAL = ("torchvision", "timm")


def doctor() -> JsonDict:
    """Examine this machine.

    Returns:
        What `deploykit.environment.environment` tells, with the versions of more packages, and
        ``target`` (this machine's CPU), ``targets`` (each with None where this machine runs it
        natively, else what is missing), ``providers``, ``gpus``; what cannot be found out is
        ``None`` or empty.
    """
    machine = environment()
    others = {package: installed_version(package) for package in PACKAGES + OPTIONAL}
    return {
        **machine,
        "versions": {**machine["versions"], **others},
        "target": detect_cpu(),
        "targets": {name: why_not_here(target) for name, target in TARGETS.items()},
        "providers": _providers(),
        "gpus": _gpus(),
    }


def render(found: Mapping[str, Any]) -> str:
    """Write what ``doctor`` found for a reader."""
    memory = found["memory_bytes"]
    rows = {
        "system": f"{found['os']} {found['machine']}",
        "cpu": found["cpu"] or "unknown",
        "cores": found["cores"],
        "memory": "unknown" if memory is None else f"{memory / 2**30:.1f} GiB",
        "features": " ".join(found["features"]) or "none known",
        "target": found["target"],
        **{f"target {name}": why or "runs natively" for name, why in found["targets"].items()},
        "providers": ", ".join(found["providers"]) or "none: pip install onnxruntime",
        "gpus": "; ".join(found["gpus"]) or "none found",
        "python": found["python"],
        **{package: version for package, version in found["versions"].items() if version},
    }
    missing = [package for package, version in found["versions"].items() if not version]
    rows["not installed"] = ", ".join(missing) or "nothing"
    width = max(len(key) for key in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


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
