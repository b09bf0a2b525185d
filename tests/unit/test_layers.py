"""Layers: a directory is sent when its content changed, and comes back from the bucket alone."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from blobflow import ChunkProfile, open_store, read_ref
from blobflow.artifact.leftovers import remove_stages
from blobflow.checksum import crc32c
from blobflow.errors import (
    ArtifactInvalid,
    ArtifactNotFound,
    BlobflowError,
    DestinationNotEmpty,
    DigestMismatch,
    IntegrityError,
    NotFoundError,
    SourceChanged,
    StoreUnavailable,
    TransferBusy,
    Unsupported,
    UploadIncomplete,
    UploadInterrupted,
    UsageError,
)
from blobflow.layers import LayerSync, LayerSyncResult, restoring
from blobflow.layers.format import Codec, encode_seek_table
from blobflow.layers.names import layer_key
from blobflow.layers.remote import RemoteLayer
from blobflow.stores.base import PartMeta, Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import (
    Executable,
    FailBefore,
    FaultyStore,
    Hook,
    Request,
    Tree,
    read_tree,
    scripted_faults,
    write_tree,
)
from blobflow.uploads.intent import SUFFIX, IntentKeeper
from tests.kit import (
    SERIAL,
    SMALL,
    TREE,
    Killed,
    declare,
    dies_at,
    dies_before,
    keys,
    local_store,
    noise,
    sized,
    watched,
)
from tests.servers import S3Endpoint

NAME = "web-1"
FRAME = 3000
"""Small, and no multiple of anything: parts begin inside of frames."""


class Host:
    """A machine with a home of its own, and a store that all of them share."""

    def __init__(self, path: Path, store: Store, name: str = "host", **options: Any) -> None:
        self.home = path / name
        self.store = watched(store)
        self.options: dict[str, Any] = {"profile": SERIAL, "frame_size": FRAME, **options}

    @property
    def layers(self) -> LayerSync:
        """As a fresh process sees them."""
        return LayerSync(self.store, home=self.home, **self.options)

    def sync(self, source: Path, name: str = NAME) -> LayerSyncResult:
        return self.layers.sync(name, source)

    def sent(self, operation: str = "put_part") -> int:
        return self.store.count(operation)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return local_store(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", TREE)


@pytest.fixture
def host(tmp_path: Path, store: LocalStore) -> Host:
    return Host(tmp_path, store)


@pytest.fixture
def another(tmp_path: Path, store: LocalStore) -> Host:
    return Host(tmp_path, store, "another host")


def dying(host: Host, source: Path, faults: Callable[[Request], Any]) -> FaultyStore:
    """A sync whose process dies; what it had sent is in the log."""
    dead = FaultyStore(host.store.store, faults)
    with pytest.raises(Killed):
        LayerSync(dead, home=host.home, **host.options).sync(NAME, source)
    return dead


def leftovers(store: Store) -> list[str]:
    return [*(upload.key for upload in store.list_uploads()), *(key for key in keys(store) if key.endswith(SUFFIX))]


# Format


@pytest.mark.seed("3.8")
def test_stock_tools_read_a_layer(host: Host, source: Path, tmp_path: Path):
    """`zstd -dc | tar x` gives an artifact directory whose data is the source; zstd finds the frames of the table."""
    result = host.sync(source)
    layer = tmp_path / "store" / result.key
    (tmp_path / "out").mkdir()
    unpack = f"zstd -dc '{layer}' | tar xf - -C '{tmp_path / 'out'}'"
    subprocess.run(["sh", "-c", unpack], check=True)
    assert read_tree(tmp_path / "out" / "data") == read_tree(source)
    assert sorted(os.listdir(tmp_path / "out")) == ["INDEX.parquet", "MANIFEST.json", "data"]
    listed = subprocess.run(["zstd", "-lv", layer], check=True, capture_output=True, text=True).stdout
    assert f"# Zstandard Frames: {result.layer.frames}" in listed
    assert "# Skippable Frames: 1" in listed


@pytest.mark.seed("3.8")
def test_the_same_content_gives_the_same_bytes(host: Host, source: Path, tmp_path: Path):
    """On another host, at another time, whatever the workers do; another level gives others under the same name."""
    first = host.sync(source)
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    os.utime(copy / "big.bin", (1, 1))
    elsewhere = Host(tmp_path, LocalStore(tmp_path / "store 2"), "b", profile=SMALL)
    second = elsewhere.sync(copy)
    strong = Host(tmp_path, LocalStore(tmp_path / "store 3"), "c", level=19).sync(copy)
    assert first.digest == second.digest == strong.digest
    layers = [(tmp_path / name / first.key).read_bytes() for name in ("store", "store 2", "store 3")]
    assert layers[0] == layers[1] != layers[2]
    assert first.layer == second.layer
    assert strong.layer.codec.endswith("level 19")


def test_a_level_that_zstd_does_not_have_is_refused(store: LocalStore, tmp_path: Path):
    """Before anything else happens."""
    with pytest.raises(UsageError, match="no level 23"):
        LayerSync(store, home=tmp_path, level=23)


@pytest.mark.seed("3.9")
def test_the_key_is_the_digest_and_the_parts_are_counted(store: LocalStore, source: Path, tmp_path: Path):
    """Nothing: one request. As large as a part: one. One byte more: two."""
    (empty := tmp_path / "empty").mkdir()
    host = Host(tmp_path, store, profile=ChunkProfile.custom(1 << 20, 1))
    result = host.sync(empty)
    assert (result.parts, host.sent(), host.sent("create_multipart")) == (1, 0, 0)
    size = Host(tmp_path, LocalStore(tmp_path / "measured"), "m").sync(source).layer.object_size
    for part_size, parts in ((size, 1), (size - 1, 2)):
        fresh = Host(
            tmp_path, LocalStore(tmp_path / f"store {parts}"), str(parts), profile=ChunkProfile.custom(part_size, 1)
        )
        result = fresh.sync(source)
        assert (result.parts, fresh.sent(), result.layer.object_size) == (parts, parts, size)
        assert result.key == result.digest.removeprefix("sha256:") + ".tar.zst"


@pytest.mark.seed("3.13", "3.10")
def test_the_order_of_a_sync(host: Host, source: Path):
    """Create, intent, parts, complete, metadata, ref: whoever sees the later one finds the earlier ones."""
    result = host.sync(source)
    stem = result.key.removesuffix(".tar.zst")
    wrote = [
        (request.operation, request.key.replace(stem, "D"))
        for request in host.store.log
        if request.operation in {"put", "create_multipart", "put_part", "complete_multipart"}
        if not request.key.endswith(SUFFIX)
    ]
    parts = [("put_part", "D.tar.zst")] * result.parts
    assert wrote == [
        *[("create_multipart", "D.tar.zst"), *parts, ("complete_multipart", "D.tar.zst")],
        *[("put", "D.layer.json"), ("put", "containers/web-1.ref.json")],
    ]
    created = [request.operation for request in host.store.log].index("create_multipart")
    after = host.store.log[created + 1]
    assert (after.operation, after.key) == ("put", result.key + SUFFIX)
    assert leftovers(host.store) == []


# Skipping, sharing


@pytest.mark.seed("3.7")
def test_an_unchanged_directory_sends_nothing(host: Host, another: Host, source: Path):
    """The second sync writes nothing, on this host or on another one."""
    first = host.sync(source)
    for one in (host, another):
        before = len(one.store.log)
        result = one.sync(source)
        assert result.status == "unchanged"
        assert (result.digest, result.layer, result.bytes_sent) == (first.digest, first.layer, 0)
        assert {request.operation for request in one.store.log[before:]} <= {"get", "head"}


@pytest.mark.seed("3.5")
def test_changes_are_those_of_content(host: Host, source: Path):
    """Names, bytes, execute bits and empty directories; times are none."""
    with pytest.raises(NotFoundError, match="no container"):
        host.layers.check_for_changes(NAME, source)
    host.sync(source)
    os.utime(source / "big.bin", (1, 1))
    assert not host.layers.check_for_changes(NAME, source)

    def changed(change: Callable[[], object]) -> bool:
        change()
        found = host.layers.check_for_changes(NAME, source)
        host.sync(source)
        return found

    assert changed(lambda: (source / "empty").rename(source / "renamed"))
    assert changed(lambda: (source / "renamed").write_text("x"))
    assert changed(lambda: (source / "renamed").chmod(0o755))
    assert changed((source / "empty dir").rmdir)


@pytest.mark.seed("W3.10")
def test_two_containers_of_one_content_are_one_upload(host: Host, another: Host, source: Path, tmp_path: Path):
    """The second one finds the layer by its digest, and moves its own ref only."""
    first = host.sync(source)
    shutil.copytree(source, tmp_path / "copy")
    second = another.sync(tmp_path / "copy", "web-2")
    assert (second.status, second.key, another.sent()) == ("shared", first.key, 0)
    assert [r.key for r in another.store.log if r.operation == "put"] == ["containers/web-2.ref.json"]


@pytest.mark.seed("W3.10")
def test_two_at_once_are_one_upload(host: Host, another: Host, source: Path):
    """While one host sends, the other is told to wait; after that it finds the layer."""
    other: list[BlobflowError] = []

    def meanwhile(_: Request) -> None:
        with pytest.raises(TransferBusy) as busy:
            another.sync(source, "web-2")
        other.append(busy.value)

    host.store.faults = scripted_faults({("put_part", 3): Hook(meanwhile)})
    result = host.sync(source)
    assert other[0].retryable
    assert another.sync(source, "web-2").status == "shared"
    assert (host.sent(), another.sent()) == (result.parts, 0)


def test_a_store_without_multipart_uploads_gets_whole_layers(source: Path, tmp_path: Path):
    """Compressed once for the size and once to be sent: no staging file there either."""
    fsspec = open_store(f"memory://{tmp_path.name}")
    result = Host(tmp_path, fsspec).sync(source)
    assert (result.status, result.parts) == ("uploaded", 1)
    Host(tmp_path, fsspec, "other").layers.restore(NAME, tmp_path / "back")
    assert read_tree(tmp_path / "back") == read_tree(source)


@pytest.mark.seed("3.1")
@pytest.mark.parametrize("server", ["moto", pytest.param("rgw", marks=pytest.mark.rgw)])
def test_on_s3_with_endpoint_region_and_addressing(
    server: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """The same layer, with its content type, in a bucket that is reached by path."""
    endpoint: S3Endpoint = request.getfixturevalue(f"{server}_s3")
    bucket = endpoint.new_bucket()
    where: dict[str, Any] = {
        "endpoint_url": endpoint.endpoint_url,
        "region": endpoint.region,
        "access_key_id": endpoint.access_key_id,
        "secret_access_key": endpoint.secret_access_key,
        "addressing_style": "path",
    }
    (source / "large").write_bytes(noise(6 << 20))
    with closing(open_store(f"s3://{bucket}/some/layers", **where)) as s3:
        host = Host(tmp_path, s3, profile=ChunkProfile.custom(5 << 20, 1, workers=2), frame_size=None)
        result = host.sync(source)
        assert (result.parts, host.sync(source).status) == (2, "unchanged")
        found = endpoint.client.head_object(Bucket=bucket, Key=f"some/layers/{result.key}")
        assert (found["ContentType"], found["ContentLength"]) == ("application/zstd", result.layer.object_size)
        LayerSync(s3, home=tmp_path / "empty").restore(NAME, tmp_path / "back")
        assert read_tree(tmp_path / "back") == read_tree(source)
        assert leftovers(s3) == []


# The stat cache


def later() -> float:
    """Ten seconds from now: what was written is no longer fresh."""
    return time.time() + 10


def test_an_unchanged_check_reads_no_file(store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stats decide; one changed file is the only one that is read."""
    directories = sized(1000, 10)
    tree: Tree = {f"d{i}": {f"f{j}": f"{i} {j}" for j in range(100)} for i in range(directories)}
    source = write_tree(tmp_path / "source", tree)
    host = Host(tmp_path, store, clock=later)
    assert host.sync(source).files_read == 100 * directories
    reads: list[Path] = []
    readv = os.readv
    monkeypatch.setattr(
        os, "readv", lambda fd, into: (reads.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), readv(fd, into))[1]
    )
    assert not host.layers.check_for_changes(NAME, source)
    assert host.sync(source).files_read == 0
    assert reads == []
    (source / "d7" / "f7").write_text("other")
    assert host.layers.check_for_changes(NAME, source)
    assert set(reads) == {source / "d7" / "f7"}


