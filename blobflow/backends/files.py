"""Files of sources and targets: exports, copies, removals, and the translation of their errors."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from pydantic import JsonValue

from blobflow.artifact.artifact import write_artifact
from blobflow.artifact.hashing import FileHash, hash_descriptor, hash_files
from blobflow.artifact.index import Index, Member
from blobflow.artifact.landing import check_destination
from blobflow.artifact.manifest import DATA_NAME, FILE_MODE
from blobflow.artifact.members import open_regular, visit_members
from blobflow.artifact.privacy import PrivateRows, encode
from blobflow.backends.base import ExportResult, OnBytes
from blobflow.durable import copy_bytes
from blobflow.errors import (
    OsFault,
    SourceBusy,
    SourceChanged,
    Unsupported,
    UnsupportedSource,
    os_fault,
    reading,
    setting,
    writing,
)
from blobflow.trees import Cursor, Opened, remove_entries, remove_tree

_PAUSES_S: Final = (0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 3.0)
"""Pauses after each attempt to copy a file that was written to meanwhile."""
_TICK_NS: Final = 20_000_000
"""Two writes that are closer than a tick of the kernel's clock (1 to 10 ms) can have the same time."""


def unsupported(path: str, reason: str, remedy: str) -> UnsupportedSource:
    """The error for an entry of the source that an artifact cannot hold."""
    shown = path.encode("utf-8", "backslashreplace").decode()
    return UnsupportedSource(f"{shown!r} cannot be exported: {reason}", hint=remedy, path=shown, reason=reason)


@contextmanager
def all_or_nothing(dest: Path) -> Generator[None]:
    """Restore `dest`, which is missing or empty, to its former state if the block fails.

    Raises:
        SourceBusy: the source changed meanwhile.
    """
    created = not dest.exists()
    try:
        yield
    except BaseException as error:
        if created:
            remove_tree(dest)
        else:  # a mount point, or in a directory that is not writable: it could not be created again
            with Opened(dest) as directory:
                remove_entries(directory)
        if isinstance(error, SourceChanged):
            raise error.while_exporting() from error
        raise


def export_files(
    dest: Path,
    *,
    backend: str,
    write: Callable[[Path], JsonValue],
    on_progress: OnBytes | None = None,
    private: bool = False,
) -> ExportResult:
    """Make an artifact in `dest` from the files that `write` creates in a directory; a failure restores `dest`.

    The same files give the same payload, whenever they were made.

    Args:
        write: Gets the empty directory for the members, and returns the cursor.
        private: Whether the source is private to its owner.

    Raises:
        DestinationNotEmpty: `dest` holds something.
        DiskFull, RefusedError: `dest` cannot be written.
    """
    started = time.monotonic()
    check_destination(dest)
    with all_or_nothing(dest):
        data = dest / DATA_NAME
        with writing(dest):
            dest.mkdir(parents=True, exist_ok=True)
            data.mkdir(0o700 if private else 0o777)
        cursor = write(data)
        paths = sorted(os.listdir(data))
        sizes = [(data / path).stat().st_size for path in paths]
        total = sum(sizes)

        def hash_member(i: int, buffer: memoryview) -> FileHash:
            with open_regular(data, paths[i]) as file:
                return hash_descriptor(file.fileno(), buffer)

        hashes = hash_files(
            len(paths),
            lambda i: sizes[i],
            hash_member,
            on_batch=(lambda _, done: on_progress(done, total)) if on_progress else None,
        )
        index = Index()
        for path, hashed in zip(paths, hashes, strict=True):
            index.append(Member(path, hashed.size, FILE_MODE, 0, hashed.sha256, hashed.crc32c))
        with writing(dest):
            artifact = write_artifact(
                dest, index, backend=backend, cursor=cursor, private=encode(private for _ in paths)
            )
    return ExportResult(
        artifact=artifact,
        members=len(index),
        bytes=total,
        excluded=0,
        symlinks_skipped=0,
        seconds=time.monotonic() - started,
    )


_NO_ROWS: Final = PrivateRows()


class Place(Protocol):
    """Makes the file `name` in an open directory from the file at `path` below another one."""

    def __call__(self, root: int, path: str, directory: int, name: str, *, private: bool) -> None: ...


