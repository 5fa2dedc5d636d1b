"""Loads: how they are driven, and that what they tell is what happened."""

import asyncio
import itertools
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_server import METADATA, Told, by_contract, inputs_of, serving, tell

from deploykit.client import Client
from deploykit.errors import ServerError
from deploykit.load import Load, Request, closed_loop, open_loop, run_load
from deploykit.load.command import random_inputs
from deploykit.load.loops import _schedule

GET = Request("GET", "/v2/health/ready")
RIGHT = json.dumps({"ready": True}).encode()


def is_right(body):
    return body == RIGHT


def closed(url, connections=2, seconds=0.1, request=GET, **options):
    return run_load(closed_loop(url, request, connections, seconds, **options))


def opened(url, rate=200, seconds=0.1, request=GET, **options):
    return run_load(open_loop(url, request, rate, seconds, **options))


def after(seconds, then=by_contract):
    async def answer(asked):
        await asyncio.sleep(seconds)
        return await then(asked)

    return answer


def in_turn(*told):
    """Give these answers in turn, for ever."""
    queue = itertools.cycle(told)

    async def answer(asked):
        return next(queue)

    return answer


@pytest.fixture(autouse=True)
def _no_certificates(monkeypatch, tmp_path):
    """Let no client read all the certificates of the world, which takes longer than its test."""
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))


@pytest.fixture
def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# what both loops count


@pytest.mark.parametrize("loop", [closed, opened])
def test_every_request_is_counted_once(loop):
    with serving() as server:
        load = loop(server.url, check=is_right)
        assert load.statuses == {200: len(server.asked)}
    assert (load.errors, load.wrong) == ({}, 0)
    assert len(load.latencies_ms) == load.statuses[200] > 10
    assert load.throughput == load.goodput == load.statuses[200] / load.seconds
    assert 0 < load.percentile(50) <= load.percentile(99) <= load.percentile(100)


@pytest.mark.parametrize("loop", [closed, opened])
def test_wrong_answer_is_counted_as_wrong(loop):
    with serving(in_turn(tell({"ready": True}), tell({"ready": 1}))) as server:
        load = loop(server.url, check=is_right)
    assert load.wrong == load.statuses[200] // 2 > 0
    assert load.goodput == pytest.approx((load.statuses[200] - load.wrong) / load.seconds)


@pytest.mark.parametrize("loop", [closed, opened])
def test_only_answers_of_status_200_are_good_and_have_latencies(loop):
    refuse = tell({"error": "full"}, 429)
    with serving(in_turn(tell({"ready": True}), refuse, refuse)) as server:
        load = loop(server.url, check=is_right)
    assert sum(load.statuses.values()) == len(server.asked)
    assert abs(load.statuses[429] - 2 * load.statuses[200]) <= 2
    assert len(load.latencies_ms) == load.statuses[200]
    assert load.goodput < load.throughput
    assert load.wrong == 0


@pytest.mark.parametrize("loop", [closed, opened])
def test_fault_of_the_check_reaches_the_caller(loop):
    with serving() as server, pytest.raises(ZeroDivisionError):
        loop(server.url, check=lambda body: 1 / 0)


@pytest.mark.parametrize("loop", [closed, opened])
def test_several_requests_are_taken_in_turn(loop):
    requests = [Request("POST", f"/predict?top={i}", {"X-One": str(i)}, b"x" * i) for i in range(3)]
    with serving() as server:
        loop(server.url, request=requests)
        asked = [(one.target[-1], one.headers["x-one"], one.body) for one in server.asked]
    counts = [asked.count((str(i), str(i), b"x" * i)) for i in range(3)]
    assert sum(counts) == len(asked)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("loop", [closed, opened])
def test_load_ends_when_it_is_told_to(loop):
    async def stop_soon(stop):
        await asyncio.sleep(0.1)
        stop.set()

    async def both(url):
        stop = asyncio.Event()
        asked = {closed: (closed_loop, 2), opened: (open_loop, 5)}[loop]
        task = asyncio.create_task(stop_soon(stop))
        load = await asked[0](url, GET, asked[1], 60, stop=stop)
        await task
        return load

    with serving() as server:
        load = run_load(both(server.url))
    assert 0.09 < load.seconds < 5
    assert load.errors == {}


