"""Upload, verify, download: a whole artifact arrives, or none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest

from blobflow import (
    Artifact,
    ChunkProfile,
    TransferRecord,
    download,
    list_artifacts,
    open_store,
    read_manifest,
    upload,
    verify,
)
from blobflow.artifact import landing
from blobflow.artifact.artifact import write_artifact
from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.checksum import crc32c
from blobflow.coordination.refs import move_ref
from blobflow.errors import (
    ArtifactInvalid,
    ArtifactNotFound,
    BlobflowError,
    ChecksumMismatch,
    DestinationNotEmpty,
    DigestMismatch,
    HostileArtifact,
    IntegrityError,
    InvalidKey,
    InvalidStoreUrl,
    KeyConflict,
    ObjectChanged,
    ReplacementInProgress,
    SizeMismatch,
    SourceChanged,
    TransferBusy,
    UploadIncomplete,
    UsageError,
)
from blobflow.mirror import Snapshot
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Executable, FaultyStore, Hook, Request, Tree, read_tree, write_tree
from blobflow.transport import ProgressEvent, begin_download, copy_artifact, read_manifest_bytes
from blobflow.uploads.intent import SUFFIX, IntentKeeper
from tests.kit import SERIAL, SMALL, TREE, Killed, artifact_of, dies_at, keys, local_store, noise, watched
from tests.servers import S3Endpoint

KEY = "backups/orders/1.tar"
COARSE = ChunkProfile.custom(12_288, 1, workers=1)
"""Three or four parts, for tests that run once for each request of an upload."""
OWN = Path(__file__)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path / "made")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return local_store(tmp_path)


@pytest.fixture(params=["local", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each kind, opened by its URL."""
    if request.param == "local":
        yield open_store(tmp_path / "store")
    elif request.param == "memory":
        name = uuid.uuid4().hex
        yield open_store(f"memory://{name}")
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
    else:
        endpoint: S3Endpoint = request.getfixturevalue("moto_s3")
        store = open_store(
            f"s3://{endpoint.new_bucket()}/some/prefix",
            endpoint_url=endpoint.endpoint_url,
            region=endpoint.region,
            access_key_id=endpoint.access_key_id,
            secret_access_key=endpoint.secret_access_key,
        )
        yield store
        store.close()


