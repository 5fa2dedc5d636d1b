import io

import numpy as np
import pytest
from data_samples import everything, load, pixels, png, write_parquet
from PIL import Image

from deploykit.data import images
from deploykit.errors import DataError
from deploykit.runtime import check_preprocess, decode_image

PICTURES = pixels(20, 6, 9)
PNGS = [png(picture) for picture in PICTURES]


def read(base, **settings):
    return load(base, "parquet", train="train.parquet", **settings)


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(PICTURES[0]), "JPEG", exif=exif)


GREY_16 = Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 1000)


@pytest.mark.parametrize(
    ("first", "shape"),
    [
        (png(PICTURES[0]), (6, 9, 3)),
        (png(PICTURES[0], "JPEG"), (6, 9, 3)),
        (turned(), (9, 6, 3)),
        (png(PICTURES[0][..., :1]), (6, 9, 1)),
        (encode(GREY_16), (6, 9, 1)),
        (encode(Image.fromarray(PICTURES[0]).convert("RGBA")), (6, 9, 3)),
        (encode(Image.fromarray(PICTURES[0]).convert("LA")), (6, 9, 1)),
        (encode(Image.fromarray(PICTURES[0]).convert("1")), (6, 9, 1)),
        (encode(Image.fromarray(PICTURES[0]).convert("P")), (6, 9, 3)),
        (encode(Image.fromarray(PICTURES[0]).convert("CMYK"), "JPEG"), (6, 9, 3)),
    ],
)
def test_size_and_channels_are_those_of_the_first_image(tmp_path, first, shape):
    write_parquet(tmp_path / "train.parquet", [first, *PNGS[1:]])
    dataset = read(tmp_path)
    assert dataset.sample_shape == shape
    assert everything(dataset.train).shape[1:] == shape


def test_pixels_are_those_of_the_deployed_decoder(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(p, "JPEG") for p in PICTURES])
    resize = {"filter": "bicubic", "antialias": False, "fit": "cover"}
    dataset = read(tmp_path, size=(4, 5), channels=1, resize=resize)
    for split in dataset.splits:
        for index, image in enumerate(everything(split)):
            assert np.array_equal(image, decode_image(split.raw(index), dataset.preprocess))


def test_preprocess_is_one_that_the_runtime_follows(tmp_path):
    write_parquet(tmp_path / "train.parquet", PNGS)
    preprocess = read(tmp_path, normalize={"mean": (0.1, 0.2, 0.3), "std": (0.5,)}).preprocess
    check_preprocess(preprocess)
    assert preprocess["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": {"mean": (0.1, 0.2)}}, r"preprocess\.mean: expected 1 or 3 numbers"),
        ({"normalize": {"std": (0.1, 0.2)}}, r"preprocess\.std: expected 1 or 3 numbers"),
        ({"resize": {"filter": "lanczos", "antialias": False}}, r"lanczos needs true"),
    ],
)
def test_a_preprocess_that_no_runtime_follows_is_refused(tmp_path, settings, message):
    write_parquet(tmp_path / "train.parquet", PNGS)
    with pytest.raises(DataError, match=message):
        read(tmp_path, **settings)


@pytest.mark.parametrize("kept", [0, images.KEPT_BYTES])
def test_pixels_are_the_same_from_memory_and_decoded_anew(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(images, "KEPT_BYTES", kept)
    write_parquet(tmp_path / "train.parquet", PNGS)
    dataset = read(tmp_path)
    samples = dataset.train.samples
    assert (samples.pixels is None) == (kept == 0)
    order = np.arange(len(dataset.train))[::-1]
    assert np.array_equal(dataset.train.load(order), PICTURES[dataset.train.rows[::-1]])
    assert samples.digests[0] == images.digest(PICTURES[0])


def test_a_broken_image_is_named_even_if_pixels_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "KEPT_BYTES", 0)
    write_parquet(tmp_path / "train.parquet", [*PNGS[:19], b"no image"])
    with pytest.raises(DataError, match=r"train\.parquet, row 19: expected a PNG or JPEG"):
        read(tmp_path)


def test_the_first_of_many_broken_images_is_named_whatever_thread_sees_it(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_CHUNK", 3)
    bad = [image if row % 4 == 3 else b"no image" for row, image in enumerate(PNGS)]
    write_parquet(tmp_path / "train.parquet", bad)
    with pytest.raises(DataError, match=r"row 0: .* \(and 14 more rows\)$"):
        read(tmp_path, size=(6, 9), channels=3)


def test_what_load_returns_belongs_to_the_caller(tmp_path):
    write_parquet(tmp_path / "train.parquet", PNGS)
    split = read(tmp_path).train
    everything(split)[:] = 0
    assert np.array_equal(everything(split), PICTURES[split.rows])


def test_a_header_that_claims_too_many_pixels_is_refused(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 10_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    for place in (0, 5):
        rows = [bomb if row == place else image for row, image in enumerate(PNGS)]
        write_parquet(tmp_path / "train.parquet", rows)
        with pytest.raises(DataError, match=rf"row {place}: expected an image of at most"):
            read(tmp_path)


def test_real_photographs_decode_and_split(cifar10):
    settings = {"train": "validation.parquet", "test": "test.parquet", "limit": 300}
    dataset = load(cifar10, "parquet", **settings)
    assert dataset.classes[0] == "airplane"
    assert dataset.classes[-1] == "truck"
    assert dataset.sample_shape == (32, 32, 3)
    assert len(dataset.train) + len(dataset.validation) == len(dataset.test) == 300
    assert np.bincount(dataset.test.labels).min() >= 20
    assert dataset.train.raw(0).startswith(b"\xff\xd8")


@pytest.fixture
def cifar10(pytestconfig):
    folder = pytestconfig.rootpath.parent / "shared" / "data" / "cifar10"
    if not folder.exists():
        pytest.skip("needs CIFAR-10 in ../shared/data/cifar10 beside the checkout")
    return folder
