"""Files of the local store: object descriptions from file status, and errors of the operating system as blobflow's."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from blobflow.durable import fsync_directory, write_all
from blobflow.errors import (
    InvalidKey,
    NoSuchUpload,
    ObjectChanged,
    OsFault,
    PreconditionFailed,
    SizeMismatch,
    StoreConfigurationError,
    os_fault,
    storing,
)
from blobflow.private import PrivateDirectory
from blobflow.stores.base import ObjectMeta, PartMeta
from blobflow.untrusted import utc_time

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def object_mode(private: bool) -> int:
    """The mode of an object, before the umask."""
    return 0o600 if private else 0o666


def e_tag_of(status: os.stat_result) -> str:
    """The entity tag of a file: inode, modification time and size."""
    return f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'


def part_meta(part_number: int, size: int, checksum: int) -> PartMeta:
    """A part whose CRC32C is its entity tag."""
    return PartMeta(part_number, size, f'"{checksum:08x}-{size:x}"', checksum)


def object_meta(key: str, status: os.stat_result) -> ObjectMeta:
    """The description of an object, from its file's status."""
    return ObjectMeta(key, status.st_size, e_tag_of(status), utc_of(status.st_mtime_ns))


def utc_of(nanoseconds: int) -> datetime | None:
    """The time of `nanoseconds` since the epoch; None if it is not a valid date."""
    return utc_time(nanoseconds / 1e9)


def create_file(directory: PrivateDirectory, name: str, content: bytes, mode: int | None = None) -> None:
    """Make a file; its content is durable, but not yet its name."""
    fd = directory.open(name, _CREATE, mode)
    try:
        write_all(fd, content, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def check_pin(key: str, fd: int, e_tag: str | None) -> None:
    """Refuse a file whose entity tag is not `e_tag`, if that is given.

    Raises:
        ObjectChanged: the file has another entity tag.
    """
    if e_tag is not None and (actual := e_tag_of(os.fstat(fd))) != e_tag:
        raise changed(key, e_tag, actual)


def read_into(key: str, fd: int, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a file from `offset`.

    Raises:
        SizeMismatch: the file ends before the buffer is full.
    """
    filled = 0
    while filled < len(buffer):
        count = os.preadv(fd, [buffer[filled:]], offset + filled)
        if not count:
            raise SizeMismatch(
                f"{key!r} ends at byte {offset + filled}, wanted {offset + len(buffer)}",
                key=key,
                what="object",
                expected=offset + len(buffer),
                actual=os.fstat(fd).st_size,
            )
        filled += count


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, with durable names.

    Raises:
        StoreConfigurationError: no directory can be made there, now or later.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        if os_fault(error) not in (OsFault.GONE, OsFault.OTHER):
            raise
        raise StoreConfigurationError(
            f"{path} is no directory, and none can be made there: {error.strerror}",
            hint="name a directory for the store, or a path where one can be made",
            path=str(path),
        ) from error
    fsync_directory(path.parent)


def conflict(key: str, reason: str) -> InvalidKey:
    """The error of a key that cannot be a file's path."""
    return InvalidKey(
        f"{key!r} cannot be stored: {reason}",
        hint="in a local store a key cannot be an object and the directory of others at once",
        key=key,
        reason=reason,
    )


def lost(key: str, expected: str | None, actual: str | None) -> PreconditionFailed:
    """The error of a conditional write that does not apply."""
    what = "exists already" if expected is None else "was replaced" if actual else "does not exist"
    return PreconditionFailed(f"{key!r} {what}", key=key, expected=expected, actual=actual)


def changed(key: str, expected: str, actual: str | None) -> ObjectChanged:
    """The error of an object that was replaced while it was read."""
    return ObjectChanged(f"{key!r} was replaced while it was read", key=key, expected=expected, actual=actual)


def no_such_upload(key: str, upload_id: str) -> NoSuchUpload:
    """The error of an upload that does not exist."""
    return NoSuchUpload(
        f"no upload {upload_id!r} of {key!r}: completed, aborted or expired", key=key, upload_id=upload_id
    )


def size_mismatch(key: str, expected: int, actual: int) -> SizeMismatch:
    """The error of a body that does not have its declared size."""
    return SizeMismatch(
        f"the body for {key!r} has {actual} bytes or more instead of {expected}"
        if actual > expected
        else f"the body for {key!r} ended after {actual} of {expected} bytes",
        what="body",
        key=key,
        expected=expected,
        actual=actual,
    )


def translated(operation: str, key: str, offset: int | None = None) -> AbstractContextManager[None]:
    """Turns the operating system's errors into the store's, with operation, key and offset."""
    where = f"{key!r}" if offset is None else f"{key!r} at {offset}"
    return storing(f"{operation} {where}", operation=operation, key=key, offset=offset)
