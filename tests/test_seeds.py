import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.seeds import stable_seed

parts = st.lists(st.one_of(st.integers(), st.text()), max_size=5).map(tuple)


@given(parts, parts)
def test_only_equal_parts_give_an_equal_seed(first, second):
    assert (stable_seed(*first) == stable_seed(*second)) == (first == second)


@given(parts)
def test_seed_is_one_that_torch_and_numpy_take(values):
    assert 0 <= stable_seed(*values) < 2**63


@pytest.mark.parametrize(
    ("first", "second"),
    [((1,), ("1",)), (("ab", "c"), ("a", "bc")), ((1, 2), (12,)), ((), ("",)), ((1, 2), (2, 1))],
)
def test_types_borders_and_order_of_parts_count(first, second):
    assert stable_seed(*first) != stable_seed(*second)


def test_numpy_integers_count_as_integers():
    assert stable_seed(np.int64(3), "x") == stable_seed(3, "x")


def test_a_fraction_is_no_part_of_a_seed():
    with pytest.raises(TypeError):
        stable_seed(0.5)  # type: ignore[arg-type]


def test_seed_is_the_same_in_another_process():
    code = "from deploykit.seeds import stable_seed; print(stable_seed(7, 'train', 3))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = [sys.executable, "-c", code]
    answer = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert int(answer.stdout) == stable_seed(7, "train", 3)