def payload_of(artifact: Artifact) -> bytes:
    source = artifact.source()
    payload = bytearray(source.size)
    source.read_into(0, memoryview(payload))
    return bytes(payload)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def stages(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


# What is in the store


@pytest.mark.seed("1.1")
def test_the_payload_is_a_plain_tar_with_its_manifest_beside_it(artifact: Artifact, store: LocalStore):
    """The object is the tar itself, the sibling is the manifest byte for byte, and nothing else stays."""
    result = upload(store, KEY, artifact, profile=SMALL)
    assert keys(store) == [KEY, f"{KEY}.manifest.json"]
    assert (store.root / KEY).read_bytes() == payload_of(artifact)
    assert (store.root / f"{KEY}.manifest.json").read_bytes() == artifact.manifest_bytes
    assert (result.status, result.key, result.artifact_digest) == ("uploaded", KEY, artifact.digest)
    assert (result.bytes_sent, result.bytes_resumed, result.bytes_total) == (result.bytes_total, 0, result.bytes_total)
    assert result.bytes_total == artifact.payload_size == store.head(KEY).size
    assert store.list_uploads() == []


@pytest.mark.seed("1.11", "1.13", "3.20")
def test_a_tree_travels_through_any_store(artifact: Artifact, any_store: Store, tmp_path: Path):
    """Local, memory, S3: upload, manifest, verification and download give the same tree under the same key."""
    uploaded = upload(any_store, "a/b/latest", artifact, profile=ChunkProfile.custom(6 * 2**20, 1))
    assert [key for key in keys(any_store) if "probe" not in key] == ["a/b/latest", "a/b/latest.manifest.json"]
    assert read_manifest(any_store, "a/b/latest") == artifact.manifest
    assert [entry.key for entry in list_artifacts(any_store)] == ["a/b/latest"]
    assert verify(any_store, "a/b/latest", mode="deep", profile=SMALL).bytes_read == artifact.payload_size
    assert verify(any_store, "a/b/latest", mode="shallow").mode_used == "shallow"
    result = download(any_store, "a/b/latest", tmp_path / "dest", profile=SMALL)
    assert read_tree(tmp_path / "dest" / "data") == TREE
    assert result.artifact_digest == uploaded.artifact_digest == artifact.digest
    assert (result.bytes_received, result.bytes_resumed) == (artifact.payload_size, 0)
    assert upload(any_store, "a/b/latest", artifact).status == "unchanged"
    assert stages(tmp_path) == []


@pytest.mark.seed("1.12")
def test_a_store_is_made_from_its_url_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The path of the URL is the place; a bad one is refused by name; the environment names no store."""
    for name in ("BLOBFLOW_STORE", "AWS_ENDPOINT_URL", "AWS_BUCKET"):
        monkeypatch.setenv(name, "s3://elsewhere")
    assert open_store((tmp_path / "x").as_uri()).url == (tmp_path / "x").as_uri()
    with pytest.raises(InvalidStoreUrl, match="invalid store url"):
        open_store("http://bucket/prefix")
    with pytest.raises(UsageError, match="no option 'colour'"):
        open_store(tmp_path, colour="red")


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a//b", "../a", "a/../b", "a\nb", "a.manifest.json", "a.upload.json", "a.ref.json", "a.lease.json"],
)
def test_what_is_no_key_is_refused_before_anything_is_sent(key: str, artifact: Artifact, store: LocalStore):
    """Keys that lead elsewhere, and endings that blobflow itself uses."""
    faulty = watched(store)
    for call in (
        lambda: upload(faulty, key, artifact),
        lambda: download(faulty, key, artifact.path / "x"),
        lambda: read_manifest(faulty, key),
        lambda: verify(faulty, key),
    ):
        with pytest.raises(InvalidKey):
            call()
    assert faulty.log == []


@pytest.mark.seed("1.14")
def test_without_a_valid_artifact_no_request_is_sent(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Missing or broken manifest: refused by name, and the store hears nothing."""
    faulty = watched(store)
    with pytest.raises(ArtifactNotFound):
        upload(faulty, KEY, tmp_path / "nothing")
    with pytest.raises(ArtifactNotFound):
        upload(faulty, KEY, OWN)
    (artifact.path / "MANIFEST.json").write_bytes(b"{}")
    with pytest.raises(ArtifactInvalid):
        upload(faulty, KEY, artifact.path)
    assert faulty.log == []


@pytest.mark.seed("1.15", "W1.1")
def test_nothing_is_staged(artifact: Artifact, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither the temporary directory nor the artifact's surroundings get a file, at no time."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    around = sorted(artifact.path.parent.rglob("*"))

    def look(_: Request) -> None:
        assert sorted(artifact.path.parent.rglob("*")) == around
        assert os.listdir(tmp_path / "tmp") == []

    faulty = FaultyStore(store, lambda _: Hook(look))
    upload(faulty, KEY, artifact, profile=SMALL)
    assert faulty.count("put_part") > 5


def test_an_upload_is_read_once(artifact: Artifact, store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    """Each payload byte of a member is read from its file exactly once."""
    read = 0
    real = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = real(fd, buffers, offset)
        if "/source/" in os.readlink(f"/proc/self/fd/{fd}"):
            read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    upload(store, KEY, artifact, profile=SMALL)
    assert read == artifact.manifest.bytes


# Crashes


@pytest.mark.seed("1.2")
def test_an_upload_killed_at_any_request_leaves_a_whole_artifact_or_none(artifact: Artifact, tmp_path: Path):
    """Wherever it dies: if the manifest is there, the payload is complete; and running it again finishes."""
    number, profile = 0, COARSE
    while True:
        number += 1
        store = LocalStore(tmp_path / f"store-{number}")
        dead = FaultyStore(store, dies_at(number))
        try:
            upload(dead, KEY, artifact, profile=profile)
        except Killed:
            finished = False
        else:
            finished = True
        if store.exists(f"{KEY}.manifest.json"):
            verify(store, KEY, mode="deep")
        again = upload(store, KEY, artifact, profile=profile)
        assert again.artifact_digest == artifact.digest
        verify(store, KEY, mode="deep")
        # Between Create and the intent nobody knows of the upload yet; it is empty, and `gc` removes it.
        assert len(store.list_uploads()) <= (dead.log[-1].key.endswith(SUFFIX) and dead.count("put") == 1)
        if finished:
            break
    assert number > 15


@pytest.mark.seed("1.2", "1.8", "W1.5")
def test_an_overwrite_killed_at_any_request_never_mixes(artifact: Artifact, tmp_path: Path):
    """What a reader finds is whole: the old artifact, the new one, or a temporary error."""
    new = artifact_of(tmp_path / "new", {"new": noise(9000, 9)})
    number, finished = 0, False
    while not finished:
        number += 1
        store = LocalStore(tmp_path / f"store-{number}")
        upload(store, KEY, artifact, profile=COARSE)
        try:
            upload(FaultyStore(store, dies_at(number)), KEY, new, profile=COARSE, overwrite=True)
            finished = True
        except Killed:
            pass
        with suppress(ReplacementInProgress):
            assert verify(store, KEY, mode="deep").artifact_digest in (artifact.digest, new.digest)
        upload(store, KEY, new, profile=COARSE, overwrite=True)
        assert verify(store, KEY, mode="deep").artifact_digest == new.digest
    assert number > 10


def test_what_was_sent_before_a_crash_is_not_sent_again(artifact: Artifact, store: LocalStore):
    """The second run says what it resumed, and together the runs sent every byte once."""
    records: list[TransferRecord] = []
    with pytest.raises(Killed):
        upload(
            FaultyStore(store, lambda r: Hook(_die) if (r.operation, r.number) == ("put_part", 4) else None),
            KEY,
            artifact,
            profile=SERIAL,
            on_checkpoint=records.append,
        )
    assert records[-1].state == "failed"
    assert records[-1].parts_done == 3
    faulty = watched(store)
    result = upload(faulty, KEY, artifact, profile=SERIAL, on_checkpoint=records.append)
    assert result.bytes_resumed == 3 * 4096
    assert result.bytes_sent == artifact.payload_size - 3 * 4096
    assert faulty.count("put_part") == result.parts - 3
    assert records[-1].state == "done"
    assert {record.transfer_id for record in records} == {records[0].transfer_id}


def _die(_: Request) -> None:
    raise Killed


@pytest.mark.seed("3.16", "3.19")
def test_a_crash_before_the_completion_sends_no_part_again(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """All parts are there: only Complete is left, and the result is of the same kind as that of an unbroken upload."""
    faults = FaultyStore(store, lambda r: Hook(_die) if r.operation == "complete_multipart" else None)
    with pytest.raises(Killed):
        upload(faults, KEY, artifact, profile=SERIAL)
    faulty = watched(store)
    resumed = upload(faulty, KEY, artifact, profile=SERIAL)
    assert (faulty.count("put_part"), faulty.count("complete_multipart")) == (0, 1)
    assert (resumed.bytes_sent, resumed.bytes_resumed) == (0, artifact.payload_size)
    unbroken = upload(local_store(tmp_path / "other"), KEY, artifact, profile=SERIAL)
    facts = ("status", "key", "artifact_digest", "manifest", "bytes_total", "parts")
    assert [getattr(resumed, name) for name in facts] == [getattr(unbroken, name) for name in facts]
    assert read_manifest_bytes(store, KEY) == artifact.manifest_bytes


def test_a_crash_after_the_completion_only_publishes(artifact: Artifact, store: LocalStore):
    """The upload id is gone; the object itself says that it is ours."""
    put = FaultyStore(
        store, lambda r: Hook(_die) if r.key.endswith(".manifest.json") and r.operation == "put" else None
    )
    with pytest.raises(Killed):
        upload(put, KEY, artifact, profile=SERIAL)
    assert not store.exists(f"{KEY}.manifest.json")
    faulty = watched(store)
    upload(faulty, KEY, artifact, profile=SERIAL)
    assert faulty.count("put_part") == faulty.count("create_multipart") == 0
    verify(store, KEY, mode="deep")
    assert keys(store) == [KEY, f"{KEY}.manifest.json"]


def test_another_machine_takes_an_upload_up(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """It exported the same content at another time: the manifest of the first one is published, parts are kept."""
    with pytest.raises(Killed):
        upload(
            FaultyStore(store, lambda r: Hook(_die) if (r.operation, r.number) == ("put_part", 4) else None),
            KEY,
            artifact,
            profile=SERIAL,
        )
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(artifact.path, tmp_path / "elsewhere" / "artifact", symlinks=True)
    manifest = json.loads(artifact.manifest_bytes)
    manifest["created_at"] = "2030-01-01T00:00:00Z"
    (tmp_path / "elsewhere" / "artifact" / "MANIFEST.json").write_bytes(json.dumps(manifest).encode())
    elsewhere = Artifact.open(tmp_path / "elsewhere" / "artifact")
    assert elsewhere.digest != artifact.digest
    result = upload(store, KEY, elsewhere, profile=ChunkProfile.custom(1000, 1))
    assert (result.artifact_digest, result.bytes_resumed) == (artifact.digest, 3 * 4096)
    verify(store, KEY, mode="deep", expected_digest=artifact.digest)


@pytest.mark.seed("3.17")
def test_a_source_that_is_gone_is_named_and_the_next_upload_is_fresh(store: LocalStore, tmp_path: Path):
    """The half-sent upload of the lost source is superseded; nothing of it is published."""
    artifact = artifact_of(tmp_path / "first")
    with pytest.raises(Killed):
        upload(
            FaultyStore(store, lambda r: Hook(_die) if (r.operation, r.number) == ("put_part", 4) else None),
            KEY,
            artifact,
            profile=SERIAL,
        )
    (tmp_path / "first" / "source" / "big.bin").unlink()
    with pytest.raises(SourceChanged, match=r"'big\.bin' cannot be read"):
        upload(store, KEY, artifact, profile=SERIAL)
    assert not store.exists(KEY)
    other = artifact_of(tmp_path / "second", {"other": "content"})
    result = upload(store, KEY, other, profile=SERIAL)  # at once: a failed upload keeps nobody away
    assert (result.bytes_resumed, result.artifact_digest) == (0, other.digest)
    assert store.list_uploads() == []
    verify(store, KEY, mode="deep")


def _of_a_dead_owner(store: LocalStore, key: str) -> LocalStore:
    """The same store, in which the process that began the upload of `key` has ended."""
    document = json.loads(store.get(key + SUFFIX, max_bytes=2**20).data)
    document["owner"] = f"{document['owner'].rpartition('/')[0]}/{10**9}"
    store.put(key + SUFFIX, json.dumps(document).encode())
    return store


def test_a_source_that_was_written_to_is_never_published(store: LocalStore, tmp_path: Path):
    """Same size, same inode, same times, other bytes: the sum of the parts is not the promised one."""
    artifact = artifact_of(tmp_path)
    source = tmp_path / "source" / "big.bin"
    status = source.stat()
    flip(source, 5000)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ChecksumMismatch, match="its manifest says") as refusal:
        upload(store, KEY, artifact, profile=SERIAL)
    assert "export again" in refusal.value.hint
    assert keys(store) == []
    assert store.list_uploads() == []


@pytest.mark.seed("W0.10")
@pytest.mark.parametrize("what", ["size", "mtime_ns", "inode"])
def test_a_changed_source_file_is_refused(what: str, store: LocalStore, tmp_path: Path):
    """A reference artifact checks each file as it is read, and says what differs."""
    artifact = artifact_of(tmp_path)
    source = tmp_path / "source" / "big.bin"
    status = source.stat()
    if what == "size":
        source.write_bytes(noise(19_999))
    elif what == "mtime_ns":
        os.utime(source, ns=(0, 0))
    else:
        source.rename(tmp_path / "kept")  # so that its inode is not used again
        source.write_bytes(noise(20_000, 1))
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(SourceChanged, match=f"'big.bin' changed after the export: {what} was"):
        upload(store, KEY, artifact, profile=SERIAL)
    assert not store.exists(f"{KEY}.manifest.json")


def test_a_pipe_in_the_place_of_a_file_cannot_hang_an_upload(store: LocalStore, tmp_path: Path):
    """Opening a named pipe would wait for a writer for ever."""
    artifact = artifact_of(tmp_path)
    (tmp_path / "source" / "big.bin").unlink()
    os.mkfifo(tmp_path / "source" / "big.bin")
    with pytest.raises(SourceChanged):
        upload(store, KEY, artifact, profile=SERIAL)


def test_an_artifact_without_its_index_is_named(store: LocalStore, tmp_path: Path):
    """Also if only the table of a reference artifact is missing."""
    for name in ("INDEX.parquet", "REFERENCE.parquet"):
        artifact = artifact_of(tmp_path / name)
        (artifact.path / name).unlink()
        with pytest.raises(ArtifactInvalid, match=f"{name} is missing"):
            upload(store, name, artifact.path)


# Keys that hold something


def test_the_same_artifact_is_unchanged(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Equal content is not sent again, whenever it was exported."""
    upload(store, KEY, artifact, profile=SMALL)
    faulty = watched(store)
    again = artifact_of(tmp_path / "again")
    result = upload(faulty, KEY, again)
    assert (result.status, result.artifact_digest, result.bytes_sent) == ("unchanged", artifact.digest, 0)
    assert [request.operation for request in faulty.log] == ["get", "head", "get"]  # the last looks for a leftover


def test_a_changed_execute_bit_is_another_artifact(store: LocalStore, tmp_path: Path):
    """The content digest does not know it, the manifest does."""
    upload(store, KEY, artifact_of(tmp_path / "1", {"run": "x"}))
    with pytest.raises(KeyConflict):
        upload(store, KEY, artifact_of(tmp_path / "2", {"run": Executable("x")}))


def test_another_artifact_is_refused(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """A key is immutable; the refusal names both digests and changes nothing."""
    upload(store, KEY, artifact, profile=SMALL)
    other = artifact_of(tmp_path / "other", {"a": "b"})
    with pytest.raises(KeyConflict) as refusal:
        upload(store, KEY, other)
    assert (refusal.value.expected, refusal.value.actual) == (other.digest, artifact.digest)
    assert refusal.value.exit_code == 5
    verify(store, KEY, expected_digest=artifact.digest)


@pytest.mark.seed("1.8", "W1.5")
def test_overwriting_gives_readers_the_old_or_the_new(store: LocalStore, tmp_path: Path):
    """A reader in a loop during thirty swaps: every answer is one of the two, or asks to be tried again."""
    trees: list[Tree] = [{"f": noise(9000, 1)}, {"f": noise(9000, 2)}]
    artifacts = [artifact_of(tmp_path / str(i), tree) for i, tree in enumerate(trees)]
    assert artifacts[0].payload_size == artifacts[1].payload_size
    upload(store, KEY, artifacts[0], profile=COARSE)
    stop = threading.Event()
    seen: set[str] = set()
    wrong: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                result = verify(store, KEY, mode="deep", profile=COARSE)
                seen.add(result.artifact_digest)
            except BlobflowError as error:
                if not error.retryable:
                    wrong.append(error)
                    return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for i in range(1, 31):
        upload(store, KEY, artifacts[i % 2], profile=COARSE, overwrite=True)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert seen <= {artifact.digest for artifact in artifacts}
    download(store, KEY, tmp_path / "dest")
    assert read_tree(tmp_path / "dest" / "data") == trees[0]


def test_a_reader_between_two_requests_of_a_swap_is_told_to_try_again(store: LocalStore, tmp_path: Path):
    """The manifest was gone, then the swap ended before the reader looked for its intent: the new one is read."""
    old, new = artifact_of(tmp_path / "old", {"a": "1"}), artifact_of(tmp_path / "new", {"a": "2"})
    upload(store, KEY, old)
    store.delete(f"{KEY}.manifest.json")  # as the swap does before it completes

    def finish_the_swap(_: Request) -> None:
        upload(store, KEY, new)

    faulty = FaultyStore(store, lambda r: Hook(finish_the_swap) if r.key.endswith(SUFFIX) and r.number == 2 else None)
    assert read_manifest_bytes(faulty, KEY) == new.manifest_bytes


def test_a_damaged_manifest_can_be_overwritten(artifact: Artifact, store: LocalStore):
    """It is refused without `overwrite`, and replaced with it."""
    upload(store, KEY, artifact, profile=SMALL)
    store.put(f"{KEY}.manifest.json", b"garbage")
    with pytest.raises(ArtifactInvalid):
        upload(store, KEY, artifact)
    upload(store, KEY, artifact, overwrite=True, profile=SMALL)
    verify(store, KEY, mode="deep")


def test_a_manifest_that_lost_its_payload_is_repaired(artifact: Artifact, store: LocalStore):
    """Uploading the same artifact again brings the payload back."""
    upload(store, KEY, artifact, profile=SMALL)
    store.delete(KEY)
    with pytest.raises(ArtifactInvalid, match="has a manifest but no payload"):
        verify(store, KEY)
    assert upload(store, KEY, artifact, profile=SMALL).status == "uploaded"
    verify(store, KEY, mode="deep")


# Joins


def test_two_uploads_of_the_same_content_join(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Both succeed, wherever the other one is at each of their requests, and there is one artifact."""
    for _ in range(5):
        store = LocalStore(tmp_path / uuid.uuid4().hex)
        results, errors = _at_once(
            lambda store=store: upload(store, KEY, artifact, profile=SERIAL),
            lambda store=store: upload(store, KEY, Artifact.open(artifact.path), profile=SERIAL),
        )
        assert errors == []
        assert {result.artifact_digest for result in results} == {artifact.digest}
        verify(store, KEY, mode="deep")
        assert store.list_uploads() == []


def test_an_upload_that_was_overtaken_succeeds_too(artifact: Artifact, tmp_path: Path):
    """The other one begins, sends and publishes everything before any of our requests."""
    number, finished = 0, False
    while not finished:
        number += 1
        store = LocalStore(tmp_path / f"store-{number}")
        ahead = False

        def overtake(_: Request, store: LocalStore = store) -> None:
            nonlocal ahead
            ahead = True
            upload(store, KEY, artifact, profile=COARSE)

        sent = iter(range(1, 10_000))
        faulty = FaultyStore(
            store, lambda _, n=number, sent=sent, overtake=overtake: Hook(overtake) if next(sent) == n else None
        )
        result = upload(faulty, KEY, artifact, profile=COARSE)
        assert result.artifact_digest == artifact.digest
        verify(store, KEY, mode="deep")
        assert store.list_uploads() == []
        finished = not ahead
    assert number > 15


def test_what_was_published_before_the_claim_is_not_sent_again(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """The key was free when it was looked at; another upload came and went before ours was claimed."""
    same, other = iter([artifact, artifact]), artifact_of(tmp_path / "other", {"other": "x"})

    def come_and_go(_: Request) -> None:
        upload(store, KEY, next(same), profile=SMALL)

    faulty = FaultyStore(store, lambda r: Hook(come_and_go) if r.operation == "create_multipart" else None)
    assert upload(faulty, KEY, artifact).status == "unchanged"
    assert faulty.count("put_part") == 0
    store.delete(f"{KEY}.manifest.json")
    faulty = FaultyStore(store, lambda r: Hook(come_and_go) if r.operation == "create_multipart" else None)
    with pytest.raises(KeyConflict):
        upload(faulty, KEY, other)
    assert faulty.count("put_part") == 0
    assert store.list_uploads() == []
    verify(store, KEY, mode="deep", expected_digest=artifact.digest)


def test_two_uploads_of_other_content_do_not_mix(artifact: Artifact, tmp_path: Path):
    """One wins; the other one is told that the key is busy or taken."""
    other = artifact_of(tmp_path / "other", {"other": noise(20_000, 5)})
    for _ in range(10):
        store = LocalStore(tmp_path / uuid.uuid4().hex)
        results, errors = _at_once(
            lambda store=store: upload(store, KEY, artifact, profile=SERIAL),
            lambda store=store: upload(store, KEY, other, profile=SERIAL),
        )
        [result], [error] = results, errors
        assert isinstance(error, KeyConflict | TransferBusy)
        verify(store, KEY, mode="deep", expected_digest=result.artifact_digest)


def test_a_sleeper_cannot_break_what_was_published_meanwhile(artifact: Artifact, tmp_path: Path):
    """While it slept, others gave its upload up and published other content: it is refused, and changes nothing."""
    other = artifact_of(tmp_path / "other", {"other": noise(20_000, 5)})
    number, finished = 0, False
    while not finished:
        number += 1
        store = LocalStore(tmp_path / f"store-{number}")
        slept = False

        def others_at_work(_: Request, store: LocalStore = store) -> None:
            nonlocal slept
            slept = True
            while True:
                try:
                    if store.exists(f"{KEY}{SUFFIX}"):
                        _of_a_dead_owner(store, KEY)
                    upload(store, KEY, other, profile=COARSE, overwrite=True)
                except TransferBusy:
                    continue  # the sleeper's other thread has just renewed its intent
                return

        sent = iter(range(1, 10_000))
        faulty = FaultyStore(
            store, lambda r, n=number, sent=sent, hook=others_at_work: Hook(hook) if next(sent) == n else None
        )
        # UploadIncomplete, where the payload is the other one as soon as ours is complete.
        with suppress(KeyConflict, TransferBusy, UploadIncomplete):
            upload(faulty, KEY, artifact, profile=COARSE)
        finished = not slept
        try:
            found = verify(store, KEY, mode="deep").artifact_digest
        except IntegrityError:
            # The window that no store without conditional completion can close: between our last look and Complete.
            assert faulty.log[number - 1].operation == "complete_multipart"
            continue
        assert found == (artifact.digest if finished else other.digest)


def _at_once(*calls: Callable[[], object]) -> tuple[list, list]:
    results: list = []
    errors: list = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        barrier.wait()
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001  # given to the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, errors


def test_a_living_upload_of_other_content_keeps_others_away(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Not from a live owner; at once from one that is gone; and from an unknown one when its time is over."""
    other = artifact_of(tmp_path / "other", {"other": "x"})
    keeper = IntentKeeper(store, KEY)
    keeper.begin(artifact.manifest_file, store.create_multipart(KEY, part_size=4096), 4096, replaces=None)
    with pytest.raises(TransferBusy, match=r"another upload to .* is under way") as refusal:
        upload(store, KEY, other)
    assert refusal.value.retryable
    assert len(store.list_uploads()) == 1
    upload(_of_a_dead_owner(store, KEY), KEY, other)
    assert store.list_uploads() == []


def test_an_unknown_owner_is_waited_for_until_its_time_is_over(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Of a process on another machine only the expiry is known."""
    other = artifact_of(tmp_path / "other", {"other": "x"})
    then = IntentKeeper(store, KEY, clock=lambda: time.time() - 1000)
    then.begin(artifact.manifest_file, store.create_multipart(KEY, part_size=4096), 4096, replaces=None)
    document = json.loads(store.get(KEY + SUFFIX, max_bytes=2**20).data)
    document["owner"] = "another-machine/-/-/1"
    store.put(KEY + SUFFIX, json.dumps(document).encode())
    assert upload(store, KEY, other).status == "uploaded"


# Reading


@pytest.mark.seed("1.9")
def test_the_manifest_is_read_without_the_payload(artifact: Artifact, store: LocalStore):
    """One small request, and none for the payload."""
    upload(store, KEY, artifact, profile=SMALL)
    faulty = watched(store)
    assert read_manifest(faulty, KEY) == artifact.manifest
    assert [(request.operation, request.key) for request in faulty.log] == [("get", f"{KEY}.manifest.json")]


@pytest.mark.seed("1.5")
def test_a_manifest_of_exactly_a_mebibyte_is_read(artifact: Artifact, any_store: Store):
    """One byte more is refused as invalid, after no more than that was read."""
    padding = b" " * (MAX_MANIFEST_BYTES - len(artifact.manifest_bytes))
    any_store.put(f"{KEY}.manifest.json", artifact.manifest_bytes + padding)
    assert read_manifest(any_store, KEY) == artifact.manifest
    any_store.put(f"{KEY}.manifest.json", artifact.manifest_bytes + padding + b" ")
    with pytest.raises(ArtifactInvalid, match="exceeds 1048576 bytes"):
        read_manifest(any_store, KEY)
    any_store.put(f"{KEY}.manifest.json", bytes(64 * MAX_MANIFEST_BYTES))
    with pytest.raises(ArtifactInvalid, match="exceeds 1048576 bytes"):
        read_manifest(any_store, KEY)


@pytest.mark.seed("1.6")
def test_a_stalled_server_is_an_error_that_names_the_operation():
    """The server accepts and says nothing: the error says what was asked, of which key, for how long."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        store = open_store(
            "s3://bucket/prefix",
            endpoint_url=f"http://127.0.0.1:{server.getsockname()[1]}",
            region="us-east-1",
            access_key_id="a",
            secret_access_key="b",
            idle_timeout=0.3,
            patience_s=0.0,
        )
        started = time.monotonic()
        with pytest.raises(BlobflowError, match=r"get .* no byte for 0\.3 s") as refusal:
            read_manifest(store, KEY)
        store.close()
    assert time.monotonic() - started < 10
    assert refusal.value.retryable
    assert refusal.value.operation == "get"
    assert refusal.value.key == f"{KEY}.manifest.json"


@pytest.mark.seed("1.19", "W1.10")
def test_absent_and_damaged_are_two_errors(artifact: Artifact, store: LocalStore):
    """Who retries and who gives up can tell: not found is 4, damaged is 3, being replaced is temporary."""
    for call in (read_manifest, verify):
        with pytest.raises(ArtifactNotFound, match=r"no artifact 'backups/orders/1\.tar'") as refusal:
            call(store, KEY)
        assert (refusal.value.exit_code, refusal.value.retryable) == (4, False)
    store.put(f"{KEY}.manifest.json", b"{}")
    with pytest.raises(ArtifactInvalid) as damage:
        verify(store, KEY)
    assert damage.value.exit_code == 3
    store.delete(f"{KEY}.manifest.json")
    keeper = IntentKeeper(store, KEY)
    keeper.begin(artifact.manifest_file, "up", 4096, replaces=None)
    with pytest.raises(ArtifactNotFound, match="its upload is not finished"):
        read_manifest(store, KEY)
    keeper.load()
    keeper.begin(artifact.manifest_file, "up", 4096, replaces="sha256:x")
    with pytest.raises(ReplacementInProgress) as busy:
        read_manifest(store, KEY)
    assert busy.value.exit_code == 75


def test_listing_shows_whole_artifacts_only(artifact: Artifact, store: LocalStore):
    """Payloads without manifest, intents, refs and what others put there are left out."""
    for key in ("b/1.tar", "a/2.tar", "a/1.tar"):
        upload(store, key, artifact)
    store.put("a/unfinished.tar", b"x")
    store.put("a/unfinished.tar.upload.json", b"{}")
    store.put("a/.manifest.json", b"{}")
    store.put(".manifest.json", b"{}")
    assert [entry.key for entry in list_artifacts(store)] == ["a/1.tar", "a/2.tar", "b/1.tar"]
    assert [entry.key for entry in list_artifacts(store, "a/")] == ["a/1.tar", "a/2.tar"]
    assert [entry.key for entry in list_artifacts(store, start_after="a/1.tar")] == ["a/2.tar", "b/1.tar"]


# Untrusted bytes


@pytest.mark.seed("1.3", "3.20")
def test_any_flipped_byte_stops_a_download(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Payload, index or manifest, header, content or padding: nothing lands, and verification says the same."""
    upload(store, KEY, artifact, profile=SMALL)
    size = artifact.payload_size
    big, _ = artifact.layout.content_range(2)
    places = [(KEY, offset) for offset in (0, 600, 1100, 3000, big - 300, big, big + 9000, size - 1, size - 1500)]
    places += [(f"{KEY}.manifest.json", offset) for offset in (1, 300)]
    for number, (key, offset) in enumerate(places):
        dest = tmp_path / str(number) / "dest"
        flip(store.root / key, offset)
        for mode in ("deep", "auto"):
            with pytest.raises((IntegrityError, HostileArtifact)) as refusal:
                verify(store, KEY, mode=mode, profile=SMALL)
            assert refusal.value.exit_code in (3, 5)
        with pytest.raises((IntegrityError, HostileArtifact)) as refusal:
            download(store, KEY, dest, profile=SMALL)
        assert refusal.value.exit_code in (3, 5)
        assert not dest.exists()
        flip(store.root / key, offset)
        download(store, KEY, dest, profile=SMALL)
        assert read_tree(dest / "data") == TREE


def test_verification_says_what_is_wrong_and_not_that_somebody_else_failed(
    artifact: Artifact, store: LocalStore, tmp_path: Path
):
    """With many workers the error is always the damage itself, which is not temporary."""
    upload(store, KEY, artifact, profile=SMALL)
    flip(store.root / KEY, artifact.layout.content_range(2)[0] + 10)
    for _ in range(30):
        with pytest.raises(DigestMismatch):
            verify(store, KEY, mode="deep", profile=ChunkProfile.custom(1024, 1, workers=8))


def test_samples_read_every_member_once(artifact: Artifact, store: LocalStore):
    """Damage is found by the one sample that reads its member, and the samples together read the payload once."""
    upload(store, KEY, artifact, profile=SMALL)
    layout = artifact.layout
    for number in range(2, 2 + len(layout.index)):
        offset, length = layout.content_range(number)
        if not length:
            continue
        flip(store.root / KEY, offset + length - 1)
        found: list[str] = []
        for sample in ((1, 3), (2, 3), (3, 3)):
            try:
                verify(store, KEY, sample=sample, profile=SMALL)
            except DigestMismatch as error:
                found.append(error.what)
        assert found == [layout.index.paths[number - 2]]
        flip(store.root / KEY, offset + length - 1)
    results = [verify(store, KEY, sample=(number, 3), profile=SMALL) for number in (1, 2, 3)]
    assert {result.mode_used for result in results} == {"sample"}
    assert sum(result.bytes_read - layout.data_start for result in results) == layout.size - layout.data_start


@pytest.mark.parametrize("sample", [(0, 3), (4, 3), (1, 0), (-1, -1)])
def test_a_sample_that_is_none_is_refused(sample: tuple[int, int], store: LocalStore):
    """There is nothing to read in it, and no request is sent for it."""
    with pytest.raises(UsageError, match="no sample"):
        verify(store, KEY, sample=sample)


def test_a_shallow_sample_is_refused(store: LocalStore):
    """It would say that something was read which was not."""
    with pytest.raises(UsageError, match="shallow"):
        verify(store, KEY, mode="shallow", sample=(1, 2))


@pytest.mark.seed("1.18")
def test_the_embedded_manifest_is_the_sibling(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """None inside, or another one: refused, and nothing is at the destination."""
    other = artifact_of(tmp_path / "other", {"a": "b"})
    payload = payload_of(artifact)
    without = bytearray(payload)
    without[: len("MANIFEST.json")] = b"SOMETHING.els"
    twin = json.dumps(json.loads(artifact.manifest_bytes)).encode()
    for body, manifest in (
        (bytes(without), artifact.manifest_bytes),
        (payload_of(other), artifact.manifest_bytes),
        (bytes(len(payload)), artifact.manifest_bytes),
        (payload, twin.ljust(len(artifact.manifest_bytes))),
    ):
        store.put(KEY, body)
        store.put(f"{KEY}.manifest.json", manifest)
        for call in (
            lambda: verify(store, KEY, mode="shallow"),
            lambda: verify(store, KEY, mode="deep"),
            lambda: download(store, KEY, tmp_path / "dest"),
        ):
            with pytest.raises((ArtifactInvalid, SizeMismatch)):
                call()
        assert not (tmp_path / "dest").exists()


@pytest.mark.seed("W1.8")
def test_no_more_is_fetched_than_the_manifest_announces(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """A payload that grew, or a manifest that announces another size: refused before a byte of the payload is read."""
    upload(store, KEY, artifact, profile=SMALL)
    whole = store.get(KEY, max_bytes=1 << 20).data
    seen = watched(store)
    for payload in (whole + bytes(512), whole[:-512]):
        store.put(KEY, payload)
        with pytest.raises(SizeMismatch) as refusal:
            download(seen, KEY, tmp_path / "dest", profile=SMALL)
        assert (refusal.value.expected, refusal.value.actual) == (len(whole), len(payload))
    assert seen.count("get_range") == 0
    assert not (tmp_path / "dest").exists()


@pytest.mark.seed("W1.8")
def test_what_landed_is_durable_before_it_has_its_name(
    artifact: Artifact, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All files are synced, then the directory is renamed, then its parent is synced."""
    upload(store, KEY, artifact, profile=SMALL)
    events: list[str] = []

    def watch(name: str) -> None:
        real: Callable[..., None] = getattr(landing, name)

        def function(path: Path) -> None:
            events.append(f"{name} {path.name}" if path == tmp_path else name)
            real(path)

        monkeypatch.setattr(landing, name, function)

    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "dest":
            events.append("rename")
        rename(source, target)

    watch("sync_tree")
    watch("fsync_directory")
    monkeypatch.setattr(os, "rename", renamed)
    download(store, KEY, tmp_path / "dest", profile=SMALL)
    at = events.index("rename")
    assert events[at - 1 :] == ["sync_tree", "rename", f"fsync_directory {tmp_path.name}"]


@pytest.mark.seed("W1.9")
def test_who_writes_the_bucket_cannot_pass_for_a_pinned_artifact(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Payload, sibling and ref are replaced, and agree: without a digest that is an artifact, with it none of ours."""
    upload(store, KEY, artifact, profile=SMALL)
    move_ref(store, "orders/latest", KEY, artifact.digest)
    forged = artifact_of(tmp_path / "forged", {"big.bin": "not what was published"})
    upload(store, KEY, forged, overwrite=True)
    move_ref(store, "orders/latest", KEY, forged.digest)
    assert verify(store, KEY, mode="deep").artifact_digest == forged.digest
    elsewhere = LocalStore(tmp_path / "elsewhere")
    pinned: dict[str, Any] = {"expected_digest": artifact.digest}
    ref: dict[str, Any] = {"source": "east", "database": "orders"}
    for call in (
        lambda: verify(store, KEY, mode="shallow", **pinned),
        lambda: verify(store, KEY, mode="deep", **pinned),
        lambda: download(store, KEY, tmp_path / "dest", **pinned),
        lambda: begin_download(store, KEY, tmp_path / "dest", lanes=2, **pinned),
        lambda: copy_artifact(store, KEY, elsewhere, KEY, **pinned),
        lambda: Snapshot.of_artifact(store, KEY, **ref, **pinned),
    ):
        with pytest.raises(DigestMismatch) as refusal:
            call()
        assert (refusal.value.expected, refusal.value.actual) == (artifact.digest, forged.digest)
        assert not refusal.value.retryable
    assert not (tmp_path / "dest").exists()
    assert keys(elsewhere) == []


@pytest.mark.seed("W1.9")
def test_a_pinned_manifest_cannot_have_other_content(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """The right manifest above a payload whose CRC32C was made to fit: every member's SHA-256 is pinned with it."""
    upload(store, KEY, artifact, profile=SMALL)
    payload = bytearray(store.get(KEY, max_bytes=1 << 20).data)
    before, at = crc32c(payload), payload.index(noise(20_000, 1)) + 10_000
    # CRC32C is linear, and of its own polynomial it is 0: this difference does not change it.
    for number, byte in enumerate((0x82F63B78 << 1 | 1).to_bytes(5, "little")):
        payload[at + number] ^= byte
    assert crc32c(payload) == before
    store.put(KEY, bytes(payload))
    for call in (
        lambda: verify(store, KEY, mode="deep", expected_digest=artifact.digest),
        lambda: download(store, KEY, tmp_path / "dest", expected_digest=artifact.digest),
    ):
        with pytest.raises(DigestMismatch, match=r"big\.bin"):
            call()
    assert not (tmp_path / "dest").exists()


def test_another_artifact_than_the_expected_is_refused(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Whoever pins a digest gets that artifact or an error."""
    upload(store, KEY, artifact, profile=SMALL)
    for call in (
        lambda: verify(store, KEY, expected_digest="sha256:" + "0" * 64),
        lambda: download(store, KEY, tmp_path / "dest", expected_digest="sha256:" + "0" * 64),
    ):
        with pytest.raises(DigestMismatch, match="not sha256:000"):
            call()
    assert not (tmp_path / "dest").exists()
    download(store, KEY, tmp_path / "dest", expected_digest=artifact.digest)


@pytest.mark.seed("1.17")
@pytest.mark.parametrize("kind", ["1", "2", "3", "4", "6", "7", "S", "L", "x", "g"])
def test_links_and_devices_in_the_place_of_files_are_refused(
    kind: str, artifact: Artifact, store: LocalStore, tmp_path: Path
):
    """Hard link, symlink, devices, pipe, sparse, GNU and pax entries: the bytes differ from the layout."""
    upload(store, KEY, artifact, profile=SMALL)
    payload = bytearray(payload_of(artifact))
    start = artifact.layout.content_range(2)[0] - 512
    head = payload[start : start + 512]
    head[156:157] = kind.encode()
    head[157:168] = b"/etc/passwd"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    payload[start : start + 512] = head
    store.put(KEY, bytes(payload))
    with pytest.raises(ArtifactInvalid, match=r"in the tar header or padding of 'data/big\.bin'"):
        download(store, KEY, tmp_path / "dest", profile=SMALL)
    assert not (tmp_path / "dest").exists()


def forged(path: Path, *members: tuple[str, int, int], bytes_: int | None = None) -> tuple[bytes, bytes]:
    """Manifest and payload of an artifact whose index names what it likes, all sums consistent."""
    from blobflow.artifact.index import Index, Member
    from blobflow.artifact.tarmap import header

    path.mkdir()
    index = Index()
    for name, size, mode in members:
        index.append(Member(name, size, mode, 0, b"\1" * 32, 1))
    artifact = write_artifact(path, index, backend="directory", created_at=datetime(2026, 11, 20, tzinfo=timezone.utc))
    manifest = artifact.manifest_bytes
    if bytes_ is not None:
        manifest = json.dumps({**json.loads(manifest), "bytes": bytes_}).encode()
    index_bytes = (path / "INDEX.parquet").read_bytes()
    entries = [("MANIFEST.json", manifest), ("INDEX.parquet", index_bytes)]
    payload = b"".join(header(n, len(d), 0o644) + d + bytes(-len(d) % 512) for n, d in entries)
    missing = artifact.manifest.body.size - (len(payload) - (512 + len(manifest) + -len(manifest) % 512))
    return manifest, payload + bytes(min(missing, 2**20))


@pytest.mark.seed("1.17")
@pytest.mark.parametrize(
    "members",
    [
        [("../../escape", 1, 0o644)],
        [("/etc/passwd", 1, 0o644)],
        [("a//b", 1, 0o644)],
        [("a", 1, 0o644), ("a", 1, 0o644)],
        [("b", 1, 0o644), ("a", 1, 0o644)],
        [("a", 1, 0o644), ("a/b", 1, 0o644)],
        [("a\nb", 1, 0o644)],
        [("suid", 1, 0o4755)],
        [("link", 1, 0o120777)],
        [("empty but not", 0, 0o644)],
    ],
)
def test_hostile_indexes_are_refused_before_anything_is_written(
    members: list[tuple[str, int, int]], store: LocalStore, tmp_path: Path
):
    """Manifest and payload are consistent with the index; the index itself is what must never be written."""
    manifest, payload = forged(tmp_path / "forged", *members)
    store.put(KEY, payload)
    store.put(f"{KEY}.manifest.json", manifest)
    before = sorted(os.listdir(tmp_path))
    for call in (
        lambda: download(store, KEY, tmp_path / "made" / "dest"),
        lambda: verify(store, KEY, mode="deep"),
    ):
        with pytest.raises(HostileArtifact) as refusal:
            call()
        assert refusal.value.exit_code == 5
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.seed("1.17")
@pytest.mark.parametrize("size", [10 * 2**30, 2**62, 2**63 - 1])
def test_sizes_that_are_lies_are_refused(size: int, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ten gigabytes of nothing, or more than exists: refused from the sizes alone, without an overflow."""
    monkeypatch.setattr("blobflow.artifact.limits.MAX_TOTAL_BYTES", 2**64)  # a writer that does not care
    try:
        manifest, payload = forged(tmp_path / "forged", ("a", size, 0o644))
    except ValueError:  # not even the manifest can say it
        manifest, payload = forged(tmp_path / "again", ("a", 10, 0o644), bytes_=2**63 - 1)
    store.put(KEY, payload)
    store.put(f"{KEY}.manifest.json", manifest)
    with pytest.raises((IntegrityError, HostileArtifact)):
        download(store, KEY, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_sizes_that_overflow_together_are_refused(store: LocalStore, tmp_path: Path):
    """Two members of nearly 2**63 bytes each: no offset of the layout could hold them."""
    from blobflow.artifact.artifact import checked_layout
    from blobflow.artifact.index import Index, Member
    from blobflow.artifact.manifest_file import ManifestFile
    from tests.unit.test_manifest import MANIFEST

    index = Index()
    for name in ("a", "b", "c"):
        index.append(Member(name, 2**63 - 1, 0o644, 0, bytes(32), 1))
    with pytest.raises(ArtifactInvalid, match="bytes"):
        checked_layout(ManifestFile.of(MANIFEST), index)


@pytest.mark.parametrize(
    "field", ["bytes", "content_digest", "executables_digest", "body.size", "body.crc32c", "members", "index.crc32c"]
)
def test_a_manifest_that_contradicts_its_index_is_refused(field: str, store: LocalStore, tmp_path: Path):
    """Each sum is computed again from the index and compared."""
    manifest, payload = forged(tmp_path / "forged", ("a", 1, 0o644))
    document = json.loads(manifest)
    parent, _, name = field.rpartition(".")
    place = document[parent] if parent else document
    place[name] = "sha256:" + "5" * 64 if "digest" in name else place[name] + 512
    lie = json.dumps(document, indent=1).encode()
    from blobflow.artifact.tarmap import manifest_entry

    body = payload[len(manifest_entry(manifest)) :]
    store.put(KEY, (manifest_entry(lie) + body).ljust(len(manifest_entry(lie)) + document["body"]["size"], b"\0"))
    store.put(f"{KEY}.manifest.json", lie)
    for call in (lambda: verify(store, KEY, mode="deep"), lambda: download(store, KEY, tmp_path / "dest")):
        with pytest.raises((IntegrityError, HostileArtifact)):
            call()
    assert not (tmp_path / "dest").exists()


# Landing


@pytest.mark.seed("1.10")
def test_a_destination_that_holds_something_is_refused_first(artifact: Artifact, any_store: Store, tmp_path: Path):
    """Not a byte of the payload is fetched, and what is there stays as it is."""
    upload(any_store, KEY, artifact)
    holders = {"tree": {"mine": "data"}, "file": "data"}
    write_tree(tmp_path / "taken", holders)
    (tmp_path / "taken" / "link").symlink_to(tmp_path)
    (tmp_path / "taken" / "dangling").symlink_to("nowhere")
    (tmp_path / "taken" / "to-empty").symlink_to(tmp_path / "void")
    (tmp_path / "void").mkdir()
    before = read_tree(tmp_path / "taken")
    faulty = watched(any_store)
    for name in ("tree", "file", "link", "dangling", "to-empty"):
        with pytest.raises(DestinationNotEmpty) as refusal:
            download(faulty, KEY, tmp_path / "taken" / name)
        assert refusal.value.exit_code == 5
    assert faulty.count("get_range") == 0
    assert read_tree(tmp_path / "taken") == before


@pytest.mark.seed("1.10")
def test_an_empty_directory_is_a_destination(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """It is replaced; missing parents are made."""
    upload(store, KEY, artifact, profile=SMALL)
    (tmp_path / "empty").mkdir()
    for dest in (tmp_path / "empty", tmp_path / "deep" / "er"):
        download(store, KEY, dest)
        assert read_tree(dest / "data") == TREE


@pytest.mark.seed("1.10")
def test_what_appears_at_the_destination_meanwhile_is_left_alone(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """It is looked at again before the rename; running it again elsewhere needs nothing from the first run."""
    upload(store, KEY, artifact, profile=SMALL)
    dest = tmp_path / "dest"

    def appear(_: Request) -> None:
        dest.mkdir(exist_ok=True)
        (dest / "mine").write_text("data")

    faulty = FaultyStore(store, lambda r: Hook(appear) if (r.operation, r.number) == ("get_range", 4) else None)
    with pytest.raises(DestinationNotEmpty):
        download(faulty, KEY, dest, profile=SMALL)
    assert read_tree(dest) == {"mine": "data"}


@pytest.mark.seed("1.16")
def test_the_destination_appears_once_and_complete(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Before each request there is nothing at the destination; whoever looks all the time sees it whole at once."""
    upload(store, KEY, artifact, profile=SMALL)
    dest = tmp_path / "landed" / "dest"
    seen: list[set[str]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                seen.append(
                    {path.relative_to(dest).as_posix() for path in [*dest.iterdir(), *(dest / "data").rglob("*")]}
                )
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    faulty = FaultyStore(store, lambda _: Hook(lambda _: _absent(dest)))
    download(faulty, KEY, dest, profile=SERIAL)
    while not seen:
        time.sleep(0)
    stop.set()
    watcher.join()
    whole = _names_in(dest)
    assert all(sight == whole for sight in seen)
    assert stages(dest.parent) == []


def _names_in(dest: Path) -> set[str]:
    return {path.relative_to(dest).as_posix() for path in [*dest.iterdir(), *(dest / "data").rglob("*")]}


def _absent(path: Path) -> None:
    assert not path.exists()


@pytest.mark.seed("1.16")
def test_a_download_killed_at_any_request_continues(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """What stays is a directory with a dot; the next run fetches what is missing and removes it."""
    upload(store, KEY, artifact, profile=SMALL)
    number, finished = 0, False
    while not finished:
        number += 1
        dest = tmp_path / str(number) / "dest"
        try:
            download(FaultyStore(store, dies_at(number)), KEY, dest, profile=SERIAL)
            finished = True
        except Killed:
            assert not dest.exists()
        faulty = watched(store)
        result = download(faulty, KEY, dest, profile=SERIAL)
        assert read_tree(dest / "data") == TREE
        assert stages(dest.parent) == []
        if not finished:
            assert result.bytes_received + result.bytes_resumed == artifact.payload_size
            assert result.bytes_resumed == max(0, number - 5) * 4096
    assert number > 8


@pytest.mark.seed("W1.1")
def test_a_download_takes_no_room_but_its_own(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """At every request the stage holds the members and a small journal: there is no archive beside them."""
    upload(store, KEY, artifact, profile=SMALL)
    around = tmp_path / "landed"
    taken: list[int] = []

    def look(_: Request) -> None:
        files = [path for path in around.rglob("*") if path.is_file()]
        taken.append(sum(path.stat().st_size for path in files))

    download(FaultyStore(store, lambda _: Hook(look)), KEY, around / "dest", profile=SERIAL)
    assert 0 < max(taken) <= artifact.manifest.bytes + 4096


def test_a_finished_download_is_unchanged(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """The members are verified where they are; damage there is found and not repaired silently."""
    upload(store, KEY, artifact, profile=SMALL)
    download(store, KEY, tmp_path / "dest")
    faulty = watched(store)
    result = download(faulty, KEY, tmp_path / "dest")
    assert (result.status, result.bytes_received) == ("unchanged", 0)
    assert faulty.count("get_range") == 0
    flip(tmp_path / "dest" / "data" / "big.bin", 5)
    with pytest.raises(DigestMismatch, match=r"big\.bin"):
        download(store, KEY, tmp_path / "dest")


@pytest.mark.seed("1.17")
def test_nothing_but_contents_and_execute_bits_is_adopted(store: LocalStore, tmp_path: Path):
    """The umask decides about permissions, but for what was private; now decides about times."""
    source = write_tree(tmp_path / "s" / "source", {"run": Executable("x"), "plain": "y", "private": "z"})
    (source / "private").chmod(0o600)
    (source / "run").chmod(0o4755)
    os.utime(source / "plain", (0, 0))
    upload(store, KEY, artifact_of(tmp_path / "s"))
    umask = os.umask(0o027)
    try:
        download(store, KEY, tmp_path / "dest")
    finally:
        os.umask(umask)
    data = tmp_path / "dest" / "data"
    assert {name: (data / name).stat().st_mode & 0o7777 for name in os.listdir(data)} == {
        "run": 0o750,
        "plain": 0o640,
        "private": 0o600,
    }
    assert (data / "plain").stat().st_mtime > 1e9
    assert data.stat().st_mode & 0o777 == 0o750


def test_holes_land_as_holes(store: LocalStore, tmp_path: Path):
    """A sparse file stays sparse, its tail of zeros included, and equal."""
    source = tmp_path / "s" / "source"
    source.mkdir(parents=True)
    with open(source / "sparse", "wb") as file:
        file.write(b"begin")
        file.seek(3 * 2**20)
        file.write(b"middle")
        file.truncate(8 * 2**20)
    upload(store, KEY, artifact_of(tmp_path / "s"), profile=ChunkProfile.custom(2**20, 4))
    download(store, KEY, tmp_path / "dest", profile=ChunkProfile.custom(2**20, 4))
    landed = tmp_path / "dest" / "data" / "sparse"
    assert landed.read_bytes() == (source / "sparse").read_bytes()
    assert landed.stat().st_blocks * 512 < 2**20


# What the caller hears


def test_progress_and_checkpoints_come_in_the_calling_thread(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """The last event says that everything is done; records count up; both name the same transfer."""
    here = threading.current_thread()
    events: list[ProgressEvent] = []
    records: list[TransferRecord] = []

    def progress(event: ProgressEvent) -> None:
        assert threading.current_thread() is here
        events.append(event)

    def checkpoint(record: TransferRecord) -> None:
        assert threading.current_thread() is here
        records.append(record)

    upload(store, KEY, artifact, profile=SMALL, on_progress=progress, on_checkpoint=checkpoint)
    download(store, KEY, tmp_path / "dest", profile=SMALL, on_progress=progress, on_checkpoint=checkpoint)
    verify(store, KEY, mode="deep", profile=SMALL, on_progress=progress)
    size = artifact.payload_size
    for phase in ("upload", "download", "verify"):
        own = [event for event in events if event.phase == phase]
        assert own[-1] == ProgressEvent(phase, size, size, 0)
        assert [event.bytes_done for event in own] == sorted(event.bytes_done for event in own)
    for kind in ("upload", "download"):
        own = [record for record in records if record.kind == kind]
        assert [record.state for record in own] == ["running"] * (len(own) - 1) + ["done"]
        assert [record.parts_done for record in own] == sorted(record.parts_done for record in own)
        assert own[-1].parts_done == own[-1].parts_total
        assert own[-1].bytes_done == size


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_raising_from_progress_stops_cleanly(kind: str, artifact: Artifact, store: LocalStore, tmp_path: Path):
    """A last checkpoint is written, the exception comes out, and the next run continues."""
    if kind == "download":
        upload(store, KEY, artifact, profile=SMALL)

    class Stop(BaseException):
        pass

    def stop(event: ProgressEvent) -> None:
        if event.bytes_done > 8000:
            raise Stop

    def move(**callbacks: object) -> object:
        if kind == "upload":
            return upload(store, KEY, artifact, profile=SERIAL, **callbacks)  # pyright: ignore[reportArgumentType]
        return download(store, KEY, tmp_path / "dest", profile=SERIAL, **callbacks)  # pyright: ignore[reportArgumentType]

    records: list[TransferRecord] = []
    real = time.monotonic
    ticks = iter(range(10**9))
    with pytest.MonkeyPatch.context() as patch:
        # Every look at the clock is a second later: so progress is told after each part.
        patch.setattr("blobflow.uploads.progress.time.monotonic", lambda: real() + next(ticks))
        with pytest.raises(Stop):
            move(on_progress=stop, on_checkpoint=records.append)
    assert records[-1].state == "failed"
    result = move()
    assert result.bytes_resumed > 0  # pyright: ignore[reportAttributeAccessIssue]
    verify(store, KEY, mode="deep")


@pytest.mark.seed("3.18")
def test_2500_parts_are_taken_up_again(store: LocalStore, tmp_path: Path):
    """More parts than any listing's page: after a crash before Complete, none is sent again and the bytes are right."""
    artifact = artifact_of(tmp_path, {"data": noise(2_500 * 64)})
    profile = ChunkProfile.custom(64, 10_000, workers=2)
    faults = FaultyStore(store, lambda r: Hook(_die) if r.operation == "complete_multipart" else None)
    with pytest.raises(Killed):
        upload(faults, KEY, artifact, profile=profile)
    faulty = watched(store)
    result = upload(faulty, KEY, artifact, profile=profile)
    assert result.parts > 2_500
    assert faulty.count("put_part") == 0
    assert crc32c((store.root / KEY).read_bytes()) == artifact.payload_crc32c


def test_an_object_that_is_replaced_while_it_is_read_is_a_temporary_error(
    artifact: Artifact, store: LocalStore, tmp_path: Path
):
    """Readers pin the payload; they never get a mixture."""
    new = artifact_of(tmp_path / "new", {"new": noise(20_000, 3)})
    upload(store, KEY, artifact, profile=SMALL)

    def replace(_: Request) -> None:
        upload(store, KEY, new, profile=SMALL, overwrite=True)

    faulty = FaultyStore(store, lambda r: Hook(replace) if (r.operation, r.number) == ("get_range", 5) else None)
    with pytest.raises(ObjectChanged) as answer:
        download(faulty, KEY, tmp_path / "dest", profile=SERIAL)
    assert answer.value.retryable
    download(store, KEY, tmp_path / "dest", profile=SERIAL, expected_digest=new.digest)
