"""What a client asks of a server, when it asks again, and how it reads the answers.

Each call is a generator: it yields a request and is sent the answer, or yields how long to pause.
Who runs it decides how to send and to wait, so that blocking and asynchronous clients share it all.
"""

import base64
import io
import json
import random
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import numpy as np

from deploykit.client.tensors import HEADER_LENGTH, Array, decode_outputs, encode_inputs
from deploykit.errors import (
    DataError,
    MissingDependency,
    RequestRefused,
    ServerBusy,
    ServerError,
    first_line,
)

try:
    import httpx
except ModuleNotFoundError as error:
    raise MissingDependency(
        "httpx is missing; install it: pip install 'deploykit[serve]'"
    ) from error

BUSY = (429, 503)  # the server took nothing, so that asking again is safe
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
LONGEST_RETRY_AFTER_S = 60.0  # who is asked to wait longer is told, and does not wait

File: TypeAlias = str | Path | bytes
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """A class and its probability, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest class of a sample, its probability (0 to 1), and the ranking, best first."""

    label: str
    probability: float
    top: tuple[Score, ...]


@dataclass(frozen=True)
class ServedModel:
    """A version of a model that a server has; it answers while ``state`` is ``READY``."""

    name: str
    version: str
    state: str


@dataclass(frozen=True)
class Ask:
    """One request; ``path`` is below the server's URL, with its query."""

    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pause:
    """A pause before the next request."""

    seconds: float


Reply: TypeAlias = httpx.Response | httpx.TransportError
Steps: TypeAlias = Generator[Ask | Pause, Reply, T]


def predict(
    samples: File | Array | Sequence[File],
    model: str | None,
    version: str | None,
    top: int,
    retries: int,
) -> Steps[list[Prediction]]:
    """Classify samples: see `Client.predict`."""
    path = "/predict" if model is None else f"/predict/{_model_path(model, version)}"
    if model is None and version is not None:
        raise ValueError("version: expected a model beside it, got none")
    response = yield from _insist(Ask("POST", f"{path}?top={top}", _body(samples)), retries)
    with _understanding(response):
        return [
            Prediction(one["label"], one["probability"], tuple(Score(**s) for s in one["top"]))
            for one in response.json()["predictions"]
        ]


def infer(
    inputs: Array | Mapping[str, Array], model: str, version: str | None, retries: int
) -> Steps[dict[str, Array]]:
    """Run a model on tensors: see `Client.infer`."""
    if isinstance(inputs, np.ndarray):
        about = yield from metadata(model, version, retries)
        names = [one["name"] for one in about["inputs"]]
        if len(names) != 1:
            raise ValueError(f"inputs: expected arrays by name for {names}, got one array")
        inputs = {names[0]: inputs}
    headers, content = encode_inputs(inputs)
    path = f"/v2/models/{_model_path(model, version)}/infer"
    response = yield from _insist(Ask("POST", path, content, headers), retries)
    with _understanding(response):
        return decode_outputs(response.headers.get(HEADER_LENGTH), response.content)


def metadata(model: str, version: str | None, retries: int) -> Steps[dict[str, Any]]:
    """Ask for names, datatypes and shapes: see `Client.metadata`."""
    path = f"/v2/models/{_model_path(model, version)}"
    response = yield from _insist(Ask("GET", path), retries)
    with _understanding(response):
        about = response.json()
        if not all({"name", "datatype", "shape"} <= set(one) for one in about["inputs"]):
            raise ValueError("inputs without name, datatype and shape")
        return dict(about)


def models(retries: int) -> Steps[list[ServedModel]]:
    """List what is served: see `Client.models`."""
    response = yield from _insist(Ask("POST", "/v2/repository/index"), retries)
    with _understanding(response):
        return [ServedModel(one["name"], one["version"], one["state"]) for one in response.json()]


