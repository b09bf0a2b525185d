"""The locks of the local store: one writer per key, and a stopped holder blocks others only for a short time.

A key's lock is an exclusive flock of one of 256 files; the key's CRC32C selects the file.

| step of a holder | what a kill leaves |
|---|---|
| opens the lock file and takes its flock | a free lock |
| writes its note: the temporary file that it will rename, or that it has none | a free lock with an old note |
| checks that the lock file still has its name; if not, starts over | the same |
| renames its temporary file | a finished write |
| overwrites its note and releases the flock | a free lock |

A process that has waited for two seconds breaks the lock. It replaces the lock file with a new one, which it has
locked, and then removes the temporary file that the note names. When the stopped holder continues, it has nothing left
to rename, so it publishes nothing. The order makes this safe: if a holder has written its note and still finds its lock
file in place, every process that breaks the lock later reads the note.

A holder without a temporary file (it deletes) cannot be stopped in this way. So processes that want the same key do not
break its lock.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final

from blobflow.checksum import crc32c
from blobflow.durable import lock, try_lock, unlock_and_close
from blobflow.errors import TransferBusy
from blobflow.private import PrivateDirectory

_log = logging.getLogger(__name__)

POLL_S: Final = 0.02
BREAK_AFTER_S: Final = 2.0
"""Longer than a sync usually takes. If the holder is only slow, breaking its lock costs it only a retry."""

_NO_NOTE: Final = b" " * 32
_IS_TEMPORARY: Final = re.compile(rb"[0-9a-f]{32}")
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class KeyLocks:
    """The locks that all writers of a store share, in this process and in others.

    Args:
        own: Opens one of the store's private directories, `locks` or `tmp`.
        url: URL of the store, for the log.
        patience_s: Seconds to wait for a holder whose lock is not broken.
        clock: Seconds, monotonic.
        sleep: Waits the given seconds.
    """

    def __init__(
        self,
        own: Callable[[str], AbstractContextManager[PrivateDirectory]],
        *,
        url: str,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._own = own
        self._url = url
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep

    @contextmanager
    def held(self, key: str, temporary: str = "") -> Generator[None]:
        """Hold the lock of `key`.

        Args:
            temporary: Name of the file in `tmp` that the holder will rename. Without one, processes that want the same
                key do not break the lock.

        Raises:
            TransferBusy: another process holds the lock for this key without such a file, and does not release it.
        """
        name = lock_name(key)
        with self._own("locks") as locks:
            fd = self._take(key, locks, name)
            try:
                while True:
                    os.pwrite(fd, temporary.encode() or _unbreakable(key), 0)
                    # After the note: if the lock is not broken yet, a process that breaks it later reads the note.
                    if locks.names_file(name, fd):
                        break
                    unlock_and_close(fd)
                    fd = -1
                    fd = self._take(key, locks, name)
                yield
            finally:
                if fd >= 0:
                    # A process that is stopped before it writes its note must not be mistaken for this holder.
                    with suppress(OSError):
                        os.pwrite(fd, _NO_NOTE, 0)
                    unlock_and_close(fd)

    def wait_for(self, fd: int, key: str) -> None:
        """Wait for the exclusive lock of an open file, but not forever: a stopped process may hold it.

        Raises:
            TransferBusy: the lock did not become free within `patience_s`.
        """
        deadline = self._clock() + self._patience_s
        while not try_lock(fd):
            if self._clock() >= deadline:
                raise TransferBusy(f"a part of {key!r} is still being written by another process", key=key)
            self._sleep(POLL_S)

    def _take(self, key: str, locks: PrivateDirectory, name: str) -> int:
        """A descriptor of the lock file, which is locked; the file may have been replaced meanwhile."""
        started, pause_s = self._clock(), POLL_S / 16
        while True:
            fd = locks.open(name, os.O_RDWR | os.O_CREAT)
            try:
                while locks.names_file(name, fd):
                    if try_lock(fd):
                        return fd
                    waited_s = self._clock() - started
                    if waited_s > BREAK_AFTER_S and os.pread(fd, len(_NO_NOTE), 0) != _unbreakable(key):
                        fresh = self._break(key, fd, locks, name)
                        if fresh is None:
                            break
                        os.close(fd)
                        return fresh
                    if waited_s > self._patience_s:
                        raise TransferBusy(f"another process is writing {key!r}, and does not get on with it", key=key)
                    self._sleep(pause_s)
                    pause_s = min(2 * pause_s, POLL_S)
            except BaseException:
                unlock_and_close(fd)
                raise
            unlock_and_close(fd)

    def _break(self, key: str, held: int, locks: PrivateDirectory, name: str) -> int | None:
        """Replace the lock file of a stopped holder with a new, locked one; None if another process was faster."""
        with _exclusive(locks, "breaking"), self._own("tmp") as tmp:
            if not locks.names_file(name, held):
                return None
            fresh = uuid.uuid4().hex
            fd = tmp.open(fresh, _CREATE)
            try:
                lock(fd)
                tmp.rename(fresh, name, locks)
                note = os.pread(held, len(_NO_NOTE), 0)
                _log.warning("store.lock_broken url=%s lock=%s", self._url, name)
                if note == _unbreakable(key):  # another process holds the lock by now
                    self.wait_for(held, key)
                elif _IS_TEMPORARY.fullmatch(note):
                    tmp.unlink(note.decode())
            except BaseException:
                unlock_and_close(fd)
                raise
            return fd


def lock_name(key: str) -> str:
    """The file whose flock is the lock of `key`."""
    return f"{crc32c(key.encode()) & 0xFF:02x}"


def _unbreakable(key: str) -> bytes:
    """The note of a holder that has no temporary file; as long as every note."""
    return b"-" + hashlib.blake2b(key.encode(), digest_size=16).hexdigest()[1:].encode()


@contextmanager
def _exclusive(directory: PrivateDirectory, name: str) -> Generator[None]:
    """Hold the lock of one file."""
    fd = directory.open(name, os.O_RDWR | os.O_CREAT)
    try:
        lock(fd)
        yield
    finally:
        unlock_and_close(fd)
