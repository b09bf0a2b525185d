"""What the local store promises beyond the contract: files, directories, hostile neighbours, the errors of the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from blobflow.checksum import crc32c
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    DiskFull,
    InvalidKey,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
    StoreConfigurationError,
    StoreUnavailable,
    TransferBusy,
    UploadIncomplete,
    UsageError,
)
from blobflow.stores import Body, PutMode
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Fifo, Symlink, read_tree, write_tree

KIB = 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root)


def uploads(root: Path) -> Path:
    return root / ".blobflow" / "uploads"


def leftovers(root: Path) -> list[str]:
    return sorted(os.listdir(root / ".blobflow" / "tmp"))


# Files


def test_an_object_is_a_plain_file(store: LocalStore, root: Path) -> None:
    """`cat <root>/<key>` gives the object, and nothing else lies beside it."""
    store.put("orders/2026.tar", b"payload")
    assert (root / "orders" / "2026.tar").read_bytes() == b"payload"
    assert sorted(os.listdir(root)) == [".blobflow", "orders"]
    assert leftovers(root) == []


def test_nothing_is_made_before_the_first_write(store: LocalStore, root: Path) -> None:
    """Looking into a store that does not exist yet makes no directory."""
    assert list(store.list()) == []
    assert store.list_uploads() == []
    assert not store.exists("key")
    store.delete("key")
    store.abort_multipart("key", "0" * 32)
    assert not root.exists()
    store.put("key", b"")
    assert root.is_dir()


def test_the_umask_decides_who_reads(store: LocalStore, root: Path) -> None:
    """Objects have the mode that the umask gives to files."""
    before = os.umask(0o027)
    try:
        store.put("key", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / "key").stat().st_mode) == 0o640


def test_a_file_made_by_hand_is_an_object(store: LocalStore, root: Path) -> None:
    """What an operator copies into the directory can be read, listed and replaced."""
    write_tree(root, {"dir": {"by-hand": "hello"}})
    assert [meta.key for meta in store.list()] == ["dir/by-hand"]
    found = store.get("dir/by-hand", max_bytes=10)
    assert found.data == b"hello"
    store.put("dir/by-hand", b"better", mode=PutMode.UPDATE, e_tag=found.meta.e_tag)


def test_a_file_edited_by_hand_is_another_object(store: LocalStore, root: Path) -> None:
    """An edit in place changes the e_tag, so that a pinned reader notices."""
    meta = store.put("key", b"first")
    with open(root / "key", "r+b") as file:
        file.write(b"other")
    with pytest.raises(ObjectChanged):
        store.get_range("key", 0, 5, e_tag=meta.e_tag)


def test_an_edit_during_a_read_is_noticed(store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is edited in place while a pinned range is read gives no mixture."""
    meta = store.put("key", b"first")
    real = os.preadv

    def edit_then_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        with open(root / "key", "r+b") as file:
            file.write(b"oth")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", edit_then_read)
    with pytest.raises(ObjectChanged):
        store.get_range("key", 0, 5, e_tag=meta.e_tag)


def test_equal_times_and_sizes_are_told_apart(root: Path) -> None:
    """Objects written within one tick of the kernel's clock, over and over one inode, all have their own e_tag."""
    store = LocalStore(root)
    tags: list[str] = []
    for number in range(200):
        tags.append(store.put("key", b"%03d" % number).e_tag)
        store.delete("key")
    assert len(set(tags)) == 200
    inodes = {tag.split("-")[0] for tag in tags}
    assert len(inodes) < 200, "this file system never gives an inode number again: the test shows nothing here"


def test_the_e_tag_carries_the_stores_own_clock(root: Path) -> None:
    """The time in the e_tag is the one that was set, not the kernel's, and it is what `list` and `head` tell."""
    store = LocalStore(root, now_ns=count(1_800_000_000_000_000_001).__next__)
    first = store.put("a", b"x")
    second = store.put("b", b"x")
    assert f"{1_800_000_000_000_000_001:x}" < first.e_tag.split("-")[1] < second.e_tag.split("-")[1]
    assert [meta.e_tag for meta in store.list()] == [first.e_tag, second.e_tag]


# Directories


