"""The ASGI application: what every route answers.

It is plain ASGI because a framework's requests and routes cost more than a small model does.
Whatever happens a client gets JSON, and nothing that it sends makes an error of the server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import orjson

from deploykit import __version__
from deploykit.runtime import rank, softmax
from deploykit.server import answers
from deploykit.server.access_log import AccessLog
from deploykit.server.batcher import FAULT, TOO_LATE, Answer
from deploykit.server.body import ClientGone, read_body
from deploykit.server.engine import ModelInfo
from deploykit.server.exchange import Exchange, Scope, Send, WholeAnswer
from deploykit.server.guard import PAGE_HEADERS, Guard
from deploykit.server.meters import CONTENT_TYPE, PREDICTIONS
from deploykit.server.models import Models, Served, not_ready
from deploykit.server.openapi import MAX_TOP, TOP, openapi
from deploykit.server.pages import page
from deploykit.server.protocol import LENGTH_HEADER, count_json_bytes, parse_request
from deploykit.server.refusal import Refusal
from deploykit.server.routes import BENTOML_PATHS, Route, resolve
from deploykit.server.samples import SMALL_JSON, is_quick, kind_of_body, read_samples
from deploykit.server.settings import Settings
from deploykit.server.tensors import kind_of, parse_json

log = logging.getLogger("deploykit.serve")
Reload = Callable[[str | None], Awaitable[None]]
Parsed = TypeVar("Parsed")
Handler = Callable[[Exchange, Route], Awaitable[None]]
PLACE = "deploykit.place"  # in a scope
EXTENSIONS = [
    *("binary_tensor_data", "classification", "model_configuration"),
    *("model_repository", "statistics"),
]
UNLOADED = "unload: expected load, got unload, which is not offered; stop the server instead"


class App:
    """Answers HTTP requests with the models of a worker.

    Args:
        models: that answer.
        settings: of the server.
        reload: asks the supervisor to swap bundles, of one model or all; None: there is none.
    """

    def __init__(self, models: Models, settings: Settings, reload: Reload | None = None) -> None:
        self._models, self._settings, self._reload = models, settings, reload
        self._meters = models.meters
        self._guard = Guard(settings)
        self._log = AccessLog(models.meters) if settings.access_log else None
        self._decoders = ThreadPoolExecutor(settings.threads or 1, thread_name_prefix="decoder")
        self._handlers: dict[str, Handler] = {
            name: getattr(self, f"_{name}")
            for name in (
                *("page", "openapi", "live", "ready", "metrics", "predict", "server", "statistics"),
                *("index", "model", "model_ready", "infer", "config", "load", "unload"),
            )
        }

    def knows(self, path: str) -> bool:
        """Whether a path is answered here; the others are BentoML's."""
        return path not in BENTOML_PATHS

    def close(self) -> None:
        """Write what is left of the log, and end the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._log is not None:
            self._log.close()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Answer one request; raises nothing but a cancellation."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1002})
            return
        if PLACE in scope:
            scope.pop(PLACE).arrived()
        exchange = Exchange(scope, receive, send, self._guard.headers_for(scope))
        try:
            await self._answer(exchange)
        finally:
            self._tell(exchange)

    def turn_away(self, scope: Scope) -> WholeAnswer | None:
        """Return the answer to a prediction for which there is no place.

        Args:
            scope: of the request, which has no headers that matter.

        Returns:
            None: the request is to be read and answered.
        """
        if not self._guard.is_open or scope["method"] != "POST":
            return None
        try:
            route = resolve(scope["raw_path"])
            if route.name not in PREDICTIONS:
                return None
            served = self._models.find(route.model, route.version)
        except Refusal:
            return None
        try:
            served.batcher.expect()
        except Refusal as refusal:
            exchange = Exchange(scope, _nothing, _nothing, {})
            exchange.route, exchange.model = route.name, (served.info.name, served.info.version)
            answer = exchange.refused(refusal)
            self._tell(exchange)
            return answer
        scope[PLACE] = served.batcher  # held until the application begins
        return None

    async def _answer(self, exchange: Exchange) -> None:
        try:
            if self._guard.is_preflight(exchange):
                await exchange.send(204, b"", self._guard.preflight_headers(exchange))
                return
            route = resolve(exchange.raw_path)
            exchange.route = route.name
            if exchange.method not in route.methods:
                await self._wrong_method(exchange, route)
                return
            if not route.is_open:
                self._guard.check_token(exchange)
            await self._handlers[route.name](exchange, route)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except ClientGone:
            exchange.status = 499
        except Exception:
            log.exception("request %s: a fault of the server", exchange.request_id)
            await exchange.refuse(Refusal(500, FAULT))

    async def _wrong_method(self, exchange: Exchange, route: Route) -> None:
        allowed = ", ".join((*route.methods, "OPTIONS"))
        if exchange.method == "OPTIONS":
            await exchange.send(204, b"", {"allow": allowed})
            return
        raise Refusal(
            405, f"method: expected {allowed}, got {exchange.method[:20]}", {"allow": allowed}
        )

    def _tell(self, exchange: Exchange) -> None:
        """Count and log the answer."""
        seconds = time.perf_counter() - exchange.started
        model, version = exchange.model
        self._meters.answered(model, version, exchange.route, exchange.status, seconds)
        if self._log is not None:
            self._log.add(exchange.line(seconds))

    # Pages and health.

    async def _page(self, exchange: Exchange, route: Route) -> None:
        found = page(route.path)
        if found is None:
            raise Refusal(404, f"path: expected one that /docs lists, got {route.path[:100]!r}")
        content, content_type = found
        await exchange.send(200, content, {"content-type": content_type, **PAGE_HEADERS})

    async def _openapi(self, exchange: Exchange, _route: Route) -> None:
        if not self._models.ready:
            raise not_ready("the models are being loaded")
        await exchange.send_json(openapi(self._models.infos(), self._settings))

    async def _live(self, exchange: Exchange, _route: Route) -> None:
        await exchange.send_json({"live": True})

    async def _ready(self, exchange: Exchange, _route: Route) -> None:
        if self._models.draining:
            raise not_ready("the server is stopping")
        if not self._models.ready:
            raise not_ready("the models are being loaded")
        await exchange.send_json({"ready": True, "models": self._models.describe()})

    async def _metrics(self, exchange: Exchange, _route: Route) -> None:
        text = await asyncio.to_thread(self._meters.text)
        await exchange.send(200, text, {"content-type": CONTENT_TYPE})

    # The protocol.

    async def _server(self, exchange: Exchange, _route: Route) -> None:
        found = {
            "name": "deploykit",
            "version": __version__,
            "extensions": EXTENSIONS,
            "provider": sorted({info.provider for info in self._models.infos()}),
            "models": self._models.describe(),
        }
        await exchange.send_json(found)

    async def _model(self, exchange: Exchange, route: Route) -> None:
        info = self._find(exchange, route).info
        versions = [info.version] if route.version else self._models.versions(info.name)
        await exchange.send_json(answers.metadata(info, versions))

    async def _model_ready(self, exchange: Exchange, route: Route) -> None:
        info = self._find(exchange, route).info
        if self._models.draining:
            raise not_ready("the server is stopping")
        await exchange.send_json({"name": info.name, "version": info.version, "ready": True})

    async def _config(self, exchange: Exchange, route: Route) -> None:
        info = self._find(exchange, route).info
        await exchange.send_json(answers.config(info, self._settings.max_batch))

    async def _statistics(self, exchange: Exchange, route: Route) -> None:
        infos = self._models.infos()
        if route.model is not None:
            found = self._find(exchange, route).info
            infos = [
                info
                for info in infos
                if info.name == found.name and route.version in (None, info.version)
            ]
        totals = await asyncio.to_thread(
            lambda: [self._meters.totals(info.name, info.version) for info in infos]
        )
        stats = [answers.statistics(*pair) for pair in zip(infos, totals, strict=True)]
        await exchange.send_json({"model_stats": stats})

    async def _index(self, exchange: Exchange, _route: Route) -> None:
        if exchange.method == "POST":
            await self._body(exchange)
        state = "UNAVAILABLE" if self._models.draining else "READY"
        await exchange.send_json(
            [
                {"name": info.name, "version": info.version, "state": state, "reason": ""}
                for info in self._models.infos()
            ]
        )

    async def _load(self, exchange: Exchange, route: Route) -> None:
        served = self._find(exchange, route)
        body = await self._body(exchange)
        if _object(body or b"{}").get("parameters"):
            raise Refusal(
                400,
                "load: expected no parameters, for a model is loaded from where the server was "
                "told at its start, got some; put the new bundle there",
            )
        if self._reload is None:
            raise Refusal(
                400, "load: expected a supervisor to swap models, got none; use deploykit serve"
            )
        await self._reload(served.info.name)
        await exchange.send_json({})

    async def _unload(self, exchange: Exchange, route: Route) -> None:
        self._find(exchange, route)
        raise Refusal(400, UNLOADED)

    async def _infer(self, exchange: Exchange, route: Route) -> None:
        self._find(exchange, route).batcher.refuse_if_full()
        body = await self._body(exchange)
        served = self._find(exchange, route)
        header = exchange.header(LENGTH_HEADER)
        with served.held():
            request = await self._parsed(
                exchange,
                served,
                lambda: parse_request(body, header, served.info, self._settings.max_batch),
                is_quick=count_json_bytes(header, len(body)) <= SMALL_JSON,
            )
            answer = await self._run(exchange, served, request.samples, request.timeout_s)
        text, headers = answers.write_response(request, answer.outputs, served.info)
        await exchange.send(200, text, {**headers, **_timing(answer)})

    # Prediction.

    async def _predict(self, exchange: Exchange, route: Route) -> None:
        top = exchange.query_number("top", TOP, MAX_TOP)
        self._find(exchange, route).batcher.refuse_if_full()
        body = await self._body(exchange)
        served, settings = self._find(exchange, route), self._settings
        _check_classes(served.info)
        kind = kind_of_body(body, exchange.header("content-type") or "")
        bounds = {"max_pixels": settings.max_pixels, "max_batch": settings.max_batch}
        deadline = self._deadline(exchange)
        with served.held():
            samples = await self._parsed(
                exchange,
                served,
                lambda: read_samples(body, kind, served.info, **bounds, deadline=deadline),
                is_quick=is_quick(body, kind),
            )
            answer = await self._run(exchange, served, samples)
        text = orjson.dumps(_prediction(answer.outputs, served, top))
        await exchange.send(200, text, {"content-type": "application/json", **_timing(answer)})

    async def _body(self, exchange: Exchange) -> bytes:
        return await read_body(exchange.headers, exchange.receive, self._settings.max_body)

    async def _parsed(
        self, exchange: Exchange, served: Served, parse: Callable[[], Parsed], *, is_quick: bool
    ) -> Parsed:
        """Parse a body; what takes long does so in a thread, and has its place in the queue."""
        if is_quick:
            return parse()
        with served.batcher.reserved(1):
            parsed = asyncio.get_running_loop().run_in_executor(self._decoders, parse)
            try:
                return await asyncio.wait_for(parsed, self._left_s(exchange))
            except TimeoutError as error:
                raise Refusal(504, TOO_LATE) from error

    def _deadline(self, exchange: Exchange) -> float:
        """Return when a request is given up, by ``time.perf_counter``."""
        return exchange.started + self._settings.timeout_s

    def _left_s(self, exchange: Exchange) -> float:
        """Return the seconds until the request's deadline."""
        return max(0.0, self._deadline(exchange) - time.perf_counter())

    async def _run(
        self,
        exchange: Exchange,
        served: Served,
        samples: np.ndarray,
        timeout_s: float | None = None,
    ) -> Answer:
        """Run samples, unless the client goes away or the deadline passes before."""
        left_s = self._left_s(exchange)
        exchange.watch()
        try:
            return await served.batcher.submit(samples, min(left_s, timeout_s or left_s))
        except asyncio.CancelledError:
            if exchange.is_gone:
                raise ClientGone from None
            raise
        finally:
            exchange.stop_watching()

    def _find(self, exchange: Exchange, route: Route) -> Served:
        served = self._models.find(route.model, route.version)
        exchange.model = served.info.name, served.info.version
        return served


