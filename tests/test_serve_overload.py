"""Requests that find no place are refused before anything is spent on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import test_serve_http
from test_serve_http import GET, LAST, POST, Reply, converse
from tiny_app import Asker, serving

from deploykit.server import http
from deploykit.server.refusal import Refusal

FULL = Refusal(429, "no place; try again in 1 s", {"retry-after": "1"})
ANSWER = 429, [(b"retry-after", b"1"), (b"content-length", b"2")], b"{}"
BODY = b"content-length: 5\r\n\r\nhello"


def scope_of(path: str, method: str = "POST") -> dict[str, Any]:
    return {"type": "http", "method": method, "raw_path": path.encode(), "headers": []}


def fill(ask: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the queue of the first model be full."""

    def refuse() -> None:
        raise FULL

    for check in ("refuse_if_full", "expect"):
        monkeypatch.setattr(ask.models.find(None).batcher, check, refuse)


def test_the_short_way_answers_like_the_long_one(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(ask: Asker) -> None:
        fill(ask, monkeypatch)
        for path in ("/predict", "/predict/tiny", "/v2/models/tiny/infer"):
            answer = await ask.post(path, bytes(16))
            status, headers, body = ask.app.turn_away(scope_of(path)) or (0, [], b"")
            told = {name.decode(): text.decode() for name, text in headers}
            ours = told.pop("x-request-id")
            theirs = dict(answer.headers)
            assert ours != theirs.pop("x-request-id")
            assert (status, told, body) == (429, theirs, answer.body)
        counted = [
            line
            for line in (await ask.get("/metrics")).body.decode().splitlines()
            if line.startswith("deploykit_requests_total") and 'status="429"' in line
        ]
        assert sum(float(line.split()[-1]) for line in counted) == 6

    serving(check, served_tiny)


def test_whoever_may_find_a_place_goes_the_long_way(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        assert ask.app.turn_away(scope_of("/predict")) is None

    serving(check, served_tiny)


def test_what_is_let_in_holds_its_place_until_it_begins(served_tiny: Path) -> None:
    """Heads that come in one burst are all read before the first request begins."""

    async def check(ask: Asker) -> None:
        async def nothing(*_: Any) -> Any:
            return {"type": "http.disconnect"}

        burst = [scope_of("/predict") for _ in range(5)]
        refused = [ask.app.turn_away(scope) is not None for scope in burst]
        assert refused == [False, False, True, True, True]
        for scope in burst[:2]:
            await ask.app({**scope, "path": "/predict"}, nothing, nothing)
        assert ask.app.turn_away(scope_of("/predict")) is None

    serving(check, served_tiny, queue=2)


@pytest.mark.parametrize("settings", [{"token": "secret"}, {"cors": ("https://a.org",)}], ids=str)
def test_where_headers_count_the_long_way_is_gone(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    async def check(ask: Asker) -> None:
        fill(ask, monkeypatch)
        assert ask.app.turn_away(scope_of("/predict")) is None

    serving(check, served_tiny, **settings)


def test_what_is_no_prediction_is_never_turned_away(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(ask: Asker) -> None:
        fill(ask, monkeypatch)
        for path in ("/healthz", "/metrics", "/v2/models/tiny", "/nix", "/predict/nix", "/%ff"):
            assert ask.app.turn_away(scope_of(path)) is None
        assert ask.app.turn_away(scope_of("/predict", "GET")) is None

    serving(check, served_tiny)


# On a connection.


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn away what is posted."""

    class Full(http.State):
        def __init__(self) -> None:
            super().__init__(lambda scope: ANSWER if scope["method"] == "POST" else None)

    monkeypatch.setattr(test_serve_http.http, "State", Full)


def statuses(*parts: bytes | float) -> list[int]:
    replies, _ = converse(*parts)
    for reply in replies:
        assert reply == Reply(reply.status, reply.headers, reply.body)
        json.loads(reply.body)
    return [reply.status for reply in replies]


@pytest.mark.usefixtures("full")
def test_a_connection_serves_on_after_a_request_was_turned_away() -> None:
    pause = 0.05  # so that nothing comes while another is in work
    asked = [POST + BODY, pause, GET, pause, POST + BODY, pause, LAST]
    assert statuses(*asked) == [429, 200, 429, 200]


@pytest.mark.usefixtures("full")
def test_the_refusal_comes_when_the_body_was_read_in_pieces_or_chunks() -> None:
    assert statuses(POST + b"content-length: 5\r\n\r\nhe", 0.05, b"llo", LAST) == [429, 200]
    chunks = b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert statuses(POST + chunks, LAST) == [200, 200]  # the long way


@pytest.mark.usefixtures("full")
def test_requests_behind_one_another_are_answered_in_their_order() -> None:
    assert statuses(GET + POST + BODY + GET + POST + BODY + LAST) == [200, 200, 200, 200, 200]
    assert statuses(POST + BODY + POST + BODY + LAST) == [429, 429, 200]


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(
    "header", [b"x-request-id: a", b"expect: 100-continue", b"connection: close", b"origin: b"]
)
def test_a_request_that_has_a_say_goes_the_long_way(header: bytes) -> None:
    found = converse(POST + header + b"\r\n" + BODY, LAST)[0]
    assert {reply.status for reply in found} <= {100, 200}


@pytest.mark.usefixtures("full")
def test_old_http_goes_the_long_way() -> None:
    assert statuses(b"POST / HTTP/1.0\r\nhost: a\r\n" + BODY) == [200]


@pytest.mark.usefixtures("full")
def test_a_body_that_never_comes_closes_the_connection_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "REQUEST_S", 0.4)
    replies, seconds = converse(POST + b"content-length: 5\r\n\r\nhe")
    assert ([reply.status for reply in replies], seconds < 5) == ([408], True)
