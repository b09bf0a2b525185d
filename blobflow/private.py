"""Directories that only this user may change, used through their descriptors.

Everything that this package keeps (temporary files, locks, journals, stages, caches) is in such a directory. The
directory is opened without following a link, and its owner is checked. Everything in it is then named relative to the
descriptor. So nobody can redirect a write or a removal by planting a link, or by moving a directory while it is in use.

A directory is trusted if it belongs to this user, or to the owner of its parent directory, who could replace it in any
case. A directory is *shared* if its group may write to it, everybody else may not, and this process is in that group.
So several users can use one volume on purpose.
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
"""O_NONBLOCK: opening a FIFO that was left in the directory must not hang; for files it has no effect."""
_LINK_ERRNOS: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EMLINK})
"""Error codes of open(2) for a link that O_NOFOLLOW forbids; EMLINK on BSD."""


class PrivateDirectory:
    """An open directory that belongs to this user; use it in a `with` block, or `close` it.

    Attributes:
        path: Where it was when it was opened, for messages only.
        descriptor: The descriptor for calls that take a `dir_fd`.
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
        """The directory at a path from the user. Links on the way to it are the user's and are followed.

        Args:
            make: Create it if it is missing, with access only for its owner.

        Raises:
            RefusedError: it belongs to another user, who is not root.
            FileNotFoundError: it is missing and `make` is False.
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

        If it belongs to this user and others can read it, their access is removed, unless it is shared.

        Args:
            path: The path for messages.
            make: Create it durably if it is missing.

        Raises:
            RefusedError: it is a link or a file, it belongs to another user, or everybody may write to it.
            FileNotFoundError: it is missing and `make` is False.
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
        """A descriptor of the file `name`; a file that is not trusted stays unchanged.

        Args:
            flags: Flags of open(2).
            mode: Mode of a new file, before the umask; by default it is for the users of the directory.

        Raises:
            RefusedError: it is a link, not a regular file, a file of another user, or a file that has another name
                elsewhere.
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
        """The names of all entries, in no particular order."""
        return os.listdir(self.descriptor)

    def entries(self) -> Iterator[tuple[str, os.stat_result]]:
        """All entries with their status, links not followed; entries that vanish meanwhile are left out."""
        for name in self.names():
            with suppress(FileNotFoundError):
                yield name, self.stat(name)

    def stat(self, name: str) -> os.stat_result:
        """The status of an entry; a link is not followed."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def names_file(self, name: str, descriptor: int) -> bool:
        """Whether `name` still names the open file or directory."""
        return names_file(name, descriptor, dir_fd=self.descriptor)

    def unlink(self, name: str) -> None:
        """Remove a file or a link; a missing one is fine."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def rename(self, name: str, new_name: str, target: PrivateDirectory | None = None) -> None:
        """Rename an entry, here or into `target`; it replaces an existing entry."""
        to = self if target is None else target
        os.rename(name, new_name, src_dir_fd=self.descriptor, dst_dir_fd=to.descriptor)

    def remove(self, name: str) -> None:
        """Remove an entry and everything below it; a missing one is fine, and links are not followed."""
        remove_tree(name, dir_fd=self.descriptor)

    def clear(self) -> None:
        """Remove everything in it."""
        remove_entries(self.descriptor)

    def hold(self, *, shared: bool = False) -> bool:
        """Lock the directory until it is closed or the process ends; False if another process has the lock.

        Args:
            shared: Take a shared lock, which several holders can have at once.
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
    """A descriptor of a file that belongs to this user; a file that another user may have prepared stays unchanged.

    Args:
        flags: Flags of open(2).
        mode: Mode of a new file, before the umask; with O_CREAT, an existing file is narrowed to it.
        within: An open directory and the name in it; then `path` is for messages only.
        owner: Another user that it may belong to: the owner of its directory.
        shared: Whether the users of its directory trust each other.

    Raises:
        RefusedError: it is a link, not a regular file, a file of another user, or a file that has another name
            elsewhere.
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
    """The permissions of users that do not use the directory."""
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
