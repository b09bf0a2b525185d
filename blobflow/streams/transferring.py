"""`transfer`: any stream of bytes to any other, in bounded memory, with checkpoints and idle timeouts.

A reader thread fills and hashes chunks, a writer thread writes them, and the calling thread keeps the checkpoint. So
reading, hashing and writing overlap, and a call that hangs in a foreign stream can be given up.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import math
import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, cast

from blobflow.checksum import crc32c
from blobflow.config import ChunkProfile
from blobflow.engine.pool import TICK_S
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    DigestMismatch,
    IntegrityError,
    SizeMismatch,
    SourceChanged,
    SourceTruncated,
    StoreUnavailable,
    TimedOut,
)
from blobflow.streams.checkpoint import TransferCheckpoint
from blobflow.streams.ends import BEGIN_AGAIN, Pin, PinnedSource, SessionTarget

log = logging.getLogger(__name__)


class ReadableStream(Protocol):
    """Binary file objects, HTTP responses, pipes."""

    def read(self, size: int, /) -> bytes | None: ...


class WritableStream(Protocol):
    """Binary file objects, pipes, `socket.makefile`. A `flush` method is called before each checkpoint."""

    def write(self, data: memoryview, /) -> int | None: ...


Source: TypeAlias = ReadableStream | Iterable[bytes] | PinnedSource
Target: TypeAlias = WritableStream | SessionTarget
OnCheckpoint: TypeAlias = Callable[[TransferCheckpoint], None]

_CHUNKS_IN_FLIGHT: Final = 2
"""One chunk is filled while the other is written."""
_SLICE: Final = 256 * 1024
"""Bytes per read or write call; small, so that a timeout measures silence and not a slow link."""
_JOIN_S: Final = 1.0


@dataclass(frozen=True)
class TransferResult:
    """The result of a transfer."""

    bytes_transferred: int
    """Bytes written by this call; fewer than the total if it resumed."""
    total_size: int
    computed_digest: str
    """`sha256:<hex>` of the whole, with the resumed bytes; empty if those were not read again (see `transfer`)."""
    resumed: bool
    checkpoints_saved: int
    crc32c: int = 0
    """CRC32C of the whole, with the resumed bytes."""


def transfer(
    source: Source,
    target: Target,
    profile: ChunkProfile | None = None,
    checkpoint: TransferCheckpoint | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> TransferResult:
    """Copy `source` to `target` chunk by chunk, hashing on the way; continue where `checkpoint` ends.

    Holds two chunks of `profile.chunk_size` bytes. Reads until the source ends.

    On resume the bytes before the checkpoint are not written again. The digest covers the whole, so they are
    hashed once more, from the end that has them:

    | target | source | the bytes before the checkpoint |
    |---|---|---|
    | `FileTarget` | pinned | are read back from the file; the source is opened after them |
    | any other | pinned, and `profile.verify_digest` is off | are not read; `computed_digest` is empty |
    | any other | any other | are read from the source |

    If they are read, their CRC32C is compared with the checkpoint's; if not, the version of the pinned source
    guarantees them. The CRC32C of the whole is known in any case.

    Args:
        source: From its first byte: a binary stream or an iterable of bytes, where short reads are fine; or a pinned
            source (`ObjectSource`, `HttpSource`), which is opened at the right offset.
        target: Gets every byte once, in order. If a stream has some bytes already, the caller seeks it to
            `checkpoint.offset`; a regular file is fsynced before each checkpoint. A `FileTarget` or `ObjectTarget`
            finds its position, resets the checkpoint if its earlier bytes are gone, and shows nothing before the end.
        checkpoint: Advanced in place, only over bytes that the target took; a new one by default.
        on_checkpoint: Called in the calling thread after every `profile.checkpoint_interval` chunks, when the
            transfer fails or is interrupted, and as soon as a `FileTarget` or `ObjectTarget` has begun. If it raises,
            the transfer stops with its exception.

    Raises:
        TimedOut: the source or target moved no byte for the profile's timeout; the message has the offset.
        StoreUnavailable: the source or target failed; its exception is the cause.
        SourceTruncated, SizeMismatch: the source is shorter or longer than `checkpoint.total_size`.
        SourceChanged: the bytes before the checkpoint differ from those that were sent, or a pinned source was
        replaced.
        DigestMismatch: the whole has another digest than `checkpoint.digest`.
    """
    profile = profile or ChunkProfile()
    resumable = checkpoint is not None or on_checkpoint is not None
    checkpoint = checkpoint or TransferCheckpoint.new("transfer")
    return _Transfer(source, target, profile, checkpoint, on_checkpoint, resumable=resumable).run()


class _Chunk(NamedTuple):
    buffer: bytearray
    length: int
    crc32c: int
    """CRC32C of the source from its first byte to the end of this chunk."""


class _Clock:
    """When a thread last moved a byte, and whether it is inside a call that should move one."""

    def __init__(self, what: str, timeout_s: float | None) -> None:
        # Without a timeout here, the end has its own: it retries failures, and knows best when to give up.
        self.what = what
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self.slice_bytes = sys.maxsize if timeout_s is None else _SLICE
        self.offset = 0
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def is_silent(self) -> bool:
        """Whether the present call has been silent for too long."""
        since = self._since
        return since is not None and time.monotonic() - since > self.timeout_s

    def check(self) -> None:
        """Raise TimedOut if it has been silent for too long."""
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
        target: Target,
        profile: ChunkProfile,
        checkpoint: TransferCheckpoint,
        on_checkpoint: OnCheckpoint | None,
        *,
        resumable: bool,
    ) -> None:
        self._pinned = source if isinstance(source, PinnedSource) else None
        self._pin = Pin(None, None)
        self._read_into = _reader(cast("Any", source)) if self._pinned is None else _nothing
        self._target = target
        self._session = target if isinstance(target, SessionTarget) else None
        self._resumable = resumable
        self._write = _writer(target) if not isinstance(target, SessionTarget) else self._write_session
        self._profile = profile
        self._checkpoint = checkpoint
        self._on_checkpoint = on_checkpoint
        self._saved = 0
        self._threads: list[threading.Thread] = []
        self._digest: Any = hashlib.sha256()
        """None if the first bytes are not read."""
        takes_chunks = self._session is not None and self._session.takes_chunks
        self._reading = _Clock("read", None if self._pinned else profile.read_timeout)
        self._writing = _Clock("write", None if takes_chunks else profile.write_timeout)
        self._chunk_size = profile.chunk_size
        self._empty: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[_Chunk | BaseException | None] = queue.SimpleQueue()
        """Events for the calling thread: a chunk that was written, an error of either thread, or None at the end."""

    def run(self) -> TransferResult:
        self._look_at_source()
        if self._session is None:
            return self._result(*self._move())
        self._chunk_size = self._session.begin(self._checkpoint, self._chunk_size)
        try:
            self._save()
            moved, digest = self._move()
            self._save()
            self._session.finish(self._checkpoint)
        except BaseException as error:
            self._leave(self._session, keep=self._resumable and not isinstance(error, IntegrityError))
            raise
        return self._result(moved, digest)

    def _result(self, moved: int, digest: str) -> TransferResult:
        checkpoint = self._checkpoint
        return TransferResult(
            bytes_transferred=moved,
            total_size=checkpoint.offset,
            computed_digest=digest,
            resumed=moved < checkpoint.offset,
            checkpoints_saved=self._saved,
            crc32c=checkpoint.prefix_crc32c,
        )

    def _move(self) -> tuple[int, str]:
        """Move everything; returns the bytes moved, and the digest of the whole, which is the expected one."""
        checkpoint = self._checkpoint
        first_offset = checkpoint.offset
        if not first_offset:
            checkpoint.source_version = self._pin.version
        self._writing.offset = first_offset
        for _ in range(_CHUNKS_IN_FLIGHT):
            self._empty.put(bytearray(self._chunk_size))
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"blobflow-{name}", daemon=True)
            for name, work in (("reader", self._read_all), ("writer", self._write_all))
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._keep_books()
        finally:
            self._empty.put(None)
            self._full.put(None)
            for thread, clock in zip(self._threads, (self._reading, self._writing), strict=True):
                # A thread that hangs in a foreign call is a daemon; it is left running.
                thread.join(0.0 if clock.is_silent() else _JOIN_S)
        checkpoint.total_size = checkpoint.offset
        return checkpoint.offset - first_offset, self._checked_digest()

    def _look_at_source(self) -> None:
        """Pin the source, and compare it with the checkpoint."""
        if self._pinned is None:
            return
        self._pin = pin = self._pinned.pin()
        checkpoint = self._checkpoint
        if checkpoint.source_version not in (None, pin.version):
            raise SourceChanged(
                f"{self._pinned!r} was replaced since the checkpoint",
                hint=BEGIN_AGAIN,
                what="version",
                expected=checkpoint.source_version,
                actual=pin.version,
            )
        if pin.size is not None and checkpoint.total_size not in (None, pin.size):
            raise SizeMismatch(
                f"the source has {pin.size} bytes, {checkpoint.total_size} are expected",
                what="source",
                expected=checkpoint.total_size,
                actual=pin.size,
            )
        if pin.size is not None:
            checkpoint.total_size = pin.size

    def _leave(self, session: SessionTarget, *, keep: bool) -> None:
        """Leave the target's session while another error propagates; an error from here must not hide that one."""
        if self._threads and self._threads[1].is_alive():
            # The session must not be removed while the writer still writes to it.
            log.warning("transfer.session_left session=%s keep=%s writer=busy", self._checkpoint.session_id, keep)
            return
        try:
            session.leave(keep=keep)
        except Exception as error:  # noqa: BLE001  # the first error is the one to report
            log.warning("transfer.session_left session=%s error=%r", self._checkpoint.session_id, error)

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
            # A target that hangs in a write would hang in a flush too; without a flush nothing new is durable.
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
        """Save what can be saved while another error propagates; an error from here must not hide that one."""
        try:
            self._save()
        except Exception as error:  # noqa: BLE001  # the first error is the one to report
            log.warning("transfer.last_checkpoint_failed session=%s error=%r", self._checkpoint.session_id, error)

    def _flush(self) -> None:
        """Make the written bytes durable, if the target can.

        It runs in a separate thread: the writer may hang in a write meanwhile and keep the stream locked, and the flush
        itself can hang.
        """
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        flushing = _Clock("flush", self._writing.timeout_s)
        flushing.offset = self._checkpoint.offset

        def work() -> None:
            try:
                self._flush_target(flushing)
                ended.put(None)
            except BaseException as error:  # noqa: BLE001  # carried to the calling thread and raised there
                ended.put(error)

        threading.Thread(target=work, name="blobflow-flush", daemon=True).start()
        while True:
            try:
                error = ended.get(timeout=min(TICK_S, flushing.timeout_s / 5))
            except queue.Empty:
                self._writing.check()
                flushing.check()
                continue
            if error is not None:
                raise error
            return

    def _flush_target(self, clock: _Clock) -> None:
        if self._session is not None:
            self._session.flush()
            return
        flush = getattr(self._target, "flush", None)
        if flush:
            with clock:
                flush()
        fileno: Callable[[], int] | None = getattr(self._target, "fileno", None)
        try:
            descriptor = fileno() if fileno else -1
        except OSError:
            return  # e.g. BytesIO: it has the method, but no descriptor
        if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fsync(descriptor)

    def _checked_digest(self) -> str:
        if self._digest is None:
            return ""
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
        if self._pinned is None:
            self._hand_over(*self._skip())
            return
        reached = self._skip_without_source()
        with closing(self._pinned.open(reached[0] if reached else 0)) as opened:
            self._read_into = opened.readinto
            self._hand_over(*(reached or self._skip()))

    def _skip_without_source(self) -> tuple[int, int] | None:
        """Skip the bytes that an earlier call sent, without the source (see `_skip`); None if the source is needed."""
        checkpoint = self._checkpoint
        if not checkpoint.offset or checkpoint.source_version is None:
            return None  # without a version, only the bytes themselves can prove that they are the same
        prefix = self._session.prefix() if self._session is not None else None
        if prefix is not None:
            self._read_into = prefix.readinto
            try:
                return self._skip()
            except (SourceChanged, SourceTruncated) as error:
                raise ChecksumMismatch(
                    f"the bytes in {self._target!r} are not those that were written",
                    hint="begin again; nothing of it is kept",
                    what=repr(self._target),
                    expected=checkpoint.prefix_crc32c,
                ) from error
        if self._profile.verify_digest:
            return None
        self._digest = None
        return checkpoint.offset, checkpoint.prefix_crc32c

    def _hand_over(self, position: int, crc: int) -> None:
        size = self._checkpoint.total_size
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
            if self._digest is not None:
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
                    count = self._read_into(view[length : length + self._reading.slice_bytes])
            except Exception as error:
                raise _failed("read", position + length, error) from error
            if not count:
                break
            length += count
        return length

    def _write_session(self, view: memoryview) -> int:
        assert self._session is not None
        return self._session.write(self._writing.offset, view)

    def _write_all(self) -> None:
        while (chunk := self._full.get()) is not None:
            view = memoryview(chunk.buffer)[: chunk.length]
            while view:
                try:
                    with self._writing:
                        count = self._write(view[: self._writing.slice_bytes])
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


def _nothing(view: memoryview) -> int:
    """The reader before a pinned source is opened."""
    del view
    return 0


def _writer(target: WritableStream) -> Callable[[memoryview], int]:
    """`write(view)` to a stream: bytes written, at least one."""

    def write(view: memoryview) -> int:
        count = target.write(view)
        if count is None and not isinstance(target, io.RawIOBase):
            return len(view)  # a file-like object that returns nothing
        return _ready(count or None, "target")

    return write


def _ready(answer: Any, what: str) -> Any:
    """`answer`, unless it is None: a non-blocking stream returns None if nothing moved, which is not the end."""
    if answer is None:
        raise BlockingIOError(errno.EAGAIN, f"the {what} is not ready, and does not block until it is")
    return answer
