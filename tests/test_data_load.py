import json

import numpy as np
import pytest
from data_samples import ARRAYS, everything, labels_of, load, pixels, png, write_parquet

from deploykit.data import dataset_from_arrays
from deploykit.errors import DataError

PICTURES = pixels(40)
PNGS = [png(picture) for picture in PICTURES]


def pair(count=20, seed=0):
    return pixels(count, seed=seed), labels_of(count)


def features(count=20, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3)), labels_of(count)


def test_equal_seeds_give_equal_datasets_and_others_do_not(tmp_path):
    described = [load(tmp_path, "digits", seed=seed).describe() for seed in (3, 3, 4)]
    assert described[0] == described[1]
    assert described[0]["splits"]["test"] != described[2]["splits"]["test"]


def test_description_is_json_that_tells_rows_and_counts(tmp_path):
    write_parquet(tmp_path / "train.parquet", PNGS)
    dataset = load(tmp_path, "parquet", train="train.parquet", validation=0.2, test=0.2)
    described = json.loads(json.dumps(dataset.describe()))
    assert described["classes"] == ["0", "1"]
    assert described["preprocess"]["height"] == 6
    assert described["splits"]["test"]["classes"] == {"0": 4, "1": 4}
    assert described["splits"]["train"]["count"] == 24
    assert described["splits"]["train"]["file"] == "train.parquet"


@pytest.mark.parametrize("change", ["pixel", "label"])
def test_digest_of_a_split_changes_with_its_data(change):
    x, y = pair()
    before = dataset_from_arrays((x, y), pair(8, 1), pair(8, 2)).describe()["splits"]
    x, y = x.copy(), y.copy()
    if change == "pixel":
        x[3, 0, 0, 0] ^= 1
    else:
        y[3] ^= 1
    after = dataset_from_arrays((x, y), pair(8, 1), pair(8, 2)).describe()["splits"]
    assert before["train"]["digest"] != after["train"]["digest"]
    assert before["test"] == after["test"]


def test_splits_of_their_own_files_keep_every_row(tmp_path):
    for name, rows in {"a": slice(0, 20), "b": slice(20, 30), "c": slice(30, 40)}.items():
        write_parquet(tmp_path / f"{name}.parquet", PNGS[rows])
    paths = {"train": "a.parquet", "validation": "b.parquet", "test": "c.parquet"}
    dataset = load(tmp_path, "parquet", **paths)
    assert np.array_equal(everything(dataset.validation), PICTURES[20:30])
    assert np.array_equal(everything(dataset.test), PICTURES[30:])
    assert dataset.warnings == ()
    assert dataset.describe()["splits"]["train"]["rows"] == "0-19"


def test_one_file_of_its_own_leaves_the_other_cut_from_train(tmp_path):
    write_parquet(tmp_path / "a.parquet", PNGS[:20])
    write_parquet(tmp_path / "b.parquet", PNGS[20:])
    settings = {"train": "a.parquet", "validation": "b.parquet", "test": 0.2}
    dataset = load(tmp_path, "parquet", **settings)
    assert [len(split) for split in dataset.splits] == [16, 20, 4]
    assert dataset.test.file == "a.parquet"


def test_identical_images_in_two_splits_are_reported(tmp_path):
    write_parquet(tmp_path / "a.parquet", PNGS[:20])
    again = [png(PICTURES[4], compress_level=0), PNGS[7], *PNGS[22:]]
    write_parquet(tmp_path / "b.parquet", again)
    settings = {"train": "a.parquet", "validation": 0.2, "test": "b.parquet"}
    dataset = load(tmp_path, "parquet", **settings)
    assert sum(int(text.split(" of ")[0]) for text in dataset.warnings) == 2
    assert "b.parquet, row 0 equals a.parquet, row 4" in " ".join(dataset.warnings)


def test_one_file_for_two_splits_is_reported(tmp_path):
    write_parquet(tmp_path / "a.parquet", PNGS)
    dataset = load(tmp_path, "parquet", train="a.parquet", validation="a.parquet", test=0.2)
    assert any("validation samples are also in train" in text for text in dataset.warnings)
    assert any("test samples are also in validation" in text for text in dataset.warnings)


