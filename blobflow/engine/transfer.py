"""`transfer`: any stream of bytes to any other, in bounded memory, with checkpoints and idle timeouts.

A reader thread fills and hashes chunks, a writer thread writes them, and the calling thread keeps the checkpoint: so
reading, hashing and writing overlap, and a call into somebody else's hung stream can be given up.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, cast

from blobflow.checksum import crc32c
from blobflow.config import ChunkProfile
from blobflow.engine.checkpoint import TransferCheckpoint
from blobflow.engine.pool import TICK_S
from blobflow.errors import (
    BlobflowError,
    DigestMismatch,
    SizeMismatch,
    SourceChanged,
    SourceTruncated,
    StoreUnavailable,
    TimedOut,
)

log = logging.getLogger(__name__)


class ReadableStream(Protocol):
    """Binary file objects, HTTP responses, pipes."""

    def read(self, size: int, /) -> bytes | None: ...


class WritableStream(Protocol):
    """Binary file objects, pipes, `socket.makefile`. A `flush` method is called before each checkpoint."""

    def write(self, data: memoryview, /) -> int | None: ...


Source: TypeAlias = ReadableStream | Iterable[bytes]
OnCheckpoint: TypeAlias = Callable[[TransferCheckpoint], None]

_CHUNKS_IN_FLIGHT: Final = 2
"""One is filled while the other is written."""
_SLICE: Final = 256 * 1024
"""Bytes per read or write call, so that a timeout is one of silence and not of slowness."""
_JOIN_S: Final = 1.0


@dataclass(frozen=True)
class TransferResult:
    """What a transfer did."""

    bytes_transferred: int
    """Bytes written by this call; fewer than the total if it resumed."""
    total_size: int
    computed_digest: str
    """`sha256:<hex>` of the whole, resumed bytes included."""
    resumed: bool
    checkpoints_saved: int


def transfer(
    source: Source,
    target: WritableStream,
    profile: ChunkProfile | None = None,
    checkpoint: TransferCheckpoint | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> TransferResult:
    """Copy `source` to `target` chunk by chunk, hashing on the way; continue where `checkpoint` ends.

    Holds two chunks of `profile.chunk_size` bytes. Reads until the source ends. On resume the source is read from
    its beginning and hashed, the bytes before the checkpoint are not written again: the caller brings the target to
    `checkpoint.offset`.

    Args:
        source: From its first byte: a binary stream or an iterable of bytes. Short reads are fine.
        target: Gets every byte once, in order. A regular file is fsynced before each checkpoint.
        checkpoint: Advanced in place, only over bytes that the target took; a new one by default.
        on_checkpoint: Called in the calling thread after every `profile.checkpoint_interval` chunks and when the
            transfer fails or is interrupted. If it raises, the transfer stops with its exception.

    Raises:
        TimedOut: the source or target moved no byte for the profile's timeout; names the offset.
        StoreUnavailable: the source or target failed; its exception is the cause.
        SourceTruncated, SizeMismatch: the source is shorter or longer than `checkpoint.total_size`.
        SourceChanged: the bytes before the checkpoint are not the ones that were sent.
        DigestMismatch: the whole has another digest than `checkpoint.digest`.
    """
    profile = profile or ChunkProfile()
    checkpoint = checkpoint or TransferCheckpoint.new("transfer")
    return _Transfer(source, target, profile, checkpoint, on_checkpoint).run()


class _Chunk(NamedTuple):
    buffer: bytearray
    length: int
    crc32c: int
    """Of the source from its first byte to the end of this chunk."""


class _Clock:
    """When a thread last moved a byte, and whether it is inside a call that should."""

    def __init__(self, what: str, timeout_s: float) -> None:
        self.what = what
        self.timeout_s = timeout_s
        self.offset = 0
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def is_silent(self) -> bool:
        """Whether the call under way has been silent for too long."""
        since = self._since
        return since is not None and time.monotonic() - since > self.timeout_s

    def check(self) -> None:
        """Raise if it is."""
        if self.is_silent():
            raise TimedOut(
                f"{self.what} timed out after {self.timeout_s:g} s at offset {self.offset}",
                operation=self.what,
                offset=self.offset,
                timeout_s=self.timeout_s,
            )


class _Transfer:
    def __init__(
        self,
        source: Source,
        target: WritableStream,
        profile: ChunkProfile,
        checkpoint: TransferCheckpoint,
        on_checkpoint: OnCheckpoint | None,
    ) -> None:
        self._read_into = _reader(source)
        self._target = target
        self._write = _writer(target)
        self._profile = profile
        self._checkpoint = checkpoint
        self._on_checkpoint = on_checkpoint
        self._saved = 0
        self._digest = hashlib.sha256()
        self._reading = _Clock("read", profile.read_timeout)
        self._writing = _Clock("write", profile.write_timeout)
        self._empty: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[_Chunk | BaseException | None] = queue.SimpleQueue()
        """For the calling thread: a chunk that was written, an error of either thread, or None at the end."""

    def run(self) -> TransferResult:
        checkpoint = self._checkpoint
        first_offset = checkpoint.offset
        self._writing.offset = first_offset
        for _ in range(_CHUNKS_IN_FLIGHT):
            self._empty.put(bytearray(self._profile.chunk_size))
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"blobflow-{name}", daemon=True)
            for name, work in (("reader", self._read_all), ("writer", self._write_all))
        ]
        patience_s = _JOIN_S
        for thread in threads:
            thread.start()
        try:
            self._keep_books()
        except TimedOut:
            patience_s = 0.0  # the thread hangs in a foreign call; it is a daemon and stays behind
            raise
        finally:
            self._empty.put(None)
            self._full.put(None)
            for thread in threads:
                thread.join(patience_s)
        checkpoint.total_size = checkpoint.offset
        return TransferResult(
            bytes_transferred=checkpoint.offset - first_offset,
            total_size=checkpoint.offset,
            computed_digest=self._checked_digest(),
            resumed=first_offset > 0,
            checkpoints_saved=self._saved,
        )

    # The calling thread

    def _keep_books(self) -> None:
        checkpoint = self._checkpoint
        unsaved = False
        try:
            while (chunk := self._next_event()) is not None:
                checkpoint.offset += chunk.length
                checkpoint.chunks_completed += 1
                checkpoint.prefix_crc32c = chunk.crc32c
                unsaved = True
                if checkpoint.chunks_completed % self._profile.checkpoint_interval == 0:
                    unsaved = False
                    self._save()
        except BaseException:
            # A target that hangs in a write would hang in a flush too, and without it nothing new is durable.
            if unsaved and not self._writing.is_silent():
                self._save_last()
            raise
        self._flush()

    def _next_event(self) -> _Chunk | None:
        while True:
            try:
                event = self._events.get(timeout=min(TICK_S, self._reading.timeout_s / 5, self._writing.timeout_s / 5))
            except queue.Empty:
                self._reading.check()
                self._writing.check()
                continue
            if isinstance(event, BaseException):
                raise event
            return event

    def _save(self) -> None:
        if self._on_checkpoint:
            self._flush()
            self._on_checkpoint(self._checkpoint)
            self._saved += 1

    def _save_last(self) -> None:
        """Save what can be saved while an error is on its way; it must not be hidden by another one."""
        try:
            self._save()
        except Exception as error:  # noqa: BLE001  # the first error is the one to report
            log.warning("transfer.last_checkpoint_failed session=%s error=%r", self._checkpoint.session_id, error)

    def _flush(self) -> None:
        """Make what was written durable, as far as the target knows how."""
        flush = getattr(self._target, "flush", None)
        if flush:
            flush()
        fileno: Callable[[], int] | None = getattr(self._target, "fileno", None)
        try:
            descriptor = fileno() if fileno else -1
        except OSError:
            return  # like BytesIO: the method without a descriptor
        if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fsync(descriptor)

    def _checked_digest(self) -> str:
        computed = "sha256:" + self._digest.hexdigest()
        expected = self._checkpoint.digest
        if self._profile.verify_digest and expected and computed != expected:
            raise DigestMismatch(
                f"digest mismatch: expected {expected}, computed {computed}",
                what=self._checkpoint.session_id,
                expected=expected,
                actual=computed,
            )
        return computed

    # The reader thread and the writer thread

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # carried to the calling thread and raised there
            self._events.put(error)

    def _read_all(self) -> None:
        """Hash the bytes before the checkpoint, then hand over chunk after chunk."""
        size = self._checkpoint.total_size
        position, crc = self._skip()
        ended = False
        while not ended and (buffer := self._empty.get()) is not None:
            length = self._fill(memoryview(buffer), position)
            position += length
            ended = length < len(buffer)
            if size is not None and position > size:
                raise SizeMismatch(
                    f"the source has more than the expected {size} bytes", what="source", expected=size, actual=position
                )
            data = memoryview(buffer)[:length]
            self._digest.update(data)
            crc = crc32c(data, crc)
            if length:
                self._full.put(_Chunk(buffer, length, crc))
        if ended and size is not None and position < size:
            raise SourceTruncated(
                f"the source ended at {position} of {size} bytes",
                at=position,
                want=size,
                expected=size,
                actual=position,
            )
        self._full.put(None)

    def _skip(self) -> tuple[int, int]:
        """Read and hash the bytes that an earlier call sent; returns the position and their CRC32C."""
        want = self._checkpoint.offset
        position = crc = 0
        buffer = memoryview(bytearray(min(want, self._profile.chunk_size)))
        while position < want:
            view = buffer[: want - position]
            length = self._fill(view, position)
            self._digest.update(view[:length])
            crc = crc32c(view[:length], crc)
            position += length
            if length < len(view):
                raise SourceTruncated(
                    f"the source ended at {position} while skipping to offset {want}",
                    at=position,
                    want=want,
                    expected=want,
                    actual=position,
                )
        if self._checkpoint.prefix_crc32c and crc != self._checkpoint.prefix_crc32c:
            raise SourceChanged(
                f"the first {want} bytes of the source are not the ones that were sent before", what="prefix", at=want
            )
        return position, crc

    def _fill(self, view: memoryview, position: int) -> int:
        """Read until `view` is full or the source ends; returns the bytes read. One read is not a chunk."""
        length = 0
        while length < len(view):
            self._reading.offset = position + length
            try:
                with self._reading:
                    count = self._read_into(view[length : length + _SLICE])
            except Exception as error:
                raise _failed("read", position + length, error) from error
            if not count:
                break
            length += count
        return length

    def _write_all(self) -> None:
        while (chunk := self._full.get()) is not None:
            view = memoryview(chunk.buffer)[: chunk.length]
            while view:
                try:
                    with self._writing:
                        count = self._write(view[:_SLICE])
                except Exception as error:
                    raise _failed("write", self._writing.offset, error) from error
                view = view[count:]
                self._writing.offset += count
            self._events.put(chunk)
            self._empty.put(chunk.buffer)
        self._events.put(None)


def _failed(what: str, offset: int, error: Exception) -> BlobflowError:
    if isinstance(error, BlobflowError):
        return error
    return StoreUnavailable(f"{what} failed at offset {offset}: {error}", operation=what, offset=offset)


def _reader(source: Source) -> Callable[[memoryview], int]:
    """`read_into(view)` over a stream or the pieces of an iterable: bytes read, 0 at the end."""
    read_into: Any = getattr(source, "readinto", None)
    if read_into is not None:
        return lambda view: _ready(read_into(view), "source")
    read: Any = getattr(source, "read", None)
    pieces = iter(cast("Iterable[bytes]", () if read else source))
    rest = memoryview(b"")

    def read_pieces(view: memoryview) -> int:
        nonlocal rest
        while not rest:
            piece = _ready(read(len(view)), "source") if read else next(pieces, None)
            if not piece and (read or piece is None):
                return 0
            rest = memoryview(piece)
        length = min(len(view), len(rest))
        view[:length] = rest[:length]
        rest = rest[length:]
        return length

    return read_pieces


def _writer(target: WritableStream) -> Callable[[memoryview], int]:
    """`write(view)` to a stream: bytes taken, at least one."""

    def write(view: memoryview) -> int:
        count = target.write(view)
        if count is None and not isinstance(target, io.RawIOBase):
            return len(view)  # an object that only looks like a file, and says nothing
        return _ready(count or None, "target")

    return write


def _ready(answer: Any, what: str) -> Any:
    """`answer`, unless it is None: a non-blocking stream says so that nothing moved, which is not the end."""
    if answer is None:
        raise BlockingIOError(errno.EAGAIN, f"the {what} is not ready, and does not wait until it is")
    return answer
