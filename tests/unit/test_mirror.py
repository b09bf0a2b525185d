"""The receiver of snapshots: what it takes, what it refuses, and what survives."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from blobflow.checksum import combine_all, crc32c
from blobflow.errors import (
    ChecksumMismatch,
    DiskFull,
    IntegrityError,
    KeyConflict,
    ObjectTooLarge,
    OffsetRegressionError,
    RefusedError,
    SessionPoisoned,
    SizeMismatch,
    StoreConfigurationError,
    StoreUnavailable,
    TransferBusy,
)
from blobflow.mirror import (
    Bootstrapping,
    Committed,
    Following,
    MirrorReceiver,
    Pending,
    ReceiverStatus,
    SnapshotEnvelope,
    SnapshotId,
    read_snapshots,
)
from tests.kit import noise

MIB = 1024 * 1024
ORDERS = SnapshotId("east", "orders", 42, f"sha256:{0xA:064x}")
USERS = SnapshotId("east", "users", 7, f"sha256:{0xB:064x}")
WHOLE = b"abcdef"

Reports = list[tuple[str, ReceiverStatus]]


def chunk(
    offset: int, data: bytes, *, done: bool = False, whole: bytes = WHOLE, snapshot: SnapshotId = ORDERS, **changes: Any
) -> SnapshotEnvelope:
    """A chunk of `whole` as a source that makes no mistake sends it; `changes` are the mistakes."""
    fields = {"total_bytes": len(whole), "total_crc32c": crc32c(whole), "crc32c": crc32c(data), **changes}
    return SnapshotEnvelope(snapshot, offset=offset, data=data, done=done, **fields)


def files(data_dir: Path) -> list[str]:
    """The kinds of the files that there are."""
    return sorted(path.suffix for path in data_dir.rglob("*.*") if path.suffix)


def content(data_dir: Path, kind: str, snapshot: SnapshotId = ORDERS) -> bytes:
    """What is in a snapshot's file of this kind, of which there must be one."""
    (found,) = (data_dir / "recv_snapshots" / snapshot.database).glob(f"{snapshot.position:020d}-*{kind}")
    return found.read_bytes()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there" / "yet"


@pytest.fixture
def reports() -> Reports:
    return []


@pytest.fixture
def receiver(data_dir: Path, reports: Reports) -> Iterator[MirrorReceiver]:
    """A receiver that writes down its reports, and takes a checkpoint after every fourth byte."""
    made = MirrorReceiver(
        data_dir, on_progress=lambda snapshot, status: reports.append((snapshot.database, status)), checkpoint_bytes=4
    )
    with made:
        yield made


def fails(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, *, times: int = 1) -> None:
    """The next calls of a function of `os` fail."""
    left = times
    real: Callable[..., Any] = getattr(os, name)

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, function)


# Chunks in order


def test_offset_regression_is_refused(receiver: MirrorReceiver):
    """A chunk that starts before the bytes already held is refused and changes nothing."""
    receiver.handle(chunk(offset=0, data=b"abcd"))
    with pytest.raises(OffsetRegressionError) as refusal:
        receiver.handle(chunk(offset=2, data=b"cd"))
    assert (refusal.value.expected, refusal.value.actual) == (4, 2)
    assert repr(receiver) == "<MirrorReceiver bootstrapping orders, 4 of 6 bytes>"


@pytest.mark.seed("2.1")
def test_what_arrives_lies_in_a_partial_file_of_its_own(receiver: MirrorReceiver, data_dir: Path):
    """The directory is made; the bytes lie under the database's name, in a file that says it is partial."""
    assert repr(receiver) == "<MirrorReceiver idle>"
    assert receiver.handle(chunk(0, b"abc")) == Pending(3)
    assert files(data_dir) == [".journal", ".partial"]
    assert content(data_dir, ".partial") == b"abc"


@pytest.mark.seed("2.2")
def test_offset_0_begins_again(receiver: MirrorReceiver, data_dir: Path):
    """Another first chunk empties the partial file, and what it declares counts from now on."""
    receiver.handle(chunk(0, b"abcd"))
    assert receiver.handle(chunk(0, b"xy", whole=b"xyz")) == Pending(2)
    assert content(data_dir, ".partial") == b"xy"
    assert isinstance(receiver.handle(chunk(2, b"z", whole=b"xyz", done=True)), Committed)
    assert content(data_dir, ".snapshot") == b"xyz"


