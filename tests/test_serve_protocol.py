"""The Open Inference Protocol: what is read, what is refused, what is answered."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_models import array_model, image_model
from tiny_app import only_refuses

from deploykit.server.answers import write_response
from deploykit.server.engine import ModelInfo
from deploykit.server.protocol import DATATYPE_OF, InferRequest, Wanted, parse_request
from deploykit.server.refusal import Refusal

MAX_BATCH = 8
ROWS = array_model("rows", "float32", [2, 3], classes=4)
LABELS = ["nought", "one: 1", "zwei €", "three"]
NAMED = image_model("named", 2, 1, LABELS)
FREE = array_model("free", "float32", [-1, -1])
SAMPLE = [[0.5, -1, 2], [3, 4, 5.25]]
DATATYPES = sorted(DATATYPE_OF)


def tensor(**changes: Any) -> dict[str, Any]:
    """A good input of ROWS; a value of ... takes its key away."""
    good = {"name": "input", "shape": [1, 2, 3], "datatype": "FP32", "data": [SAMPLE]}
    return {key: value for key, value in (good | changes).items() if value is not ...}


def parse(
    *inputs: dict[str, Any], raw: bytes = b"", info: ModelInfo = ROWS, **head: Any
) -> InferRequest:
    text = json.dumps({"inputs": list(inputs or (tensor(),)), **head}).encode()
    return parse_request(text + raw, str(len(text)) if raw else None, info, MAX_BATCH)


def parse_binary(raw: bytes, info: ModelInfo = ROWS, **changes: Any) -> InferRequest:
    size = {"binary_data_size": len(raw)}
    return parse(tensor(data=..., parameters=size, **changes), raw=raw, info=info)


def written(wanted: Wanted, outputs: np.ndarray, info: ModelInfo) -> tuple[dict[str, Any], bytes]:
    """What a client reads: the one output, and the bytes after the JSON."""
    request = InferRequest(outputs, wanted, "an id")
    text, headers = write_response(request, outputs, info)
    size = int(headers.get("inference-header-content-length", len(text)))
    head = json.loads(text[:size])
    assert {key: head[key] for key in ("model_name", "model_version", "id")} == {
        "model_name": info.name,
        "model_version": "1.0",
        "id": "an id",
    }
    (output,) = head["outputs"]
    assert output.get("parameters", {}).get("binary_data_size", 0) == len(text) - size
    return output, text[size:]


def values_of(dtype: str) -> np.ndarray:
    """Both ends of a dtype and what is between, ``(2, 3)``."""
    if dtype == "bool":
        return np.array([[True, False, True], [False, False, True]])
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    return np.array([[limits.min, limits.max, 0], [1, 2, 7]], dtype)


@pytest.mark.parametrize("dtype", DATATYPES)
def test_every_datatype_means_the_same_flat_nested_binary_and_raw(dtype: str) -> None:
    info, values = array_model("m", dtype, [3]), values_of(dtype)
    about = {"datatype": DATATYPE_OF[dtype], "shape": [2, 3]}
    asked = [
        parse(tensor(data=values.tolist(), **about), info=info),
        parse(tensor(data=values.ravel().tolist(), **about), info=info),
        parse_binary(values.tobytes(), info=info, **about),
    ]
    for request in asked:
        assert request.samples.dtype == dtype
        np.testing.assert_array_equal(request.samples, values)
    raw = parse_request(values[:1].tobytes(), "0", info, MAX_BATCH)
    np.testing.assert_array_equal(raw.samples, values[:1])
    assert raw.wanted == Wanted(binary=True)


@pytest.mark.parametrize("dtype", DATATYPES)
def test_every_datatype_comes_back_as_it_was(dtype: str) -> None:
    info, values = array_model("m", dtype, [3]), values_of(dtype)
    output, none = written(Wanted(), values, info)
    assert (output["name"], output["datatype"]) == ("logits", DATATYPE_OF[dtype])
    assert (output["shape"], none) == ([2, 3], b"")
    np.testing.assert_array_equal(np.array(output["data"], dtype).reshape(2, 3), values)
    output, raw = written(Wanted(binary=True), values, info)
    assert "data" not in output
    np.testing.assert_array_equal(np.frombuffer(raw, dtype).reshape(2, 3), values)


@pytest.mark.parametrize("dtype", [one for one in DATATYPES if one != "bool"])
def test_no_number_beyond_its_datatype_is_bent_into_it(dtype: str) -> None:
    is_float = np.dtype(dtype).kind == "f"
    limits = np.finfo(dtype) if is_float else np.iinfo(dtype)
    beyond = [1e308, -1e308] if is_float else [int(limits.max) + 1, int(limits.min) - 1]
    for value in [] if dtype == "float64" else beyond:
        with pytest.raises(Refusal, match=r"expected .* got"):
            parse(
                tensor(datatype=DATATYPE_OF[dtype], shape=[1, 1], data=[value]),
                info=array_model("m", dtype, [1]),
            )


def test_an_integer_may_be_written_as_a_fraction_where_it_is_none() -> None:
    info = array_model("m", "int64", [2])
    about = {"datatype": "INT64", "shape": [1, 2]}
    assert parse(tensor(data=[2.0, -3e2], **about), info=info).samples.tolist() == [[2, -300]]
    for value in (2.5, -0.1, 2.0**53, -(2.0**63)):
        with pytest.raises(Refusal, match="got a fraction"):
            parse(tensor(data=[1, value], **about), info=info)


def test_binary_and_classes_come_only_where_they_are_asked_for() -> None:
    def wanted(outputs: Any = None, **parameters: Any) -> Wanted:
        return parse(outputs=outputs, parameters=parameters).wanted

    def output(**parameters: Any) -> list[dict[str, Any]]:
        return [{"name": "logits", "parameters": parameters}]

    assert wanted() == wanted([]) == wanted([{"name": "logits"}]) == wanted(output()) == Wanted()
    assert wanted(binary_data_output=True) == Wanted(binary=True)
    assert wanted([], binary_data_output=True) == Wanted(binary=True)
    assert wanted([{"name": "logits"}], binary_data_output=True) == Wanted(binary=True)
    assert wanted(output(binary_data=False), binary_data_output=True) == Wanted()
    assert wanted(output(binary_data=True), binary_data_output=False) == Wanted(binary=True)
    assert wanted(output(classification=2)) == Wanted(classification=2)
    assert wanted(output(classification=3, binary_data=True)) == Wanted(True, 3)


def test_classification_tells_value_index_and_label_best_first() -> None:
    logits = np.array([[1, 3, 2, 0], [0, 0, 0, 7.5]], np.float32)
    output, _ = written(Wanted(classification=2), logits, NAMED)
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == [
        "3.000000:1:one: 1",
        "2.000000:2:zwei €",
        "7.500000:3:three",
        "0.000000:0:nought",
    ]
    binary, raw = written(Wanted(binary=True, classification=2), logits, NAMED)
    assert binary["shape"] == [2, 2]
    assert raw == b"".join(
        struct.pack("<I", len(text.encode())) + text.encode() for text in output["data"]
    )


def test_classification_asks_for_no_more_classes_than_there_are() -> None:
    output, _ = written(Wanted(classification=2**31 - 1), np.zeros((1, 4), np.float32), NAMED)
    assert output["shape"] == [1, 4]
    assert len(output["data"]) == 4


def test_classification_of_a_model_without_labels_tells_numbers() -> None:
    many = np.arange(1500, dtype=np.float32)[np.newaxis]
    output, _ = written(Wanted(classification=2), many, array_model("m", "float32", [1], 1500))
    assert output["data"] == ["1499.000000:1499", "1498.000000:1498"]


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float16"])
def test_the_likeliest_class_is_the_largest_of_any_datatype(dtype: str) -> None:
    outputs = np.array([[0, 1, 0]], dtype)
    output, _ = written(Wanted(classification=1), outputs, array_model("m", "uint8", [1]))
    assert output["data"] == ["1.000000:1"]


def test_classes_of_one_sample_never_mix_with_anothers_whatever_the_rank() -> None:
    info = array_model("m", "float32", [1])
    output, _ = written(Wanted(classification=1), np.array([1, 9], np.float32), info)
    assert (output["shape"], output["data"]) == ([2, 1], ["1.000000:0", "9.000000:0"])
    deep = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    output, _ = written(Wanted(classification=1), deep, info)
    assert output["shape"] == [2, 2, 1]
    assert output["data"] == ["2.000000:2", "5.000000:2", "8.000000:2", "11.000000:2"]


def test_id_and_deadline_are_the_clients_own() -> None:
    request = parse(id="a b/ü", parameters={"timeout": 1_500_000, "priority": 3, "unknown": "x"})
    assert (request.id, request.timeout_s) == ("a b/ü", 1.5)
    assert parse().id is parse().timeout_s is parse(parameters={"timeout": 0}).timeout_s is None
    assert parse(parameters={"timeout": 10**18}).timeout_s > 1e9


def test_sizes_that_vary_are_taken_as_they_come() -> None:
    sizes = tensor(shape=[2, 1, 3], data=list(range(6)))
    assert parse(sizes, info=FREE).samples.shape == (2, 1, 3)
    with pytest.raises(Refusal, match=r"free|input: expected a shape, for its sizes may vary"):
        parse_request(bytes(24), "0", FREE, MAX_BATCH)


HUGE = 2**31 - 1
BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"name": "inptu"}, r"inputs\[0\].name: expected 'input', got 'inptu'"),
    "no name": ({"name": ...}, "got None"),
    "a name that is none": ({"name": [[["x"]]]}, "got a list"),
    "another datatype": ({"datatype": "FP64"}, "input.datatype: expected FP32, got 'FP64'"),
    "no datatype": ({"datatype": None}, "expected FP32, got None"),
    "BYTES": ({"datatype": "BYTES", "data": ["a"] * 6}, "expected FP32, got 'BYTES'"),
    "negative size": ({"shape": [1, -2, -3]}, r"input.shape: expected \[-1, 2, 3\], got \[1, -2"),
    "negative batch": ({"shape": [-1, 2, 3]}, "input.shape"),
    "a size that overflows": ({"shape": [2**63, 2, 3]}, "input.shape"),
    "a product that overflows": ({"shape": [HUGE, 2, 3]}, "or a flat list, got"),
    "a 400-digit size": ({"shape": [10**400, 2, 3]}, "body: expected JSON"),
    "a fractional size": ({"shape": [1.0, 2, 3]}, "input.shape"),
    "a boolean size": ({"shape": [True, 2, 3]}, "input.shape"),
    "too few dimensions": ({"shape": [2, 3]}, "input.shape"),
    "too many dimensions": ({"shape": [1, 1, 2, 3]}, "input.shape"),
    "a thousand dimensions": ({"shape": [1] * 1000}, "got a list"),
    "another shape": ({"shape": [1, 3, 2]}, "input.shape"),
    "no shape": ({"shape": ...}, "input.shape"),
    "no sample": ({"shape": [0, 2, 3], "data": []}, "1 to 8 samples, got 0"),
    "nine samples": ({"shape": [9, 2, 3], "data": [SAMPLE] * 9}, "1 to 8 samples, got 9"),
    "one number too few": ({"data": [1] * 5}, r"expected 6 numbers for \[1, 2, 3\], got 5"),
    "one number too many": ({"data": [1] * 7}, "expected 6 numbers"),
    "nested otherwise": ({"data": [[[1, 2], [3, 4], [5, 6]]]}, "or a flat list, got"),
    "ragged": ({"data": [[[1, 2, 3], [4, 5]]]}, "ragged"),
    "half nested": ({"data": [[1, 2, 3], 4, 5, 6]}, "ragged"),
    "nested at the end": ({"data": [1, 2, 3, 4, 5, [6]]}, "got a list"),
    "forty levels": ({"data": json.loads("[" * 40 + "1" + "]" * 40)}, "at most 32 dimensions"),
    "a boolean": ({"data": [1, 2, 3, 4, 5, True]}, "got a boolean"),
    "text": ({"data": [1, 2, 3, 4, 5, "6"]}, "got text"),
    "null": ({"data": [1, 2, 3, 4, 5, None]}, "got null"),
    "an object": ({"data": {"0": 1}}, "got an object"),
    "no data": ({"data": ...}, "expected a list of numbers, got null"),
    "out of range": ({"data": [0, 0, 0, 0, 0, 3.5e38]}, "within float32, got one out of range"),
    "parameters that are none": ({"parameters": [1]}, "input.parameters: expected a JSON object"),
    "shared memory": ({"parameters": {"shared_memory_region": "r"}}, "shared memory"),
    "data twice": ({"parameters": {"binary_data_size": 0}}, "expected data or binary_data_size"),
}
BAD_HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"inputs": []}, "expected a list of one, 'input', got 0 of them"),
    "the input twice": ({"inputs": [tensor(), tensor()]}, "got 2 of them"),
    "inputs that are none": ({"inputs": {"input": 1}}, "got an object"),
    "null": ({"inputs": None}, "got null"),
    "an input that is none": ({"inputs": ["input"]}, r"inputs\[0\]: expected a JSON object"),
    "an id that is none": ({"id": 7}, "id: expected text, got a number"),
    "parameters that are none": ({"parameters": "x"}, "parameters: expected a JSON object"),
    "a flag that is none": ({"parameters": {"binary_data_output": 1}}, "binary_data_output"),
    "a deadline that is none": ({"parameters": {"timeout": -1}}, "timeout: expected micro"),
    "a deadline of true": ({"parameters": {"timeout": True}}, "timeout"),
    "outputs that are none": ({"outputs": "logits"}, "outputs: expected a list, got text"),
    "an unknown output": ({"outputs": [{"name": "x"}]}, "expected 'logits', got 'x'"),
    "the output twice": ({"outputs": [{"name": "logits"}] * 2}, "expected one, 'logits', got 2"),
    "an output that is none": ({"outputs": [None]}, r"outputs\[0\]: expected a JSON object"),
}
BAD_OUTPUTS: dict[str, Any] = {
    "binary_data": "yes",
    "classification": -1,
    "classification ": 1.5,
    "classification  ": True,
    "shared_memory_region": "r",
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_tensor_is_told_where_and_what(case: str) -> None:
    changes, said = BAD_TENSORS[case]
    with pytest.raises(Refusal, match=said) as refused:
        parse(tensor(**changes))
    assert refused.value.status == 400


@pytest.mark.parametrize("case", BAD_HEADS)
def test_a_bad_request_is_told_where_and_what(case: str) -> None:
    changes, said = BAD_HEADS[case]
    with pytest.raises(Refusal, match=said):
        parse(**changes)


@pytest.mark.parametrize("parameter", BAD_OUTPUTS)
def test_a_bad_parameter_of_an_output_is_refused(parameter: str) -> None:
    name = parameter.strip()
    with pytest.raises(Refusal, match="shared memory|" + name):
        parse(outputs=[{"name": "logits", "parameters": {name: BAD_OUTPUTS[parameter]}}])


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"[]", b'"x"', b"1", b"{", b"\xef\xbb\xbf{}", b'{"inputs": "\xff"}'),
        *(b'{"a": NaN}', b'{"a": 1e999}', b'{"a": ' + b"9" * 400 + b"}", b'{"a": "\\ud800"}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b"{}" + b"{}", bytes(8)),
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal, match=r"body: expected JSON, at most|body: expected a JSON obj"):
        parse_request(body, None, ROWS, MAX_BATCH)


def test_of_a_repeated_key_the_last_counts_and_is_checked() -> None:
    good = json.dumps({"inputs": [tensor()]})[1:]
    assert parse_request(b'{"inputs": 7, ' + good.encode(), None, ROWS, 8).samples.shape[0] == 1
    with pytest.raises(Refusal, match="expected a list"):
        parse_request(b"{" + good[:-1].encode() + b', "inputs": 7}', None, ROWS, 8)


@pytest.mark.parametrize(
    "header",
    ["", "-1", "+1", "1.0", "0x10", " 1", "²", "1e1", "99999", "9" * 5000, "1, 1", "one"],
    ids=lambda text: text[:8],
)
def test_a_header_that_is_no_length_of_json_is_refused(header: str) -> None:
    with pytest.raises(Refusal, match="Inference-Header-Content-Length: expected 0 to 40"):
        parse_request(bytes(40), header, ROWS, MAX_BATCH)


@pytest.mark.parametrize("size", [0, 4, 20, 28, 48, 10_000_000])
def test_raw_mode_takes_one_sample_and_nothing_else(size: int) -> None:
    with pytest.raises(Refusal, match=f"expected 24 bytes for .* got {size}"):
        parse_request(bytes(size), "0", ROWS, MAX_BATCH)


def test_binary_data_are_as_long_as_they_say_and_as_the_shape_says() -> None:
    def sent(said: Any, there: int, shape: tuple[int, ...] = (1, 2, 3)) -> None:
        size = {"binary_data_size": said}
        parse(tensor(data=..., shape=list(shape), parameters=size), raw=bytes(there))

    sent(24, 24)
    for said, there in ((24, 25), (24, 23), (23, 23), (25, 25), (0, 24), (-24, 24), (True, 1)):
        with pytest.raises(Refusal, match="input"):
            sent(said, there)
    for said in ("24", 24.0, None, [24], 10**30):
        with pytest.raises(Refusal, match=r"binary_data_size|no bytes after"):
            sent(said, 24)
    with pytest.raises(Refusal, match="expected 48 bytes"):
        sent(24, 24, (2, 2, 3))


def test_bytes_after_json_that_asks_for_none_are_refused() -> None:
    with pytest.raises(Refusal, match="expected no bytes after the JSON, got 3"):
        parse(raw=b"abc")


def test_binary_numbers_are_finite_and_booleans_are_0_or_1() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(Refusal, match="finite"):
            parse_binary(np.array([0, 0, 0, 0, 0, bad], np.float32).tobytes())
    info = array_model("m", "bool", [2])
    with pytest.raises(Refusal, match="0 or 1"):
        parse_binary(b"\1\2", info, datatype="BOOL", shape=[1, 2])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.sampled_from(["name", "shape", "datatype", "data", "parameters", "more"]), JSON)
def test_any_value_anywhere_in_a_tensor_is_read_or_refused(key: str, value: Any) -> None:
    only_refuses(lambda: parse(tensor(**{key: value})))
    only_refuses(lambda: parse(tensor(**{key: value}), info=FREE))


@settings(max_examples=150)
@given(st.sampled_from(["inputs", "outputs", "parameters", "id"]), JSON)
def test_any_value_anywhere_in_a_request_is_read_or_refused(key: str, value: Any) -> None:
    only_refuses(lambda: parse(**{key: value}))
    only_refuses(lambda: parse(outputs=[{"name": "logits", "parameters": {key: value}}]))


@settings(max_examples=150)
@given(st.binary(max_size=64), st.none() | st.text(max_size=4) | st.integers().map(str))
@example(b"[[", "2")
def test_any_bytes_are_read_or_refused(body: bytes, header: str | None) -> None:
    only_refuses(lambda: parse_request(body, header, ROWS, MAX_BATCH))


def test_a_parser_that_stumbles_would_be_noticed() -> None:
    with pytest.raises(KeyError):
        only_refuses(lambda: {}["input"])
    with pytest.raises(AssertionError):
        only_refuses(lambda: (_ for _ in ()).throw(Refusal(500, "ours")))