def test_a_fresh_file_is_not_believed(host: Host, source: Path):
    """Written in the tick in which it was hashed, and again in the same tick: it is read a second time."""
    assert host.sync(source).files_read == 5
    assert host.sync(source).files_read == 5
    host.options["clock"] = later
    assert host.sync(source).files_read == 5
    assert host.sync(source).files_read == 0


@pytest.mark.parametrize("change", ["mtime restored", "replaced", "swapped"])
def test_no_trick_of_times_hides_a_change(change: str, host: Host, source: Path):
    """The ctime, which nobody can set, and the inode tell as well."""
    host.options["clock"] = later
    (source / "other").write_bytes(noise(20_000, 9))
    host.sync(source)
    big, other = source / "big.bin", source / "other"
    before = big.stat()
    if change == "swapped":
        other.rename(source / "aside")
        big.rename(other)
        (source / "aside").rename(big)
    elif change == "replaced":
        (source / "new").write_bytes(noise(20_000, 5))
        (source / "new").rename(big)
    else:
        big.write_bytes(noise(20_000, 5))
    os.utime(big, ns=(before.st_atime_ns, before.st_mtime_ns))
    host.options["clock"] = lambda: later() + 10
    assert host.layers.check_for_changes(NAME, source)


@pytest.mark.parametrize("damage", ["gone", "ctimes", "index", "manifest"])
def test_a_damaged_cache_costs_a_reading_and_nothing_else(damage: str, host: Host, source: Path):
    """Whatever is wrong with it."""
    host.options["clock"] = later
    host.sync(source)
    (cache,) = (host.home / "stats").iterdir()
    if damage == "gone":
        shutil.rmtree(cache)
    else:
        name = {"ctimes": "CTIMES", "index": "artifact/INDEX.parquet", "manifest": "artifact/MANIFEST.json"}[damage]
        (cache / name).write_bytes(b"damaged!")
    result = host.sync(source)
    assert (result.status, result.files_read) == ("unchanged", 5)


