"""Extra files for builds of ONNX Runtime that know few operators, as mobile apps carry them.

``model.ort`` is the model in ONNX Runtime's own format, optimized already: a minimal build opens
no ONNX files. ``required_operators.config`` names the operators that such a build has to have
(``--include_ops_by_config`` of ONNX Runtime's build script).
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime

from deploykit import runtime
from deploykit.errors import ExportError, VerificationError, first_line
from deploykit.tools import load_tool

TOOL = "onnxruntime.tools.ort_format_model"
MODEL, OPERATORS = "mobile/model.ort", "mobile/required_operators.config"
# Its blocks of channels are those of the CPU that writes the file.
FIXED_TO_THIS_CPU = ["NchwcTransformer"]
ALIGNMENT = 8  # of what ONNX Runtime writes
TABLES = (
    *("InferenceSession", "KernelTypeStrResolver", "OpIdKernelTypeStrArgsEntry"),
    *("KernelTypeStrArgsEntry", "ArgTypeAndIndex"),
)


def mobile_files(manifest: Mapping[str, Any], contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the extra files of a bundle for mobile builds; equal models give equal bytes.

    Args:
        manifest: of the bundle; its ``tolerance`` counts.
        contents: the bundle's other files: the model, and the golden samples that prove it.

    Returns:
        Bytes by their name in the bundle.

    Raises:
        ExportError: ONNX Runtime cannot write it in its own format.
        VerificationError: what was written does not answer the golden samples as the model does.
    """
    with TemporaryDirectory(prefix="deploykit-") as folder:
        path = Path(folder) / "model.ort"
        _convert(contents[runtime.MODEL], path)
        files = {MODEL: in_order(path.read_bytes()), OPERATORS: _operators(path)}
    try:
        runtime.check_golden(manifest, contents, runtime.open_session(files[MODEL]))
    except runtime.RunnerError as error:
        raise VerificationError(f"{MODEL}: {error}; leave --mobile out") from error
    return files


def _convert(model: bytes, path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent / "none")
    )
    try:
        onnxruntime.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=FIXED_TO_THIS_CPU,
        )
    except Exception as error:  # ONNX Runtime has its own types, in C
        raise ExportError(
            f"{MODEL}: ONNX Runtime cannot write it: {first_line(error)}; leave --mobile out"
        ) from error


def _operators(path: Path) -> bytes:
    """Return the list of operators, without the place of the model that it was made from."""
    tool = load_tool(TOOL)
    listed = path.with_suffix(".config")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it tells where it writes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
            tool.create_config_from_models([path], listed, enable_type_reduction=False)
    finally:
        logging.disable(before)
    lines = [line for line in listed.read_text().splitlines() if not line.startswith("#")]
    return "\n".join(["# what model.ort needs: domain;opset;operators", *lines, ""]).encode()


def in_order(data: bytes) -> bytes:
    """Return a file of ONNX Runtime's format with its table of kernel types in order.

    ONNX Runtime writes that table, the last one and so in front of all others, in the order of a
    hash map that another process has otherwise. All behind it stays as it stands: places in a
    FlatBuffer count from its end (https://flatbuffers.dev/internals).
    """
    load_tool(TOOL)
    flatbuffers = importlib.import_module("flatbuffers")
    fbs = {name: importlib.import_module(f"ort_flatbuffers_py.fbs.{name}") for name in TABLES}
    root = fbs["InferenceSession"].InferenceSession.GetRootAs(data, 0)
    model, resolver = root.Model()._tab.Pos, root.KernelTypeStrResolver()
    version = root.OrtVersion()
    builder = flatbuffers.Builder(0)
    layout = model - int.from_bytes(data[model : model + 4], "little", signed=True)
    kept = data[min(model, layout) :]
    builder.Bytes, builder.head, builder.minalign = bytearray(kept), 0, ALIGNMENT
    kernels = [resolver.OpKernelTypeStrArgs(i) for i in range(resolver.OpKernelTypeStrArgsLength())]
    entries = [_kernel(builder, fbs, one) for one in sorted(kernels, key=lambda one: one.OpId())]
    table = fbs["KernelTypeStrResolver"]
    table.StartOpKernelTypeStrArgsVector(builder, len(entries))
    listed = _vector(builder, entries)
    table.Start(builder)
    table.AddOpKernelTypeStrArgs(builder, listed)
    ordered, told = table.End(builder), builder.CreateString(version)
    session = fbs["InferenceSession"]
    session.Start(builder)
    session.AddOrtVersion(builder, told)
    session.AddModel(builder, len(data) - model)
    session.AddKernelTypeStrResolver(builder, ordered)
    builder.Finish(session.End(builder), file_identifier=data[4:8])
    return bytes(builder.Output())


def _kernel(builder: Any, fbs: Mapping[str, Any], entry: Any) -> int:
    """Write which inputs and outputs of an operator have which of its types."""
    types = [entry.KernelTypeStrArgs(i) for i in range(entry.KernelTypeStrArgsLength())]
    written = [
        _type(builder, fbs, one) for one in sorted(types, key=lambda one: one.KernelTypeStr())
    ]
    table = fbs["OpIdKernelTypeStrArgsEntry"]
    table.StartKernelTypeStrArgsVector(builder, len(written))
    listed = _vector(builder, written)
    name = builder.CreateString(entry.OpId())
    table.Start(builder)
    table.AddOpId(builder, name)
    table.AddKernelTypeStrArgs(builder, listed)
    return int(table.End(builder))


def _type(builder: Any, fbs: Mapping[str, Any], entry: Any) -> int:
    places, written = fbs["ArgTypeAndIndex"], []
    for one in (entry.Args(i) for i in range(entry.ArgsLength())):
        places.Start(builder)
        places.AddArgType(builder, one.ArgType())
        places.AddIndex(builder, one.Index())
        written.append(int(places.End(builder)))
    table = fbs["KernelTypeStrArgsEntry"]
    table.StartArgsVector(builder, len(written))
    listed = _vector(builder, written)
    name = builder.CreateString(entry.KernelTypeStr())
    table.Start(builder)
    table.AddKernelTypeStr(builder, name)
    table.AddArgs(builder, listed)
    return int(table.End(builder))


def _vector(builder: Any, places: Sequence[int]) -> int:
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    return int(builder.EndVector())
