"""Files of the operating system: what several floors do with descriptors, in one place."""

from __future__ import annotations

import errno
import os
from typing import Final

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
