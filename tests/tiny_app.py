"""A server's application in this process, asked without a socket, and models made for it."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import make_bundle

from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.bundle import Golden
from deploykit.server.app import App
from deploykit.server.engine import ModelInfo
from deploykit.server.meters import Meters
from deploykit.server.models import Models
from deploykit.server.refusal import Refusal
from deploykit.server.settings import Settings

PROVIDER = "CPUExecutionProvider"
JSON_TYPE = "application/json"
Pieces = Iterable[bytes]
Check = Callable[["Asker"], Awaitable[None]]
# Every path of a server of the model tiny: open without a token, the others, and those of POST.
OPEN = ("/", "/docs", "/openapi.json", "/static/page.css", "/healthz", "/livez", "/readyz")
OPEN += ("/v2/health/live", "/v2/health/ready")
CLOSED = ("/metrics", "/v2", "/v2/models/stats", "/v2/models/tiny")
CLOSED += ("/v2/models/tiny/ready", "/v2/models/tiny/config", "/v2/models/tiny/stats")
CLOSED += ("/v2/models/tiny/versions/1.0", "/v2/models/tiny/versions/1.0/ready")
CLOSED += ("/v2/models/tiny/versions/1.0/config", "/v2/models/tiny/versions/1.0/stats")
CLOSED += ("/v2/repository/index",)
POSTS = ("/predict", "/predict/tiny", "/predict/tiny/versions/1.0")
POSTS += ("/v2/models/tiny/infer", "/v2/models/tiny/versions/1.0/infer")
POSTS += ("/v2/repository/models/tiny/load", "/v2/repository/models/tiny/unload")


@dataclass(frozen=True)
class Reply:
    """What the application answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one sentence of a refusal."""
        content = self.json()
        assert self.headers["content-type"] == "application/json"
        assert set(content) == {"error"}
        assert content["error"]
        assert "\n" not in content["error"]
        return content["error"]


@dataclass
class Asker:
    """Asks an application; ``gone`` lets its client close the connection."""

    app: App
    models: Models
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(
        self,
        method: str,
        target: str,
        body: bytes | Pieces = b"",
        headers: Iterable[tuple[str, str]] = (),
    ) -> Reply:
        path, _, query = target.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "headers": [(name.lower().encode(), text.encode("latin-1")) for name, text in headers],
            "client": ("192.0.2.1", 5),
        }
        pieces = [body] if isinstance(body, bytes) else list(body)
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        if not sent:
            return Reply(0, {}, b"")
        told = {name.decode(): text.decode("latin-1") for name, text in sent[0]["headers"]}
        assert len(told) == len(sent[0]["headers"])
        assert all(text.isprintable() for text in told.values())
        return Reply(sent[0]["status"], told, sent[1]["body"])

    async def get(self, target: str, **headers: str) -> Reply:
        return await self("GET", target, headers=_spelled(headers))

    async def post(self, target: str, body: Any = b"", **headers: str) -> Reply:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self("POST", target, content, _spelled(headers))


def _spelled(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", "-"), text) for name, text in headers.items()]


@asynccontextmanager
async def served(
    *bundles: Path, loaded: bool = True, reload: Any = None, **settings: Any
) -> AsyncIterator[Asker]:
    """Serve bundles while a test asks."""
    options = {"access_log": False, "threads": 1, "max_batch": 8, **settings}
    chosen = Settings(tuple(map(str, bundles)), **options)
    models = Models(chosen, Meters())
    asker = Asker(App(models, chosen, reload), models)
    try:
        if loaded:
            await models.load()
        yield asker
    finally:
        await models.close()
        asker.app.close()


def run(work: Coroutine[Any, Any, Any], seconds: float = 30) -> Any:
    """Run a test's coroutine; one that hangs fails."""
    return asyncio.run(asyncio.wait_for(work, seconds))


def serving(check: Check, *bundles: Path, **settings: Any) -> None:
    """Run a check against a server of its own."""

    async def work() -> None:
        async with served(*bundles, **settings) as ask:
            await check(ask)

    run(work())


def infer_body(*pixels: int, **head: Any) -> dict[str, Any]:
    shape = [len(pixels), 4, 4, 1]
    data = [pixel for pixel in pixels for _ in range(16)]
    return {
        "inputs": [{"name": "image", "shape": shape, "datatype": "UINT8", "data": data}],
        **head,
    }


def rows(name: str, datatype: str, values: Any) -> dict[str, Any]:
    array = np.array(values)
    tensor = {"name": name, "shape": list(array.shape), "datatype": datatype, "data": values}
    return {"inputs": [tensor]}


