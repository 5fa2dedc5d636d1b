"""How a server starts, lives through deaths and swaps, and stops: in real processes."""

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from served import (
    IMPATIENT,
    PROGRAM,
    Server,
    launch,
    lives,
    make_certificate,
    make_other,
    serving,
    wait_until_serving,
    within,
)
from tiny_bundle import make_bundle

from deploykit.server.listener import open_listener
from deploykit.server.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_other(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def image(bundle):
    return (bundle / "golden/000.png").read_bytes()


def read_all(client: socket.socket) -> bytes:
    """Return what comes until the server closes."""
    with client.makefile("rb") as file:
        return file.read()


def put(bundle: Path, place: Path) -> None:
    """Exchange the bundle at a place."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bundle, place)


def test_files_beside_the_user_are_not_run(bundle, image, marks, tmp_path):
    with serving(tmp_path / "s", bundle, program=[PROGRAM[0], "-P", *PROGRAM[1:]]) as server:
        assert server.request("POST", "/predict", image)[0] == 200
    assert list(marks.iterdir()) == []


class Load:
    """Clients that ask without a pause, each over a connection that it keeps.

    Attributes:
        answers: how often each (version, probability) was answered.
        faults: whatever else was answered, and connections that broke.
    """

    def __init__(self, server: Server, image: bytes, clients: int = 8) -> None:
        self.server, self.image = server, image
        self.answers: Counter[tuple[str, float]] = Counter()
        self.faults: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                status, answer = self.server.request("POST", "/predict", self.image)
            except ConnectionRefusedError:
                return
            except OSError as error:
                self.faults[repr(error)] += 1
                continue
            if status == 200:
                best = answer["predictions"][0]
                self.answers[answer["version"], round(best["probability"], 6)] += 1
            else:
                self.faults[f"{status}: {answer}"] += 1


# Workers that die.


@pytest.fixture(scope="module")
def pair(tmp_path_factory, bundle):
    """Two workers, which tests may kill."""
    with serving(tmp_path_factory.mktemp("pair"), bundle, "--workers", 2) as server:
        yield server


def test_start_tells_every_model_and_the_address(pair):
    lines = pair.told().splitlines()
    assert lines[0].startswith("tiny 1.0: CPUExecutionProvider, ")
    assert "thread(s) in each of 2 worker(s)" in lines[0]
    assert lines[1] == f"serving tiny 1.0 on http://127.0.0.1:{pair.port} (docs: /docs)"


def test_killed_worker_is_back_within_three_seconds_and_nothing_else_is_lost(pair, image):
    (first, second), count = pair.workers(), pair.told().count("worker")
    with Load(pair, image) as load:
        os.kill(first, signal.SIGKILL)

        def is_back() -> bool:
            text = pair.request("GET", "/metrics")[1].decode()
            found = [line for line in text.splitlines() if line.startswith("deploykit_model_worke")]
            now = pair.workers()
            return first not in now and len(now) == 2 and found[0].endswith(" 2.0")

        assert within(3, is_back)
        time.sleep(0.3)
    assert second in pair.workers()
    assert first not in pair.workers()
    assert f"worker {0} was killed by SIGKILL; another takes its place" in pair.told()
    assert pair.told().count("worker") == count + 1
    # What the dead one had in work cannot be answered: at most one request of each client.
    assert load.faults.total() <= 8
    assert load.answers.total() > 100


def ignores_signals(process):
    """Whether it has come so far as to leave SIGTERM to its supervisor."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) & 1 << (signal.SIGTERM - 1))


def test_signals_to_workers_alone_change_nothing(pair, image):
    assert within(5, lambda: all(map(ignores_signals, pair.workers())))
    before = pair.workers()
    assert len(before) == 2
    for worker in before:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(worker, number)
    assert pair.request("POST", "/predict", image)[0] == 200
    assert pair.workers() == before


def test_unknown_paths_get_json_and_bentoml_answers_its_own(pair):
    status, answer = pair.request("GET", "/no/such/path")
    assert (status, list(answer)) == (404, ["error"])
    status, answer = pair.request("GET", "/schema.json")
    assert (status, answer["type"]) == (200, "service")


def test_server_stays_with_a_worker_that_cannot_begin(tmp_path, bundle, image):
    """The operator is told; the other worker answers on."""
    with serving(tmp_path, bundle, "--workers", 2) as server:
        (snapshot,) = tmp_path.glob("deploykit-serve-*/start/0")
        shutil.rmtree(snapshot)
        os.kill(server.workers()[0], signal.SIGKILL)
        assert within(5, lambda: server.told().count("found no manifest.json") >= 2)
        assert server.request("POST", "/predict", image)[0] == 200
        assert server.stop() == 143


def test_worker_that_hangs_is_replaced_and_who_asks_meanwhile_is_answered(tmp_path, bundle, image):
    with serving(tmp_path, bundle, program=IMPATIENT) as server:
        (worker,) = server.workers()
        time.sleep(1)  # one that answers is left alone
        assert server.workers() == [worker]
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.1)
        assert within(5, lambda: worker not in server.workers())
        assert server.request("POST", "/predict", image)[0] == 200
        assert "worker 0 hangs and is killed" in server.told()


