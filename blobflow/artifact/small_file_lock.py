"""A lock for many small files: one thread at a time reads or writes them.

Opening, reading and closing a small file are a few system calls, and each releases the interpreter lock and waits for
it again. Four threads that do so slow each other down: with 32 KiB files they were measured to take twice the time and
the processor time of one thread. So a thread with many small files takes this lock. Large reads, hashing and the
network continue in parallel.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from typing import Final

CROWD: Final = 16
"""Files in one part or batch from which the lock is cheaper than the waiting."""


class SmallFileLock:
    """A lock for one source or target, so that a hanging file system blocks no other."""

    def __init__(self) -> None:
        self._lock = Lock()

    @contextmanager
    def around(self, files: int) -> Generator[None]:
        """Hold the lock during the access to `files` files, if they are `CROWD` or more."""
        if files < CROWD:
            yield
        else:
            with self._lock:
                yield
