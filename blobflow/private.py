"""Directories that only this user may change, used through their descriptors.

Whatever this package keeps for itself (temporary files, locks, journals, stages, caches) lies in such a directory. It
is opened without following a link, and its owner is checked. Everything in it is then named relative to the descriptor,
so nobody can lead a write or a removal elsewhere by planting a link, or by moving a directory while it is in use.

A directory is trusted if it belongs to this user, or to the owner of the directory that it lies in, who could replace
it in any case. A directory is *shared* if its group may write to it, everybody else may not, and this process is in
that group: several users can use one volume on purpose.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from blobflow.durable import names_file, try_lock
from blobflow.errors import RefusedError
from blobflow.trees import make_directories, remove_entries, remove_tree

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: to open a FIFO that somebody left in the directory must not hang; it means nothing for files."""
_LINK_ERRNOS: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EMLINK})
"""What open(2) says of a link where O_NOFOLLOW forbids it; EMLINK on BSD."""


class PrivateDirectory:
    """An open directory of this user's; use it in a `with` block, or `close` it.

    Attributes:
        path: Where it was when it was opened, for messages only.
        descriptor: For calls that take a `dir_fd`.
        is_shared: Whether other users work in it as well, through its group.
    """

    __slots__ = ("_owner", "descriptor", "is_shared", "path")

    def __init__(self, descriptor: int, path: Path, status: os.stat_result) -> None:
        self.descriptor = descriptor
        self.path = path
        self.is_shared = _is_shared(status)
        self._owner = status.st_uid

    def __repr__(self) -> str:
        return f"<PrivateDirectory {self.path}>"

    @classmethod
    def at(cls, path: Path, *, make: bool = True) -> PrivateDirectory:
        """The directory that a user named. Links on the way to it are the user's own and are followed.

        Args:
            make: Make it where it is missing, for its owner alone.

        Raises:
            RefusedError: it belongs to another user, who is not root.
            FileNotFoundError: it is missing and was not to be made.
        """
        if make:
            make_directories(path, 0o700)
        descriptor = os.open(path, _DIRECTORY)
        try:
            status = os.fstat(descriptor)
            _check(path, status, 0)
            return cls(descriptor, path, status)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def within(cls, parent: int, name: str, path: Path, *, make: bool = False) -> PrivateDirectory:
        """The directory `name` of the open directory `parent`, never through a link.

        One of this user's that others can read is closed to them, unless it is shared.

        Args:
            path: For messages.
            make: Make it where it is missing, durably.

        Raises:
            RefusedError: a link or a file lies there, it belongs to another user, or anybody may write to it.
            FileNotFoundError: it is missing and was not to be made.
        """
        above = os.fstat(parent)
        try:
            descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
            with suppress(FileExistsError):
                os.mkdir(name, 0o770 if _is_shared(above) else 0o700, dir_fd=parent)
                os.fsync(parent)
            return cls.within(parent, name, path)
        except OSError as error:
            if error.errno in _LINK_ERRNOS:
                raise _refused(path, "it is a link or a file, not a directory") from error
            raise
        try:
            status = os.fstat(descriptor)
            if status.st_uid == os.geteuid() and status.st_mode & _others(status):
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & ~_others(status))
                status = os.fstat(descriptor)
            _check(path, status, above.st_uid)
            if status.st_mode & stat.S_IWOTH:
                raise _refused(path, "anybody may write to it")
            return cls(descriptor, path, status)
        except BaseException:
            os.close(descriptor)
            raise

    def below(self, name: str, *, make: bool = False) -> PrivateDirectory:
        """The directory `name` in this one; see `within`."""
        return PrivateDirectory.within(self.descriptor, name, self.path / name, make=make)

    def __enter__(self) -> PrivateDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close it; may be called again."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    # Files

    def open(self, name: str, flags: int, mode: int | None = None) -> int:
        """A descriptor of the file `name`; nothing happens to a file that is not to be trusted.

        Args:
            flags: Of open(2).
            mode: Of a file that is made, before the umask; by default it is for those who use the directory.

        Raises:
            RefusedError: a link lies there, something that is no regular file, or a file that belongs to another user
                or has another name elsewhere.
        """
        wanted = mode if mode is not None else 0o660 if self.is_shared else 0o600
        return open_own(
            self.path / name, flags, wanted, within=(self.descriptor, name), owner=self._owner, shared=self.is_shared
        )

    def read(self, name: str, limit: int = -1) -> bytes:
        """The content of a file, cut off after `limit` bytes."""
        with os.fdopen(self.open(name, os.O_RDONLY), "rb") as file:
            return file.read(limit)

    def names(self) -> list[str]:
        """The names of everything in it, in no order."""
        return os.listdir(self.descriptor)

    def entries(self) -> Iterator[tuple[str, os.stat_result]]:
        """Everything in it, links as such; what vanishes meanwhile is left out."""
        for name in self.names():
            with suppress(FileNotFoundError):
                yield name, self.stat(name)

    def stat(self, name: str) -> os.stat_result:
        """Of an entry, a link as such."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Whether there is an entry of that name."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def names_file(self, name: str, descriptor: int) -> bool:
        """Whether `name` still is the open file or directory."""
        return names_file(name, descriptor, dir_fd=self.descriptor)

    def unlink(self, name: str) -> None:
        """Remove a file or a link; absent is fine."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def rename(self, name: str, new_name: str, target: PrivateDirectory | None = None) -> None:
        """Give an entry another name, here or in `target`; it replaces what is there."""
        to = self if target is None else target
        os.rename(name, new_name, src_dir_fd=self.descriptor, dst_dir_fd=to.descriptor)

    def remove(self, name: str) -> None:
        """Remove an entry and everything below it; absent is fine, links are removed and not followed."""
        remove_tree(name, dir_fd=self.descriptor)

    def clear(self) -> None:
        """Remove everything in it."""
        remove_entries(self.descriptor)

    def hold(self, *, shared: bool = False) -> bool:
        """Hold it until it is closed, or until the process ends, unless another one holds it.

        Args:
            shared: With others that hold it shared, too.
        """
        return try_lock(self.descriptor, shared=shared)

    def sync(self) -> None:
        """Make the names in it durable."""
        os.fsync(self.descriptor)


