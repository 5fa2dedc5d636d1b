"""Bodies: how they are taken in and unpacked, and what samples `/predict` reads out of them."""

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_models import array_model
from served_bodies import (
    FREE,
    IMAGES,
    MAGIC,
    PIXELS,
    PNG,
    ROWS,
    base64_of,
    header,
    jpeg,
    npy,
    progressive,
    read,
)
from tiny_app import only_refuses

from deploykit.server.body import ClientGone, read_body
from deploykit.server.refusal import Refusal
from deploykit.server.samples import kind_of_body

LIMIT = 1000


def received(
    pieces: Iterable[bytes],
    headers: Mapping[str, str] | None = None,
    *,
    whole: bool = True,
    limit: int = LIMIT,
) -> bytes:
    sent = list(pieces)

    async def receive() -> Mapping[str, Any]:
        if not sent:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": sent.pop(0), "more_body": bool(sent) or not whole}

    spelled = {name.encode(): text.encode("latin-1") for name, text in (headers or {}).items()}
    return asyncio.run(read_body(spelled, receive, limit))


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS = {
    "gzip": gzip.compress,
    "x-gzip": lambda data: gzip.compress(data[:3]) + gzip.compress(data[3:]),
    "GZip ": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "identity": bytes,
}


@pytest.mark.parametrize("encoding", PACKERS)
@pytest.mark.parametrize("content", [b"", b"x", b"hello, hello" * 50], ids=len)
def test_a_body_is_the_same_in_whatever_packing_and_pieces(encoding: str, content: bytes) -> None:
    packed = PACKERS[encoding](content)
    headers = {"content-encoding": encoding}
    for pieces in ([packed], bytewise(packed), [b"", packed[:1], b"", packed[1:], b""]):
        assert received(pieces or [b""], headers) == content


def test_a_body_may_be_as_large_as_the_limit_and_not_a_byte_larger() -> None:
    for pack, encoding in ((bytes, "identity"), (gzip.compress, "gzip"), (raw_deflate, "deflate")):
        headers = {"content-encoding": encoding}
        assert len(received([pack(bytes(LIMIT))], headers)) == LIMIT
        with pytest.raises(Refusal, match=r"expected at most 1000 bytes.*--max-body") as refused:
            received([pack(bytes(LIMIT + 1))], headers)
        assert (refused.value.status, refused.value.headers) == (413, {"connection": "close"})


def test_a_body_that_says_it_is_too_large_is_not_waited_for() -> None:
    for length in (str(LIMIT + 1), "9" * 5000):
        with pytest.raises(Refusal, match="--max-body"):
            received([], {"content-length": length})


def test_a_body_that_lies_about_its_length_is_cut_off_all_the_same() -> None:
    with pytest.raises(Refusal, match="got more"):
        received([bytes(600)] * 1000, {"content-length": "10"})


def test_a_packed_bomb_costs_no_more_than_the_limit() -> None:
    bomb, packed = gzip.compress(bytes(30_000_000)), {"content-encoding": "gzip"}

    def most_memory(limit: int) -> int:
        tracemalloc.start()
        try:
            with suppress(Refusal):
                received([bomb], packed, limit=limit)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert most_memory(len(bomb)) < 1_000_000
    assert most_memory(40_000_000) > 30_000_000  # such a bomb it is
    assert received([gzip.compress(bomb)], packed, limit=len(bomb)) == bomb  # unpacked once alone


def test_a_body_of_a_thousand_empty_members_is_refused() -> None:
    member = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + raw_deflate(b"") + bytes(8)
    assert received([member * 1000], {"content-encoding": "gzip"}, limit=30_000) == b""
    with pytest.raises(Refusal, match="damaged"):
        received([member * 1001], {"content-encoding": "gzip"}, limit=30_000)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_damaged_packing_is_refused_wherever_it_is_damaged(encoding: str) -> None:
    packed = PACKERS[encoding](bytes(range(256)))
    damaged = [packed[:end] for end in range(len(packed))] + [packed + b"?", b"no such thing"]
    for at in range(len(packed)):
        broken = bytearray(packed)
        broken[at] ^= 0x55
        damaged.append(bytes(broken))
    told = []
    for data in damaged:
        for pieces in ([data], bytewise(data) or [b""]):
            with suppress(Refusal):
                received(pieces, {"content-encoding": encoding})
                continue
            told.append(data)
    assert len(told) > 1.9 * len(damaged)  # a gzip header has a few bytes that mean nothing


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "x" * 999])
def test_another_packing_is_refused(encoding: str) -> None:
    with pytest.raises(Refusal, match="expected gzip or deflate") as refused:
        received([b""], {"content-encoding": encoding})
    assert refused.value.status == 415