def is_free(port):
    """Whether a server can listen there."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_killed_supervisor_leaves_no_worker_and_the_port_is_free(tmp_path, bundle):
    with serving(tmp_path, bundle, "--workers", 2) as server:
        workers = server.workers()
        assert len(workers) == 2
        assert all(map(lives, workers))
        server.process.kill()
        assert within(2, lambda: not any(map(lives, workers)))
        assert within(2, lambda: is_free(server.port))
        left = [path.name for path in tmp_path.glob("deploykit-serve-*")]
        assert len(left) == 1
    with serving(tmp_path, bundle) as server:  # the next one clears up
        names = [path.name for path in tmp_path.glob("*deploykit-serve-*")]
        assert len(names) == 1
        assert names != left
        assert server.stop() == 143
    assert list(tmp_path.glob("*deploykit-serve-*")) == []


def test_worker_ends_when_its_supervisor_says_nothing_any_more(tmp_path, bundle):
    """As where the system tells nobody that a parent has died."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open_listener("127.0.0.1", 0) as listener:
        descriptors = (listener.fileno(), theirs.fileno())
        worker = subprocess.Popen(
            [PROGRAM[0], "-m", "deploykit.server.worker", *map(str, (*descriptors, os.getpid()))],
            pass_fds=descriptors,
            env={**os.environ, "DEPLOYKIT_SERVE": Settings(bundles=(str(bundle),)).to_json()},
        )
        theirs.close()
        ours.settimeout(10)
        assert b'"ready"' in ours.recv(999)
        assert worker.poll() is None
        ours.close()
        assert worker.wait(3) == 1


# Stopping.


def test_sigterm_is_seen_as_not_ready_first_and_admitted_requests_are_answered(
    tmp_path, bundle, image
):
    with serving(tmp_path, bundle, "--drain", 0.7, "--grace", 10) as server:
        workers = server.workers()
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            head = f"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: {len(image)}\r\n\r\n"
            slow.sendall(head.encode() + image[:10])
            time.sleep(0.1)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert within(0.5, lambda: server.request("GET", "/v2/health/ready")[0] == 503)
            assert server.request("GET", "/livez")[0] == 200
            assert server.request("POST", "/predict", image)[0] == 200  # still taken
            time.sleep(1.2)
            with pytest.raises(OSError, match=r"refused|timed out"):
                socket.create_connection(("127.0.0.1", server.port), timeout=3).close()
            assert server.process.poll() is None  # it waits for the slow one
            slow.sendall(image[10:])
            answer = read_all(slow)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer
        assert server.process.wait(5) == 143
        assert time.monotonic() - began < 10
        assert server.told().endswith("stopped by SIGTERM; every admitted request was answered\n")
        assert not any(map(lives, workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_under_load_loses_no_request(tmp_path, bundle, image, workers):
    """Each client connects anew for each request, so that some wait at the door at the end."""
    with serving(tmp_path, bundle, "--workers", workers, "--drain", 0.2) as server:
        with Load(server, image) as load:
            time.sleep(0.5)
            assert server.stop() == 143
        assert load.faults == {}
        assert load.answers.total() > 50


def test_requests_that_wait_at_the_door_at_the_end_are_answered(tmp_path, bundle, image):
    head = f"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: {len(image)}\r\n\r\n"
    with serving(tmp_path, bundle, "--drain", 0) as server, ExitStack() as stack:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        address = ("127.0.0.1", server.port)
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(30)
        ]
        for client in clients:
            client.sendall(head.encode() + image)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError, match="timed out"):  # whoever comes now is not let in
            socket.create_connection(address, timeout=0.3).close()
        os.kill(worker, signal.SIGCONT)
        answers = [read_all(client) for client in clients]
        assert [answer[:13] for answer in answers] == [b"HTTP/1.1 200 "] * len(clients)
        assert server.process.wait(5) == 143


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's delayed acknowledgements")
def test_client_amid_its_handshake_at_the_end_is_answered(tmp_path, bundle, image):
    head = f"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: {len(image)}\r\n\r\n"
    with serving(tmp_path, bundle, "--workers", 2, "--drain", 0) as server:
        with socket.socket() as client:
            # The last packet of the handshake waits for the first bytes of the request.
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            client.connect(("127.0.0.1", server.port))
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            client.sendall(head.encode() + image)
            assert read_all(client).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(5) == 143


