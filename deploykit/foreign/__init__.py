"""Models that came from elsewhere as ONNX files: looked at from a distance, proven, bundled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.foreign.export import export_foreign

__all__ = ["export_foreign"]


def __getattr__(name: str) -> Any:
    """Load what bundles on first use: the process of the first look has no use for it."""
    if name in __all__:
        from deploykit.foreign import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
