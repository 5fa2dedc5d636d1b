"""What a request cannot have: told to the client, never an error of the server."""

from collections.abc import Mapping


class Refusal(Exception):
    """A request is refused.

    Attributes:
        status: the HTTP status.
        message: one sentence, the body's ``error``.
        headers: to send along, such as ``retry-after``.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
