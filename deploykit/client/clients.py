"""Clients that block and clients that await: how the same calls are sent and waited for."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx

from deploykit.address import bearer, parse_address
from deploykit.client import calls
from deploykit.client.calls import Ask, File, Pause, Prediction, Reply, ServedModel, Steps, T
from deploykit.client.tensors import Array


class Client:
    """Asks a server, one call after the other; threads may share it.

    Args:
        url: of the server, as ``http://127.0.0.1:3000``, with or without a base path.
        token: what the server demands; None where it demands nothing.
        timeout_s: how long to wait for a connection, and for each part of an answer.
        retries: how many times a request is sent again while the server takes nothing: nobody
            listens, 429 or 503. Nothing else is ever sent again.

    Raises:
        UsageError: no URL of a server, or no token.
    """

    def __init__(
        self, url: str, token: str | None = None, timeout_s: float = 10, retries: int = 3
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(
            base_url=parse_address(url).url, headers=bearer(token), timeout=timeout_s
        )

    def predict(
        self,
        samples: File | Array | Sequence[File],
        model: str | None = None,
        version: str | None = None,
        top: int = 5,
    ) -> list[Prediction]:
        """Classify one sample or several.

        Args:
            samples: an image or ``.npy`` file (its path or its bytes); several image files; or an
                array: one sample, or samples along the first axis.
            model: its name; None for the first that the server was given.
            version: of that model; None for the highest.
            top: how many classes to rank for each sample.

        Returns:
            A prediction for each sample, in their order.

        Raises:
            DataError: a file cannot be read.
            RequestRefused: the server cannot use the samples, or has no such model.
            ServerBusy: the server took nothing, after all retries.
            ServerError: nobody answers, or not as a server of deploykit does.

        Example:
            >>> client.predict("digit.png")[0].label  # doctest: +SKIP
            '7'
        """
        return self._run(calls.predict(samples, model, version, top, self._retries))

    def infer(
        self, inputs: Array | Mapping[str, Array], model: str, version: str | None = None
    ) -> dict[str, Array]:
        """Run a model on tensors, by the Open Inference Protocol's binary extension.

        Args:
            inputs: arrays by the name of the input, of the model's dtype and with the batch axis
                first; or one array for the only input, whose name costs one more request.
            model: its name.
            version: of that model; None for the highest.

        Returns:
            The outputs by name.

        Raises:
            RequestRefused, ServerBusy, ServerError: as of `predict`.
        """
        return self._run(calls.infer(inputs, model, version, self._retries))

    def metadata(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return what the Open Inference Protocol tells of a model: names, datatypes, shapes.

        Raises:
            RequestRefused, ServerBusy, ServerError: as of `predict`.
        """
        return self._run(calls.metadata(model, version, self._retries))

    def models(self) -> list[ServedModel]:
        """List the models that the server has.

        Raises:
            RequestRefused, ServerBusy, ServerError: as of `predict`.
        """
        return self._run(calls.models(self._retries))

    def ready(self) -> bool:
        """Tell whether the server takes requests; False too where nobody answers.

        Raises:
            RequestRefused, ServerError: somebody answers who is no server of deploykit.
        """
        return self._run(calls.ready())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    step = next(steps)
                else:
                    step = steps.send(self._send(step))
        except StopIteration as done:
            answer: T = done.value
            return answer

    def _send(self, ask: Ask) -> Reply:
        try:
            return self._http.request(
                ask.method, ask.path, content=ask.content, headers=ask.headers
            )
        except httpx.TransportError as error:
            return error


class AsyncClient:
    """What `Client` is, for asyncio: the same methods, to be awaited, many at once."""

    def __init__(
        self, url: str, token: str | None = None, timeout_s: float = 10, retries: int = 3
    ) -> None:
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=parse_address(url).url, headers=bearer(token), timeout=timeout_s
        )

    async def predict(
        self,
        samples: File | Array | Sequence[File],
        model: str | None = None,
        version: str | None = None,
        top: int = 5,
    ) -> list[Prediction]:
        """Classify one sample or several: see `Client.predict`."""
        return await self._run(calls.predict(samples, model, version, top, self._retries))

    async def infer(
        self, inputs: Array | Mapping[str, Array], model: str, version: str | None = None
    ) -> dict[str, Array]:
        """Run a model on tensors: see `Client.infer`."""
        return await self._run(calls.infer(inputs, model, version, self._retries))

    async def metadata(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return names, datatypes and shapes of a model: see `Client.metadata`."""
        return await self._run(calls.metadata(model, version, self._retries))

    async def models(self) -> list[ServedModel]:
        """List the models that the server has: see `Client.models`."""
        return await self._run(calls.models(self._retries))

    async def ready(self) -> bool:
        """Tell whether the server takes requests: see `Client.ready`."""
        return await self._run(calls.ready())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = next(steps)
                else:
                    step = steps.send(await self._send(step))
        except StopIteration as done:
            answer: T = done.value
            return answer

    async def _send(self, ask: Ask) -> Reply:
        try:
            return await self._http.request(
                ask.method, ask.path, content=ask.content, headers=ask.headers
            )
        except httpx.TransportError as error:
            return error
