"""What was decided and why; every decision reads the validation split only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from deploykit.artifacts import JsonDict
from deploykit.measure import Evaluation, Latency
from deploykit.recipe.sections import BudgetSection
from deploykit.stages import Stage
from deploykit.statistics import paired_drop


@dataclass(frozen=True)
class Decision:
    """One line of the report: a stage, whether its result was kept, and the reason."""

    stage: str
    kept: bool
    why: str

    def to_json(self) -> JsonDict:
        """Return plain JSON."""
        return asdict(self)


def ptq_decision(
    baseline: Stage, calibrated: Stage, budget: BudgetSection | None, default_max_drop: float
) -> Decision:
    """Keep a calibrated model if it already holds the budget."""
    allowed = default_max_drop
    if budget is not None and budget.max_drop is not None:
        allowed = budget.max_drop
    drop, (low, high) = validation_drop(baseline, calibrated)
    kept = judged_drop(budget, baseline.validation, calibrated.validation) <= allowed
    return Decision(
        "quantize",
        kept=kept,
        why=f"ptq {'holds' if kept else 'breaks'} the allowed drop of {allowed:.2%}: it costs "
        f"{drop:.2%} of validation accuracy (95%: {low:.2%} to {high:.2%})",
    )


# A stage pays if it makes the model faster by more than this, or smaller without making it slower.
FASTER, SMALLER = 1.02, 1.05


def pays(speedup: float, before: Stage, after: Stage) -> bool:
    """Whether a stage is worth its while.

    Args:
        speedup: of the shipped model at batch 1, over the one without the stage. Where it is in
            doubt, the least that was shown for a stage that gives up weights; 1 for integers, a
            quarter of the size.
        before: the stage before.
        after: the stage judged.
    """
    smaller = before.model.path.stat().st_size / after.model.path.stat().st_size
    return speedup > FASTER or (speedup >= 1 / FASTER and smaller > SMALLER)


def stage_decision(
    before: Stage,
    after: Stage,
    measured: Mapping[str, JsonDict],
    reason: str = "",
    *,
    kept: bool = True,
) -> Decision:
    """Say what a stage brought over the one before, in latency, size and accuracy.

    Args:
        before: the stage that it was made from.
        after: the stage decided about.
        measured: measurements by stage.
        reason: what was decided within the stage, told first.
        kept: whether the model that ships has gone through it.
    """
    faster = []
    for batch, one in measured[after.name]["latency"].items():
        if one is None:
            continue  # the target is elsewhere
        ratio = Latency.from_json(one).ratio
        ratio /= Latency.from_json(measured[before.name]["latency"][batch]).ratio
        faster.append(f"{ratio:.2f}x at batch {batch}")
    smaller = before.model.path.stat().st_size / after.model.path.stat().st_size
    drop, (low, high) = validation_drop(before, after)
    return Decision(
        after.name,
        kept=kept,
        why=f"{reason}{'; ' if reason else ''}against {before.name}: "
        f"speed {', '.join(faster) or 'unknown, this machine is not the target'}; "
        f"{smaller:.2f}x smaller; validation accuracy {-drop:+.2%} "
        f"(95%: {-high:+.2%} to {-low:+.2%})",
    )


def validation_drop(before: Stage, after: Stage) -> tuple[float, tuple[float, float]]:
    """Return the loss of validation accuracy from ``before`` to ``after``, and its interval."""
    return paired_drop(before.validation.correct, after.validation.correct)


def judged_drop(budget: BudgetSection | None, before: Evaluation, after: Evaluation) -> float:
    """Return the loss of accuracy that a budget judges.

    The upper end of its interval where the budget asks for confidence, else the loss itself.
    """
    confidence = None if budget is None else budget.confidence
    value, (_, high) = paired_drop(before.correct, after.correct, confidence or 0.95)
    return value if confidence is None else high


def check_budget(
    budget: BudgetSection | None,
    baseline: Stage,
    final: Stage,
    measured: Mapping[str, JsonDict],
) -> JsonDict:
    """Return the ``budget`` part of the report; without a budget it passes."""
    checks: list[JsonDict] = []
    if budget is not None and budget.max_drop is not None:
        checks.append(_drop_check(budget, baseline, final))
    if budget is not None and budget.min_speedup is not None:
        checks.append(_speed_check(budget.min_speedup, measured[final.name]))
    return {
        "metric": "accuracy",
        "max_drop": budget.max_drop if budget else None,
        "min_speedup": budget.min_speedup if budget else None,
        "confidence": budget.confidence if budget else None,
        "checks": checks,
        "passed": all(check["passed"] for check in checks),
    }


def _drop_check(budget: BudgetSection, baseline: Stage, final: Stage) -> JsonDict:
    assert budget.max_drop is not None
    judged = judged_drop(budget, baseline.validation, final.validation)
    how = "" if budget.confidence is None else f" (upper end at {budget.confidence:.0%})"
    return {
        "name": "max_drop",
        "limit": budget.max_drop,
        "value": judged,
        "passed": judged <= budget.max_drop,
        "why": f"expected a validation drop of at most {budget.max_drop:.2%}, "
        f"got {judged:.2%}{how}",
    }


def _speed_check(min_speedup: float, measured: JsonDict) -> JsonDict:
    latency = Latency.from_json(measured["latency"]["1"])
    return {
        "name": "min_speedup",
        "limit": min_speedup,
        "value": latency.ratio,
        "passed": latency.ratio >= min_speedup,
        "why": f"expected {min_speedup:g}x the float model's speed at batch 1, "
        f"got {latency.ratio:.2f}x",
    }
