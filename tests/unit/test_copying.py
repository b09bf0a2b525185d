"""Copying artifacts from store to store: the same promises as an upload, without a local disk."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from blobflow import Artifact, ChunkProfile, CopyResult, TransferRecord, copy_artifact, open_store, upload, verify
from blobflow.cli import run
from blobflow.errors import (
    ArtifactInvalid,
    ArtifactNotFound,
    BlobflowError,
    ChecksumMismatch,
    KeyConflict,
    ObjectChanged,
    StoreConfigurationError,
    TransferBusy,
    UsageError,
)
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.stores.optional import ObjectAddress, address_of
from blobflow.stores.wrapping import WrappingStore
from blobflow.testing import CorruptRead, FailAfter, FailBefore, FaultyStore, Hook, Request, scripted_faults
from blobflow.transport import ProgressEvent, read_manifest_bytes
from blobflow.uploads.intent import IntentKeeper
from tests.kit import SERIAL, SMALL, Killed, artifact_of, dies_at, keys, noise, watched
from tests.servers import S3Endpoint
from tests.strict_s3 import Limits, StrictS3

KEY, COPY = "orders/monday", "elsewhere/monday"
COARSE = ChunkProfile.custom(12_288, 1, workers=1)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path / "made")


@pytest.fixture
def source(tmp_path: Path, artifact: Artifact) -> LocalStore:
    """A store that has the artifact under KEY."""
    store = LocalStore(tmp_path / "from")
    upload(store, KEY, artifact, profile=SMALL)
    return store


@pytest.fixture
def target(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "to")


def s3_store(endpoint: S3Endpoint, place: str = "") -> Store:
    return open_store(
        f"s3://{place or endpoint.new_bucket() + '/some/prefix'}",
        endpoint_url=endpoint.endpoint_url,
        region=endpoint.region,
        access_key_id=endpoint.access_key_id,
        secret_access_key=endpoint.secret_access_key,
    )


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_copy_is_the_artifact_byte_for_byte(artifact: Artifact, source: LocalStore, target: LocalStore):
    """Payload and manifest are equal, every byte moved once, and nothing else stays in the target."""
    result = copy_artifact(source, KEY, target, COPY, profile=SMALL)
    assert (target.root / COPY).read_bytes() == (source.root / KEY).read_bytes()
    assert read_manifest_bytes(target, COPY) == artifact.manifest_bytes
    assert keys(target) == [COPY, f"{COPY}.manifest.json"]
    assert target.list_uploads() == []
    head = artifact.payload_size - artifact.manifest.body.size
    assert result == CopyResult(
        status="copied",
        source_key=KEY,
        key=COPY,
        artifact_digest=artifact.digest,
        manifest=artifact.manifest,
        server_side=False,
        bytes_total=artifact.payload_size,
        bytes_received=artifact.payload_size - head,  # the manifest's entry is made from the sibling
        bytes_sent=artifact.payload_size,
        bytes_resumed=0,
        seconds=result.seconds,
        parts=result.parts,
        checkpoints_saved=result.checkpoints_saved,
    )


def test_nothing_touches_the_local_disk(source: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a bucket into memory: the temporary directory stays empty all the while."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    name = uuid.uuid4().hex

    def look(_: Request) -> None:
        assert list((tmp_path / "tmp").iterdir()) == []

    watching = FaultyStore(source, lambda _: Hook(look))
    store = open_store(f"memory://{name}")
    assert copy_artifact(watching, KEY, store, COPY, profile=SMALL).status == "copied"
    assert watching.count("get_range") > 5
    verify(store, COPY, mode="deep")
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def test_a_copy_crosses_kinds_of_stores(source: LocalStore, target: LocalStore, moto_s3: S3Endpoint):
    """From a directory to S3 and back: what comes back is what went."""
    bucket = s3_store(moto_s3)
    copy_artifact(source, KEY, bucket, COPY, profile=SMALL)
    assert verify(bucket, COPY, mode="deep").status == "verified"
    copy_artifact(bucket, COPY, target, KEY, profile=SMALL)
    assert (target.root / KEY).read_bytes() == (source.root / KEY).read_bytes()
    bucket.close()


def test_what_is_there_is_not_copied_again(artifact: Artifact, source: LocalStore, target: LocalStore):
    """Equal content under the target's key, however it came there: no part is fetched or sent."""
    upload(target, COPY, artifact, profile=SMALL)
    watching = watched(source)
    result = copy_artifact(watching, KEY, target, COPY)
    assert (result.status, result.bytes_sent, result.bytes_received) == ("unchanged", 0, 0)
    assert watching.count("get_range") == 0


