"""A small HTTP server in this process that speaks the contract, and can be told to break it."""

import asyncio
import io
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METADATA = {
    "name": "tiny",
    "versions": ["1.0"],
    "platform": "onnx_onnxv1",
    "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 2, 2, 1]}],
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
}


@dataclass
class Asked:
    """A request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Told:
    """An answer; ``raw`` replaces all of it, and ``b""`` closes the connection."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None

    def encode(self) -> bytes:
        if self.raw is not None:
            return self.raw
        fields = {"Content-Length": str(len(self.body)), **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"HTTP/1.1 {self.status} Reason\r\n{lines}\r\n".encode() + self.body


Answer = Callable[[Asked], Awaitable[Told]]


def tell(value: Any, status: int = 200, **headers: str) -> Told:
    headers = {name.replace("_", "-"): one for name, one in headers.items()}
    return Told(status, json.dumps(value).encode(), headers)


def logits_of(pixels: np.ndarray) -> np.ndarray:
    """What the tiny model computes: (N, 3) float32 of (N, 2, 2, 1) uint8."""
    flat = pixels.reshape(len(pixels), 4).astype(np.float32)
    return np.stack([flat.sum(1), flat.max(1), flat.min(1)], axis=1)


def tell_tensors(outputs: dict[str, tuple[str, np.ndarray]]) -> Told:
    about = [
        {
            "name": name,
            "datatype": datatype,
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, (datatype, array) in outputs.items()
    ]
    head = json.dumps({"model_name": "tiny", "outputs": about}).encode()
    body = head + b"".join(array.tobytes() for _, array in outputs.values())
    return Told(200, body, {"Inference-Header-Content-Length": str(len(head))})


def inputs_of(asked: Asked) -> dict[str, np.ndarray]:
    """Read the tensors of a request whose inputs are uint8."""
    length = int(asked.headers["inference-header-content-length"])
    rest, found = asked.body[length:], {}
    for one in json.loads(asked.body[:length])["inputs"]:
        size = one["parameters"]["binary_data_size"]
        found[one["name"]] = np.frombuffer(rest[:size], np.uint8).reshape(one["shape"])
        rest = rest[size:]
    assert rest == b""
    return found


def count_samples(body: bytes) -> int:
    if body.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(body))
        return len(array) if array.ndim == 4 else 1
    return len(json.loads(body)["images"]) if body.startswith(b"{") else 1


async def by_contract(asked: Asked) -> Told:
    """Answer as a server of deploykit does that serves one model, ``tiny``."""
    path = asked.target.partition("?")[0]
    if path.startswith("/predict"):
        top = [{"label": "a", "probability": 0.75}, {"label": "b", "probability": 0.25}]
        one = {**top[0], "top": top}
        samples = count_samples(asked.body)
        return tell({"model": "tiny", "version": "1.0", "predictions": [one] * samples})
    if path.endswith("/infer"):
        return tell_tensors({"logits": ("FP32", logits_of(inputs_of(asked)["image"]))})
    known = {
        "/v2/health/ready": {"ready": True},
        "/v2/repository/index": [
            {"name": "tiny", "version": "1.0", "state": "READY", "reason": ""}
        ],
        "/v2/models/tiny": METADATA,
    }
    return tell(known[path]) if path in known else tell({"error": f"no {path}"}, 404)


class TinyServer:
    """Serves ``answer`` over keep-alive connections, and remembers what was asked."""

    def __init__(self, answer: Answer = by_contract) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.connections = 0
        self.at_once = 0  # the most requests that were under way at once
        self._under_way = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                told = await self._answer_one(reader)
                data = told.encode()
                writer.write(data)
                await writer.drain()
                if not data or told.headers.get("Connection") == "close":
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the server shuts
        finally:
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader) -> Told:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[:-1]
        method, target, _ = first.split()
        headers = {name.lower(): value for name, value in (one.split(": ", 1) for one in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        asked = Asked(method, target, headers, body)
        self.asked.append(asked)
        self._under_way += 1
        self.at_once = max(self.at_once, self._under_way)
        try:
            return await self.answer(asked)
        finally:
            self._under_way -= 1


@contextmanager
def serving(
    answer: Answer = by_contract, port: int = 0, context: ssl.SSLContext | None = None
) -> Iterator[TinyServer]:
    """Serve in a thread of its own."""
    server, loop = TinyServer(answer), asyncio.new_event_loop()
    opened = loop.run_until_complete(
        asyncio.start_server(server.serve, "127.0.0.1", port, ssl=context)
    )
    scheme = "http" if context is None else "https"
    server.url = f"{scheme}://127.0.0.1:{opened.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_shut(opened), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _shut(opened: asyncio.Server) -> None:
    opened.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
