"""What each thread is doing right now, so that a long wait can be explained to the user.

It costs one dictionary entry per request. Code that may wait enters `doing`, code that moves bytes calls `moved`, and
code that retries calls `Activity.blocked_by`. `reporting_waits` checks all activities once a second. It reports the
one that has been silent for longest, so that no program is silent for more than ten seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from blobflow.forks import reset_after_fork_of

_log = logging.getLogger(__name__)

SILENCE_S: Final = 9.0
"""Silence before a wait is reported, and between two reports; with a check every second, at most 10 s in all."""
_LOOK_S: Final = 1.0


class Activity:
    """What one thread or task is doing. Blocks within blocks share the silence of the outermost."""

    __slots__ = ("blocked_since", "moved_at", "quiet", "reason", "root", "since", "what", "where")

    def __init__(self, what: str, where: Callable[[], str] | None, quiet: bool, outer: Activity | None) -> None:
        self.what = what
        self.where = where
        self.quiet = quiet
        self.root = self if outer is None else outer.root
        self.since = self.moved_at = time.monotonic()
        self.reason = ""
        self.blocked_since: float | None = None

    def blocked_by(self, reason: str) -> None:
        """Record a failed attempt that will be repeated: the bytes it moved do not count as progress."""
        root = self.root
        root.reason = reason
        if root.blocked_since is None:
            root.blocked_since = root.moved_at
        root.moved_at = root.blocked_since

    def went_on(self) -> None:
        """Record an attempt that succeeded; the activity continues with the next one."""
        root = self.root
        root.reason, root.blocked_since, root.moved_at = "", None, time.monotonic()


class _Activities:
    """The innermost activity of each thread or task. Entries are replaced as a whole, so no lock is needed."""

    def __init__(self) -> None:
        self.of: dict[int, Activity] = {}
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        for thread in self.of.keys() - {threading.get_ident()}:
            del self.of[thread]


_current = _Activities()


@contextmanager
def doing(
    what: str, *, where: Callable[[], str] | None = None, quiet: bool = False, task: object = None
) -> Generator[Activity]:
    """Record what this thread does inside the block; blocks may be nested.

    Args:
        where: Returns the place for reports (the store's URL and server). Another thread calls it.
        quiet: The user asked for this wait (a bandwidth limit), so it is not reported.
        task: The coroutine's task, if several share a thread.
    """
    owner = threading.get_ident() if task is None else -id(task)
    outer = _current.of.get(owner)
    activity = _current.of[owner] = Activity(what, where, quiet, outer)
    try:
        yield activity
    finally:
        if outer is None:
            _current.of.pop(owner, None)
        else:
            _current.of[owner] = outer


def moved() -> None:
    """Record that bytes have moved: the thread's activity makes progress, however long it takes."""
    found = _current.of.get(threading.get_ident())
    if found is not None:
        found.root.moved_at = time.monotonic()


def activity_of(thread: int | None) -> str:
    """What a thread is doing and for how long, e.g. `put_part part 7 of 'a/b' for 31 s`."""
    found = _current.of.get(thread or 0)
    return "idle" if found is None else f"{found.what} for {time.monotonic() - found.since:.0f} s"


@dataclass(frozen=True)
class Wait:
    """Something that has made no progress for a while.

    Attributes:
        what: What is waited for, and where, e.g. `get of 'a.manifest.json' in s3://bucket at http://host:9000`.
        seconds: How long no byte has moved or every attempt has failed.
        reason: How the last attempt failed; empty if there was no response so far.
        others: How many other threads and tasks wait too.
    """

    what: str
    seconds: float
    reason: str = ""
    others: int = 0

    def __str__(self) -> str:
        """One line for the user."""
        more = f"; {self.others} more wait" if self.others else ""
        return f"no progress for {self.seconds:.0f} s: {self.what}{f': {self.reason}' if self.reason else ''}{more}"


def longest_wait(*, at_least_s: float = SILENCE_S) -> Wait | None:
    """The longest silence over all threads and tasks of this process; None if all of them make progress."""
    now = time.monotonic()
    silent = [
        found.root
        for found in _current.of.copy().values()
        if not found.quiet and now - found.root.moved_at >= at_least_s
    ]
    if not silent:
        return None
    longest = min(silent, key=lambda root: root.moved_at)
    where = longest.where() if longest.where is not None else ""
    what = f"{longest.what} in {where}" if where else longest.what
    return Wait(what, now - longest.moved_at, longest.reason, len(silent) - 1)


@contextmanager
def reporting_waits(
    report: Callable[[Wait], None], *, silence_s: float = SILENCE_S, look_s: float = _LOOK_S
) -> Generator[None]:
    """Call `report` with the longest wait of this process while the block runs, at most once per `silence_s`.

    The command line prints it; a Dagster step logs it to `context.log`, where its user looks. A separate thread calls
    `report` and ends with the block. An exception from `report` is logged and ends nothing.

    Args:
        silence_s: Seconds without a byte before a wait is reported, and between two reports.
        look_s: Seconds between two checks.
    """
    ended = threading.Event()

    def watch() -> None:
        quiet_until = 0.0
        while not ended.wait(look_s):
            if time.monotonic() < quiet_until:
                continue
            try:
                wait = longest_wait(at_least_s=silence_s)
                if wait is not None:
                    report(wait)
                    quiet_until = time.monotonic() + silence_s
            except Exception:  # noqa: BLE001  # a failed report must not end the work that it reports on
                _log.debug("wait_not_reported", exc_info=True)

    watcher = threading.Thread(target=watch, name="blobflow-waits", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
