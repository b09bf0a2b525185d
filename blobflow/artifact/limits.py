"""The limits of an artifact in one place: the writer refuses, before it sends a byte, what no reader would accept."""

from __future__ import annotations

from typing import Final

from blobflow.errors import UnsupportedSource

MAX_MANIFEST_BYTES: Final = 1024 * 1024
"""A manifest is read whole from an untrusted place; a real one has about 500 bytes, the rest leaves room for
cursors."""
MAX_MEMBERS: Final = 10_000_000
MAX_INDEX_BYTES: Final = 1 << 30
ROWS_PER_GROUP: Final = 65_536
MAX_GROUP_BYTES: Final = 512 << 20
"""Decoded bytes of one row group; ours have about 10 MB, and 65,536 paths of 4 KiB fit as well."""
MAX_SEGMENT_BYTES: Final = 255
"""The longest name that Linux file systems allow."""
MAX_PATH_BYTES: Final = 4095
"""Linux's PATH_MAX without its NUL: a longer path cannot be opened."""
MAX_PATHS_BYTES: Final = 2 << 30
"""Bytes of all paths together; ten million of ours have about 1 GB."""
MAX_TOTAL_BYTES: Final = (1 << 62) - 1
"""Bytes of all members together; with the headers the sum still fits into 63 bits."""


class Tally:
    """Counts the members of an artifact during its export, and refuses the first one over a limit."""

    def __init__(self) -> None:
        self.members = 0
        self.paths_bytes = 0
        self.bytes = 0

    def __repr__(self) -> str:
        return f"<Tally {self.members} members, {self.bytes} bytes>"

    def add(self, path: str, size: int) -> None:
        """Count a member.

        Raises:
            UnsupportedSource: the artifact would have more members, path bytes or bytes than a reader accepts.
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
    """The error for a source that exceeds a limit of artifacts.

    Args:
        what: The counted things, in the plural.
    """
    reason = f"it has more than {limit:,} {what}, the limit of an artifact"
    return UnsupportedSource(
        f"the source cannot be exported: {reason}",
        hint="exclude something, or export it in several artifacts",
        reason=reason,
        limit=limit,
    )
