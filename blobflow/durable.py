"""Files that survive a crash, and files that several processes use: the one place that knows the system calls.

**Journals.** A journal is a file of lines that only grows and is read again after a crash. One rule defines what
counts after a crash: *a line counts once its newline is there*. Bytes after the last newline are torn; they are not a
record. `whole_lines` reads by this rule. A writer that holds the file alone cuts the torn end off and continues there
(`append_at`). Writers that share a file cannot cut it off, so each write begins with a newline, which ends a torn line
before it (`append_lines`). The readers of those files skip lines that are not records.

**Locks** are flock(2) locks: they belong to the open file, end with the process, and are advisory. If the holder may
rename or remove the file, a caller that waited for its lock checks `names_file` once it has the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from blobflow.errors import DiskTooSmall, TransferBusy, writing

_COPY_BYTES: Final = 1024 * 1024
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

# Writing


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, in as many calls as it takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


def copy_bytes(source: int, target: int, offset: int = 0) -> int:
    """Copy a whole file from descriptor to descriptor, by reflink or inside the kernel if the file systems can.

    Args:
        source: It is read from its first byte; its position does not matter and does not change.
        target: The descriptor to write to; likewise.
        offset: Where in `target` the first byte goes.

    Returns:
        Bytes copied: the size that `source` had when its end was reached.

    Raises:
        OSError: an error of either file.
    """
    copied = 0
    while True:
        try:
            count = os.copy_file_range(source, target, 1 << 30, copied, offset + copied)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            break
        if not count:
            break
        copied += count
    # The rest, if the kernel cannot. Some file systems return 0 for "cannot", so this always reads to the end.
    while block := os.pread(source, _COPY_BYTES, copied):
        write_all(target, block, offset + copied)
        copied += len(block)
    return copied


def replace_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write `data` to disk and put it in place as a whole file, replacing an existing one.

    Its name is durable only after `fsync_directory` or `sync_tree`, which the caller calls once for many files.

    Args:
        private: Whether only its owner may read it.
    """
    partial = path.with_name(f".{path.name}.partial")
    mode = 0o600 if private else 0o666
    with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, _DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make everything written so far below `path` durable: one syncfs(2) if available, else sync(2).

    It is one call, because a tree of 100,000 small files would need 100,000 calls of fsync.
    """
    import ctypes  # not at the top: commands that sync no tree start 10 ms earlier

    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    descriptor = os.open(path, _DIRECTORY)
    try:
        if syncfs(descriptor):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(descriptor)


# Journals


def whole_lines(file: BinaryIO, start: int = 0, *, longest: int = sys.maxsize) -> Iterator[tuple[int, bytes]]:
    """The lines that a journal has at this moment, without a torn last line; lines appended later are not read.

    Args:
        file: Open for reading; only this iterator may read it until the iteration ends.
        start: Offset of the first line.
        longest: Longer lines (in bytes) are skipped, so that a damaged file takes no more memory than that.

    Yields:
        The offset after each line, and the line with its newline.
    """
    left = file.seek(0, os.SEEK_END) - start
    end = file.seek(start)
    is_beginning = True
    while left > 0 and (piece := file.readline(min(left, longest))):
        left -= len(piece)
        end += len(piece)
        is_whole = piece.endswith(b"\n")
        if is_beginning and is_whole:
            yield end, piece
        is_beginning = is_whole


def append_lines(descriptor: int, lines: Iterable[str]) -> None:
    """Append lines to a journal that other processes append to as well, or were killed in. The caller syncs it.

    All lines go out in one write, because O_APPEND keeps single writes of several processes apart. The leading newline
    ends the torn line of a process that died; otherwise that line would swallow the first new one.

    Args:
        descriptor: Open with O_APPEND.
        lines: Lines without newlines.

    Raises:
        OSError: an error of the file; `ENOSPC` also if only a part of the lines could be written.
    """
    data = "".join(f"\n{line}" for line in lines).encode() + b"\n"
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def append_at(descriptor: int, end: int, data: bytes, *, durable: bool = True) -> int:
    """Append whole lines to a journal that this process holds alone, and return its new end.

    Args:
        end: Offset after the last whole line. Bytes after it are a torn line of a killed process; they are cut off.
        durable: Whether the lines are on disk on return, and not only in the kernel.

    Raises:
        OSError: nothing was appended, if the disk still allows cutting it off; the next call cuts it off otherwise.
    """
    if os.fstat(descriptor).st_size != end:
        os.ftruncate(descriptor, end)
    try:
        write_all(descriptor, data, end)
        if durable:
            os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(descriptor, end)
        raise
    return end + len(data)


# Locks


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Wait for the lock of an open file and take it; closing the file releases it.

    Args:
        shared: Take a shared lock, which several holders can have at once.
    """
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file without waiting; False if another holder has it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_and_close(descriptor: int) -> None:
    """Close a file and release its lock now; a child forked meanwhile would keep it with its copy of the descriptor."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def names_file(path: str | Path, descriptor: int, *, dir_fd: int | None = None) -> bool:
    """Whether a path still names an open file or directory. A link is not followed.

    Args:
        path: A path below the open directory `dir_fd`, if one is given.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, dir_fd=dir_fd, follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return False