def test_a_key_cannot_be_below_an_object(store: LocalStore) -> None:
    """`a` and `a/b` exclude each other, and the refusal says so."""
    store.put("a", b"1")
    with pytest.raises(InvalidKey, match="no directory") as refusal:
        store.put("a/b", b"2")
    assert refusal.value.key == "a/b"
    store.put("c/d", b"3")
    for mode in (PutMode.OVERWRITE, PutMode.CREATE):
        with pytest.raises(InvalidKey, match="objects below"):
            store.put("c", b"4", mode=mode)
    assert [meta.key for meta in store.list()] == ["a", "c/d"]


def test_an_empty_directory_is_no_conflict(store: LocalStore, root: Path) -> None:
    """A directory that a writer left when it died gives way to an object."""
    (root / "a").mkdir(parents=True)
    store.put("a", b"1", mode=PutMode.CREATE)
    assert (root / "a").read_bytes() == b"1"


def test_deleting_the_last_object_removes_its_directories(store: LocalStore, root: Path) -> None:
    """Empty directories go with their last object; the root and the others stay."""
    store.put("a/b/c/one", b"")
    store.put("a/two", b"")
    store.delete("a/b/c/one")
    assert os.listdir(root / "a") == ["two"]
    store.delete("a/two")
    assert os.listdir(root) == [".blobflow"]


def test_puts_and_deletes_of_neighbours_do_not_disturb_each_other(store: LocalStore) -> None:
    """While one thread removes a directory's last object, another one's put into that directory succeeds."""
    rounds = 150
    barrier = threading.Barrier(3)

    def churn(name: str) -> None:
        barrier.wait()
        for _ in range(rounds):
            store.put(f"deep/dir/{name}", b"x")
            assert store.get(f"deep/dir/{name}", max_bytes=1).data == b"x"
            store.delete(f"deep/dir/{name}")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(churn, "abc"))
    assert list(store.list()) == []


# Hostile and foreign things in the directory


def test_foreign_things_are_neither_listed_nor_read(store: LocalStore, root: Path, tmp_path: Path) -> None:
    """Links, pipes, names that are not UTF-8 and the store's internals are no objects."""
    write_tree(tmp_path / "outside", {"secret": "s"})
    write_tree(
        root,
        {
            "good": "1",
            "link": Symlink("good"),
            "out": Symlink("../outside"),
            "pipe": Fifo(),
            "new\nline": "2",
            "sub": {".blobflow": {"x": "3"}},
        },
    )
    (root / os.fsdecode(b"latin-\xe9")).write_bytes(b"4")
    store.create_multipart("upload", part_size=1)
    assert [meta.key for meta in store.list()] == ["good"]
    assert list(store.list("out/")) == []
    for key in ("link", "out/secret", "pipe", "out"):
        with pytest.raises(ObjectNotFound):
            store.get(key, max_bytes=10)
        assert not store.exists(key)


def test_writes_do_not_follow_links(store: LocalStore, root: Path, tmp_path: Path) -> None:
    """A link inside the store neither receives an object nor leads out of it."""
    write_tree(tmp_path / "outside", {"victim": "untouched"})
    write_tree(root, {"out": Symlink("../outside"), "file": Symlink("../outside/victim")})
    for key in ("out/victim", "out/new", "file"):
        with pytest.raises(InvalidKey):
            store.put(key, b"evil")
    store.delete("out/victim")
    store.delete("file")
    assert read_tree(tmp_path / "outside") == {"victim": "untouched"}
    assert read_tree(root)["file"] == Symlink("../outside/victim")


def test_a_hostile_upload_id_reaches_nothing(store: LocalStore, root: Path) -> None:
    """Upload ids are names the store made itself; anything else is unknown."""
    write_tree(root, {"elsewhere": {"upload.json": '{"key": "k", "part_size": 1}', "payload": "", "parts.jsonl": ""}})
    for upload_id in ("../../elsewhere", "..", "", "x" * 32):
        store.abort_multipart("k", upload_id)
        with pytest.raises(Exception, match="no upload") as refusal:
            store.list_parts("k", upload_id)
        assert refusal.type.__name__ == "NoSuchUpload"
    assert (root / "elsewhere" / "payload").exists()


