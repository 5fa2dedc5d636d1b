"""One step of pruning: which groups may lose channels, which do, and the smaller module."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deploykit.cost import count_macs, count_parameters
from deploykit.errors import CompressionError
from deploykit.models.attention import splitting_attention
from deploykit.models.modes import evaluating
from deploykit.models.patterns import match_modules
from deploykit.prune.graph import Graph
from deploykit.prune.groups import rank_groups, set_gradients
from deploykit.prune.notes import PruneNotes
from deploykit.prune.selection import Prunable, select_channels
from deploykit.prune.trace import Example, as_inputs
from deploykit.prune.trial import Twin
from deploykit.widths import Widths, output_width, read_widths

Select = Callable[[Sequence[Prunable]], Mapping[str, list[int]]]


def prune_channels(
    module: nn.Module,
    example: Example,
    *,
    channel_ratio: float = 0.0,
    select: Select | None = None,
    importance: Literal["l1", "l2", "taylor"] = "l2",
    scope: Literal["global", "uniform"] = "global",
    channel_multiple: int = 1,
    protect: Sequence[str] = (),
    gradients: Mapping[str, Tensor] | None = None,
    initial_widths: Widths | None = None,
) -> tuple[nn.Module, PruneNotes]:
    """Remove the least important channels from a copy of ``module``.

    Channels of layers that depend on each other go together. A group that cannot be pruned
    rightly is left alone and named in the notes; so is what carries the model's output.

    Args:
        module: takes ``example``; returns tensors in any nesting of tuples, lists and dicts.
        example: input of one sample or more, ``(N, C, H, W)`` for images; a tuple where the
            module takes several.
        channel_ratio: share of the channels of all prunable groups to have gone, 0 to 1.
        select: chooses the channels in place of ``channel_ratio`` and ``scope``; asked again,
            without them, where groups turn out not to be prunable as chosen.
        importance: norm of the weights, or the first-order change of the loss.
        scope: rank over all groups, or take the same share of each.
        channel_multiple: widths end on multiples of it, rounded up.
        protect: shell patterns over module names; a match keeps inputs and outputs.
        gradients: of the loss, by parameter name; needed for ``taylor``.
        initial_widths: what ``channel_ratio`` is a share of, as `read_widths` gives it;
            the module's own by default.

    Returns:
        The pruned copy, in evaluation mode, and what was done.

    Raises:
        CompressionError: a pattern fits no module, nothing can be pruned, or the pruned model
            does not run.

    Example:
        >>> smaller, notes = prune_channels(module, torch.randn(2, 3, 32, 32), channel_ratio=0.5)
        >>> notes.macs
        (126549120, 61230464)
    """
    initial = initial_widths or read_widths(module)
    inputs = as_inputs(example)
    pruned = copy.deepcopy(module).eval()
    set_gradients(pruned, importance, gradients)
    with splitting_attention(pruned):
        protected = match_modules(pruned, protect, "prune.protect")
        graph, twin = Graph(pruned, inputs), Twin(pruned, inputs)
        prunable, left_alone = rank_groups(
            graph,
            twin,
            importance=importance,
            protected=protected,
            initial_widths=initial,
            channel_multiple=channel_multiple,
        )
        select = select or partial(
            select_channels,
            channel_ratio=channel_ratio,
            scope=scope,
            channel_multiple=channel_multiple,
        )
        removal = _proven_selection(twin, prunable, select, left_alone)
        graph.remove(pruned, removal, twin.adjusted & set(removal))
    pruned.zero_grad(set_to_none=True)
    check_outputs(module, pruned, inputs)
    after = read_widths(pruned)
    total = sum(group.initial_width for group in prunable)
    kept = sum(output_width(after[group.root]) for group in prunable)
    notes = PruneNotes(
        channel_ratio=channel_ratio,
        achieved_ratio=(total - kept) / total if total else 0.0,
        widths=narrowed(initial, after),
        left_alone=left_alone,
        macs=(count_macs(module, *inputs), count_macs(pruned, *inputs)),
        parameters=(count_parameters(module), count_parameters(pruned)),
    )
    return pruned, notes


def check_outputs(module: nn.Module, pruned: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Run the pruned model at batches of 1 and 3 and compare the shapes of its outputs.

    Raises:
        CompressionError: it does not run, or its outputs have another shape.
    """
    for batch in (1, 3):
        samples = [x[:1].expand(batch, *x.shape[1:]) for x in inputs]
        with torch.no_grad(), evaluating(module):
            expected = _shapes(module(*samples))
            try:
                got = _shapes(pruned.eval()(*samples))
            except Exception as error:
                raise CompressionError(
                    f"prune: the pruned model does not run at batch {batch} ({error}); name the "
                    "layers to leave whole under prune.protect"
                ) from error
        if expected != got:
            raise CompressionError(
                f"prune: expected outputs of shape {expected} at batch {batch}, got {got}; name "
                "the layers to leave whole under prune.protect"
            )


def _shapes(outputs: object) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def narrowed(before: Widths, after: Widths) -> dict[str, tuple[int, int]]:
    """Return output widths before and after, of the layers where they differ."""
    pairs = {
        name: (output_width(before[name]), output_width(widths))
        for name, widths in after.items()
        if "out_channels" in widths or "out_features" in widths
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _proven_selection(
    twin: Twin,
    prunable: list[Prunable],
    select: Select,
    left_alone: dict[str, str],
) -> Mapping[str, list[int]]:
    """Select channels whose removal holds on the twin; groups that fail move to ``left_alone``."""
    while removal := select(prunable):
        faults = twin.faults(removal)
        if not faults:
            return removal
        for group in [group for group in prunable if group.root in faults]:
            left_alone[group.label] = faults[group.root]
            prunable.remove(group)
    return {}
