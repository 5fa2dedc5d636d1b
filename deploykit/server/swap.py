"""Put new bundles in the place of old ones, in all workers or in none.

Every worker opens and warms the new bundles beside the old ones. Only when all have said that they
can, all are told to let them answer; where one cannot, the new ones are forgotten everywhere.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from deploykit.artifacts import JsonDict
from deploykit.errors import DeploykitError, UsageError
from deploykit.server.crew import Crew, Worker
from deploykit.server.snapshot import take_snapshot


class Swaps:
    """The swaps of a server, one after the other.

    Args:
        crew: the workers.
        sources: the bundles as given at start, where new ones are looked for.
        manifests: of what is served now, in the same order.
        folder: private, for the snapshots.
    """

    def __init__(
        self, crew: Crew, sources: Sequence[Path], manifests: Sequence[JsonDict], folder: Path
    ) -> None:
        self._crew, self._sources, self._folder = crew, tuple(sources), folder
        self._manifests = list(manifests)
        self._numbers = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()

    async def swap(self, model: str | None = None) -> list[str]:
        """Serve what now lies where the bundles were given.

        Args:
            model: the name of the one to swap; None: all.

        Returns:
            Name and version of what was swapped in.

        Raises:
            DeploykitError: the old ones keep serving.
        """
        async with self._one_at_a_time:
            slots = self._slots_of(model)
            number = next(self._numbers)
            folder = self._folder / f"swap-{number}"
            paths = {slot: folder / str(slot) for slot in slots}
            try:
                manifests = await asyncio.to_thread(self._take, paths)
                prepared = await self._prepare(number, paths)
            except BaseException:
                self._crew.send(do="discard", swap=number)
                shutil.rmtree(folder, ignore_errors=True)
                raise
            await self._commit(number, paths, prepared)
            for slot, manifest in manifests.items():
                self._manifests[slot] = manifest
            return [f"{one['name']} {one['version']}" for one in manifests.values()]

    def _slots_of(self, model: str | None) -> list[int]:
        slots = [
            slot
            for slot, manifest in enumerate(self._manifests)
            if model in (None, manifest["name"])
        ]
        if not slots:
            raise UsageError(f"model: expected one that is served, got {model!r}")
        return slots

    def _take(self, paths: dict[int, Path]) -> dict[int, JsonDict]:
        return {slot: take_snapshot(self._sources[slot], path) for slot, path in paths.items()}

    async def _prepare(self, number: int, paths: dict[int, Path]) -> list[Worker]:
        """Return the workers that could; who has died does not count, another is started."""
        slots = {str(slot): str(path) for slot, path in paths.items()}
        workers = [worker for worker in self._crew.workers.values() if worker.ready]
        answers = await asyncio.gather(
            *(worker.ask("prepare", "prepared", swap=number, slots=slots) for worker in workers)
        )
        prepared = []
        for worker, answer in zip(workers, answers, strict=True):
            if answer is not None and answer["error"] is not None:
                raise DeploykitError(answer["error"])
            if answer is not None:
                prepared.append(worker)
        if not prepared:
            raise DeploykitError("no worker has survived the new bundle; is there enough memory?")
        return prepared

    async def _commit(self, number: int, paths: dict[int, Path], prepared: list[Worker]) -> None:
        crew, old = self._crew, self._crew.bundles
        crew.bundles = tuple(paths.get(slot, path) for slot, path in enumerate(old))
        for worker in crew.workers.values():
            if worker not in prepared:  # it was started with the old ones, and begins again
                worker.kill()
        await asyncio.gather(*(self._confirm(worker, number) for worker in prepared))
        for slot in paths:
            shutil.rmtree(old[slot], ignore_errors=True)

    async def _confirm(self, worker: Worker, number: int) -> None:
        await worker.ask("commit", "committed", swap=number)
        worker.bundles = self._crew.bundles