@pytest.mark.parametrize("loop", [closed, opened])
def test_what_is_never_answered_is_given_up_and_counted(loop):
    with serving(after(30)) as server:
        load = loop(server.url, seconds=0.1, patience_s=0.1)
        assert load.errors == {"no answer": len(server.asked)}
    assert load.seconds < 5
    assert load.goodput == 0
    assert np.isnan(load.percentile(50))


# the connection


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "connection closed"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "no Content-Length"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}{}",
            "more bytes than Content-Length says",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP/1.1"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: " + b"x" * 70_000,
            "no end of headers in 65536 bytes",
        ),
    ],
)
def test_broken_answer_is_an_error_and_no_answer(raw, reason):
    async def answer(asked):
        return Told(raw=raw)

    with serving(answer) as server:
        load = closed(server.url, seconds=0.12)
    assert set(load.errors) == {reason}
    assert load.statuses == {}


def test_answer_is_read_however_it_is_cut(monkeypatch):
    real = asyncio.StreamWriter.write

    def write_bytewise(writer, data):
        for begin in range(0, len(data), 3):
            real(writer, data[begin : begin + 3])
            if begin == 0:
                time.sleep(0.001)  # lets the first bytes go alone

    monkeypatch.setattr(asyncio.StreamWriter, "write", write_bytewise)
    with serving() as server:
        load = closed(server.url, check=is_right)
    assert load.statuses[200] > 5
    assert (load.errors, load.wrong) == ({}, 0)


def test_connections_are_kept_and_those_that_the_server_closes_are_opened_anew():
    with serving() as server:
        closed(server.url)
        assert server.connections == 2
    with serving(in_turn(Told(200, RIGHT, {"connection": "x", "Connection": "close"}))) as server:
        load = closed(server.url, check=is_right)
        assert server.connections >= load.statuses[200]
    assert (load.errors, load.wrong) == ({}, 0)


def test_nobody_listening_is_an_error_that_takes_no_core(free_port):
    load = closed(f"http://127.0.0.1:{free_port}", connections=1)
    assert set(load.errors) == {"connection refused"}
    assert load.errors["connection refused"] < 10


def test_line_break_in_a_request_is_refused():
    with pytest.raises(ValueError, match="no line break"):
        closed("http://127.0.0.1:1", request=Request("GET", "/", {"X": "a\r\nB: c"}))


def test_https_is_verified(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
        "-subj /CN=tiny -addext subjectAltName=IP:127.0.0.1"
    )
    files = ["-keyout", key, "-out", certificate]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(context=context) as server:
        refused = closed(server.url, connections=1, seconds=0.05)
        assert len(refused.errors) == 1
        assert "CERTIFICATE_VERIFY_FAILED" in next(iter(refused.errors))
        with Client(server.url, retries=0) as client, pytest.raises(ServerError):
            client.models()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        trusted = closed(server.url, check=is_right)
        with Client(server.url) as client:
            assert client.ready()
    assert trusted.errors == {}
    assert trusted.statuses[200] > 5


# what tells the two loops apart


def test_closed_loop_never_asks_more_at_once_than_it_has_connections():
    with serving(after(0.01)) as server:
        closed(server.url, connections=3)
        assert server.at_once == 3
        assert server.connections == 3
    with serving(after(0.05)) as server:
        opened(server.url, rate=300)
        assert server.at_once > 3  # an open loop does: it does not wait


def stalled_once(seconds):
    """Answer nobody for a while, once, as a server does that was stopped in its work."""
    begun = []

    async def answer(asked):
        begun.append(time.perf_counter())
        await asyncio.sleep(max(0.0, begun[0] + seconds - time.perf_counter()))
        return await by_contract(asked)

    return answer


def test_open_loop_counts_the_wait_of_all_who_came_during_a_stall():
    with serving(stalled_once(0.3)) as server:
        load = opened(server.url, rate=100, seconds=0.4, arrivals="constant")
    assert load.statuses == {200: 39}
    assert sum(load.latencies_ms > 50) >= 20  # those of the first quarter of a second
    assert load.percentile(100) > 250
    with serving(stalled_once(0.3)) as server:
        load = closed(server.url, connections=1, seconds=0.4)
    assert sum(load.latencies_ms > 200) == 1  # a closed loop sees one: the others never came