def ready() -> Steps[bool]:
    """Ask for readiness, once: see `Client.ready`."""
    reply = yield Ask("GET", "/v2/health/ready")
    if isinstance(reply, httpx.TransportError) or reply.status_code in BUSY:
        return False
    _accept(reply)
    return True


def _model_path(model: str, version: str | None) -> str:
    name = quote(model, safe="")
    return name if version is None else f"{name}/versions/{quote(version, safe='')}"


# The body. The server knows images and .npy files by their first bytes, whatever they are called.


def _body(samples: File | Array | Sequence[File]) -> bytes:
    if isinstance(samples, np.ndarray):
        file = io.BytesIO()
        np.save(file, samples, allow_pickle=False)
        return file.getvalue()
    if isinstance(samples, str | Path | bytes):
        return _read(samples)
    images = [base64.b64encode(_read(sample)).decode() for sample in samples]
    return json.dumps({"images": images}).encode()


def _read(sample: File) -> bytes:
    if isinstance(sample, bytes):
        return sample
    try:
        return Path(sample).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise DataError(f"{sample}: cannot be read: {first_line(error)}") from error


# Asking again.


def _insist(ask: Ask, retries: int) -> Steps[httpx.Response]:
    """Ask, and ask again while the server takes nothing, at most ``retries`` times.

    Pauses grow exponentially up to a cap, with full jitter, so that clients who were refused at
    once do not come back at once (Brooker 2015, "Exponential Backoff and Jitter",
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/); to what the server
    asks for as ``Retry-After`` they are added.
    """
    for attempt in range(retries):
        reply = yield ask
        asked_s = _retry_after_s(reply)
        if not _took_nothing(reply) or asked_s > LONGEST_RETRY_AFTER_S:
            return _accept(reply)
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
        yield Pause(asked_s + random.uniform(0, longest_s))
    return _accept((yield ask))


def _took_nothing(reply: Reply) -> bool:
    if isinstance(reply, httpx.Response):
        return reply.status_code in BUSY
    return isinstance(reply, httpx.ConnectError)


def _retry_after_s(reply: Reply) -> float:
    """Return the seconds that the server asks to wait: ``Retry-After``, seconds or a date."""
    asked = reply.headers.get("Retry-After", "") if isinstance(reply, httpx.Response) else ""
    if asked.isdecimal():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, OverflowError):  # neither, or nothing
        return 0.0


# Answers.


def _accept(reply: Reply) -> httpx.Response:
    """Return a good answer; raise what a caller should do about any other.

    Raises:
        RequestRefused, ServerBusy, ServerError: by the status, or because there is none.
    """
    if not isinstance(reply, httpx.Response):
        raise ServerError(_why_no_answer(reply))
    status = reply.status_code
    if reply.is_success:
        return reply
    message = f"{_place(reply)}: {status}: {_sentence_of(reply)}"
    if status in BUSY:
        raise ServerBusy(message, status, _retry_after_s(reply))
    if 400 <= status < 500:
        raise RequestRefused(message, status)
    raise ServerError(message, status)


def _why_no_answer(error: httpx.TransportError) -> str:
    place = _place(error)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"{place}: nobody listens ({first_line(error)}); start the server, or mend the URL"
    if isinstance(error, httpx.TimeoutException):
        return f"{place}: expected an answer in time, got none; wait longer, or send less"
    return f"{place}: the connection broke ({first_line(error)}); see what the server logs"


def _place(about: httpx.Response | httpx.TransportError) -> str:
    return str(about.request.url.copy_with(query=None))


def _sentence_of(response: httpx.Response) -> str:
    """Return what the server says is wrong: ``{"error": sentence}``."""
    try:
        return str(response.json()["error"])
    except (ValueError, LookupError, TypeError):
        return response.reason_phrase or "no reason given"


@contextmanager
def _understanding(response: httpx.Response) -> Iterator[None]:
    """Turn what an answer lacks into a ServerError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerError(
            f"{_place(response)}: expected an answer of deploykit, got something else "
            f"({first_line(error)}); mend the URL",
            response.status_code,
        ) from error
