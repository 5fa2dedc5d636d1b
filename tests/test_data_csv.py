import numpy as np
import pytest
from data_samples import ARRAYS, everything, load, pixels, png

from deploykit.errors import DataError

PICTURES = pixels(20)


def write_images(base, lines=None, header="image,label"):
    (base / "images").mkdir(exist_ok=True)
    for row, picture in enumerate(PICTURES):
        (base / "images" / f"{row}.png").write_bytes(png(picture))
    lines = [f"images/{row}.png,{'cat' if row % 2 else 'dog'}" for row in range(20)] + (lines or [])
    (base / "train.csv").write_text("\n".join([header, *lines]) + "\n")


def write_features(base, lines=None, header="a,label,b"):
    rows = [f"{row},{row % 2},{row / 7}" for row in range(20)]
    (base / "train.csv").write_text("\n".join([header, *rows, *(lines or [])]) + "\n")


def read(base, task=None, **settings):
    settings |= {"task": task} if task else {}
    return load(base, "csv", train="train.csv", **settings)


def test_images_are_found_beside_the_file(tmp_path):
    write_images(tmp_path)
    dataset = read(tmp_path)
    assert dataset.classes == ("cat", "dog")
    for split in dataset.splits:
        assert np.array_equal(everything(split), PICTURES[split.rows])
        assert split.origin(0) == f"train.csv, line {split.rows[0] + 2}"


def test_every_column_but_the_label_is_a_feature(tmp_path):
    write_features(tmp_path)
    dataset = read(tmp_path, ARRAYS)
    assert dataset.sample_shape == (2,)
    rows = dataset.train.rows
    expected = np.stack([rows, rows / 7], axis=1).astype(np.float32)
    assert np.array_equal(everything(dataset.train), expected)
    assert np.array_equal(dataset.train.labels, rows % 2)


def test_spaces_quotes_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    rows = [f' {row} , "{row % 2}" ,{row}' for row in range(20)]
    text = "\ufeffa, label ,b\r\n" + "\r\n\r\n".join(rows) + "\r\n\r\n"
    (tmp_path / "train.csv").write_text(text.replace(' "', '"').replace('" ', '"'))
    dataset = read(tmp_path, ARRAYS)
    assert dataset.sample_shape == (2,)
    assert dataset.train.origin(0) == f"train.csv, line {2 * dataset.train.rows[0] + 2}"


def test_numbers_are_names_where_the_classes_are_called_so(tmp_path):
    lines = [f"{row},{'7' if row % 2 else '3'}" for row in range(20)]
    (tmp_path / "train.csv").write_text("\n".join(["a,label", *lines]))
    dataset = read(tmp_path, ARRAYS, classes=("7", "3"))
    assert np.array_equal(dataset.train.labels, 1 - dataset.train.rows % 2)
    with pytest.raises(DataError, match=r"expected a sample of every class, got none of '0'"):
        read(tmp_path, ARRAYS)


@pytest.mark.parametrize(
    ("write", "task", "settings", "message"),
    [
        (
            write_images,
            None,
            {"label_column": "y"},
            r"expected a column 'y', got image, label; set",
        ),
        (write_images, None, {"image_column": "y"}, r"a column 'y'.*set data\.image_column"),
        (write_features, None, {}, r"expected a column 'image', got a, label, b"),
        (write_images, ARRAYS, {}, r"line 2: expected finite.*'images/0.png' in column 'image' .a"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, write, task, settings, message):
    write(tmp_path)
    with pytest.raises(DataError, match=message):
        read(tmp_path, task, **settings)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["images/gone.png,cat"], r"^train\.csv, line 22: image '.*gone\.png' is not a file$"),
        (["no,cat", "no,dog"], r"line 22: image .* is not a file \(and 1 more row\)$"),
        (["images,cat"], r"line 22: image '.*images' is not a file"),
        ([",cat"], r"^train\.csv, line 22: expected a value in column 'image', got none$"),
        (["images/0.png,"], r"^train\.csv, line 22: expected a value in column 'label', got none"),
        (["images/0.png"], r"^train\.csv, line 22: expected 2 cells as in the header, got 1$"),
        (["a,b,c"], r"^train\.csv, line 22: expected 2 cells as in the header, got 3$"),
        (['images/0.png,"cat'], r"^train\.csv: expected a CSV file in UTF-8"),
        (["images/0.png,cow"], r"^train\.csv: expected at least 3 rows of class 'cow'.*got 1$"),
        (["train.csv,cat"], r"^train\.csv, line 22: expected a PNG or JPEG image"),
    ],
)
def test_bad_rows_of_images_are_named_by_their_line(tmp_path, lines, message):
    write_images(tmp_path, lines)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("value", ["nan", "inf", "-Infinity", "", "x", "1e999"])
def test_features_that_are_no_finite_numbers_are_named(tmp_path, value):
    write_features(tmp_path, [f"1,0,{value}", f"{value},1,1"])
    message = rf"^train\.csv, line 22: expected finite numbers, got '{value}' in column 'b' \(and 1"
    with pytest.raises(DataError, match=message):
        read(tmp_path, ARRAYS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected a column 'label', got no header"),
        (b"a,label\n", r"^train\.csv: expected samples, got none"),
        (b"label\n0\n1\n", r"expected columns of features, got only 'label'"),
        (b"a,a,label\n1,2,0\n", r"expected distinct columns, got 'a' twice"),
        (b"\xff\xfe\x00", r"expected a CSV file in UTF-8"),
        (b"a,label\n1,-1\n2,0\n", r"line 2: label: expected classes numbered from 0, got -1"),
        (b"a,label\n1,0\n2," + b"9" * 30, r"line 3: label: expected classes numbered from 0"),
        (b"a,label\n1,\x00\n", r"^train\.csv"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, content, message):
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, ARRAYS)
