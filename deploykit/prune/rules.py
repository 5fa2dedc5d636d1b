"""What each operator does to channels: one rule an operator, none means that nothing may go.

A rule takes the trace, the operator's arguments by name and its result, hands labels to the
result and ties what must go together. Operators that work on each entry by itself need no rule
of their own; torch marks them.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deploykit.prune.layer_rules import (
    attention,
    batch_norm,
    convolution,
    group_norm,
    layer_norm,
    matrix_product,
)
from deploykit.prune.moves import (
    each_entry,
    embedding,
    expand,
    fresh,
    from_channels,
    glu,
    join,
    look_up,
    pad,
    permute,
    repeat,
    reshape,
    roll,
    same_shape,
    split,
    stack,
    take_one,
    take_range,
    to_channels,
)
from deploykit.prune.trace import Arguments, Trace, plain, varied

Rule = Callable[[Trace, Arguments, Any], None]
SPANNING = frozenset({"native_layer_norm", "native_group_norm"})


def follow(trace: Trace, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Carry the labels from an operator's arguments to its result."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name = str(operator._schema.name).removeprefix("aten::")
    # The normalizations of a pass are counted, those of what no layer has made as well.
    if name not in SPANNING and not any(varied(axis) for one in inputs for axis in trace.axes(one)):
        return None
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
    return trace.keep_all(inputs, f"{trace.where()}: no pruning through the operator {name}")


def _bind(operator: Any, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """Return all arguments by name, the defaults included."""
    bound = {
        argument.name: argument.default_value if argument.has_default_value() else None
        for argument in operator._schema.arguments
    }
    bound.update(zip(bound, args, strict=False))
    return {**bound, **kwargs}


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
