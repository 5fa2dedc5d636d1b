"""The server's own description: OpenAPI 3.1 of the models that it serves now.

Every path is concrete, because what a path takes depends on its model. An operation lists the
refusals that it can give and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from deploykit import __version__
from deploykit.server.openapi_schemas import Bodies

if TYPE_CHECKING:
    from deploykit.server.engine import ModelInfo
    from deploykit.server.settings import Settings

JsonDict = dict[str, Any]
Refusals = tuple[int, ...]
TOP, MAX_TOP = 5, 1000  # classes that /predict ranks

ANY: Refusals = (400, 408, 431)  # whatever the path, the request itself can be at fault
WITH_BODY: Refusals = (*ANY, 413, 415)
INFERENCE: Refusals = (*WITH_BODY, 422, 429, 503, 504)
OPEN = frozenset(  # without the token: they tell no more than names
    (
        *("/", "/docs", "/openapi.json", "/healthz", "/livez", "/readyz"),
        *("/v2/health/live", "/v2/health/ready"),
    )
)
NAME: JsonDict = {"type": "string"}
LIST: JsonDict = {"type": "array"}
ERROR: JsonDict = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "One sentence."}},
    "required": ["error"],
}

TAGS = {
    "predict": "An image or an array in, labels with probabilities out.",
    "inference protocol": "The Open Inference Protocol, version 2, with its binary extension.",
    "repository": "Which models there are, and exchanging one for its new version.",
    "health": "For balancers and monitors.",
    "pages": "For people.",
}
INFER = """Tensors in JSON, or in binary form: the JSON, in which `parameters.binary_data_size`
stands in the place of `data`, and after it the tensor's bytes, little-endian and row-major. The
header `Inference-Header-Content-Length` then says how many bytes the JSON has; 0 says that there
is no JSON, and that the body is one sample. The content type is not looked at. The answer is
binary where the request asks for it by `binary_data_output` or an output's `binary_data`, and
then bears the same header."""
LOAD = """Reads the bundle again that lies where the server was told at its start, proves it, and
exchanges it for the one that answers; no request is lost. A bundle that fails leaves the old one
in its place. Models are neither uploaded nor unloaded over HTTP."""

LOAD_REQUEST: JsonDict = {
    "type": "object",
    "properties": {"parameters": {"type": "object", "maxProperties": 0}},
}


def openapi(models: Sequence[ModelInfo], settings: Settings) -> JsonDict:
    """Return the OpenAPI 3.1 document of a server.

    Args:
        models: every version of every model, of a name the highest version first: it is what
            the name alone means, and the very first is what ``/predict`` means.
        settings: the bounds that the server holds.
    """
    paths, schemas = _shared_paths(), {"Error": ERROR}
    highest = {model.name: model for model in reversed(models)}
    for number, model in enumerate(models):
        bodies, key = Bodies(model, settings), f"model{number}"
        schemas |= {
            f"{key}.PredictRequest": bodies.predict_json(),
            f"{key}.PredictResponse": bodies.answer(f"#/components/schemas/{key}.Label"),
            f"{key}.Label": bodies.label(),
            f"{key}.InferRequest": bodies.infer_json(),
            f"{key}.InferResponse": bodies.infer_answer(),
        }
        name = quote(model.name, safe="")
        version = f"/versions/{quote(model.version, safe='')}"
        about, gone = f"{model.name} {model.version}", (404,)  # a swap can take a version away
        paths[f"/predict/{name}{version}"] = _predict(bodies, key, about, gone)
        paths |= _protocol_paths(f"/v2/models/{name}{version}", bodies, key, about, gone)
        if highest[model.name] is model:
            paths[f"/predict/{name}"] = _predict(bodies, key, model.name)
            paths |= _protocol_paths(f"/v2/models/{name}", bodies, key, model.name)
            paths[f"/v2/repository/models/{name}/load"] = _load(model.name)
            if number == 0:
                paths["/predict"] = _predict(bodies, key, model.name)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "deploykit", "version": __version__, "description": _about(settings)},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": dict(sorted(paths.items())),
        "components": _components(schemas, settings),
    }
    if settings.token is not None:
        _guard(document)
    return document


def _about(settings: Settings) -> str:
    return (
        "Every error is JSON: `error` holds one sentence. An unknown path is answered with "
        "404, and 405 where a path does not know the method. Every response bears `X-Request-Id`: "
        "the request's own where it is 1 to 128 letters, digits, dots, lines and underscores, else "
        f"a new one. A body has at most {settings.max_body:,} bytes, unpacked as well where it "
        f"comes with `Content-Encoding: gzip` or `deflate`; an image has at most "
        f"{settings.max_pixels:,} pixels; a request brings at most {settings.max_batch} samples."
    )


# Operations


def _predict(bodies: Bodies, key: str, about: str, also: Refusals = ()) -> JsonDict:
    path = _post(
        "predict",
        f"Classify {'images' if bodies.takes_images else 'arrays'} with {about}",
        "Without a content type, or with a form's, the body is known by its first bytes.",
        bodies.predict_bodies(f"#/components/schemas/{key}.PredictRequest"),
        _json({"$ref": f"#/components/schemas/{key}.PredictResponse"}),
        (*INFERENCE, *also),
    )
    top = {"type": "integer", "minimum": 1, "maximum": MAX_TOP, "default": TOP}
    described = {"name": "top", "in": "query", "description": "How many classes to rank at most."}
    path["post"]["parameters"] = [{**described, "schema": top}]
    return path


def _protocol_paths(
    path: str, bodies: Bodies, key: str, about: str, also: Refusals = ()
) -> JsonDict:
    """Return the Open Inference Protocol's operations on one model."""

    def get(summary: str, properties: JsonDict) -> JsonDict:
        ok = _json(_record(properties))
        return _get("inference protocol", summary, ok, 503, *also)

    tensors = _list_of({"name": NAME, "datatype": NAME, "shape": LIST})
    metadata = {"name": NAME, "versions": LIST, "platform": NAME}
    return {
        path: get(f"Metadata of {about}", {**metadata, "inputs": tensors, "outputs": tensors}),
        f"{path}/ready": get(f"Whether {about} is ready", {"ready": {"const": True}}),
        f"{path}/config": get(f"Configuration of {about}", {"name": NAME}),
        f"{path}/stats": get(f"Counts and times of {about}", {"model_stats": LIST}),
        f"{path}/infer": _post(
            "inference protocol",
            f"Run {about} on tensors",
            INFER,
            bodies.infer_bodies(f"#/components/schemas/{key}.InferRequest"),
            _tensors_answer(key),
            (*INFERENCE, *also),
        ),
    }


