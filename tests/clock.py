"""Time in tests: it passes when a test says so, or when somebody sleeps."""

from __future__ import annotations


class Clock:
    """Seconds that pass by hand (`clock.now += 60`), or while somebody sleeps.

    It stands in for `time.time` and `time.monotonic`, its `ns` for `time.time_ns`, its `sleep` for `time.sleep`.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.slept: list[float] = []
        """The seconds of each sleep."""

    def __call__(self) -> float:
        return self.now

    def ns(self) -> int:
        """The same time in nanoseconds."""
        return int(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        """Return at once; the clock has moved on."""
        self.slept.append(seconds)
        self.now += seconds