def test_a_client_that_goes_before_its_body_is_whole_has_gone() -> None:
    with pytest.raises(ClientGone):
        received([b"half"], whole=False)


# What a body holds.


SAME = {
    "png": (PNG, ""),
    "png of another type": (PNG, "image/jpeg"),
    "png of any type": (PNG, "Image/*"),
    "png as bytes": (PNG, "application/octet-stream"),
    "png of a form": (PNG, "application/x-www-form-urlencoded; charset=utf-8"),
    "base64": ({"image": base64_of(PNG)}, "application/json"),
    "data url": ({"image": "data:image/png;base64," + base64_of(PNG)}, ""),
    "images": ({"images": [base64_of(PNG)]}, ""),
    "npy": (npy(PIXELS), ""),
    "npy batch": (npy(PIXELS[np.newaxis]), "application/x-npy"),
    "npy in another order": (npy(np.asfortranarray(PIXELS)), ""),
    "npy 2.0": (npy(PIXELS, (2, 0)), ""),
    "sample": ({"inputs": PIXELS.tolist()}, "application/json; charset=utf-8"),
    "batch": ({"inputs": [PIXELS.tolist()]}, "APPLICATION/JSON"),
    "bare numbers": (PIXELS.tolist(), ""),
    "raw": (PIXELS.tobytes(), "application/octet-stream"),
    "raw untold": (PIXELS.tobytes(), ""),
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_a_body_means_the_same_pixels(form: str) -> None:
    body, content_type = SAME[form]
    samples = read(body, content_type)
    assert (samples.dtype, samples.shape) == (np.uint8, (1, 4, 4, 1))
    np.testing.assert_array_equal(samples[0], PIXELS)


@pytest.mark.parametrize("first", [b"{", b"[", b" {", b"\n[", b"\0", b"\x89PNG", b"\x93NUM"])
def test_a_raw_tensor_may_begin_with_any_pixel(first: bytes) -> None:
    raw = (first + PIXELS.tobytes())[:16]
    assert read(raw).tobytes() == read(raw, "application/octet-stream").tobytes() == raw


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data", "image/gif", "a/b/c", "x" * 9999, ";"]
)
def test_another_content_type_is_refused_unless_it_says_nothing(content_type: str) -> None:
    if content_type == ";":
        assert kind_of_body(PNG, content_type) == "image"
        return
    with pytest.raises(Refusal, match="content-type: expected one of image/png") as refused:
        kind_of_body(PNG, content_type)
    assert refused.value.status == 415


def test_numbers_of_any_precision_become_the_models() -> None:
    for dtype in ("float16", "float32", "float64", ">f8", "int8", "uint64", "bool"):
        values = np.array([[0, 1, 1], [1, 0, 1]], dtype)
        np.testing.assert_array_equal(read(npy(values), info=ROWS), values.astype(np.float32))
    assert read({"inputs": [1, 2.5, -3e38]}, info=ROWS).dtype == np.float32
    assert read({"inputs": [[[1, 2]] * 3] * 2}, info=FREE).shape == (2, 3, 2)


