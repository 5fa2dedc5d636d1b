import signal
import subprocess
import sys
import threading

import pytest

from deploykit.errors import Interrupted
from deploykit.interrupt import raise_if_stopped, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_obeyed_where_it_is_polled(number):
    with stop_on_signals():
        raise_if_stopped("before")
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=f"prune: stopped by {number.name}") as caught:
            raise_if_stopped("prune")
    assert caught.value.signal == number
    assert caught.value.exit_code == 128 + number


def test_handlers_and_notes_end_with_the_block():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    raise_if_stopped("after")


def test_second_interrupt_is_obeyed_at_once():
    with stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_second_termination_is_obeyed_at_once():
    script = (
        "import signal; from deploykit.interrupt import stop_on_signals\n"
        "with stop_on_signals():\n"
        "    signal.raise_signal(signal.SIGTERM); print('once', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM); print('twice', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("once\n", -signal.SIGTERM)


def test_inner_block_leaves_the_outer_one_in_charge():
    with stop_on_signals():
        with stop_on_signals():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            raise_if_stopped("outer")


def test_other_threads_may_enter():
    entered = []

    def work():
        with stop_on_signals():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
