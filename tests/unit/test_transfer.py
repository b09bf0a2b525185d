"""`transfer`: any stream to any other, in chunks, with checkpoints and timeouts."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blobflow import ChunkProfile
from blobflow.checksum import crc32c
from blobflow.errors import (
    DigestMismatch,
    SizeMismatch,
    SourceChanged,
    SourceTruncated,
    StoreUnavailable,
    TimedOut,
)
from blobflow.streams import TransferCheckpoint, TransferResult, transfer
from tests.kit import noise

DATA = noise(1024)
PROFILE = ChunkProfile.custom(100, 2)


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chunks_of(data: bytes, size: int = 100) -> Iterator[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


class Recorder:
    """A target that remembers its writes, and breaks before a given number of bytes."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.data = bytearray()
        self.flushed_at: list[int] = []
        self._breaks_at = breaks_at

    def write(self, data: memoryview) -> int:
        if self._breaks_at is not None and len(self.data) + len(data) > self._breaks_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.data += data
        return len(data)

    def flush(self) -> None:
        self.flushed_at.append(len(self.data))


class Hangs:
    """A stream whose reads and writes never return after the first `after` bytes."""

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.released = threading.Event()

    def read(self, size: int) -> bytes:
        if self.after <= 0:
            self.released.wait(30)
            return b""
        size = min(size, self.after)
        self.after -= size
        return bytes(size)

    def write(self, data: memoryview) -> int:
        if self.after <= 0:
            self.released.wait(30)
        self.after -= len(data)
        return len(data)


_MEMORY = """
import resource, sys
from blobflow import ChunkProfile
from blobflow.streams import transfer

MIB = 2**20

class Source:
    def __init__(self, size):
        self.left = size
    def readinto(self, view):
        count = min(len(view), self.left)
        self.left -= count
        return count

class Target:
    def write(self, data):
        return len(data)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

transfer(Source(1000), Target(), ChunkProfile.custom(1000, 1))
before = peak()
result = transfer(Source(int(sys.argv[1])), Target(), ChunkProfile.custom(8 * MIB, 64))
print(result.total_size, peak() - before)
"""


@pytest.mark.seed("0.1")
@pytest.mark.parametrize("size", [2**28, pytest.param(2**30, marks=pytest.mark.slow)])
def test_memory_is_a_few_chunks_whatever_the_size(size: int):
    """Peak memory grows by less than the chunks in flight plus two, however long the stream is."""
    output = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(size)], check=True, capture_output=True, text=True, timeout=100
    ).stdout
    total, growth = map(int, output.split())
    assert total == size
    assert growth < (2 + 2) * 8 * 2**20


@pytest.mark.seed("0.10")
def test_the_result_says_what_happened():
    """Bytes of this call, bytes in total, digest, resumed or not, checkpoints saved."""
    target = io.BytesIO()
    result = transfer(io.BytesIO(DATA), target, PROFILE, on_checkpoint=lambda _: None)
    assert result == TransferResult(
        bytes_transferred=1024,
        total_size=1024,
        computed_digest=digest_of(DATA),
        resumed=False,
        checkpoints_saved=5,
        crc32c=crc32c(DATA),
    )
    assert target.getvalue() == DATA


@pytest.mark.seed("0.11")
def test_a_resumed_transfer_writes_only_the_rest():
    """The bytes before the checkpoint are hashed, not written; the digest is that of the whole."""
    data, target = noise(200), io.BytesIO()
    checkpoint = TransferCheckpoint(session_id="s", offset=50, chunks_completed=1)
    result = transfer(io.BytesIO(data), target, ChunkProfile.custom(30, 1), checkpoint)
    assert target.getvalue() == data[50:]
    assert (result.bytes_transferred, result.total_size, result.resumed) == (150, 200, True)
    assert result.computed_digest == digest_of(data)
    assert checkpoint.is_complete


