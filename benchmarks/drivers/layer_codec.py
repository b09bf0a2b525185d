"""The loop of a layer's upload without anything around it: layer_codec.py FILE THREADS."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from blobflow.checksum import crc32c
from blobflow.layers.format import MIN_FRAME_BYTES, Codec


def main() -> None:
    """Read, checksum and compress every frame of a file; nothing is kept."""
    path, threads = sys.argv[1], int(sys.argv[2])
    codec = Codec()
    descriptor = os.open(path, os.O_RDONLY)

    def compress(offset: int) -> int:
        buffer = memoryview(bytearray(MIN_FRAME_BYTES))
        view = buffer[: os.preadv(descriptor, [buffer], offset)]
        crc32c(view)
        return len(codec.compress(view))

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(compress, range(0, os.fstat(descriptor).st_size, MIN_FRAME_BYTES)))
    print(total)


if __name__ == "__main__":
    main()
