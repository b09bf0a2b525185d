"""The index: one row for each member of an artifact, stored in columns so that a million rows stay small."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from blobflow.artifact.limits import MAX_INDEX_BYTES, MAX_PATH_BYTES, MAX_SEGMENT_BYTES
from blobflow.artifact.manifest import EXECUTABLE_MODE, FILE_MODE
from blobflow.checksum import EMPTY_SHA256, SHA256_BYTES
from blobflow.errors import HostileArtifact
from blobflow.untrusted import quoted

_FRAME_BYTES: Final = 64 * 1024
_ROW_BYTES: Final = 205
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


class Member(NamedTuple):
    """One file, or one empty directory (its path ends in `/`)."""

    path: str
    size: int
    mode: int
    mtime_ns: int
    sha256: bytes
    crc32c: int

    @property
    def is_directory(self) -> bool:
        return self.path.endswith("/")


def path_fault(path: str) -> str | None:
    """Why `path` may not be a member's path; None if it may."""
    if _CONTROL.search(path):
        return "it contains a control character"
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    if len(path) > MAX_PATH_BYTES // 4 and len(path.encode()) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    for segment in path.removesuffix("/").split("/"):
        if segment in ("", ".", ".."):
            return f"segment {segment!r} is not allowed"
        if len(segment) > MAX_SEGMENT_BYTES // 4 and len(segment.encode()) > MAX_SEGMENT_BYTES:
            return f"a segment is longer than {MAX_SEGMENT_BYTES} bytes"
    return None


class Index:
    """The members of an artifact, sorted by path in UTF-8 order.

    `index[i]` is a `Member`. The columns (`paths`, `sizes`, `modes`, `mtimes_ns`, `sha256s`, `crcs`) are public for
    loops over many rows.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes = array("q")
        self.modes = array("I")
        self.mtimes_ns = array("q")
        self.sha256s = bytearray()
        self.crcs = array("I")

    def append(self, member: Member) -> None:
        """Add a row; rows must come in the order of their paths."""
        self.paths.append(member.path)
        self.sizes.append(member.size)
        self.modes.append(member.mode)
        self.mtimes_ns.append(member.mtime_ns)
        self.sha256s += member.sha256
        self.crcs.append(member.crc32c)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Member:
        return Member(self.paths[i], self.sizes[i], self.modes[i], self.mtimes_ns[i], self.sha256_of(i), self.crcs[i])

    def __iter__(self) -> Iterator[Member]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<Index {len(self)} members, {self.total_bytes} bytes>"

    def sha256_of(self, i: int) -> bytes:
        """The SHA-256 of member `i`, 32 bytes."""
        return bytes(self.sha256s[i * SHA256_BYTES : (i + 1) * SHA256_BYTES])

    @property
    def total_bytes(self) -> int:
        """The sum of the sizes of all members."""
        return sum(self.sizes)

    def content_digest(self) -> str:
        """`sha256:` of the lines `<sha256 hex> <size> <path>` in index order."""
        digest = hashlib.sha256()
        for i, path in enumerate(self.paths):
            digest.update(f"{self.sha256_of(i).hex()} {self.sizes[i]} {path}\n".encode())
        return "sha256:" + digest.hexdigest()

    def executables_digest(self) -> str:
        """`sha256:` of the lines `<path>` of the executable members in index order."""
        digest = hashlib.sha256()
        for path, mode in zip(self.paths, self.modes, strict=True):
            if mode == EXECUTABLE_MODE:
                digest.update(f"{path}\n".encode())
        return "sha256:" + digest.hexdigest()

    def check(self) -> None:
        """Refuse rows that must never be written.

        Raises:
            HostileArtifact: a row breaks a rule; the message names the path and the rule.
        """
        IndexRules(self).check()


class IndexRules:
    """Checks the rows of an index against the rules, as they arrive."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._checked = 0
        self._previous = ""
        # Files whose paths are prefixes of the current one. In sorted order, the paths that begin with a file's path
        # follow it without a gap. So comparing with these few files replaces a set of all directories.
        self._begun: list[str] = []

    def check(self) -> None:
        """Refuse a row that must never be written, among those added since the last call.

        Raises:
            HostileArtifact: a row breaks a rule; the message names the path and the rule.
        """
        index, previous, begun = self._index, self._previous, self._begun
        for i in range(self._checked, len(index)):
            path = index.paths[i]
            if fault := path_fault(path):
                raise refused_member(path, fault)
            # Code point order is UTF-8 order; a strictly ascending order also means that no name comes twice.
            if path <= previous:
                raise refused_member(path, "it is a duplicate or out of order")
            previous = path
            if index.sizes[i] < 0:
                raise refused_member(path, f"its size is {index.sizes[i]}")
            if index.modes[i] not in (FILE_MODE, EXECUTABLE_MODE):
                raise refused_member(path, f"its mode is {index.modes[i]:o}, neither 644 nor 755")
            if path.endswith("/") and (index.sizes[i] or index.modes[i] != EXECUTABLE_MODE):
                raise refused_member(path, "a directory has content or another mode than 755")
            if not index.sizes[i] and (index.crcs[i] or index.sha256_of(i) != EMPTY_SHA256):
                raise refused_member(path, "it is empty, but its checksums are not those of an empty file")
            while begun and not path.startswith(begun[-1]):
                begun.pop()
            for file in begun:
                if path[len(file)] == "/":
                    raise refused_member(file, "it is a file and a directory")
            if not path.endswith("/"):
                begun.append(path)
        self._checked, self._previous = len(index), previous


def refused_member(path: str, reason: str) -> HostileArtifact:
    """The error for a member that must never be written."""
    return HostileArtifact(f"member {quoted(path)} is refused: {reason}", path=path, reason=reason)


def index_bytes_limit(members: int) -> int:
    """The maximum bytes of an index of so many members: with the longest paths, and nothing compressed."""
    return min(MAX_INDEX_BYTES, _FRAME_BYTES + members * (MAX_PATH_BYTES + _ROW_BYTES))
