import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from deploykit.progress import ConsoleProgress, SilentProgress


def drive(progress, *, stage="train", epochs=12, steps=352, epochs_shown=2):
    progress.stage_started(stage, epochs, steps, 0)
    for epoch in range(epochs_shown):
        for _ in range(steps):
            progress.step_done(epoch, 1.2345, 0.8765)
        progress.epoch_done(epoch, loss=1.2345, accuracy=0.8765, lr=3e-3, seconds=12.34)
    progress.message("a word to the user")
    progress.stage_ended()


def test_without_a_terminal_an_epoch_is_one_plain_line():
    stream = io.StringIO()
    drive(ConsoleProgress(stream))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "train  1/12  loss 1.2345  val acc 0.8765  lr 3.00e-03  12.3 s",
        "train  2/12  loss 1.2345  val acc 0.8765  lr 3.00e-03  12.3 s",
        "a word to the user",
    ]


def rendered(width, monkeypatch, stage="train"):
    """Return every line that a terminal of that width is shown."""
    monkeypatch.setattr("deploykit.progress.REFRESH_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    progress = ConsoleProgress(console=console)
    progress.stage_started(stage, 100, 20, 0)
    for _ in range(20):
        progress.step_done(3, 1.2345, 0.8765)
        progress._bars.refresh()
    progress.stage_ended()
    return re.split("[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", stream.getvalue()))


@pytest.mark.parametrize("width", [80, 60, 200])
def test_bar_fits_the_terminal_in_one_line(width, monkeypatch):
    bars = [line for line in rendered(width, monkeypatch, stage="quantize") if "loss" in line]
    assert bars
    assert all(cell_len(line) <= width for line in bars)


def test_bar_shows_loss_metric_rate_and_time_left(monkeypatch):
    shown = "\n".join(rendered(80, monkeypatch))
    for part in ("train 4/100", "loss 1.23", "acc 0.87", "steps/s", ":"):
        assert part in shown


def test_terminal_keeps_the_epoch_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    drive(ConsoleProgress(console=console), epochs_shown=1, steps=3)
    assert "val acc 0.8765" in stream.getvalue()


def test_markup_in_a_message_is_shown_as_it_is():
    stream = io.StringIO()
    ConsoleProgress(stream).message("layer[0] of [red]")
    assert stream.getvalue() == "layer[0] of [red]\n"


def test_ending_twice_or_before_the_start_does_no_harm():
    progress = ConsoleProgress(io.StringIO())
    progress.stage_ended()
    drive(progress)
    progress.stage_ended()


def test_silence_says_nothing(capsys):
    drive(SilentProgress())
    assert capsys.readouterr() == ("", "")
