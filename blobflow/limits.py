"""Limits that all transfers of a process share: memory, bandwidth, and requests in flight."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Final

from blobflow.config import MIB
from blobflow.forks import reset_after_fork_of

DEFAULT_MEMORY_BYTES: Final = 512 * MIB
"""Four transfers of the largest profile (4 workers x 32 MiB) side by side."""


class ByteBudget:
    """Caps the bytes held at once; callers block until enough is free.

    A request above the whole budget waits until nothing else is held, and then gets it. So a small budget makes
    transfers take turns, but never fail.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"limit_bytes must be above 0, not {limit_bytes}")
        self.limit_bytes = limit_bytes
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self.held_bytes = 0
        self._condition = threading.Condition()

    def __repr__(self) -> str:
        return f"<ByteBudget {self.held_bytes} of {self.limit_bytes} bytes held>"

    def acquire(self, size: int, *, timeout_s: float) -> bool:
        """Take `size` bytes; False if they were not free within `timeout_s`."""
        with self._condition:
            free = self._has_room(size) or self._condition.wait_for(lambda: self._has_room(size), timeout_s)
            if free:
                self.held_bytes += size
            return free

    def _has_room(self, size: int) -> bool:
        return not self.held_bytes or self.held_bytes + size <= self.limit_bytes

    def release(self, size: int) -> None:
        """Release `size` bytes."""
        with self._condition:
            self.held_bytes -= size
            self._condition.notify_all()


memory_budget = ByteBudget(DEFAULT_MEMORY_BYTES)
"""The budget for payload buffers of all transfers of this process. Set `limit_bytes` before transfers begin."""


class Bandwidth:
    """A token bucket: on average at most `bytes_per_s`, in bursts of at most one second's worth.

    Calls are served in order. One above a second's worth passes at once, and later calls wait for it. So any part
    size works with any rate.
    """

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s must be above 0, not {bytes_per_s}")
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()
        """When everything taken so far is paid for; a time in the past is credit for a burst."""
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Wait until `size` bytes may pass."""
        wait_s = self.reserve(size)
        if wait_s > 0:
            self._sleep(wait_s)

    def reserve(self, size: int) -> float:
        """Seconds after which `size` bytes may pass, for callers that do not block; negative for unused credit."""
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now - 1.0)
            self._free_at = begin + size / self.bytes_per_s
            return begin - now


class AdaptiveLimit:
    """Caps the requests in flight to one endpoint: halved on SlowDown, raised by one for each round without it.

    This is additive increase, multiplicative decrease as in TCP (RFC 5681); the window is the number of requests in
    flight. Several processes that share an endpoint end up with fair shares of it.
    """

    def __init__(self, maximum: int) -> None:
        if maximum < 1:
            raise ValueError(f"the maximum of requests must be above 0, not {maximum}")
        self.maximum = maximum
        self._window = float(maximum)
        self._epoch = 0
        """Decreases so far; a request that began before the last decrease does not count against the new window."""
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self._in_flight = 0
        self._waiting: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition()

    def __repr__(self) -> str:
        return f"<AdaptiveLimit {self._in_flight} in flight, window {self.window} of {self.maximum}>"

    @property
    def window(self) -> int:
        """Requests that may be in flight now."""
        return int(self._window)

    @contextmanager
    def slot(self) -> Generator[Callable[[bool], None]]:
        """Hold one slot; the block reports the outcome with `answered(slow_down)`."""
        with self._condition:
            self._condition.wait_for(lambda: self._in_flight < self.window)
            self._in_flight += 1
            epoch = self._epoch
        try:
            yield lambda slow_down: self.answered(epoch, slow_down)
        finally:
            self.end()

    def begin(self, on_free: Callable[[], None] | None = None) -> int | None:
        """Take a slot without waiting; `end` releases it.

        Returns:
            The epoch to pass to `answered`; None if no slot is free. Then `on_free` is called once, by the thread that
            frees one, and may call `begin` again.
        """
        with self._condition:
            if self._in_flight >= self.window:
                if on_free is not None:
                    self._waiting.append(on_free)
                return None
            self._in_flight += 1
            return self._epoch

    def end(self) -> None:
        """Release a slot."""
        with self._condition:
            self._in_flight -= 1
            self._condition.notify_all()
            is_awaited = bool(self._waiting)
        if is_awaited:
            self.wake()

    def wake(self) -> None:
        """Call one waiting callback for each free slot; a waiter that was called and gave up calls it again."""
        with self._condition:
            count = min(len(self._waiting), self.window - self._in_flight)
            waiting = [self._waiting.popleft() for _ in range(count)]
        for on_free in waiting:
            on_free()

    @property
    def epoch(self) -> int:
        """The epoch to pass to `answered` for a request that begins now."""
        return self._epoch

    def answered(self, epoch: int, slow_down: bool) -> None:
        """Widen the window a little, or halve it for a SlowDown that is not an echo of an earlier one."""
        with self._condition:
            if not slow_down:
                self._window = min(float(self.maximum), self._window + 1.0 / self._window)
            elif epoch == self._epoch:
                self._window = max(1.0, self._window / 2)
                self._epoch += 1


class Permits:
    """Slots for batch operations; streams take theirs in bulk, and may share one `Permits` with others."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"the limit of permits must be 0 or more, not {limit}")
        self.limit = limit
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self._taken = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Permits {self.free} of {self.limit} free>"

    @property
    def free(self) -> int:
        """Permits that are not taken."""
        return self.limit - self._taken

    def take(self, share: Callable[[int], int]) -> int:
        """Take `share(free)` permits at once, at least one and at most all that are free; 0 if none is free."""
        with self._lock:
            free = self.free
            taken = max(1, min(share(free), free)) if free > 0 else 0
            self._taken += taken
            return taken

    def give_back(self, count: int) -> None:
        """Return permits."""
        with self._lock:
            self._taken -= count


@cache
def shared_bandwidth(bytes_per_s: float) -> Bandwidth:
    """The token bucket that all stores of this process with this rate share."""
    return Bandwidth(bytes_per_s)


@cache
def shared_requests(endpoint: str, maximum: int) -> AdaptiveLimit:  # noqa: ARG001  # the endpoint is the cache key
    """The requests in flight to one endpoint, over all stores of this process."""
    return AdaptiveLimit(maximum)
