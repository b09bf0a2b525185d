"""Crowds of small files: one thread at a time goes through one.

Opening, reading and closing a small file are a handful of system calls, and each gives the interpreter lock away and
queues for it again. Four threads that do so get in each other's way: measured with 32 KiB files, they take twice the
time and the processor time of one thread alone. So whoever has many small files to touch takes this lock; large
reads, hashing and the network go on beside it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from typing import Final

CROWD: Final = 16
"""Files in one part or batch from which on the lock is cheaper than the queueing."""


class SmallFileLock:
    """Belongs to one source or target, so that a hanging file system holds up nobody else."""

    def __init__(self) -> None:
        self._lock = Lock()

    @contextmanager
    def around(self, files: int) -> Generator[None]:
        """Hold the lock while going through `files` files, if they are a crowd."""
        if files < CROWD:
            yield
        else:
            with self._lock:
                yield
