"""Standard output and standard error, which may be closed or full: that undoes nothing of what a command did."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

import click


class OutputLost(Exception):
    """Standard output cannot be written; the reason is the `__cause__`."""


def show(line: str) -> None:
    """A line on standard output.

    Raises:
        OutputLost: it is full, or nobody reads it.
    """
    try:
        click.echo(line)
    except OSError as error:
        # Nothing may be left for the interpreter to flush at its end.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise OutputLost(error.strerror or str(error)) from error


class Tolerant:
    """A text stream that takes everything: what cannot be written is dropped.

    For standard error, where progress, waits and log lines go: a command goes on if they cannot be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """All of `text`, or nothing."""
        with suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """What can be written is."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
