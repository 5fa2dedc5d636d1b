"""What each operator does to channels: one rule an operator, none means that nothing may go.

A rule takes the trace, the operator's arguments by name and its result, hands labels to the
result and ties what must go together. Operators that work on each entry by itself need no rule
of their own; torch marks them.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deploykit.prune.trace import Axes, Labels, Trace, plain, varied

Arguments = dict[str, Any]
Rule = Callable[[Trace, Arguments, Any], None]


def follow(trace: Trace, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Carry the labels from an operator's arguments to its result."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(varied(axis) for tensor in inputs for axis in trace.axes(tensor)):
        return None
    name = str(operator._schema.name).removeprefix("aten::")
    arguments = _bind(operator, args, kwargs)
    # An operator in place ends in an underscore and follows the rule of the other one.
    rule = RULES.get(name) or RULES.get(name.removesuffix("_")) or _spatial(name)
    if not rule and torch.Tag.pointwise in operator.tags:
        rule, arguments = each_entry, {"inputs": inputs}
    try:
        if rule:
            return rule(trace, arguments, result)
    except (IndexError, KeyError, TypeError, ValueError):
        pass  # a form of the operator that its rule does not know
    return _keep_all(trace, inputs, f"{trace.where()}: no pruning through the operator {name}")


def _bind(operator: Any, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """Return all arguments by name, the defaults included."""
    bound = {
        argument.name: argument.default_value if argument.has_default_value() else None
        for argument in operator._schema.arguments
    }
    bound.update(zip(bound, args, strict=False))
    return {**bound, **kwargs}


def _keep_all(trace: Trace, tensors: Sequence[Tensor], reason: str) -> None:
    for tensor in tensors:
        for axis in trace.axes(tensor):
            trace.fix(axis, reason)


def _tie_broadcast(trace: Trace, axes: Sequence[Axes], shape: Sequence[int]) -> list[Labels]:
    """Tie the dimensions of tensors that are broadcast to ``shape``; return its labels."""
    joined = []
    for place, size in enumerate(shape, -len(shape)):
        found = [axis[place] for axis in axes if -place <= len(axis) and len(axis[place]) == size]
        labels = found[0] if found else plain(size)
        for other in found[1:]:
            labels = trace.tie(labels, other)
        joined.append(labels)
    return joined


# --- operators on each entry, and those that only move entries ---


def each_entry(trace: Trace, a: Arguments, result: Any) -> None:
    """Channel i comes from the channels i of all inputs."""
    inputs = a["inputs"] if "inputs" in a else [x for x in tree_leaves(a) if isinstance(x, Tensor)]
    for output in tree_leaves(result):
        if isinstance(output, Tensor):
            labels = _tie_broadcast(trace, [trace.axes(x) for x in inputs], output.shape)
            trace.assign(output, labels)


def same_shape(trace: Trace, a: Arguments, result: Tensor) -> None:
    """The result is a copy or a view of the first argument in its shape."""
    source = next(x for x in a.values() if isinstance(x, Tensor))
    if source.shape == result.shape:
        trace.assign(result, trace.axes(source))
    else:
        _keep_all(trace, [source], f"{trace.where()}: no pruning through strides")


def fresh(trace: Trace, a: Arguments, result: Tensor) -> None:
    """A new tensor of the argument's type, in a shape that the model gives."""


def permute(trace: Trace, a: Arguments, result: Tensor) -> None:
    """The dimensions change places."""
    axes = trace.axes(a["self"])
    if "dims" in a:
        order = [dim % len(axes) for dim in a["dims"]]
    else:
        order = list(range(len(axes)))
        first, second = a.get("dim0", 0), a.get("dim1", len(axes) - 1)
        if len(axes) > 1:
            order[first], order[second] = order[second], order[first]
    trace.assign(result, [axes[dim] for dim in order])


