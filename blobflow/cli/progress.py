"""How far the work is, shown on standard error: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, Protocol

import click

from blobflow.cli.formatting import human_duration, human_size

if TYPE_CHECKING:
    from blobflow.transport import ProgressEvent

LINE_EVERY_S: Final = 10.0


class Progress(Protocol):
    """Shows how far the work is."""

    def show(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` bytes are done in this phase."""
        ...


def show_progress() -> AbstractContextManager[Progress]:
    """The display that suits standard error."""
    return _bar() if sys.stderr.isatty() else nullcontext(Lines())


def transferred(progress: Progress) -> Callable[[ProgressEvent], None]:
    """The `on_progress` of transfers."""
    return lambda event: progress.show(event.phase, event.bytes_done, event.bytes_total)


def processed(progress: Progress, phase: str) -> Callable[[int, int], None]:
    """The `on_progress` of exports and imports."""
    return lambda done, total: progress.show(phase, done, total)


def counted(phase: str, what: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """A line every ten seconds for what is counted in things instead of bytes."""
    shown_at = clock()

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        if clock() - shown_at >= LINE_EVERY_S:
            shown_at = clock()
            click.echo(f"{phase} {done:,} of {total:,} {what} ({done / max(total, 1):.0%})", err=True)

    return show


class Lines:
    """A line every ten seconds, with the rate of those ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._at = 0.0
        self._done = 0

    def show(self, phase: str, done: int, total: int) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._at, self._done = phase, now, done
        elif now - self._at >= LINE_EVERY_S:
            rate = (done - self._done) / (now - self._at)
            left = f", {human_duration((total - done) / rate)} left" if rate > 0 else ""
            percent = f"{done / total:.0%}" if total else "100%"
            click.echo(
                f"{phase} {human_size(done)} of {human_size(total)} ({percent}), {human_size(rate)}/s{left}", err=True
            )
            self._at, self._done = now, done


@contextmanager
def _bar() -> Generator[Progress]:
    # rich takes 0.1 s to import, and only a terminal needs it.
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        class Bar:
            phase = ""
            task = bars.add_task("", visible=False)

            def show(self, phase: str, done: int, total: int) -> None:
                if phase != self.phase:
                    # A new task, so that what an earlier process did counts neither for the rate nor for the time.
                    bars.remove_task(self.task)
                    self.phase, self.task = phase, bars.add_task(phase, total=total, completed=done)
                bars.update(self.task, completed=done, total=total)

        yield Bar()
