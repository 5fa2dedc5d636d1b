"""What a long stage tells the person who waits for it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

REFRESH_SECONDS = 0.1


class Progress(Protocol):
    """The events of a stage, in the order in which they come.

    Implementations only look on: they never change what is trained.
    """

    def stage_started(self, stage: str, epochs: int, steps: int, done: int) -> None:
        """A stage of ``epochs`` with ``steps`` each begins; ``done`` steps lie behind it."""

    def step_done(self, epoch: int, loss: float, accuracy: float) -> None:
        """One step is done; ``loss`` and ``accuracy`` are the epoch's means until now."""

    def epoch_done(
        self, epoch: int, *, loss: float, accuracy: float, lr: float, seconds: float
    ) -> None:
        """An epoch is done; ``loss`` is of the training, ``accuracy`` of the validation split."""

    def stage_ended(self) -> None:
        """The stage is over, be it done, stopped or failed."""

    def message(self, text: str) -> None:
        """Say one sentence."""


class SilentProgress:
    """Says nothing."""

    def stage_started(self, stage: str, epochs: int, steps: int, done: int) -> None:
        """See `Progress`."""

    def step_done(self, epoch: int, loss: float, accuracy: float) -> None:
        """See `Progress`."""

    def epoch_done(
        self, epoch: int, *, loss: float, accuracy: float, lr: float, seconds: float
    ) -> None:
        """See `Progress`."""

    def stage_ended(self) -> None:
        """See `Progress`."""

    def message(self, text: str) -> None:
        """See `Progress`."""


class LoggedProgress:
    """Tells another progress everything, and keeps the sentences and epochs in a file.

    Args:
        progress: who is told.
        log: the file, appended to; its folder is made if need be.
    """

    def __init__(self, progress: Progress, log: Path) -> None:
        self._progress, self._log = progress, log
        log.parent.mkdir(parents=True, exist_ok=True)

    def stage_started(self, stage: str, epochs: int, steps: int, done: int) -> None:
        """See `Progress`."""
        self._write(f"{stage}: {epochs} epochs of {steps} steps, {done} done before")
        self._progress.stage_started(stage, epochs, steps, done)

    def step_done(self, epoch: int, loss: float, accuracy: float) -> None:
        """See `Progress`."""
        self._progress.step_done(epoch, loss, accuracy)

    def epoch_done(
        self, epoch: int, *, loss: float, accuracy: float, lr: float, seconds: float
    ) -> None:
        """See `Progress`."""
        self._write(f"epoch {epoch}: loss {loss:.6f}, validation accuracy {accuracy:.6f}")
        self._progress.epoch_done(epoch, loss=loss, accuracy=accuracy, lr=lr, seconds=seconds)

    def stage_ended(self) -> None:
        """See `Progress`."""
        self._progress.stage_ended()

    def message(self, text: str) -> None:
        """See `Progress`."""
        self._write(text)
        self._progress.message(text)

    def _write(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")


class ConsoleProgress:
    """A bar with rate and time left on a terminal, elsewhere one plain line an epoch.

    Args:
        stream: where to write; standard error by default, so that output can be piped.
        console: a `rich` console to use in its place.
    """

    def __init__(self, stream: TextIO | None = None, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(file=stream or sys.stderr, highlight=False)
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._stage, self._epochs, self._done, self._shown = "", 0, 0, 0.0

    def stage_started(self, stage: str, epochs: int, steps: int, done: int) -> None:
        """See `Progress`."""
        self._stage, self._epochs, self._done = stage, epochs, done
        if not self._console.is_terminal:
            return
        self._bars = _bars(self._console)
        self._task = self._bars.add_task(stage, total=epochs * steps, completed=done, numbers="")
        self._bars.start()

    def step_done(self, epoch: int, loss: float, accuracy: float) -> None:
        """See `Progress`."""
        self._done += 1
        if self._bars is None or self._task is None:
            return
        now = time.monotonic()
        if now - self._shown >= REFRESH_SECONDS:
            self._shown = now
            rate = self._bars.tasks[0].speed or 0.0
            self._bars.update(
                self._task,
                completed=self._done,
                description=f"{self._stage} {epoch + 1}/{self._epochs}",
                numbers=f"loss {loss:.3f}  acc {accuracy:.3f}  {rate:.1f} steps/s",
            )

    def epoch_done(
        self, epoch: int, *, loss: float, accuracy: float, lr: float, seconds: float
    ) -> None:
        """See `Progress`."""
        width = len(str(self._epochs))
        self.message(
            f"{self._stage} {epoch + 1:>{width}}/{self._epochs}  loss {loss:.4f}  "
            f"val acc {accuracy:.4f}  lr {lr:.2e}  {seconds:.1f} s"
        )

    def stage_ended(self) -> None:
        """See `Progress`."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done)
            self._bars.stop()
        self._bars = self._task = None

    def message(self, text: str) -> None:
        """See `Progress`."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _bars(console: Console) -> Bars:
    """Lay out one line; the bar takes what is left, so 80 columns are enough."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def text(template: str) -> TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis")
        return TextColumn(template, markup=False, table_column=column)

    bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4))
    return Progress(
        text("{task.description}"),
        bar,
        text("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
        transient=True,
    )
