"""Intervals: how far a measured number may be from the truth."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of a proportion, such as one model's accuracy.

    Paper: E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927).

    Args:
        successes: correct answers, ``0 <= successes <= trials``.
        trials: answers, at least 1.
        confidence: chance that the interval holds the true proportion, in (0, 1).

    Returns:
        ``(low, high)``, both in [0, 1].

    Raises:
        ValueError: counts or confidence outside their range.

    Example:
        >>> low, high = wilson_interval(98, 100)
        >>> round(low, 3), round(high, 3)
        (0.93, 0.994)
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"expected 0 <= successes <= trials, got {successes} of {trials}")
    z = _normal_quantile(confidence)
    proportion = successes / trials
    centre = (proportion + z**2 / (2 * trials)) / (1 + z**2 / trials)
    variance = proportion * (1 - proportion) / trials + (z / (2 * trials)) ** 2
    half_width = z * math.sqrt(variance) / (1 + z**2 / trials)
    # At 0 and at all the border is exact; rounding must not push it past the proportion.
    low = 0.0 if successes == 0 else max(0.0, centre - half_width)
    high = 1.0 if successes == trials else min(1.0, centre + half_width)
    return low, high


def paired_drop(
    correct_before: np.ndarray, correct_after: np.ndarray, confidence: float = 0.95
) -> tuple[float, Interval]:
    """Return how much accuracy was lost, and its interval, from answers to the same samples.

    Only the samples on which the two models differ carry information, which makes the interval
    much narrower than that of two independent accuracies. Two models that never differ still
    get an interval around 0: among more samples they might.

    Paper: D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data", J. Educ. Behav. Stat. 37 (2012).

    Args:
        correct_before: bool ``(n,)``: was the first model right about sample i?
        correct_after: bool ``(n,)``: was the second?
        confidence: chance that the interval holds the true drop, in (0, 1).

    Returns:
        ``drop, (low, high)``; positive where the second model is worse; accuracy, -1 to 1.

    Raises:
        ValueError: the arrays are empty, not bool, or of different shapes.
    """
    _check_flags(correct_before, correct_after)
    n = len(correct_before)
    lost = int(np.sum(correct_before & ~correct_after))
    won = int(np.sum(correct_after & ~correct_before))
    # One sample of either kind is added, as if seen: it keeps the width honest near 0.
    p_lost, p_won = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    centre = p_lost - p_won
    half_width = _normal_quantile(confidence) * math.sqrt((p_lost + p_won - centre**2) / (n + 2))
    return (lost - won) / n, (max(-1.0, centre - half_width), min(1.0, centre + half_width))


def _check_flags(before: np.ndarray, after: np.ndarray) -> None:
    if before.dtype != np.bool_ or after.dtype != np.bool_:
        raise ValueError(f"expected bool arrays, got {before.dtype} and {after.dtype}")
    if before.ndim != 1 or before.shape != after.shape or len(before) == 0:
        raise ValueError(f"expected two shapes (n,), n >= 1, got {before.shape} and {after.shape}")


def median_ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, confidence: float = 0.95
) -> tuple[float, Interval]:
    """Return the median of paired ratios and its distribution-free interval.

    Each pair was measured in the same round, so what slows a whole round down cancels. The
    borders are order statistics of the ratios: they assume nothing about how times are
    distributed, and no outlier moves them far.

    Args:
        numerators: positive numbers ``(n,)``, such as the baseline's times.
        denominators: positive numbers ``(n,)``.
        confidence: least chance that the interval holds the true median, in (0, 1).

    Returns:
        ``ratio, (low, high)``.

    Raises:
        ValueError: too few pairs for the confidence (6 at 95%), or numbers that are not positive.
    """
    if numerators.ndim != 1 or numerators.shape != denominators.shape:
        raise ValueError(
            f"expected two shapes (n,), got {numerators.shape} and {denominators.shape}"
        )
    if not (np.all(numerators > 0) and np.all(denominators > 0)):
        raise ValueError("expected positive numbers")
    ratios = np.sort(numerators / denominators)
    left_out = _order_statistics_left_out(len(ratios), confidence)
    low, high = ratios[left_out], ratios[-1 - left_out]
    return float(np.median(ratios)), (float(low), float(high))


def _order_statistics_left_out(n: int, confidence: float) -> int:
    """Count the values beyond each border: the median lies past k of n with binomial chance."""
    _check_confidence(confidence)
    tail = 0.0
    for k in range(n // 2 + 1):
        log_chance = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        tail += math.exp(log_chance - n * math.log(2))
        if tail > (1 - confidence) / 2:
            if k == 0:
                break
            return k - 1
    raise ValueError(f"expected more pairs for a confidence of {confidence}, got {n}")


def _normal_quantile(confidence: float) -> float:
    """Return z: a normal variable lies within z deviations with the given chance."""
    _check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence}")
