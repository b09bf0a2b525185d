"""The ends of a transfer that are more than streams: objects as sources, objects and files as targets."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blobflow import ChunkProfile, open_store
from blobflow.checksum import crc32c
from blobflow.errors import (
    ChecksumMismatch,
    DestinationNotEmpty,
    DigestMismatch,
    DiskFull,
    KeyConflict,
    RefusedError,
    SizeMismatch,
    SourceChanged,
    SourceTruncated,
    StoreUnavailable,
    TransferBusy,
    Unsupported,
    UploadIncomplete,
    UsageError,
)
from blobflow.stores.base import Body, Store
from blobflow.stores.local.store import LocalStore
from blobflow.streams import FileTarget, ObjectSource, ObjectTarget, TransferCheckpoint, transfer
from blobflow.testing import FailAfter, FaultyStore, Hook, Request, scripted_faults
from tests.kit import Killed, declare, dies_at, give_away, keys, noise, watched
from tests.servers import S3Endpoint
from tests.strict_s3 import StrictS3

KEY = "dumps/orders.sql"
DATA = noise(10_240)
PROFILE = ChunkProfile.custom(1024, 1)
UNVERIFIED = PROFILE.model_copy(update={"verify_digest": False})


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def pieces(data: bytes = DATA, size: int = 700) -> Iterator[bytes]:
    """A stream of unknown length."""
    return (data[i : i + size] for i in range(0, len(data), size))


def breaks_after(count: int, journal: Journal | None = None) -> Iterator[bytes]:
    """Ends badly; not before the journal has all whole chunks of what came."""
    yield DATA[:count]
    if journal is not None:
        journal.wait_for(count // 1024 * 1024)
    raise ConnectionResetError("peer went away")


def read(store: Store, key: str = KEY) -> bytes:
    return store.get(key, max_bytes=2**25).data


def _put(store: Store, data: bytes) -> None:
    store.put(KEY, data)


class Journal:
    """The last checkpoint, as it would be found after a crash."""

    def __init__(self) -> None:
        self.text = ""
        self.offsets: list[int] = []
        self._saved = threading.Condition()

    def __call__(self, checkpoint: TransferCheckpoint) -> None:
        with self._saved:
            self.text = checkpoint.to_json()
            self.offsets.append(checkpoint.offset)
            self._saved.notify_all()

    def wait_for(self, offset: int) -> None:
        """Another thread has come so far."""
        with self._saved:
            assert self._saved.wait_for(lambda: self.offsets[-1] >= offset, timeout=20)

    def load(self) -> TransferCheckpoint | None:
        return TransferCheckpoint.from_json(self.text) if self.text else None


_MEMORY = """
import resource, sys
from blobflow import ChunkProfile, open_store
from blobflow.streams import ObjectTarget, transfer

MIB = 2**20
store = open_store(sys.argv[1])