def test_latencies_grow_when_more_comes_than_the_server_answers():
    lock = asyncio.Lock()

    async def one_by_one(asked):
        async with lock:
            await asyncio.sleep(0.02)
        return await by_contract(asked)

    with serving(one_by_one) as server:
        load = opened(server.url, rate=100, seconds=0.3, arrivals="constant")
    assert load.statuses == {200: 29}
    assert load.latencies_ms[-1] > 200  # 29 answers took 0.58 s, and the last was due at 0.29 s
    assert np.corrcoef(load.latencies_ms, np.arange(29))[0, 1] > 0.9


def test_open_loop_sends_what_its_schedule_says():
    with serving() as server:
        load = opened(server.url, rate=250, seconds=0.2, arrivals="constant")
        assert len(server.asked) == 49
    assert 0.19 < load.seconds < 5
    with serving() as server:
        opened(server.url, rate=250)
        assert len(server.asked) == len(list(_schedule(250, 0.1, "poisson")))


def test_arrivals_are_the_same_each_time_and_random_ones_are_exponential():
    drawn = list(_schedule(1000, 20, "poisson"))
    assert drawn == list(_schedule(1000, 20, "poisson"))
    gaps = np.diff(drawn)
    assert np.mean(gaps) == pytest.approx(0.001, rel=0.03)
    assert np.std(gaps) == pytest.approx(0.001, rel=0.05)
    assert np.std(np.diff(list(_schedule(1000, 20, "constant")))) < 1e-6


def test_who_finds_no_free_connection_is_an_error():
    with serving(after(0.2)) as server:
        load = opened(server.url, rate=100, seconds=0.15, max_connections=2, arrivals="constant")
        assert server.connections == 2
    assert load.statuses == {200: 2}
    assert load.errors == {"no free connection": 12}


def test_open_loop_uses_no_more_connections_than_it_needs():
    with serving() as server:
        opened(server.url, rate=100, seconds=0.2, arrivals="constant")
        assert server.connections <= 3 < len(server.asked)


def test_late_sending_is_told():
    checked = []

    def hold_the_load_up_once(body):
        checked.append(body)
        time.sleep(0.2 if len(checked) == 1 else 0)
        return True

    with serving() as server:
        late = opened(server.url, rate=100, check=hold_the_load_up_once, arrivals="constant")
        assert late.late_ms > 80 > opened(server.url, rate=100, arrivals="constant").late_ms


# the command


def test_command_tells_a_person_in_80_columns(deploykit):
    with serving() as server:
        done = deploykit("bench", "--url", server.url, "--connections", 2, "--seconds", 0.1)
        assert max(one.headers["host"] for one in server.asked) in server.url
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{server.url}/v2/models/tiny/infer"
    begins = [line[:12].strip() for line in lines[1:]]
    assert begins == ["load", "throughput", "goodput", "latency ms", "statuses", "errors"]
    assert "closed loop, 2 connections" in lines[1]
    assert max(map(len, lines)) <= 80


def test_command_tells_a_program_one_object(deploykit):
    with serving() as server:
        done = deploykit("bench", "--url", server.url, "--rate", 100, "--seconds", 0.2, "--json")
        sent = sum(one.target.endswith("/infer") for one in server.asked)
    found = json.loads(done.out)
    assert found["rate"] == 100
    assert found["statuses"] == {"200": sent}
    assert found["errors"] == {}
    assert found["latency_ms"]["p50"] <= found["latency_ms"]["max"]
    assert found["goodput"] == pytest.approx(sent / found["seconds"])


def test_command_sends_one_sample_of_the_same_random_bytes(deploykit):
    with serving() as server:
        for _ in range(2):
            deploykit("bench", "--url", server.url, "--model", "tiny", "--seconds", 0.1)
        bodies = {one.body for one in server.asked if one.target.endswith("/infer")}
        assert len(bodies) == 1
        asked = next(one for one in server.asked if one.target.endswith("/infer"))
    pixels = inputs_of(asked)["image"]
    assert pixels.shape == (1, 2, 2, 1)
    assert len(np.unique(pixels)) > 1


