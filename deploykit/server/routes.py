"""Which path is answered by what, with which methods, and by whom it may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

from deploykit.server.refusal import Refusal

GET, POST = ("GET", "HEAD"), ("POST",)
# BentoML's own: its client asks for it.
BENTOML_PATHS = frozenset({"/schema.json"})
MAX_PATH = 4096


@dataclass(frozen=True, slots=True)
class Route:
    """What a path means.

    Attributes:
        name: of the handler, and of the route in metrics and logs.
        methods: that it takes.
        is_open: whether it is answered without the token.
        model: that it names; None: none, or the first one.
        version: that it names; None: the highest.
        path: as sent, for pages.
    """

    name: str
    methods: tuple[str, ...] = GET
    is_open: bool = False
    model: str | None = None
    version: str | None = None
    path: str = ""


FIXED = {
    "/": Route("page", is_open=True, path="/"),
    "/docs": Route("page", is_open=True, path="/docs"),
    "/openapi.json": Route("openapi", is_open=True),
    "/healthz": Route("live", is_open=True),
    "/livez": Route("live", is_open=True),
    "/readyz": Route("ready", is_open=True),
    "/metrics": Route("metrics"),
    "/predict": Route("predict", POST),
    "/v2": Route("server"),
    "/v2/health/live": Route("live", is_open=True),
    "/v2/health/ready": Route("ready", is_open=True),
    "/v2/models/stats": Route("statistics"),
    "/v2/repository/index": Route("index", (*GET, *POST)),
}
OF_MODEL = {
    "": Route("model"),
    "ready": Route("model_ready"),
    "infer": Route("infer", POST),
    "config": Route("config"),
    "stats": Route("statistics"),
}
OF_REPOSITORY = {"load": Route("load", POST), "unload": Route("unload", POST)}


@lru_cache(maxsize=1024)
def resolve(raw_path: bytes) -> Route:
    """Return what a path means.

    Args:
        raw_path: as sent, percent-encoded, without the query.

    Raises:
        Refusal: 404, nothing.
    """
    path = raw_path.decode("latin-1")
    if path in FIXED:
        return FIXED[path]
    words = [unquote(word) for word in path.split("/")[1:]] if len(path) < MAX_PATH else []
    if words[:1] == ["static"] and len(words) == 2:
        return Route("page", is_open=True, path=path)
    found = _of_model(words)
    if found is None:
        raise Refusal(404, f"path: expected one that /docs lists, got {path[:100]!r}")
    return found


def _of_model(words: list[str]) -> Route | None:
    """Resolve a path that names a model."""
    match words:
        case ["predict", model] if model:
            return _named(FIXED["/predict"], model)
        case ["predict", model, "versions", version]:
            return _named(FIXED["/predict"], model, version)
        case ["v2", "models", model]:
            return _named(OF_MODEL[""], model)
        case ["v2", "models", model, "versions", version]:
            return _named(OF_MODEL[""], model, version)
        case ["v2", "models", model, "versions", version, word] if word and word in OF_MODEL:
            return _named(OF_MODEL[word], model, version)
        case ["v2", "models", model, word] if word and word in OF_MODEL:
            return _named(OF_MODEL[word], model)
        case ["v2", "repository", "models", model, action] if action in OF_REPOSITORY:
            return _named(OF_REPOSITORY[action], model)
    return None


def _named(route: Route, model: str, version: str | None = None) -> Route:
    return Route(route.name, route.methods, model=model, version=version)
