"""How a server behaves: what the command line sets, and what every worker is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What `deploykit serve` was asked for; `start` checks the bounds.

    Attributes:
        bundles: absolute paths; a worker gets those of snapshots.
        workers: processes that answer.
        threads: of one prediction; None: the cores of this process, shared out over the workers.
        require_gpu: whether a model that computes on the CPU is refused at start.
        max_batch: samples that run together, and that one request may bring.
        window_us: how long the first sample waits for others, in microseconds; 0: what waits
            while the session is busy goes together, and nothing waits while it is idle.
        queue: samples that may wait, for each model of a worker; more are refused with 429.
        timeout_s: after so many seconds a request is given up with 504.
        max_body: bytes of a request's body, as sent and unpacked.
        max_pixels: of an image, before it is decoded.
        token: demanded as ``Authorization: Bearer``; None: everybody may ask.
        cors: origins whose pages may ask.
        access_log: whether every request is told on standard output.
        tracing: whether requests pass BentoML's middleware, OpenTelemetry's among it.
        host: to listen at.
        port: to listen at; 0: any that is free.
        grace_s: after so many seconds of draining the workers are killed.
        drain_s: seconds in which readiness says no while requests are still taken.
        tls_cert: PEM file with the server's certificate and its chain.
        tls_key: PEM file with its key.
    """

    bundles: tuple[str, ...]
    workers: int = 1
    threads: int | None = None
    require_gpu: bool = False
    max_batch: int = 32
    window_us: int = 0
    queue: int = 64
    timeout_s: float = 10.0
    max_body: int = 8 * MIB
    max_pixels: int = 16_000_000
    token: str | None = None
    cors: tuple[str, ...] = ()
    access_log: bool = True
    tracing: bool = False
    host: str = "127.0.0.1"
    port: int = 3000
    grace_s: float = 30.0
    drain_s: float = 1.0
    tls_cert: str | None = None
    tls_key: str | None = None

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """Return the settings that ``to_json`` wrote."""
        found: dict[str, Any] = json.loads(text)
        return Settings(**{**found, **{key: tuple(found[key]) for key in ("bundles", "cors")}})