def test_an_empty_chunk_at_0_begins_again_whatever_is_there(receiver: MirrorReceiver, data_dir: Path):
    """A sender that wants nothing of what is there says so without a byte."""
    receiver.handle(chunk(0, b"abcd"))
    assert receiver.handle(chunk(0, b"")) == Pending(0)
    assert content(data_dir, ".partial") == b""


@pytest.mark.seed("2.3")
@pytest.mark.parametrize(("held", "offset"), [(b"abc", 5), (b"", 4)])
def test_a_gap_is_refused_with_both_offsets(receiver: MirrorReceiver, held: bytes, offset: int):
    """A chunk too far ahead changes nothing, also as the first of all; the right one is taken afterwards."""
    if held:
        receiver.handle(chunk(0, held))
    with pytest.raises(OffsetRegressionError) as refusal:
        receiver.handle(chunk(offset, WHOLE[offset:]))
    assert (refusal.value.expected, refusal.value.actual) == (len(held), offset)
    assert receiver.handle(chunk(len(held), WHOLE[len(held) :], done=True)) == receiver.committed(ORDERS)


@pytest.mark.seed("2.5")
def test_the_checksum_runs_over_all_chunks(receiver: MirrorReceiver, data_dir: Path):
    """Chunks of any size make the whole: its checksum is the combination of theirs, and offsets add up."""
    whole = noise(1000)
    cuts = [0, 1, 8, 8, 100, 999, 1000]
    pieces = [whole[a:b] for a, b in pairwise(cuts)]
    assert combine_all((crc32c(piece), len(piece)) for piece in pieces) == crc32c(whole)
    for offset, piece in zip(cuts, pieces, strict=False):
        done = offset + len(piece) == len(whole)
        outcome = receiver.handle(chunk(offset, piece, whole=whole, done=done))
        assert outcome == (receiver.committed(ORDERS) if done else Pending(offset + len(piece)))
    assert content(data_dir, ".snapshot") == whole


@pytest.mark.seed("2.6")
def test_progress_is_reported_after_each_mebibyte(receiver: MirrorReceiver, reports: Reports):
    """Three chunks of 1 MiB are three reports; the last one says that nothing is missing."""
    whole = noise(3 * MIB)
    for offset in range(0, 3 * MIB, MIB):
        receiver.handle(chunk(offset, whole[offset : offset + MIB], whole=whole, done=offset == 2 * MIB))
    assert reports == [("orders", Bootstrapping(done * MIB, 3 * MIB)) for done in (1, 2, 3)]


def test_who_watches_may_ask_the_receiver_and_may_fail(data_dir: Path):
    """Reports come outside of the lock; one that raises loses nothing, and the chunk sent again is known."""
    seen: list[ReceiverStatus | None] = []

    def watch(snapshot: SnapshotId, _: ReceiverStatus) -> None:
        seen.append(receiver.status(snapshot))
        if len(seen) == 1:
            raise RuntimeError("the screen is broken")

    whole = noise(2 * MIB)
    with MirrorReceiver(data_dir, on_progress=watch) as receiver:
        with pytest.raises(RuntimeError, match="the screen is broken"):
            receiver.handle(chunk(0, whole[:MIB], whole=whole))
        assert receiver.handle(chunk(0, whole[:MIB], whole=whole)) == Pending(MIB)
        receiver.handle(chunk(MIB, whole[MIB:], whole=whole, done=True))
    assert seen == [Bootstrapping(MIB, 2 * MIB), Bootstrapping(2 * MIB, 2 * MIB)]


@pytest.mark.seed("2.7")
def test_an_unfinished_snapshot_is_pending(receiver: MirrorReceiver):
    """Each chunk is answered with how much is there, which only grows."""
    whole = noise(64)
    counts = [receiver.handle(chunk(at, whole[at : at + 16], whole=whole)) for at in range(0, 64, 16)]
    assert counts == [Pending(16), Pending(32), Pending(48), Pending(64)]


