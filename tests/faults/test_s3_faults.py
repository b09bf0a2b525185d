"""blobflow against a server with AWS's rules, over a network that breaks: it succeeds, or says why, and never lies."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blobflow import (
    Artifact,
    ChunkProfile,
    DirectoryExporter,
    ProgressEvent,
    UploadResult,
    download,
    export_artifact,
    list_artifacts,
    read_ref,
    run_export_round,
    upload,
    verify,
)
from blobflow.checksum import crc32c
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    IntegrityError,
    NoSuchUpload,
    StoreConfigurationError,
    StoreUnavailable,
    TemporaryError,
    UploadIncomplete,
)
from blobflow.stores import Store
from blobflow.stores.base import Body, PutMode
from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.store import S3Options, S3Store
from blobflow.testing import StoreContract, read_tree, write_tree
from tests.fault_proxy import Corrupt, FaultProxy, Reset, Stall, Truncate, random_faults, scripted_faults
from tests.fault_rules import Rule, Slow
from tests.faults.clients import PREFIX, Stores
from tests.servers import S3Endpoint
from tests.strict_s3 import (
    Exchange,
    FailAfter,
    FailBefore,
    Fault,
    Hook,
    Late,
    Limits,
    Refuse,
    Response,
    StrictS3,
    Tamper,
    Throttle,
)

KEY = "orders.tar"
PART = 8 * 1024
PROFILE = ChunkProfile.custom(PART, 4, workers=3)


class Killed(BaseException):
    """Stands for the end of a process, like Dagster's interrupt."""


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory that makes about thirty parts."""
    files = {f"{number}.bin": noise(20_000, seed=number) for number in range(8)}
    return write_tree(tmp_path / "source", {**files, "dir": {"large": noise(60_000, seed=99), "empty": b""}})


@pytest.fixture
def export(source: Path, tmp_path: Path) -> Callable[[], Artifact]:
    """Exports the directory anew at each call, as another machine would."""
    numbers = iter(range(100))
    return lambda: export_artifact(source, tmp_path / f"artifact-{next(numbers)}").artifact


class Wreck:
    """A bucket in which exactly one whole artifact is expected in the end."""

    def __init__(self, server: StrictS3, bucket: str, artifact: Artifact) -> None:
        self.server = server
        self.bucket = bucket
        self.artifact = artifact

    def assert_one_artifact(self, *, orphans: int = 0) -> None:
        """Payload and manifest, each what it must be, and nothing else: neither an intent nor an upload."""
        objects = self.server.objects(self.bucket)
        assert sorted(objects) == [f"{PREFIX}/{KEY}", f"{PREFIX}/{KEY}.manifest.json"]
        assert objects[f"{PREFIX}/{KEY}"] == payload(self.artifact)
        assert objects[f"{PREFIX}/{KEY}.manifest.json"] == self.artifact.manifest_bytes
        assert len(self.server.uploads(self.bucket)) == orphans


def payload(artifact: Artifact) -> bytes:
    """The bytes that belong under the key."""
    data = bytearray(artifact.payload_size)
    artifact.source().read_into(0, memoryview(data))
    assert crc32c(data) == artifact.payload_crc32c
    return bytes(data)


def send(store: Store, artifact: Artifact, **options: Any) -> UploadResult:
    return upload(store, KEY, artifact, profile=PROFILE, **options)


# The contract


@pytest.mark.seed("1.11")
class TestStrictS3(StoreContract):
    """What holds for every store holds under AWS's rules."""

    many_objects = 250

    @pytest.fixture
    def store(self, strict_s3: StrictS3, stores: Stores) -> Store:
        strict_s3.limits = Limits(min_part_size=1, page_size=100)
        return stores(strict_s3).store

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, S3Store)
        return S3Store(store.options)

    def how_to_open(self, store: Store) -> tuple[str, dict[str, Any]]:
        assert isinstance(store, S3Store)
        options = store.options
        assert isinstance(options.secret_access_key, SecretStr)
        return store.url, {
            "endpoint_url": options.endpoint_url,
            "region": options.region,
            "access_key_id": options.access_key_id,
            "secret_access_key": options.secret_access_key.get_secret_value(),
        }


