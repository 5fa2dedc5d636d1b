"""Which application answers a request: ours, or BentoML's."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from deploykit.server.app import App
from deploykit.server.models import Models


class Front:
    """Gives each request to our application, or to BentoML's.

    BentoML's middlewares take longer than a small model, and loading them longer than all the rest
    of the start. So its application is made when it is needed: for the paths that are its own, or
    for everything with tracing.
    """

    def __init__(self, app: App, models: Models) -> None:
        self._app, self._models = app, models
        self._bentoml: Any = None
        self._tracing = False
        self._making = asyncio.Lock()
        self._exits = AsyncExitStack()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if self._tracing or not self._app.knows(scope["path"]):
            await (await self._made())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def trace(self) -> None:
        """Let every request pass BentoML's middlewares from now on."""
        await self._made()
        self._tracing = True

    async def close(self) -> None:
        """Let BentoML end."""
        await self._exits.aclose()

    async def _made(self) -> Any:
        async with self._making:
            if self._bentoml is None:
                made = await asyncio.to_thread(self._make)
                await self._exits.enter_async_context(made.router.lifespan_context(made))
                self._bentoml = made
        return self._bentoml

    def _make(self) -> Any:
        from deploykit.server.service import build_service

        return build_service(self._models, self._app, owned=False).to_asgi()
