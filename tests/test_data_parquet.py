import json

import numpy as np
import pyarrow as pa
import pytest
from data_samples import (
    ARRAYS,
    everything,
    image_column,
    labels_of,
    load,
    pixels,
    png,
    write_folder,
    write_parquet,
)

from deploykit.errors import DataError

PICTURES = pixels(20)
PNGS = [png(picture) for picture in PICTURES]


def read(base, **settings):
    return load(base, "parquet", train="train.parquet", **settings)


def hugging_face(names, column="label"):
    feature = {"names": names, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {column: feature}}})}


def test_pixels_of_every_row_are_the_stored_images(tmp_path):
    write_parquet(tmp_path / "train.parquet", PNGS)
    dataset = read(tmp_path, validation=0.2, test=0.2)
    assert sum(len(split) for split in dataset.splits) == 20
    for split in dataset.splits:
        assert np.array_equal(everything(split), PICTURES[split.rows])
        assert np.array_equal(split.labels, labels_of(20)[split.rows])
        assert split.origin(1) == f"train.parquet, row {split.rows[1]}"
        assert split.raw(0) == PNGS[split.rows[0]]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_bytes_are_images(tmp_path, kind):
    write_parquet(tmp_path / "train.parquet", pa.array(PNGS, kind))
    split = read(tmp_path).train
    assert np.array_equal(everything(split), PICTURES[split.rows])


def test_a_path_stands_in_for_absent_bytes(tmp_path):
    (tmp_path / "one.png").write_bytes(PNGS[3])
    images = image_column([None if i == 3 else p for i, p in enumerate(PNGS)], ["one.png"] * 20)
    write_parquet(tmp_path / "train.parquet", images)
    dataset = read(tmp_path)
    (split,) = (split for split in dataset.splits if 3 in split.rows)
    place = split.rows.tolist().index(3)
    assert np.array_equal(split.load(np.array([place]))[0], PICTURES[3])
    (tmp_path / "one.png").unlink()
    with pytest.raises(DataError, match=r"train\.parquet, row 3: the image cannot be read"):
        read(tmp_path)


def test_columns_can_be_called_otherwise(tmp_path):
    table = pa.table({"img": image_column(PNGS), "fine": labels_of(20)})
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    assert len(read(tmp_path, image_column="img", label_column="fine").classes) == 2


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_names_as_labels_are_classes_in_alphabetical_order(tmp_path, kind):
    labels = pa.array(["zebra", "ant"] * 10, kind)
    write_parquet(tmp_path / "train.parquet", PNGS, labels)
    dataset = read(tmp_path)
    assert dataset.classes == ("ant", "zebra")
    assert np.array_equal(dataset.train.labels, 1 - dataset.train.rows % 2)


def test_dictionary_encoded_labels_are_read(tmp_path):
    labels = pa.array(["zebra", "ant"] * 10).dictionary_encode()
    write_parquet(tmp_path / "train.parquet", PNGS, labels)
    assert read(tmp_path).classes == ("ant", "zebra")


@pytest.mark.parametrize(
    "metadata",
    [
        {"classes": "cat, dog"},
        hugging_face(["cat", "dog"]),
        hugging_face({"0": "cat", "1": "dog"}),
    ],
)
def test_class_names_come_from_the_metadata(tmp_path, metadata):
    write_parquet(tmp_path / "train.parquet", PNGS, metadata=metadata)
    assert read(tmp_path).classes == ("cat", "dog")


def test_the_recipes_class_names_outrank_the_metadata(tmp_path):
    write_parquet(tmp_path / "train.parquet", PNGS, metadata={"classes": "cat,dog"})
    assert read(tmp_path, classes=("x", "y")).classes == ("x", "y")


def test_metadata_about_another_column_is_passed_over(tmp_path):
    write_parquet(tmp_path / "train.parquet", metadata=hugging_face(["a", "b"], "coarse"))
    assert read(tmp_path).classes == ("0", "1")


@pytest.mark.parametrize("metadata", [{"huggingface": "{"}, {"huggingface": "[1]"}])
def test_broken_metadata_is_an_error(tmp_path, metadata):
    write_parquet(tmp_path / "train.parquet", metadata=metadata)
    with pytest.raises(DataError, match=r"train\.parquet: expected class names in the schema's"):
        read(tmp_path)


def test_files_that_order_their_classes_otherwise_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", metadata={"classes": "cat,dog"})
    write_parquet(tmp_path / "other.parquet", metadata={"classes": "dog,cat"})
    with pytest.raises(DataError, match=r"other\.parquet: expected the classes of train\.parquet"):
        read(tmp_path, validation="other.parquet")
    assert read(tmp_path, validation="other.parquet", classes=("a", "b")).classes == ("a", "b")


def test_a_folder_of_files_is_one_split(tmp_path):
    (tmp_path / "all").mkdir()
    write_parquet(tmp_path / "all" / "b.parquet", PNGS[12:], labels_of(8))
    write_parquet(tmp_path / "all" / "a.parquet", PNGS[:12], labels_of(12))
    dataset = load(tmp_path, "parquet", train="all")
    for split in dataset.splits:
        assert np.array_equal(everything(split), PICTURES[split.rows])
        assert [split.origin(i) for i in range(len(split))] == [
            f"all/a.parquet, row {row}" if row < 12 else f"all/b.parquet, row {row - 12}"
            for row in split.rows
        ]