def test_a_file_that_changes_while_it_is_sent_is_caught(host: Host, source: Path):
    """Nothing is published, and the next sync sends it as it is then."""

    def write(_: Request) -> None:
        (source / "big.bin").write_bytes(noise(20_000, 7))

    host.store.faults = scripted_faults({("put_part", 1): Hook(write)})
    with pytest.raises(SourceChanged, match=r"big\.bin") as failure:
        host.sync(source)
    assert "mode" not in failure.value.hint  # which a sync does not have
    assert not any(key.endswith((".tar.zst", ".layer.json", ".ref.json")) for key in keys(host.store))
    host.store.faults = lambda _: None
    assert host.sync(source).status == "uploaded"
    assert leftovers(host.store) == []


# Resume


@pytest.mark.seed("3.6", "3.18", "W3.4", "3.19")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_killed_sync_is_continued(elsewhere: bool, host: Host, another: Host, source: Path, tmp_path: Path):
    """From any part on, here or on a host that knows nothing: only missing parts are sent, byte-equal, one result."""
    unbroken = Host(tmp_path, LocalStore(tmp_path / "unbroken"), "u").sync(source)
    expected = (tmp_path / "unbroken" / unbroken.key).read_bytes()
    for part in range(1, unbroken.parts + 1):
        store = LocalStore(tmp_path / f"store {part}")
        host.store, another.store = watched(store), watched(store)
        shutil.rmtree(host.home, ignore_errors=True)
        shutil.rmtree(another.home, ignore_errors=True)
        dying(host, source, dies_before("put_part", part))
        second = another if elsewhere else host
        result = second.sync(source)
        assert second.sent() == unbroken.parts - part + 1
        assert (result.parts, result.parts_resumed) == (unbroken.parts, part - 1)
        assert result.bytes_sent + result.bytes_resumed == len(expected)
        assert (result.status, result.digest, result.layer) == ("uploaded", unbroken.digest, unbroken.layer)
        assert (store.root / result.key).read_bytes() == expected
        assert (store.root / result.key.replace(".tar.zst", ".layer.json")).exists()
        assert leftovers(store) == []


