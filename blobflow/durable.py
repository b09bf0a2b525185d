"""Files that survive a crash, and files that several processes use: the one place for what the system calls promise.

**Journals.** A journal is a file of lines that only grows, read again after a crash. Everywhere one rule says what a
crash may leave: *a line counts once its newline is there*; what follows the last newline is torn, and is not a record.
`whole_lines` reads by this rule. A writer that holds the file alone cuts the torn end off and goes on there
(`append_at`). Writers that share a file cannot, so each begins with a newline, which ends a torn line before it
(`append_lines`); the readers of those files pass over lines that are not records.

**Locks** are those of flock(2): they belong to the open file, end with the process, and are advisory. Whoever waits for
the lock of a file that its holder may rename or remove asks `names_file` after it has the lock.
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
    """Copy a whole file from descriptor to descriptor, by reflink or inside the kernel where the file systems can.

    Args:
        source: Is read from its first byte; its position does not matter and stays.
        target: Is written to, likewise.
        offset: Where in `target` the first byte goes.

    Returns:
        Bytes copied: the size that `source` had when its end was reached.

    Raises:
        OSError: of either file.
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
    # What is left, if the kernel cannot; some file systems answer 0 for "cannot", so the end is always read for.
    while block := os.pread(source, _COPY_BYTES, copied):
        write_all(target, block, offset + copied)
        copied += len(block)
    return copied


def replace_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Put a file in place whole, with its bytes on disk; it replaces what is there.

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
    """Make everything written so far below `path` durable: one syncfs(2) where there is one, else sync(2).

    One call, because a tree of 100,000 small files would need 100,000 times an fsync.
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
    """The lines that a journal has at this moment, however many are appended meanwhile; a torn last line is left out.

    Args:
        file: Open for reading, and only read by this iterator until it ends.
        start: Offset of the first line.
        longest: Lines of more bytes are passed over, so that a damaged file takes no more memory than that.

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

    One write, because O_APPEND keeps single writes of several processes apart. The newline in front ends the torn line
    of a process that died, which would swallow this one otherwise.

    Args:
        descriptor: Open with O_APPEND.
        lines: Without newlines.

    Raises:
        OSError: of the file; `ENOSPC` also where only a part of the lines could be written.
    """
    data = "".join(f"\n{line}" for line in lines).encode() + b"\n"
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def append_at(descriptor: int, end: int, data: bytes, *, durable: bool = True) -> int:
    """Append whole lines to a journal that this process holds alone, and return its new end.

    Args:
        end: Of the last whole line. What follows it, a line that somebody was killed in, is cut off first.
        durable: Whether the lines are on disk, and not only with the kernel, on return.

    Raises:
        OSError: nothing was appended, as far as the disk still allows to cut it off; the next call does it again.
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
    """Wait for the lock of an open file and take it; closing the file gives it back.

    Args:
        shared: With others that take it shared, too.
    """
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file without waiting; False: somebody else has it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_and_close(descriptor: int) -> None:
    """Close a file and give its lock back, which a child that was forked meanwhile would keep with its own copy."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def names_file(path: str | Path, descriptor: int, *, dir_fd: int | None = None) -> bool:
    """Whether a path still names an open file or directory. A link is not followed.

    Args:
        path: Below the open directory `dir_fd`, if there is one.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, dir_fd=dir_fd, follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return False


def take_lock_file(path: Path, busy: str) -> int:
    """A descriptor that holds the lock of the file `path` until it is closed. The file is made, and stays.

    Args:
        busy: The message of the error where another process has the lock.

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
"""What SQLite says instead of ENOSPC; Python tells its codes only since 3.11."""
_COMPRESSING: Final = ("zfs", "bcachefs", "fuse")
"""Beginnings of the names of file systems where data may take less room than it has bytes; others have an option."""
_COPYING: Final = ("ext2", "ext3", "ext4", "tmpfs", "vfat", "exfat")
"""File systems in which a copy shares no blocks with its original."""


def check_room(path: Path, needed: int) -> None:
    """Refuse to write more bytes below a directory than its file system has room for. Quotas are not known.

    Args:
        path: Need not exist yet.
        needed: The fewest bytes that will be written, whatever is left as a hole.

    Raises:
        DiskTooSmall: naming both numbers.
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
    """Bytes that can still be written below a directory; None where that cannot be said."""
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
    """Whether a copy surely needs as many bytes as its original has: the file system cannot share them."""
    while not target.exists() and target.parent != target:
        target = target.parent
    return os.stat(source).st_dev != os.stat(target).st_dev or _file_system(target)[0] in _COPYING


def _file_system(path: Path) -> tuple[str, str]:
    """The type and the options of the file system that a path lies in, from /proc/self/mountinfo (proc(5))."""
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