BAD: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "expected an image, JSON, .npy or samples of 16 bytes"),
    "one byte": (b"x", "samples of 16 bytes"),
    "a byte too many": (bytes(17), "got 17 bytes"),
    "nine samples": (bytes(9 * 16), "expected 1 to 8 samples, got 9"),
    "an empty object": ({}, "expected one of"),
    "two answers": ({"inputs": [1], "image": "x"}, "expected one of"),
    "another key": ({"instances": [1]}, "got 'instances'"),
    "no sample": ({"inputs": []}, "inputs: expected a sample of shape"),
    "no samples": ({"inputs": [[[[]]]]}, "inputs: expected a sample"),
    "a number": ({"inputs": 7}, "expected a list of numbers, got a number"),
    "another shape": ({"inputs": [[[1]] * 3] * 4}, r"or a batch of them, got \[4, 3, 1\]"),
    "a pixel of 256": ({"inputs": [[[256]] * 4] * 4}, "integers from 0 to 255, got one out"),
    "a pixel of -1": ({"inputs": [[[-1]] * 4] * 4}, "integers from 0 to 255, got one out"),
    "a pixel of 0.5": ({"inputs": [[[0.5]] * 4] * 4}, "got a fraction"),
    "a pixel of true": ({"inputs": [[[True]] * 4] * 4}, "got a boolean"),
    "ten samples": ({"inputs": [[[[1]] * 4] * 4] * 10}, "1 to 8 samples, got 10"),
    "no images": ({"images": []}, "1 to 8 samples, got 0"),
    "nine images": ({"images": ["!"] * 9}, "1 to 8 samples, got 9"),
    "images that are one": ({"images": "abcd"}, "images: expected a list of base64 texts"),
    "an image that is none": ({"images": [base64_of(PNG), 7]}, r"images\[1\]: expected base64"),
    "no base64": ({"image": "!"}, "image: expected base64 text"),
    "no base64 either": ({"image": "ä" * 8}, "image: expected base64 text"),
    "base64 of junk": ({"image": "AAAA"}, "image: expected a PNG or JPEG image"),
    "half an image": (PNG[: len(PNG) // 2], "damaged|truncated"),
    "half a header": (MAGIC, "damaged"),
    "half a jpeg": (jpeg(PIXELS)[:-9], "damaged|truncated"),
    "npy of floats": (npy(PIXELS / 255), "body: expected uint8, got float64"),
    "npy of wider integers": (npy(PIXELS.astype(np.int64)), "expected uint8, got int64"),
    "npy of another shape": (npy(PIXELS[:3]), r"got \[3, 4, 1\]"),
    "npy of one number": (npy(np.uint8(1)), r"got \[\]"),
    "half an npy": (npy(PIXELS)[:-1], "its size is not what its header says"),
    "npy of text": (npy(np.array(["a"] * 16)), "expected uint8, got <U1"),
    "npy of records": (npy(np.zeros(4, [("a", "u1")])), "expected uint8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_body_is_told_what_was_expected_and_what_came(case: str) -> None:
    body, said = BAD[case]
    with pytest.raises(Refusal, match=said) as refused:
        read(body)
    assert refused.value.status == 400


def test_numbers_that_are_none_are_refused_in_every_form() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        values = np.array([[0, 1, bad]], np.float32)
        for body in (npy(values), npy(values.astype(np.float64)), values.tobytes()):
            with pytest.raises(Refusal, match="finite"):
                read(body, info=ROWS)
        with pytest.raises(Refusal, match="expected JSON"):
            read(b'{"inputs": [0, 1, %a]}' % bad, "application/json", ROWS)
    with pytest.raises(Refusal, match="finite"):
        read(npy(np.array([[1e300, 0, 0]])), info=ROWS)
    with pytest.raises(Refusal, match="0 or 1"):
        read(b"\0\1\2", info=array_model("m", "bool", [3]))


def test_an_object_array_is_refused_and_never_loaded() -> None:
    header = npy(np.zeros(2))[:-16].replace(b"'<f8'", b"'|O' ")
    with pytest.raises(Refusal, match=r"expected a \.npy file"):
        read(header + b"cos\nsystem\n(S'id'\ntR.")


def test_a_model_without_image_steps_takes_no_image() -> None:
    for body in (PNG, {"image": base64_of(PNG)}):
        with pytest.raises(Refusal, match="expected an array, for rows takes no images"):
            read(body, info=ROWS)


def test_a_model_of_sizes_that_vary_takes_no_raw_bytes() -> None:
    with pytest.raises(Refusal, match=r"expected .npy or JSON, for the sizes of free vary"):
        read(bytes(8), info=FREE)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=9,
)


@settings(max_examples=150)
@given(st.sampled_from(["inputs", "image", "images", "x"]), VALUES)
def test_any_json_is_read_or_refused(key: str, value: Any) -> None:
    for info in (IMAGES, ROWS, FREE, array_model("m", "int64", [])):
        only_refuses(lambda info=info: read({key: value}, info=info))
        only_refuses(lambda info=info: read([value], "application/json", info))


STARTS = [b"", MAGIC, MAGIC + header(4, 4), b"\xff\xd8\xff\xe0\0\4", b"\x93NUMPY\1\0\x76\0", PNG]


@settings(max_examples=300)
@given(st.sampled_from(STARTS), st.binary(max_size=80))
def test_any_bytes_are_samples_or_refused(start: bytes, rest: bytes) -> None:
    for info in (IMAGES, ROWS, FREE):
        only_refuses(lambda info=info: read(start + rest, info=info))


WHOLE = [PNG, jpeg(PIXELS), progressive(4), npy(PIXELS), npy(np.zeros((1, 3)))]


@settings(max_examples=300)
@given(st.sampled_from(WHOLE), st.data())
def test_any_damage_of_a_good_body_is_read_or_refused(body: bytes, data: st.DataObject) -> None:
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    for info in (IMAGES, ROWS):
        only_refuses(lambda info=info: read(bytes(damaged), info=info))


@given(
    st.text(st.sampled_from("{}[]()'\",:0123456789-L <f84TrueFalsdecrhptno_"), max_size=110),
)
def test_any_header_of_an_array_is_read_or_refused(text: str) -> None:
    body = b"\x93NUMPY\1\0\x76\0" + text.ljust(117).encode() + b"\n" + bytes(12)
    only_refuses(lambda: read(body, info=ROWS))
    only_refuses(lambda: read(body, info=FREE))