def _check_classes(info: ModelInfo) -> None:
    """Refuse to name classes where a sample's output is not one row of them."""
    shape = info.manifest["outputs"][0]["shape"]
    if len(shape) > 2:
        raise Refusal(
            400,
            f"{info.name}: expected a model that gives one row of classes a sample, got one that "
            f"gives {shape}; ask its /infer",
        )


def _prediction(outputs: np.ndarray, served: Served, top: int) -> dict[str, Any]:
    """Name the likeliest classes of every sample."""
    info = served.info
    rows = [rank(row, info.labels, top) for row in softmax(outputs.reshape(len(outputs), -1))]
    return {
        "model": info.name,
        "version": info.version,
        "predictions": [{**best[0], "top": best} for best in rows],
    }


def _object(body: bytes) -> dict[str, Any]:
    value = parse_json(body)
    if not isinstance(value, dict):
        raise Refusal(400, f"body: expected a JSON object, got {kind_of(value)}")
    return value


async def _nothing(*_: Any) -> Any:
    """Stand for a connection that is not asked."""


def _timing(answer: Answer) -> dict[str, str]:
    """Tell where the time went (https://www.w3.org/TR/server-timing/), in milliseconds."""
    queue, compute = 1000 * answer.queue_s, 1000 * answer.compute_s
    return {
        "server-timing": f"queue;dur={queue:.3f}, compute;dur={compute:.3f}, "
        f'batch;desc="{answer.batch}"'
    }