def only_refuses(parse: Callable[[], Any]) -> None:
    """The law of every parser: it reads, or it refuses with a status of the client's."""
    try:
        parse()
    except Refusal as refusal:
        is_told = 0 < len(refusal.message) < 1500
        if not (is_told and 400 <= refusal.status < 500):
            raise AssertionError("expected one sentence for the client") from refusal


# Bundles.


def echo_bundle(
    folder: Path, dtype: str = "float32", shape: tuple[int, ...] = (3,), **changes: Any
) -> Path:
    """Write a bundle whose answer is its input; a size of -1 varies."""
    node = helper.make_node("Identity", ["x"], ["y"])
    model = _model(folder, [node], (dtype, shape), (dtype, shape), changes.pop("labels", ()))
    sample = np.ones((3, *(2 if size == -1 else size for size in shape)), dtype)
    return _bundle(folder, model, sample, changes)


def sum_bundle(folder: Path, **changes: Any) -> Path:
    """Write a bundle that gives one number a sample, without an axis of classes."""
    axes = numpy_helper.from_array(np.array([1]), "axes")
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)
    model = _model(folder, [node], ("float32", (3,)), ("float32", ()), (), [axes])
    return _bundle(folder, model, np.ones((3, 3), np.float32), changes)


def table_bundle(folder: Path, **changes: Any) -> Path:
    """Write a bundle that looks its int64 input up in 4 rows: others make the session fail."""
    table = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "table")
    shape = numpy_helper.from_array(np.array([-1, 3]), "shape")
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["rows"]),
        helper.make_node("Reshape", ["rows", "shape"], ["y"]),
    ]
    model = _model(folder, nodes, ("int64", (1,)), ("float32", (3,)), (), [table, shape])
    return _bundle(folder, model, np.zeros((3, 1), np.int64), changes)


def slow_bundle(folder: Path, **changes: Any) -> Path:
    """Write a bundle that counts to its input: a million steps take a second or more."""
    step = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still"]),
            helper.make_node("Add", ["sum", "one"], ["more"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("at", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, ["n", 1]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["trips"], keepdims=0),
        helper.make_node("Cast", ["x"], ["start"], to=TensorProto.FLOAT),
        helper.make_node("Loop", ["trips", "true", "start"], ["y"], body=step),
    ]
    constants = [
        numpy_helper.from_array(np.array(True), "true"),
        numpy_helper.from_array(np.float32(1), "one"),
    ]
    model = _model(folder, nodes, ("int64", (1,)), ("float32", (1,)), (), constants)
    return _bundle(folder, model, np.ones((3, 1), np.int64), changes)


def _model(
    folder: Path,
    nodes: list[Any],
    source: tuple[str, tuple[int, ...]],
    result: tuple[str, tuple[int, ...]],
    labels: Iterable[str],
    constants: Iterable[Any] = (),
) -> OnnxModel:
    specs = [
        TensorSpec(name, dtype, (-1, *shape))
        for name, (dtype, shape) in zip("xy", (source, result), strict=True)
    ]
    borders = [
        helper.make_tensor_value_info(
            spec.name,
            helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)),
            ["n", *(f"d{at}" if n == -1 else n for at, n in enumerate(spec.shape[1:]))],
        )
        for spec in specs
    ]
    graph = helper.make_graph(nodes, "odd", borders[:1], borders[1:], list(constants))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "odd.onnx"
    onnx.save(proto, path)
    return OnnxModel(path, Signature((specs[0],), (specs[1],), tuple(labels)), 20)


def _bundle(folder: Path, model: OnnxModel, inputs: np.ndarray, changes: Mapping[str, Any]) -> Path:
    session = onnxruntime.InferenceSession(model.path, providers=[PROVIDER])
    outputs = session.run(None, {"x": inputs})[0]
    golden = Golden(list(inputs), inputs, outputs)
    arguments: dict[str, Any] = {"model": model, "golden": golden, "task": "classification"}
    return make_bundle(folder, **(arguments | {"name": "echo"} | dict(changes)))


# Engines for the batcher.


class PlantedEngine:
    """Doubles its input, a run at a time; ``gate`` holds every run until it is set.

    Attributes:
        batches: the input of every run.
        overlaps: runs that began while another was under way.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.info = ModelInfo("planted", "1", PROVIDER, {})
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[np.ndarray] = []
        self.overlaps = 0
        self._busy = threading.Lock()

    def run(self, batch: np.ndarray, options: Any = None) -> np.ndarray:
        free = self._busy.acquire(blocking=False)
        self.overlaps += not free
        try:
            self.batches.append(batch)
            assert self.gate.wait(10)
            time.sleep(self.seconds)
            return self.answer(batch, options)
        finally:
            if free:
                self._busy.release()

    def answer(self, batch: np.ndarray, options: Any) -> np.ndarray:
        return 2 * batch