def test_a_resume_compresses_from_the_first_missing_part(
    host: Host, another: Host, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """What lies before is neither read nor compressed again."""
    frames: list[int] = []
    compress = Codec.compress

    def counted(self: Codec, data: memoryview) -> bytes:
        frames.append(len(data))
        return compress(self, data)

    monkeypatch.setattr(Codec, "compress", counted)
    host.store.faults = scripted_faults({("put_part", 6): FailBefore()})
    with pytest.raises(StoreUnavailable):
        host.sync(source)
    frames.clear()
    result = another.sync(source)
    assert (another.sent(), result.parts_resumed) == (result.parts - 5, 5)
    # The frame in which the sixth part begins is made again, and nothing before it.
    sizes = RemoteLayer.open(another.store, result.key).frame_sizes
    before = next(count for count in range(len(sizes)) if sum(sizes[: count + 1]) > 5 * 4096)
    assert len(frames) == len(sizes) - before > 3


def test_a_checkpoint_behind_costs_compression_and_no_sending(host: Host, another: Host, source: Path):
    """The intent knows fewer frames than the store has parts: these are made again, found equal, and not sent."""
    host.options["profile"] = ChunkProfile.custom(4096, 1000, workers=1)
    dying(host, source, dies_before("put_part", 5))
    result = another.sync(source)
    assert another.sent() == result.parts - 4
    assert (result.parts_resumed, result.bytes_resumed) == (4, 4 * 4096)


@pytest.mark.seed("W3.6")
def test_a_part_that_the_store_damaged_is_sent_again(host: Host, another: Host, store: LocalStore, source: Path):
    """Its CRC32C is not the one that was acknowledged."""

    class Damaged(FaultyStore):
        def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
            parts = super().list_parts(key, upload_id)
            first_time = self.count("list_parts") == 1
            return [part._replace(crc32c=1) if first_time and part.part_number == 2 else part for part in parts]

    dying(host, source, dies_before("complete_multipart", 1))
    another.store = Damaged(store)
    another.sync(source)
    assert another.sent() == 1
    another.layers.restore(NAME, source.parent / "back")
    assert read_tree(source.parent / "back") == read_tree(source)


@pytest.mark.seed("W3.6")
def test_parts_without_checksums_are_known_by_their_md5(host: Host, another: Host, store: LocalStore, source: Path):
    """A store that tells none, as Ceph, and an intent that remembers none: the e_tag decides, or the part is sent."""

    class Silent(FaultyStore):
        def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
            data = (store.root / ".blobflow" / "uploads").glob("*/*")
            assert list(data)
            return [part._replace(crc32c=None) for part in super().list_parts(key, upload_id)]

    host.options["profile"] = ChunkProfile.custom(4096, 1000, workers=1)
    host.store = Silent(store)
    dead = Silent(store, dies_before("put_part", 5))
    with pytest.raises(Killed):
        LayerSync(dead, home=host.home, **host.options).sync(NAME, source)
    another.store = Silent(store)
    result = another.sync(source)
    assert another.sent() == result.parts  # the local store's e_tags are no MD5s
    another.layers.restore(NAME, source.parent / "back")


@pytest.mark.seed("W3.3")
def test_the_stores_list_is_the_truth(host: Host, another: Host, store: LocalStore, source: Path):
    """Whatever intent and database say was acknowledged: what the store does not list is sent."""

    class Forgetful(FaultyStore):
        def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
            parts = super().list_parts(key, upload_id)
            return [] if self.count("list_parts") == 1 else parts

    dying(host, source, dies_before("put_part", 6))
    another.store = Forgetful(store)
    result = another.sync(source)
    assert (another.sent(), result.parts_resumed) == (result.parts, 0)


@pytest.mark.seed("3.16")
@pytest.mark.parametrize("source_is", ["the same", "changed", "gone"])
def test_nothing_missing_is_just_completed(source_is: str, host: Host, source: Path):
    """Killed before Complete: no part is sent again, and the old layer needs no source to be finished."""
    dead = dying(host, source, dies_before("complete_multipart", 1))
    pending = host.layers.state(NAME).pending
    assert pending is not None
    if source_is == "changed":
        (source / "more").write_text("more")
    elif source_is == "gone":
        shutil.rmtree(source)
    if source_is == "gone":
        with pytest.raises(NotFoundError):
            host.sync(source)
        assert host.sent() == 0
    else:
        result = host.sync(source)
        assert (result.parts_resumed, host.sent()) == (
            (result.parts, 0) if source_is == "the same" else (0, result.parts)
        )
    assert dead.count("put_part")
    assert RemoteLayer.find(host.store, pending.key) is not None
    assert host.layers.state(NAME).pending is None
    assert leftovers(host.store) == []


@pytest.mark.seed("3.11")
def test_the_pending_upload_is_saved_before_its_first_part(host: Host, source: Path):
    """In the bucket for all hosts, in the database for this one: id, key, digest, part size, path, start."""
    dying(host, source, dies_before("put_part", 1))
    (upload,) = host.store.list_uploads()
    pending = host.layers.state(NAME).pending
    assert pending is not None
    assert (pending.upload_id, pending.key, pending.path) == (upload.upload_id, upload.key, str(source))
    assert (pending.part_size, layer_key(pending.digest)) == (4096, upload.key)
    intent = IntentKeeper(host.store, upload.key).load()
    assert intent is not None
    assert (intent.upload_id, intent.part_size) == (upload.upload_id, 4096)


@pytest.mark.seed("3.17")
def test_a_source_that_is_gone_ends_its_upload(host: Host, source: Path):
    """The upload is aborted, the note is gone, and the error says what to do; then it begins anew."""
    dying(host, source, dies_before("put_part", 4))
    tree = read_tree(source)
    shutil.rmtree(source)
    with pytest.raises(UploadInterrupted) as interrupted:
        host.sync(source)
    assert interrupted.value.path == str(source)
    assert leftovers(host.store) == []
    assert host.layers.state(NAME).pending is None
    write_tree(source, tree)
    result = host.sync(source)
    assert (result.status, result.parts_resumed, host.sent()) == ("uploaded", 0, result.parts)


@pytest.mark.seed("W3.8")
def test_a_changed_directory_is_synced_as_it_is_now(host: Host, source: Path):
    """The upload of what it was is aborted, not mixed in."""
    dying(host, source, dies_before("put_part", 4))
    (source / "big.bin").write_bytes(noise(21_000, 8))
    result = host.sync(source)
    assert (result.status, result.parts_resumed) == ("uploaded", 0)
    assert leftovers(host.store) == []
    host.layers.restore(NAME, source.parent / "back")
    assert read_tree(source.parent / "back") == read_tree(source)


@pytest.mark.seed("W3.8")
def test_after_a_finished_upload_the_current_directory_follows(host: Host, source: Path):
    """The old one was complete but for its last request; the ref names the new one in the end."""
    dying(host, source, dies_before("complete_multipart", 1))
    old = host.layers.state(NAME).pending
    (source / "more").write_text("more")
    new = host.sync(source)
    ref = read_ref(host.store, "containers/web-1")
    assert old is not None
    assert ref is not None
    assert (ref.key == new.key, new.key == old.key) == (True, False)


@pytest.mark.seed("W3.5")
@pytest.mark.parametrize("fate", ["aborted", "completed", "answer lost"])
def test_a_vanished_upload_is_settled_by_the_object(fate: str, host: Host, store: LocalStore, source: Path):
    """Gone for good: it begins anew. Completed by somebody, or by a lost answer: only the metadata is missing."""
    if fate == "answer lost":

        class Deaf(FaultyStore):
            def complete_multipart(self, key: str, upload_id: str, parts: Any) -> Any:
                super().complete_multipart(key, upload_id, parts)
                raise Killed

        with pytest.raises(Killed):
            LayerSync(Deaf(store), home=host.home, **host.options).sync(NAME, source)
    else:
        dying(host, source, dies_before("put_part", 4) if fate == "aborted" else dies_before("complete_multipart", 1))
        (upload,) = store.list_uploads()
        if fate == "aborted":
            store.abort_multipart(upload.key, upload.upload_id)
        else:
            store.complete_multipart(upload.key, upload.upload_id, store.list_parts(upload.key, upload.upload_id))
    result = host.sync(source)
    assert (result.status, host.sent()) == ("uploaded", result.parts if fate == "aborted" else 0)
    assert leftovers(store) == []
    host.layers.restore(NAME, source.parent / "back")


@pytest.mark.seed("3.11")
def test_an_upload_that_nobody_noted_is_found(host: Host, store: LocalStore, source: Path):
    """Killed between Create and the intent: the next sync finds the id and ends it."""
    dying(host, source, dies_before("put", 1))
    assert len(store.list_uploads()) == 1
    assert host.sync(source).status == "uploaded"
    assert leftovers(store) == []


@pytest.mark.seed("3.12", "W3.1")
def test_a_gap_is_refused_before_completion(host: Host, store: LocalStore, source: Path):
    """The store lost a part after its acknowledgement: no Complete is sent, and the next sync heals it."""

    class Losing(FaultyStore):
        def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
            parts = super().list_parts(key, upload_id)
            return [part for part in parts if part.part_number != 3]

    host.store = Losing(store)
    with pytest.raises(UploadIncomplete, match="part 3"):
        host.sync(source)
    assert host.sent("complete_multipart") == 0
    host.store = watched(store)
    assert host.sync(source).status == "uploaded"


@pytest.mark.parametrize("change", [{"level": 4}, {"frame_size": 2999}, {"codec": "zstd 0.9.9 level 3"}])
def test_another_codec_begins_anew(change: dict[str, Any], host: Host, another: Host, source: Path):
    """Its bytes would not fit to those that are there; the old upload is aborted."""
    dying(host, source, dies_before("put_part", 4))
    layers = another.layers
    if "codec" in change:
        layers.codec.name = change["codec"]
    else:
        another.options |= change
        layers = another.layers
    result = layers.sync(NAME, source)
    assert (result.parts_resumed, another.sent()) == (0, result.parts)
    assert leftovers(another.store) == []
    another.layers.restore(NAME, source.parent / "back")
    assert read_tree(source.parent / "back") == read_tree(source)


@pytest.mark.seed("W3.2")
def test_short_reads_do_not_change_a_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system that gives a few bytes per read."""
    whole = Host(tmp_path, LocalStore(tmp_path / "a"), "a").sync(source)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: preadv(fd, [into[0][:64]], offset))
    capped = Host(tmp_path, LocalStore(tmp_path / "b"), "b").sync(source)
    assert capped.layer == whole.layer
    assert (tmp_path / "a" / whole.key).read_bytes() == (tmp_path / "b" / whole.key).read_bytes()


@pytest.mark.seed("W3.7")
def test_limits_are_kept_before_anything_is_sent(store: LocalStore, source: Path, tmp_path: Path):
    """Parts grow with the layer; what cannot fit is refused without a request that writes."""
    declare(store, max_parts=3, min_part_size=1)
    host = Host(tmp_path, store)
    assert host.sync(source).parts == 1
    declare(store, max_part_size=5000, max_parts=2)
    (source / "more").write_bytes(noise(9000, 4))
    before = len(host.store.log)
    with pytest.raises(Unsupported, match="do not fit"):
        host.sync(source)
    assert {request.operation for request in host.store.log[before:]} <= {"get", "head"}


def test_a_sync_dies_at_any_request(source: Path, tmp_path: Path):
    """Wherever it dies: never a ref without a whole layer, and the next sync ends well and leaves nothing behind."""
    coarse: dict[str, Any] = {"profile": ChunkProfile.custom(12_288, 1, workers=1), "frame_size": 13_000}
    counted = Host(tmp_path, LocalStore(tmp_path / "count"), "count", **coarse)
    counted.sync(source)
    count = len(counted.store.log)
    for number in range(1, count + 1):
        store = LocalStore(tmp_path / f"s{number}")
        host = Host(tmp_path, store, f"h{number}", **coarse)
        dying(host, source, dies_at(number))
        ref = read_ref(store, "containers/web-1")
        assert ref is None or RemoteLayer.find(store, ref.key) is not None
        state = host.layers.state(NAME) if ref else host.layers.register(NAME)
        assert state.remote_digest is None or RemoteLayer.find(store, layer_key(state.remote_digest)) is not None
        host.sync(source)
        host.layers.restore(NAME, tmp_path / f"back{number}")
        assert read_tree(tmp_path / f"back{number}") == read_tree(source)
        assert leftovers(store) == [], number
        assert host.layers.state(NAME).pending is None


# Restore


@pytest.mark.seed("W3.9", "3.20")
def test_an_empty_host_restores_from_the_bucket_alone(host: Host, another: Host, source: Path):
    """Metadata first, then ranges of the layer; execute bits come along, and the state knows afterwards."""
    write_tree(source / "bin", {"run": Executable("#!/bin/sh\n")})
    synced = host.sync(source)
    back = source.parent / "deep" / "back"
    result = another.layers.restore(NAME, back)
    assert read_tree(back) == read_tree(source)
    assert (result.status, result.digest, result.layer) == ("restored", synced.digest, synced.layer)
    ranges = [r.operation for r in another.store.log if r.key == synced.key]
    assert ranges[0] == "head"
    assert ranges.count("get_range") > 3
    assert another.layers.state(NAME).local_digest == synced.digest
    assert not another.layers.check_for_changes(NAME, back)
    assert os.listdir(back.parent) == ["back"]


@pytest.mark.seed("3.20", "3.14")
@pytest.mark.parametrize("where", ["frame", "head", "table", "meta", "meta of another", "swapped"])
def test_wrong_bytes_leave_the_target_untouched(where: str, host: Host, another: Host, store: LocalStore, source: Path):
    """Whatever is wrong is found, typed, and nothing is at the destination."""
    result = host.sync(source)
    layer, meta = store.root / result.key, store.root / result.key.replace(".tar.zst", ".layer.json")
    data = bytearray(layer.read_bytes())
    if where == "swapped":
        write_tree(other := source.parent / "other", {**TREE, "big.bin": noise(20_000, 77)})
        foreign = host.sync(other, "web-2")
        data[:] = (store.root / foreign.key).read_bytes()
    elif where.startswith("meta"):
        text = meta.read_text()
        meta.write_text(
            text.replace('"frames": ', '"frames": 1') if where == "meta" else text.replace(result.digest[7:], "0" * 64)
        )
    else:
        data[{"frame": len(data) // 2, "head": 30, "table": -20}[where]] ^= 1
    layer.write_bytes(data)
    back = source.parent / "back"
    with pytest.raises(IntegrityError):
        another.layers.restore(NAME, back)
    assert not back.exists()
    assert another.layers.list() == [] or where in {"frame", "head", "table", "swapped"}


def test_a_lying_layer_is_held_to_its_members(host: Host, another: Host, store: LocalStore, source: Path):
    """Frames, table and metadata that fit each other do not help: the members have SHA-256s."""
    result = host.sync(source)
    layer = RemoteLayer.open(store, result.key)
    sizes, plan = layer.frame_sizes, result.layer.plan
    data, codec = (store.root / result.key).read_bytes(), Codec(3)
    number = len(plan) // 2
    start = sum(sizes[: number - 1])
    tar = bytearray(plan.frame(number).length)
    layer.artifact().store.get_range_into(
        result.key, plan.frame(number).offset, memoryview(tar), e_tag=layer.object.e_tag
    )
    tar[100] ^= 1
    frame = codec.compress(tar)
    lie = data[:start] + frame + data[start + sizes[number - 1] : sum(sizes)]
    sizes[number - 1] = len(frame)
    table = encode_seek_table(sizes, plan)
    store.put(result.key, lie + table)
    meta = result.layer.model_copy(update={"object_size": len(lie + table), "seek_table_crc32c": crc32c(table)})
    store.put(result.key.replace(".tar.zst", ".layer.json"), meta.encode())
    with pytest.raises((DigestMismatch, ArtifactInvalid)):
        another.layers.restore(NAME, source.parent / "back")
    assert not (source.parent / "back").exists()


def test_a_restore_replaces_an_earlier_one_in_one_step(host: Host, another: Host, source: Path):
    """A reader that holds the old directory keeps it whole; the path shows the old or the new, never nothing."""
    host.sync(source)
    back = source.parent / "back"
    another.layers.restore(NAME, back)
    assert another.layers.restore(NAME, back).status == "unchanged"
    old = os.open(back, os.O_RDONLY)
    (source / "more").write_text("more")
    (source / "big.bin").unlink()
    host.sync(source)
    seen: set[bool] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(back.is_dir())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert another.layers.restore(NAME, back).status == "restored"
    finally:
        done.set()
        looking.join()
        os.close(old)
    assert seen == {True}
    assert read_tree(back) == read_tree(source)
    assert [name for name in os.listdir(back.parent) if name.startswith(".blobflow")] == []
    assert len(another.layers.state(NAME).restored) == 1


def test_what_was_changed_since_is_not_replaced_unasked(host: Host, another: Host, source: Path):
    """Neither an earlier restore that somebody wrote into, nor anything else; `overwrite` replaces both."""
    host.sync(source)
    back, foreign = source.parent / "back", write_tree(source.parent / "foreign", {"a": "b"})
    another.layers.restore(NAME, back)
    (back / "mine").symlink_to("nothing")
    with pytest.raises(DestinationNotEmpty, match="was changed since"):
        another.layers.restore(NAME, back)
    (back / "mine").unlink()
    (back / "mine").write_text("mine")
    with pytest.raises(DestinationNotEmpty, match="was changed since"):
        another.layers.restore(NAME, back)
    with pytest.raises(DestinationNotEmpty):
        another.layers.restore(NAME, foreign)
    assert ((back / "mine").exists(), read_tree(foreign)) == (True, {"a": b"b"})
    for dest in (back, foreign):
        assert another.layers.restore(NAME, dest, overwrite=True).status == "restored"
        assert read_tree(dest) == read_tree(source)
    (link := source.parent / "link").symlink_to(foreign)
    with pytest.raises(DestinationNotEmpty):
        another.layers.restore(NAME, link, overwrite=True)


@pytest.mark.parametrize("moment", ["while it is fetched", "before the exchange", "after the exchange"])
@pytest.mark.parametrize("change", ["new", "same size", "excluded"])
def test_what_is_written_during_a_restore_is_kept(
    moment: str, change: str, host: Host, another: Host, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """Compared again right before the exchange, and once more before the old tree is removed: it is never lost."""
    host.sync(source)
    back = source.parent / "back"
    another.layers.restore(NAME, back)
    (source / "more").write_text("more")
    host.sync(source)
    exchange = restoring.exchange

    def write(directory: Path) -> None:
        name = {"new": "mine", "same size": "big.bin", "excluded": "mine.tmp"}[change]
        (directory / name).write_bytes(b"x" * (directory / "big.bin").stat().st_size)

    def exchanged(one: Path, other: Path) -> None:
        if moment == "before the exchange":
            write(other)
        exchange(one, other)
        if moment == "after the exchange":  # by a process that has the directory open
            write(one)

    def fetched(request: Request) -> Hook | None:
        writes = moment == "while it is fetched" and (request.operation, request.number) == ("get_range", 8)
        return Hook(lambda _: write(back)) if writes else None

    monkeypatch.setattr(restoring, "exchange", exchanged)
    store = FaultyStore(another.store.store, fetched)
    layers = LayerSync(store, home=another.home, exclude=("*.tmp",), **another.options)
    if moment == "while it is fetched":
        with pytest.raises(DestinationNotEmpty, match="was changed since"):
            layers.restore(NAME, back)
        kept = back
    else:
        result = layers.restore(NAME, back)
        assert read_tree(back) == read_tree(source)
        assert result.kept == (kept := back.with_name("back.replaced-1"))
    name = {"new": "mine", "same size": "big.bin", "excluded": "mine.tmp"}[change]
    assert set((kept / name).read_bytes()) == {ord("x")}
    assert [path for path in back.parent.iterdir() if path.name.startswith(".blobflow")] == [] or kept == back


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("changed", [True, False])
def test_a_killed_restore_leaves_a_tree_that_is_compared_before_it_is_removed(
    changed: bool, can_exchange: bool, host: Host, another: Host, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed after the exchange, or between the two renames that stand for it; the next restore keeps what differs."""
    host.sync(source)
    back = source.parent / "back"
    another.layers.restore(NAME, back)
    (source / "more").write_text("more")
    host.sync(source)
    exchange, rename = restoring.exchange, os.rename

    def dies(one: Path, other: Path) -> None:
        if can_exchange:
            exchange(one, other)
        else:
            rename(other, restoring._aside(one))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "exchange", dies)
        with pytest.raises(Killed):
            another.layers.restore(NAME, back)
    [stage] = [path for path in back.parent.iterdir() if path.name.startswith(".blobflow")]
    [old] = [path for path in (stage / "artifact").glob("data*") if not (path / "more").exists()]
    if changed:
        (old / "mine").write_text("mine")
    assert remove_stages(back.parent, idle_since=time.time() + 10) == []
    result = another.layers.restore(NAME, back)
    assert read_tree(back) == read_tree(source)
    left = {path.name for path in back.parent.iterdir() if path.name.startswith((".blobflow", "back"))}
    assert left == ({"back", "back.replaced-1"} if changed else {"back"})
    assert (result.kept is not None) == changed
    assert not changed or (back.with_name("back.replaced-1") / "mine").read_text() == "mine"


