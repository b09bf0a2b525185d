"""The one place that classifies errors of the operating system.

`reading` translates them to blobflow's errors for sources, `writing` for destinations, `storing` for stores.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Final

from typing_extensions import NotRequired, TypedDict, Unpack

from blobflow.errors.kinds import (
    BlobflowError,
    DiskFull,
    InvalidKey,
    RefusedError,
    SourceChanged,
    StoreConfigurationError,
    StoreUnavailable,
    SystemLimit,
    TemporaryError,
    Unsupported,
    UnsupportedSource,
    UsageError,
)
from blobflow.errors.wording import LEAVE_IT_OUT

__all__ = ["OsFault", "error_anywhere", "expanded", "os_fault", "reading", "storing", "writing"]


class Place(TypedDict, total=False):
    """Where an error of the operating system happened."""

    operation: str | None
    key: str | None
    path: str | None
    offset: int | None


class StorePlace(TypedDict):
    """Where it happened in a store that keeps its objects as files."""

    operation: str
    key: NotRequired[str | None]
    path: NotRequired[str | None]
    offset: NotRequired[int | None]


class OsFault(Enum):
    """What an error of the operating system means, independent of the operation."""

    NO_ROOM = auto()
    FILE_SIZE = auto()
    OPEN_FILES = auto()
    DENIED = auto()
    GONE = auto()
    NAME_TOO_LONG = auto()
    CANNOT = auto()
    """The file system lacks the operation."""
    DAMAGED = auto()
    LATER = auto()
    """The next attempt may succeed, without any change."""
    OTHER = auto()


_FAULTS: Final = {
    errno.ENOSPC: OsFault.NO_ROOM,
    errno.EDQUOT: OsFault.NO_ROOM,
    errno.EFBIG: OsFault.FILE_SIZE,
    errno.EMFILE: OsFault.OPEN_FILES,
    errno.EACCES: OsFault.DENIED,
    errno.EPERM: OsFault.DENIED,
    errno.EROFS: OsFault.DENIED,
    errno.ENOENT: OsFault.GONE,
    errno.ENOTDIR: OsFault.GONE,
    errno.ESTALE: OsFault.GONE,
    errno.ENAMETOOLONG: OsFault.NAME_TOO_LONG,
    errno.EXDEV: OsFault.CANNOT,
    errno.EMLINK: OsFault.CANNOT,
    errno.ENOSYS: OsFault.CANNOT,
    errno.ENOTSUP: OsFault.CANNOT,
    errno.EOPNOTSUPP: OsFault.CANNOT,
    errno.EIO: OsFault.DAMAGED,
    errno.EAGAIN: OsFault.LATER,
    errno.EINTR: OsFault.LATER,
    errno.ENFILE: OsFault.LATER,
    errno.ENOBUFS: OsFault.LATER,
    errno.ENOLCK: OsFault.LATER,
    errno.ENOMEM: OsFault.LATER,
    errno.ETIMEDOUT: OsFault.LATER,
}

_LIMITS: Final = {
    OsFault.FILE_SIZE: (
        "file size",
        "raise the limit on file sizes (`ulimit -f`), or use a file system that holds files of this size",
    ),
    OsFault.OPEN_FILES: ("open files", "raise the limit on open files (`ulimit -n`), or use fewer workers"),
}


def os_fault(error: OSError) -> OsFault:
    """The meaning of `error`."""
    return _FAULTS.get(error.errno or 0, OsFault.OTHER)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Generator[None]:
    """Translate errors of the operating system while `path`, a source or a part of one, is read.

    Raises:
        SourceChanged: the file or directory no longer exists.
        UnsupportedSource: the file or directory cannot be read.
        SystemLimit, TemporaryError: this process or machine cannot read anything more.
    """
    try:
        yield
    except OSError as error:
        raise _source_error(error, os.fspath(path)) from error


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Translate errors of the operating system while `path`, a destination, is written to.

    Raises:
        DiskFull: there is no room.
        RefusedError: `path` cannot be written to.
        Unsupported: its file system lacks an operation that is needed.
        SystemLimit, TemporaryError: this process or machine cannot write anything more.
    """
    try:
        yield
    except OSError as error:
        raise _destination_error(error, path) from error


