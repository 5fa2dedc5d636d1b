import io
import os

import numpy as np
import pytest
from data_samples import ARRAYS, everything, labels_of, load, pixels, write_folder
from PIL import Image

from deploykit.errors import DataError

FEATURES = np.random.default_rng(0).normal(size=(20, 5))


def test_digits_are_grey_images_that_need_no_file(tmp_path):
    from sklearn.datasets import load_digits

    dataset = load(tmp_path, "digits")
    assert dataset.classes == tuple("0123456789")
    assert dataset.sample_shape == (8, 8, 1)
    assert sum(len(split) for split in dataset.splits) == 1797
    images = everything(dataset.train)
    assert images.dtype == np.uint8
    assert images.max() == 255
    assert images.min() == 0
    sixteenths = images[..., 0] * (16 / 255)
    assert np.array_equal(np.rint(sixteenths), load_digits().images[dataset.train.rows])


def test_digits_are_features_for_classification_of_arrays(tmp_path):
    dataset = load(tmp_path, "digits", ARRAYS)
    assert dataset.preprocess is None
    assert dataset.sample_shape == (64,)
    assert everything(dataset.train).max() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "x"}, r"data\.train: expected none, got a path; digits reads no file"),
        ({"test": "x"}, r"data\.test: expected a fraction, got a path; digits reads no file"),
    ],
)
def test_digits_take_no_path(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, "digits", **settings)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.source: expected digits, parquet.*got 'imagenet'"):
        load(tmp_path, "imagenet")


def test_a_source_of_files_needs_a_path(tmp_path):
    with pytest.raises(DataError, match=r"data\.train: expected the path that source numpy reads"):
        load(tmp_path, "numpy")


@pytest.mark.parametrize("key", ["train", "validation", "test"])
def test_a_missing_file_is_named_with_its_key(tmp_path, key):
    write_folder(tmp_path / "here")
    settings = {"train": "here", key: "gone"}
    with pytest.raises(DataError, match=rf"data\.{key}: expected a file or folder, got 'gone'"):
        load(tmp_path, "imagefolder", **settings)


# Folders of images.


def test_folder_names_are_the_classes_and_files_the_samples(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    dataset = load(tmp_path, "imagefolder", train="train")
    assert dataset.classes == ("cat", "dog")
    for split in dataset.splits:
        for index in range(len(split)):
            name = dataset.classes[split.labels[index]]
            assert split.origin(index).startswith(f"train/{name}/")
            file = tmp_path / split.origin(index)
            assert split.raw(index) == file.read_bytes()
            stored = np.asarray(Image.open(file))
            assert np.array_equal(split.load(np.array([index]))[0], stored)


def test_images_may_lie_deeper(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "train" / "cat" / "more").mkdir()
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "more" / "0.png")
    dataset = load(tmp_path, "imagefolder", train="train")
    origins = [s.origin(i) for s in dataset.splits for i in range(len(s))]
    assert "train/cat/more/0.png" in origins


def test_splits_may_have_folders_of_their_own(tmp_path):
    for seed, name in enumerate(("train", "val", "test")):
        write_folder(tmp_path / name, seed=10 * seed)
    dataset = load(tmp_path, "imagefolder", train="train", validation="val", test="test")
    assert [split.file for split in dataset.splits] == ["train", "val", "test"]
    assert [len(split) for split in dataset.splits] == [16, 16, 16]
    assert dataset.warnings == ()


def test_images_of_other_sizes_are_brought_to_one(tmp_path):
    write_folder(tmp_path / "train")
    Image.fromarray(pixels(1, 9, 30)[0]).save(tmp_path / "train" / "dog" / "wide.png")
    assert load(tmp_path, "imagefolder", train="train").sample_shape == (6, 6, 3)
    dataset = load(tmp_path, "imagefolder", train="train", size=(4, 5), channels=1)
    assert everything(dataset.train).shape[1:] == dataset.sample_shape == (4, 5, 1)


