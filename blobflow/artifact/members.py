"""The members of an artifact on local disk: opens them safely, and verifies them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.hashing import FileHash, hash_descriptor, hash_files
from blobflow.artifact.manifest import EXECUTABLE_MODE
from blobflow.artifact.privacy import PrivateRows
from blobflow.checksum import EMPTY_SHA256
from blobflow.errors import DigestMismatch, SourceChanged, reading
from blobflow.trees import Cursor, open_below


def visit_members(cursor: Cursor, paths: Sequence[str], private: PrivateRows) -> Iterator[tuple[int, str, str]]:
    """Move the cursor to the directory of each member in turn; a missing directory is created.

    Directories that contain only private members are private.

    Yields:
        The row of the member, its path, and its name in that directory. An empty directory is itself the cursor's
        directory, and has no name there.
    """
    mode = 0o777
    if private:
        mode = 0o700
        for row, path in enumerate(paths):
            if row not in private:
                cursor.go(path.rpartition("/")[0], make=True)
    last = ""
    for row, path in enumerate(paths):
        parent, _, name = path.rpartition("/")
        if parent != last:
            cursor.go(parent, make=True, mode=mode)
            last = parent
        yield row, path, name


def permissions(mode: int, *, private: bool) -> int:
    """The mode with which a member may be created, before the umask.

    Args:
        mode: Mode of its row in the index.
    """
    return (0o777 if mode == EXECUTABLE_MODE else 0o666) & (0o700 if private else 0o777)


def verify_members(artifact: Artifact, *, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Read every member of a local artifact and compare size and SHA-256 with the index.

    Args:
        on_progress: Called in the calling thread with bytes done and total bytes.

    Raises:
        DigestMismatch: a member differs; the message names the first one.
        SourceChanged: a member is missing or not a regular file.
        UnsupportedSource: a member cannot be read.
    """
    index = artifact.index
    root = os.path.realpath(artifact.data)
    total = index.total_bytes

    def hash_member(i: int, buffer: memoryview) -> FileHash:
        path = index.paths[i]
        if path.endswith("/"):
            if not _is_directory(root, path):
                raise SourceChanged(f"directory {path!r} of {artifact!r} is missing", path=path, what="existence")
            return FileHash(0, EMPTY_SHA256, 0)
        with reading(path), open_regular(root, path) as file:
            return hash_descriptor(file.fileno(), buffer)

    hashes = hash_files(
        len(index),
        lambda i: index.sizes[i],
        hash_member,
        on_batch=(lambda _, done: on_progress(done, total)) if on_progress else None,
    )
    for i, hashed in enumerate(hashes):
        expected = FileHash(index.sizes[i], index.sha256_of(i), index.crcs[i])
        if hashed != expected:
            raise DigestMismatch(
                f"member {index.paths[i]!r} has SHA-256 {hashed.sha256.hex()} in {hashed.size} bytes,"
                f" the index says {expected.sha256.hex()} in {expected.size}",
                what=index.paths[i],
                expected=expected.sha256.hex(),
                actual=hashed.sha256.hex(),
            )


def _is_directory(root: str, path: str) -> bool:
    try:
        os.close(open_below(root, path, os.O_PATH | os.O_DIRECTORY))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_regular(root: str | Path, path: str) -> io.FileIO:
    """A file below `root`, opened for reading; only a regular file is accepted.

    Raises:
        SourceChanged: it no longer exists, or is not a regular file.
        UnsupportedSource: it cannot be read.
    """
    with reading(path):
        # Non-blocking, so that a pipe that took a file's place cannot hang the export.
        descriptor = open_below(root, path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceChanged(f"{path!r} is no longer a regular file", path=path, what="type")
    return io.FileIO(descriptor)