@pytest.mark.seed("0.11")
def test_a_transfer_killed_anywhere_continues_from_its_checkpoint():
    """From every checkpoint of a transfer the rest can be written, and the whole is right."""
    saved: list[str] = []
    transfer(io.BytesIO(DATA), io.BytesIO(), PROFILE, on_checkpoint=lambda c: saved.append(c.to_json()))
    for text in saved:
        checkpoint = TransferCheckpoint.from_json(text)
        target = io.BytesIO(DATA[: checkpoint.offset])
        target.seek(0, io.SEEK_END)
        result = transfer(io.BytesIO(DATA), target, PROFILE, checkpoint)
        assert target.getvalue() == DATA
        assert result.computed_digest == digest_of(DATA)
        assert checkpoint.chunks_completed == 11


@pytest.mark.seed("W0.10")
def test_another_source_is_refused_on_resume():
    """If the first bytes are not those that were sent, nothing is written behind them."""
    saved: list[TransferCheckpoint] = []
    transfer(io.BytesIO(DATA), io.BytesIO(), PROFILE, on_checkpoint=lambda c: saved.append(c.model_copy()))
    target = io.BytesIO()
    with pytest.raises(SourceChanged) as refusal:
        transfer(io.BytesIO(b"x" + DATA[1:]), target, PROFILE, saved[0])
    assert refusal.value.at == 200
    assert target.getvalue() == b""


@pytest.mark.seed("0.12", "W0.7")
def test_a_source_that_ends_while_skipping_is_named_with_both_positions():
    """30 bytes cannot be continued at 50."""
    with pytest.raises(SourceTruncated, match="ended at 30 while skipping to offset 50") as refusal:
        transfer(io.BytesIO(noise(30)), io.BytesIO(), PROFILE, TransferCheckpoint(session_id="s", offset=50))
    assert (refusal.value.at, refusal.value.want) == (30, 50)


@pytest.mark.seed("W0.4")
@pytest.mark.parametrize(("size", "kind"), [(999, SourceTruncated), (1001, SizeMismatch)])
def test_a_source_of_another_size_is_refused(size: int, kind: type[SizeMismatch]):
    """A byte less or more than announced is an error even where no digest is known."""
    with pytest.raises(kind) as refusal:
        transfer(io.BytesIO(bytes(size)), io.BytesIO(), PROFILE, TransferCheckpoint.new("s", total_size=1000))
    assert (refusal.value.expected, refusal.value.actual) == (1000, size)


@pytest.mark.seed("0.13")
def test_a_hung_read_fails_within_its_timeout():
    """The error comes after the timeout, by a fifth later at most, and names the offset."""
    source, profile = Hangs(after=250), ChunkProfile.custom(100, 1, read_timeout=0.5)
    started = time.monotonic()
    with pytest.raises(TimedOut, match=r"read timed out after 0\.5 s at offset 250") as refusal:
        transfer(source, io.BytesIO(), profile)
    waited = time.monotonic() - started
    source.released.set()
    assert (refusal.value.offset, refusal.value.timeout_s) == (250, 0.5)
    assert 0.5 <= waited < 0.5 * 1.2 + 0.3  # the rest is for a busy machine


@pytest.mark.seed("0.14")
def test_a_hung_write_fails_within_its_timeout():
    """The same for a target that takes no more."""
    target, profile = Hangs(after=200), ChunkProfile.custom(100, 1, write_timeout=0.5)
    started = time.monotonic()
    with pytest.raises(TimedOut, match=r"write timed out after 0\.5 s at offset 200"):
        transfer(io.BytesIO(DATA), target, profile)
    waited = time.monotonic() - started
    target.released.set()
    assert 0.5 <= waited < 0.5 * 1.2 + 0.3


@pytest.mark.seed("0.14")
def test_a_full_pipe_times_out_although_its_flush_hangs_too():
    """Nobody reads the pipe: giving up does not wait for a flush that would never end."""
    read_end, write_end = os.pipe()
    target = os.fdopen(write_end, "wb")
    saved: list[int] = []
    try:
        with pytest.raises(TimedOut, match="write timed out"):
            transfer(
                io.BytesIO(bytes(2**20)),
                target,
                ChunkProfile.custom(16 * 1024, 3, write_timeout=0.3),
                on_checkpoint=lambda c: saved.append(c.offset),
            )
    finally:
        os.close(read_end)
        with suppress(BrokenPipeError):
            target.close()
    assert saved in ([], [3 * 16 * 1024])  # as the first flush came before or after the write that hangs


