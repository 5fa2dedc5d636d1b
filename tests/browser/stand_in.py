"""A server that answers as the real one does, without a model, and remembers what it was asked."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deploykit.server.engine import ModelInfo
from deploykit.server.guard import PAGE_HEADERS
from deploykit.server.openapi import openapi
from deploykit.server.pages import page
from deploykit.server.settings import Settings


@dataclass
class StandIn:
    """What the server is told and what it was sent."""

    models: Sequence[ModelInfo]
    token: str | None = None
    refusal: tuple[int, str] | None = None
    url: str = ""
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def answer(self, target: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        path = urlsplit(target).path
        if path == "/openapi.json":
            return 200, openapi(list(self.models), Settings(bundles=(), token=self.token))
        if path == "/v2/health/ready":
            about = [
                {"name": one.name, "version": one.version, "provider": one.provider}
                for one in self.models
            ]
            return 200, {"ready": True, "models": about}
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error": "expected a token"}
        name = next((one for one in self.models if one.name in path.split("/")), self.models[0])
        if path.startswith("/v2/models/") and not path.endswith("/infer"):
            return 200, _metadata(name)
        self.asked.append((target, headers, body))
        if self.refusal:
            return self.refusal[0], {"error": self.refusal[1]}
        return 200, _prediction(name, int(parse_qs(urlsplit(target).query).get("top", ["5"])[0]))


def _metadata(model: ModelInfo) -> Any:
    def tensors(key: str) -> Any:
        return [{"name": one["name"], "shape": one["shape"]} for one in model.manifest[key]]

    return {"name": model.name, "inputs": tensors("inputs"), "outputs": tensors("outputs")}


def _prediction(model: ModelInfo, top: int) -> Any:
    labels = model.manifest["labels"] or ["0", "1", "2"]
    shares = [0.9, 0.07, 0.02, 0.0099, 0.0001, *[0.0] * len(labels)]
    ranked = [
        {"label": label, "probability": share}
        for label, share in zip(labels[::-1], shares, strict=False)
    ][:top]
    return {
        "model": model.name,
        "version": model.version,
        "predictions": [{**ranked[0], "top": ranked}],
    }


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    """Answer at ``stand_in.url``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            found = page(urlsplit(self.path).path) if self.command == "GET" else None
            headers = {name.lower(): value for name, value in self.headers.items()}
            if found:
                self.reply(200, *found, PAGE_HEADERS)
                return
            status, value = stand_in.answer(self.path, headers, body)
            timing = {"server-timing": "queue;dur=0.05, compute;dur=0.61"}
            self.reply(status, json.dumps(value).encode(), "application/json", timing)

        do_POST = do_GET  # noqa: N815  # the base class names them

        def reply(self, status: int, content: bytes, kind: str, headers: Any) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-type": kind}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Tell nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}/"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
