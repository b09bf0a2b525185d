"""The limits of an artifact, each in one place: the writer refuses what no reader would take, before a byte is sent."""

from __future__ import annotations

from typing import Final

from blobflow.errors import UnsupportedSource

MAX_MANIFEST_BYTES: Final = 1024 * 1024
"""A manifest is read whole from an untrusted place; a real one has about 500 bytes, most of the rest is for cursors."""
MAX_MEMBERS: Final = 10_000_000
MAX_INDEX_BYTES: Final = 1 << 30
ROWS_PER_GROUP: Final = 65_536
MAX_GROUP_BYTES: Final = 512 << 20
"""Decoded bytes of one row group; ours have about 10 MB, and 65,536 paths of 4 KiB fit as well."""
MAX_SEGMENT_BYTES: Final = 255
"""The longest name that Linux file systems take."""
MAX_PATH_BYTES: Final = 4095
"""Linux's PATH_MAX without its NUL: a longer path cannot be opened."""
MAX_PATHS_BYTES: Final = 2 << 30
"""Of all paths together; ten million of ours have about 1 GB."""
MAX_TOTAL_BYTES: Final = (1 << 62) - 1
"""Of all members together: with the headers it still is a number of 63 bits."""


class Tally:
    """Counts the members of an artifact that is being made, and refuses the first one that would be too many."""

    def __init__(self) -> None:
        self.members = 0
        self.paths_bytes = 0
        self.bytes = 0

    def __repr__(self) -> str:
        return f"<Tally {self.members} members, {self.bytes} bytes>"

    def add(self, path: str, size: int) -> None:
        """Count a member.

        Raises:
            UnsupportedSource: the artifact would have more members, paths or bytes than can be read again.
        """
        self.members += 1
        self.paths_bytes += len(path) if path.isascii() else len(path.encode())
        self.bytes += size
        for what, actual, limit in (
            ("members", self.members, MAX_MEMBERS),
            ("bytes in its paths", self.paths_bytes, MAX_PATHS_BYTES),
            ("bytes", self.bytes, MAX_TOTAL_BYTES),
        ):
            if actual > limit:
                raise over_the_limit(what, limit)


def over_the_limit(what: str, limit: int) -> UnsupportedSource:
    """The error for a source that is more than one artifact can hold.

    Args:
        what: What there is too much of, in the plural.
    """
    reason = f"it has more than {limit:,} {what}, the limit of an artifact"
    return UnsupportedSource(
        f"the source cannot be exported: {reason}",
        hint="exclude something, or export it in several artifacts",
        reason=reason,
        limit=limit,
    )
