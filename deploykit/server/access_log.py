"""One line of JSON a request, written by a thread of its own: the hot path only puts it in a queue.

Where the reader of the log is slower than the requests come, or does not read at all, lines are
dropped and counted; requests never wait for their log.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import Any

import orjson

from deploykit.server.meters import Meters

MAX_LINES = 10_000
LINES_AT_ONCE = 200


class AccessLog:
    """Lines on standard output."""

    def __init__(self, meters: Meters) -> None:
        self._lost = meters.lost_lines
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._write, name="access log", daemon=True)
        self._thread.start()

    def add(self, line: dict[str, Any]) -> None:
        """Log a request; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost.inc()

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is left, as far as the reader takes it in time."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while True:
            lines = [self._lines.get()]
            while len(lines) < LINES_AT_ONCE and not self._lines.empty():
                lines.append(self._lines.get_nowait())
            told = [orjson.dumps(line) + b"\n" for line in lines if line is not None]
            try:
                _write_all(sys.stdout.fileno(), b"".join(told))
            except (OSError, ValueError):  # the disk is full, the reader is gone: go on without
                self._lost.inc(len(told))
            if None in lines:
                return


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
