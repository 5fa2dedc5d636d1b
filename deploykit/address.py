"""Where a server is, and how a client shows that it may ask."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from deploykit.errors import UsageError


@dataclass(frozen=True)
class Address:
    """A server's URL, taken apart.

    Attributes:
        tls: whether it is ``https``.
        host: name or number, an IPv6 number without its brackets.
        port: 1 to 65535.
        authority: host and port as the URL spells them; the ``Host`` header.
        base: what stands before every path, ``""`` or such as ``/models``, no slash at its end.
    """

    tls: bool
    host: str
    port: int
    authority: str
    base: str

    @property
    def url(self) -> str:
        """The URL, without a slash at its end."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base}"


def parse_address(url: str) -> Address:
    """Take a server's URL apart.

    Raises:
        UsageError: not ``http://HOST[:PORT][/BASE]`` or the same with ``https``.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # no port, or half an IPv6 address
        parts, port = urlsplit(""), 0
    plain = url.isascii() and url.isprintable() and " " not in url  # urlsplit drops some of these
    if (
        not plain
        or parts.scheme not in {"http", "https"}
        or not parts.hostname
        or "@" in parts.netloc  # a name and password
        or parts.query
        or parts.fragment
    ):
        raise UsageError(f"url: expected http://HOST:PORT or https://HOST:PORT, got {url!r}")
    tls = parts.scheme == "https"
    return Address(tls, parts.hostname, port, parts.netloc, parts.path.rstrip("/"))


def bearer(token: str | None) -> dict[str, str]:
    """Return the header that shows ``token``; none where there is no token.

    Raises:
        UsageError: the token cannot stand in a header; the message does not show it.
    """
    if token is None:
        return {}
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("token: expected printable ASCII without spaces, got something else")
    return {"Authorization": f"Bearer {token}"}