def test_limit_keeps_so_many_rows_of_each_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", PNGS, np.repeat([0, 1], 20))
    write_parquet(tmp_path / "b.parquet", PNGS, np.repeat([0, 1], 20))
    settings = {"train": "a.parquet", "validation": "b.parquet", "test": 0.5, "limit": 12}
    dataset = load(tmp_path, "parquet", **settings)
    assert [len(split) for split in dataset.splits] == [6, 12, 6]
    for split in dataset.splits:
        numbers = [int(split.origin(i).rpartition(" ")[2]) for i in range(len(split))]
        assert np.array_equal(everything(split), PICTURES[numbers])
        assert np.array_equal(split.labels, np.array(numbers) // 20)


def test_limit_decodes_no_other_rows(tmp_path):
    write_parquet(tmp_path / "a.parquet", PNGS)
    dataset = load(tmp_path, "parquet", train="a.parquet", limit=12)
    origins = {split.origin(i) for split in dataset.splits for i in range(len(split))}
    used = [f"a.parquet, row {row}" in origins for row in range(40)]
    spoilt = [image if is_used else b"no image" for image, is_used in zip(PNGS, used, strict=True)]
    write_parquet(tmp_path / "a.parquet", spoilt)
    again = load(tmp_path, "parquet", train="a.parquet", limit=12)
    assert again.describe() == dataset.describe()
    with pytest.raises(DataError, match="and 27 more rows"):
        load(tmp_path, "parquet", train="a.parquet", size=(6, 6), channels=3)


@pytest.mark.parametrize("key", ["validation", "test"])
def test_a_share_of_zero_is_refused(tmp_path, key):
    with pytest.raises(DataError, match=rf"data\.{key}: expected a share above 0 or a file, got 0"):
        load(tmp_path, "digits", **{key: 0.0})


# Arrays from Python.


def test_uint8_pictures_are_images():
    dataset = dataset_from_arrays(pair(), pair(8, 1), pair(8, 2), mean=(0.4, 0.4, 0.4))
    assert dataset.sample_shape == (6, 6, 3)
    assert dataset.preprocess["mean"] == [0.4, 0.4, 0.4]
    assert np.array_equal(everything(dataset.train), pair()[0])


def test_other_arrays_are_features():
    dataset = dataset_from_arrays(features(), features(8, 1), features(8, 2))
    assert dataset.preprocess is None
    assert dataset.sample_shape == (3,)


def test_torch_tensors_are_arrays():
    import torch

    x, y = (torch.from_numpy(part) for part in features())
    dataset = dataset_from_arrays((x, y), features(8, 1), features(8, 2), classes=("a", "b"))
    assert np.allclose(everything(dataset.train), x.numpy())


def test_half_of_validation_is_the_test_split_where_none_is_given():
    dataset = dataset_from_arrays(pair(), pair(12, 1))
    assert [len(split) for split in dataset.splits] == [20, 6, 6]
    assert "half of the validation split became the test split" in dataset.warnings[0]
    rows = np.concatenate([dataset.validation.rows, dataset.test.rows])
    assert sorted(rows.tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([(pair()[0], pair()[1][:5]), pair(8, 1)], r"^train: .*got 20 samples and 5 labels"),
        ([pair(), (pair(8)[0], labels_of(8) + 1)], r"^validation, row 1: label: expected 0 to 1"),
        ([pair(), (pair(8)[0], labels_of(8) * 0), pair(8)], r"^validation split .* none of '1'"),
        ([pair(), features(8)], r"^validation: x: expected images, uint8"),
        ([features(), (features(8)[0][:, :2], labels_of(8))], r"^validation: expected samples of"),
        ([features(), features(0)], r"^validation: expected samples, got none"),
        ([pair(), pair(2)], r"validation: expected at least 2 rows of class '0'"),
    ],
)
def test_arrays_that_do_not_fit_are_one_sentence(arguments, message):
    with pytest.raises(DataError, match=message):
        dataset_from_arrays(*arguments)


def test_the_task_decides_whether_bytes_are_images_or_features(tmp_path):
    np.savez(tmp_path / "a.npz", x=PICTURES, y=labels_of(40))
    dataset = load(tmp_path, "numpy", ARRAYS, train="a.npz")
    assert dataset.preprocess is None
    assert everything(dataset.train).dtype == np.float32
