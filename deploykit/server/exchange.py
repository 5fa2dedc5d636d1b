"""One request and its answer, as ASGI has them."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs

import orjson

from deploykit.server.refusal import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
WholeAnswer = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
MAX_QUERY = 1024
WATCH_AFTER_S = 0.02  # a client that goes away sooner costs less than the watching


class Exchange:
    """A request that is being answered.

    Attributes:
        started: when its head was read, by ``time.perf_counter``.
        method: of the request, in capitals.
        raw_path: percent-encoded, without the query.
        headers: names in lower case; of a repeated one the last.
        request_id: the client's where it is a plain word, else a new one.
        route: what the path means; empty while that is not known.
        model: name and version of the model that answers; empty texts where none does.
        status: of the answer; 499 where the client went away before it.
        is_gone: whether the client went away.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, extra: Mapping[str, str]
    ) -> None:
        self.started = time.perf_counter()
        self.method: str = scope["method"]
        self.raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.receive = receive
        self.route = ""
        self.model = ("", "")
        self.status = 499
        self.sent_bytes = 0
        self.is_gone = False
        self.request_id = self._request_id()
        self._scope, self._send, self._extra = scope, send, extra
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None

    def _request_id(self) -> str:
        given = self.headers.get(b"x-request-id", b"")
        if REQUEST_ID.fullmatch(given):
            return given.decode()
        return f"{random.getrandbits(64):016x}"

    def header(self, name: str) -> str | None:
        """Return a header of the request; None: it has none."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    def query_number(self, name: str, default: int, largest: int) -> int:
        """Return a number from 1 of the query.

        Raises:
            Refusal: 400, it is none, or too large, or given more than once.
        """
        query: bytes = self._scope.get("query_string", b"")
        if not query:
            return default
        if len(query) > MAX_QUERY:
            raise Refusal(400, f"query: expected at most {MAX_QUERY} bytes, got {len(query)}")
        found = parse_qs(query.decode("latin-1"), keep_blank_values=True).get(name)
        if found is None:
            return default
        text = found[0]
        is_number = text.isascii() and text.isdecimal() and len(text) < 10
        if len(found) != 1 or not is_number or not 1 <= int(text) <= largest:
            told = "&".join(found)[:40]
            raise Refusal(400, f"{name}: expected an integer from 1 to {largest}, got {told!r}")
        return int(text)

    async def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send the answer."""
        status, pairs, content = self.answer(status, body, headers)
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": content})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> WholeAnswer:
        """Note the answer, and return it as it is sent."""
        self.status, self.sent_bytes = status, len(body)
        told = {**self._extra, **headers, "x-request-id": self.request_id}
        if status != 204:
            told["content-length"] = str(len(body))
        pairs = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in told.items()]
        return status, pairs, b"" if self.method == "HEAD" else body

    async def send_json(self, value: Any, status: int = 200) -> None:
        """Send a JSON value."""
        await self.send(status, orjson.dumps(value), {"content-type": "application/json"})

    async def refuse(self, refusal: Refusal) -> None:
        """Send a refusal."""
        await self.send(*_told(refusal))

    def refused(self, refusal: Refusal) -> WholeAnswer:
        """Note a refusal, and return it as it is sent."""
        return self.answer(*_told(refusal))

    def watch(self) -> None:
        """Cancel the running task when the client goes away; its whole request has been read."""
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(WATCH_AFTER_S, self._begin_watch, task)

    def _begin_watch(self, task: asyncio.Task[Any] | None) -> None:
        self._watch = asyncio.ensure_future(self._wait_until_gone(task))

    async def _wait_until_gone(self, task: asyncio.Task[Any] | None) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        if task is not None:
            task.cancel()

    def stop_watching(self) -> None:
        """End what ``watch`` began."""
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()

    def line(self, seconds: float) -> dict[str, Any]:
        """Return the line of the access log."""
        client = self._scope.get("client") or ("", 0)
        return {
            "time": time.time(),
            "id": self.request_id,
            "client": client[0],
            "method": self.method,
            "path": self.raw_path[:200].decode("ascii", "backslashreplace"),
            "status": self.status,
            "model": self.model[0],
            "version": self.model[1],
            "ms": round(1000 * seconds, 3),
            "bytes": self.sent_bytes,
        }


def _told(refusal: Refusal) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of a refusal; text that no UTF-8 holds is escaped."""
    sentence = refusal.message.encode("utf-8", "backslashreplace").decode()
    headers = {"content-type": "application/json", **refusal.headers}
    return refusal.status, orjson.dumps({"error": sentence}), headers