def test_a_killed_restore_goes_on(host: Host, another: Host, source: Path):
    """What has landed is not fetched again; until it ends, nothing is at the destination."""
    synced = host.sync(source)
    back = source.parent / "back"
    dead = FaultyStore(another.store.store, dies_before("get_range", 8))
    with pytest.raises(Killed):
        LayerSync(dead, home=another.home, **another.options).restore(NAME, back)
    assert not back.exists()
    result = another.layers.restore(NAME, back)
    assert result.bytes_resumed > 0
    assert result.bytes_received + result.bytes_resumed == synced.layer.tar_size
    assert read_tree(back) == read_tree(source)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_restore_killed_at_the_exchange(
    moment: str, host: Host, another: Host, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """The old tree or the new one is there, whole; the next restore ends with the new one and mixes nothing."""
    host.sync(source)
    back = source.parent / "back"
    another.layers.restore(NAME, back)
    old = read_tree(back)
    (source / "more").write_text("more")
    (source / "big.bin").unlink()
    host.sync(source)
    exchange = restoring.exchange

    def dies(one: Path, other: Path) -> None:
        if moment == "after":
            exchange(one, other)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "exchange", dies)
        with pytest.raises(Killed):
            another.layers.restore(NAME, back)
    assert read_tree(back) == (old if moment == "before" else read_tree(source))
    assert another.layers.restore(NAME, back).status == ("restored" if moment == "before" else "unchanged")
    assert read_tree(back) == read_tree(source)
    # What the killed one left in the stage is not taken for the layer, either.
    assert another.layers.restore(NAME, back, overwrite=True).status == "restored"
    assert read_tree(back) == read_tree(source)


