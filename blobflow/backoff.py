"""When a failed attempt is repeated: one rule for stores, HTTP sources and pushes, for threads and for coroutines.

1. The wait after the n-th failure is random between 0 and 0.25 s * 2**(n - 1), at most 20 s. This is exponential
   backoff with full jitter: clients that failed together do not come back together.
2. The wait is at least as long as the server asks for (`Retry-After`, RFC 9110, section 10.2.3).
3. Patience begins with the first failure, because one attempt alone may be silent for long before it times out. A
   random wait ends when the patience ends, so that one last attempt is made then. If the server asks for a longer
   wait than the remaining patience, the call fails at once with its error: an earlier request is not wanted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from blobflow.errors import BlobflowError, TemporaryError

DEFAULT_PATIENCE_S: Final = 120.0
"""Longer than a store's restart or failover; shorter than an operator's patience."""

_FIRST_WAIT_S: Final = 0.25
_LONGEST_WAIT_S: Final = 20.0
"""Longer waits do not help the server, and they delay the transfer's restart."""
_MAX_DOUBLINGS: Final = 30
"""More doublings change nothing, and 2**1100 does not fit into a float."""


def jittered_wait_s(failures: int, *, first_s: float, longest_s: float) -> float:
    """A random wait after `failures` failures (at least one); see rule 1."""
    return random.uniform(0.0, min(longest_s, first_s * 2 ** min(failures - 1, _MAX_DOUBLINGS)))


class Backoff:
    """The waits of one call, until it succeeds or its patience ends. The caller does the waiting.

    Args:
        patience_s: Seconds from the first failure to the last attempt.
        clock: Monotonic seconds.

    Attributes:
        failures: Failures of the call so far.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        self._patience_s = patience_s
        self._clock = clock
        self._ends_at = 0.0

    def __repr__(self) -> str:
        return f"<Backoff after {self.failures} failures>"

    def wait_s(self, error: BlobflowError) -> float:
        """Seconds to wait before the next attempt, after one that failed with `error`.

        Raises:
            `error` itself, if there is no next attempt.
        """
        now = self._clock()
        if not self.failures:
            self._ends_at = now + self._patience_s
        self.failures += 1
        left_s = self._ends_at - now
        asked_s = (error.retry_after_s if isinstance(error, TemporaryError) else None) or 0.0
        if left_s <= 0 or asked_s > left_s:
            raise error
        wait_s = jittered_wait_s(self.failures, first_s=_FIRST_WAIT_S, longest_s=_LONGEST_WAIT_S)
        return max(asked_s, min(wait_s, left_s))