def test_files_of_a_folder_must_agree(tmp_path):
    (tmp_path / "all").mkdir()
    write_parquet(tmp_path / "all" / "a.parquet", metadata={"classes": "cat,dog"})
    write_parquet(tmp_path / "all" / "b.parquet", metadata={"classes": "dog,cat"})
    with pytest.raises(
        DataError, match=r"all/b\.parquet: expected the labels and classes of all/a"
    ):
        load(tmp_path, "parquet", train="all")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "all").mkdir()
    with pytest.raises(DataError, match=r"all: expected \.parquet files in the folder, got none"):
        load(tmp_path, "parquet", train="all")


def broken(**changes):
    rows = {"images": list(PNGS), "labels": labels_of(20), **changes}
    return lambda path: write_parquet(path, **rows)


def with_bad_rows(*rows, value=b"no image"):
    return [value if row in rows else image for row, image in enumerate(PNGS)]


LABELS = labels_of(20).tolist()
CUT_PNG = PNGS[0][: len(PNGS[0]) // 2]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            broken(images=with_bad_rows(7)),
            r"^train\.parquet, row 7: expected a PNG or JPEG image, got 8 bytes[^)]*$",
        ),
        (
            broken(images=with_bad_rows(7, 9, 19)),
            r"^train\.parquet, row 7: expected a PNG or JPEG image.* \(and 2 more rows\)$",
        ),
        (broken(images=with_bad_rows(0)), r"^train\.parquet, row 0: expected a PNG or JPEG"),
        (broken(images=with_bad_rows(5, value=CUT_PNG)), r"row 5: expected.*damaged"),
        (broken(images=with_bad_rows(5, value=b"")), r"row 5: expected a PNG or JPEG image"),
        (
            broken(images=with_bad_rows(4, 6, value=None)),
            r"^train\.parquet, row 4: expected an image in column 'image', got none "
            r"\(and 1 more row\)$",
        ),
        (
            broken(labels=pa.array([*LABELS[:18], None, None])),
            r"^train\.parquet, row 18: expected a label in column 'label', got none \(and 1 more",
        ),
        (
            broken(labels=[*LABELS[:19], -1]),
            r"^train\.parquet, row 19: label: expected classes numbered from 0, got -1",
        ),
        (
            broken(labels=[*LABELS[:19], 2**62]),
            r"^train\.parquet, row 19: label: expected classes numbered from 0, got 4611",
        ),
        (
            broken(labels=[*LABELS[:19], 5], metadata={"classes": "cat,dog"}),
            r"^train\.parquet, row 19: label: expected 0 to 1, got 5$",
        ),
        (
            broken(labels=["cat"] * 19 + ["cow"], metadata={"classes": "cat,dog"}),
            r"^train\.parquet, row 19: label: expected one of cat, dog, got 'cow'$",
        ),
        (broken(labels=[0.5] * 20), r"expected integers or strings in the label.*got double"),
        (broken(labels=[0] * 20), r"^train\.parquet: expected at least 2 classes, got 1"),
        (
            broken(labels=[0, 2] * 10),
            r"train\.parquet.*: expected a sample of every class, got none of '1'",
        ),
        (broken(metadata={"classes": "cat,cat"}), r"expected distinct names, got 'cat' twice"),
        (broken(images=pa.array(range(20))), r"expected bytes or a struct of bytes.*got int64"),
        (
            broken(images=pa.array([], pa.binary()), labels=labels_of(0)),
            r"^train\.parquet: expected .*none",
        ),
        (lambda path: path.write_bytes(b"PAR1 nothing"), r"^train\.parquet: expected a parquet"),
        (lambda path: path.write_bytes(b""), r"^train\.parquet: expected a parquet file"),
        (
            lambda path: path.write_bytes(write_parquet(path).read_bytes()[:-40]),
            r"^train\.parquet: expected a parquet file, got one that cannot be read",
        ),
        (lambda path: None, r"^data\.train: expected a file or folder, got 'train\.parquet'"),
    ],
)
def test_bad_files_are_one_sentence_with_file_and_row(tmp_path, write, message):
    write(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_bytes_raise_nothing_but_our_error(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", PNGS)
    whole = path.read_bytes()
    refused = 0
    for place in range(10, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read(tmp_path)
        except DataError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_missing_column_is_named_with_the_key_to_set(tmp_path, column):
    write_parquet(tmp_path / "train.parquet")
    message = rf"expected one column 'nope', got image, label; set data\.{column}_column"
    with pytest.raises(DataError, match=message):
        read(tmp_path, **{f"{column}_column": "nope"})


def test_a_pipe_is_refused_before_it_blocks(tmp_path):
    import os

    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"expected a regular file"):
        read(tmp_path)


def test_parquet_is_no_source_of_arrays(tmp_path):
    write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"data\.source: .*got parquet, which holds images"):
        read(tmp_path, task=ARRAYS)


def test_a_folder_of_images_is_no_parquet(tmp_path):
    write_folder(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"expected \.parquet files in the folder, got none"):
        read(tmp_path)