def test_other_content_is_refused_unless_it_may_be_replaced(source: LocalStore, target: LocalStore, tmp_path: Path):
    """A key is immutable for copies too."""
    other = artifact_of(tmp_path / "other", {"other": "content"})
    upload(target, COPY, other)
    with pytest.raises(KeyConflict):
        copy_artifact(source, KEY, target, COPY)
    verify(target, COPY, expected_digest=other.digest)
    result = copy_artifact(source, KEY, target, COPY, overwrite=True, profile=SMALL)
    verify(target, COPY, mode="deep", expected_digest=result.artifact_digest)


def test_an_absent_artifact_is_not_found(source: LocalStore, target: LocalStore):
    """The error names the source's key, and the target hears nothing."""
    watching = watched(target)
    with pytest.raises(ArtifactNotFound, match="'orders/tuesday'"):
        copy_artifact(source, "orders/tuesday", watching, COPY)
    assert watching.log == []


def test_an_artifact_is_not_copied_to_itself(source: LocalStore):
    """Same store, same key: a mistake of the caller, and no request for the payload."""
    with pytest.raises(UsageError, match="to itself"):
        copy_artifact(LocalStore(source.root), KEY, source, KEY)


# Proof


@pytest.mark.parametrize("where", ["another store", "the same store"])
def test_a_damaged_source_is_refused(where: str, artifact: Artifact, source: LocalStore, target: LocalStore):
    """One flipped bit: nothing becomes visible, nothing is left, and the hint says what to do."""
    flip(source.root / KEY, artifact.payload_size - 3000)
    store = target if where == "another store" else source
    with pytest.raises(ChecksumMismatch, match="its manifest says") as refusal:
        copy_artifact(source, KEY, store, COPY, profile=SMALL)
    assert "verify --deep" in refusal.value.hint
    assert [key for key in keys(store) if key.startswith(COPY)] == []
    assert store.list_uploads() == []


def test_a_read_that_is_damaged_on_the_way_is_refused(source: LocalStore, target: LocalStore):
    """The bucket is right and the wire is not: the sum of the parts is not the promised one."""
    faulty = FaultyStore(source, scripted_faults({("get_range", 3): CorruptRead(at=100)}))
    with pytest.raises(ChecksumMismatch):
        copy_artifact(faulty, KEY, target, COPY, profile=SERIAL)
    assert keys(target) == []


def test_a_source_without_payload_is_damaged(source: LocalStore, target: LocalStore):
    """A manifest whose payload was removed is not copied."""
    source.delete(KEY)
    with pytest.raises(ArtifactInvalid, match="has a manifest but no payload"):
        copy_artifact(source, KEY, target, COPY)


def test_a_source_that_is_replaced_meanwhile_is_a_temporary_error(
    source: LocalStore, target: LocalStore, tmp_path: Path
):
    """Its parts are pinned: never a mixture, and the next copy brings the new one."""
    new = artifact_of(tmp_path / "new", {"new": noise(20_000, 3)})

    def replace(_: Request) -> None:
        upload(source, KEY, new, profile=SMALL, overwrite=True)

    faulty = FaultyStore(source, scripted_faults({("get_range", 4): Hook(replace)}))
    with pytest.raises(ObjectChanged) as answer:
        copy_artifact(faulty, KEY, target, COPY, profile=SERIAL)
    assert answer.value.retryable
    assert not target.exists(f"{COPY}.manifest.json")
    result = copy_artifact(source, KEY, target, COPY, profile=SERIAL)
    assert (result.artifact_digest, result.bytes_resumed) == (new.digest, 0)
    assert target.list_uploads() == []
    verify(target, COPY, mode="deep")


# Crashes


