"""Image files that cost more than their bytes: refused before they are decoded."""

import struct
import time

import numpy as np
import pytest
from served_bodies import MAGIC, PIXELS, base64_of, chunk, header, jpeg, progressive, read
from tiny_bundle import png_bytes

from deploykit.server.image_parts import check_parts
from deploykit.server.refusal import Refusal
from deploykit.server.samples import is_quick


def test_pixels_are_counted_before_they_are_decoded() -> None:
    for width, height in ((2**31 - 1, 2**31 - 1), (10**6 + 1, 1), (1, 2**31 - 1)):
        bomb = MAGIC + header(width, height) + chunk(b"IDAT", b"x") + chunk(b"IEND")
        with pytest.raises(Refusal, match=r"at most 1000000 pixels.*--max-pixels"):
            read(bomb)
    with pytest.raises(Refusal, match=r"images\[0\]: .*--max-pixels"):
        read({"images": [base64_of(bomb)]})


def test_a_progressive_image_has_a_bounded_number_of_scans() -> None:
    check_parts(progressive(100), "body")
    assert read(progressive(100)).shape == (1, 4, 4, 1)
    started = time.perf_counter()
    for scans in (101, 200_000):
        with pytest.raises(Refusal, match="body: expected an image file of at most 100 scans"):
            read(progressive(scans))
    assert time.perf_counter() - started < 1


def test_scans_inside_of_segments_and_behind_the_end_are_none() -> None:
    image = jpeg(PIXELS, comment=b"\xff\xda" * 500)
    assert read(image + b"\xff\xda" * 500).shape == (1, 4, 4, 1)


@pytest.mark.parametrize("comment", [b"", b"\xff\xd9", b"\xff\xd9" * 100])
def test_scans_cannot_hide_behind_what_looks_like_the_end(comment: bytes) -> None:
    image = progressive(101)
    hidden = image[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + image[2:]
    with pytest.raises(Refusal, match="100 scans"):
        read(hidden)
    with pytest.raises(Refusal, match="100 scans"):
        read(image.replace(b"\xff\xda", b"\xff\xff\xff\xda"))


def test_a_file_of_ten_thousands_of_parts_is_refused_at_once() -> None:
    picture = MAGIC + header(4, 4) + chunk(b"prVt") * 600_000
    for flood in (picture, b"\xff\xd8" + b"\xff\xe0\0\2" * 2_000_000):
        started = time.perf_counter()
        with pytest.raises(Refusal, match="10000 segments or chunks"):
            read(flood)
        assert time.perf_counter() - started < 1


def test_no_image_is_decoded_after_the_deadline() -> None:
    begun = time.perf_counter()
    images = {"images": [base64_of(png_bytes(PIXELS))] * 8}
    assert len(read(images, deadline=begun + 60)) == 8
    with pytest.raises(Refusal, match="deadline") as refused:
        read(images, deadline=begun)
    assert refused.value.status == 504


def test_what_takes_long_is_never_called_quick() -> None:
    small, large = png_bytes(np.zeros((9, 9), np.uint8)), png_bytes(np.zeros((999, 999), np.uint8))
    twice = MAGIC + header(9, 9) + header(4000, 4000)
    behind = MAGIC + chunk(b"tEXt", b"a\0bcdefghijklmn") + header(4000, 4000)
    for body in (large, twice, behind, jpeg(PIXELS), small + bytes(70_000)):
        assert not is_quick(body, "image")
    spaced = b" " * 99 + b'{"image": ""}'
    escaped = b'{"\\u0069mages": ["A"]}'
    for body in (spaced, escaped, b"[" + b"0," * 40_000 + b"0]"):
        assert not is_quick(body, "json")
    assert is_quick(small, "image")
    assert is_quick(b'{"inputs": [1]}', "json")
