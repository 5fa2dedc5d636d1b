import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.statistics import median_ratio_interval, paired_drop, wilson_interval

TRIALS = 1000
flags = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def draw_pairs(generator, n, p_lost, p_won):
    """Answers of two models that differ with known chances; the true drop is p_lost - p_won."""
    chances = [0.9 - p_lost, 0.1 - p_won, p_lost, p_won]
    kinds = generator.choice(4, size=n, p=chances)
    return np.isin(kinds, (0, 2)), np.isin(kinds, (0, 3))


def plain_wald(before, after):
    """The textbook interval; it collapses where the models seldom differ."""
    difference = before.astype(float) - after
    half_width = 1.96 * difference.std() / math.sqrt(len(difference))
    return difference.mean() - half_width, difference.mean() + half_width


def coverage(interval_of, n, p_lost, p_won):
    generator = np.random.default_rng(0)
    truth = p_lost - p_won
    held = 0
    for _ in range(TRIALS):
        low, high = interval_of(*draw_pairs(generator, n, p_lost, p_won))
        held += low <= truth <= high
    return held / TRIALS


@pytest.mark.parametrize(
    ("n", "p_lost", "p_won"),
    [(50, 0.02, 0.02), (100, 0.01, 0.002), (270, 0.01, 0.005), (270, 0.08, 0.02), (1000, 0.03, 0)],
)
def test_interval_of_the_drop_holds_the_truth_as_often_as_it_says(n, p_lost, p_won):
    assert coverage(lambda *pair: paired_drop(*pair)[1], n, p_lost, p_won) >= 0.935


def test_the_coverage_test_catches_an_interval_that_is_too_narrow():
    assert coverage(plain_wald, 100, 0.01, 0.002) < 0.9


@settings(deadline=None)
@given(flags)
def test_interval_of_the_drop_holds_the_drop_and_stays_in_its_range(pairs):
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    drop, (low, high) = paired_drop(before, after)
    assert -1 <= low <= drop <= high <= 1
    assert drop == pytest.approx(before.mean() - after.mean())


@settings(deadline=None)
@given(flags)
def test_swapping_the_models_mirrors_the_drop(pairs):
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    drop, (low, high) = paired_drop(before, after)
    mirrored, (mirrored_low, mirrored_high) = paired_drop(after, before)
    assert mirrored == -drop
    assert (mirrored_low, mirrored_high) == pytest.approx((-high, -low))


def test_equal_answers_still_leave_room_for_a_drop():
    right = np.ones(200, dtype=bool)
    drop, (low, high) = paired_drop(right, right)
    assert drop == 0
    assert low < 0 < high < 0.02


def test_more_confidence_is_a_wider_interval():
    before, after = draw_pairs(np.random.default_rng(1), 300, 0.05, 0.02)
    narrow, wide = (paired_drop(before, after, level)[1] for level in (0.8, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.ones(3), np.ones(3)),
        (np.ones(3, dtype=bool), np.ones(4, dtype=bool)),
        (np.ones(0, dtype=bool), np.ones(0, dtype=bool)),
    ],
)
def test_drop_refuses_what_is_not_a_pair_of_flags(before, after):
    with pytest.raises(ValueError, match="expected"):
        paired_drop(before, after)


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_proportion(counts):
    low, high = wilson_interval(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


@pytest.mark.parametrize("counts", [(-1, 3), (4, 3), (0, 0)])
def test_wilson_interval_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(*counts)


def test_ratio_interval_holds_the_true_median_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(TRIALS):
        machine = generator.lognormal(0, 0.5, size=15)  # slows both of a pair alike
        slow, fast = machine * 2 * generator.lognormal(0, 0.1, 15), machine
        low, high = median_ratio_interval(slow, fast)[1]
        held += low <= 2 <= high
    assert held / TRIALS >= 0.945


@pytest.mark.parametrize(("n", "left_out"), [(6, 0), (8, 0), (9, 1), (12, 2), (100, 39)])
def test_ratio_interval_uses_the_tabulated_order_statistics(n, left_out):
    # Conover, Practical Nonparametric Statistics: ranks left_out + 1 and n - left_out.
    values = np.arange(1.0, n + 1)
    assert median_ratio_interval(values, np.ones(n))[1] == (values[left_out], values[-1 - left_out])


def test_ratio_is_blind_to_what_slows_both():
    slowdown = np.linspace(1, 50, 20)
    assert median_ratio_interval(3 * slowdown, slowdown) == (3, (3, 3))


def test_one_outlier_does_not_move_the_ratio():
    times = np.full(20, 2.0)
    times[7] = 1e9
    assert median_ratio_interval(times, np.ones(20)) == (2, (2, 2))


@pytest.mark.parametrize(
    ("numerators", "denominators"),
    [
        (np.ones(5), np.ones(5)),
        (np.ones(9), np.ones(8)),
        (np.ones(9), np.zeros(9)),
        (np.ones(0), np.ones(0)),
    ],
)
def test_ratio_interval_refuses_too_few_or_wrong_numbers(numerators, denominators):
    with pytest.raises(ValueError, match="expected"):
        median_ratio_interval(numerators, denominators)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 2.0])
def test_confidence_is_a_chance(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence)
    with pytest.raises(ValueError, match="confidence"):
        median_ratio_interval(np.ones(20), np.ones(20), confidence)
