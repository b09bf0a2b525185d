"""Lines of progress in a step's log."""

from __future__ import annotations

from blobflow.dagster.checkpoints import ProgressLog
from blobflow.transport import ProgressEvent
from tests.clock import Clock


class Story:
    """A progress log with its own clock."""

    def __init__(self) -> None:
        self.clock = Clock(0)
        self.lines: list[str] = []
        self.progress = ProgressLog(self.lines.append, "upload", clock=self.clock)

    def at(self, seconds: float, done: int, total: int = 1000, resumed: int = 0) -> int:
        """Report at that time; the number of lines so far."""
        self.clock.now = seconds
        self.progress.transfer(ProgressEvent("upload", done, total, resumed))
        return len(self.lines)


def test_a_slow_transfer_shows_a_line_every_ten_seconds():
    """Silence means that it hangs, so there is none: also a transfer without progress says so."""
    story = Story()
    assert [story.at(t, 10) for t in (1, 5, 9.9, 10, 15, 20)] == [0, 0, 0, 1, 1, 2]


def test_a_fast_transfer_shows_a_line_every_ten_percent_but_not_more_than_one_a_second():
    """The log stays readable whatever the speed."""
    story = Story()
    assert [story.at(t, done) for t, done in ((0.5, 500), (1.0, 600), (2.0, 650), (2.5, 900), (3.0, 1000))] == [
        *(0, 1, 1, 2, 2)
    ]


def test_a_line_says_how_far_and_how_fast():
    """Bytes that an earlier attempt moved count as done, but not as speed."""
    story = Story()
    story.at(10, 60_000_000, 100_000_000, resumed=40_000_000)
    assert story.lines == ["upload.progress percent=60 bytes=60000000 of=100000000 mb_per_s=2.0"]


def test_nothing_to_move_is_complete():
    """An empty artifact divides nothing by zero."""
    story = Story()
    story.at(10, 0, 0)
    assert story.lines == ["upload.progress percent=100 bytes=0 of=0 mb_per_s=0.0"]
