"""Rules of operators that move entries without computing with them: reshape, cut, join."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deploykit.prune.trace import Arguments, Labels, Trace, plain, varied


def each_entry(trace: Trace, a: Arguments, result: Any) -> None:
    """Channel i comes from the channels i of all inputs."""
    inputs = a["inputs"] if "inputs" in a else [x for x in tree_leaves(a) if isinstance(x, Tensor)]
    for output in tree_leaves(result):
        if isinstance(output, Tensor):
            labels = trace.tie_broadcast([trace.axes(x) for x in inputs], output.shape)
            trace.assign(output, labels)


def same_shape(trace: Trace, a: Arguments, result: Tensor) -> None:
    """The result is a copy or a view of the first argument in its shape."""
    source = next(x for x in a.values() if isinstance(x, Tensor))
    if source.shape == result.shape:
        trace.assign(result, trace.axes(source))
    else:
        trace.keep_all([source], f"{trace.where()}: no pruning through strides")


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
        return trace.keep_all([source], "an empty tensor")
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
    trace.assign(result, trace.tie_broadcast([trace.axes(a["self"])], result.shape))


def repeat(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Each dimension is repeated as a whole."""
    axes = trace.axes(a["self"])
    missing = [plain(1)] * (result.ndim - len(axes))
    times = zip([*missing, *axes], a["repeats"], strict=True)
    trace.assign(result, [np.tile(axis, count) for axis, count in times])


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
    found = trace.tie_broadcast([tuple(axis) for axis in others], shape)
    found[dim] = joined
    trace.assign(result, found)


def stack(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Tensors are put behind each other along a new dimension."""
    dim = a["dim"] % result.ndim
    shape = [*result.shape[:dim], *result.shape[dim + 1 :]]
    found = trace.tie_broadcast([trace.axes(tensor) for tensor in a["tensors"]], shape)
    trace.assign(result, [*found[:dim], plain(result.shape[dim]), *found[dim:]])


def look_up(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Rows are chosen by number, as from a table of relative positions."""
    axes, indices = trace.axes(a["self"]), a["indices"]
    places = [place for place, index in enumerate(indices) if index is not None]
    span = range(places[0], places[-1] + 1)
    if list(span) != places:
        return trace.keep_all([a["self"]], f"{trace.where()}: no pruning through a look-up")
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
