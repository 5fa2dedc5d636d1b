"""Where a model will run, and so how it is quantized, rounded and executed."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deploykit.errors import UsageError


@dataclass(frozen=True)
class Target:
    """One deployment runtime.

    Attributes:
        name: the word of the recipe, the command line and the manifest.
        activation_dtype: integer type of quantized activations, ``uint8`` or ``int8``.
        weight_bits: width of quantized weights; 7 where 8 would overflow the kernels'
            16-bit sums (x86 without VNNI).
        channel_multiple: channels the kernels compute at once; narrower is not faster.
        providers: ONNX Runtime execution providers, best first.
    """

    name: str
    activation_dtype: str
    weight_bits: int
    channel_multiple: int
    providers: tuple[str, ...] = ("CPUExecutionProvider",)


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("cpu-x86-vnni", activation_dtype="uint8", weight_bits=8, channel_multiple=16),
        Target("cpu-x86-avx2", activation_dtype="uint8", weight_bits=7, channel_multiple=8),
        Target("cpu-arm64", activation_dtype="uint8", weight_bits=8, channel_multiple=8),
    )
}


@cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags of this machine's CPU, in lower case; empty where unknown."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in {"flags", "features"}:
                return frozenset(value.lower().split())
    return frozenset()


def detect_cpu() -> str:
    """Name the CPU target of this machine."""
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return "cpu-arm64"
    return "cpu-x86-vnni" if cpu_flags() & {"avx512_vnni", "avx_vnni"} else "cpu-x86-avx2"


def resolve_target(name: str) -> Target:
    """Return the target called ``name``; ``cpu`` is this machine's own CPU.

    Raises:
        UsageError: there is no such target.
    """
    known = {**TARGETS, "cpu": TARGETS[detect_cpu()]}
    if name not in known:
        raise UsageError(f"target: expected one of {', '.join(sorted(known))}, got {name!r}")
    return known[name]