@pytest.mark.parametrize("dead", ["source", "target"])
def test_a_copy_killed_at_any_request_leaves_a_whole_artifact_or_none(
    dead: str, source: LocalStore, artifact: Artifact, tmp_path: Path
):
    """Wherever it dies, of either store's requests: what is visible is whole, and running it again finishes."""
    number, finished = 0, False
    while not finished:
        number += 1
        store = LocalStore(tmp_path / f"store-{number}")
        ends: dict[str, Store] = {"source": source, "target": store}
        ends[dead] = FaultyStore(ends[dead], dies_at(number))
        try:
            copy_artifact(ends["source"], KEY, ends["target"], COPY, profile=COARSE)
            finished = True
        except Killed:
            pass
        if store.exists(f"{COPY}.manifest.json"):
            verify(store, COPY, mode="deep")
        again = copy_artifact(source, KEY, store, COPY, profile=COARSE)
        assert again.artifact_digest == artifact.digest
        verify(store, COPY, mode="deep")
        assert [key for key in keys(store) if key.endswith(".upload.json")] == []
    assert number > (4 if dead == "source" else 12)


def test_a_server_side_copy_killed_at_any_request_is_finished_by_the_next(artifact: Artifact, tmp_path: Path):
    """In one store too, whether it is finished by a copy or by an upload of the same content."""
    number, finished = 0, False
    while not finished:
        number += 1
        store = LocalStore(tmp_path / f"store-{number}")
        upload(store, KEY, artifact, profile=COARSE)
        dead = FaultyStore(store, dies_at(number))
        with suppress(Killed):
            finished = copy_artifact(dead, KEY, dead, COPY, profile=COARSE).server_side
        if store.exists(f"{COPY}.manifest.json"):
            verify(store, COPY, mode="deep")
        if number % 2:
            copy_artifact(store, KEY, store, COPY, profile=COARSE)
        else:
            upload(store, COPY, artifact, profile=COARSE)
        verify(store, COPY, mode="deep", expected_digest=artifact.digest)
        assert keys(store) == [COPY, f"{COPY}.manifest.json", KEY, f"{KEY}.manifest.json"]
    assert number > 15


def test_parts_that_arrived_are_neither_fetched_nor_sent_again(source: LocalStore, target: LocalStore):
    """The second run continues under the same upload id, from the bucket alone."""
    with pytest.raises(Killed):
        copy_artifact(
            source, KEY, FaultyStore(target, scripted_faults({("put_part", 4): Hook(_die)})), COPY, profile=SERIAL
        )
    reads, writes = watched(source), watched(target)
    result = copy_artifact(reads, KEY, writes, COPY, profile=SERIAL)
    assert result.bytes_resumed == 3 * 4096
    assert writes.count("put_part") == reads.count("get_range") == result.parts - 3
    assert writes.count("create_multipart") == 0
    assert result.bytes_received == result.bytes_sent == result.bytes_total - 3 * 4096


def _die(_: Request) -> None:
    raise Killed


def test_a_copy_and_an_upload_of_the_same_content_finish_each_other(
    artifact: Artifact, source: LocalStore, target: LocalStore, tmp_path: Path
):
    """An upload of another export was killed: the copy keeps its parts and publishes its manifest."""
    elsewhere = Artifact.open(_with_other_date(artifact, tmp_path / "elsewhere"))
    with pytest.raises(Killed):
        upload(FaultyStore(target, scripted_faults({("put_part", 4): Hook(_die)})), COPY, elsewhere, profile=SERIAL)
    result = copy_artifact(source, KEY, target, COPY, profile=SERIAL)
    assert (result.artifact_digest, result.bytes_resumed) == (elsewhere.digest, 3 * 4096)
    verify(target, COPY, mode="deep", expected_digest=elsewhere.digest)


def _with_other_date(artifact: Artifact, path: Path) -> Path:
    """The same members under a manifest of another time, and of another length."""
    manifest = json.loads(artifact.manifest_bytes)
    path.mkdir()
    for name in ("INDEX.parquet", "REFERENCE.parquet", "data"):
        (path / name).symlink_to((artifact.path / name).resolve())
    (path / "MANIFEST.json").write_bytes(json.dumps({**manifest, "producer": "x" * 700}).encode())
    return path


