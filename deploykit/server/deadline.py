"""A timer for every connection, which every request moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """A timer that is cheap to move: a later time is only noted, and looked at when it rings."""

    def __init__(self, loop: asyncio.AbstractEventLoop, overdue: Callable[[], object]) -> None:
        self.loop, self.overdue = loop, overdue
        self.due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, due: float) -> None:
        """Ring at ``due``, in seconds of the loop's clock."""
        self.due = due
        if self._timer is not None and self._timer.when() > due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(due, self._ring)

    def clear(self) -> None:
        """Do not ring."""
        self.due = None

    def cancel(self) -> None:
        """Do not ring, and hold nothing."""
        self.due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        if self.due is None:
            return
        if self.loop.time() < self.due:
            self._timer = self.loop.call_at(self.due, self._ring)
            return
        self.due = None
        self.overdue()
