"""Stop at a safe place: a signal is noted, and obeyed where the work can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from deploykit.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM)

# Signal handlers belong to the process, and so does what they noted.
_received: list[int] = []


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Note SIGINT and SIGTERM instead of dying by them.

    `raise_if_stopped`, called where the work can be resumed, then raises. A second signal
    of the same kind meets Python's own handler and ends the work at once. Outside of the
    main thread, where Python takes no handlers, and inside another `stop_on_signals`
    nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is _note:
        yield
        return
    before = {number: signal.signal(number, _note) for number in STOPPING}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    at_once = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, at_once)


def raise_if_stopped(where: str) -> None:
    """Raise if a signal came since `stop_on_signals` began.

    Args:
        where: what was going on, for the message.

    Raises:
        Interrupted: with the first signal that came.
    """
    if _received:
        name = signal.Signals(_received[0]).name
        raise Interrupted(_received[0], f"{where}: stopped by {name}; --resume goes on from here")