def test_a_failing_answer_of_the_last_steps_is_settled(source: LocalStore, target: LocalStore):
    """Complete arrived and its answer did not: the copy is finished by looking at the object."""
    faulty = FaultyStore(target, scripted_faults({("complete_multipart", 1): FailAfter()}))
    with suppress(BlobflowError):
        copy_artifact(source, KEY, faulty, COPY, profile=SMALL)
    assert copy_artifact(source, KEY, target, COPY, profile=SMALL).status == "copied"
    verify(target, COPY, mode="deep")
    assert target.list_uploads() == []


def test_another_upload_under_way_keeps_a_copy_away(source: LocalStore, target: LocalStore, tmp_path: Path):
    """Two different contents never mix under one key."""
    other = artifact_of(tmp_path / "other", {"other": "x"})
    IntentKeeper(target, COPY).begin(
        other.manifest_file, target.create_multipart(COPY, part_size=4096), 4096, replaces=None
    )
    with pytest.raises(TransferBusy):
        copy_artifact(source, KEY, target, COPY)


# The server's own copy


def test_within_a_store_the_server_copies(artifact: Artifact, source: LocalStore):
    """No part is sent; the copy is read back, because nobody else attests its checksum."""
    watching = watched(source)
    result = copy_artifact(watching, KEY, watching, COPY, profile=SMALL)
    assert result.server_side
    assert (watching.count("copy"), watching.count("put_part")) == (1, 0)
    assert (result.bytes_sent, result.bytes_received) == (0, artifact.payload_size)
    verify(source, COPY, mode="deep", expected_digest=artifact.digest)
    assert source.list_uploads() == []


def test_an_attested_copy_is_not_read(artifact: Artifact):
    """Where the server computes the checksum itself, the payload's bytes stay there altogether."""
    with StrictS3() as server:
        store = s3_store(server.endpoint)
        upload(store, KEY, artifact)
        server.log.clear()
        result = copy_artifact(store, KEY, store, COPY)
        assert result.server_side
        assert (result.bytes_sent, result.bytes_received) == (0, 0)
        assert [each.key for each in server.requests("GetObject") if not each.key.endswith(".json")] == []
        verify(store, COPY, mode="deep", expected_digest=artifact.digest)
        assert store.list_uploads() == []
        store.close()


@pytest.mark.parametrize("same_bucket", [True, False])
def test_between_buckets_and_prefixes_of_one_server_the_server_copies(artifact: Artifact, same_bucket: bool):
    """The payload's bytes stay there, as within one store, and the source is pinned."""
    with StrictS3() as server:
        source = s3_store(server.endpoint)
        upload(source, KEY, artifact)
        bucket = source.url.removeprefix("s3://").partition("/")[0] if same_bucket else server.endpoint.new_bucket()
        target = s3_store(server.endpoint, f"{bucket}/other prefix")
        server.log.clear()
        result = copy_artifact(source, KEY, target, COPY)
        assert (result.server_side, result.bytes_sent, result.bytes_received) == (True, 0, 0)
        (asked,) = server.requests("CopyObject")
        assert asked.headers["x-amz-copy-source-if-match"] == source.head(KEY).e_tag
        verify(target, COPY, mode="deep", expected_digest=artifact.digest)
        assert target.list_uploads() == []
        source.close()
        target.close()


class _SomebodyElses(WrappingStore):
    """The strict server knows one access key only; this one says that it is another's."""

    def address_of(self, key: str) -> ObjectAddress | None:
        address = address_of(self.store, key)
        return address and address._replace(identity="somebody-else")


def test_who_has_other_credentials_streams(artifact: Artifact):
    """What the source's keys may read, the target's need not."""
    with StrictS3() as server:
        source = s3_store(server.endpoint)
        upload(source, KEY, artifact)
        target = _SomebodyElses(s3_store(server.endpoint))
        assert not copy_artifact(source, KEY, target, COPY).server_side
        assert server.requests("CopyObject") == []
        verify(target, COPY, mode="deep", expected_digest=artifact.digest)
        source.close()
        target.close()


def test_a_refused_server_side_copy_is_streamed(artifact: Artifact):
    """Between two buckets the server may say no to a copy, though it lets us read the one and write the other."""
    with StrictS3() as server:
        source = s3_store(server.endpoint)
        upload(source, KEY, artifact)
        denied = StoreConfigurationError("denied", operation="copy")
        target = FaultyStore(
            s3_store(server.endpoint), lambda request: FailBefore(denied) if request.operation == "copy" else None
        )
        result = copy_artifact(source, KEY, target, COPY)
        assert (result.server_side, result.bytes_sent) == (False, artifact.payload_size)
        verify(target, COPY, mode="deep", expected_digest=artifact.digest)
        assert target.list_uploads() == []
        source.close()
        target.close()


