"""What a client asks, when it asks again, and what it makes of the answers."""

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import numpy as np
import pytest
from tiny_server import Told, by_contract, logits_of, serving, tell, tell_tensors

from deploykit.address import bearer, parse_address
from deploykit.client import AsyncClient, Client, Prediction, Score, ServedModel, calls
from deploykit.client.tensors import DATATYPES, decode_outputs, encode_inputs
from deploykit.errors import DataError, RequestRefused, ServerBusy, ServerError, UsageError

PNG = b"\x89PNG\r\n\x1a\nand so on"
PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
SEEN = Prediction("a", 0.75, (Score("a", 0.75), Score("b", 0.25)))


@pytest.fixture(autouse=True)
def _no_certificates(monkeypatch, tmp_path):
    """Let no client read all the certificates of the world, which takes longer than its test."""
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))


@pytest.fixture(params=["blocking", "asynchronous"])
def ask(request, monkeypatch):
    """Call one method of a client, of both kinds in turn."""
    monkeypatch.setattr(calls, "FIRST_PAUSE_S", 0.001)

    def blocking(url, method, *arguments, client=(), **options):
        with Client(url, **dict(client)) as one:
            return getattr(one, method)(*arguments, **options)

    def asynchronous(url, method, *arguments, client=(), **options):
        async def call():
            async with AsyncClient(url, **dict(client)) as one:
                return await getattr(one, method)(*arguments, **options)

        return asyncio.run(call())

    return {"blocking": blocking, "asynchronous": asynchronous}[request.param]


def answering(*told, then=by_contract):
    """Give these answers, one after the other, and then those of the contract."""
    queue = list(told)

    async def answer(asked):
        return queue.pop(0) if queue else await then(asked)

    return answer


@pytest.fixture
def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# what is asked


def test_image_is_sent_as_it_is_from_bytes_or_a_path(ask, tmp_path):
    file = tmp_path / "digit.png"
    file.write_bytes(PNG)
    with serving() as server:
        for sample in (PNG, file, str(file)):
            assert ask(server.url, "predict", sample) == [SEEN]
        assert {one.body for one in server.asked} == {PNG}
        assert {one.target for one in server.asked} == {"/predict?top=5"}


def test_several_images_go_in_one_request(ask, tmp_path):
    file = tmp_path / "digit.png"
    file.write_bytes(PNG + b"2")
    with serving() as server:
        assert ask(server.url, "predict", [PNG, file]) == [SEEN, SEEN]
        (asked,) = server.asked
    images = [base64.b64decode(one) for one in json.loads(asked.body)["images"]]
    assert images == [PNG, PNG + b"2"]


@pytest.mark.parametrize("array", [PIXELS, PIXELS[0], PIXELS.transpose(0, 2, 1, 3)[::-1]])
def test_array_arrives_as_it_was(ask, array):
    with serving() as server:
        assert ask(server.url, "predict", array) == [SEEN] * (3 if array.ndim == 4 else 1)
        np.testing.assert_array_equal(np.load(io.BytesIO(server.asked[0].body)), array)


def test_model_version_and_top_stand_in_the_path(ask):
    with serving() as server:
        ask(f"{server.url}/", "predict", PNG, model="a b/c", version="1.0", top=2)
        ask(server.url, "predict", PNG, "tiny")
        targets = [one.target for one in server.asked]
    assert targets == ["/predict/a%20b%2Fc/versions/1.0?top=2", "/predict/tiny?top=5"]


def test_paths_lie_below_the_base_of_the_url(ask):
    async def answer(asked):
        return tell([])

    with serving(answer) as server:
        assert ask(f"{server.url}/base/", "models") == []
        assert server.asked[0].target == "/base/v2/repository/index"


def test_version_without_a_model_is_a_mistake(ask):
    with pytest.raises(ValueError, match="version: expected a model beside it"):
        ask("http://127.0.0.1:1", "predict", PNG, version="1.0")


def test_missing_file_is_named(ask, tmp_path):
    with pytest.raises(DataError, match=r"none\.png: cannot be read"):
        ask("http://127.0.0.1:1", "predict", tmp_path / "none.png")


def test_object_array_is_never_pickled(ask):
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        ask("http://127.0.0.1:1", "predict", np.array([object()]))


def test_token_is_shown_with_every_request(ask):
    with serving() as server:
        ask(server.url, "predict", PNG, client={"token": "secret"})
        ask(server.url, "predict", PNG)
        shown = [one.headers.get("authorization") for one in server.asked]
    assert shown == ["Bearer secret", None]


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "naïve"])
def test_unfit_token_is_refused_and_not_told(token):
    with pytest.raises(UsageError, match=r"^token: expected printable ASCII") as refused:
        bearer(token)
    assert not token or token not in str(refused.value)


# tensors


def test_infer_gives_what_the_model_computes(ask):
    with serving() as server:
        for inputs in (PIXELS, {"image": PIXELS}):
            outputs = ask(server.url, "infer", inputs, "tiny")
            assert list(outputs) == ["logits"]
            np.testing.assert_array_equal(outputs["logits"], logits_of(PIXELS))
            assert outputs["logits"].flags.writeable
        assert len(server.asked) == 3  # an array alone asks for the name of the input


