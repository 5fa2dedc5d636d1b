"""Who may ask a server: the token, and pages of other origins."""

import hmac
from pathlib import Path

import pytest
from tiny_app import CLOSED, OPEN, POSTS, Asker, serving


def test_with_a_token_only_health_and_pages_are_open(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        assert [(await ask.get(path)).status for path in OPEN] == [200] * len(OPEN)
        asked = [("GET", path) for path in CLOSED] + [("POST", path) for path in POSTS]
        for method, path in asked:
            for value in (None, "", "Bearer", "Bearer s3cret", "Bearer s3cret+ x", "Basic s3cret+"):
                headers = [] if value is None else [("authorization", value)]
                answer = await ask(method, path, bytes(16), headers)
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), path
                assert "s3cret" not in answer.error
        for scheme in ("Bearer", "bearer", "BEARER "):
            answer = await ask.get("/v2/models/tiny", authorization=f"{scheme} s3cret+")
            assert answer.status == 200
        assert (await ask.post("/predict/none")).status == 401  # nor which models there are

    serving(check, served_tiny, token="s3cret+")


def test_tokens_are_compared_in_constant_time(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, token: bytes) -> bool:
        compared.append((given, token))
        return given == token

    async def check(ask: Asker) -> None:
        monkeypatch.setattr(hmac, "compare_digest", compare)
        assert (await ask.get("/v2", authorization="Bearer schlüssel")).status == 401
        assert (await ask.get("/v2", authorization="Bearer \xff")).status == 401
        good = "schlüssel".encode().decode("latin-1")
        assert (await ask.get("/v2", authorization=f"Bearer {good}")).status == 200
        assert [one[1] for one in compared] == ["schlüssel".encode()] * 3

    serving(check, served_tiny, token="schlüssel")


ORIGIN = "https://a.example"


def test_pages_of_other_origins_read_nothing_unless_they_were_named(served_tiny: Path) -> None:
    async def unnamed(ask: Asker) -> None:
        for method in ("GET", "OPTIONS"):
            headers = [("origin", ORIGIN), ("access-control-request-method", "POST")]
            answer = await ask(method, "/v2", b"", headers)
            assert not any(name.startswith("access-control") for name in answer.headers)

    async def named(ask: Asker) -> None:
        asked = {"origin": ORIGIN}
        answer = await ask.get("/v2", **asked)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "origin"
        refused = await ask.get("/nix", **asked)  # its script gets to read why
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        for other in ("https://b.example", ORIGIN + ".evil", "null", "*", "", ORIGIN.upper()):
            answer = await ask.get("/v2", origin=other)
            assert "access-control-allow-origin" not in answer.headers
            assert answer.headers["vary"] == "origin"
        assert "access-control-allow-origin" not in (await ask.get("/v2")).headers

    serving(unnamed, served_tiny)
    serving(named, served_tiny, cors=(ORIGIN, "https://c.example"))


def test_a_preflight_of_a_named_origin_needs_no_token(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        asks = [("access-control-request-method", "POST"), ("origin", ORIGIN)]
        wants = ("access-control-request-headers", "authorization, content-type")
        answer = await ask("OPTIONS", "/predict", b"", [*asks, wants])
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-allow-headers"] == wants[1]
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in answer.headers
        other = await ask("OPTIONS", "/predict", b"", [asks[0], ("origin", "https://b.example")])
        assert not any(name.startswith("access-control") for name in other.headers)

    serving(check, served_tiny, cors=(ORIGIN,), token="t")


def test_any_origin_may_be_allowed(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        answer = await ask.get("/v2", origin="https://whoever.example")
        assert answer.headers["access-control-allow-origin"] == "*"

    serving(check, served_tiny, cors=("*",))