def test_a_class_unknown_to_training_is_an_error_with_its_file(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", names=("cat", "cow", "dog"), seed=5)
    message = r"val/cow/0\.png: label: expected one of cat, dog, got 'cow' \(and 7 more rows\)"
    with pytest.raises(DataError, match=message):
        load(tmp_path, "imagefolder", train="train", validation="val")


def test_a_class_absent_from_a_split_is_named(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", names=("cat",), seed=5)
    message = r"validation split \(val\): expected a sample of every class, got none of 'dog'"
    with pytest.raises(DataError, match=message):
        load(tmp_path, "imagefolder", train="train", validation="val")


def spoil(path, kind):
    if kind == "text":
        (path / "cat" / "Thumbs.db").write_bytes(b"not an image")
    elif kind == "empty":
        (path / "cow").mkdir()
    elif kind == "link":
        (path / "cat" / "x.png").symlink_to(path / "gone.png")
    elif kind == "bytes":
        (path / "cat").rename(path / os.fsdecode(b"caf\xe9"))
    elif kind == "flat":
        for folder in ("cat", "dog"):
            (path / folder).rename(path.parent / folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", r"train/cat/Thumbs\.db: expected a PNG or JPEG image, got 12 bytes"),
        ("empty", r"train/cow: expected images of the class, got none"),
        ("link", r"train/cat/x\.png: expected a regular file"),
        ("flat", r"train: expected one folder for each class, got no folder"),
        ("bytes", r"train: expected names of classes in UTF-8, got 'caf\\udce9'; rename it"),
    ],
)
def test_bad_folders_are_one_sentence(tmp_path, kind, message):
    spoil(write_folder(tmp_path / "train"), kind)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "imagefolder", train="train")


def test_a_file_is_no_image_folder(tmp_path):
    (tmp_path / "train").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected a folder with one folder for each class, got a"):
        load(tmp_path, "imagefolder", train="train")


# Numpy.


def save(path, **arrays):
    np.savez(path, **arrays)


def test_npz_and_folder_of_npy_hold_the_same(tmp_path):
    save(tmp_path / "a.npz", x=FEATURES, y=labels_of(20))
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "x.npy", FEATURES)
    np.save(tmp_path / "b" / "y.npy", labels_of(20))
    one, two = (load(tmp_path, "numpy", ARRAYS, train=name) for name in ("a.npz", "b"))
    assert everything(one.train).dtype == np.float32
    np.testing.assert_allclose(everything(one.train), FEATURES[one.train.rows], rtol=1e-6)
    assert np.array_equal(everything(one.train), everything(two.train))
    assert np.array_equal(np.load(io.BytesIO(one.test.raw(0))), everything(one.test)[0])


@pytest.mark.parametrize("shape", [(20, 5, 4), (20, 5, 4, 1), (20, 5, 4, 3)])
def test_numpy_images_are_uint8_with_channels_last(tmp_path, shape):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "a.npz", x=x, y=labels_of(20))
    dataset = load(tmp_path, "numpy", train="a.npz")
    x = x.reshape(20, 5, 4, -1)
    assert dataset.sample_shape == x.shape[1:]
    assert np.array_equal(everything(dataset.train), x[dataset.train.rows])
    assert dataset.train.raw(0).startswith(b"\x89PNG")


def test_numpy_images_are_resized_when_the_recipe_asks(tmp_path):
    save(tmp_path / "a.npz", x=pixels(20), y=labels_of(20))
    dataset = load(tmp_path, "numpy", train="a.npz", size=(3, 3), channels=1)
    assert everything(dataset.train).shape[1:] == (3, 3, 1)


def with_value(row, value):
    x = FEATURES.copy()
    x[row, 2] = value
    return x


Y = labels_of(20)