def reshape(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Neighbouring dimensions are merged, or one is cut; entries keep their order."""
    source = a["self"]
    axes = trace.axes(source)
    if source.numel() == 0:
        return _keep_all(trace, [source], "an empty tensor")
    found = [plain(size) for size in result.shape]
    for before, after in _blocks(source.shape, result.shape):
        merged = _merge(trace, [axes[dim] for dim in before])
        cut = _cut(trace, merged, [result.shape[dim] for dim in after])
        for dim, labels in zip(after, cut, strict=True):
            found[dim] = labels
    trace.assign(result, found)
    return None


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the dimensions that hold the same entries; those of one entry are left out."""
    left = [dim for dim, size in enumerate(before) if size > 1]
    right = [dim for dim, size in enumerate(after) if size > 1]
    blocks = []
    while left:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (n := math.prod(before[d] for d in ins)) != (m := math.prod(after[d] for d in outs)):
            if n < m:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        blocks.append((ins, outs))
    return blocks


def _merge(trace: Trace, axes: Sequence[Labels]) -> Labels:
    """Return the labels of dimensions made one; only one of them may hold channels."""
    holders = [place for place, axis in enumerate(axes) if varied(axis)]
    if not holders:
        return plain(math.prod(map(len, axes)))
    keep = holders[0] if trace.whole_parts else holders[-1]
    for place in holders:
        if place != keep:
            trace.fix(axes[place], "it is merged with another dimension of channels")
    shape = [len(axis) if place == keep else 1 for place, axis in enumerate(axes)]
    spread = np.broadcast_to(axes[keep].reshape(shape), list(map(len, axes)))
    return spread.reshape(-1)


def _cut(trace: Trace, labels: Labels, sizes: Sequence[int]) -> list[Labels]:
    """Return the labels of one dimension cut into several."""
    if len(sizes) == 1:
        return [labels]
    cut = [plain(size) for size in sizes]
    if not varied(labels):
        return cut
    grid = labels.reshape(sizes)
    rows = [np.moveaxis(grid, dim, 0).reshape(size, -1) for dim, size in enumerate(sizes)]
    for dim, row in enumerate(rows):
        if bool((row == row[:, :1]).all()):  # a merge undone
            cut[dim] = row[:, 0]
            return cut
    dim = len(sizes) - 2 if trace.whole_parts else len(sizes) - 1
    cut[dim] = trace.tie_rows(rows[dim])
    trace.parts.append(cut[dim])
    return cut


def expand(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Dimensions of one entry are repeated, new ones come first."""
    trace.assign(result, _tie_broadcast(trace, [trace.axes(a["self"])], result.shape))


def repeat(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Each dimension is repeated as a whole."""
    axes = trace.axes(a["self"])
    missing = [plain(1)] * (result.ndim - len(axes))
    times = zip([*missing, *axes], a["repeats"], strict=True)
    trace.assign(result, [np.tile(axis, count) for axis, count in times])


# --- cutting and joining ---


def take_one(trace: Trace, a: Arguments, result: Any) -> None:
    """One index of a dimension, or each of them (unbind), is taken."""
    axes = list(trace.axes(a["self"]))
    taken = axes.pop(a["dim"] or 0)
    trace.fix(taken, f"{trace.where()}: single channels are taken")
    for output in [result] if isinstance(result, Tensor) else result:
        trace.assign(output, axes)


def take_range(trace: Trace, a: Arguments, result: Tensor) -> None:
    """A range of a dimension is taken."""
    axes = list(trace.axes(a["self"]))
    axes[a["dim"]] = axes[a["dim"]][a["start"] : a["end"] : a["step"]]
    trace.assign(result, axes)


def split(trace: Trace, a: Arguments, result: Sequence[Tensor]) -> None:
    """A dimension is cut into pieces; equal pieces stay equal, so their channels go together."""
    axes, dim = list(trace.axes(a["self"])), a["dim"]
    ends = list(accumulate(piece.shape[dim] for piece in result))
    pieces = np.split(axes[dim], ends[:-1])
    if len({len(piece) for piece in pieces}) == 1:
        trace.tie_rows(np.stack(pieces, axis=1))
    for output, piece in zip(result, pieces, strict=True):
        axes[dim] = piece
        trace.assign(output, axes)


def join(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Tensors are put behind each other along one dimension."""
    tensors = [tensor for tensor in a["tensors"] if tensor.numel()]
    axes, dim = [trace.axes(tensor) for tensor in tensors], a["dim"] % result.ndim
    joined = np.concatenate([axis[dim] for axis in axes])
    others = [[*axis[:dim], plain(1), *axis[dim + 1 :]] for axis in axes]
    shape = [1 if place == dim else size for place, size in enumerate(result.shape)]
    found = _tie_broadcast(trace, [tuple(axis) for axis in others], shape)
    found[dim] = joined
    trace.assign(result, found)


def stack(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Tensors are put behind each other along a new dimension."""
    dim = a["dim"] % result.ndim
    shape = [*result.shape[:dim], *result.shape[dim + 1 :]]
    found = _tie_broadcast(trace, [trace.axes(tensor) for tensor in a["tensors"]], shape)
    trace.assign(result, [*found[:dim], plain(result.shape[dim]), *found[dim:]])


def look_up(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Rows are chosen by number, as from a table of relative positions."""
    axes, indices = trace.axes(a["self"]), a["indices"]
    places = [place for place, index in enumerate(indices) if index is not None]
    span = range(places[0], places[-1] + 1)
    if list(span) != places:
        return _keep_all(trace, [a["self"]], f"{trace.where()}: no pruning through a look-up")
    for place in places:
        trace.fix(axes[place], f"{trace.where()}: single channels are taken")
    before, after = axes[: span.start], axes[span.stop :]
    new = result.shape[len(before) : result.ndim - len(after)]
    trace.assign(result, [*before, *map(plain, new), *after])
    return None


def embedding(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Rows of a table are chosen by number."""
    rows, features = trace.axes(a["weight"])
    trace.fix(rows, "each entry of a vocabulary is needed")
    trace.assign(result, [*map(plain, result.shape[:-1]), features])


def glu(trace: Trace, a: Arguments, result: Tensor) -> None:
    """The first half of a dimension is gated by the second."""
    axes, dim = list(trace.axes(a["self"])), a["dim"]
    first, second = np.split(axes[dim], 2)
    axes[dim] = trace.tie(first, second)
    trace.assign(result, axes)


# --- layers ---


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
        found = _tie_broadcast(trace, [tuple(found), trace.axes(a["self"])], result.shape)
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
    _counted(trace, "normalized_shape", tuple(axes[start:]))
    trace.assign(result[0], axes)


def group_norm(trace: Trace, a: Arguments, result: Sequence[Tensor]) -> None:
    """The groups stay, and stay equal."""
    axes = list(trace.axes(a["input"]))
    for name in ("weight", "bias"):
        if a[name] is not None:
            axes[1] = trace.tie(axes[1], trace.axes(a[name])[0])
    trace.tie_rows(axes[1].reshape(a["group"], -1).T)
    trace.normalized.append((axes[1],))
    _counted(trace, "num_channels", (axes[1],))
    trace.assign(result[0], axes)


def _counted(trace: Trace, attribute: str, axes: Axes) -> None:
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
        _tie_broadcast(trace, [padded, trace.axes(mask)], shape)
    trace.assign(result[0], [*query, tokens, value[-1]])


# --- operators along a dimension ---


def along(name: str) -> Rule:
    """Return the rule of an operator that mixes all entries of one dimension, as softmax does."""

    def rule(trace: Trace, a: Arguments, result: Tensor) -> None:
        axes = trace.axes(a["self"])
        trace.fix(axes[a["dim"]], f"{trace.where()}: {name} runs over the channels")
        trace.assign(result, axes)

    return rule


def total(trace: Trace, a: Arguments, result: Tensor) -> None:
    """A channel at zero adds nothing to a sum, so the channels of a sum may go."""
    _reduce(trace, a, result)


def statistic(trace: Trace, a: Arguments, result: Any) -> None:
    """A mean or a largest value over channels changes with their number."""
    axes = trace.axes(a["self"])
    for dim in _reduced(a, len(axes)):
        trace.fix(axes[dim], f"{trace.where()}: a statistic is taken over the channels")
    for output in [result] if isinstance(result, Tensor) else result:
        _reduce(trace, a, output)


def _reduced(a: Arguments, dims: int) -> list[int]:
    given = a.get("dim")
    given = [given] if isinstance(given, int) else given
    return sorted({dim % dims for dim in given or range(dims)}) if dims else []


def _reduce(trace: Trace, a: Arguments, result: Tensor) -> None:
    axes = trace.axes(a["self"])
    gone = _reduced(a, len(axes))
    kept = [plain(1) if dim in gone else axis for dim, axis in enumerate(axes)]
    if not a.get("keepdim"):
        kept = [axis for dim, axis in enumerate(kept) if dim not in gone]
    trace.assign(result, kept)


def _spatial(name: str) -> Rule | None:
    """Return the rule of an operator that pools or resizes the last dimensions."""
    match = SPATIAL.search(name)
    dimensions = int(next(filter(None, match.groups()))) if match else 0

    def rule(trace: Trace, a: Arguments, result: Any) -> None:
        axes = trace.axes(next(value for value in a.values() if isinstance(value, Tensor)))
        for axis in axes[len(axes) - dimensions :]:
            trace.fix(axis, f"{trace.where()}: it is pooled or resized")
        kept = axes[: len(axes) - dimensions]
        for output in [result] if isinstance(result, Tensor) else result:
            trace.assign(output, [*kept, *map(plain, output.shape[len(kept) :])])

    return rule if match else None


def pad(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Padding along channels shifts them by a number that is the model's own."""
    axes = list(trace.axes(a["self"]))
    amounts = a["pad"]
    for place in range(len(amounts) // 2):
        dim = len(axes) - 1 - place
        if amounts[2 * place] or amounts[2 * place + 1]:
            trace.fix(axes[dim], f"{trace.where()}: channels are padded")
            axes[dim] = plain(result.shape[dim])
    trace.assign(result, axes)


def from_channels(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Each channel is made of neighbouring ones (pixel shuffle)."""
    batch, channels, *_ = trace.axes(a["self"])
    rows = trace.tie_rows(channels.reshape(result.shape[1], -1))
    trace.assign(result, [batch, rows, *map(plain, result.shape[2:])])


def to_channels(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Each channel becomes neighbouring ones (pixel unshuffle, unfold)."""
    batch, channels, *_ = trace.axes(a["self"])
    spread = np.repeat(channels, result.shape[1] // len(channels))
    trace.assign(result, [batch, spread, *map(plain, result.shape[2:])])


def roll(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Rolling along channels shifts them by a number that is the model's own."""
    axes = trace.axes(a["self"])
    for dim in a["dims"] or range(len(axes)):
        trace.fix(axes[dim], f"{trace.where()}: channels are rolled")
    trace.assign(result, axes)


# Poolings, resizings and paddings of so many dimensions, whatever else their names say.
SPATIAL = re.compile(
    r"_pool([123])d|^_?upsample_[a-z_]+([123])d|^grid_sampler_([23])d|^re[a-z]+_pad([123])d"
)
NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), reshape),
    **dict.fromkeys(("squeeze", "unsqueeze"), reshape),
    **dict.fromkeys(("permute", "transpose", "t"), permute),
    **dict.fromkeys(("alias", "detach", "_to_copy", "as_strided", "lift_fresh"), same_shape),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), same_shape),
    **dict.fromkeys(("hardswish", "copy", "_prelu_kernel", "native_dropout"), each_entry),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), fresh),
    "expand": expand,
    "repeat": repeat,
    **dict.fromkeys(("select", "unbind"), take_one),
    "slice": take_range,
    **dict.fromkeys(("split", "split_with_sizes"), split),
    "cat": join,
    "stack": stack,
    "index": look_up,
    "embedding": embedding,
    "glu": glu,
    "convolution": convolution,
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), matrix_product),
    **dict.fromkeys(NORMS, batch_norm),
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "_softmax": along("softmax"),
    "_log_softmax": along("softmax"),
    "cumsum": along("a running sum"),
    **dict.fromkeys(("sum", "linalg_vector_norm"), total),
    **dict.fromkeys(("mean", "amax", "amin", "max", "min", "argmax", "var", "std"), statistic),
    "constant_pad_nd": pad,
    "roll": roll,
    "pixel_shuffle": from_channels,
    **dict.fromkeys(("pixel_unshuffle", "im2col"), to_channels),
}
