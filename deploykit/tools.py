"""ONNX Runtime's own tools: converter, quantizer, reader of its format.

Their modules import each other by bare names, from a folder that their package puts on the module
path as it is imported first. The path is left as it was, so later imports need that folder anew.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load_tool(module: str) -> Any:
    """Import a module of ONNX Runtime's tools, whatever was imported of them before.

    Args:
        module: its name, as ``onnxruntime.transformers.float16``.
    """
    import onnxruntime

    path = list(sys.path)
    sys.path.append(str(Path(onnxruntime.__file__).with_name("transformers")))
    try:
        return importlib.import_module(module)
    finally:
        sys.path[:] = path