def place_members(
    paths: Sequence[str],
    root: Path,
    data: Path,
    place: Place,
    private: PrivateRows = _NO_ROWS,
    *,
    closed: bool = False,
) -> None:
    """Put the members at the sorted `paths` from `root` into `data`.

    Args:
        place: `link_member`, `copy_member` or `copy_still`.
        private: The members that only their owner may read.
        closed: Whether only the owner may enter `data`.

    Raises:
        DiskFull, RefusedError: `data` cannot be written.
        SourceChanged, UnsupportedSource: a member cannot be read.
        Unsupported: `data` cannot hold hard links to the members.
    """
    with writing(data):
        data.mkdir(0o700 if closed or private.covers(len(paths)) else 0o777)
    with Opened(os.path.realpath(root)) as source, Opened(data) as top, Cursor(top) as cursor:
        members = visit_members(cursor, paths, private)
        while True:
            with writing(data):
                row, path, name = next(members, (-1, "", ""))
            if row < 0:
                return
            if name:
                with _placing(path, data / path):
                    place(source, path, cursor.descriptor, name, private=row in private)


@contextmanager
def _placing(path: str, target: Path) -> Generator[None]:
    """Translate errors of the operating system while the member `path` is linked or copied to `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            raise Unsupported(
                f"{path!r} cannot be linked to {target}: {error.strerror}",
                hint=f"use {setting('mode', 'reference')} or {setting('mode', 'copy')},"
                " or a destination on the file system of the source",
                capability="hard links",
            ) from error
        # Of the errors of a copy, only these certainly come from the target.
        is_target = os_fault(error) in (OsFault.NO_ROOM, OsFault.FILE_SIZE) or error.errno == errno.EROFS
        with writing(target) if is_target else reading(path):
            raise


def link_member(root: int, path: str, directory: int, name: str, *, private: bool) -> None:
    """Make a hard link; see `Place`. For a symbolic link, it links the file that it leads to."""
    del private
    os.link(path, name, src_dir_fd=root, dst_dir_fd=directory)


def copy_member(root: int, path: str, directory: int, name: str, *, private: bool) -> None:
    """Copy a file with its times, and with its permission bits as far as the umask allows; see `Place`."""
    with _copying(root, path, directory, name, private=private) as (original, copy):
        copy_bytes(original, copy)
        _keep_times(os.fstat(original), copy)


def copy_still(root: int, path: str, directory: int, name: str, *, private: bool) -> None:
    """Copy a file as it was at one moment; see `copy_member`.

    If the file is written to during the copy, it is copied again, after pauses of about ten seconds in all.

    Raises:
        SourceBusy: it was written to during every attempt.
    """
    with _copying(root, path, directory, name, private=private) as (original, copy):
        for pause_s in _PAUSES_S:
            before, now_ns = os.fstat(original), time.time_ns()
            copied = copy_bytes(original, copy)
            after = os.fstat(original)
            is_fresh = 0 <= now_ns - before.st_ctime_ns < _TICK_NS
            if (copied, *_version(before)) == (after.st_size, *_version(after)) and not is_fresh:
                _keep_times(after, copy)
                return
            os.ftruncate(copy, 0)
            time.sleep(pause_s)
    raise SourceBusy(
        f"{path!r} was written to during each of {len(_PAUSES_S)} attempts to copy it",
        hint=f"stop the program that writes to it, leave it out with {setting('exclude')},"
        " or export a snapshot of its file system",
        path=path,
        what="size or mtime",
    )


@contextmanager
def _copying(root: int, path: str, directory: int, name: str, *, private: bool) -> Generator[tuple[int, int]]:
    # Non-blocking, so that a pipe that took a file's place cannot hang the copy.
    original = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=root)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        # With its permissions from the start, so that nobody can open it who may not read it in the end.
        mode = os.fstat(original).st_mode & (0o700 if private else 0o777)
        copy = os.open(name, flags, mode, dir_fd=directory)
        try:
            yield original, copy
        finally:
            os.close(copy)
    finally:
        os.close(original)


def _keep_times(status: os.stat_result, copy: int) -> None:
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