def test_a_copy_that_replaces_is_proven_before_the_old_payload_goes(
    artifact: Artifact, source: LocalStore, tmp_path: Path
):
    """So it is streamed, also in one store; and a damaged source leaves the old artifact as it was."""
    old = artifact_of(tmp_path / "old", {"old": "content"})
    upload(source, COPY, old)
    flip(source.root / KEY, artifact.payload_size - 3000)
    watching = watched(source)
    with pytest.raises(ChecksumMismatch):
        copy_artifact(watching, KEY, watching, COPY, overwrite=True, profile=SMALL)
    assert watching.count("copy") == 0
    verify(source, COPY, mode="deep", expected_digest=old.digest)


def test_equal_names_on_two_servers_are_two_places(artifact: Artifact):
    """Two endpoints have a bucket of the same name: its object is not copied onto itself by one of them."""
    with StrictS3() as first, StrictS3() as second:
        stores: list[Store] = []
        for server in (first, second):
            server.endpoint.client.create_bucket(Bucket="same-name")
            endpoint = server.endpoint
            stores.append(
                open_store(
                    "s3://same-name",
                    endpoint_url=endpoint.endpoint_url,
                    region=endpoint.region,
                    access_key_id=endpoint.access_key_id,
                    secret_access_key=endpoint.secret_access_key,
                )
            )
        upload(stores[0], KEY, artifact)
        assert not copy_artifact(stores[0], KEY, stores[1], KEY).server_side
        verify(stores[1], KEY, mode="deep")
        for store in stores:
            store.close()


# What callers hear, and what readers see


def test_progress_and_records_speak_of_a_copy(source: LocalStore, target: LocalStore):
    """One transfer id, parts that only grow, and an end that says done."""
    records: list[TransferRecord] = []
    events: list[ProgressEvent] = []
    result = copy_artifact(
        source, KEY, target, COPY, profile=SMALL, on_checkpoint=records.append, on_progress=events.append
    )
    assert {record.kind for record in records} == {"copy"}
    assert len({record.transfer_id for record in records}) == 1
    assert [record.parts_done for record in records] == sorted(record.parts_done for record in records)
    assert records[-1].state == "done"
    assert events[-1] == ProgressEvent("copy", result.bytes_total, result.bytes_total, 0)


@pytest.mark.parametrize("where", ["another store", "the same store"])
def test_readers_see_all_or_nothing(where: str, source: LocalStore, target: LocalStore):
    """Before every request of the copy, whoever looks finds no artifact or a whole one."""
    store = target if where == "another store" else source
    found: list[bool] = []

    def look(_: Request) -> None:
        try:
            verify(store, COPY, mode="deep", profile=COARSE)
            found.append(True)
        except ArtifactNotFound:
            found.append(False)

    faulty = FaultyStore(store, lambda _: Hook(look))
    copy_artifact(faulty if store is source else source, KEY, faulty, COPY, profile=COARSE)
    assert found == sorted(found)
    assert {False, True} == set(found)


# Uploads: what a push costs, and what it leaves


def test_a_new_key_costs_no_request_that_proves_nothing(artifact: Artifact, target: LocalStore):
    """Looked at once before and once after the claim, once before Complete; no list of parts that nobody sent."""
    watching = watched(target)
    upload(watching, KEY, artifact, profile=ChunkProfile())
    manifest, intent = f"{KEY}.manifest.json", f"{KEY}.upload.json"
    assert [(request.operation, request.key) for request in watching.log] == [
        ("get", manifest),  # is it there?
        ("get", intent),  # is somebody at it?
        ("create_multipart", KEY),
        ("put", intent),
        ("get", manifest),  # was somebody quicker?
        ("put_part", KEY),
        ("put", intent),
        ("list_parts", KEY),  # is all there?
        ("get", manifest),  # may the payload be made?
        ("complete_multipart", KEY),
        ("head", KEY),  # is it whole?
        ("put", manifest),
        ("head", KEY),  # is it still this one?
        ("get", intent),  # is it still ours?
        ("delete", intent),
    ]