@pytest.mark.seed("0.14")
def test_a_hung_flush_fails_within_its_timeout():
    """The same for a target that took everything and then does not let go of it."""
    released = threading.Event()

    class Keeps(io.BytesIO):
        def flush(self) -> None:
            released.wait()

    with pytest.raises(TimedOut, match=r"flush timed out after 0\.3 s at offset 200"):
        transfer(
            io.BytesIO(DATA),
            Keeps(),
            ChunkProfile.custom(100, 2, write_timeout=0.3),
            on_checkpoint=lambda _: pytest.fail("nothing is durable"),
        )
    released.set()


@pytest.mark.seed("0.13", "0.14")
def test_other_errors_of_a_stream_keep_their_kind_as_the_cause():
    """What the source raised is the cause; the message names the offset."""

    def breaks() -> Iterator[bytes]:
        yield DATA[:150]
        raise ConnectionResetError("peer went away")

    with pytest.raises(StoreUnavailable, match="read failed at offset 150: peer went away") as refusal:
        transfer(breaks(), io.BytesIO(), PROFILE)
    assert isinstance(refusal.value.__cause__, ConnectionResetError)
    assert (refusal.value.operation, refusal.value.offset) == ("read", 150)
    assert refusal.value.retryable


@pytest.mark.seed("0.15")
def test_only_written_chunks_count():
    """A target that breaks in the third chunk leaves the checkpoint after the second."""
    checkpoint = TransferCheckpoint.new("s", total_size=1024)
    with pytest.raises(StoreUnavailable, match="write failed at offset 200") as refusal:
        transfer(io.BytesIO(DATA), Recorder(breaks_at=250), PROFILE, checkpoint)
    assert isinstance(refusal.value.__cause__, OSError)
    assert (checkpoint.offset, checkpoint.chunks_completed) == (200, 2)


def test_a_failing_flush_does_not_hide_the_first_error():
    """The target breaks, and flushing it fails as well: what is raised is the write's error, with its offset."""

    class Broken(Recorder):
        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StoreUnavailable, match="write failed at offset 100"):
        transfer(io.BytesIO(DATA), Broken(breaks_at=150), PROFILE, on_checkpoint=lambda _: None)


@pytest.mark.seed("0.16")
def test_a_checkpoint_comes_after_every_interval():
    """1,024 bytes in chunks of 100, every second: five, each after the target was flushed up to it."""
    offsets: list[int] = []
    target = Recorder()

    def save(checkpoint: TransferCheckpoint) -> None:
        offsets.append(checkpoint.offset)
        assert target.flushed_at[-1] >= checkpoint.offset

    result = transfer(io.BytesIO(DATA), target, PROFILE, on_checkpoint=save)
    assert offsets == [200, 400, 600, 800, 1000]
    assert result.checkpoints_saved == 5


@pytest.mark.seed("W0.8")
def test_a_last_checkpoint_is_saved_when_the_transfer_fails():
    """What was written since the last interval is not lost."""
    offsets: list[int] = []
    with pytest.raises(StoreUnavailable):
        transfer(io.BytesIO(DATA), Recorder(breaks_at=350), PROFILE, on_checkpoint=lambda c: offsets.append(c.offset))
    assert offsets == [200, 300]


@pytest.mark.seed("0.17")
def test_a_failing_callback_stops_the_transfer():
    """Its own exception comes out, and the offset is one that is durable."""
    target = Recorder()
    checkpoint = TransferCheckpoint.new("s")

    def refuses(_: TransferCheckpoint) -> None:
        raise PermissionError("journal is read-only")

    with pytest.raises(PermissionError, match="journal is read-only"):
        transfer(itertools.repeat(DATA), target, PROFILE, checkpoint, refuses)  # a source that never ends
    assert checkpoint.offset == 200
    assert target.flushed_at[-1] >= 200


@pytest.mark.seed("0.18")
def test_the_digest_is_computed_even_if_none_was_expected():
    """`sha256:` and lower-case hex; the target is flushed at the end."""
    target = Recorder()
    result = transfer(chunks_of(b"small"), target)
    assert result.computed_digest == "sha256:" + hashlib.sha256(b"small").hexdigest()
    assert target.flushed_at == [5]


