"""Directory trees through descriptors: no recursion, no path too long, no link followed unless asked to.

Linux refuses paths of 4,096 bytes (PATH_MAX), but not deeper trees: a name below an open directory is resolved from
that directory. A `Cursor` is in one directory of a tree and moves by one level at a time. So a walk costs two system
calls per directory, however deep the tree is.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_MAX: Final = 4096
"""Linux's limit, with the NUL at the end."""

_OPENAT2: Final = 437
"""The number of the system call openat2(2), the same on every architecture; glibc has no function for it."""
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_BENEATH: Final = 0x08
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: str, flags: int, mode: int = 0o666) -> int:
    """Open `path` below the open directory `root`; a link anywhere in the path is refused.

    It is one system call if the kernel has openat2(2) (Linux 5.6), otherwise one for each level.

    Args:
        path: A relative path without `..`, at most 4,095 bytes.
        flags: Flags of open(2); the descriptor is closed on exec.
        mode: Mode of a new file, before the umask.

    Raises:
        OSError: `ELOOP` or `ENOTDIR` for a link, otherwise as open(2).
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    how = _OpenHow(flags, mode if flags & os.O_CREAT else 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    while True:
        arguments = (root, os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
        descriptor: int = _LIBC.syscall(_OPENAT2, *arguments)
        if descriptor >= 0:
            return descriptor
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            break
    if code in (errno.ENOSYS, errno.EPERM):  # an old kernel, or a sandbox that does not know the call
        return _open_by_levels(root, path, flags, mode)
    raise OSError(code, os.strerror(code), path)


def _open_by_levels(root: int, path: str, flags: int, mode: int) -> int:
    *above, name = path.split("/")
    directory = root
    try:
        for segment in above:
            below = os.open(segment, OPEN_DIRECTORY, dir_fd=directory)
            if directory != root:
                os.close(directory)
            directory = below
        return os.open(name, flags, mode, dir_fd=directory)
    finally:
        if directory != root:
            os.close(directory)


def open_below(root: str | Path, path: str, flags: int) -> int:
    """Open `path` below the directory `root`, however long both are together; links are followed as usual.

    Args:
        path: A relative path of at most 4,095 bytes.
        flags: Flags of open(2); the descriptor is closed on exec.
    """
    flags |= os.O_CLOEXEC
    whole = os.path.join(root, path)
    if len(whole) < _PATH_MAX // 4 or len(os.fsencode(whole)) < _PATH_MAX:
        return os.open(whole, flags)
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return os.open(path, flags, dir_fd=directory)
    finally:
        os.close(directory)


class _Level(NamedTuple):
    """A directory above the cursor."""

    name: str
    """Name of the directory that was entered from it."""
    identity: tuple[int, int]
    descriptor: int
    """Its descriptor, kept open if a link was followed from it (the link's target has another parent); otherwise -1."""


class Cursor:
    """A position in a directory tree; use it in a `with` block. It keeps one descriptor open, however deep it goes.

    It goes up by `..` and proves that it came back to the directory that it left. If the tree is moved away during a
    walk, the walk stops.

    Attributes:
        descriptor: The descriptor of the current directory; valid until the cursor moves.
        path: The names from the root to the current directory.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self.descriptor = root
        self.path: list[str] = []
        self._above: list[_Level] = []

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        kept = [level.descriptor for level in self._above if level.descriptor >= 0]
        for descriptor in {self.descriptor, *kept} - {self._root}:
            os.close(descriptor)
        self.descriptor = self._root

    def __repr__(self) -> str:
        return f"<Cursor {len(self.path)} levels deep>"

    @property
    def identities(self) -> set[tuple[int, int]]:
        """Device and inode of the current directory and of all directories above it, up to the root."""
        return {level.identity for level in self._above} | {_identity(self.descriptor)}

    def enter(self, name: str, *, follow: bool = False) -> None:
        """Go down into a directory.

        Args:
            follow: Follow a symbolic link. Each followed link on the way keeps a descriptor open.
        """
        flags = OPEN_DIRECTORY & ~os.O_NOFOLLOW if follow else OPEN_DIRECTORY
        below = os.open(name, flags, dir_fd=self.descriptor)
        keep = self.descriptor if follow else -1
        self._above.append(_Level(name, _identity(self.descriptor), keep))
        self.path.append(name)
        if not follow and self.descriptor != self._root:
            os.close(self.descriptor)
        self.descriptor = below

    def leave(self) -> str:
        """Go up, and return the name of the directory that was left.

        Raises:
            OSError: `ESTALE`: the directory has been moved away.
        """
        level = self._above.pop()
        self.path.pop()
        here = self.descriptor
        if level.descriptor >= 0:
            self.descriptor = level.descriptor
        elif not self._above:
            self.descriptor = self._root
        else:
            self.descriptor = os.open("..", OPEN_DIRECTORY, dir_fd=here)
        os.close(here)
        if _identity(self.descriptor) != level.identity:
            raise OSError(errno.ESTALE, "the directory was moved away", level.name)
        return level.name

    def go(self, path: str, *, make: bool = False, mode: int = 0o777) -> int:
        """Go to a directory of the tree by the shortest way, and return its descriptor.

        Args:
            path: Path from the root, without a `/` at either end; an empty path is the root.
            make: Create missing directories.
            mode: Their mode, before the umask.
        """
        wanted = path.split("/") if path else []
        common = 0
        for here, there in zip(self.path, wanted, strict=False):
            if here != there:
                break
            common += 1
        if not common:
            self._go_to_root()
        while len(self.path) > common:
            self.leave()
        for name in wanted[common:]:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, mode, dir_fd=self.descriptor)
            self.enter(name)
        return self.descriptor

    def _go_to_root(self) -> None:
        self.__exit__()
        self.path.clear()
        self._above.clear()


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


class Opened:
    """A `with` block that opens a directory and yields its descriptor. A link is refused."""

    def __init__(self, path: str | Path, *, dir_fd: int | None = None) -> None:
        self._path = path
        self._dir_fd = dir_fd
        self._descriptor = -1

    def __enter__(self) -> int:
        self._descriptor = os.open(self._path, OPEN_DIRECTORY, dir_fd=self._dir_fd)
        return self._descriptor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)


class Entry(NamedTuple):
    """One entry that a walk found."""

    directory: int
    """Descriptor of its directory; valid until the next entry is requested."""
    name: str
    status: os.stat_result
    """Status of the entry itself; a link is not followed."""


def walk(root: int) -> Iterator[Entry]:
    """Everything below an open directory, a directory before its content. Links are not followed.

    Entries that vanish meanwhile are left out.
    """
    with Cursor(root) as cursor:
        pending: list[list[str]] = []
        while True:
            below: list[str] = []
            for name in os.listdir(cursor.descriptor):
                try:
                    status = os.stat(name, dir_fd=cursor.descriptor, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield Entry(cursor.descriptor, name, status)
                if _is_directory(status):
                    below.append(name)
            pending.append(below)
            while pending and not _enter_next(cursor, pending[-1]):
                pending.pop()
                if not pending:
                    return
                cursor.leave()


def _enter_next(cursor: Cursor, names: list[str]) -> bool:
    """Enter the next of these directories that is still there; False if none is left."""
    while names:
        with suppress(FileNotFoundError):
            cursor.enter(names.pop())
            return True
    return False


def _is_directory(status: os.stat_result) -> bool:
    return (status.st_mode & 0o170000) == 0o040000


def remove_entries(directory: int) -> None:
    """Remove everything below an open directory. Links are not followed; entries that vanish meanwhile are fine."""
    with Cursor(directory) as cursor:
        pending = [_remove_files(cursor.descriptor)]
        while True:
            if _enter_next(cursor, pending[-1]):
                pending.append(_remove_files(cursor.descriptor))
                continue
            pending.pop()
            if not pending:
                return
            name = cursor.leave()
            with suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=cursor.descriptor)


def _remove_files(directory: int) -> list[str]:
    """Remove everything except directories from an open directory, and return the names of the directories."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        if not is_directory:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
    return [name for name, is_directory in found if is_directory]


def remove_tree(path: str | Path, *, dir_fd: int | None = None) -> None:
    """Remove a file, a link or a whole directory tree; a missing one is fine. Links are not followed.

    Args:
        path: A path below the open directory `dir_fd`, if one is given.
    """
    try:
        os.unlink(path, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        with suppress(FileNotFoundError):
            with Opened(path, dir_fd=dir_fd) as directory:
                remove_entries(directory)
            os.rmdir(path, dir_fd=dir_fd)


def make_directories(path: Path, mode: int = 0o777) -> None:
    """Create `path` and its missing parents, as `Path.mkdir(parents=True, exist_ok=True)`, without recursion.

    Args:
        mode: Mode of `path` itself, before the umask.
    """
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        if path.parent == path:
            break
        path = path.parent
    for number, directory in enumerate(reversed(missing), 1):
        try:
            directory.mkdir(mode if number == len(missing) else 0o777)
        except FileExistsError:
            if not directory.is_dir():
                raise
