"""The stages of a run as they come, and which of them the shipped model goes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deploykit.decisions import pays
from deploykit.errors import BudgetError
from deploykit.recipe.sections import Judged
from deploykit.stages import Stage


@dataclass
class Course:
    """The stages of a run as they come.

    Attributes:
        stages: all that were made, in order.
        origin: the stage that each one was made from, by its name.
        refused: names of those that the shipped model has not gone through.
        reasons: what was decided within a stage or about it, by its name.
        speedups: what judged stages brought at batch 1 in the precision that ships, by name.
    """

    stages: list[Stage]
    origin: dict[str, Stage] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)

    @property
    def final(self) -> Stage:
        """The last stage that was kept."""
        return [stage for stage in self.stages if stage.name not in self.refused][-1]

    def add(self, stage: Stage) -> None:
        """Append a stage that was made from the last one kept."""
        self.origin[stage.name] = self.final
        self.stages.append(stage)

    def copy(self) -> Course:
        """Return a course that goes on from here without this one."""
        return replace(
            self,
            stages=[*self.stages],
            origin=dict(self.origin),
            refused=set(self.refused),
            reasons=dict(self.reasons),
            speedups=dict(self.speedups),
        )

    def moved(self, stages: Mapping[str, Stage]) -> Course:
        """Return the same course with these stages, by name, in place of its own."""
        origin = {name: stages[before.name] for name, before in self.origin.items()}
        return replace(self, stages=[stages[stage.name] for stage in self.stages], origin=origin)

    def judge(self, stage: Stage, section: Judged, speedup: float) -> None:
        """Keep the last stage if it pays, or else do what its section says.

        Raises:
            BudgetError: it does not pay, and the recipe demands that it does.
        """
        self.speedups[stage.name] = speedup
        if not pays(speedup, self.origin[stage.name], stage):
            self.refuse(stage, section, f"{speedup:.2f}x the speed at batch 1 as it ships")

    def refuse(self, stage: Stage, section: Judged, why: str) -> None:
        """Drop the last stage for what it brought, or do what its section says.

        Raises:
            BudgetError: the recipe demands that it pays.
        """
        if section.unless_it_pays == "keep":
            return
        if section.unless_it_pays == "fail":
            raise BudgetError(
                f"{stage.name}: expected a stage that pays, got {why}; remove the section, or set "
                f"{stage.name}.unless_it_pays to drop or keep"
            )
        self.refused.add(stage.name)
        reasons = [f"does not pay: {why}", self.reasons.get(stage.name)]
        self.reasons[stage.name] = "; ".join(filter(None, reasons))
