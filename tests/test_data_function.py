import sys

import numpy as np
import pytest
from data_samples import ARRAYS, everything, load

from deploykit.errors import DataError

PAIR = """
import numpy as np
def pair(n=20, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 3))
    return x, np.arange(n) % 2
"""


def write(base, body, name="mine.py"):
    (base / name).write_text(PAIR + body)


def read(base, task=ARRAYS, source="mine.py:data", **settings):
    return load(base, source, task, **settings)


def test_a_pair_is_cut_by_fraction(tmp_path):
    write(tmp_path, "def data(): return pair()")
    dataset = read(tmp_path, validation=0.2, test=0.3)
    assert [len(split) for split in dataset.splits] == [10, 4, 6]
    assert dataset.train.origin(0) == f"mine.py:data, row {dataset.train.rows[0]}"


def test_the_file_is_relative_to_the_recipe(tmp_path):
    (tmp_path / "code").mkdir()
    write(tmp_path, "def data(): return pair()", "code/mine.py")
    assert len(read(tmp_path, source="code/mine.py:data").classes) == 2
    assert len(load(tmp_path / "code", "../code/mine.py:data", ARRAYS).classes) == 2


def test_images_are_images(tmp_path):
    write(tmp_path, "def data(): return np.full((20, 4, 4), 7, np.uint8), np.arange(20) % 2")
    assert read(tmp_path, "image-classification").sample_shape == (4, 4, 1)


def test_names_as_labels_are_classes(tmp_path):
    write(tmp_path, "def data(): return pair()[0], ['b', 'a'] * 10")
    assert read(tmp_path).classes == ("a", "b")


def test_a_dict_names_the_splits(tmp_path):
    write(
        tmp_path,
        "def data(): return {'train': pair(20), 'validation': pair(6, 1), 'test': pair(8, 2)}",
    )
    dataset = read(tmp_path)
    assert [len(split) for split in dataset.splits] == [20, 6, 8]
    assert dataset.validation.origin(2) == "mine.py:data, validation, row 2"


def test_a_split_that_the_dict_lacks_is_cut_from_train(tmp_path):
    write(tmp_path, "def data(): return {'train': pair(20), 'validation': pair(6, 1)}")
    assert [len(split) for split in read(tmp_path, test=0.2).splits] == [16, 6, 4]


DATASET = """
from deploykit.data import dataset_from_arrays
def data():
    return dataset_from_arrays(pair(20), pair(8, 1), pair(8, 2), classes=("no", "yes"))
"""


def test_a_dataset_is_taken_as_it_is(tmp_path):
    write(tmp_path, DATASET)
    dataset = read(tmp_path)
    assert dataset.classes == ("no", "yes")
    assert everything(dataset.train).dtype == np.float32
    with pytest.raises(DataError, match=r"expected data for task image-classification, got arrays"):
        read(tmp_path, "image-classification")


def test_the_modules_own_dataclasses_work(tmp_path):
    body = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Row:
    value: int
"""
    (tmp_path / "mine.py").write_text(body + PAIR + "def data(): return pair()")
    assert len(read(tmp_path).train)


def test_a_file_that_fails_leaves_no_module_behind(tmp_path):
    write(tmp_path, "raise RuntimeError('early')")
    before = set(sys.modules)
    with pytest.raises(DataError, match=r"mine\.py:data: .* raised RuntimeError: early"):
        read(tmp_path)
    assert not [name for name in set(sys.modules) - before if "user" in name]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", r"expected a function 'data' in mine\.py, got none"),
        ("data = 3", r"expected a function 'data' in mine\.py, got none"),
        ("def data(): return 1 / 0", r"mine\.py:data: .* raised ZeroDivisionError: division by"),
        ("def data(x): return x", r"mine\.py:data: .* raised TypeError"),
        ("def data(", r"mine\.py:data: .* raised SyntaxError"),
        ("import nothing_of_that_name", r"raised ModuleNotFoundError: No module named"),
        ("def data(): return None", r"mine\.py:data: expected \(x, y\), got NoneType"),
        ("def data(): return pair()[0]", r"expected \(x, y\), got ndarray"),
        ("def data(): return {}", r"expected the splits train and.*, got none"),
        ("def data(): return {'train': pair(), 'dev': pair()}", r"got train, dev"),
        (
            "def data(): return {'train': pair(), 'test': 3}",
            r"data, test: expected \(x, y\), got int",
        ),
        ("def data(): return [[1.0, 2], [3]], [0, 1]", r"x: expected an array of numbers"),
        ("def data(): return [object()] * 4, [0, 1] * 2", r"x: expected numbers, got dtype object"),
        ("def data(): return pair()[0][:5], pair()[1]", r"got 5 samples and 20 labels"),
        ("def data(): exit(7)", r"raised SystemExit: 7"),
    ],
)
def test_functions_that_give_no_data_are_one_sentence(tmp_path, body, message):
    write(tmp_path, body)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.py:data", r"data\.source: expected a Python file, got 'gone\.py'"),
        ("folder.py:data", r"folder\.py: expected a regular file"),
    ],
)
def test_a_missing_file_is_named(tmp_path, source, message):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(DataError, match=message):
        read(tmp_path, source=source)


def test_a_function_takes_no_path(tmp_path):
    write(tmp_path, "def data(): return pair()")
    with pytest.raises(DataError, match=r"data\.train: expected none, got a path"):
        read(tmp_path, train="x.npz")


def test_the_file_and_its_function_import_their_neighbours(tmp_path):
    (tmp_path / "data_parts_early.py").write_text("count = 20\n")
    (tmp_path / "data_parts_late.py").write_text("classes = 2\n")
    body = (
        "from data_parts_early import count\n"
        "def data():\n"
        "    from data_parts_late import classes\n"
        "    return pair(count)[0], np.arange(count) % classes\n"
    )
    write(tmp_path, body)
    path = list(sys.path)
    assert len(read(tmp_path).classes) == 2
    assert sys.path == path
