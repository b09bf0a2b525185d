"""The members of an artifact that only their owner may read: rows of the index, as ranges. No I/O happens here.

A file is private if its group and everybody else may not both read it, or if a directory between it and the root of
the source, including the root, denies them access. Nothing finer is recorded, because a group differs between machines.
"""

from __future__ import annotations

import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from itertools import chain
from typing import Final

MAX_PRIVATE_CHARS: Final = 65_536
"""Maximum length of a manifest's ranges. If private and other members alternate more often, all count as private."""

RANGES: Final = r"^[0-9]{1,8}(-[0-9]{1,8})?(,[0-9]{1,8}(-[0-9]{1,8})?)*$"
"""Rows from 0: `0-3,7`. An index has at most 10,000,000 rows."""

_ALL_READ: Final = stat.S_IRGRP | stat.S_IROTH
_ALL_SEARCH: Final = _ALL_READ | stat.S_IXGRP | stat.S_IXOTH


class PrivateRows:
    """A set of rows; see `encode`.

    Args:
        ranges: The ranges of a manifest; None for no rows.

    Raises:
        ValueError: they overlap, or are not in order.
    """

    def __init__(self, ranges: str | None = None) -> None:
        self._starts = array("q")
        self._stops = array("q")
        for piece in ranges.split(",") if ranges else ():
            start, _, last = piece.partition("-")
            first, stop = int(start), int(last or start) + 1
            if first >= stop or (self._stops and first <= self._stops[-1]):
                raise ValueError(f"rows {piece!r} are out of order")
            self._starts.append(first)
            self._stops.append(stop)

    def __repr__(self) -> str:
        return f"<PrivateRows {sum(self._stops) - sum(self._starts)}>"

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __contains__(self, row: int) -> bool:
        place = bisect_right(self._starts, row)
        return place > 0 and row < self._stops[place - 1]

    def covers(self, rows: int) -> bool:
        """Whether it contains each of the first `rows` rows."""
        return rows > 0 and len(self._starts) == 1 and self._starts[0] == 0 and self._stops[0] >= rows

    @property
    def stop(self) -> int:
        """One more than the last row; 0 if there is none."""
        return self._stops[-1] if self._stops else 0


def encode(flags: Iterable[object]) -> str | None:
    """The ranges of the rows whose flag is true; None if no flag is. They may name more rows, never fewer."""
    pieces: list[str] = []
    start = -1
    row = -1
    for row, flag in enumerate(chain(flags, (False,))):
        if flag and start < 0:
            start = row
        elif not flag and start >= 0:
            pieces.append(f"{start}-{row - 1}" if start < row - 1 else str(start))
            start = -1
    ranges = ",".join(pieces)
    if len(ranges) > MAX_PRIVATE_CHARS:
        return f"0-{row - 1}"
    return ranges or None


def file_is_private(status_mode: int) -> bool:
    """Whether its group or everybody else cannot read a file."""
    return status_mode & _ALL_READ != _ALL_READ


def directory_is_private(status_mode: int) -> bool:
    """Whether its group or everybody else cannot list or enter a directory."""
    return status_mode & _ALL_SEARCH != _ALL_SEARCH