def _tensors_answer(key: str) -> JsonDict:
    ok = _json({"$ref": f"#/components/schemas/{key}.InferResponse"})
    ok["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    length = {"description": "Bytes of JSON before the tensors.", "schema": {"type": "integer"}}
    return ok | {"headers": {"Inference-Header-Content-Length": length}}


def _load(name: str) -> JsonDict:
    return _post(
        "repository",
        f"Exchange {name} for its new version",
        LOAD,
        {"application/json": {"schema": LOAD_REQUEST, "example": {}}},
        _json({"type": "object"}) | {"description": "Every worker answers with the new version."},
        (*WITH_BODY, 503),
        required=False,
    )


def _shared_paths() -> JsonDict:
    """Return the paths that no model is part of."""
    model = {"name": NAME, "version": NAME, "provider": NAME}
    state = {"name": NAME, "version": NAME, "state": NAME, "reason": NAME}
    server = _record({"name": NAME, "version": NAME, "provider": LIST, "extensions": LIST})
    live = _json(_record({"live": {"const": True}}))
    ready = _json(_record({"ready": {"const": True}, "models": _list_of(model)}))
    protocol, health, pages = "inference protocol", "health", "pages"
    return {
        "/": _get(pages, "A page to try the models on", _page("text/html")),
        "/docs": _get(pages, "This description for people", _page("text/html")),
        "/openapi.json": _get(pages, "This description", _page("application/json"), 503),
        "/healthz": _get(health, "Whether the server lives", live),
        "/livez": _get(health, "Whether the server lives", live),
        "/readyz": _get(health, "Whether the server is ready", ready, 503),
        "/metrics": _get(health, "Counts and times, as Prometheus reads them", _page("text/plain")),
        "/v2/health/live": _get(health, "Whether the server lives", live),
        "/v2/health/ready": _get(health, "Whether the server is ready", ready, 503),
        "/v2": _get(protocol, "Metadata of the server", _json(server)),
        "/v2/models/stats": _get(
            protocol, "Counts and times of all models", _json(_record({"model_stats": LIST}))
        ),
        "/v2/repository/index": {
            **_get("repository", "List the models", _json(_list_of(state))),
            **_post(
                "repository",
                "List the models, as clients of the protocol ask for it",
                "A body may be sent, and does not matter.",
                {"application/json": {"schema": {"type": "object"}, "example": {}}},
                _json(_list_of(state)),
                WITH_BODY,
                required=False,
            ),
        },
    }


def _get(tag: str, summary: str, ok: JsonDict, *refusals: int) -> JsonDict:
    responses = _responses(ok, (*ANY, *refusals))
    return {"get": {"tags": [tag], "summary": summary, "responses": responses}}


def _post(
    tag: str,
    summary: str,
    description: str,
    content: JsonDict,
    ok: JsonDict,
    refusals: Refusals,
    *,
    required: bool = True,
) -> JsonDict:
    operation = {
        "tags": [tag],
        "summary": summary,
        "description": " ".join(description.split()),
        "requestBody": {"required": required, "content": content},
        "responses": _responses(ok, refusals),
    }
    return {"post": operation}


# Responses


def _responses(ok: JsonDict, refusals: Iterable[int]) -> JsonDict:
    headers = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    ok = ok | {"headers": headers | ok.get("headers", {})}
    return {"200": ok} | {str(status): _refusal(status) for status in sorted(refusals)}


def _refusal(status: int) -> JsonDict:
    return {"$ref": f"#/components/responses/{status}"}


def _json(schema: JsonDict) -> JsonDict:
    return {"description": "Done.", "content": {"application/json": {"schema": schema}}}


def _page(content_type: str) -> JsonDict:
    schema = {"type": "object" if content_type == "application/json" else "string"}
    return {"description": "Done.", "content": {content_type: {"schema": schema}}}


def _record(properties: JsonDict) -> JsonDict:
    """Return the schema of an object that has at least these keys."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list_of(properties: JsonDict) -> JsonDict:
    return {"type": "array", "items": _record(properties)}


def _components(schemas: JsonDict, settings: Settings) -> JsonDict:
    refusals = {
        400: "The request is malformed.",
        401: "The token is missing or wrong.",
        404: "This version is not served any more.",
        408: "The request came too slowly.",
        413: f"The body has more than {settings.max_body:,} bytes (`--max-body`).",
        415: "The content type or content encoding is none that is known.",
        422: "The body can be read, but is not what the model takes.",
        429: f"More than {settings.queue} samples wait (`--queue`).",
        431: "The header is too large.",
        503: "The server is starting or stopping.",
        504: f"There was no answer within {settings.timeout_s:g} s (`--timeout`).",
    }
    if settings.token is None:
        del refusals[401]
    responses: JsonDict = {
        str(status): _json({"$ref": "#/components/schemas/Error"}) | {"description": text}
        for status, text in refusals.items()
    }
    responses["429"]["headers"] = {
        "Retry-After": {
            "description": "Seconds after which there may be room.",
            "required": True,
            "schema": {"type": "integer", "minimum": 0},
        }
    }
    request_id = {
        "description": "Found in the access log.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    }
    components = {
        "schemas": schemas,
        "responses": responses,
        "headers": {"X-Request-Id": request_id},
    }
    if settings.token is not None:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return components


def _guard(document: JsonDict) -> None:
    """Say which operations demand the token."""
    document["security"] = [{"bearer": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path in OPEN:
                operation["security"] = []
            else:
                operation["responses"]["401"] = _refusal(401)
