"""HTTP connections that no client can hold: uvicorn's protocol with deadlines and bounds.

A request has to arrive within seconds, an answer has to be read within seconds, and what cannot be
read as HTTP is answered like everything else, as JSON. A connection whose request was answered
before its body had come is closed gently: the client gets to see the answer, the rest is not kept.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from deploykit.server.deadline import Deadline

HEAD_S = 5.0  # from the first byte of a request, and of a connection from its opening
REQUEST_S = 9.0  # from the same moment to the last byte of the body
ANSWER_S = 9.0  # in which a client has to make room for more of an answer
IDLE_S = 65  # longer than pools of clients and balancers keep a connection, so that they close it
LINGER_S = 1.0
MAX_HEAD = 64 * 1024  # bytes of a head, and of trailers
# A request with no other headers has no say in its answer but by its body.
PLAIN = frozenset(
    (
        *(b"host", b"user-agent", b"accept", b"accept-encoding", b"content-type"),
        *(b"content-length", b"connection", b"inference-header-content-length"),
    )
)
MAX_PIPELINED = 64  # requests that wait behind one another on a connection


class State(ServerState):
    """What all connections of a worker share.

    Attributes:
        draining: whether each connection closes with its next answer.
        turn_away: returns the answer (status, headers, body) to a request that finds no place,
            given its ASGI scope, or None where the application is to be asked; None: it always is.
    """

    draining = False

    def __init__(self, turn_away: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.turn_away = turn_away


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head."""
        super().connection_made(transport)
        self.wire = transport
        self.outlet = _Outlet(self, transport, self.loop)
        self.transport = cast(asyncio.Transport, self.outlet)
        self.unparsed = 0  # bytes since the parser last got something whole out of them
        self.deaf = False  # whatever comes is dropped
        self.closing = False
        self.upgrading = False  # whether the head that was parsed asks for another protocol
        self.persistent = False  # whether the request in work leaves the connection open
        self.turned_away: bytes | None = None  # the answer to a request without an application
        self.fault: tuple[int, str] | None = None
        self.incoming = Deadline(self.loop, self._came_too_slowly)
        self.outgoing = Deadline(self.loop, transport.abort)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self.closing = self.deaf = True
        self.incoming.cancel()
        self.outgoing.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    # What comes in.

    def data_received(self, data: bytes) -> None:
        """Parse; what is no HTTP is refused."""
        if self.deaf:
            return
        self._unset_keepalive_if_required()
        if self.incoming.due is None:
            self._expect_request()
        self.unparsed += len(data)
        rest = memoryview(data)
        try:
            while rest:
                rest = self._feed(rest)
        except httptools.HttpParserError as error:
            self._refuse(*(self.fault or (400, _malformed(error))))
            return
        if self.unparsed > MAX_HEAD:
            self._refuse(*_too_large())

    def _feed(self, data: memoryview) -> memoryview:
        """Parse, and return what is left to parse.

        The parser leaves HTTP behind a head that asks for an upgrade. No other protocol is spoken
        here, and a client that offers one (as some do with every request) goes on in this one: so
        its head is parsed again, as if it had not.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
            for name, value in self.headers:
                head += [] if name == b"upgrade" else [name, b": ", value, b"\r\n"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"".join([*head, b"\r\n"]))
            return data[upgrade.args[0] :]
        return data[:0]

    def on_message_begin(self) -> None:
        """Start the clock of a request that came right behind another."""
        super().on_message_begin()
        if self.incoming.due is None:
            self._expect_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers come here too, and nobody reads them."""
        if self.cycle is None or not self.cycle.more_body or self.cycle.scope is not self.scope:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the application begin."""
        self.upgrading = self.parser.should_upgrade()
        if self.upgrading:
            if self.parser.get_method() == b"CONNECT":
                self._fail(400, "method: expected one that asks for a path, got CONNECT")
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD:
            self._fail(*_too_large())
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(400, f"expected at most {MAX_PIPELINED} requests at once on a connection")
        self.unparsed = 0
        self.incoming.set(self.began + REQUEST_S)
        self.turned_away = self._turn_away()
        if self.turned_away is not None:
            return
        super().on_headers_complete()
        # An answer that is earlier than the end of the body closes the connection: where the
        # client stands then, nobody knows.
        self.persistent, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        """Hand on a part of the body."""
        self.unparsed = 0
        if self.turned_away is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock."""
        if self.upgrading:
            return
        self.unparsed = 0
        self.incoming.clear()
        if self.turned_away is not None:
            self.outlet.write(self.turned_away)
            self.turned_away = None
            super().on_response_complete()
            return
        if not self.cycle.response_started:
            self.cycle.keep_alive = self.persistent and not self.server_state.draining  # type: ignore[attr-defined]
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, whose time in the queue was not its client's fault."""
        super().on_response_complete()
        if not self.deaf and self.incoming.due is not None:
            self._expect_request()

    def _turn_away(self) -> bytes | None:
        """Return the answer to a plain request that the server has no place for.

        Under an overload most requests are refused, and what a refusal costs is taken from those
        that are answered. So it is made without a task and without the application, as soon as
        the head is there; whatever is not plain goes the long way.
        """
        state = cast(State, self.server_state)
        idle = (self.cycle is None or self.cycle.response_complete) and not self.pipeline
        if state.turn_away is None or not idle or state.draining:
            return None
        plain = all(name in PLAIN for name, _ in self.headers) and self.parser.should_keep_alive()
        if not plain or b"?" in self.url or self.parser.get_http_version() != "1.1":
            return None
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["raw_path"] = self.url
        answer = state.turn_away(self.scope)
        return None if answer is None else _written(*answer)

    def _expect_request(self) -> None:
        self.began = self.loop.time()
        self.incoming.set(self.began + HEAD_S)

    def _came_too_slowly(self) -> None:
        if self.flow.read_paused:  # it is us who do not read
            self._expect_request()
        elif self.turned_away or (self.cycle is not None and self.cycle.more_body):
            self._refuse(408, f"the body: expected all of it within {REQUEST_S:g} s; send it again")
        elif self.unparsed:
            self._refuse(408, f"the head: expected all of it within {HEAD_S:g} s; send it again")
        else:
            self.close()

    # What goes out.

    def pause_writing(self) -> None:
        """Give the client time to read."""
        super().pause_writing()
        self.outgoing.set(self.loop.time() + ANSWER_S)

    def resume_writing(self) -> None:
        """Note that the client reads."""
        super().resume_writing()
        if not self.closing:
            self.outgoing.clear()

    def _fail(self, status: int, message: str) -> None:
        """Leave the parser; `data_received` refuses what it was about."""
        self.fault = status, message
        raise ValueError(message)

    def _refuse(self, status: int, message: str) -> None:
        """Answer what no application shall see, in its turn; then close."""
        self.deaf = True
        self.incoming.clear()
        refusal, newest = _refusal(status, message), self.cycle
        is_busy = newest is not None and not newest.response_complete
        if newest is not None and newest.more_body:
            if self.pipeline:  # the application has not seen it yet
                self.pipeline[0] = newest, refusal
                return
            if newest.response_started:
                self.close()
                return
            # The application learns that its client has gone; what it says is not sent.
            newest.disconnected = True
            newest.message_event.set()
            is_busy = False
        self.cycle = self._last_cycle()
        if is_busy:
            self.pipeline.appendleft((self.cycle, refusal))
        else:
            self._start_asgi_task(self.cycle, refusal)

    def _last_cycle(self) -> RequestResponseCycle:
        return RequestResponseCycle(
            scope=cast(Any, {"type": "http", "method": "GET"}),
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )

    # The end.

    def shutdown(self) -> None:
        """Finish what has begun to arrive, then close; the state says ``draining`` by now."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = self.persistent = False
        elif not self.unparsed:
            self.close()

    def close(self) -> None:
        """Close so that the client sees what was sent.

        Closing a socket that holds unread bytes resets the connection, and a reset destroys what
        the client has not read yet. So where more may come it is read for a moment and dropped.
        """
        if self.closing:
            return
        self.outlet.flush()
        more_may_come = self.deaf or (self.cycle is not None and self.cycle.more_body)
        self.closing = self.deaf = True
        self.incoming.clear()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if not more_may_come or self.wire.is_closing():
            self._hang_up()
            return
        if self.wire.can_write_eof():
            self.wire.write_eof()
        self.incoming.overdue = self._hang_up
        self.incoming.set(self.loop.time() + LINGER_S)

    def _hang_up(self) -> None:
        self.outgoing.set(self.loop.time() + ANSWER_S)
        self.wire.close()


class _Outlet:
    """The transport as a request sees it: closing is left to the connection.

    What is written in one turn of the loop, the head of an answer and its body, goes out together:
    a system call takes longer than all that is done for a request beside it.
    """

    def __init__(
        self, connection: Connection, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._connection, self._transport, self._loop = connection, transport, loop
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)

    def flush(self) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces.clear()
            if not self._transport.is_closing():  # uvloop raises where nobody is left to read
                self._transport.write(data)

    def close(self) -> None:
        self._connection.close()

    def is_closing(self) -> bool:
        return self._connection.closing or self._transport.is_closing()


def configure(app: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for connections to ``app``, an ASGI application."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
    )
    config.load()
    return config


def _refusal(status: int, message: str) -> Any:
    """Return an ASGI application that says it."""
    body = json.dumps({"error": message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", secrets.token_hex(8).encode()),
    ]

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


def _written(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """Return a response as HTTP/1.1 has it."""
    lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", body])


def _too_large() -> tuple[int, str]:
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return status, f"the head: expected at most {MAX_HEAD} bytes, got more; send fewer headers"


def _malformed(error: Exception) -> str:
    if isinstance(error, httptools.HttpParserCallbackError):
        return "expected an HTTP request for a path, got another target; mend the request line"
    return f"expected an HTTP/1.1 request, got a malformed one: {error}"
