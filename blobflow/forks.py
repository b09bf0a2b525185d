"""What a forked child must forget: locks that are held, and counts of what is held, by threads of its parent.

Only the forking thread lives on in a child. A lock that another one held at that moment stays locked there for ever,
and what another one had taken is never given back.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Something that threads share."""

    def forget_threads(self) -> None:
        """Begin with fresh locks, and with nothing held; called in a child, by its only thread."""
        ...


_shared: weakref.WeakSet[Forkable] = weakref.WeakSet()


def forget_threads_in_children(shared: Forkable) -> None:
    """Call `shared.forget_threads` in every child that is forked while `shared` is in use."""
    _shared.add(shared)


def _after_fork() -> None:
    for shared in list(_shared):
        shared.forget_threads()


os.register_at_fork(after_in_child=_after_fork)
