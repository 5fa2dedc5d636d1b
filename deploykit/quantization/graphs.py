"""The graphs that a float module is turned into: for training, for calibration, for shipping.

All three are traced from the same float module and quantized at the same places, so what one
learns another can use: weights by their own names, ranges by the name of the producing module.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

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
        Parameters,
        calibration_quantizer,
        integer_quantizer,
        training_quantizer,
    )

from deploykit.errors import CompressionError, ModelError
from deploykit.quantization.canonical import canonicalize
from deploykit.quantization.rules import quantized_tensors
from deploykit.targets import Target

aten = torch.ops.aten
DROPOUTS = frozenset({aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default})


def trace(module: nn.Module, example: Tensor) -> GraphModule:
    """Export ``module`` in evaluation mode with a batch that stays dynamic.

    Args:
        module: takes one tensor like ``example``.
        example: ``(N, ...)`` with N >= 2; a batch of one would be taken for a constant.

    Raises:
        ModelError: the module cannot be exported, with the reason.
    """
    was_training = module.training
    module.eval()
    try:
        with quiet():
            program = torch.export.export(
                module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
            )
            return canonicalize(program.module(check_guards=False))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model: expected a module that torch.export can trace, got {reason}; avoid control "
            "flow that depends on values and shapes fixed to one batch size"
        ) from error
    finally:
        module.train(was_training)


def training_graph(
    module: nn.Module, example: Tensor, target: Target, exact: frozenset[str]
) -> GraphModule:
    """Return a graph that trains as if its weights and activations were integers.

    BatchNorm takes part as in training of the float module: its scale is folded into the
    weight before that is quantized (Jacob et al. 2018, section 3.2).
    """
    graph = trace(module, example)
    norms = {_norm_name(node): node.args[6:8] for node in _norms(graph)}
    with quiet():
        prepared: GraphModule = prepare_qat_pt2e(graph, training_quantizer(target, exact))
    _restore_norm_constants(prepared, norms)
    return prepared


def calibration_graph(
    module: nn.Module, example: Tensor, target: Target, exact: frozenset[str]
) -> GraphModule:
    """Return a float graph that watches the ranges of what will be quantized."""
    with quiet():
        prepared: GraphModule = prepare_pt2e(
            trace(module, example), calibration_quantizer(target, exact)
        )
    return prepared


def integer_graph(
    module: nn.Module,
    example: Tensor,
    target: Target,
    parameters: Mapping[str, Parameters],
    exact: frozenset[str],
) -> GraphModule:
    """Return the graph that ships: integer weights, quantize/dequantize pairs, BatchNorm folded.

    Raises:
        CompressionError: a tensor has no parameters, or parameters have no tensor: they come
            from another model or another torch.
    """
    graph = trace(module, example)
    wanted = {tensor.key for tensor in quantized_tensors(graph.graph)} - exact
    if wanted != set(parameters):
        missing, extra = sorted(wanted - set(parameters)), sorted(set(parameters) - wanted)
        raise CompressionError(
            "structure.quantization: expected parameters for every quantized tensor, "
            f"got {missing or 'none'} missing and {extra or 'none'} unknown under torch "
            f"{torch.__version__}; rebuild with the torch version written in structure.json",
            layer=(missing or extra)[0],
        )
    with quiet(), torch.no_grad():
        prepared = prepare_pt2e(graph, integer_quantizer(target, parameters, exact))
        prepared(example)  # the weights' observers look once
        converted: GraphModule = convert_pt2e(prepared, fold_quantize=True)
    return converted


def read_parameters(prepared: GraphModule) -> dict[str, Parameters]:
    """Return scale and zero point of every activation that ``prepared`` has watched, by key."""
    parameters = {}
    for module in _ranges(prepared):
        scale, zero_point = module.calculate_qparams()  # type: ignore[operator]
        parameters[str(module.tensor_key)] = (float(scale.item()), int(zero_point.item()))
    return dict(sorted(parameters.items()))


def set_graph_mode(graph: nn.Module, training: bool, frozen: frozenset[str]) -> None:
    """Put BatchNorm, dropout and the ranges of an exported graph into the right mode.

    The mode of an exported graph is an argument of its nodes; ``train()`` and ``eval()`` do not
    reach it. ``frozen`` names modules whose BatchNorm stands still while others train. Ranges
    are learned from training samples only.
    """
    assert isinstance(graph, GraphModule)
    for node in graph.graph.nodes:
        if node.target is aten.batch_norm.default:
            node.update_arg(5, training and _norm_name(node) not in frozen)
        elif node.target in DROPOUTS:
            node.update_arg(2, training)
    graph.recompile()
    for module in _ranges(graph):
        module.enable_observer(training)  # type: ignore[operator]


def freeze_statistics(graph: nn.Module) -> None:
    """Let BatchNorm statistics and ranges stand still until the next `set_graph_mode`."""
    assert isinstance(graph, GraphModule)
    for norm in _norms(graph):
        norm.update_arg(5, False)
    graph.recompile()
    for module in _ranges(graph):
        module.disable_observer()  # type: ignore[operator]


def _ranges(graph: GraphModule) -> Iterator[nn.Module]:
    return (module for module in graph.modules() if hasattr(module, "tensor_key"))


def _norms(graph: GraphModule) -> Iterator[Node]:
    return (node for node in graph.graph.nodes if node.target is aten.batch_norm.default)


def _norm_name(norm: Node) -> str:
    mean = norm.args[3]
    assert isinstance(mean, Node)
    return str(mean.target).rpartition(".")[0]


def _restore_norm_constants(graph: GraphModule, norms: Mapping[str, tuple[Any, ...]]) -> None:
    """Give every BatchNorm its own momentum and epsilon back.

    torchao's fusion of convolution and BatchNorm writes the defaults into every one:
    https://github.com/pytorch/ao (qat_utils, "TODO: allow setting eps").
    """
    for node in _norms(graph):
        momentum, epsilon = norms[_norm_name(node)]
        node.update_arg(6, momentum)
        node.update_arg(7, epsilon)
        variance = node.args[4]
        assert isinstance(variance, Node)
        for user in variance.users:
            if user.target is aten.add.Tensor:
                user.update_arg(1, epsilon)
    graph.recompile()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings and notes about themselves from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torchao", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
