"""Rules of layers: convolutions, products of matrices, normalizations, attention."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from deploykit.prune.trace import Arguments, Axes, Labels, Trace, plain


def convolution(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Inputs meet the weight's inputs; the outputs are the weight's."""
    batch, inputs, *space = trace.axes(a["input"])
    for axis in [batch, *space]:
        trace.fix(axis, f"{trace.where()}: a convolution moves along it")
    first, second = trace.axes(a["weight"])[:2]
    if a["transposed"]:
        outputs = _transposed(trace, inputs, first, second, a["groups"])
    else:
        outputs = _grouped(trace, inputs, first, second, a["groups"])
    if a["bias"] is not None:
        outputs = trace.tie(outputs, trace.axes(a["bias"])[0])
    trace.assign(result, [plain(len(batch)), outputs, *map(plain, result.shape[2:])])


def _grouped(trace: Trace, inputs: Labels, first: Labels, second: Labels, groups: int) -> Labels:
    """Return the outputs of weight ``(outputs, inputs / groups, ...)``."""
    if groups == 1:
        trace.tie(inputs, second)
    elif groups == len(inputs):  # depthwise: a channel goes with its group
        trace.tie(np.repeat(inputs, len(first) // groups), first)
    else:  # the groups stay, and stay equal
        trace.tie(inputs.reshape(groups, -1), second)
        trace.tie_rows(first.reshape(groups, -1).T)
    return first


def _transposed(trace: Trace, inputs: Labels, first: Labels, second: Labels, groups: int) -> Labels:
    """Return the outputs of weight ``(inputs, outputs / groups, ...)``."""
    trace.tie(inputs, first)
    if groups == 1:
        return second
    if groups == len(inputs):
        trace.fix(second, "a depthwise layer keeps its outputs a channel")
        return np.repeat(inputs, len(second))
    trace.tie_rows(inputs.reshape(groups, -1).T)
    return np.tile(second, groups)


def matrix_product(trace: Trace, a: Arguments, result: Tensor) -> None:
    """``(.., n, k) @ (.., k, m)``, with a term added or without."""
    names = ("mat1", "mat2") if "mat1" in a else ("batch1", "batch2")
    first, second = (a[name] for name in names) if names[0] in a else (a["self"], a["mat2"])
    (*batch, rows, inner), (*other, deep, columns) = trace.axes(first), trace.axes(second)
    trace.tie(inner, deep)
    found = [*(trace.tie(x, y) for x, y in zip(batch, other, strict=True)), rows, columns]
    if names[0] in a:
        found = trace.tie_broadcast([tuple(found), trace.axes(a["self"])], result.shape)
    trace.assign(result, found)


def batch_norm(trace: Trace, a: Arguments, result: Sequence[Tensor]) -> None:
    """Scale, shift and statistics belong to the channels."""
    axes = list(trace.axes(a["input"]))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a.get(name) is not None:
            axes[1] = trace.tie(axes[1], trace.axes(a[name])[0])
    name = trace.inside[-1] if trace.inside else ""
    part = trace.module.get_submodule(name)
    if isinstance(part, nn.modules.batchnorm._NormBase):
        # Instance normalization runs on the channels of all samples side by side.
        trace.shapes[name, "num_features"] = (axes[1][: part.num_features],)
    trace.assign(result[0], axes)


def layer_norm(trace: Trace, a: Arguments, result: Sequence[Tensor]) -> None:
    """Mean and variance are those of the channels that are there."""
    axes = list(trace.axes(a["input"]))
    start = len(axes) - len(a["normalized_shape"])
    for name in ("weight", "bias"):
        if a[name] is not None:
            own = trace.axes(a[name])
            axes[start:] = [trace.tie(x, y) for x, y in zip(axes[start:], own, strict=True)]
    trace.normalized.append(tuple(axes[start:]))
    counted(trace, "normalized_shape", tuple(axes[start:]))
    trace.assign(result[0], axes)


def group_norm(trace: Trace, a: Arguments, result: Sequence[Tensor]) -> None:
    """The groups stay, and stay equal."""
    axes = list(trace.axes(a["input"]))
    for name in ("weight", "bias"):
        if a[name] is not None:
            axes[1] = trace.tie(axes[1], trace.axes(a[name])[0])
    trace.tie_rows(axes[1].reshape(a["group"], -1).T)
    trace.normalized.append((axes[1],))
    counted(trace, "num_channels", (axes[1],))
    trace.assign(result[0], axes)


def counted(trace: Trace, attribute: str, axes: Axes) -> None:
    """Remember that an attribute of the running module counts these channels."""
    name = trace.inside[-1] if trace.inside else ""
    if hasattr(trace.module.get_submodule(name), attribute):
        trace.shapes[name, attribute] = axes


def attention(trace: Trace, a: Arguments, result: Sequence[Tensor]) -> None:
    """Heads of query, key and value go together; so do the features of query and key."""
    (*query, tokens, features), key = trace.axes(a["query"]), trace.axes(a["key"])
    value = trace.axes(a["value"])
    trace.tie(features, key[-1])
    if a.get("scale") is None:
        trace.fix(features, f"{trace.where()}: attention is scaled by the number of features")
    for axes in (key, value):
        query = [trace.tie(x, y) for x, y in zip(query, axes[:-2], strict=True)]
    mask = a.get("attn_mask")
    if mask is not None:
        shape = [*map(len, query), len(tokens), len(key[-2])]
        padded = (*query, plain(shape[-2]), plain(shape[-1]))
        trace.tie_broadcast([padded, trace.axes(mask)], shape)
    trace.assign(result[0], [*query, tokens, value[-1]])
