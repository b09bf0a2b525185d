"""Reads files once: SHA-256 and CRC32C of many files by a few threads, in constant memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, NamedTuple

from blobflow.artifact.small_file_lock import SmallFileLock
from blobflow.checksum import crc32c

READ_SIZE: Final = 1 << 20
"""Bytes per read: large enough for hashlib to release the interpreter lock for long, small enough for the cache."""
_BATCH_FILES: Final = 256
_BATCH_BYTES: Final = 64 << 20
_READ_AHEAD_FROM: Final = 64 << 20
"""Bytes of a file from which a second thread is worth its start."""
_TICK_S: Final = 0.5


class FileHash(NamedTuple):
    """The result of one pass over a file."""

    size: int
    sha256: bytes
    crc32c: int


def hash_descriptor(descriptor: int, buffer: memoryview) -> FileHash:
    """Both checksums of an open file from its current position to its end, through `buffer`.

    SHA-256 cannot be computed in parallel. So for a large file, a second thread reads ahead and computes the CRC32C
    meanwhile.
    """
    digest = hashlib.sha256()
    if os.fstat(descriptor).st_size < _READ_AHEAD_FROM:
        crc = size = 0
        while count := os.readv(descriptor, [buffer]):
            chunk = buffer[:count]
            digest.update(chunk)
            crc = crc32c(chunk, crc)
            size += count
        return FileHash(size, digest.digest(), crc)

    def read(into: memoryview, crc: int) -> tuple[memoryview, int]:
        chunk = into[: os.readv(descriptor, [into])]
        return chunk, crc32c(chunk, crc)

    size = 0
    spare = memoryview(bytearray(len(buffer)))
    with ThreadPoolExecutor(1, thread_name_prefix="blobflow-read") as reader:
        reading = reader.submit(read, buffer, 0)
        while True:
            chunk, crc = reading.result()
            if not chunk:
                return FileHash(size, digest.digest(), crc)
            buffer, spare = spare, buffer
            reading = reader.submit(read, buffer, crc)
            digest.update(chunk)
            size += len(chunk)


def hash_files(
    count: int,
    sizes: Callable[[int], int],
    hash_one: Callable[[int, memoryview], FileHash],
    *,
    on_batch: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> Iterator[FileHash]:
    """The hashes of files 0 .. count-1 in that order, computed by a few threads ahead of the consumer.

    Args:
        sizes: Expected size of file i in bytes; only used to balance the batches.
        hash_one: Opens file i and hashes it through the given buffer; its exceptions are raised here.
        on_batch: Called in the calling thread with files and bytes done so far, after each batch. During a long batch
            it is called about twice a second, so that the caller can keep a lease alive.
        workers: Threads; by default one for each processor, at most four.
    """
    workers = workers or min(4, os.cpu_count() or 1)

    crowd = SmallFileLock()

    def run(batch: range) -> list[FileHash]:
        buffer = memoryview(bytearray(READ_SIZE))
        with crowd.around(len(batch)):
            return [hash_one(i, buffer) for i in batch]

    batches = _batches(count, sizes)
    files_done = bytes_done = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="blobflow-hash") as pool:
        window: list[Future[list[FileHash]]] = []
        try:
            while True:
                while len(window) < 2 * workers and (batch := next(batches, None)) is not None:
                    window.append(pool.submit(run, batch))
                if not window:
                    return
                while on_batch and wait(window[:1], _TICK_S).not_done:
                    on_batch(files_done, bytes_done)
                hashes = window.pop(0).result()
                yield from hashes
                files_done += len(hashes)
                bytes_done += sum(one.size for one in hashes)
                if on_batch:
                    on_batch(files_done, bytes_done)
        finally:
            for future in window:
                future.cancel()


def _batches(count: int, sizes: Callable[[int], int]) -> Iterator[range]:
    start = total = 0
    for i in range(count):
        total += sizes(i)
        if i + 1 - start == _BATCH_FILES or total >= _BATCH_BYTES:
            yield range(start, i + 1)
            start, total = i + 1, 0
    if start < count:
        yield range(start, count)