def open_own(
    path: Path,
    flags: int,
    mode: int,
    *,
    within: tuple[int, str] | None = None,
    owner: int | None = None,
    shared: bool = False,
) -> int:
    """A descriptor of a file that is this user's; nothing happens to one that another user can have prepared.

    Args:
        flags: Of open(2).
        mode: Of a file that is made, before the umask; with O_CREAT, one that is there already is narrowed to it.
        within: An open directory, and the name there; then `path` is for messages only.
        owner: Whose file it may be as well: the owner of its directory.
        shared: Whether the users of its directory trust each other.

    Raises:
        RefusedError: a link lies there, something that is no regular file, or a file that belongs to another user or
            has another name elsewhere.
    """
    directory, name = within or (None, path)
    try:
        descriptor = os.open(name, (flags | _FILE) & ~os.O_TRUNC, mode, dir_fd=directory)
    except OSError as error:
        if error.errno in (*_LINK_ERRNOS, errno.ENXIO, errno.EISDIR):
            raise _refused(path, "it is not a regular file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(path, "it is not a regular file")
        if not shared and status.st_uid not in (os.geteuid(), owner):
            raise _refused(path, f"it belongs to another user (uid {status.st_uid})")
        if status.st_nlink > 1:
            raise _refused(path, "it has another name elsewhere (a hard link)")
        is_lax = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~mode
        if flags & os.O_CREAT and is_lax and not shared and status.st_uid == os.geteuid():
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & mode)
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_shared(status: os.stat_result) -> bool:
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return writable == stat.S_IWGRP and status.st_gid in {os.getegid(), *os.getgroups()}


def _others(status: os.stat_result) -> int:
    """The permissions that users have who have no business in the directory."""
    return stat.S_IRWXO if _is_shared(status) else stat.S_IRWXG | stat.S_IRWXO


def _check(path: Path, status: os.stat_result, other: int) -> None:
    if status.st_uid not in (os.geteuid(), other) and not _is_shared(status):
        raise _refused(path, f"it belongs to another user (uid {status.st_uid})")


def _refused(path: Path, reason: str) -> RefusedError:
    return RefusedError(
        f"{path} is not used: {reason}",
        hint="find out who made it; then remove it, or name another directory",
        path=str(path),
        reason=reason,
    )