@contextmanager
def storing(doing: str, **place: Unpack[StorePlace]) -> Generator[None]:
    """Translate errors of the operating system in a store that keeps its objects as files.

    Args:
        doing: The operation and its object; the message begins with it.
        place: Fields of the error: operation, key, offset; path for something that is not an object.

    Raises:
        DiskFull: there is no room. It is not StoreUnavailable, because an immediate retry makes no room.
        StoreConfigurationError: the directory cannot be used.
        InvalidKey: the key is too long for the file system.
        SystemLimit: this process cannot store anything more.
        StoreUnavailable: any other error; the next attempt may succeed.
    """
    try:
        yield
    except OSError as error:
        raise _store_error(error, doing, place) from error


def _source_error(error: OSError, path: str) -> BlobflowError:
    shown = path.encode("utf-8", "backslashreplace").decode()
    message = f"{shown!r} cannot be read: {_reason(error)}"
    fault = os_fault(error)
    if fault is OsFault.GONE:
        return SourceChanged(message, path=shown, what="existence")
    remedies = {
        OsFault.DENIED: f"give permission to read it, or {LEAVE_IT_OUT}",
        OsFault.DAMAGED: f"check the disk, or {LEAVE_IT_OUT}",
        OsFault.NAME_TOO_LONG: f"shorten the path, or {LEAVE_IT_OUT}",
    }
    return error_anywhere(error, message, path=shown) or UnsupportedSource(
        message, hint=remedies.get(fault, LEAVE_IT_OUT), path=shown, reason=_reason(error)
    )


def _destination_error(error: OSError, path: Path) -> BlobflowError:
    fault = os_fault(error)
    message = f"{path} cannot be written: {_reason(error)}"
    if fault is OsFault.NO_ROOM:
        message = f"no room left for {path}: {_reason(error)}"
    if fault is OsFault.CANNOT:
        hint = "name a directory on another file system"
        return Unsupported(message, hint=hint, path=str(path), capability=_reason(error))
    remedies = {
        OsFault.DAMAGED: "check the disk, or name a directory on another one",
        OsFault.NAME_TOO_LONG: "name a directory with a shorter path",
    }
    return error_anywhere(error, message, path=str(path)) or RefusedError(
        message, hint=remedies.get(fault, "name a directory that can be written to"), path=str(path)
    )


def _store_error(error: OSError, doing: str, place: StorePlace) -> BlobflowError:
    message = f"{doing}: {_reason(error)}"
    fault = os_fault(error)
    if fault is OsFault.NAME_TOO_LONG:
        name = place.get("key") or place.get("path") or ""
        reason = "longer than the file system allows"
        return InvalidKey(message, operation=place["operation"], key=name, offset=place.get("offset"), reason=reason)
    if fault in (OsFault.DENIED, OsFault.CANNOT):
        hint = "the directory must be one writable file system with hard links"
        return StoreConfigurationError(message, hint=hint, **place)
    if fault is OsFault.LATER:
        return StoreUnavailable(message, **place)
    return error_anywhere(error, message, **place) or StoreUnavailable(message, **place)


def error_anywhere(error: OSError, message: str, **place: Unpack[Place]) -> BlobflowError | None:
    """The error if it is the same for sources, destinations and stores; None if they differ."""
    fault = os_fault(error)
    if fault is OsFault.NO_ROOM:
        return DiskFull(message, **place)
    if fault in _LIMITS:
        limit, hint = _LIMITS[fault]
        return SystemLimit(message, hint=hint, limit=limit, **place)
    if fault is OsFault.LATER:
        return TemporaryError(message, **place)
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` and `~user` replaced.

    Raises:
        UsageError: the home directory is unknown (a container's user without a passwd entry).
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{os.fspath(path)}: there is no home directory for it",
            hint="set HOME to a directory that can be written to, or give a path without ~",
            path=os.fspath(path),
        ) from error
