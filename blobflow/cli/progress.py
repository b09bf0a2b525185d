"""How far the work is, shown on standard error: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, Protocol

import click

from blobflow.cli.words import duration, human_size

if TYPE_CHECKING:
    from blobflow.transport import ProgressEvent

class _Progress(Protocol):
    """Shows on standard error how far the work is."""

    def show(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` bytes are done in this phase."""
        ...


def _progress() -> AbstractContextManager[_Progress]:
    return _bar() if sys.stderr.isatty() else _lines()


@contextmanager
def _bar() -> Generator[_Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        class Bar:
            phase = ""
            task = bar.add_task("", visible=False)

            def show(self, phase: str, done: int, total: int) -> None:
                if phase != self.phase:
                    # A new task, so that what an earlier process did counts neither for the rate nor for the rest.
                    bar.remove_task(self.task)
                    self.phase, self.task = phase, bar.add_task(phase, total=total, completed=done)
                bar.update(self.task, completed=done, total=total)

        yield Bar()


@contextmanager
def _lines() -> Generator[_Progress]:
    yield _Lines()


class _Lines:
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
        elif now - self._at >= _LINE_EVERY_S:
            rate = (done - self._done) / (now - self._at)
            left = f", {_duration((total - done) / rate)} left" if rate > 0 else ""
            percent = f"{done / total:.0%}" if total else "100%"
            click.echo(f"{phase} {_size(done)} of {_size(total)} ({percent}), {_size(rate)}/s{left}", err=True)
            self._at, self._done = now, done


def _transferred(progress: _Progress) -> Callable[[ProgressEvent], None]:
    return lambda event: progress.show(event.phase, event.bytes_done, event.bytes_total)


def _processed(progress: _Progress, phase: str) -> Callable[[int, int], None]:
    return lambda done, total: progress.show(phase, done, total)


