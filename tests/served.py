"""A server of tiny bundles in processes of its own, for tests of how it lives and dies."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper
from tiny_bundle import golden_of, image_model, make_bundle

from deploykit.artifacts import OnnxModel

PROGRAM = [sys.executable, "-c", "from deploykit.cli import main; main()", "serve"]
IMPATIENT = [
    *PROGRAM[:2],
    "from deploykit.server import crew; crew.PING_S, crew.SILENT_PINGS = 0.05, 10; " + PROGRAM[2],
    "serve",
]


def other_model(folder: Path) -> OnnxModel:
    """Return a model that answers otherwise than the tiny one does."""
    folder.mkdir(parents=True, exist_ok=True)
    model = image_model(folder / "other.onnx")
    proto = onnx.load(model.path)
    weight = next(one for one in proto.graph.initializer if one.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), "weight"))
    model.path.write_bytes(proto.SerializeToString())
    return model


def make_other(folder: Path, version: str = "2.0", **changes: Any) -> Path:
    """Write version 2.0 of the tiny bundle, with another model in it."""
    model = other_model(folder / "source")
    return make_bundle(folder, model=model, version=version, golden=golden_of(model), **changes)


def make_certificate(folder: Path, *options: str) -> tuple[Path, Path]:
    """Return the files of a certificate for localhost and its key."""
    folder.mkdir(parents=True, exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-days", "2", "-out", cert, "-keyout", key, *(options or ("-nodes",))),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    log: Path
    folder: Path
    port: int = 0

    def told(self) -> str:
        return self.log.read_text()

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else text
        finally:
            connection.close()

    def is_ready(self) -> bool:
        try:
            return self.request("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def workers(self) -> list[int]:
        return children(self.process.pid)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def children(parent: int) -> list[int]:
    """Return the processes whose parent this is, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, holds: Callable[[], object]) -> bool:
    """Say whether something comes to hold in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.02)
    return bool(holds())


def launch(
    folder: Path, *arguments: object, program: list[str] = PROGRAM, **environment: str
) -> Server:
    """Start `deploykit serve` with its temporary files and its log in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*program, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "TMPDIR": str(folder), **environment},
        )
    return Server(process, log, folder)


def wait_until_serving(server: Server, timeout_s: float = 20) -> None:
    """Wait for the line that tells the address."""

    def told() -> bool:
        found = re.search(r"^serving .* on https?://127\.0\.0\.1:(\d+) ", server.told(), re.M)
        server.port = int(found[1]) if found else 0
        return bool(found) or server.process.poll() is not None

    assert within(timeout_s, told), server.told()
    assert server.port, server.told()


@contextmanager
def serving(
    folder: Path, *arguments: object, program: list[str] = PROGRAM, **environment: str
) -> Iterator[Server]:
    """Run a server at a free port; it is dead at the end."""
    flags = ("--port", 0, "--no-access-log")
    server = launch(folder, *arguments, *flags, program=program, **environment)
    try:
        wait_until_serving(server)
        yield server
    finally:
        server.process.kill()
        server.process.wait()