@pytest.mark.parametrize(
    ("arrays", "task", "message"),
    [
        (
            {"x": FEATURES},
            ARRAYS,
            r"^a\.npz: expected an \.npz file with the arrays x and y.*got no y$",
        ),
        ({}, ARRAYS, r"with the arrays x and y.*got no x$"),
        ({"x": FEATURES, "y": Y[:19]}, ARRAYS, r"got 20 samples and 19 labels"),
        ({"x": FEATURES, "y": Y[:, None]}, ARRAYS, r"y of shape \(n,\), got .* \(20, 1\)"),
        ({"x": with_value(3, np.nan), "y": Y}, ARRAYS, r"^a\.npz, row 3: x: expected finite"),
        ({"x": with_value([3, 5], np.inf), "y": Y}, ARRAYS, r"row 3: .* \(and 1 more row\)$"),
        ({"x": with_value(4, 1e300), "y": Y}, ARRAYS, r"row 4: x: expected numbers that float32"),
        (
            {"x": FEATURES.astype(complex), "y": Y},
            ARRAYS,
            r"x: expected numbers, got dtype complex",
        ),
        ({"x": FEATURES.astype("U"), "y": Y}, ARRAYS, r"x: expected numbers, got dtype <U"),
        ({"x": FEATURES > 0, "y": Y}, ARRAYS, r"x: expected numbers, got dtype bool"),
        ({"x": FEATURES, "y": Y.astype(float)}, ARRAYS, r"y: expected integer class numbers"),
        ({"x": FEATURES, "y": Y.astype(object)}, ARRAYS, r"got objects, which only a pickle"),
        ({"x": FEATURES[:, 0], "y": Y}, ARRAYS, r"expected features of shape \(n, \.\.\.\), got"),
        ({"x": FEATURES[:, :0], "y": Y}, ARRAYS, r"expected features of shape"),
        ({"x": FEATURES[:0], "y": Y[:0]}, ARRAYS, r"^a\.npz: expected samples, got none"),
        ({"x": FEATURES, "y": Y}, None, r"x: expected images, uint8 .*got float64 \(20, 5\)"),
        ({"x": pixels(20)[..., :2], "y": Y}, None, r"x: expected images.*got uint8 \(20, 6, 6, 2"),
        ({"x": pixels(20)[:, :0], "y": Y}, None, r"x: expected images with pixels"),
        ({"x": FEATURES, "y": np.where(Y, 1, -5)}, ARRAYS, r"row 0: label: expected .*got -5"),
    ],
)
def test_bad_arrays_are_one_sentence_with_the_row(tmp_path, arrays, task, message):
    save(tmp_path / "a.npz", **arrays)
    settings = {"task": task} if task else {}
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, "numpy", train="a.npz", **settings)
    assert "\n" not in str(caught.value)


def test_arrays_of_another_shape_in_another_split_are_refused(tmp_path):
    save(tmp_path / "a.npz", x=FEATURES, y=Y)
    save(tmp_path / "b.npz", x=FEATURES[:, :4], y=Y)
    message = r"b\.npz: expected samples of shape \(5,\) as in a\.npz, got \(4,\)"
    with pytest.raises(DataError, match=message):
        load(tmp_path, "numpy", ARRAYS, train="a.npz", test="b.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY", b"text"])
def test_unreadable_numpy_files_are_an_error(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"^a\.npz: expected "):
        load(tmp_path, "numpy", ARRAYS, train="a.npz")


def test_truncated_archives_are_an_error_wherever_they_end(tmp_path):
    save(tmp_path / "a.npz", x=FEATURES, y=Y)
    whole = (tmp_path / "a.npz").read_bytes()
    for end in range(0, len(whole) - 1, max(1, len(whole) // 50)):
        (tmp_path / "a.npz").write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"^a\.npz: "):
            load(tmp_path, "numpy", ARRAYS, train="a.npz")


def test_a_single_array_is_no_source(tmp_path):
    np.save(tmp_path / "x.npy", FEATURES)
    with pytest.raises(DataError, match=r"x\.npy: expected an \.npz file with the arrays x and y"):
        load(tmp_path, "numpy", ARRAYS, train="x.npy")


def test_a_numpy_folder_needs_both_arrays(tmp_path):
    np.save(tmp_path / "x.npy", FEATURES)
    with pytest.raises(DataError, match=r"y\.npy: expected a file, got none"):
        load(tmp_path, "numpy", ARRAYS, train=".")


def test_a_pickle_in_a_numpy_file_is_never_run(tmp_path):
    import pickle  # noqa: TID251  the attack

    canary = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return canary.touch, ()

    (tmp_path / "a.npz").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError, match="only a pickle could hold"):
        load(tmp_path, "numpy", ARRAYS, train="a.npz")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Attack()))  # noqa: S301  the negative control
    assert canary.exists()