def test_grace_bounds_how_long_a_request_holds_the_server(tmp_path, bundle):
    with serving(tmp_path, bundle, "--drain", 0, "--grace", 0.5) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n")
            time.sleep(0.1)
            workers, began = server.workers(), time.monotonic()
            assert server.stop(signal.SIGINT) == 130
            assert 0.4 < time.monotonic() - began < 3
        assert "requests were still in work after 0.5 s; raise --grace" in server.told()
        assert not any(map(lives, workers))


def test_second_signal_stops_at_once(tmp_path, bundle):
    with serving(tmp_path, bundle, "--drain", 10) as server:
        workers = server.workers()
        server.process.send_signal(signal.SIGTERM)
        assert within(2, lambda: not server.is_ready())
        began = time.monotonic()
        assert server.stop(signal.SIGTERM) == 143
        assert time.monotonic() - began < 2
        assert not any(map(lives, workers))


# Swaps.


def test_swap_under_load_loses_and_mixes_nothing(tmp_path, bundle, other, image):
    place = tmp_path / "bundle"
    put(bundle, place)
    with serving(tmp_path / "server", place, "--workers", 2) as server:
        with Load(server, image) as load:
            time.sleep(0.3)
            put(other, place)
            assert server.request("POST", "/v2/repository/models/tiny/load") == (200, {})
            # Every worker has confirmed: no old answer comes after this one.
            after = {server.request("POST", "/predict", image)[1]["version"] for _ in range(20)}
            put(bundle, place)
            server.process.send_signal(signal.SIGHUP)
            assert within(5, lambda: "now serving tiny 1.0" in server.told())
            time.sleep(0.2)
        assert after == {"2.0"}
        assert load.faults == {}
        # One answer a version: the models' answers to the image differ.
        assert {version for version, _ in load.answers} == {"1.0", "2.0"}
        assert len({probability for _, probability in load.answers}) == len(load.answers) == 2
        # A worker that dies now is started with what was swapped in last.
        put(other, place)
        server.process.send_signal(signal.SIGHUP)
        assert within(5, lambda: "now serving tiny 2.0" in server.told().split("tiny 1.0 on")[-1])
        before = server.workers()
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        assert within(5, lambda: len(set(server.workers()) - set(before)) == 2)
        assert server.request("POST", "/predict", image)[1]["version"] == "2.0"


def test_corrupt_bundle_leaves_the_old_one_serving_and_its_fault_is_told(
    tmp_path, bundle, other, image
):
    place = tmp_path / "bundle"
    put(bundle, place)
    with serving(tmp_path / "server", place) as server:
        put(other, place)
        model = place / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"?")
        status, answer = server.request("POST", "/v2/repository/models/tiny/load")
        assert status == 400
        assert "differs from its manifest: model.onnx" in answer["error"]
        assert "model.onnx; fetch the bundle again; what was served is served on" in server.told()
        assert server.request("POST", "/predict", image)[1]["version"] == "1.0"
        put(make_other(tmp_path / "named", name="other"), place)  # sound, but of another model
        status, answer = server.request("POST", "/v2/repository/models/tiny/load")
        assert (status, "expected a bundle of tiny" in answer["error"]) == (400, True)
        assert server.request("POST", "/predict", image)[1]["version"] == "1.0"
        put(other, place)  # the same request does swap a bundle that is sound
        assert server.request("POST", "/v2/repository/models/tiny/load")[0] == 200
        assert server.request("POST", "/predict", image)[1]["version"] == "2.0"


# Starts that fail.


def fails(folder: Path, *arguments: object) -> tuple[int, str]:
    """Return the exit code and the last line of a server that does not start."""
    server = launch(folder, *arguments)
    code = server.process.wait(20)
    assert list(folder.glob("*deploykit-serve-*")) == []
    return code, server.told().splitlines()[-1]