@pytest.mark.seed("2.8")
def test_a_wrong_checksum_of_the_whole_leaves_nothing(receiver: MirrorReceiver, data_dir: Path):
    """If the whole is not what was declared, both values are told and the partial file goes."""
    receiver.handle(chunk(0, b"abc", total_crc32c=7))
    with pytest.raises(ChecksumMismatch) as refusal:
        receiver.handle(chunk(3, b"def", total_crc32c=7, done=True))
    assert (refusal.value.what, refusal.value.expected, refusal.value.actual) == ("snapshot", 7, crc32c(WHOLE))
    assert files(data_dir) == []
    assert receiver.status(ORDERS) is None


@pytest.mark.seed("2.9")
def test_an_empty_snapshot_commits(receiver: MirrorReceiver, data_dir: Path):
    """Nothing at all is a snapshot too; its checksum is 0."""
    assert isinstance(receiver.handle(chunk(0, b"", whole=b"", done=True)), Committed)
    assert content(data_dir, ".snapshot") == b""


@pytest.mark.seed("2.10")
def test_one_rename_completes_a_snapshot(receiver: MirrorReceiver, data_dir: Path):
    """There is either a partial file or a snapshot, and it is the same file."""
    receiver.handle(chunk(0, b"abc"))
    (partial,) = data_dir.rglob("*.partial")
    inode = partial.stat().st_ino
    outcome = receiver.handle(chunk(3, b"def", done=True))
    assert isinstance(outcome, Committed)
    assert outcome.path == partial.with_suffix(".snapshot")
    assert outcome.path.stat().st_ino == inode
    assert files(data_dir) == [".journal", ".snapshot"]


@pytest.mark.seed("2.11", "W2.9")
def test_following_begins_after_the_import(
    receiver: MirrorReceiver, data_dir: Path, reports: Reports, caplog: pytest.LogCaptureFixture
):
    """A complete snapshot is not followed yet; that is said by whoever imported it, and survives a restart."""
    caplog.set_level(logging.INFO, "blobflow")
    assert receiver.handle(chunk(0, b"hel", whole=b"hello!")) == Pending(3)
    with pytest.raises(IntegrityError, match="not complete: 3 of 6 bytes"):
        receiver.follow(ORDERS, 42)
    outcome = receiver.handle(chunk(3, b"lo!", whole=b"hello!", done=True))
    assert isinstance(outcome, Committed)
    assert (outcome.id.position, outcome.path.read_bytes()) == (42, b"hello!")
    assert receiver.status(ORDERS) == Bootstrapping(6, 6)

    receiver.follow(ORDERS, "wal:17")

    assert receiver.status(ORDERS) == Following("wal:17")
    assert reports == [("orders", Bootstrapping(6, 6)), ("orders", Following("wal:17"))]
    assert repr(receiver) == "<MirrorReceiver following orders>"
    assert "mirror.following database=orders position=42" in caplog.text
    receiver.close()
    assert read_snapshots(data_dir) == {ORDERS: Following("wal:17")}


@pytest.mark.seed("W2.9")
def test_snapshots_are_kept_in_versions_and_never_replaced(receiver: MirrorReceiver, data_dir: Path):
    """A newer snapshot of a database lies beside the older one; a complete one does not change any more."""
    newer = ORDERS._replace(position=43, digest=f"sha256:{0xC:064x}")
    first = receiver.handle(chunk(0, WHOLE, done=True))
    second = receiver.handle(chunk(0, b"newer!", whole=b"newer!", done=True, snapshot=newer))
    assert isinstance(first, Committed)
    assert isinstance(second, Committed)
    assert (first.path.read_bytes(), second.path.read_bytes()) == (WHOLE, b"newer!")
    assert sorted(data_dir.rglob("*.snapshot")) == [first.path, second.path]
    with pytest.raises(KeyConflict):
        receiver.handle(chunk(0, b"other", whole=b"other", done=True))
    receiver.abort(ORDERS)
    assert first.path.read_bytes() == WHOLE