def test_the_server_attests_what_was_uploaded(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """Where the server checks CRC32C, every part carries one, the whole is compared, and verify reads no payload."""
    artifact = export()
    store = stores(strict_s3)
    assert send(store, artifact).status == "uploaded"
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()
    complete = strict_s3.requests("CompleteMultipartUpload")[0].headers
    assert complete["x-amz-mp-object-size"] == str(artifact.payload_size)
    assert complete["x-amz-checksum-type"] == "FULL_OBJECT"
    assert "x-amz-checksum-crc32c" in complete
    assert all("x-amz-checksum-crc32c" in each.headers for each in strict_s3.requests("UploadPart"))
    assert store.head(KEY).crc32c == artifact.payload_crc32c
    verified = verify(store, KEY)
    assert (verified.mode_used, verified.bytes_read < artifact.payload_size) == ("shallow", True)


# The upload's life


@pytest.mark.seed("3.10")
def test_an_upload_is_created_with_its_type_and_needs_an_id(strict_s3: StrictS3, stores: Stores) -> None:
    """Create tells the content type; an answer without an upload id is a typed, retryable error."""
    store = stores(strict_s3)
    store.create_multipart("layer", part_size=5, content_type="application/zstd")
    assert strict_s3.requests("CreateMultipartUpload")[0].headers["content-type"] == "application/zstd"

    def forget_id(answer: Response) -> Response:
        return answer._replace(body=b"<InitiateMultipartUploadResult></InitiateMultipartUploadResult>")

    strict_s3.script(Rule(Tamper(forget_id), "CreateMultipartUpload"))
    with pytest.raises(StoreUnavailable, match="upload id"):
        store.store.create_multipart("layer", part_size=5)
    strict_s3.script(Rule(Tamper(forget_id), "CreateMultipartUpload"))
    assert store.create_multipart("layer", part_size=5) in strict_s3.uploads(stores.bucket(strict_s3))


@pytest.mark.seed("3.11")
def test_the_upload_is_written_down_before_its_first_part(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """Whoever is stopped right after Create and intent is succeeded by another machine under the same upload id."""
    strict_s3.script(Rule(Refuse("AccessDenied"), "UploadPart", times=None))
    first = export()
    with pytest.raises(StoreConfigurationError):
        send(stores(strict_s3), first)
    operations = [each.operation for each in strict_s3.log if each.method in ("PUT", "POST")]
    assert operations[:2] == ["CreateMultipartUpload", "PutObject"]
    assert "UploadPart" in operations[2:]
    strict_s3.script()
    send(stores(strict_s3), export())
    assert len(strict_s3.requests("CreateMultipartUpload")) == 1
    Wreck(strict_s3, stores.bucket(strict_s3), first).assert_one_artifact()


@pytest.mark.seed("3.12")
def test_parts_are_completed_in_order_and_without_a_gap(strict_s3: StrictS3, stores: Stores) -> None:
    """Parts sent in any order are completed with number and ETag in order; a gap is refused before anything is sent."""
    store = stores(strict_s3)
    upload_id = store.create_multipart("layer", part_size=3)
    parts = [store.put_part("layer", upload_id, number, Body.of(b"%03d" % number)) for number in (3, 1, 4, 2)]
    for wrong in ([parts[1], parts[0]], parts, sorted(parts)[1:], []):
        with pytest.raises(UploadIncomplete):
            store.complete_multipart("layer", upload_id, wrong)
    assert strict_s3.requests("CompleteMultipartUpload") == []
    store.complete_multipart("layer", upload_id, sorted(parts))
    assert store.get("layer", max_bytes=12).data == b"001002003004"


@pytest.mark.seed("3.15")
def test_a_part_without_an_etag_is_sent_again(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """An acknowledgement without ETag is a typed error, and the upload sends that part once more."""

    def forget_tag(answer: Response) -> Response:
        return answer._replace(headers={name: value for name, value in answer.headers.items() if name != "etag"})

    artifact = export()
    strict_s3.script(Rule(Tamper(forget_tag), "UploadPart", part=3))
    send(stores(strict_s3), artifact)
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()
    sent = [each.part_number for each in strict_s3.requests("UploadPart")]
    assert sorted(map(str, sent)) == sorted(map(str, [*range(1, len(sent)), 3]))


@pytest.mark.seed("3.16")
def test_nothing_is_sent_again_when_only_complete_is_missing(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """Stopped between the last part and Complete, the next run completes and sends no part."""
    first = export()
    strict_s3.script(Rule(Refuse("AccessDenied"), "CompleteMultipartUpload"))
    with pytest.raises(StoreConfigurationError):
        send(stores(strict_s3), first)
    result = send(stores(strict_s3), export())
    assert (result.bytes_sent, result.bytes_resumed) == (0, first.payload_size)
    assert len(strict_s3.requests("UploadPart")) == result.parts
    Wreck(strict_s3, stores.bucket(strict_s3), first).assert_one_artifact()


@pytest.mark.seed("3.18", "W3.1")
def test_2500_parts_are_resumed_equal(strict_s3: StrictS3, stores: Stores, tmp_path: Path) -> None:
    """Killed in the middle of 2,500 parts, another machine finds what is there by paged ListParts and adds the rest."""
    profile = ChunkProfile.custom(1024, 500, workers=4)
    write_tree(tmp_path / "source", {"large": noise(2500 * 1024)})
    first = export_artifact(tmp_path / "source", tmp_path / "first").artifact
    enough, go_on = 1500, threading.Event()
    strict_s3.script(Rule(Hook(lambda _: go_on.wait(20)), "UploadPart", nth=enough + 1, times=None))

    def kill(event: ProgressEvent) -> None:
        if event.bytes_done >= (enough - profile.workers) * 1024:
            go_on.set()
            raise Killed

    with pytest.raises(Killed):
        upload(stores(strict_s3), KEY, first, profile=profile, on_progress=kill)
    strict_s3.script()
    second = export_artifact(tmp_path / "source", tmp_path / "second").artifact
    result = upload(stores(strict_s3), KEY, second, profile=profile)
    assert result.parts >= 2500
    assert result.bytes_resumed >= (enough - profile.workers) * 1024
    assert result.bytes_sent + result.bytes_resumed == first.payload_size
    sent = len(strict_s3.requests("UploadPart"))
    assert result.parts <= sent <= result.parts + profile.workers
    markers = [each.query["part-number-marker"] for each in strict_s3.requests("ListParts")]
    assert markers[-3:] == ["0", "1000", "2000"]
    Wreck(strict_s3, stores.bucket(strict_s3), first).assert_one_artifact()


@pytest.mark.seed("W3.5")
def test_an_upload_that_was_completed_before_the_crash_is_only_published(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """Complete done, then the end: the next run finds no upload, recognises the object, and publishes it."""
    first = export()
    strict_s3.script(Rule(Refuse("AccessDenied"), "PutObject", "*.manifest.json"))
    with pytest.raises(StoreConfigurationError):
        send(stores(strict_s3), first)
    assert strict_s3.uploads(stores.bucket(strict_s3)) == {}
    parts = len(strict_s3.requests("UploadPart"))
    send(stores(strict_s3), export())
    assert len(strict_s3.requests("UploadPart")) == parts
    assert len(strict_s3.requests("CompleteMultipartUpload")) == 1
    Wreck(strict_s3, stores.bucket(strict_s3), first).assert_one_artifact()


@pytest.mark.seed("W3.5")
def test_an_upload_that_expired_is_begun_again(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """An upload id that the server forgot costs the parts, not the upload; also in the middle of sending."""
    store, bucket = stores(strict_s3), stores.bucket(strict_s3)

    def expire(_: Exchange) -> None:
        for upload_id, key in strict_s3.uploads(bucket).items():
            strict_s3.endpoint.client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)

    strict_s3.script(Rule(Hook(expire), "UploadPart", part=7))
    artifact = export()
    send(store, artifact)
    assert len(strict_s3.requests("CreateMultipartUpload")) == 2
    Wreck(strict_s3, bucket, artifact).assert_one_artifact()


@pytest.mark.seed("W3.5")
def test_an_upload_that_another_machine_completed_is_settled(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """Two machines send the same content; the one that finds the upload gone finds the other's success."""
    first, second = export(), export()

    def overtake(_: Exchange) -> None:
        send(stores(strict_s3), second)

    strict_s3.script(Rule(Hook(overtake), "UploadPart", part=7))
    result = send(stores(strict_s3), first)
    assert len(strict_s3.requests("CreateMultipartUpload")) == 1
    assert [each.status for each in strict_s3.requests("CompleteMultipartUpload")] == [200]
    assert result.artifact_digest == first.digest
    Wreck(strict_s3, stores.bucket(strict_s3), first).assert_one_artifact()


def test_an_abort_is_repeated_until_no_part_is_left(strict_s3: StrictS3, stores: Stores) -> None:
    """A part that lands during the abort is aborted too; so no part is paid for that nobody sees."""
    strict_s3.limits = Limits(min_part_size=1, parts_outlive_abort=True)
    store, bucket = stores(strict_s3), stores.bucket(strict_s3)
    upload_id = store.create_multipart("large", part_size=4)
    arrived, land = threading.Event(), threading.Event()

    def hold(_: Exchange) -> None:
        arrived.set()
        assert land.wait(20)

    part = threading.Thread(target=store.put_part, args=("large", upload_id, 1, Body.of(b"late")))

    def let_it_land(_: Exchange) -> None:
        land.set()
        part.join(20)
        assert strict_s3.uploads(bucket)

    strict_s3.script(Rule(Hook(hold), "UploadPart"), Rule(Hook(let_it_land), "ListParts"))
    part.start()
    assert arrived.wait(20)
    store.abort_multipart("large", upload_id)
    assert (len(strict_s3.requests("AbortMultipartUpload")), store.retries) == (2, 0)
    assert strict_s3.uploads(bucket) == {}
    with pytest.raises(NoSuchUpload):
        store.list_parts("large", upload_id)


# Complete


@pytest.mark.seed("1.7")
def test_a_slow_complete_is_waited_for(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Complete that takes much longer than any timeout, in sixty blanks, succeeds at the first try."""
    monkeypatch.setattr("blobflow.stores.s3.requests.PATIENCE_S", 0.4)
    artifact = export()
    strict_s3.script(Rule(Late(blanks=60, pause_s=0.02), "CompleteMultipartUpload"))
    send(stores(strict_s3, idle_timeout=0.4), artifact)
    assert len(strict_s3.requests("CompleteMultipartUpload")) == 1
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()


@pytest.mark.parametrize(
    "fault",
    [
        FailAfter(),
        FailBefore(),
        Late(blanks=3, error="InternalError"),
        Late(error="SlowDown"),
        Refuse("InternalError"),
        Refuse("ServiceUnavailable", retry_after_s=1),
        Tamper(lambda _: Response(502, {}, b"<html>bad gateway</html>")),
        Tamper(lambda answer: answer._replace(body=answer.body[:60])),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_complete_may_fail_in_every_way(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact], fault: Fault
) -> None:
    """Lost request, lost answer, error after 200, error before: exactly one artifact in the end, no part sent twice."""
    artifact = export()
    strict_s3.script(Rule(fault, "CompleteMultipartUpload"))
    result = send(stores(strict_s3), artifact)
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()
    assert len(strict_s3.requests("UploadPart")) == result.parts
    assert len(strict_s3.requests("CreateMultipartUpload")) == 1


# Conditional writes


@pytest.mark.parametrize(
    ("key", "nth"),
    [
        ("*.upload.json", 1),
        ("*.upload.json", 2),
        ("*.manifest.json", 1),
        ("*/latest.ref.json", 1),
        ("*/round.lease.json", 1),
        ("*/round.lease.json", 2),
        ("*/round.lease.json", 4),
    ],
)
@pytest.mark.parametrize("fault", [FailAfter(), FailBefore(), Refuse("ConditionalRequestConflict")])
def test_a_lost_answer_is_not_a_lost_race(
    strict_s3: StrictS3, stores: Stores, source: Path, key: str, nth: int, fault: Fault
) -> None:
    """Intent, manifest, ref and lease are written by conditional PUTs; whichever answer is lost, the round is won."""
    rule = Rule(fault, "PutObject", key, nth=nth)
    strict_s3.script(rule)
    store = stores(strict_s3)
    result = run_export_round(store, "orders", DirectoryExporter(path=source), profile=PROFILE)
    assert result is not None
    assert rule.seen > nth
    assert (result.upload.status, result.generation) == ("uploaded", 1)
    ref = read_ref(store, "orders/latest")
    assert ref is not None
    assert (ref.key, ref.manifest_sha256, ref.generation) == (result.upload.key, result.upload.artifact_digest, 1)
    names = [name.removeprefix(f"{PREFIX}/orders/") for name in strict_s3.objects(stores.bucket(strict_s3))]
    tar = result.upload.key.removeprefix("orders/")
    assert names == sorted([tar, f"{tar}.manifest.json", "latest.ref.json", "round.lease.json"])
    written = [each for each in strict_s3.requests("PutObject", key) if each.status == 200]
    assert len(written) == len({each.headers["x-amz-checksum-crc32c"] for each in written})


def test_a_lost_race_is_still_lost(strict_s3: StrictS3, stores: Stores) -> None:
    """Reading back tells one's own success from another's: what somebody else wrote meanwhile is a conflict."""
    store, other = stores(strict_s3), stores(strict_s3)
    strict_s3.script(Rule(Hook(lambda _: other.put("ref", b"theirs")), "PutObject"))
    with pytest.raises(BlobflowError) as lost:
        store.put("ref", b"mine", mode=PutMode.CREATE)
    assert type(lost.value).__name__ == "PreconditionFailed"
    assert store.get("ref", max_bytes=10).data == b"theirs"


# Storms


@pytest.mark.parametrize("retry_after_s", [None, 2])
def test_slow_down_storms_pass(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact], tmp_path: Path, retry_after_s: int | None
) -> None:
    """A server that takes four requests per second of waiting gets all of them in the end, as late as it asked for."""
    artifact = export()
    store = stores(strict_s3)
    throttle = Throttle(4, burst=4, retry_after_s=retry_after_s, clock=lambda: sum(stores.naps))
    strict_s3.script(Rule(throttle, times=None))
    send(store, artifact)
    download(store, KEY, tmp_path / "landed", profile=PROFILE)
    refused = [each for each in strict_s3.log if each.code == "SlowDown"]
    assert len(refused) == len(stores.naps) > 5
    assert min(stores.naps) >= (retry_after_s or 0)
    assert read_tree(tmp_path / "landed" / "data") == read_tree(tmp_path / "source")
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()


@pytest.mark.parametrize(
    "code", ["SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "RequestTimeTooSkewed"]
)
def test_every_operation_survives_a_passing_refusal(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact], tmp_path: Path, code: str
) -> None:
    """The first request of each operation is refused, and nobody notices but the log."""
    artifact = export()
    store = stores(strict_s3)
    operations = [
        "HeadObject", "GetObject", "PutObject", "DeleteObject", "ListObjectsV2",
        "CreateMultipartUpload", "UploadPart", "ListParts", "CompleteMultipartUpload",
    ]  # fmt: skip
    strict_s3.script(*(Rule(Refuse(code), operation) for operation in operations))
    send(store, artifact)
    assert [entry.key for entry in list_artifacts(store)] == [KEY]
    download(store, KEY, tmp_path / "landed", profile=PROFILE)
    assert sorted(each.operation for each in strict_s3.log if each.code == code) == sorted(operations)
    assert read_tree(tmp_path / "landed" / "data") == read_tree(tmp_path / "source")
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()


# The network


def test_every_third_success_is_lost(
    strict_s3: StrictS3, proxy: FaultProxy, stores: Stores, source: Path, tmp_path: Path
) -> None:
    """A whole round, a verification and a download over a network that loses every third good answer: all succeed."""
    store = stores(strict_s3, proxy)
    proxy.faults = scripted_faults(Rule(Truncate(), side="answer", success=True, nth=3, every=True))
    result = run_export_round(store, "orders", DirectoryExporter(path=source), profile=PROFILE)
    assert result is not None
    ref = read_ref(store, "orders/latest")
    assert ref is not None
    assert (ref.key, ref.generation, result.generation) == (result.upload.key, 1, 1)
    verify(store, ref.key, mode="deep", profile=PROFILE)
    landed = download(store, ref.key, tmp_path / "landed", profile=PROFILE, expected_digest=ref.manifest_sha256)
    assert landed.status == "downloaded"
    assert read_tree(tmp_path / "landed" / "data") == read_tree(source)
    assert len(proxy.struck("answer")) > 20


def push_and_pull(store: RetryingStore, artifact: Artifact, dest: Path) -> None:
    send(store, artifact)
    verify(store, KEY, mode="deep", profile=PROFILE)
    download(store, KEY, dest, profile=PROFILE)


@pytest.mark.parametrize("seed", range(4))
def test_cuts_and_resets_anywhere_are_survived(
    strict_s3: StrictS3,
    proxy: FaultProxy,
    stores: Stores,
    export: Callable[[], Artifact],
    tmp_path: Path,
    seed: int,
) -> None:
    """Requests and answers that break at random places cost retries and nothing else."""
    artifact = export()
    store = stores(strict_s3, proxy)
    kinds = [Truncate(), Reset(), Truncate(keep=0), Reset(keep=1), Truncate(keep=500), Reset(keep=5000)]
    proxy.faults = random_faults(seed, 0.15, kinds)
    push_and_pull(store, artifact, tmp_path / "landed")
    assert len(proxy.struck()) > 5
    assert read_tree(tmp_path / "landed" / "data") == read_tree(tmp_path / "source")
    # An answer to Create that was lost leaves an upload behind, which nobody but gc can find.
    lost = [each for each in proxy.struck("answer") if each.operation == "CreateMultipartUpload"]
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact(orphans=len(lost))


@pytest.mark.parametrize(
    ("side", "operation"),
    [("request", "UploadPart"), ("answer", "UploadPart"), ("answer", "GetObject"), ("answer", "ListParts")],
)
def test_a_stall_is_noticed_and_overcome(
    strict_s3: StrictS3,
    proxy: FaultProxy,
    stores: Stores,
    export: Callable[[], Artifact],
    tmp_path: Path,
    side: Any,
    operation: str,
) -> None:
    """Where nothing moves for the idle timeout, the attempt is given up and made again."""
    artifact = export()
    proxy.faults = scripted_faults(Rule(Stall(keep=0), operation, side=side))
    push_and_pull(stores(strict_s3, proxy, idle_timeout=0.5), artifact, tmp_path / "landed")
    assert [message.operation for message in proxy.struck()] == [operation]
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()


@pytest.mark.parametrize(
    ("code", "kind"), [("RequestTimeTooSkewed", StoreUnavailable), ("AccessDenied", StoreConfigurationError)]
)
def test_a_refused_head_says_why(strict_s3: StrictS3, code: str, kind: type[BlobflowError]) -> None:
    """The answer to a HEAD has no body, so a GET is asked for the reason: what passes is no prohibition."""
    bucket = strict_s3.new_bucket()
    strict_s3.script(Rule(Refuse(code), "HeadObject"), Rule(Refuse(code), "GetObject"))
    endpoint = strict_s3.endpoint
    store = S3Store(
        S3Options(
            bucket=bucket,
            endpoint_url=endpoint.endpoint_url,
            access_key_id=endpoint.access_key_id,
            secret_access_key=SecretStr(endpoint.secret_access_key),
        )
    )
    with closing(store), pytest.raises(kind) as refusal:
        store.head("k")
    assert refusal.value.fields["code"] == code


def test_a_slow_body_is_no_silence(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact], tmp_path: Path
) -> None:
    """A body that takes longer than the idle timeout, but always moves, is not given up."""
    store = stores(strict_s3, idle_timeout=0.4)
    send(store, export())
    strict_s3.script(Rule(Slow(PART / 0.8), "GetObject", f"*{KEY}", nth=4))
    download(store, KEY, tmp_path / "landed", profile=PROFILE)
    assert store.retries == 0
    assert read_tree(tmp_path / "landed" / "data") == read_tree(tmp_path / "source")


# Damage on the way


@pytest.mark.parametrize(
    ("operation", "path", "nth"),
    [
        ("UploadPart", "*", 1),
        ("UploadPart", "*", 7),
        ("PutObject", "*.upload.json", 1),
        ("PutObject", "*.upload.json", 2),
        ("PutObject", "*.manifest.json", 1),
        ("CompleteMultipartUpload", "*", 1),
    ],
)
def test_damage_on_the_way_up_is_refused_and_sent_again(
    strict_s3: StrictS3,
    proxy: FaultProxy,
    stores: Stores,
    export: Callable[[], Artifact],
    operation: str,
    path: str,
    nth: int,
) -> None:
    """A byte that changes on its way up is found by the server, and the request is made again."""
    artifact = export()
    store = stores(strict_s3, proxy)
    proxy.faults = scripted_faults(Rule(Corrupt(at=60), operation, path, side="request", nth=nth))
    send(store, artifact)
    assert len(proxy.struck("request")) == 1
    assert len([each for each in strict_s3.log if each.code in ("BadDigest", "XAmzContentSHA256Mismatch")]) == 1
    assert store.retries == 1
    Wreck(strict_s3, stores.bucket(strict_s3), artifact).assert_one_artifact()


def unsteady(*contents: bytes) -> Body:
    """A body that has other bytes at every reading: the first ones are hashed, the second ones sent."""
    readings = iter(contents)
    return Body(len(contents[0]), lambda: (next(readings),), crc32c(contents[0]))


@pytest.mark.parametrize("server", ["strict", pytest.param("rgw", marks=pytest.mark.rgw)])
def test_a_wrong_content_md5_is_refused(request: pytest.FixtureRequest, stores: Stores, server: str) -> None:
    """With content_md5 a part and an object that are not what was hashed are refused, also where CRC32C is ignored."""
    endpoint = request.getfixturevalue(f"{server}_s3")
    retrying = stores(endpoint, content_md5=True)
    store = retrying.store
    upload_id = store.create_multipart("k", part_size=5)
    for send_it in (lambda body: store.put("k", body), lambda body: store.put_part("k", upload_id, 1, body)):
        with pytest.raises(ChecksumMismatch):
            send_it(unsteady(b"right", b"wrong", b"wrong"))
        with pytest.raises(StoreUnavailable, match="damaged on the way"):
            send_it(unsteady(b"right", b"wrong", b"right"))
    assert store.list_parts("k", upload_id) == []
    assert not store.exists("k")
    part = store.put_part("k", upload_id, 1, Body.of(b"right"))
    store.complete_multipart("k", upload_id, [part])
    assert store.get("k", max_bytes=5).data == b"right"


@pytest.mark.rgw
def test_content_md5_makes_up_for_an_ignored_crc32c(rgw_s3: S3Endpoint, stores: Stores) -> None:
    """Ceph stores what was damaged on the way, unless the MD5 goes along."""
    stores(rgw_s3).store.put("k", Body(5, lambda: (b"wrong",), crc32c(b"right")))
    assert stores(rgw_s3).get("k", max_bytes=5).data == b"wrong"
    with pytest.raises(ChecksumMismatch):
        stores(rgw_s3, content_md5=True).store.put("k", unsteady(b"right", b"wrong", b"wrong"))


@pytest.mark.parametrize("nth", [1, 2, 3, 9])
@pytest.mark.parametrize("at", [0, 300, -1])
def test_damage_on_the_way_down_never_lands(
    strict_s3: StrictS3,
    proxy: FaultProxy,
    stores: Stores,
    export: Callable[[], Artifact],
    tmp_path: Path,
    nth: int,
    at: int,
) -> None:
    """A byte that changes on its way down (manifest, head, index, parts) stops the download; the next one succeeds."""
    store = stores(strict_s3, proxy)
    send(store, export())
    proxy.faults = scripted_faults(Rule(Corrupt(at), "GetObject", side="answer", nth=nth))
    dest = tmp_path / "landed"
    with pytest.raises((IntegrityError, TemporaryError) if nth < 3 else IntegrityError):
        download(store, KEY, dest, profile=PROFILE)
    assert len(proxy.struck("answer")) == 1
    assert not dest.exists()
    download(store, KEY, dest, profile=PROFILE)
    assert read_tree(dest / "data") == read_tree(tmp_path / "source")


def test_parts_that_the_server_lost_or_changed_are_not_completed(
    strict_s3: StrictS3, stores: Stores, export: Callable[[], Artifact]
) -> None:
    """Before Complete the server's list is held against the plan: what is wrong is named, and it alone sent again."""
    first, bucket = export(), stores.bucket(strict_s3)

    def replace_part(_: Exchange) -> None:
        """Somebody else sends another part 5 of the same size under the same upload."""
        (upload_id,) = strict_s3.uploads(bucket)
        stores(strict_s3).put_part(KEY, upload_id, 5, Body.of(noise(PART, seed=5)))

    strict_s3.script(Rule(Hook(replace_part), "ListParts"))
    with pytest.raises(UploadIncomplete, match="part 5"):
        send(stores(strict_s3), first)
    assert strict_s3.requests("CompleteMultipartUpload") == []
    strict_s3.script()
    sent = len(strict_s3.requests("UploadPart"))
    send(stores(strict_s3), export())
    assert [each.part_number for each in strict_s3.requests("UploadPart")[sent:]] == [5]
    Wreck(strict_s3, bucket, first).assert_one_artifact()