def test_file_systems_without_exchange_use_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both directories change places all the same."""
    one, other = write_tree(tmp_path / "one", {"a": "1"}), write_tree(tmp_path / "other", {"b": "2"})
    restoring.exchange(one, other)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    restoring.exchange(one, other)
    restoring.exchange(one, other)
    assert (read_tree(one), read_tree(other)) == ({"b": b"2"}, {"a": b"1"})


def test_what_is_not_there_is_named(host: Host, source: Path, tmp_path: Path):
    """A container that nobody synced, a directory that is not there, a name that is none, a layer that is gone."""
    with pytest.raises(NotFoundError, match="no container 'nobody'"):
        host.layers.restore("nobody", tmp_path / "back")
    with pytest.raises(NotFoundError, match="does not exist"):
        host.sync(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a container name"):
        host.layers.register("a\nb")
    with pytest.raises(UsageError, match="255"):
        host.layers.register("x" * 256)
    result = host.sync(source)
    host.store.delete(result.key)
    with pytest.raises(ArtifactInvalid, match="no bytes"):
        host.layers.restore(NAME, tmp_path / "back")
    assert host.sync(source).status == "uploaded"
    host.store.delete(result.key.replace(".tar.zst", ".layer.json"))
    with pytest.raises(ArtifactNotFound, match="no complete layer"):
        host.layers.restore(NAME, tmp_path / "back")
    before = host.sent()
    assert host.sync(source).status == "uploaded"
    assert host.sent() == before


# State


@pytest.mark.seed("3.4")
def test_registering_twice_is_registering_once(host: Host, source: Path):
    """The second time nothing is reset, and one row is there."""
    assert host.layers.register(NAME) == host.layers.register(NAME)
    host.sync(source)
    synced = host.layers.state(NAME)
    assert host.layers.register(NAME) == synced
    with closing(sqlite3.connect(host.home / "state.db")) as database:
        assert database.execute("SELECT count(*) FROM blobflow_layers").fetchone() == (1,)


@pytest.mark.seed("3.3", "3.14", "3.21")
def test_states_survive_a_restart_and_a_corrupt_one_blocks_nobody(host: Host, source: Path):
    """Another process sees the same; a row that is damaged is read back from the bucket."""
    result = host.sync(source)
    host.sync(source, "web-2")
    host.layers.register("web-3")
    states = host.layers.list()
    assert [state.container for state in states] == ["web-1", "web-2", "web-3"]
    assert host.layers.list() == states
    state = host.layers.state(NAME)
    assert (state.local_digest, state.remote_digest, state.pending) == (result.digest, result.digest, None)
    assert state.last_sync is not None
    assert sorted(os.listdir(host.home)) == ["state.db", "stats"]
    with closing(sqlite3.connect(host.home / "state.db")) as database, database:
        database.execute("UPDATE blobflow_layers SET state = 'damaged' WHERE name = 'web-1'")
    assert host.layers.state("web-2") == states[1]
    assert [state.container for state in host.layers.list()] == ["web-1", "web-2", "web-3"]
    assert host.layers.state(NAME).remote_digest == result.digest
    assert host.sync(source).status == "unchanged"


@pytest.mark.seed("3.21")
def test_a_lost_database_is_rebuilt_from_the_bucket(host: Host, another: Host, source: Path):
    """The listing brings back every container that was synced, whatever characters its name has."""
    names = ["a/b", "ünï", "web-1", "%2F", ".."]
    for name in names:
        host.sync(source, name)
    known = another.layers.list()
    assert [state.container for state in known] == sorted(names)
    assert {state.remote_digest for state in known} == {host.layers.state(NAME).remote_digest}
    shutil.rmtree(host.home)
    assert [state.container for state in host.layers.list()] == sorted(names)


@pytest.mark.seed("3.2")
def test_two_processes_share_the_state(host: Host, source: Path):
    """Hundreds of writes from each, at once, and none meets a lock."""
    script = (
        "import sys; from pathlib import Path; from blobflow.layers.state import StateTable, SyncState\n"
        "table = StateTable(Path(sys.argv[1]), 'here')\n"
        "for i in range(150):\n"
        "    table.save(SyncState(container=f'{sys.argv[2]}-{i % 10}', path=str(i)))\n"
        "    table.save(SyncState(container='both', path=str(i)))\n"
        "    table.load_all()\n"
    )
    database = host.home / "state.db"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, database, name], stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    assert [(process.wait(60), process.communicate()[1]) for process in processes] == [(0, ""), (0, "")]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM blobflow_layers").fetchone() == (21,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.slow
@pytest.mark.seed("3.2")
def test_hosts_share_a_postgres(postgres_url: str, host: Host, another: Host, source: Path):
    """One row for each container of a store, seen by all hosts; eight threads make the table at once."""
    host.options["state"] = another.options["state"] = postgres_url
    barrier = threading.Barrier(8)
    failed: list[BlobflowError] = []

    def register(i: int) -> None:
        try:
            barrier.wait()
            host.layers.register(f"c{i % 4}")
        except BlobflowError as error:
            failed.append(error)

    threads = [threading.Thread(target=register, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    result = host.sync(source)
    assert another.layers.state(NAME) == host.layers.state(NAME)
    assert another.layers.state(NAME).remote_digest == result.digest
    assert "secret" not in repr(host.layers)


@pytest.mark.seed("3.22")
def test_each_transfer_tells_one_event(host: Host, source: Path, caplog: pytest.LogCaptureFixture):
    """With key, bytes and parts; how it ended, if it failed."""
    caplog.set_level(logging.INFO, "blobflow.layers")
    result = host.sync(source)
    host.layers.restore(NAME, source.parent / "back")
    host.sync(source)
    (upload,) = (record.message for record in caplog.records if record.message.startswith("layer.upload"))
    (restore,) = (record.message for record in caplog.records if record.message.startswith("layer.restore"))
    for event in (upload, restore):
        assert "outcome=done" in event
        assert f"key={result.key} container=web-1 bytes={result.layer.object_size} parts=" in event
    assert f"parts={result.parts}" in upload
    caplog.clear()
    (source / "more").write_text("more")
    host.store.faults = dies_before("put_part", host.sent() + 2)
    with pytest.raises(Killed):
        host.sync(source)
    assert "layer.upload outcome=stopped" in caplog.text
