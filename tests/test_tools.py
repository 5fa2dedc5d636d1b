"""ONNX Runtime's tools load in any order, and leave the module path as it was."""

import subprocess
import sys
from itertools import permutations

import pytest

MODULES = (
    "onnxruntime.transformers.float16",
    "onnxruntime.quantization",
    "onnxruntime.tools.ort_format_model",
)
PROGRAM = (
    "import sys; from deploykit.tools import load_tool; before = list(sys.path); "
    "[load_tool(one) for one in sys.argv[1:]]; sys.exit(sys.path != before)"
)


@pytest.mark.parametrize("order", [*permutations(MODULES, 2)], ids=" then ".join)
def test_tools_load_in_any_order_and_leave_the_module_path(order):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