def take_lock_file(path: Path, busy: str) -> int:
    """A descriptor that holds the lock of the file `path` until it is closed. The file is created, and stays.

    Args:
        busy: The message of the error if another process has the lock.

    Raises:
        TransferBusy: another process, or another object of this one, has the lock.
    """
    with writing(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise TransferBusy(busy, path=str(path.parent))
    return descriptor


# Room

SQLITE_FULL: Final = "database or disk is full"
"""SQLite's message for ENOSPC; Python reports SQLite's error codes only since 3.11."""
_COMPRESSING: Final = ("zfs", "bcachefs", "fuse")
"""Prefixes of file systems where data may take less room than its size; others have a mount option for it."""
_COPYING: Final = ("ext2", "ext3", "ext4", "tmpfs", "vfat", "exfat")
"""File systems in which a copy shares no blocks with its original."""


def check_room(path: Path, needed: int) -> None:
    """Refuse to write more bytes below a directory than its file system has room for. Quotas are not checked.

    Args:
        path: A directory that need not exist yet.
        needed: The fewest bytes that will be written, without holes.

    Raises:
        DiskTooSmall: there is less room; the message has both numbers.
    """
    free = free_bytes(path)
    if free is not None and needed > free:
        raise too_small(str(path), needed, free)


def too_small(place: str, needed: int, free: int) -> DiskTooSmall:
    """The error for a place with less room than is needed."""
    return DiskTooSmall(
        f"{place} has too little room: {needed:,} bytes are needed, {free:,} are free",
        path=place,
        needed=needed,
        free=free,
    )


def free_bytes(path: Path) -> int | None:
    """Bytes that can still be written below a directory; None if that is unknown."""
    while not path.exists() and path.parent != path:
        path = path.parent
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    kind, options = _file_system(path)
    if not status.f_blocks or kind.startswith(_COMPRESSING) or "compress" in options:
        return None
    return (status.f_bavail if os.geteuid() else status.f_bfree) * status.f_frsize


def copies_take_room(source: Path, target: Path) -> bool:
    """Whether a copy needs as many bytes as its original, because the file system cannot share blocks."""
    while not target.exists() and target.parent != target:
        target = target.parent
    return os.stat(source).st_dev != os.stat(target).st_dev or _file_system(target)[0] in _COPYING


def _file_system(path: Path) -> tuple[str, str]:
    """The type and the options of the file system of a path, from /proc/self/mountinfo (proc(5))."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                before, _, after = line.partition(" - ")
                if before.split()[2] == number:
                    kind, _, options = after.split(" ", 2)
                    return kind, options
    except (OSError, ValueError, IndexError):
        pass
    return "", ""