@pytest.mark.parametrize("datatype", ["BOOL", "INT64", "UINT8", "FP16", "FP32", "FP64"])
def test_random_numbers_are_finite_and_of_the_datatype(datatype):
    about = {"inputs": [{"name": "x", "datatype": datatype, "shape": [-1, 50, -1]}]}
    x = random_inputs(about)["x"]
    assert x.shape == (1, 50, 1)
    assert np.all(np.isfinite(x))
    assert x.min() < x.max() <= (255 if datatype == "UINT8" else 1)


def test_input_of_text_asks_for_a_body():
    metadata = {**METADATA, "inputs": [{"name": "x", "datatype": "BYTES", "shape": [-1]}]}
    with pytest.raises(ServerError, match="--body FILE"):
        random_inputs(metadata)


def test_command_sends_a_file_and_the_token(deploykit, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_TOKEN", "secret")
    file = tmp_path / "digit.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    with serving() as server:
        done = deploykit("bench", "--url", server.url, "--body", file, "--seconds", 0.1)
        deploykit("bench", "--url", server.url, "--body", file, "--seconds", 0.1, "--model", "t")
        shown = {one.headers.get("authorization") for one in server.asked}
        sent = {one.target for one in server.asked if one.body == file.read_bytes()}
    assert done.code == 0
    assert shown == {"Bearer secret"}
    assert sent == {"/predict", "/predict/t"}


async def unready(asked):
    if asked.target == "/v2/health/ready":
        return tell({"error": "draining"}, 503)
    return await by_contract(asked)


async def locked(asked):
    return tell({"error": "a token is needed"}, 401)


async def starting(asked):
    return tell({"error": "starting"}, 503)


async def refusing(asked):
    if asked.target.startswith("/predict"):
        return tell({"error": "no image"}, 415)
    return await by_contract(asked)


@pytest.mark.parametrize(
    ("answer", "options", "code", "sentence"),
    [
        (unready, [], 5, "expected a server that is ready"),
        (starting, [], 5, "503: starting"),
        (locked, [], 3, "401: a token is needed"),
        (by_contract, ["--model", "other"], 3, "404: no /v2/models/other"),
        (refusing, ["--body", __file__], 5, "expected answers of status 200, got none"),
        (by_contract, ["--body", "none.png"], 3, "none.png: cannot be read"),
        (by_contract, ["--rate", "0"], 2, "--rate: expected 0 < x"),
        (by_contract, ["--rate", "nan"], 2, "--rate: expected 0 < x"),
        (by_contract, ["--seconds", "inf"], 2, "--seconds: expected more than 0"),
        (by_contract, ["--rate", "5", "--connections", "5"], 2, "--rate and --connections"),
        (by_contract, ["--threads", "2"], 2, "--url and --threads"),
        (by_contract, ["bundle"], 2, "--url and BUNDLE"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(deploykit, answer, options, code, sentence):
    with serving(answer) as server:
        done = deploykit("bench", "--seconds", 0.1, "--url", server.url, *options)
    assert done.code == code
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1
    assert sentence in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "expected BUNDLE or --url URL, got neither"),
        (["bundle", "--rate", "3"], 2, "BUNDLE and --rate"),
        (["bundle", "--body", "x"], 2, "BUNDLE and --body"),
        (["--url", "127.0.0.1:3000"], 2, "url: expected http://HOST:PORT"),
        (["--url", "http://127.0.0.1:1"], 5, "nobody listens"),
    ],
)
def test_bad_use_is_one_sentence(deploykit, arguments, code, sentence):
    done = deploykit("bench", *arguments)
    assert (done.code, done.out) == (code, "")
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


def test_interrupted_command_tells_what_it_measured(request):
    program = [sys.executable, "-c", "from deploykit.cli import main; main()"]
    with serving() as server:
        command = [*program, "bench", "--url", server.url, "--seconds", "60", "--json"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        request.addfinalizer(process.kill)
        deadline = time.monotonic() + 30
        while not any(one.target.endswith("/infer") for one in server.asked):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["statuses"]["200"] > 0
    assert err == "error: bench: stopped by SIGINT; measured until then\n"


def test_load_is_compared_by_no_array():
    one = Load(1.0, np.array([1.0, 2.0]), {200: 2}, {}, 0, 0.0)
    assert one != Load(1.0, np.array([1.0, 2.0]), {200: 2}, {}, 0, 0.0)