def test_an_array_for_several_inputs_is_a_mistake(ask):
    async def answer(asked):
        one = {"datatype": "UINT8", "shape": [-1]}
        return tell({"inputs": [{**one, "name": "a"}, {**one, "name": "b"}]})

    with serving(answer) as server, pytest.raises(ValueError, match="by name"):
        ask(server.url, "infer", PIXELS, "tiny")


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_datatype_keeps_its_numbers(datatype, order):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(DATATYPES[datatype].newbyteorder(order))
    headers, body = encode_inputs({"x": array, "empty": array[:0]})
    length = headers["Inference-Header-Content-Length"]
    told = json.loads(body[: int(length)])
    assert told["inputs"][0]["datatype"] == datatype
    head = json.dumps({"outputs": told["inputs"]}).encode()
    outputs = decode_outputs(str(len(head)), head + body[int(length) :])
    np.testing.assert_array_equal(outputs["x"], array)
    assert outputs["empty"].shape == (0, 3)


def test_outputs_in_json_are_read_too():
    outputs = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[0.5, 1]]}]
    found = decode_outputs(None, json.dumps({"outputs": outputs}).encode())
    np.testing.assert_array_equal(found["x"], np.array([[0.5, 1]], np.float32))


def test_what_the_protocol_has_no_datatype_for_is_refused():
    with pytest.raises(TypeError, match="x: expected an array of BOOL"):
        encode_inputs({"x": np.array(["text"])})


# what is asked again


def drive(steps, replies):
    """Run a call on replies that are given; return the pauses, and what it ended with."""
    pauses, queue = [], list(replies)
    step = next(steps)
    try:
        while True:
            if isinstance(step, calls.Pause):
                pauses.append(step.seconds)
                step = next(steps)
            else:
                step = steps.send(queue.pop(0))
    except StopIteration as done:
        assert queue == []
        return pauses, done.value
    except ServerError as error:
        assert queue == []
        return pauses, error


def reply(status, value=(), **headers):
    request = httpx.Request("POST", "http://host/v2/repository/index")
    headers = {name.replace("_", "-"): one for name, one in headers.items()}
    return httpx.Response(status, json=value, request=request, headers=headers)


@pytest.mark.parametrize("status", [429, 503])
def test_busy_server_is_asked_again(ask, status):
    busy = tell({"error": "full"}, status)
    with serving(answering(busy, busy, busy)) as server:
        assert ask(server.url, "models") == [ServedModel("tiny", "1.0", "READY")]
        assert len(server.asked) == 4


def test_retries_end(ask):
    busy = tell({"error": "the queue is full"}, 429, Retry_After="0")
    with serving(answering(busy, busy, busy)) as server:
        with pytest.raises(ServerBusy, match="429: the queue is full") as gave_up:
            ask(server.url, "models", client={"retries": 2})
        assert len(server.asked) == 3
    assert gave_up.value.status == 429


@pytest.mark.parametrize("status", [301, 400, 404, 408, 500, 504])
def test_no_other_status_is_asked_again(ask, status):
    with serving(answering(tell({"error": "the reason"}, status))) as server:
        with pytest.raises(ServerError, match=f"/predict: {status}: the reason") as refused:
            ask(server.url, "predict", PNG)
        assert len(server.asked) == 1
    assert refused.value.status == status
    assert isinstance(refused.value, RequestRefused) == (400 <= status < 500)


def test_broken_connection_is_not_asked_again(ask):
    with serving(answering(Told(raw=b""))) as server:
        with pytest.raises(ServerError, match="the connection broke"):
            ask(server.url, "predict", PNG)
        assert len(server.asked) == 1


def test_silent_server_is_not_asked_again(ask):
    async def sleep(asked):
        await asyncio.sleep(10)

    with serving(sleep) as server:
        with pytest.raises(ServerError, match="expected an answer in time"):
            ask(server.url, "predict", PNG, client={"timeout_s": 0.1})
        assert len(server.asked) == 1


def test_server_that_starts_late_is_met(ask, free_port, monkeypatch):
    monkeypatch.setattr(calls, "FIRST_PAUSE_S", 0.2)
    done = threading.Event()

    def serve_late():
        time.sleep(0.15)
        with serving(port=free_port):
            done.wait(10)

    thread = threading.Thread(target=serve_late)
    thread.start()
    try:
        patient = {"retries": 20}
        assert ask(f"http://127.0.0.1:{free_port}", "models", client=patient)
    finally:
        done.set()
        thread.join()


def test_nobody_listening_is_told(ask, free_port):
    with pytest.raises(ServerError, match="nobody listens") as alone:
        ask(f"http://127.0.0.1:{free_port}", "predict", PNG)
    assert alone.value.status is None


def test_pause_is_what_the_server_asks_for_and_a_random_share_more():
    busy = reply(429, Retry_After="2")
    pauses, found = drive(calls.models(3), [busy, busy, busy, reply(200, [])])
    assert found == []
    for attempt, pause in enumerate(pauses):
        assert 2 <= pause <= 2 + calls.FIRST_PAUSE_S * 2**attempt
    assert len(set(pauses)) == 3