def test_an_unchanged_push_removes_the_intent_that_a_killed_one_left(artifact: Artifact, target: LocalStore):
    """It died between the manifest and the removal of its intent; an intent of other content is left alone."""
    with pytest.raises(Killed):
        upload(FaultyStore(target, scripted_faults({("delete", 1): Hook(_die)})), KEY, artifact, profile=SMALL)
    assert f"{KEY}.upload.json" in keys(target)
    assert upload(target, KEY, artifact).status == "unchanged"
    assert keys(target) == [KEY, f"{KEY}.manifest.json"]


def test_an_unchanged_push_leaves_the_intent_of_other_content_alone(
    artifact: Artifact, target: LocalStore, tmp_path: Path
):
    """Somebody is about to overwrite the key: that is no leftover."""
    upload(target, KEY, artifact, profile=SMALL)
    other = artifact_of(tmp_path / "other", {"other": "x"})
    keeper = IntentKeeper(target, KEY)
    keeper.load()
    keeper.begin(other.manifest_file, target.create_multipart(KEY, part_size=4096), 4096, replaces=artifact.digest)
    assert upload(target, KEY, artifact).status == "unchanged"
    assert f"{KEY}.upload.json" in keys(target)
    assert len(target.list_uploads()) == 1


# The command


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, Any]]]:
    """Runs `blobflow copy --json`; its exit code and its document."""
    monkeypatch.delenv("BLOBFLOW_STORE", raising=False)
    package = logging.getLogger("blobflow")
    before = package.handlers, package.level

    def call(*arguments: object) -> tuple[int, Any]:
        code = run(["copy", "--json", "--chunk-size", "4KiB", *map(str, arguments)])
        return code, json.loads(capsys.readouterr().out)

    yield call
    package.handlers, package.level = before


def test_the_command_says_what_it_did(
    call: Callable[..., tuple[int, Any]], artifact: Artifact, source: LocalStore, target: LocalStore
):
    """Where from, where to, what moved; the key is kept unless another one is named."""
    code, document = call(source.root, KEY, target.root)
    assert (code, document["status"], document["key"]) == (0, "copied", KEY)
    assert (document["store"], document["source_store"]) == (target.url, source.url)
    assert (document["artifact_digest"], document["bytes_sent"]) == (artifact.digest, artifact.payload_size)
    verify(target, KEY, mode="deep", expected_digest=artifact.digest)
    assert call(source.root, KEY, target.root)[1]["status"] == "unchanged"
    code, document = call(source.root, KEY, source.root, COPY)
    assert (code, document["server_side"], document["key"], document["source_key"]) == (0, True, COPY, KEY)


def test_the_command_exits_with_what_went_wrong(
    call: Callable[..., tuple[int, Any]], artifact: Artifact, source: LocalStore, target: LocalStore, tmp_path: Path
):
    """Usage 2, damaged 3, not found 4, refused 5; the error names its kind."""
    assert call(source.root, KEY, source.root)[0] == 2
    assert call(source.root, "nothing", target.root)[0] == 4
    upload(target, KEY, artifact_of(tmp_path / "other", {"other": "x"}))
    code, document = call(source.root, KEY, target.root)
    assert (code, document["error"]["type"]) == (5, "KeyConflict")
    assert call(source.root, KEY, target.root, "--overwrite")[0] == 0
    flip(source.root / KEY, artifact.payload_size - 3000)
    code, document = call(source.root, KEY, target.root, COPY)
    assert (code, document["error"]["type"]) == (3, "ChecksumMismatch")


def test_what_only_s3_knows_is_kept_from_the_other_store(
    call: Callable[..., tuple[int, Any]], artifact: Artifact, source: LocalStore, monkeypatch: pytest.MonkeyPatch
):
    """From a directory to a bucket, the endpoint on the command line is that of the bucket."""
    with StrictS3(Limits(min_part_size=1)) as server:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.endpoint.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.endpoint.secret_access_key)
        bucket = f"s3://{server.new_bucket()}/backup"
        code, document = call(source.root, KEY, bucket, "--endpoint-url", server.url, "--region", "us-east-1")
    assert (code, document["artifact_digest"], document["store"]) == (0, artifact.digest, bucket)
