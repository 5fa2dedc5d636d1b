import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deploykit.data.dataset import row_ranges
from deploykit.data.splits import cut_stratified, find_duplicates, limit_rows
from deploykit.errors import DataError

CLASSES = ("a", "b", "c", "d")
shares = st.floats(0.01, 0.6)
labels_with_enough = st.lists(st.integers(3, 40), min_size=1, max_size=4).flatmap(
    lambda counts: st.permutations(np.repeat(np.arange(len(counts)), counts).tolist())
)


def cut(labels, validation=0.15, test=0.15, seed=0):
    fractions = {"validation": validation, "test": test}
    return cut_stratified(np.array(labels), fractions, seed=seed, classes=CLASSES, name="x.npz")


@settings(deadline=None)
@given(labels_with_enough, shares, shares, st.integers(0, 2**32 - 1))
def test_splits_are_disjoint_and_cover_every_row(labels, validation, test, seed):
    assume(validation + test < 1)
    parts = cut(labels, validation, test, seed)
    rows = np.concatenate(list(parts.values()))
    assert sorted(rows.tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts.values())


@settings(deadline=None)
@given(labels_with_enough, shares, shares)
def test_every_class_has_its_share_in_every_split(labels, validation, test):
    assume(validation + test < 1)
    labels = np.array(labels)
    parts = cut(labels, validation, test)
    for number, count in enumerate(np.bincount(labels)):
        found = {name: int((labels[rows] == number).sum()) for name, rows in parts.items()}
        assert min(found.values()) >= 1
        if found["train"] > 1:
            assert abs(found["validation"] - validation * count) <= 1
            assert abs(found["test"] - test * count) <= 1


@settings(deadline=None)
@given(labels_with_enough, st.integers(0, 2**32 - 1))
def test_equal_seeds_cut_equally(labels, seed):
    first, second = cut(labels, seed=seed), cut(labels, seed=seed)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_another_seed_cuts_other_rows():
    labels = np.arange(200) % 4
    assert not np.array_equal(cut(labels, seed=0)["test"], cut(labels, seed=1)["test"])


def test_rows_of_one_class_do_not_move_those_of_another():
    first = np.array([0] * 40 + [1] * 40)
    second = np.array([0] * 40 + [1] * 90)
    parts = [cut(labels) for labels in (first, second)]
    for name in ("train", "validation", "test"):
        zeros = [part[name][part[name] < 40] for part in parts]
        assert np.array_equal(*zeros)


def test_global_random_state_does_not_matter():
    labels = np.arange(100) % 4
    np.random.seed(1)  # noqa: NPY002  the global state is the subject
    first = cut(labels)["test"]
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(first, cut(labels)["test"])


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (0.0, 0.1, r"data\.validation: expected a share above 0 or a file, got 0"),
        (0.1, 0.0, r"data\.test: expected a share above 0 or a file, got 0"),
        (0.5, 0.5, r"expected less than 1 together, got 1; nothing would be left"),
    ],
)
def test_shares_that_empty_a_split_are_refused(validation, test, message):
    with pytest.raises(DataError, match=message):
        cut([0] * 10 + [1] * 10, validation, test)


def test_a_class_with_too_few_rows_is_named():
    with pytest.raises(DataError, match=r"x\.npz: expected at least 3 rows of class 'b'.*got 2"):
        cut([0] * 10 + [1] * 2)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 90))
def test_limit_keeps_so_many_rows_in_order(labels, limit):
    rows = limit_rows(np.array(labels), limit, seed=0)
    assert len(rows) == min(limit, len(labels))
    assert (np.diff(rows) > 0).all()
    assert rows[-1] < len(labels)


@settings(deadline=None)
@given(st.integers(4, 40), st.integers(0, 99))
def test_limit_keeps_the_shares_of_classes_even_of_sorted_rows(limit, seed):
    labels = np.repeat(np.arange(4), 25)
    counts = np.bincount(labels[limit_rows(labels, limit, seed=seed)], minlength=4)
    assert counts.max() - counts.min() <= 1


def test_no_limit_keeps_all():
    assert limit_rows(np.zeros(5), None, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_duplicates_across_splits_are_counted_and_named():
    origins = {name: (lambda row, name=name: f"{name} row {row}") for name in ("train", "test")}
    warnings = find_duplicates({"train": [b"a", b"b", b"b"], "test": [b"c", b"b", b"a"]}, origins)
    assert warnings == (
        "2 of 3 test samples are also in train (first: test row 1 equals train row 1); "
        "test accuracy is flattered",
    )


def test_distinct_splits_raise_no_warning():
    origins = {"train": str, "test": str}
    assert find_duplicates({"train": [b"a", b"a"], "test": [b"b"]}, origins) == ()


@given(st.sets(st.integers(0, 60)))
def test_row_ranges_tell_the_rows(rows):
    text = row_ranges(np.array(sorted(rows), dtype=np.int64))
    told = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        told += range(int(first), int(last or first) + 1)
    assert told == sorted(rows)
