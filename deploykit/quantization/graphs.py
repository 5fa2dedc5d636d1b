"""The graphs that a float module is turned into: for training, for calibration, for shipping.

All three are traced from the same float module and quantized at the same places, so what one
learns another can use: weights by their own names, ranges by the name of the producing module.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
    # torchao reports CUDA extensions that it cannot load: no concern of a user's.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization.pt2e.quantize_pt2e import (
        convert_pt2e,
        prepare_pt2e,
        prepare_qat_pt2e,
    )

    from deploykit.quantization.quantizer import (
        Exact,
        calibration_quantizer,
        integer_quantizer,
        training_quantizer,
    )

from deploykit.errors import CompressionError, ModelError, first_line
from deploykit.quantization.canonical import canonicalize, decompose
from deploykit.quantization.norms import (
    batch_norms,
    divide_weights,
    lift_zeros,
    norm_constants,
    norm_name,
    restore_constants,
)
from deploykit.quantization.operators import DROPOUTS
from deploykit.quantization.rules import Parameters, align, quantized_tensors
from deploykit.quantization.spellings import spell_integers
from deploykit.targets import Target

aten = torch.ops.aten
STILL = "statistics that stand still"  # in the meta of a training graph
TALKERS = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx", "torchao")


def trace(module: nn.Module, example: Tensor) -> GraphModule:
    """Export a copy of ``module`` in evaluation mode with a batch that stays dynamic.

    Args:
        module: takes one tensor like ``example``; shares nothing with the graph.
        example: ``(N, ...)`` with N >= 2; a batch of one would be taken for a constant.

    Raises:
        ModelError: the module cannot be exported, with the reason.
    """
    try:
        with quiet():
            # A copy: an exported graph trains the very tensors that it was exported from.
            program = torch.export.export(
                copy.deepcopy(module).eval(),
                (example,),
                dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
            )
            return canonicalize(program.module(check_guards=False))
    except Exception as error:
        raise ModelError(
            f"model: expected a module that torch.export can trace, got {first_line(error)}; avoid "
            "control flow that depends on values and shapes fixed to one batch size"
        ) from error


def training_graph(
    module: nn.Module,
    example: Tensor,
    target: Target,
    exact: Exact,
    keep_float: frozenset[str] = frozenset(),
) -> GraphModule:
    """Return a graph that trains as if its weights and activations were integers.

    BatchNorm takes part as in training of the float module: its scale is folded into the
    weight before that is quantized (Jacob et al. 2018, section 3.2).
    """
    graph = decompose(trace(module, example))
    lift_zeros(graph)
    norms = {norm_name(node): norm_constants(module, node) for node in batch_norms(graph)}
    with quiet():
        prepared: GraphModule = prepare_qat_pt2e(
            graph, training_quantizer(target, exact, keep_float)
        )
    restore_constants(prepared, norms)
    divide_weights(prepared)
    owners = {name: module.get_submodule(name) for name in norms}
    prepared.meta[STILL] = {name for name, one in owners.items() if not isinstance(one, _BatchNorm)}
    return prepared


def calibration_graph(
    module: nn.Module,
    example: Tensor,
    target: Target,
    exact: Exact,
    keep_float: frozenset[str] = frozenset(),
) -> GraphModule:
    """Return a float graph that watches the ranges of what will be quantized."""
    with quiet():
        prepared: GraphModule = prepare_pt2e(
            decompose(trace(module, example)), calibration_quantizer(target, exact, keep_float)
        )
    return prepared


def integer_graph(
    module: nn.Module,
    example: Tensor,
    target: Target,
    parameters: Mapping[str, Parameters],
    exact: Exact,
    keep_float: frozenset[str] = frozenset(),
) -> GraphModule:
    """Return the graph that ships: integer weights, quantize/dequantize pairs, BatchNorm folded.

    Raises:
        CompressionError: a tensor has no parameters, or parameters have no tensor: they come
            from another model or another torch.
    """
    prepared = rounding_graph(module, example, target, parameters, exact, keep_float, moved=True)
    with quiet(), torch.no_grad():
        converted: GraphModule = convert_pt2e(prepared, fold_quantize=True)
    # Other runtimes than ONNX Runtime's CPU kernels know arithmetic between pairs only.
    return spell_integers(converted) if target.activation_dtype == "uint8" else converted


def rounding_graph(
    module: nn.Module,
    example: Tensor,
    target: Target,
    parameters: Mapping[str, Parameters],
    exact: Exact,
    keep_float: frozenset[str],
    *,
    moved: bool,
) -> GraphModule:
    """Return a float graph with a module, which knows how to round, wherever integers round.

    Args:
        module: takes one tensor like ``example``.
        example: ``(N, ...)`` with N >= 2.
        target: decides the integer types.
        parameters: of every quantized tensor, by key.
        exact: parameters of tensors that are integers as they come.
        keep_float: names of modules whose layers stay in float.
        moved: whether values that were only moved are rounded again.

    Raises:
        CompressionError: as `integer_graph`.
    """
    graph = decompose(trace(module, example))
    tensors = quantized_tensors(graph.graph, keep_float)
    wanted = {tensor.key for tensor in tensors} - set(exact)
    if wanted != set(parameters):
        missing, extra = sorted(wanted - set(parameters)), sorted(set(parameters) - wanted)
        raise CompressionError(
            "structure.quantization: expected parameters for every quantized tensor, "
            f"got {missing or 'none'} missing and {extra or 'none'} unknown under torch "
            f"{torch.__version__}; rebuild with the torch version written in structure.json",
            layer=(missing or extra)[0],
        )
    with quiet(), torch.no_grad():
        quantizer = integer_quantizer(target, parameters, exact, keep_float, moved=moved)
        prepared: GraphModule = prepare_pt2e(graph, quantizer)
        prepared(example)  # the weights' observers look once
    return prepared


def read_parameters(prepared: GraphModule) -> dict[str, Parameters]:
    """Return scale and zero point of every activation that ``prepared`` has watched, by key.

    Raises:
        CompressionError: a value was not finite.
    """
    parameters = {}
    for module in _ranges(prepared):
        seen: Any = getattr(module, "activation_post_process", module)
        if not bool(torch.isfinite(seen.min_val) & torch.isfinite(seen.max_val)):
            raise CompressionError(
                f"quantize: expected finite values in {module.tensor_key}, got infinity or NaN, "
                "which no integers can hold; pad with a finite number, or lower the learning rate",
                layer=str(module.tensor_key).partition(":")[0],
            )
        scale, zero_point = module.calculate_qparams()  # type: ignore[operator]
        found = float(scale.item()), int(zero_point.item())
        if module.aligned and seen.dtype is torch.uint8:
            found = align(*found, seen.quant_min, seen.quant_max)
        parameters[str(module.tensor_key)] = found
    return dict(sorted(parameters.items()))


def set_graph_mode(graph: nn.Module, training: bool, frozen: frozenset[str]) -> None:
    """Put BatchNorm, dropout and the ranges of an exported graph into the right mode.

    The mode of an exported graph is an argument of its nodes; ``train()`` and ``eval()`` do not
    reach it. ``frozen`` names modules whose BatchNorm stands still while others train, as always
    does one that a module of the user's own calls. Ranges are learned from training samples only.
    """
    assert isinstance(graph, GraphModule)
    still = frozen.union(graph.meta.get(STILL, ()))
    _make_on(graph, next(graph.parameters()).device)
    for node in graph.graph.nodes:
        if node.target in DROPOUTS:
            node.update_arg(2, training)
    for norm in batch_norms(graph):
        norm.update_arg(5, training and norm_name(norm) not in still)
    graph.recompile()
    for module in _ranges(graph):
        module.enable_observer(training)  # type: ignore[operator]


def _make_on(graph: GraphModule, device: torch.device) -> None:
    """Let tensors that the graph makes be made on its device: an exported graph has its own."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", device)
        elif node.target is aten.to.device:
            node.update_arg(1, device)


def freeze_statistics(graph: nn.Module) -> None:
    """Let BatchNorm statistics and ranges stand still until the next `set_graph_mode`."""
    assert isinstance(graph, GraphModule)
    for norm in batch_norms(graph):
        norm.update_arg(5, False)
    graph.recompile()
    for module in _ranges(graph):
        module.disable_observer()  # type: ignore[operator]


def _ranges(graph: GraphModule) -> Iterator[nn.Module]:
    return (module for module in graph.modules() if hasattr(module, "tensor_key"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings and notes about themselves from the user."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in loggers]
    # What it cannot trace, torch.export prints as a graph on standard error.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