def test_port_that_is_taken_is_told_with_a_remedy(tmp_path, bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = fails(tmp_path, bundle, "--port", port)
    assert (code, line) == (
        2,
        f"error: 127.0.0.1:{port}: expected a free port, got: Address already in use; "
        "stop the server that has it, or choose another with --port",
    )


def test_worker_that_cannot_serve_at_start_ends_the_server_with_its_reason(tmp_path, bundle):
    code, line = fails(tmp_path, bundle, "--port", 0, "--workers", 2, "--require-gpu")
    assert code == 5
    assert "--require-gpu" in line


def test_folder_that_is_no_bundle_is_told(tmp_path):
    code, line = fails(tmp_path, tmp_path)
    assert (code, line) == (4, f"error: {tmp_path}: expected a bundle, found no manifest.json")


# Guards.


def test_slow_clients_are_closed_within_ten_seconds(pair, image):
    parts = {
        "silent": b"",
        "head": b"POST /predict HTTP/1.1\r\nhost: a\r\n",
        "body": b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n",
    }
    with ExitStack() as stack:
        clients = {}
        for name, part in parts.items():
            client = socket.create_connection(("127.0.0.1", pair.port), timeout=15)
            clients[name] = stack.enter_context(client)
            client.sendall(part)
        began, answers = time.monotonic(), {}
        for name, client in clients.items():
            answers[name] = read_all(client)
            assert 4 < time.monotonic() - began < 10, name
    assert answers["silent"] == b""
    for name in ("head", "body"):
        assert answers[name].startswith(b"HTTP/1.1 408 ")
        assert b'{"error": "the %s: ' % name.encode() in answers[name]
    assert pair.request("POST", "/predict", image)[0] == 200


def test_token_is_demanded_where_one_is_set(tmp_path, bundle, image):
    file = tmp_path / "token"
    file.write_text("correct-horse\n")
    file.chmod(0o644)
    with serving(tmp_path / "server", bundle, "--token-file", file) as server:
        assert "can be read by others; chmod 600" in server.told()
        assert server.request("POST", "/predict", image)[0] == 401
        wrong = server.request("POST", "/predict", image, authorization="Bearer wrong")
        assert wrong[0] == 401
        right = server.request("POST", "/predict", image, authorization="Bearer correct-horse")
        assert right[0] == 200
        assert server.is_ready()


def test_tls_is_modern_and_serves(tmp_path, bundle):
    cert, key = make_certificate(tmp_path)
    context = ssl.create_default_context(cafile=str(cert))
    with serving(tmp_path, bundle, "--tls-cert", cert, "--tls-key", key) as server:
        assert f"on https://127.0.0.1:{server.port} " in server.told()

        def connect() -> ssl.SSLSocket:
            raw = socket.create_connection(("127.0.0.1", server.port), timeout=5)
            try:
                return context.wrap_socket(raw, server_hostname="localhost")
            except OSError:
                raw.close()
                raise

        with connect() as client:
            assert client.version() == "TLSv1.3"
            client.sendall(b"GET /readyz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert read_all(client).startswith(b"HTTP/1.1 200 ")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with connect() as client:
            assert client.version() == "TLSv1.2"
        context.set_ciphers("AES256-SHA256")  # no forward secrecy
        with pytest.raises(OSError, match=r"(?i)handshake|eof|reset"):
            connect()
        assert server.stop() == 143


def test_tracing_lets_requests_pass_bentoml(tmp_path, bundle, image):
    with serving(tmp_path, bundle, "--tracing") as server:
        assert server.request("POST", "/predict", image)[0] == 200
        assert server.is_ready()
        assert server.request("GET", "/no/such/path")[0] == 404
        assert server.stop() == 143


def test_bentoml_serves_the_service_by_itself(tmp_path, bundle, image):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(PROGRAM[0], "-m", "bentoml", "serve", "deploykit.server.service:service"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            env={
                **os.environ,
                "BENTOML_DO_NOT_TRACK": "True",
                "BENTOML_HOME": str(tmp_path),
                "DEPLOYKIT_BUNDLES": str(bundle),
            },
            cwd=tmp_path,
            stdout=out,
            stderr=out,
        )
    server = Server(process, log, tmp_path, port)
    try:
        assert within(20, server.is_ready), server.told()
        status, answer = server.request("POST", "/predict", image)
        assert (status, answer["model"]) == (200, "tiny")
        assert "deploykit_requests" in server.request("GET", "/metrics")[1].decode()
        assert server.request("POST", "/v2/repository/models/tiny/load")[0] == 400
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def test_python_serves_as_the_command_does(tmp_path, bundle):
    code = (
        "import deploykit, sys\n"
        "from deploykit.errors import Interrupted\n"
        "try:\n"
        f"    deploykit.serve({str(bundle)!r}, port=0, access_log=False, drain=0)\n"
        "except Interrupted as error:\n"
        "    print(error, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([PROGRAM[0], "-c", code], stderr=stderr)
    server = Server(process, log, tmp_path)
    wait_until_serving(server)
    assert server.is_ready()
    assert server.stop(signal.SIGINT) == 0
    assert server.told().endswith("every admitted request was answered False\n")
