"""Removal of whole channels: ``prune`` is the stage, ``prune_channels`` its one step."""

from deploykit.prune.align import align_widths
from deploykit.prune.channels import prune_channels
from deploykit.prune.notes import PruneNotes
from deploykit.prune.stage import prune

__all__ = ["PruneNotes", "align_widths", "prune", "prune_channels"]
