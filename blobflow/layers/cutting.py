"""Cuts a layer: compressed frames come in any order, equal parts leave in order."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from blobflow.layers.format import FramePlan, encode_seek_table, frame_starts, seek_table_size
from blobflow.uploads.intent import FrameLog


class Cut(NamedTuple):
    """A part of the layer, ready to be sent."""

    number: int
    data: bytes


class PartCutter:
    """Puts frames in order, appends the seek table, and cuts all of it into parts. Thread-safe.

    Args:
        plan: All frames of the layer.
        log: The frames that were compressed before; those after the first frame that is needed are dropped.
        first_part: Number of the first part to cut.
        part_size: Bytes of all parts except the last.
        window: How many frames a worker may be ahead of the first missing one.
    """

    def __init__(self, plan: FramePlan, log: FrameLog, *, first_part: int, part_size: int, window: int) -> None:
        starts = frame_starts(log.sizes)
        offset = (first_part - 1) * part_size
        kept = min(bisect_right(starts, offset) - 1, len(plan))
        self.first_frame = kept + 1
        """The first frame that `add` needs; one more than the number of frames means the seek table."""
        self._plan = plan
        self.part_size = part_size
        self._part = first_part
        self._sizes = log.sizes[:kept]
        self._crcs = log.crcs[:kept]
        self._codec = log.codec
        self._skip = offset - starts[kept]
        """Bytes of the first frame that belong to an earlier part."""
        self._next = self.first_frame
        self._window = window
        self._early: dict[int, tuple[bytes, int]] = {}
        self._pieces: list[bytes | memoryview] = []
        self._held = 0
        self._error: BaseException | None = None
        self._moved = threading.Condition()

    def __repr__(self) -> str:
        return f"<PartCutter at frame {self._next} of {len(self._plan)}, part {self._part}>"

    def admit(self, number: int) -> None:
        """Wait until frame `number` may be compressed; the seek table needs all frames before it."""
        ahead = 0 if number > len(self._plan) else self._window
        with self._moved:
            self._moved.wait_for(lambda: self._error or number <= self._next + ahead)
            if self._error:
                raise self._error

    def break_down(self, error: BaseException) -> None:
        """Record that a frame will never come, and wake the waiting workers."""
        with self._moved:
            self._error = self._error or error
            self._moved.notify_all()

    def add(self, number: int, data: bytes, crc: int) -> list[Cut]:
        """Take a frame; returns the parts that it completes.

        Args:
            crc: CRC32C of the frame's content.
        """
        with self._moved:
            self._early[number] = data, crc
            cuts: list[Cut] = []
            while (frame := self._early.pop(self._next, None)) is not None:
                data, crc = frame
                if self._next <= len(self._plan):
                    self._sizes.append(len(data))
                    self._crcs.append(crc)
                cuts += self._take(data)
                self._next += 1
            if self._next > len(self._plan) + 1:
                cuts += self._rest()
            self._moved.notify_all()
            return cuts

    def seek_table(self) -> bytes:
        """The bytes that are added as the last frame."""
        with self._moved:
            return encode_seek_table(self._sizes, self._plan)

    def log(self) -> FrameLog:
        """The frames so far, from the first without a gap."""
        with self._moved:
            return FrameLog(self._codec, self._plan.frame_size, self._sizes[:], self._crcs[:])

    def _take(self, data: bytes) -> list[Cut]:
        cuts: list[Cut] = []
        rest = memoryview(data)[self._skip :]
        self._skip = 0
        while rest:
            piece = rest[: self.part_size - self._held]
            rest = rest[len(piece) :]
            self._pieces.append(piece)
            self._held += len(piece)
            if self._held == self.part_size:
                cuts += self._rest()
        return cuts

    def _rest(self) -> list[Cut]:
        if not self._held:
            return []
        cut = Cut(self._part, b"".join(self._pieces))
        self._part += 1
        self._pieces, self._held = [], 0
        return [cut]


def known_size(sizes: Sequence[int], plan: FramePlan) -> int | None:
    """Bytes of the layer, if all of its frames are known; otherwise None."""
    if len(sizes) < len(plan):
        return None
    return sum(sizes) + seek_table_size(len(plan))