def send(key, size, profile):
    transfer((bytes(MIB) for _ in range(size // MIB)), ObjectTarget(store, key), profile)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

send("warm", 2 * MIB, ChunkProfile.custom(MIB, 1))
before = peak()
send("large", 160 * MIB, ChunkProfile.custom(8 * MIB, 4))
print(peak() - before)
"""


def test_memory_is_a_few_parts_whatever_the_size(tmp_path: Path):
    """An object of unknown length is twenty times as large as what the process holds of it."""
    output = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path)], check=True, capture_output=True, text=True, timeout=100
    ).stdout
    assert int(output) < (2 + 2) * 8 * 2**20
    assert (tmp_path / "large").stat().st_size == 160 * 2**20


# An object as the source


def test_an_object_is_read_a_chunk_at_a_time(store: LocalStore):
    """One look, then one ranged request for each chunk; the checkpoint knows size and version."""
    meta = store.put(KEY, DATA)
    watching, checkpoint, target = watched(store), TransferCheckpoint.new("s"), io.BytesIO()
    result = transfer(ObjectSource(watching, KEY), target, PROFILE, checkpoint)
    assert target.getvalue() == DATA
    assert [request.operation for request in watching.log if request.operation != "get_range"] == ["head"]
    assert watching.count("get_range") in (10, 11)
    assert (checkpoint.total_size, checkpoint.source_version) == (len(DATA), meta.e_tag)
    assert (result.computed_digest, result.crc32c) == (digest_of(DATA), crc32c(DATA))


def test_an_object_that_is_replaced_meanwhile_is_refused(store: LocalStore):
    """Its chunks are pinned: the target never gets a mixture."""
    store.put(KEY, DATA)
    faulty = FaultyStore(store, scripted_faults({("get_range", 4): Hook(lambda _: _put(store, noise(10_240, 1)))}))
    target = io.BytesIO()
    with pytest.raises(SourceChanged, match="replaced while it was read") as refusal:
        transfer(ObjectSource(faulty, KEY), target, PROFILE)
    assert "begin again" in refusal.value.hint
    assert DATA.startswith(target.getvalue())


def test_an_expected_version_is_demanded(store: LocalStore):
    """By its e_tag in the call, or in the checkpoint, before a byte is fetched."""
    old = store.put(KEY, DATA).e_tag
    transfer(ObjectSource(store, KEY, e_tag=old), io.BytesIO(), PROFILE)
    store.put(KEY, noise(10_240, 1))
    watching = watched(store)
    with pytest.raises(SourceChanged):
        transfer(ObjectSource(watching, KEY, e_tag=old), io.BytesIO(), PROFILE)
    with pytest.raises(SourceChanged, match="since the checkpoint"):
        transfer(
            ObjectSource(watching, KEY),
            io.BytesIO(),
            PROFILE,
            TransferCheckpoint(session_id="s", offset=1024, source_version=old),
        )
    assert watching.count("get_range") == 0


def test_an_object_of_another_size_is_refused_at_once(store: LocalStore):
    """The checkpoint announces another total."""
    store.put(KEY, DATA)
    with pytest.raises(SizeMismatch) as refusal:
        transfer(ObjectSource(store, KEY), io.BytesIO(), PROFILE, TransferCheckpoint.new("s", total_size=99))
    assert (refusal.value.expected, refusal.value.actual) == (99, 10_240)


def stopped_at(chunks: int, source: ObjectSource, target: io.BytesIO) -> TransferCheckpoint:
    """The checkpoint of a transfer that was stopped after so many chunks."""
    checkpoint = TransferCheckpoint.new("s")

    def save(checkpoint: TransferCheckpoint) -> None:
        if checkpoint.chunks_completed == chunks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(source, target, PROFILE, checkpoint, save)
    target.seek(checkpoint.offset)
    target.truncate()
    return TransferCheckpoint.from_json(checkpoint.to_json())


@pytest.mark.parametrize(("profile", "fetched"), [(PROFILE, 10_240), (UNVERIFIED, 6 * 1024)])
def test_what_is_fetched_again_depends_on_the_digest(store: LocalStore, profile: ChunkProfile, fetched: int):
    """The digest of the whole takes the whole; without one the object is opened where the checkpoint ends."""
    store.put(KEY, DATA)
    target = io.BytesIO()
    checkpoint = stopped_at(4, ObjectSource(store, KEY), target)
    counted = 0
    real = store.get_range_into

    def count(key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        nonlocal counted
        counted += len(buffer)
        real(key, offset, buffer, e_tag=e_tag)

    store.get_range_into = count
    result = transfer(ObjectSource(store, KEY), target, profile, checkpoint)
    assert target.getvalue() == DATA
    assert counted == fetched
    assert result.computed_digest == (digest_of(DATA) if profile is PROFILE else "")
    assert (result.crc32c, result.bytes_transferred, result.resumed) == (crc32c(DATA), 6 * 1024, True)


def test_a_checkpoint_without_a_version_takes_the_whole_source(store: LocalStore):
    """An older one does not say which version it was: only the bytes themselves can tell."""
    store.put(KEY, DATA)
    checkpoint = TransferCheckpoint(session_id="s", offset=1024, prefix_crc32c=crc32c(b"other"))
    with pytest.raises(SourceChanged, match="first 1024 bytes"):
        transfer(ObjectSource(store, KEY), io.BytesIO(), UNVERIFIED, checkpoint)


# A file as the target


def test_a_file_appears_whole_at_the_end(tmp_path: Path):
    """Until the transfer has succeeded there is nothing under its name."""
    path, seen = tmp_path / "file", list[bool]()
    result = transfer(pieces(), FileTarget(path), PROFILE, on_checkpoint=lambda _: seen.append(path.exists()))
    assert path.read_bytes() == DATA
    assert seen
    assert not any(seen)
    assert result.checkpoints_saved == len(seen)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("planted", ["foreign", "link", "hard link", "pipe"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_partial_file_of_somebody_else_is_not_adopted(
    tmp_path: Path, planted: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others put under the partial file's name is neither filled nor published, and stays as it is."""
    partial, victim = tmp_path / ".dump.sql.blobflow-partial", tmp_path / "victim"
    victim.write_bytes(b"theirs")
    if planted == "link":
        partial.symlink_to(victim)
    elif planted == "hard link":
        partial.hardlink_to(victim)
    elif planted == "pipe":
        os.mkfifo(partial)
    else:
        partial.write_bytes(b"theirs")
        partial.chmod(0o666)
        give_away(partial, monkeypatch)
    with pytest.raises(RefusedError, match=f"{partial} is not used") as refusal:
        transfer(pieces(), FileTarget(tmp_path / "dump.sql", overwrite=overwrite), PROFILE)
    assert "remove it" in refusal.value.hint
    assert sorted(os.listdir(tmp_path)) == [partial.name, "victim"]
    assert victim.read_bytes() == b"theirs"
    if planted == "foreign":
        assert partial.read_bytes() == b"theirs"


def test_a_file_that_exists_is_left_alone(tmp_path: Path):
    """Unless it may be overwritten; and what comes there in the last moment is not replaced either."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(DestinationNotEmpty):
        transfer(pieces(), FileTarget(path), PROFILE)
    transfer(pieces(), FileTarget(path, overwrite=True), PROFILE)
    assert path.read_bytes() == DATA
    path.unlink()

    def late() -> Iterator[bytes]:
        yield DATA
        path.write_bytes(b"somebody else's")

    with pytest.raises(DestinationNotEmpty):
        transfer(late(), FileTarget(path), PROFILE)
    assert path.read_bytes() == b"somebody else's"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_finished_file_is_not_written_to_under_its_other_name(tmp_path: Path):
    """A process was killed when the file had its name and its partial name still: the next one replaces it whole."""
    path = tmp_path / "file"
    path.write_bytes(b"finished")
    (tmp_path / ".file.blobflow-partial").hardlink_to(path)
    with open(path, "rb") as reader:
        transfer(pieces(), FileTarget(path, overwrite=True), PROFILE)
        assert (reader.read(), path.read_bytes()) == (b"finished", DATA)


def test_a_file_is_taken_up_without_the_source(store: LocalStore, tmp_path: Path):
    """What was written is hashed from the disk: the digest is that of the whole, the source gives the rest only."""
    store.put(KEY, DATA)
    path, journal = tmp_path / "file", Journal()
    dead = FaultyStore(store, scripted_faults({("get_range", 5): Hook(lambda _: _die_at(journal, 4 * 1024))}))
    with pytest.raises(Killed):
        transfer(ObjectSource(dead, KEY), FileTarget(path), PROFILE, on_checkpoint=journal)
    watching = watched(store)
    expecting = journal.load()
    assert expecting is not None
    expecting.digest = digest_of(DATA)
    result = transfer(ObjectSource(watching, KEY), FileTarget(path), PROFILE, expecting)
    assert path.read_bytes() == DATA
    assert (result.bytes_transferred, result.computed_digest) == (6 * 1024, digest_of(DATA))
    assert watching.count("get_range") in (6, 7)


def _die(_: Request) -> None:
    raise Killed


def _die_at(journal: Journal, offset: int) -> None:
    journal.wait_for(offset)
    raise Killed


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "gone"])
def test_a_damaged_partial_file_is_never_continued(damage: str, store: LocalStore, tmp_path: Path):
    """One that is too short begins anew by itself; one with other bytes is refused, removed, and then begins anew."""
    store.put(KEY, DATA)
    path, journal = tmp_path / "file", Journal()
    dead = FaultyStore(store, scripted_faults({("get_range", 5): Hook(lambda _: _die_at(journal, 4 * 1024))}))
    with pytest.raises(Killed):
        transfer(ObjectSource(dead, KEY), FileTarget(path), PROFILE, on_checkpoint=journal)
    [partial] = tmp_path.glob(".file.*")
    if damage == "gone":
        partial.unlink()
    elif damage == "cut off":
        os.truncate(partial, 1000)
    else:
        with open(partial, "r+b") as file:
            file.write(bytes([DATA[0] ^ 1]))
        with pytest.raises(ChecksumMismatch, match="not those that were written"):
            transfer(ObjectSource(store, KEY), FileTarget(path), PROFILE, journal.load())
    result = transfer(ObjectSource(store, KEY), FileTarget(path), PROFILE, journal.load())
    assert path.read_bytes() == DATA
    assert (result.bytes_transferred, result.resumed) == (len(DATA), False)


def test_a_file_of_another_digest_never_appears(tmp_path: Path):
    """Nor is anything of it kept, although there is a checkpoint: its bytes are wrong."""
    checkpoint = TransferCheckpoint.new("s", digest_of(b"other"))
    with pytest.raises(DigestMismatch):
        transfer(pieces(), FileTarget(tmp_path / "file"), PROFILE, checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resumable", [True, False])
def test_a_partial_file_stays_for_a_checkpoint_only(resumable: bool, tmp_path: Path):
    """Without one nobody could take it up."""
    with pytest.raises(StoreUnavailable):
        transfer(
            breaks_after(3000),
            FileTarget(tmp_path / "file"),
            PROFILE,
            TransferCheckpoint.new("s") if resumable else None,
        )
    assert len(list(tmp_path.iterdir())) == resumable


def test_two_transfers_to_one_file_do_not_mix(tmp_path: Path):
    """The second one is told that somebody is at it; the first one is not disturbed."""
    path = tmp_path / "file"

    def meanwhile() -> Iterator[bytes]:
        yield DATA[:5000]
        with pytest.raises(TransferBusy):
            transfer(pieces(), FileTarget(path), PROFILE)
        yield DATA[5000:]

    transfer(meanwhile(), FileTarget(path), PROFILE)
    assert path.read_bytes() == DATA


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The operator frees room and runs it again."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull, match="no room left for") as answer:
        transfer(pieces(), FileTarget(tmp_path / "file"), PROFILE)
    assert answer.value.retryable


# An object as the target


def test_a_stream_of_unknown_length_becomes_an_object(store: LocalStore):
    """A chunk is a part; the object appears at the end, and nothing else stays."""
    seen: list[bool] = []
    target = ObjectTarget(store, KEY)
    result = transfer(pieces(), target, PROFILE, on_checkpoint=lambda _: seen.append(store.exists(KEY)))
    assert read(store) == DATA
    assert seen
    assert not any(seen)
    assert (result.total_size, result.computed_digest) == (len(DATA), digest_of(DATA))
    assert target.meta == store.head(KEY)
    assert keys(store) == [KEY]
    assert store.list_uploads() == []


@pytest.mark.parametrize("size", [0, 1, 1024, 1025])
def test_an_object_may_have_any_size(size: int, store: LocalStore):
    """Nothing, less than a part, exactly one, one and a byte."""
    transfer(pieces(noise(size)), ObjectTarget(store, KEY), PROFILE)
    assert read(store) == noise(size)


def test_store_to_store(store: LocalStore, moto_s3: S3Endpoint):
    """An object of a directory becomes one of a bucket, in parts that S3 takes, and its checksum is known."""
    data = noise(11 * 2**20)
    store.put(KEY, data)
    bucket = s3_store(moto_s3)
    result = transfer(ObjectSource(store, KEY), ObjectTarget(bucket, KEY), PROFILE)
    assert read(bucket) == data
    assert result.crc32c == crc32c(data)
    assert bucket.list_uploads() == []
    bucket.close()


def s3_store(endpoint: S3Endpoint) -> Store:
    return open_store(
        f"s3://{endpoint.new_bucket()}/prefix",
        endpoint_url=endpoint.endpoint_url,
        region=endpoint.region,
        access_key_id=endpoint.access_key_id,
        secret_access_key=endpoint.secret_access_key,
    )


def test_the_checksum_of_the_whole_goes_along_with_complete():
    """A server that checks it would refuse a wrong whole; this one does."""
    data = noise(6 * 2**20)
    with StrictS3() as server:
        bucket = s3_store(server.endpoint)
        target = ObjectTarget(bucket, KEY)
        transfer(pieces(data, 2**20), target, PROFILE)
        [complete] = server.requests("CompleteMultipartUpload", f"*{KEY}")
        assert "x-amz-checksum-crc32c" in complete.headers
        assert target.meta is not None
        assert target.meta.crc32c == crc32c(data)
        bucket.close()


def test_a_transfer_killed_at_any_request_is_taken_up(tmp_path: Path):
    """From the last checkpoint that was saved, by another process; the object is whole or absent all the while."""
    number, finished = 0, False
    while not finished:
        number += 1
        store, journal = LocalStore(tmp_path / f"store-{number}"), Journal()
        try:
            transfer(pieces(), ObjectTarget(FaultyStore(store, dies_at(number)), KEY), PROFILE, on_checkpoint=journal)
            finished = True
        except Killed:
            assert not store.exists(KEY) or read(store) == DATA
        resumed = journal.load()
        transfer(pieces(), ObjectTarget(store, KEY, overwrite=finished), PROFILE, resumed)
        assert read(store) == DATA
        # Before its first checkpoint nobody knows of the upload; it is empty, and `gc` removes it.
        assert len(store.list_uploads()) == (not journal.text and number > 2)
    assert number > 15


def test_parts_before_the_checkpoint_are_not_sent_again(store: LocalStore):
    """Seven parts of ten were acknowledged, five of them counted: five are sent."""
    journal = Journal()
    dead = FaultyStore(store, scripted_faults({("put_part", 8): Hook(_die)}))
    with pytest.raises(Killed):
        transfer(pieces(), ObjectTarget(dead, KEY), ChunkProfile.custom(1024, 5), on_checkpoint=journal)
    assert journal.offsets == [0, 5 * 1024, 7 * 1024]  # the last one because it failed
    watching = watched(store)
    result = transfer(pieces(), ObjectTarget(watching, KEY), PROFILE, journal.load())
    assert watching.count("put_part") == 3
    assert (result.bytes_transferred, result.computed_digest) == (3 * 1024, digest_of(DATA))
    assert read(store) == DATA


def test_an_upload_that_is_gone_begins_anew(store: LocalStore):
    """Somebody collected it: the store is right, and the checkpoint is set back."""
    journal = Journal()
    with pytest.raises(StoreUnavailable):
        transfer(breaks_after(5000, journal), ObjectTarget(store, KEY), PROFILE, on_checkpoint=journal)
    [upload] = store.list_uploads()
    store.abort_multipart(KEY, upload.upload_id)
    result = transfer(pieces(), ObjectTarget(store, KEY), PROFILE, journal.load())
    assert (result.bytes_transferred, result.resumed) == (len(DATA), False)
    assert read(store) == DATA


def test_a_part_that_was_replaced_is_not_built_upon(store: LocalStore):
    """The store tells another checksum than the checkpoint: from the beginning."""
    journal = Journal()
    with pytest.raises(StoreUnavailable):
        transfer(breaks_after(5000, journal), ObjectTarget(store, KEY), PROFILE, on_checkpoint=journal)
    [upload] = store.list_uploads()
    store.put_part(KEY, upload.upload_id, 2, Body.of(noise(1024, 9)))
    result = transfer(pieces(), ObjectTarget(store, KEY), PROFILE, journal.load())
    assert result.bytes_transferred == len(DATA)
    assert read(store) == DATA
    assert store.list_uploads() == []


def test_a_part_that_is_replaced_before_the_end_is_found_out(store: LocalStore):
    """What the store lists is compared with what was sent: nothing becomes visible."""

    def replaced() -> Iterator[bytes]:
        yield DATA[:9000]
        [upload] = store.list_uploads()
        store.put_part(KEY, upload.upload_id, 1, Body.of(noise(1024, 9)))
        yield DATA[9000:]

    with pytest.raises(UploadIncomplete, match=r"part 1 of .* is damaged"):
        transfer(replaced(), ObjectTarget(store, KEY), PROFILE)
    assert keys(store) == []
    assert store.list_uploads() == []


def test_a_lost_answer_of_complete_is_settled(store: LocalStore):
    """The object is there and the answer was not: this call fails or not, the next one finds it whole."""
    journal = Journal()
    faulty = FaultyStore(store, scripted_faults({("complete_multipart", 1): FailAfter()}))
    with pytest.raises(StoreUnavailable):
        transfer(pieces(), ObjectTarget(faulty, KEY), PROFILE, on_checkpoint=journal)
    watching = watched(store)
    target = ObjectTarget(watching, KEY)
    result = transfer(pieces(), target, PROFILE, journal.load())
    assert (watching.count("put_part"), result.bytes_transferred) == (0, 0)
    assert target.meta == store.head(KEY)


def test_another_object_is_not_taken_for_a_lost_answer(store: LocalStore):
    """The upload is gone and the key holds other bytes of the same size: refused, or replaced if that is allowed."""
    journal = Journal()
    dead = FaultyStore(store, scripted_faults({("complete_multipart", 1): Hook(_die)}))
    with pytest.raises(Killed):
        transfer(pieces(), ObjectTarget(dead, KEY), PROFILE, on_checkpoint=journal)
    [upload] = store.list_uploads()
    store.abort_multipart(KEY, upload.upload_id)
    store.put(KEY, noise(len(DATA), 5))
    with pytest.raises(KeyConflict):
        transfer(pieces(), ObjectTarget(store, KEY), PROFILE, journal.load())
    assert read(store) == noise(len(DATA), 5)
    transfer(pieces(), ObjectTarget(store, KEY, overwrite=True), PROFILE, journal.load())
    assert read(store) == DATA


@pytest.mark.parametrize(
    ("checkpoint", "kind"),
    [
        (lambda: TransferCheckpoint.new("s", digest_of(b"other")), DigestMismatch),
        (lambda: TransferCheckpoint.new("s", total_size=20_000), SourceTruncated),
        (lambda: TransferCheckpoint.new("s", total_size=5_000), SizeMismatch),
    ],
)
def test_wrong_bytes_never_become_an_object(
    checkpoint: Callable[[], TransferCheckpoint], kind: type[Exception], store: LocalStore
):
    """Another digest, too few, too many: nothing is visible and the upload is aborted."""
    with pytest.raises(kind):
        transfer(pieces(), ObjectTarget(store, KEY), PROFILE, checkpoint())
    assert keys(store) == []
    assert store.list_uploads() == []


@pytest.mark.parametrize("resumable", [True, False])
def test_an_upload_stays_for_a_checkpoint_only(resumable: bool, store: LocalStore):
    """Without one nobody could take it up, so it is aborted."""
    checkpoint = TransferCheckpoint.new("s") if resumable else None
    with pytest.raises(StoreUnavailable):
        transfer(breaks_after(3000), ObjectTarget(store, KEY), PROFILE, checkpoint)
    assert len(store.list_uploads()) == resumable


def test_an_object_that_exists_is_left_alone(store: LocalStore):
    """Whether it was there before, or came meanwhile; `overwrite` replaces it."""
    store.put(KEY, b"old")
    watching = watched(store)
    with pytest.raises(KeyConflict):
        transfer(pieces(), ObjectTarget(watching, KEY), PROFILE)
    assert watching.count("create_multipart") == 0
    transfer(pieces(), ObjectTarget(store, KEY, overwrite=True), PROFILE)
    assert read(store) == DATA
    store.delete(KEY)
    late = FaultyStore(store, scripted_faults({("put_part", 5): Hook(lambda _: _put(store, b"late"))}))
    with pytest.raises(KeyConflict):
        transfer(pieces(), ObjectTarget(late, KEY), PROFILE)
    assert read(store) == b"late"


def test_a_checkpoint_of_another_target_is_refused(store: LocalStore):
    """Its upload id means nothing here."""
    journal = Journal()
    with pytest.raises(StoreUnavailable):
        transfer(breaks_after(3000), ObjectTarget(store, KEY), PROFILE, on_checkpoint=journal)
    with pytest.raises(UsageError, match="belongs to"):
        transfer(pieces(), ObjectTarget(store, "another"), PROFILE, journal.load())
    garbage = TransferCheckpoint(session_id="s", upload_session_url="https://example.test/upload")
    with pytest.raises(UsageError, match="not the session"):
        transfer(pieces(), ObjectTarget(store, KEY), PROFILE, garbage)


def test_a_stream_that_outgrows_the_number_of_parts_is_refused(store: LocalStore):
    """With the remedy: larger parts."""
    declare(store, max_parts=4)
    with pytest.raises(Unsupported) as refusal:
        transfer(pieces(), ObjectTarget(store, KEY), PROFILE)
    assert "part_size" in refusal.value.hint
    transfer(pieces(), ObjectTarget(store, KEY, part_size=4096), PROFILE)
    assert read(store) == DATA


def test_a_store_without_multipart_names_the_other_way(tmp_path: Path):
    """Streams of fsspec are targets by themselves."""
    memory = open_store(f"memory://{uuid.uuid4().hex}")
    with pytest.raises(Unsupported) as refusal:
        transfer(pieces(), ObjectTarget(memory, KEY), PROFILE)
    assert "fsspec" in refusal.value.hint
