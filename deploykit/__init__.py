"""deploykit: from a PyTorch model and data to a small, fast, proven model.

The names below load on first use, so that importing deploykit stays cheap.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it as it is imported

if TYPE_CHECKING:
    from deploykit.api import compress as compress
    from deploykit.api import export as export
    from deploykit.api import load_bundle as load_bundle
    from deploykit.server.start import serve as serve

__all__ = ["__version__", "compress", "export", "load_bundle", "serve"]

_HOMES = {
    **dict.fromkeys(("compress", "export", "load_bundle"), "deploykit.api"),
    "serve": "deploykit.server.start",  # a server has no use for torch, which the api loads
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'deploykit' has no attribute {name!r}")
