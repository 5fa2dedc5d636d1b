"""Where connections come in: a worker's end of the listening socket that all workers share."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import Any

from deploykit.server import http

ACCEPTED_AT_ONCE = 4  # few, so that workers share what comes in a burst
HANDSHAKE_S = 0.3  # a round trip around the world


class Door:
    """Takes connections from the listening socket, which all workers share."""

    def __init__(
        self,
        listener: socket.socket,
        app: Any,
        state: http.State,
        context: ssl.SSLContext | None,
    ) -> None:
        self._listener, self._context = listener, context
        self._loop = asyncio.get_running_loop()
        config = http.configure(app)
        self._connect = lambda: http.Connection(config, state, {}, self._loop)
        self._entering: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Take connections from now on."""
        self._loop.add_reader(self._listener, self._accept_some)

    async def close(self) -> None:
        """Take those that wait or are on the way, and no more."""
        await asyncio.sleep(HANDSHAKE_S)
        self._loop.remove_reader(self._listener)
        while self._accept():
            pass
        self._listener.close()
        if self._entering:
            await asyncio.wait(self._entering)

    def _accept_some(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if not self._accept():
                return

    def _accept(self) -> bool:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError:
            return True
        except OSError:  # no descriptor is free: those who wait outside keep their place
            self._loop.remove_reader(self._listener)
            self._loop.call_later(0.1, self._reopen)
            return False
        connection.setblocking(False)
        task = self._loop.create_task(self._enter(connection))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)
        return True

    def _reopen(self) -> None:
        if self._listener.fileno() >= 0:
            self.open()

    async def _enter(self, connection: socket.socket) -> None:
        timeout = {} if self._context is None else {"ssl_handshake_timeout": http.HEAD_S}
        with suppress(OSError):  # a client that fails the handshake, or has gone
            await self._loop.connect_accepted_socket(
                self._connect, connection, ssl=self._context, **timeout
            )
