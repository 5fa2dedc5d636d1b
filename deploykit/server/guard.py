"""Who may ask: the bearer token, and pages of other origins (CORS, off by default)."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from deploykit.server.exchange import Exchange
from deploykit.server.refusal import Refusal
from deploykit.server.settings import Settings

# Nothing of a page comes from elsewhere, and no other page may frame it.
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
NOTHING: Mapping[str, str] = {}


class Guard:
    """Checks the token and answers for other origins."""

    def __init__(self, settings: Settings) -> None:
        self._token = None if settings.token is None else settings.token.encode()
        self._origins = frozenset(origin.encode() for origin in settings.cors)

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask, from anywhere."""
        return self._token is None and not self._origins

    def check_token(self, exchange: Exchange) -> None:
        """Let a request pass that bears the token; the comparison takes the same time for all.

        Raises:
            Refusal: 401.
        """
        if self._token is None:
            return
        scheme, _, given = exchange.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token):
            return
        raise Refusal(
            401,
            "authorization: expected 'Bearer TOKEN' with the server's token, got another or none",
            {"www-authenticate": "Bearer"},
        )

    def headers_for(self, scope: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the headers that let a page of another origin read the answer."""
        if not self._origins:
            return NOTHING
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        if origin is None or not {origin, b"*"} & self._origins:
            return {"vary": "origin"}
        allowed = "*" if b"*" in self._origins else origin.decode("latin-1")
        exposed = "inference-header-content-length, retry-after, server-timing, x-request-id"
        return {
            "access-control-allow-origin": allowed,
            "access-control-expose-headers": exposed,
            "vary": "origin",
        }

    def is_preflight(self, exchange: Exchange) -> bool:
        """Whether a browser asks on behalf of an allowed origin what it may send."""
        asks = b"access-control-request-method" in exchange.headers
        origin = exchange.headers.get(b"origin")
        allowed = bool({origin, b"*"} & self._origins)
        return exchange.method == "OPTIONS" and asks and origin is not None and allowed

    def preflight_headers(self, exchange: Exchange) -> Mapping[str, str]:
        """Return what such a page may send."""
        asked = exchange.header("access-control-request-headers") or ""
        return {
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": asked[:500] or "content-type",
            "access-control-max-age": "600",
        }