# Errors


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EIO, StoreUnavailable),
        (errno.EACCES, StoreConfigurationError),
        (errno.EROFS, StoreConfigurationError),
    ],
)
@pytest.mark.seed("2.14")
def test_the_errors_of_the_disk_are_named(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    """A full or failing disk is a retryable error, a forbidden one is not; both name operation and key."""

    def fail(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    upload_id = store.create_multipart("large", part_size=10)
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(kind, match=os.strerror(code)) as refusal:
        store.put("key", b"data")
    assert (refusal.value.operation, refusal.value.key) == ("put", "key")  # type: ignore[attr-defined]
    with pytest.raises(kind, match=os.strerror(code)) as refusal:
        store.put_part("large", upload_id, 3, Body.of(b"data"))
    assert (refusal.value.operation, refusal.value.key) == ("put_part", "large")  # type: ignore[attr-defined]
    monkeypatch.undo()
    assert store.list_parts("large", upload_id) == []
    assert leftovers(root) == []


def test_the_errors_of_a_source_stay_its_own(store: LocalStore, root: Path) -> None:
    """An OSError of the body's iterator is not taken for one of the store."""

    def chunks() -> Any:
        yield b"some"
        raise FileNotFoundError("source")

    with pytest.raises(FileNotFoundError):
        store.put("key", Body(10, chunks))
    assert leftovers(root) == []


def test_a_body_that_belies_its_checksum_is_refused(store: LocalStore) -> None:
    """Bytes that changed on their way into the store are not stored."""
    with pytest.raises(ChecksumMismatch) as refusal:
        store.put("key", Body(4, lambda: [b"evil"], crc32c(b"good")))
    assert (refusal.value.expected, refusal.value.actual) == (crc32c(b"good"), crc32c(b"evil"))
    upload_id = store.create_multipart("key", part_size=4)
    with pytest.raises(ChecksumMismatch):
        store.put_part("key", upload_id, 1, Body(4, lambda: [b"evil"], crc32c(b"good")))
    assert store.list_parts("key", upload_id) == []


def test_a_stale_handle_is_a_changed_object(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a file replaced by another machine dies under its reader; a pinned reader reads again."""
    meta = store.put("key", b"data")

    def stale(*args: Any) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(ObjectChanged):
        store.get_range("key", 0, 4, e_tag=meta.e_tag)
    with pytest.raises(StoreUnavailable):
        store.get_range("key", 0, 4)


def test_create_is_refused_by_a_file_without_lock(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a file that a stranger makes between the look and the link is not replaced."""
    real_link = os.link

    def slow_link(*args: Any, **options: Any) -> None:
        (root / "key").write_bytes(b"stranger")
        real_link(*args, **options)

    monkeypatch.setattr(os, "link", slow_link)
    with pytest.raises(PreconditionFailed):
        store.put("key", b"mine", mode=PutMode.CREATE)
    assert (root / "key").read_bytes() == b"stranger"


def test_copies_work_where_the_kernel_cannot_copy(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without copy_file_range the bytes are moved by hand, from wherever the kernel stopped."""
    data = os.urandom(3 * KIB * KIB)
    store.put("source", data)
    real_copy = os.copy_file_range
    calls = count()

    def flaky_copy(source: int, target: int, size: int, *offsets: int) -> int:
        if next(calls):
            raise OSError(errno.EXDEV, "cross-device")
        return real_copy(source, target, KIB, *offsets)

    monkeypatch.setattr(os, "copy_file_range", flaky_copy)
    store.copy("source", "target")
    assert store.get("target", max_bytes=len(data)).data == data


# Listings


def test_a_listing_looks_only_where_it_must(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix and start_after leave directories out unread, and entries beyond the first are not read ahead."""
    for key in ("a/1", "a/2", "b/c/3", "b/d/4", "e/5"):
        store.put(key, b"")
    opened: list[str] = []
    real = LocalStore._open_directory

    def spy(self: LocalStore, segments: list[str], **options: Any) -> int:
        opened.append("/".join(segments))
        return real(self, segments, **options)

    monkeypatch.setattr(LocalStore, "_open_directory", spy)

    def visited(listing: Callable[[], object]) -> list[str]:
        opened.clear()
        listing()
        return list(opened)

    assert visited(lambda: list(store.list("b/d"))) == ["b", "b/d"]
    assert visited(lambda: list(store.list(start_after="b/c/3"))) == ["", "b", "b/c", "b/d", "e"]
    assert visited(lambda: next(store.list())) == ["", "a"]


def test_a_file_that_goes_during_a_listing_is_left_out(store: LocalStore, root: Path) -> None:
    """Objects that are deleted while a listing is under way do not break it."""
    for key in ("a", "b", "c/d", "e"):
        store.put(key, b"")
    listing = store.list()
    assert next(listing).key == "a"
    store.delete("b")
    store.delete("c/d")
    assert [meta.key for meta in listing] == ["e"]


# Multipart uploads


def test_a_part_larger_than_the_others_is_refused(store: LocalStore) -> None:
    """A part that would reach into its neighbour is refused before a byte is written."""
    upload_id = store.create_multipart("key", part_size=4)
    second = store.put_part("key", upload_id, 2, Body.of(b"2222"))
    with pytest.raises(UsageError, match="more than the part size 4"):
        store.put_part("key", upload_id, 1, Body.of(b"11111"))
    first = store.put_part("key", upload_id, 1, Body.of(b"1111"))
    store.complete_multipart("key", upload_id, [first, second])
    assert store.get("key", max_bytes=8).data == b"11112222"


def test_a_body_that_lies_does_not_reach_its_neighbour(store: LocalStore) -> None:
    """Bytes beyond the promised size are refused before they are written."""
    upload_id = store.create_multipart("key", part_size=4)
    second = store.put_part("key", upload_id, 2, Body.of(b"2222"))
    with pytest.raises(Exception, match="6 bytes or more instead of 4"):
        store.put_part("key", upload_id, 1, Body(4, lambda: [b"111", b"111"]))
    first = store.put_part("key", upload_id, 1, Body.of(b"1111"))
    store.complete_multipart("key", upload_id, [first, second])
    assert store.get("key", max_bytes=8).data == b"11112222"


def test_only_the_last_part_may_be_smaller(store: LocalStore) -> None:
    """A small part in the middle would leave a hole; complete refuses and the upload stays."""
    upload_id = store.create_multipart("key", part_size=4)
    parts = [store.put_part("key", upload_id, n, Body.of(data)) for n, data in ((1, b"11"), (2, b"22"))]
    with pytest.raises(UploadIncomplete, match="part 1 has 2 bytes instead of 4"):
        store.complete_multipart("key", upload_id, parts)
    parts[0] = store.put_part("key", upload_id, 1, Body.of(b"1111"))
    store.complete_multipart("key", upload_id, parts)
    assert store.get("key", max_bytes=8).data == b"111122"


def test_complete_takes_the_parts_that_were_named(store: LocalStore) -> None:
    """Parts beyond those named are dropped; a part that is not the one named is refused."""
    upload_id = store.create_multipart("key", part_size=4)
    first, second, _ = (store.put_part("key", upload_id, n, Body.of(b"%d" % n * 4)) for n in (1, 2, 3))
    replaced = store.put_part("key", upload_id, 2, Body.of(b"xxxx"))
    with pytest.raises(UploadIncomplete, match="another part 2"):
        store.complete_multipart("key", upload_id, [first, second])
    assert store.complete_multipart("key", upload_id, [first, replaced]).size == 8
    assert store.get("key", max_bytes=8).data == b"1111xxxx"


def test_a_failed_complete_leaves_no_record_without_bytes(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that complete cut off are taken back before, so that the upload never lists what it no longer has."""
    upload_id = store.create_multipart("key", part_size=4)
    parts = [store.put_part("key", upload_id, n, Body.of(b"%d" % n * 4)) for n in (1, 2, 3)]

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(StoreUnavailable, match="complete_multipart 'key'"):
        store.complete_multipart("key", upload_id, parts[:2])
    monkeypatch.undo()
    assert store.list_parts("key", upload_id) == parts[:2]
    parts[2] = store.put_part("key", upload_id, 3, Body.of(b"3333"))
    store.complete_multipart("key", upload_id, parts)
    assert store.get("key", max_bytes=12).data == b"111122223333"


def test_a_torn_record_is_no_part_and_harms_no_other(store: LocalStore, root: Path) -> None:
    """A record that a dying process left half written is ignored, and the next one is not glued to it."""
    upload_id = store.create_multipart("key", part_size=4)
    first = store.put_part("key", upload_id, 1, Body.of(b"1111"))
    with open(uploads(root) / upload_id / "parts.jsonl", "ab") as journal:
        journal.write(b'\n{"part": 2, "size": 4, "crc')
    assert store.list_parts("key", upload_id) == [first]
    second = store.put_part("key", upload_id, 2, Body.of(b"2222"))
    for reader in (store, LocalStore(root)):
        assert reader.list_parts("key", upload_id) == [first, second]


def test_a_record_is_read_only_when_its_line_is_whole(store: LocalStore, root: Path) -> None:
    """A reader that meets a record in the middle of being written sees it the next time."""
    upload_id = store.create_multipart("key", part_size=4)
    line = b'\n{"part": 1, "size": 4, "crc32c": 7}\n'
    journal = uploads(root) / upload_id / "parts.jsonl"
    for end in range(len(line)):
        journal.write_bytes(line[:end])
        assert store.list_parts("key", upload_id) == []
    journal.write_bytes(line)
    assert [(part.part_number, part.size, part.crc32c) for part in store.list_parts("key", upload_id)] == [(1, 4, 7)]


def test_acknowledged_means_durable(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal speaks of a part only after its bytes are on disk, and is on disk itself before the answer."""
    events: list[str] = []
    upload_id = store.create_multipart("key", part_size=4)

    def spy(name: str) -> None:
        real = getattr(os, name)

        def call(fd: int, *args: Any) -> Any:
            events.append(f"{name} {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
            return real(fd, *args)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "write", "fdatasync"):
        spy(name)
    store.put_part("key", upload_id, 1, Body.of(b"1111"))
    assert events == ["pwrite payload", "fdatasync payload", "write parts.jsonl", "fdatasync parts.jsonl"]


def test_a_part_sent_again_with_other_bytes_is_taken_back_first(store: LocalStore, root: Path) -> None:
    """The journal never vouches for a mixture: the old record is revoked before other bytes replace the old ones."""
    upload_id = store.create_multipart("key", part_size=4)
    journal = uploads(root) / upload_id / "parts.jsonl"

    def sizes() -> list[int | None]:
        return [json.loads(line)["size"] for line in journal.read_text().split("\n") if line]

    store.put_part("key", upload_id, 1, Body.of(b"1111"))
    store.put_part("key", upload_id, 1, Body.of(b"1111"))
    assert sizes() == [4, 4], "the same bytes may be vouched for all the time"
    store.put_part("key", upload_id, 1, Body.of(b"other"[:4]))
    assert sizes() == [4, 4, None, 4]


def test_complete_waits_for_a_straggler(root: Path) -> None:
    """A part that is still being written holds complete off, so that nothing is written into a finished object."""
    store = LocalStore(root)
    upload_id = store.create_multipart("key", part_size=4)
    first = store.put_part("key", upload_id, 1, Body.of(b"1111"))
    in_the_middle, go_on = threading.Event(), threading.Event()

    def slow() -> Any:
        yield b"22"
        in_the_middle.set()
        assert go_on.wait(30)
        yield b"22"

    with ThreadPoolExecutor(2) as pool:
        straggler = pool.submit(LocalStore(root).put_part, "key", upload_id, 2, Body(4, slow))
        assert in_the_middle.wait(30)
        impatient = LocalStore(root, straggler_patience_s=0)
        with pytest.raises(TransferBusy) as refusal:
            impatient.complete_multipart("key", upload_id, [first])
        assert refusal.value.retryable
        completed = pool.submit(store.complete_multipart, "key", upload_id, [first])
        assert not store.exists("key")
        go_on.set()
        straggler.result(30)
        completed.result(30)
    assert store.get("key", max_bytes=8).data == b"1111"


def test_the_writers_of_one_part_take_turns(root: Path) -> None:
    """Two processes that send different bytes as the same part leave one of the two, never a mixture."""
    store = LocalStore(root)
    size = 64 * KIB
    upload_id = store.create_multipart("key", part_size=size)

    def send(letter: bytes) -> None:
        for _ in range(5):
            LocalStore(root).put_part("key", upload_id, 1, Body(size, lambda: [letter * KIB] * 64))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(send, (b"a", b"b", b"c")))
    (part,) = store.list_parts("key", upload_id)
    store.complete_multipart("key", upload_id, [part])
    data = store.get("key", max_bytes=size).data
    assert len(set(data)) == 1
    assert crc32c(data) == part.crc32c


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.timeout(30)
def test_a_forked_child_keeps_no_lock_of_its_parent(store: LocalStore) -> None:
    """A child that was forked while a part was written has copies of the descriptors; nobody waits for its end."""
    children: list[int] = []

    def forking() -> Iterator[bytes]:
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
        yield b"part"

    upload_id = store.create_multipart("k", part_size=4)
    try:
        store.put_part("k", upload_id, 1, Body(4, forking))
        part = store.put_part("k", upload_id, 1, Body.of(b"part"))
        store.complete_multipart("k", upload_id, [part])
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert store.get("k", max_bytes=4).data == b"part"


def test_abort_does_not_wait(store: LocalStore, root: Path) -> None:
    """An upload is aborted at once, even while a stopped process holds its lock."""
    upload_id = store.create_multipart("key", part_size=4)
    with open(uploads(root) / upload_id / "upload.json") as guard:
        fcntl.flock(guard, fcntl.LOCK_SH)
        store.abort_multipart("key", upload_id)
    assert store.list_uploads() == []
    assert leftovers(root) == []


def test_leftovers_are_swept(root: Path) -> None:
    """A day after a process died, what it left behind is removed; what is younger stays, and uploads stay."""
    now = 1_800_000_000_000_000_000
    LocalStore(root).create_multipart("key", part_size=1)
    write_tree(root / ".blobflow" / "tmp", {"old": "x", "young": "x", "old-upload": {"payload": "x"}})
    write_tree(uploads(root), {"f" * 32: {"upload.json": "{}"}})
    for name, age_h in (("old", 25), ("old-upload", 25), ("young", 23)):
        then = now - age_h * 3600 * 10**9
        os.utime(root / ".blobflow" / "tmp" / name, ns=(then, then))
    store = LocalStore(root, now_ns=lambda: now)
    store.put("another", b"")
    assert leftovers(root) == ["young"]
    assert [upload.key for upload in store.list_uploads()] == ["key"]
    assert len(os.listdir(uploads(root))) == 1


def test_the_repr_names_the_place(root: Path) -> None:
    """The repr shows the URL."""
    assert repr(LocalStore(root)) == f"<LocalStore {root.as_uri()}>"


def test_a_writer_that_is_stopped_in_the_lock_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Others break its lock; when it goes on, its write is gone, and it is told so."""
    held, go_on = threading.Event(), threading.Event()

    class Stopped(LocalStore):
        def _admit(self, key: str, parent: int, leaf: str, mode: PutMode, e_tag: str | None) -> None:
            super()._admit(key, parent, leaf, mode, e_tag)
            held.set()
            assert go_on.wait(60)

    store = LocalStore(tmp_path)
    first = store.put("k", b"first")
    errors: list[BaseException] = []

    def write() -> None:
        try:
            Stopped(tmp_path).put("k", b"late", mode=PutMode.UPDATE, e_tag=first.e_tag)
        except BlobflowError as error:
            errors.append(error)

    sleeper = threading.Thread(target=write)
    sleeper.start()
    assert held.wait(60)
    try:
        second = store.put("k", b"second", mode=PutMode.UPDATE, e_tag=first.e_tag)
        third = store.put("k", b"third", mode=PutMode.UPDATE, e_tag=second.e_tag)
    finally:
        go_on.set()
        sleeper.join(60)
    assert (store.get("k", max_bytes=10).data, store.head("k").e_tag) == (b"third", third.e_tag)
    assert [type(error) for error in errors] == [StoreUnavailable]
    assert "store.lock_broken" in caplog.text
