"""What each thread is doing right now, so that a stalled transfer can be explained.

Costs a dictionary entry per request. Whoever may wait says so with `doing`; whoever watches reads `activity_of`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

_current: dict[int, tuple[str, float]] = {}
"""Thread -> what, and since when; entries are replaced as a whole, so no lock is needed."""


@contextmanager
def doing(what: str) -> Generator[None]:
    """Say what this thread does inside the block; blocks may be nested, the innermost counts."""
    thread = threading.get_ident()
    outer = _current.get(thread)
    _current[thread] = (what, time.monotonic())
    try:
        yield
    finally:
        if outer is None:
            _current.pop(thread, None)
        else:
            _current[thread] = outer


def activity_of(thread: int | None) -> str:
    """What a thread is doing and for how long, e.g. `put_part part 7 of 'a/b' for 31 s`."""
    found = _current.get(thread or 0)
    if found is None:
        return "idle"
    what, since = found
    return f"{what} for {time.monotonic() - since:.0f} s"
