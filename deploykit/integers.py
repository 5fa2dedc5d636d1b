"""How a run comes to integers: which widths, which layers stay in float, calibrated or trained."""

from __future__ import annotations

import time

from deploykit.artifacts import Candidate
from deploykit.decisions import FASTER, ptq_decision
from deploykit.mixed_precision import Mixture, fastest_mixture
from deploykit.prune import align_widths
from deploykit.quantize import calibrate, calibration_rows, train_quantized
from deploykit.stages import Stage
from deploykit.targets import about_integers, can_be_profiled, integers_for, resolve_target
from deploykit.work import Work, as_fed, latency_of, proved

DEFAULT_MAX_DROP = 0.01  # what ptq may cost in mode auto where no budget says so


def quantize_stage(work: Work, before: Stage, baseline: Stage) -> tuple[Stage, str]:
    """Calibrate or train, as the mode says; ``auto`` trains only where calibrating costs more."""
    recipe, section = work.recipe, work.recipe.quantize
    assert section is not None
    wanted, started = resolve_target(recipe.target), time.monotonic()
    target = integers_for(wanted)
    rows = calibration_rows(len(work.dataset.train), section, recipe.seed)
    samples = work.home.save_calibration(work.dataset.train.load, rows)
    why = f"the recipe asks for {section.mode}"
    whole, rounder = _aligned(work, before.candidate)
    mixture = _mixture(work, whole)
    narrower = f"; {about}" if (about := about_integers(wanted)) else ""
    told = rounder + mixture.told + narrower
    keep_float = (*section.keep_float, *mixture.keep_float)
    if section.mode != "qat":
        stage = proved(
            work,
            started,
            lambda: calibrate(
                whole,
                samples,
                target=target,
                keep_float=keep_float,
                min_sqnr=section.min_sqnr,
            ),
        )
        if section.mode == "ptq":
            return stage, why + told
        decision = ptq_decision(baseline, stage, recipe.budget, DEFAULT_MAX_DROP)
        if decision.kept or not section.epochs:
            return stage, decision.why + told
        why = decision.why
    stage = proved(
        work,
        started,
        lambda: train_quantized(
            whole,
            work.training,
            section,
            target=target,
            teacher=as_fed(baseline.candidate, whole) if section.distill else None,
            keep_float=keep_float,
        ),
    )
    return stage, f"qat: {why}{told}"


def _aligned(work: Work, candidate: Candidate) -> tuple[Candidate, str]:
    """Widen depthwise layers to full blocks of the kernels, where that is measured to be faster."""
    section, target = work.recipe.quantize, resolve_target(work.recipe.target)
    if section is None or not section.align or not can_be_profiled(target):
        return candidate, ""
    wider = align_widths(candidate, target.channel_multiple)
    if wider is None:
        return candidate, ""
    speedup = latency_of(work, candidate, "align").compare(wider)
    if speedup < FASTER:
        return candidate, ""
    return wider, f"; depthwise layers in full blocks of channels, {speedup:.2f}x faster for it"


def _mixture(work: Work, candidate: Candidate) -> Mixture:
    """Find the layers that integers make no faster, where this machine is the target."""
    recipe, target = work.recipe, resolve_target(work.recipe.target)
    assert recipe.quantize is not None
    if not recipe.quantize.mix or not can_be_profiled(target):
        return Mixture()
    return fastest_mixture(
        candidate,
        target=target,
        threads=recipe.threads,
        keep_float=recipe.quantize.keep_float,
        record=work.run.latencies("quantize"),
    )
