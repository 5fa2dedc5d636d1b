"""The models that a worker serves, by name and version, and how new ones take their place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import UsageError
from deploykit.server.batcher import Batcher
from deploykit.server.engine import Engine, ModelInfo, open_engine
from deploykit.server.meters import Meters, ModelMeters
from deploykit.server.refusal import Refusal
from deploykit.server.settings import Settings


@dataclass(eq=False)
class Served:
    """One version of a model that answers.

    Attributes:
        users: requests that hold it; until they let go, it is not closed.
    """

    engine: Engine
    batcher: Batcher
    users: int = 0

    @property
    def info(self) -> ModelInfo:
        """What is told of it."""
        return self.engine.info

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep it open for a request."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1


class Models:
    """All models of a worker; the order is that of the command line.

    Attributes:
        ready: whether all are loaded and warm.
        draining: whether the server is about to stop; set by the worker.
    """

    def __init__(self, settings: Settings, meters: Meters) -> None:
        self.settings, self.meters = settings, meters
        self.ready = self.draining = False
        self._slots: dict[int, Served] = {}
        self._prepared: dict[int, dict[int, Engine]] = {}
        self._versions: dict[str, dict[str, Served]] = {}

    async def load(self) -> None:
        """Open and warm every bundle of the settings.

        Raises:
            DeploykitError: one of them cannot be served.
        """
        for slot, path in enumerate(self.settings.bundles):
            self._slots[slot] = self._serve(await self._open(path))
        self._index()
        self.ready = True

    async def prepare(self, swap: int, slots: Mapping[int, str]) -> None:
        """Open and warm new bundles beside those that serve.

        Args:
            swap: its number, by which it is committed or discarded.
            slots: paths by their place on the command line.

        Raises:
            DeploykitError: one of them cannot take the place; nothing has changed then.
        """
        engines: dict[int, Engine] = {}
        for slot, path in slots.items():
            engines[slot] = await self._open(path)
            found, name = engines[slot].info.name, self._slots[slot].info.name
            if found != name:
                raise UsageError(
                    f"{path}: expected a bundle of {name}, whose place it takes, got {found}"
                )
        infos = {slot: served.info for slot, served in self._slots.items()}
        _check_distinct({**infos, **{slot: engine.info for slot, engine in engines.items()}})
        self._prepared[swap] = engines

    async def commit(self, swap: int) -> None:
        """Let prepared bundles answer from now on; the old ones finish what they have."""
        engines = self._prepared.pop(swap)
        old = [self._slots[slot] for slot in engines]
        for slot, engine in engines.items():
            self._slots[slot] = self._serve(engine)
        self._index()
        for served in old:
            await self._retire(served)

    async def _retire(self, served: Served) -> None:
        await self._finish(served)
        info = served.info
        if info.version not in self.versions(info.name):
            self.meters.gone(info.name, info.version, info.provider)

    def discard(self, swap: int) -> None:
        """Forget what was prepared."""
        self._prepared.pop(swap, None)

    async def close(self) -> None:
        """Finish what is queued."""
        self.ready = False
        for served in self._slots.values():
            await self._finish(served)

    async def _finish(self, served: Served) -> None:
        """Answer who holds it, then end its thread."""
        while served.users:
            await asyncio.sleep(0.01)
        await served.batcher.close()

    def find(self, name: str | None, version: str | None = None) -> Served:
        """Return the version of a model that answers.

        Args:
            name: of the model; None: the first one given.
            version: None: the highest.

        Raises:
            Refusal: 404, there is none; 503, it is not loaded yet.
        """
        if not self.ready:
            raise not_ready("the models are being loaded")
        name = self._slots[0].info.name if name is None else name
        versions = self._versions.get(name)
        if versions is None:
            known = ", ".join(self._versions)
            raise Refusal(404, f"model: expected one of {known}, got {name[:80]!r}")
        if version is None:
            return next(iter(versions.values()))
        if version not in versions:
            raise Refusal(
                404, f"version of {name}: expected {', '.join(versions)}, got {version[:80]!r}"
            )
        return versions[version]

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model, the highest first."""
        return list(self._versions.get(name, ()))

    def infos(self) -> list[ModelInfo]:
        """Return what is told of every version; of a name the highest comes first."""
        return [served.info for name in self._versions.values() for served in name.values()]

    def describe(self) -> list[dict[str, Any]]:
        """Return name, version and provider of everything that answers."""
        return [
            {"name": info.name, "version": info.version, "provider": info.provider}
            for info in self.infos()
        ]

    async def _open(self, path: str) -> Engine:
        settings = self.settings
        return await asyncio.to_thread(
            open_engine,
            Path(path),
            threads=settings.threads or 1,
            require_gpu=settings.require_gpu,
            max_batch=settings.max_batch,
        )

    def _serve(self, engine: Engine) -> Served:
        settings, info = self.settings, engine.info
        batcher = Batcher(
            engine,
            ModelMeters(self.meters, info.name, info.version, info.provider),
            max_batch=engine.batch,
            window_us=settings.window_us,
            queue=settings.queue,
        )
        return Served(engine, batcher)

    def _index(self) -> None:
        """Make what requests look up, in one step."""
        _check_distinct({slot: served.info for slot, served in self._slots.items()})
        versions: dict[str, dict[str, Served]] = {}
        by_version = sorted(self._slots.values(), key=_version_key, reverse=True)
        for served in (*self._slots.values(), *by_version):
            versions.setdefault(served.info.name, {}).pop(served.info.version, None)
            versions[served.info.name][served.info.version] = served
        self._versions = versions


def not_ready(why: str) -> Refusal:
    """Return what a server answers that takes no requests yet, or no more."""
    return Refusal(503, f"not ready: {why}; try again", {"retry-after": "1"})


def _check_distinct(infos: Mapping[int, ModelInfo]) -> None:
    keys = [(info.name, info.version) for info in infos.values()]
    for name, version in keys:
        if keys.count((name, version)) > 1:
            raise UsageError(
                f"{name} {version}: expected versions that differ, got two of it; "
                "export one of them with another version"
            )


def _version_key(served: Served) -> tuple[tuple[int, ...], str]:
    """Order 1.10 after 1.9; what is no number comes first, by its letters."""
    version = served.info.version
    parts = version.split(".")
    numbers = tuple(int(part) for part in parts if part.isascii() and part.isdecimal())
    return (numbers if len(numbers) == len(parts) else (), version)