@pytest.mark.seed("W2.9")
def test_a_snapshot_is_durable_before_it_has_its_name(receiver: MirrorReceiver, monkeypatch: pytest.MonkeyPatch):
    """The file is synced, then renamed, then the directory is synced."""
    receiver.handle(chunk(0, b"abc"))
    calls: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        real_fsync(descriptor)

    def rename(*arguments: Any, **places: int) -> None:
        calls.append("rename")
        real_rename(*arguments, **places)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    receiver.handle(chunk(3, b"def", done=True))
    assert calls == ["fsync .partial", "rename", "fsync "]


@pytest.mark.seed("W2.1")
def test_the_journal_vouches_only_for_what_is_durable(receiver: MirrorReceiver, monkeypatch: pytest.MonkeyPatch):
    """At a checkpoint the bytes are synced before the journal says so, and then the journal is."""
    receiver.handle(chunk(0, b"ab"))
    calls: list[str] = []

    def watched(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def function(descriptor: int, *arguments: Any) -> Any:
            calls.append(f"{name} {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix}")
            return real(descriptor, *arguments)

        monkeypatch.setattr(os, name, function)

    for name in ("pwrite", "fdatasync", "fsync"):
        watched(name)
    receiver.handle(chunk(2, b"cd"))
    assert calls == ["pwrite .partial", "fdatasync .partial", "pwrite .journal", "fsync .journal"]


@pytest.mark.seed("2.12")
def test_abort_drops_everything_and_may_be_called_twice(receiver: MirrorReceiver, data_dir: Path):
    """Nothing is left after it, whatever was there, and the snapshot can begin anew."""
    receiver.handle(chunk(0, b"abcd"))
    receiver.abort(ORDERS)
    receiver.abort(ORDERS)
    assert files(data_dir) == []
    assert receiver.handle(chunk(0, b"abcd")) == Pending(4)


# What goes wrong


@pytest.mark.seed("2.13", "W2.5")
def test_a_crash_in_a_chunk_poisons_nothing_but_its_snapshot(
    receiver: MirrorReceiver, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """The next chunk gets a typed error that says where to go on; there it goes on. Others notice nothing."""
    receiver.handle(chunk(0, b"abcd"))
    fails(monkeypatch, "pwrite", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        receiver.handle(chunk(4, b"e"))
    receiver.handle(chunk(0, WHOLE, snapshot=USERS, done=True))
    with pytest.raises(SessionPoisoned, match="poisoned by RuntimeError") as poisoned:
        receiver.handle(chunk(5, b"f", done=True))
    assert poisoned.value.expected == 4
    assert isinstance(receiver.handle(chunk(4, b"ef", done=True)), Committed)
    assert content(data_dir, ".snapshot") == content(data_dir, ".snapshot", USERS) == WHOLE


@pytest.mark.seed("2.12", "2.13", "W2.5")
@pytest.mark.parametrize("recovery", ["restart", "abort"])
def test_a_poisoned_snapshot_can_begin_anew(
    receiver: MirrorReceiver, data_dir: Path, monkeypatch: pytest.MonkeyPatch, recovery: str
):
    """A restart at 0 works at once, with an abort before it or without."""
    receiver.handle(chunk(0, b"abcd"))
    fails(monkeypatch, "pwrite", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        receiver.handle(chunk(4, b"e"))
    if recovery == "abort":
        receiver.abort(ORDERS)
    receiver.handle(chunk(0, b"ab"))
    receiver.handle(chunk(2, b"cdef", done=True))
    assert content(data_dir, ".snapshot") == WHOLE


@pytest.mark.seed("2.14", "W2.7")
@pytest.mark.parametrize(
    ("function", "number", "kind", "operation"),
    [
        ("pwrite", errno.ENOSPC, DiskFull, "write partial chunk"),
        ("pwrite", errno.EIO, StoreUnavailable, "write partial chunk"),
        ("fsync", errno.EIO, StoreUnavailable, "sync partial file"),
        ("rename", errno.EACCES, StoreConfigurationError, "rename partial to snapshot"),
    ],
)
def test_a_failing_disk_is_named_and_costs_at_most_a_checkpoint(
    receiver: MirrorReceiver,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: int,
    kind: type[Exception],
    operation: str,
):
    """An I/O error names its operation. When the disk is well again, the same chunk is taken."""
    receiver.handle(chunk(0, b"abcd"))
    fails(monkeypatch, function, OSError(number, os.strerror(number)))
    with pytest.raises(kind, match=f"{operation}: {os.strerror(number)}") as failure:
        receiver.handle(chunk(4, b"ef", done=True))
    assert getattr(failure.value, "operation", "") == operation
    assert isinstance(receiver.handle(chunk(4, b"ef", done=True)), Committed)
    assert content(data_dir, ".snapshot") == WHOLE


@pytest.mark.seed("W2.7")
def test_a_torn_checkpoint_is_written_again(receiver: MirrorReceiver, data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """A journal record that broke off neither counts nor gets in the way of the next one."""
    receiver.handle(chunk(0, b"ab"))
    real = os.pwrite

    def torn(descriptor: int, data: Any, offset: int) -> int:
        if bytes(data[8:9]) != b" ":
            return real(descriptor, data, offset)
        real(descriptor, data[:20], offset)
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", torn)
        with pytest.raises(DiskFull, match="append to journal"):
            receiver.handle(chunk(2, b"cd"))
    assert receiver.status(ORDERS) == Bootstrapping(0, 6)
    receiver.handle(chunk(0, b"abcd"))
    receiver.close()
    assert read_snapshots(data_dir) == {ORDERS: Bootstrapping(4, 6)}


@pytest.mark.seed("W2.2")
@pytest.mark.parametrize(
    ("offset", "data", "done"), [(4, b"e", True), (4, b"efg", False), (4, b"efg", True), (4, b"", True)]
)
def test_the_declared_size_is_enforced(receiver: MirrorReceiver, offset: int, data: bytes, done: bool):
    """An end before or behind the declared size is refused, and changes nothing."""
    receiver.handle(chunk(0, b"abcd"))
    with pytest.raises(SizeMismatch) as refusal:
        receiver.handle(chunk(offset, data, done=done))
    assert (refusal.value.expected, refusal.value.actual) == (6, offset + len(data))
    assert isinstance(receiver.handle(chunk(4, b"ef", done=True)), Committed)


def test_the_whole_may_not_change_on_the_way(receiver: MirrorReceiver):
    """A later chunk that declares another size or checksum is refused."""
    receiver.handle(chunk(0, b"abcd"))
    with pytest.raises(KeyConflict):
        receiver.handle(chunk(4, b"efg", whole=b"abcdefg"))
    assert receiver.status(ORDERS) == Bootstrapping(4, 6)


def test_a_snapshot_that_is_too_large_is_refused_at_once(data_dir: Path):
    """The limit counts what is declared, before a byte is written."""
    with MirrorReceiver(data_dir, max_snapshot_bytes=5) as receiver, pytest.raises(ObjectTooLarge):
        receiver.handle(chunk(0, b"a"))
    assert files(data_dir) == []


@pytest.mark.seed("W2.4")
@pytest.mark.parametrize(
    "name", ["../orders", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "-x", "ö", "x" * 129]
)
@pytest.mark.parametrize("field", ["database", "source"])
def test_hostile_names_are_refused(receiver: MirrorReceiver, data_dir: Path, name: str, field: str):
    """What is no plain name never becomes part of a path, for any call."""
    hostile = ORDERS._replace(**{field: name})
    for call in (
        lambda: receiver.handle(chunk(0, b"a", snapshot=hostile)),
        lambda: receiver.status(hostile),
        lambda: receiver.abort(hostile),
    ):
        with pytest.raises(RefusedError, match=f"is not the id of a {field}"):
            call()
    assert files(data_dir) == []


@pytest.mark.parametrize("change", [{"position": -1}, {"position": 1 << 64}, {"digest": "md5:00"}])
def test_malformed_ids_are_refused(receiver: MirrorReceiver, change: dict[str, Any]):
    """Positions have 64 bits, digests are SHA-256."""
    with pytest.raises(RefusedError):
        receiver.handle(chunk(0, b"a", snapshot=ORDERS._replace(**change)))


@pytest.mark.seed("W2.8")
def test_a_bad_chunk_costs_one_chunk(receiver: MirrorReceiver, data_dir: Path):
    """A chunk that was damaged on its way is refused by its own checksum; sent again, all goes on."""
    receiver.handle(chunk(0, b"abc"))
    with pytest.raises(ChecksumMismatch) as refusal:
        receiver.handle(chunk(3, b"dXf", crc32c=crc32c(b"def"), done=True))
    assert (refusal.value.what, refusal.value.offset) == ("chunk", 3)
    receiver.handle(chunk(3, b"def", done=True))
    assert content(data_dir, ".snapshot") == WHOLE


@pytest.mark.seed("W2.10")
def test_a_chunk_sent_again_is_acknowledged_again(receiver: MirrorReceiver, data_dir: Path):
    """Where an answer was lost, the sender repeats itself: first chunk, last chunk, end of all. Nothing is written."""
    receiver.handle(chunk(0, b"ab"))
    receiver.handle(chunk(2, b"cd"))
    assert receiver.handle(chunk(0, b"ab")) == Pending(4)
    assert receiver.handle(chunk(2, b"cd")) == Pending(4)
    assert content(data_dir, ".partial") == b"abcd"
    committed = receiver.handle(chunk(4, b"ef", done=True))
    assert receiver.handle(chunk(4, b"ef", done=True)) == committed
    assert receiver.handle(chunk(0, b"ab")) == committed
    assert content(data_dir, ".snapshot") == WHOLE


# More than one


@pytest.mark.seed("W2.3")
def test_interleaved_snapshots_do_not_mix(receiver: MirrorReceiver, data_dir: Path):
    """Two databases, and a third snapshot that differs in its source alone, chunk by chunk in turns."""
    west = ORDERS._replace(source="west")
    wholes = {ORDERS: noise(100, 1), USERS: noise(100, 2), west: noise(100, 3)}
    for offset in range(0, 100, 10):
        for snapshot, whole in wholes.items():
            receiver.handle(
                chunk(offset, whole[offset : offset + 10], whole=whole, snapshot=snapshot, done=offset == 90)
            )
    for snapshot, whole in wholes.items():
        committed = receiver.committed(snapshot)
        assert committed is not None
        assert committed.path.read_bytes() == whole
    assert receiver.snapshots() == dict.fromkeys(wholes, Bootstrapping(100, 100))


@pytest.mark.seed("W2.6")
def test_restarts_race_writes_and_corrupt_nothing(receiver: MirrorReceiver, data_dir: Path):
    """Three threads send, restart and abort the same snapshot at once; what is completed afterwards is whole."""
    whole = noise(400)
    barrier = threading.Barrier(3)
    surprises: list[Exception] = []

    def send(seed: int) -> None:
        barrier.wait()
        for turn in range(30):
            try:
                if (turn + seed) % 10 == 0:
                    receiver.abort(ORDERS)
                offset = 0
                while offset < 300:
                    size = 10 + seed  # so that the first chunks of two threads differ
                    outcome = receiver.handle(chunk(offset, whole[offset : offset + size], whole=whole))
                    assert isinstance(outcome, Pending)
                    offset += size
            except OffsetRegressionError:
                continue
            except Exception as error:  # noqa: BLE001  # shown by the main thread
                surprises.append(error)

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert surprises == []
    status = receiver.status(ORDERS)
    held = status.bytes_done if isinstance(status, Bootstrapping) else 0
    if held:
        assert content(data_dir, ".partial") == whole[:held]
    receiver.handle(chunk(held, whole[held:], whole=whole, done=True))
    assert content(data_dir, ".snapshot") == whole


@pytest.mark.seed("2.4")
def test_a_slow_disk_does_not_stop_the_event_loop(receiver: MirrorReceiver, monkeypatch: pytest.MonkeyPatch):
    """While a chunk waits for the disk in its thread, the loop runs and other snapshots are received."""
    stuck, go_on = threading.Event(), threading.Event()
    real = os.pwrite

    def slow(descriptor: int, data: Any, offset: int) -> int:
        if bytes(data) == b"slow":
            stuck.set()
            assert go_on.wait(60)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)

    async def story() -> tuple[Pending | Committed, Pending | Committed]:
        waiting = asyncio.create_task(asyncio.to_thread(receiver.handle, chunk(0, b"slow")))
        await asyncio.to_thread(stuck.wait, 60)
        other = await asyncio.to_thread(receiver.handle, chunk(0, b"abc", snapshot=USERS))
        assert not waiting.done()
        go_on.set()
        return await waiting, other

    assert asyncio.run(story()) == (Pending(4), Pending(3))


def test_a_directory_has_one_receiver(receiver: MirrorReceiver, data_dir: Path):
    """A second one is refused until the first is closed, which then takes nothing any more."""
    with pytest.raises(TransferBusy):
        MirrorReceiver(data_dir)
    receiver.handle(chunk(0, b"abc"))
    receiver.close()
    receiver.close()
    with pytest.raises(TransferBusy, match="closed"):
        receiver.handle(chunk(3, b"def"))
    with MirrorReceiver(data_dir) as second:
        assert second.handle(chunk(3, b"def", done=True)) == second.committed(ORDERS)


@pytest.mark.seed("W2.1")
def test_a_restarted_receiver_goes_on_at_its_last_checkpoint(data_dir: Path, tmp_path: Path):
    """What the journal vouches for is taken over, and what lies behind it is sent again."""
    crashed = tmp_path / "crashed"
    with MirrorReceiver(data_dir, checkpoint_bytes=4) as receiver:
        receiver.handle(chunk(0, b"abcd"))
        receiver.handle(chunk(4, b"e"))
        os.rename(data_dir / "recv_snapshots", tmp_path / "kept")  # so that closing cannot add to it
        crashed.mkdir()
        os.rename(tmp_path / "kept", crashed / "recv_snapshots")
        (data_dir / "recv_snapshots" / "orders").mkdir(parents=True)
        with pytest.raises(StoreUnavailable):
            receiver.close()
    with MirrorReceiver(crashed) as receiver:
        assert receiver.status(ORDERS) == Bootstrapping(4, 6)
        assert content(crashed, ".partial") == b"abcd"
        assert receiver.handle(chunk(0, b"abcd")) == Pending(4)  # the first chunk is known again
        receiver.handle(chunk(4, b"ef", done=True))
    assert content(crashed, ".snapshot") == WHOLE


@pytest.mark.parametrize("damage", [b"", b"garbage\n", b"00000000 {}\n"])
def test_a_journal_that_cannot_be_read_vouches_for_nothing(data_dir: Path, damage: bytes):
    """The snapshot begins anew instead of trusting bytes that nobody vouches for."""
    with MirrorReceiver(data_dir) as receiver:
        receiver.handle(chunk(0, b"abcd"))
    (journal,) = data_dir.rglob("*.journal")
    journal.write_bytes(damage)
    assert read_snapshots(data_dir) == {}
    with MirrorReceiver(data_dir) as receiver:
        assert receiver.status(ORDERS) is None
        receiver.handle(chunk(0, WHOLE, done=True))
    assert content(data_dir, ".snapshot") == WHOLE


def test_a_damaged_record_and_all_behind_it_do_not_count(data_dir: Path):
    """One wrong digit in a checkpoint, and the one before it is where the snapshot goes on."""
    with MirrorReceiver(data_dir, checkpoint_bytes=2) as receiver:
        for offset in (0, 2, 4):
            receiver.handle(chunk(offset, WHOLE[offset : offset + 2]))
    (journal,) = data_dir.rglob("*.journal")
    text = journal.read_bytes()
    assert text.count(b'"offset":4') == 1
    journal.write_bytes(text.replace(b'"offset":4', b'"offset":5'))
    assert read_snapshots(data_dir) == {ORDERS: Bootstrapping(2, 6)}


def test_a_partial_file_that_lost_its_end_is_not_trusted(data_dir: Path):
    """A checkpoint that claims more than the file has does not count."""
    with MirrorReceiver(data_dir, checkpoint_bytes=2) as receiver:
        receiver.handle(chunk(0, b"ab"))
        receiver.handle(chunk(2, b"cd"))
    (partial,) = data_dir.rglob("*.partial")
    partial.write_bytes(b"abc")
    assert read_snapshots(data_dir) == {ORDERS: Bootstrapping(2, 6)}