@pytest.mark.seed("0.19")
def test_a_wrong_digest_is_refused_with_both_values():
    """The right one passes, a wrong one does not, and whoever switched verification off is not bothered."""
    transfer(io.BytesIO(DATA), io.BytesIO(), PROFILE, TransferCheckpoint.new("s", digest_of(DATA)))
    with pytest.raises(DigestMismatch, match=f"digest mismatch: expected sha256:wrong, computed {digest_of(DATA)}"):
        transfer(io.BytesIO(DATA), io.BytesIO(), PROFILE, TransferCheckpoint.new("s", "sha256:wrong"))
    unverified = PROFILE.model_copy(update={"verify_digest": False})
    transfer(io.BytesIO(DATA), io.BytesIO(), unverified, TransferCheckpoint.new("s", "sha256:wrong"))


@pytest.mark.seed("0.20")
@pytest.mark.parametrize(("size", "chunks"), [(0, 0), (100, 1), (300, 3), (301, 4)])
def test_the_last_chunk_is_never_empty(size: int, chunks: int):
    """Nothing moves as nothing, and n full chunks are n chunks."""
    checkpoint = TransferCheckpoint.new("s", total_size=size)
    target = io.BytesIO()
    result = transfer(io.BytesIO(noise(size)), target, PROFILE, checkpoint)
    assert (result.total_size, checkpoint.chunks_completed) == (size, chunks)
    assert checkpoint.is_complete
    assert target.getvalue() == noise(size)


@pytest.mark.seed("W0.1")
def test_a_chunk_is_full_however_little_a_read_gives():
    """A source that gives a byte at a time makes as many chunks as any other."""
    checkpoint = TransferCheckpoint.new("s")
    transfer((bytes([byte]) for byte in DATA), io.BytesIO(), PROFILE, checkpoint)
    assert checkpoint.chunks_completed == 11


def test_a_target_may_take_less_than_it_was_given():
    """Short writes are continued, as for a socket."""

    class Sips(Recorder):
        def write(self, data: memoryview) -> int:
            return super().write(data[:7])

    target = Sips()
    transfer(io.BytesIO(DATA), target, PROFILE)
    assert target.data == DATA


def test_a_source_that_has_nothing_yet_is_not_at_its_end():
    """A non-blocking descriptor without data is an error: an end of stream would cut the copy short silently."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with os.fdopen(read_end, "rb", buffering=0) as source, os.fdopen(write_end, "wb", buffering=0) as other:
        other.write(b"abc")
        with pytest.raises(StoreUnavailable, match="read failed at offset 3") as refusal:
            transfer(source, io.BytesIO(), PROFILE)
    assert isinstance(refusal.value.__cause__, BlockingIOError)


def test_a_target_that_takes_nothing_is_an_error():
    """A non-blocking descriptor that is full took nothing; it did not take everything."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with (
        os.fdopen(read_end, "rb", buffering=0),
        os.fdopen(write_end, "wb", buffering=0) as target,
        pytest.raises(StoreUnavailable, match="write failed at offset") as refusal,
    ):
        transfer(io.BytesIO(bytes(2**20)), target, ChunkProfile.custom(64 * 1024, 1))
    assert isinstance(refusal.value.__cause__, BlockingIOError)


@pytest.mark.seed("W0.2")
def test_a_file_is_durable_before_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The regular file is fsynced before each callback and at the end."""
    events: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real(fd)))
    with open(tmp_path / "target", "wb") as target:
        transfer(
            io.BytesIO(DATA), target, ChunkProfile.custom(500, 1), on_checkpoint=lambda _: events.append("checkpoint")
        )
    assert events == ["fsync", "checkpoint"] * 3 + ["fsync"]
    assert (tmp_path / "target").read_bytes() == DATA


def test_an_interrupt_saves_what_was_written():
    """Ctrl-C in the calling thread ends the transfer with a last checkpoint."""
    offsets: list[int] = []

    def save(checkpoint: TransferCheckpoint) -> None:
        offsets.append(checkpoint.offset)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(io.BytesIO(DATA), io.BytesIO(), PROFILE, on_checkpoint=save)
    assert offsets == [200]
    assert not [thread for thread in threading.enumerate() if thread.name in ("blobflow-reader", "blobflow-writer")]
