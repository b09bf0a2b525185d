"""What a forked child must reset: locks and counts that belong to other threads of its parent.

Only the forking thread lives on in a child. A lock that another thread held at that moment stays locked for ever in
the child, and whatever another thread had taken is never given back.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ResettableAfterFork(Protocol):
    """Something that threads share."""

    def reset_after_fork(self) -> None:
        """Start with fresh locks and with nothing held; called in a child by its only thread."""
        ...


_shared: weakref.WeakSet[ResettableAfterFork] = weakref.WeakSet()


def reset_after_fork_of(shared: ResettableAfterFork) -> None:
    """Call `shared.reset_after_fork` in every child that is forked while `shared` is in use."""
    _shared.add(shared)


def _after_fork() -> None:
    for shared in list(_shared):
        shared.reset_after_fork()


os.register_at_fork(after_in_child=_after_fork)
