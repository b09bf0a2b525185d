"""Files of the operating system: what several floors do with descriptors, in one place."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from blobflow.errors import DiskTooSmall

_COPY_BYTES: Final = 1024 * 1024


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
        view = memoryview(block)
        while view:
            written = os.pwrite(target, view, offset + copied)
            copied += written
            view = view[written:]
    return copied


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
