"""Servers as processes: started, waited for, watched and ended, with all that they started."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

DEPLOYKIT = str(Path(sys.executable).with_name("deploykit"))
OTHERS = Path(f"{sys.prefix}-servers")
ADDRESS = re.compile(r"serving .* on (https?://\S+)")
START_S, STOP_S = 60.0, 40.0
QUIET = ("--no-access-log",)


@dataclass(frozen=True)
class Usage:
    """What a server and all its processes hold."""

    memory_bytes: int
    descriptors: int
    threads: int


class Server:
    """A running server.

    Attributes:
        process: the first of its processes.
        url: where it answers, without a slash at the end.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self._log = process, url, log

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.partition("://")[2].partition(":")
        return host, int(port)

    @property
    def log(self) -> str:
        """What it has said on standard error."""
        return self._log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """Return its living processes, the first one first."""
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def workers(self) -> set[int]:
        """Return the process numbers of the workers."""
        return {process.pid for process in self.tree() if _is_worker(process)}

    def usage(self) -> Usage:
        """Return what all its processes hold now."""
        found = [(0, 0, 0)]
        for process in self.tree():
            with suppress(psutil.NoSuchProcess), process.oneshot():
                counts = process.num_fds(), process.num_threads()
                found.append((process.memory_info().rss, *counts))
        return Usage(*map(sum, zip(*found, strict=True)))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the first process alone."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it as a person would, and return the exit code."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "deploykit.server.worker" in process.cmdline()
    except psutil.Error:
        return False


@contextmanager
def serving(
    *bundles: Path, flags: Sequence[str] = QUIET, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run `deploykit serve` on a free port until the block ends.

    Args:
        bundles: what it serves.
        flags: of the command.
        env: variables besides those of this process.
    """
    command = [DEPLOYKIT, "serve", *map(str, bundles), "--port", "0", *flags]
    with running(command, ready="/readyz", env=env) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    ready: str,
    url: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends, and leave none of its processes behind.

    Args:
        command: that starts it.
        ready: the path that answers 200 when it is.
        url: where it answers; default: where its standard error says.
        env: variables besides those of this process.

    Raises:
        RuntimeError: it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        log = Path(folder) / "standard-error"
        with log.open("wb") as errors, (Path(folder) / "standard-output").open("wb") as output:
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=output,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        server = Server(process, url or "", log)
        try:
            _await_ready(server, ready)
            yield server
        finally:
            _end(server)


def _await_ready(server: Server, ready: str) -> None:
    stop = time.monotonic() + START_S
    while time.monotonic() < stop and server.process.poll() is None:
        if not server.url and (found := ADDRESS.search(server.log)):
            server.url = found[1].rstrip("/")
        if server.url and status_of(server, ready) == 200:
            return
        time.sleep(0.02)
    words = server.log.strip().splitlines()[-5:]
    raise RuntimeError(f"{server.process.args}: expected a ready server, got: {words}")


def status_of(server: Server, path: str) -> int | None:
    """Return the status of a GET; None where nobody answers."""
    connection = http.client.HTTPConnection(*server.address, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _end(server: Server) -> None:
    """Ask the server to stop; then kill whatever is left of it."""
    tree = server.tree()
    if server.process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            server.stop()
    for process in left_of(tree):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    server.process.wait()


def left_of(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return those of the processes that are still alive."""
    return [one for one in tree if _lives(one)]


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def free_port() -> int:
    """Return a port that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
