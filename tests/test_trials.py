"""Laws of the search for a budget, on worlds whose latency and accuracy are known."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.recipe import parse_recipe
from deploykit.trials import Outcome, best_trial, may_try_again, next_trial

WHOLE_MS = 4.0


def recipe(prune="speedup: 4.0", budget="max_drop: 0.01, min_speedup: 2.5, trials: 6", qat=3):
    return parse_recipe(f"""\
schema: 1
name: world
task: image-classification
data: {{source: digits}}
model: {{name: digits-cnn}}
prune: {{{prune}, epochs: 4, steps: 2}}
quantize: {{mode: {"qat" if qat else "auto"}, epochs: {qat}}}
budget: {{{budget}}}
""")


@dataclass(frozen=True)
class World:
    """A model that loses ``harm`` per unit of log speed squared; integers alone bring ``gain``."""

    gain: float = 1.5
    slope: float = 1.0
    harm: float = 0.02

    def outcome(self, tried):
        bare = Outcome(tried.prune, unpruned_ms=WHOLE_MS)
        pruned = self.slope * bare.strength
        speedup, drop = self.gain * math.exp(pruned), self.harm * pruned**2
        budget = tried.budget
        checks = [
            {"name": name, "limit": limit, "value": value, "passed": passed, "why": ""}
            for name, limit, value, passed in (
                ("max_drop", budget.max_drop, drop, drop <= (budget.max_drop or 0)),
                (
                    "min_speedup",
                    budget.min_speedup,
                    speedup,
                    speedup >= (budget.min_speedup or 0),
                ),
            )
            if limit is not None
        ]
        return Outcome(
            tried.prune,
            math.exp(pruned),
            speedup,
            checks,
            unpruned_ms=WHOLE_MS,
            mix=tried.quantize.mix,
        )

    def search(self, wanted):
        outcomes = []
        while (tried := next_trial(wanted, outcomes)) is not None:
            outcomes.append(self.outcome(tried))
        return outcomes


KEYS = ("speedup: {}", "macs: {}", "channel_ratio: {}", "latency_ms: {}")
WEAK_AND_STRONG = {
    "speedup: {}": (1.05, 6.0),
    "macs: {}": (1.05, 6.0),
    "channel_ratio: {}": (0.05, 0.9),
    "latency_ms: {}": (3.8, 0.7),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("strong", [False, True], ids=["too slow", "too inaccurate"])
def test_a_budget_that_can_be_held_is_held_from_either_side(key, strong):
    asked = WEAK_AND_STRONG[key][strong]
    outcomes = World().search(recipe(key.format(asked)))
    assert not outcomes[0].passed
    assert outcomes[-1].passed
    assert len(outcomes) <= 3


@given(
    gain=st.floats(0.7, 3),
    slope=st.floats(0.2, 1.5),
    harm=st.floats(0.001, 0.3),
    asked=st.floats(1.02, 8),
    min_speedup=st.floats(1, 4),
)
def test_whatever_the_world_the_search_ends_and_repeats_nothing(
    gain, slope, harm, asked, min_speedup
):
    wanted = recipe(
        f"speedup: {asked:.4f}", f"max_drop: 0.01, min_speedup: {min_speedup:.4f}, trials: 6"
    )
    outcomes = World(gain, slope, harm).search(wanted)
    assert 1 <= len(outcomes) <= 6
    assert not any(one.passed for one in outcomes[:-1])
    for mix in (False, True):
        strengths = [one.strength for one in outcomes if one.mix == mix]
        assert all(abs(a - b) > 1e-3 for i, a in enumerate(strengths) for b in strengths[:i])
    least = max(0.0, math.log(1.03 * min_speedup / gain))
    if harm * least**2 < 0.008 and least < 3:  # it can be held, with room for the margin
        assert outcomes[-1].passed


def test_a_budget_without_a_speed_ends_at_no_pruning():
    wanted = recipe("channel_ratio: 0.8", "max_drop: 0.001, trials: 3")
    outcomes = World(harm=5.0).search(wanted)
    assert [one.strength for one in outcomes] == [0.8, 0.4, 0.0]
    assert outcomes[-1].section is None
    assert outcomes[-1].passed


def test_what_is_too_slow_and_too_inaccurate_is_not_tried_again():
    assert len(World(gain=0.5, harm=1.0).search(recipe("speedup: 2.0"))) == 1


def rounded(tried, sensitive, **changes):
    """What a trial shows that loses its accuracy to integers; float layers cost speed."""
    kept = tried.quantize.keep_float
    drop = 0.04 / (1 + len(kept))
    check = {"name": "max_drop", "limit": 0.015, "value": drop, "passed": drop <= 0.015, "why": ""}
    return Outcome(tried.prune, 1.5, 3.0, [check], kept, drop, drop + 0.002, sensitive, **changes)


def test_layers_that_integers_harm_are_left_in_float():
    wanted = recipe("channel_ratio: 0.2", "max_drop: 0.015, min_speedup: 1.5, trials: 4")
    first = rounded(wanted, ("head",))
    second = next_trial(wanted, [first])
    assert second.quantize.keep_float == ("head",)
    assert second.prune == wanted.prune
    third = next_trial(wanted, [first, rounded(second, ("head", "stem"))])
    assert third.quantize.keep_float == ("head", "stem")
    assert next_trial(wanted, [first, first, rounded(third, ())]) is None, "it holds"


def test_float_layers_are_no_way_out_where_speed_is_missing_or_pruning_did_the_harm():
    wanted = recipe("channel_ratio: 0.4", "max_drop: 0.015, trials: 4")
    first = rounded(wanted, ("head",))
    harmed_by_pruning = Outcome(**{**vars(first), "rounding_drop": 0.001})
    assert next_trial(wanted, [harmed_by_pruning]).quantize.keep_float == ()
    slow = {"name": "min_speedup", "limit": 9.0, "value": 3.0, "passed": False, "why": ""}
    both = Outcome(**{**vars(first), "checks": [*first.checks, slow]})
    assert next_trial(wanted, [both]) is None


def test_without_pruning_only_integers_can_be_given_up():
    wanted = recipe("channel_ratio: 0.4", "max_drop: 0.015, trials: 4")
    wanted = wanted.model_copy(update={"prune": None})
    assert may_try_again(wanted)
    assert next_trial(wanted, [rounded(wanted, ("head",))]).quantize.keep_float == ("head",)
    assert next_trial(wanted, [rounded(wanted, ())]) is None


def test_layers_that_are_faster_in_float_stay_there_where_no_pruning_brings_the_speed():
    wanted = recipe("channel_ratio: 0.4", "max_drop: 0.5, min_speedup: 2.5, trials: 4")
    wanted = wanted.model_copy(update={"prune": None})
    slow = {"name": "min_speedup", "limit": 2.5, "value": 2.0, "passed": False, "why": ""}
    second = next_trial(wanted, [Outcome(None, speedup=2.0, checks=[slow])])
    assert second.quantize.mix
    assert next_trial(wanted, [Outcome(None, speedup=2.2, checks=[slow], mix=True)]) is None
    wrong = {"name": "max_drop", "limit": 0.5, "value": 0.6, "passed": False, "why": ""}
    assert next_trial(wanted, [Outcome(None, speedup=2.0, checks=[slow, wrong])]) is None


@pytest.mark.parametrize("key", KEYS)
def test_a_trial_that_brings_no_model_is_weakened(key):
    wanted = recipe(key.format(WEAK_AND_STRONG[key][0]))
    first = World().outcome(wanted)
    second = next_trial(wanted, [first])
    failed = Outcome(second.prune, failed="prune: no such latency")
    third = World().outcome(next_trial(wanted, [first, failed]))
    assert first.strength < third.strength < World().outcome(second).strength


@pytest.mark.parametrize("budget", ["max_drop: 0.01, trials: 1", None])
def test_one_trial_is_the_recipe_itself(budget):
    wanted = recipe() if budget is None else recipe("channel_ratio: 0.9", budget)
    if budget is None:
        wanted = wanted.model_copy(update={"budget": None})
    assert not may_try_again(wanted)
    assert next_trial(wanted, []) is wanted
    assert next_trial(wanted, [Outcome(wanted.prune)]) is None


@given(most=st.integers(1, 30), qat=st.integers(0, 6))
def test_later_trials_keep_to_their_epochs(most, qat):
    wanted = recipe("channel_ratio: 0.8", f"max_drop: 0.001, trials: 3, trial_epochs: {most}", qat)
    second = next_trial(wanted, [World(harm=5.0).outcome(wanted)])
    spent = second.prune.steps * second.prune.epochs + second.quantize.epochs
    assert spent <= max(most, 0)
    assert spent == 8 + qat or most < 8 + qat
    assert second.quantize.epochs >= min(qat, 1)


def test_the_nearest_trial_is_chosen_where_none_holds():
    wanted = recipe("channel_ratio: 0.8", "max_drop: 0.01, min_speedup: 50.0")
    world = World()
    tried = [
        wanted.model_copy(update={"prune": wanted.prune.model_copy(update={"channel_ratio": r})})
        for r in (0.9, 0.2, 0.5)
    ]
    outcomes = [world.outcome(one) for one in tried]
    assert best_trial([*outcomes, Outcome(wanted.prune, failed="x")]) in {1, 2}
    held = Outcome(wanted.prune)
    assert best_trial([*outcomes, held]) == 3


def test_a_share_of_channels_that_cannot_grow_is_not_tried_again():
    """Nothing makes this world fast enough, however much is pruned."""
    wanted = recipe("channel_ratio: 0.5", "min_speedup: 50.0, trials: 6")
    strengths = [one.strength for one in World(slope=0.2).search(wanted)]
    assert len(set(strengths)) == len(strengths) - 1, "once more, with layers in float"
    assert max(strengths) == 0.95


def test_what_could_not_be_made_bounds_what_is_tried_next():
    wanted = recipe("speedup: 2.0", "min_speedup: 3.0, trials: 6")
    failed = Outcome(wanted.prune, failed="cannot be made")
    slow = World().outcome(next_trial(wanted, [failed]))
    tried = next_trial(wanted, [failed, slow])
    assert tried is None or tried.prune.speedup < 2.0