def test_pauses_grow_to_a_cap(monkeypatch):
    monkeypatch.setattr(calls.random, "uniform", lambda low, high: high)
    busy = reply(503)
    pauses, _ = drive(calls.models(8), [busy] * 8 + [reply(200, [])])
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_date_to_retry_after_is_understood(monkeypatch):
    monkeypatch.setattr(calls.random, "uniform", lambda low, high: 0)
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    for asked, low, high in ((later, 28, 30), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("?", 0, 0)):
        (pause,), _ = drive(calls.models(1), [reply(503, Retry_After=asked), reply(200, [])])
        assert low <= pause <= high


def test_server_that_asks_for_too_long_a_pause_is_not_waited_for():
    pauses, error = drive(calls.models(3), [reply(503, {"error": "later"}, Retry_After="3600")])
    assert pauses == []
    assert isinstance(error, ServerBusy)
    assert error.retry_after_s == 3600


# what answers mean


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (tell({"ready": True}), True),
        (tell({"error": "draining"}, 503), False),
        (Told(raw=b""), False),
    ],
)
def test_readiness_is_asked_once(ask, told, expected):
    with serving(answering(told)) as server:
        assert ask(server.url, "ready") is expected
        assert len(server.asked) == 1


def test_who_is_no_server_of_deploykit_is_not_unready_but_wrong(ask, free_port):
    assert ask(f"http://127.0.0.1:{free_port}", "ready") is False
    with serving() as server, pytest.raises(RequestRefused, match="404"):
        ask(f"{server.url}/elsewhere", "ready")


@pytest.mark.parametrize(
    ("method", "arguments", "told"),
    [
        ("predict", (PNG,), Told(200, b"<html>")),
        ("predict", (PNG,), tell({"answer": 1})),
        ("predict", (PNG,), tell({"predictions": [{"label": "a"}]})),
        ("models", (), tell([1])),
        ("metadata", ("tiny",), tell({"inputs": [{"name": "x"}]})),
        ("infer", ({"image": PIXELS}, "tiny"), tell({})),
        ("infer", ({"image": PIXELS}, "tiny"), Told(200, b"\xff\xfe")),
        (
            "infer",
            ({"image": PIXELS}, "tiny"),
            Told(200, b"{}", {"Inference-Header-Content-Length": "x"}),
        ),
    ],
)
def test_answer_that_is_none_is_told(ask, method, arguments, told):
    with (
        serving(answering(told)) as server,
        pytest.raises(ServerError, match="expected an answer of deploykit"),
    ):
        ask(server.url, method, *arguments)


@pytest.mark.parametrize(
    "alter",
    [
        lambda head, body: (head, body + b"\0"),
        lambda head, body: (head, body[:-1]),
        lambda head, body: (head.replace(b"[3, 3]", b"[3, 4]"), body),
        lambda head, body: (head.replace(b"FP32", b"BF16"), body),
        lambda head, body: (head.replace(b"36", b"-6"), body),
    ],
)
def test_tensors_that_do_not_fit_are_refused(alter):
    told = tell_tensors({"logits": ("FP32", logits_of(PIXELS))})
    cut = int(told.headers["Inference-Header-Content-Length"])
    assert decode_outputs(str(cut), told.body)
    head, body = alter(told.body[:cut], told.body[cut:])
    with pytest.raises((ValueError, KeyError)):
        decode_outputs(str(len(head)), head + body)


def test_many_calls_of_an_asynchronous_client_run_at_once():
    async def slowly(asked):
        await asyncio.sleep(0.05)
        return await by_contract(asked)

    async def ask_all(url):
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.predict(PNG) for _ in range(8)))

    with serving(slowly) as server:
        assert asyncio.run(ask_all(server.url)) == [[SEEN]] * 8
        assert server.at_once > 1


def test_both_clients_have_the_same_methods():
    def methods(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)


def test_client_loads_neither_torch_nor_onnxruntime():
    code = "import deploykit.client, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "onnxruntime", "bentoml", "pydantic"})
    assert {"httpx", "numpy"} <= loaded


# addresses


@pytest.mark.parametrize(
    ("url", "host", "port", "base"),
    [
        ("http://localhost", "localhost", 80, ""),
        ("https://host.example/", "host.example", 443, ""),
        ("http://127.0.0.1:3000/a/b/", "127.0.0.1", 3000, "/a/b"),
        ("http://[::1]:8080", "::1", 8080, ""),
    ],
)
def test_address_is_taken_apart(url, host, port, base):
    found = parse_address(url)
    assert (found.host, found.port, found.base) == (host, port, base)
    assert found.url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:3000",
        "ftp://host",
        "http://",
        "http://host:x",
        "http://host:99999",
        "http://[::1",
        "http://a b",
        "http://a\nb",
        "http://me:pw@host",
        "http://h?a=1",
        "http://h#a",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError, match=r"^url: expected http://HOST:PORT"):
        parse_address(url)
