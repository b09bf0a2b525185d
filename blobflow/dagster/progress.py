"""Progress of a step as lines in its log."""

import time
from collections.abc import Callable
from typing import Final

from blobflow.transport import ProgressEvent

_LINE_S: Final = 10.0
_LINE_SHARE: Final = 0.1
_MIN_LINE_S: Final = 1.0


class ProgressLog:
    """Writes a line every 10 s, or every 10 % where that takes more than a second.

    Args:
        write: Takes a line.
        phase: What is going on.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, write: Callable[[str], None], phase: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._phase = phase
        self._clock = clock
        self._started = self._shown = clock()
        self._shown_bytes = 0

    def transfer(self, event: ProgressEvent) -> None:
        """`on_progress` of uploads, downloads and verifications."""
        self.bytes(event.bytes_done, event.bytes_total, event.bytes_resumed)

    def bytes(self, done: int, total: int, resumed: int = 0) -> None:
        """`on_progress` of exports and imports."""
        now = self._clock()
        silence = now - self._shown
        if silence < _LINE_S and (silence < _MIN_LINE_S or done - self._shown_bytes < _LINE_SHARE * total):
            return
        self._shown, self._shown_bytes = now, done
        speed = (done - resumed) / 1e6 / (now - self._started)
        percent = 100 * done / total if total else 100.0
        self._write(f"{self._phase}.progress percent={percent:.0f} bytes={done} of={total} mb_per_s={speed:.1f}")


def count_log(
    write: Callable[[str], None], phase: str, *, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """An `on_progress` that counts things instead of bytes: a line every 10 s."""
    shown = clock()

    def count(done: int, total: int) -> None:
        nonlocal shown
        if clock() - shown >= _LINE_S:
            shown = clock()
            write(f"{phase}.progress percent={100 * done / max(total, 1):.0f} done={done} of={total}")

    return count
