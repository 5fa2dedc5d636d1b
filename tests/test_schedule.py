import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.recipe.sections import ScheduleSection
from deploykit.train.schedule import epochs_without_gain, plateau_reductions, rate_factor

NAMES = ["constant", "step", "cosine", "one-cycle", "plateau"]
schedules = st.builds(
    ScheduleSection,
    name=st.sampled_from(NAMES),
    warmup=st.floats(0, 0.9),
    final=st.floats(0, 0.9),
)


def curve(section, total):
    return [rate_factor(section, step, total) for step in range(total)]


@given(schedules, st.integers(1, 300))
def test_rate_stays_between_zero_and_the_peak(section, total):
    assert all(0 <= factor <= 1 for factor in curve(section, total))


@given(schedules, st.integers(1, 300))
def test_no_step_is_wasted_on_a_rate_of_zero(section, total):
    assert all(factor > 0 for factor in curve(section, total))


@given(st.sampled_from(NAMES), st.floats(0.1, 0.9), st.integers(20, 300))
def test_warmup_rises_to_the_peak_and_never_rises_again(name, warmup, total):
    factors = curve(ScheduleSection(name=name, warmup=warmup, milestones=(0.95,)), total)
    top = round(warmup * total) - 1
    assert factors[top] == pytest.approx(1)
    assert all(a < b for a, b in pairwise(factors[: top + 1]))
    assert all(a >= b for a, b in pairwise(factors[top:]))


@pytest.mark.parametrize("name", ["cosine", "one-cycle"])
def test_final_is_the_rate_at_the_end(name):
    section = ScheduleSection(name=name, final=0.05)
    assert rate_factor(section, 1000, 1000) == pytest.approx(0.05)


def test_one_cycle_rises_by_itself():
    factors = curve(ScheduleSection(name="one-cycle"), 100)
    assert factors[0] == pytest.approx(1 / 25, rel=0.1)
    assert max(factors) == factors[29] == pytest.approx(1)


def test_step_falls_at_each_milestone():
    section = ScheduleSection(name="step", milestones=(0.5, 0.75), factor=0.1)
    expected = [1.0] * 10 + [0.1] * 5 + [0.01] * 5
    assert curve(section, 20) == pytest.approx(expected)


def test_plateau_falls_by_its_reductions():
    section = ScheduleSection(name="plateau", factor=0.5)
    assert rate_factor(section, 5, 10, reductions=2) == 0.25


@pytest.mark.parametrize(
    ("accuracies", "reductions"),
    [([], 0), ([0.1, 0.2, 0.3], 0), ([0.3, 0.2, 0.3], 1), ([0.3, 0.2, 0.2, 0.1, 0.1], 2)],
)
def test_plateau_counts_epochs_without_gain_anew_after_each_fall(accuracies, reductions):
    assert plateau_reductions(accuracies, patience=2) == reductions


def test_a_gain_below_min_delta_does_not_count():
    assert epochs_without_gain([0.5, 0.505, 0.509], min_delta=0.01) == 2
    assert epochs_without_gain([0.5, 0.505, 0.52], min_delta=0.01) == 0
    assert epochs_without_gain([]) == 0


def test_rate_needs_no_history():
    """What a resumed run asks for first is what an uninterrupted one had there."""
    section = ScheduleSection(name="one-cycle")
    assert rate_factor(section, 57, 100) == curve(section, 100)[57]
    assert math.isfinite(rate_factor(section, 0, 1))
