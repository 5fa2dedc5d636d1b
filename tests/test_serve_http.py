"""Connections that no client can hold, break or confuse."""

import asyncio
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass

import pytest
import uvloop

from deploykit.server import http

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\n"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: bytes
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


async def application(scope, receive, send):
    """Tell the size of the body, by path: at once, after it was read, or at great length."""
    body = b""
    if scope["path"] != "/early":
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    answer = b"x" * 30_000_000 if scope["path"] == "/long" else b'{"size": %d}' % len(body)
    headers = [(b"content-length", str(len(answer)).encode())]
    status = 413 if scope["path"] == "/early" else 200
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


class Listening:
    """A server in this loop."""

    async def __aenter__(self) -> "Listening":
        loop, config = asyncio.get_running_loop(), http.configure(application)
        self.state = http.State()
        self.server = await loop.create_server(
            lambda: http.Connection(config, self.state, {}, loop), "127.0.0.1", 0
        )
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def send(self, *parts: bytes | float) -> tuple[bytes, float]:
        """Send bytes, with pauses; return what comes until the server closes, and when it does."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        began = time.monotonic()
        try:
            for part in parts:
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    writer.write(part)
                    await writer.drain()
            return await asyncio.wait_for(reader.read(), 10), time.monotonic() - began
        finally:
            writer.close()
            await asyncio.sleep(0.02)


def converse(*parts: bytes | float) -> tuple[list[Reply], float]:
    """Send bytes over one connection; return the replies and the seconds until it was closed."""

    async def talk() -> tuple[bytes, float]:
        async with Listening() as server:
            answer = await server.send(*parts)
            assert server.state.connections == set()
            assert server.state.tasks == set()
            return answer

    text, seconds = uvloop.run(talk())
    return parse(text), seconds


def parse(text: bytes) -> list[Reply]:
    replies = []
    while text:
        head, _, rest = text.partition(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head)
        size = int(found[1]) if found else 0
        replies.append(Reply(int(head.split()[1]), head, rest[:size]))
        text = rest[size:]
    return replies


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(http, "HEAD_S", 0.4)
    monkeypatch.setattr(http, "REQUEST_S", 0.7)
    monkeypatch.setattr(http, "ANSWER_S", 0.5)
    monkeypatch.setattr(http, "LINGER_S", 0.3)


def test_deadlines_of_a_server_close_slow_clients_within_ten_seconds(request):
    """The times that the other tests shorten."""
    request.getfixturevalue("monkeypatch").undo()
    assert http.HEAD_S < http.REQUEST_S < 10
    assert http.ANSWER_S + http.LINGER_S <= 10


# What is no request.


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        (400, b"hello\r\n\r\n"),
        (400, b"GET / HTTP/9.9\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),  # TLS
        (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (400, b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n"),
        (400, b"CONNECT /path HTTP/1.1\r\nhost: a\r\n\r\n"),
        (400, b"GET http://a HTTP/1.1\r\nhost: a\r\n\r\n"),
        (400, b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n"),
        (400, POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, POST + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n"),
        (400, POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"),
        (400, POST + b"content-length: -3\r\n\r\nabc"),
        (400, POST + b"content-length: 3, 3\r\n\r\nabc"),
        (400, POST + b"transfer-encoding: identity\r\n\r\nabc"),
        (400, POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nhost : a\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n"),
        (431, b"GET /" + b"y" * 1_000_000),
        (431, POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: " + b"y" * 400_000),
    ],
)
def test_what_is_no_request_is_refused_in_json_and_the_connection_closed(status, sent):
    (reply,), _ = converse(sent)
    assert reply.status == status
    assert reply.error
    assert b"connection: close" in reply.headers
    assert b"content-type: application/json" in reply.headers
    assert re.search(rb"x-request-id: [0-9a-f]+", reply.headers)


def test_requests_are_answered_and_the_connection_kept():
    """The control of the test above: nothing that is right is refused."""
    chunked = POST + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n"
    replies, _ = converse(GET, POST + b"content-length: 3\r\n\r\nabc", chunked, LAST)
    assert [reply.status for reply in replies] == [200] * 4
    assert [json.loads(reply.body)["size"] for reply in replies] == [0, 3, 3, 0]
    assert [b"connection: close" in reply.headers for reply in replies] == [False] * 3 + [True]


def test_request_before_a_malformed_one_is_answered_first():
    slow = b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n"
    for sent in (b"hello\r\n\r\n", POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n\r\n"):
        replies, _ = converse(slow + sent)
        assert [reply.status for reply in replies] == [200, 400]


def test_pipelined_requests_are_answered_in_order_and_bounded():
    replies, _ = converse(GET * 20 + LAST)
    assert [reply.status for reply in replies] == [200] * 21
    replies, _ = converse(GET * 1000)
    assert [reply.status for reply in replies[-2:]] == [200, 400]
    assert len(replies) <= http.MAX_PIPELINED + 2


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_offer_of_another_protocol_is_ignored(protocol):
    offer = b"connection: upgrade\r\nupgrade: %s\r\n" % protocol
    get = b"GET / HTTP/1.1\r\nhost: a\r\n" + offer + b"\r\n"
    post = POST + offer + b"content-length: 3\r\n\r\nabc"
    replies, _ = converse(get + post, 0.05, post[:-1], 0.05, post[-1:] + LAST)
    assert [reply.status for reply in replies] == [200] * 4
    assert [json.loads(reply.body)["size"] for reply in replies] == [0, 3, 3, 0]


def test_client_that_waits_for_leave_to_send_gets_it():
    head = POST + b"expect: 100-continue\r\ncontent-length: 3\r\nconnection: close\r\n\r\n"
    replies, _ = converse(head, 0.1, b"abc")
    assert [reply.status for reply in replies] == [100, 200]


# Slow clients.


@pytest.mark.parametrize(
    ("sent", "seconds", "words"),
    [
        (b"GET / HT", 0.4, "the head"),
        (POST + b"content-length: 99\r\n\r\nabc", 0.7, "the body"),
        (POST + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", 0.7, "the body"),
    ],
)
def test_slow_request_is_refused_at_its_deadline(sent, seconds, words):
    replies, took = converse(sent)
    assert [reply.status for reply in replies] == [408]
    assert words in replies[0].error
    assert seconds - 0.05 <= took < seconds + 0.5


def test_drops_of_a_body_do_not_move_its_deadline():
    drops = [part for _ in range(6) for part in (b"a", 0.2)]
    replies, _ = converse(POST + b"content-length: 99\r\n\r\n", *drops)
    assert [reply.status for reply in replies] == [408]


def test_connection_that_says_nothing_is_closed_without_a_word():
    replies, took = converse()
    assert replies == []
    assert 0.3 < took < 1


@pytest.mark.parametrize("late", [b"\r\n", b"GET / HT", POST + b"content-length: 9\r\n\r\n"])
def test_later_requests_have_deadlines_too(late):
    replies, took = converse(GET, 0.6, late)  # idling between requests is allowed
    assert [reply.status for reply in replies] == [200, 408]
    assert took > 0.9


def test_time_that_a_request_waits_behind_another_is_not_its_clients_fault(monkeypatch):
    monkeypatch.setattr(http, "HEAD_S", 0.2)
    monkeypatch.setattr(http, "REQUEST_S", 0.25)
    slow = b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n"
    last = POST + b"content-length: 3\r\nconnection: close\r\n\r\n"
    replies, _ = converse(slow, 0.05, last, 0.1, b"abc")
    assert [reply.status for reply in replies] == [200, 200]


def test_client_that_does_not_read_its_answer_is_dropped():
    async def talk() -> float:
        async with Listening() as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
            writer.write(b"GET /long HTTP/1.1\r\nhost: a\r\n\r\n")
            await asyncio.sleep(0.1)
            began = time.monotonic()
            while server.state.connections and time.monotonic() < began + 5:
                await asyncio.sleep(0.01)
            took = time.monotonic() - began
            assert await server.send(LAST)  # others are served
            writer.transport.abort()
            return took

    assert 0.2 < uvloop.run(talk()) < 2


# Answers that come before the body.


@pytest.mark.parametrize("sent", [1, 20_000_000], ids=["little", "much"])
def test_early_answer_is_seen_by_a_client_that_still_sends(monkeypatch, sent):
    monkeypatch.setattr(http, "LINGER_S", 2.0)
    head = b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 20000000\r\n\r\n"
    replies, took = converse(head + b"x" * sent)
    assert [reply.status for reply in replies] == [413]
    assert b"connection: close" in replies[0].headers
    assert took < 1.5  # its end is seen before the connection is gone


def test_client_that_never_stops_sending_is_cut_off():
    async def talk() -> float:
        async with Listening() as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            began = time.monotonic()
            writer.write(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n")
            with suppress(ConnectionError):
                while time.monotonic() < began + 5:
                    writer.write(b"x" * 100_000)
                    await writer.drain()
                    await asyncio.sleep(0.001)
            writer.transport.abort()
            return time.monotonic() - began

    assert 0.2 < uvloop.run(talk()) < 2


# The end.


def test_shutdown_closes_what_idles_and_finishes_what_has_begun():
    async def talk() -> None:
        async with Listening() as server:
            ends = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(4)]
            idle, working, sending, heading = ends
            idle[1].write(GET)
            assert await idle[0].readuntil(b"}")
            working[1].write(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n")
            sending[1].write(POST + b"content-length: 3\r\n\r\na")
            heading[1].write(GET[:-4])
            await asyncio.sleep(0.05)
            server.state.draining = True
            for connection in list(server.state.connections):
                connection.shutdown()
            assert await idle[0].read() == b""
            sending[1].write(b"bc")
            heading[1].write(GET[-4:])
            for reader, _ in (working, sending, heading):
                (reply,) = parse(await reader.read())
                assert reply.status == 200
                assert b"connection: close" in reply.headers
            assert server.state.connections == set()
            for _, writer in ends:
                writer.close()

    uvloop.run(talk())


def test_every_answer_of_a_draining_server_closes_its_connection():
    async def talk() -> bytes:
        async with Listening() as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(GET)
            first = await reader.readuntil(b"}")
            server.state.draining = True
            writer.write(GET)
            rest = await reader.read()
            writer.close()
            return first + rest

    first, second = parse(uvloop.run(talk()))
    assert b"connection: close" not in first.headers
    assert b"connection: close" in second.headers


# The timer.


def test_deadline_that_is_moved_keeps_its_timer_and_rings_once():
    async def run() -> None:
        loop, rings = asyncio.get_running_loop(), []
        deadline = http.Deadline(loop, lambda: rings.append(loop.time()))
        now = loop.time()
        deadline.set(now + 0.05)
        timer = deadline._timer
        for later in range(100):
            deadline.set(now + 0.1 + later / 1000)
        assert deadline._timer is timer
        await asyncio.sleep(0.15)
        assert rings == []
        await asyncio.sleep(0.15)
        assert len(rings) == 1
        deadline.set(loop.time() + 9)
        deadline.set(loop.time() + 0.02)  # an earlier time does need a new timer
        await asyncio.sleep(0.1)
        assert len(rings) == 2
        deadline.set(loop.time() + 0.02)
        deadline.clear()
        await asyncio.sleep(0.1)
        assert len(rings) == 2

    uvloop.run(run())
