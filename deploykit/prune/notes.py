"""What pruning did, for the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from deploykit.artifacts import JsonDict


@dataclass(frozen=True)
class PruneNotes:
    """What was removed and what was left.

    Attributes:
        channel_ratio: the share that was asked for.
        achieved_ratio: the share removed, of the channels of all prunable groups.
        widths: output channels ``(before, after)`` of each layer that got narrower.
        left_alone: why a group kept all its channels, by the names of its layers.
        macs: multiply-accumulates of one sample, before and after.
        parameters: number of parameters, before and after.
        removed: residual blocks that are gone.
    """

    channel_ratio: float
    achieved_ratio: float
    widths: Mapping[str, tuple[int, int]]
    left_alone: Mapping[str, str]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    removed: tuple[str, ...] = ()

    def to_json(self) -> JsonDict:
        """Return plain JSON for the report."""
        return asdict(self)
