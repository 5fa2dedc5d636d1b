"""What the supervisor and a worker say to each other: lines of JSON over a pair of sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

MAX_LINE = 2**20


class Channel:
    """One end of the pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @staticmethod
    async def over(end: socket.socket) -> Channel:
        """Return the channel over one end of a socket pair, which it takes over."""
        return Channel(*await asyncio.open_unix_connection(sock=end, limit=MAX_LINE))

    def send(self, **message: Any) -> None:
        """Send a message; who is gone misses it."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """Return the next message; None: the other end is gone."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):
            return None
        return dict(json.loads(line)) if line.endswith(b"\n") else None

    async def flush(self) -> None:
        """Wait until everything was handed to the system."""
        await self._writer.drain()

    def close(self) -> None:
        """Close this end."""
        self._writer.close()
