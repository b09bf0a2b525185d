"""What each thread is doing right now, so that whoever waits can be told for what.

Costs a dictionary entry per request. Code that may wait says so with `doing`, code that moves bytes calls `moved`, and
code that tries again calls `Activity.blocked_by`. `reporting_waits` looks at all of them once a second and reports what
has not got on for nearly ten seconds, so that nobody watches a program that is silent for longer.
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
"""Before a wait is reported, and between two reports; with a look every second, nobody hears nothing for over 10 s."""
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
        """An attempt failed and will be repeated: what it moved is not progress."""
        root = self.root
        root.reason = reason
        if root.blocked_since is None:
            root.blocked_since = root.moved_at
        root.moved_at = root.blocked_since

    def went_on(self) -> None:
        """An attempt succeeded, and the activity goes on with the next one."""
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
    """Say what this thread does inside the block; blocks may be nested.

    Args:
        where: Gives the place for reports (the store's URL and server); it is called by another thread.
        quiet: The user asked for this wait (a limit on bandwidth), so it is not reported.
        task: The coroutine's task, where several share a thread.
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
    """Bytes have moved: what this thread is doing goes on, however long it takes."""
    found = _current.of.get(threading.get_ident())
    if found is not None:
        found.root.moved_at = time.monotonic()


def activity_of(thread: int | None) -> str:
    """What a thread is doing and for how long, e.g. `put_part part 7 of 'a/b' for 31 s`."""
    found = _current.of.get(thread or 0)
    return "idle" if found is None else f"{found.what} for {time.monotonic() - found.since:.0f} s"


@dataclass(frozen=True)
class Wait:
    """Something that has not got on for a while.

    Attributes:
        what: What is waited for, and where, e.g. `get of 'a.manifest.json' in s3://bucket at http://host:9000`.
        seconds: For how long: no byte moved, or every attempt failed.
        reason: How the last attempt failed; empty where there was no answer at all so far.
        others: Further threads and tasks that wait.
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
    """What has been silent for longest, over all threads and tasks of this process; None: all of them go on."""
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
    """Call `report` while something in this process waits: the longest wait, after `silence_s` and at most that often.

    The command line prints it; a Dagster step logs it to `context.log`, where its user looks. `report` is called by a
    thread that ends with the block, never by one that waits; what it raises is logged and ends nothing.

    Args:
        silence_s: Seconds without a byte before a wait is reported, and between two reports.
        look_s: Seconds between two looks.
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
            except Exception:  # noqa: BLE001  # who watches must not end what is watched
                _log.debug("wait_not_reported", exc_info=True)

    watcher = threading.Thread(target=watch, name="blobflow-waits", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
