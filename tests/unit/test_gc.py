"""Garbage collection: what is left behind goes, and nothing that somebody will come back for."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from blobflow import Artifact, download, open_store, upload, verify
from blobflow.artifact.landing import STAGE_PREFIX
from blobflow.cli import run
from blobflow.coordination.refs import move_ref
from blobflow.errors import NoSuchUpload, UsageError
from blobflow.layers import LayerSync
from blobflow.maintenance.gc import DEFAULT_AGE_S, GcReport, collect, collect_stages
from blobflow.owner import process_owner
from blobflow.stores.base import Body, Store, UploadMeta
from blobflow.stores.local.store import LocalStore
from blobflow.stores.probe import probe
from blobflow.testing import FailBefore, FaultyStore, Hook, Request, read_tree, write_tree
from blobflow.uploads.intent import TTL_S, IntentKeeper
from tests.clock import Clock
from tests.kit import SERIAL, TREE, Killed, artifact_of, dies_at, dies_before, keys, local_store, noise
from tests.servers import S3Endpoint
from tests.strict_s3 import Limits, StrictS3

DAY_S = 24 * 3600.0
GONE = f"{process_owner().rpartition('/')[0]}/{10**9}"
"""A process of this machine that cannot exist."""


@pytest.fixture
def clock() -> Clock:
    return Clock(float(int(time.time())))  # intents are written by the real one; whole seconds are exact in every unit


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> LocalStore:
    return LocalStore(tmp_path / "store", now_ns=clock.ns)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path)


def killed_upload(artifact: Artifact, store: Store, key: str, operation: str, number: int = 1) -> None:
    """An upload whose process dies before this request."""
    with pytest.raises(Killed):
        upload(FaultyStore(store, dies_before(operation, number)), key, artifact, profile=SERIAL)


def summary(report: GcReport) -> tuple[list[str], list[str], list[str], int]:
    """Keys of uploads, intents and payloads that were found, and the number of uploads that were kept."""
    return [upload.key for upload in report.uploads], report.intents, report.payloads, report.uploads_kept


NOTHING = ([], [], [], 0)


def test_an_upload_that_nobody_took_up_again_goes(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """A killed upload can be taken up again until the limit is over; then it goes with its intent, and once."""
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    assert summary(collect(store, clock=clock)) == ([], [], [], 1)
    clock.now += TTL_S + DAY_S - 5
    assert summary(collect(store, clock=clock)) == ([], [], [], 1)
    clock.now += 10
    assert summary(collect(store, clock=clock)) == (["a.tar"], ["a.tar"], [], 0)
    assert keys(store) == store.list_uploads() == []
    assert summary(collect(store, clock=clock)) == NOTHING


def test_an_upload_of_a_process_that_is_gone_need_not_expire(
    artifact: Artifact, store: LocalStore, clock: Clock
) -> None:
    """Right after a crash on the same machine a limit of 0 collects all of it; other limits begin with the expiry."""
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    keeper = IntentKeeper(store, "a.tar", clock=clock)
    assert collect(store, older_than_s=0, clock=clock).uploads == [], "this process lives"
    written = keeper.load()
    assert written is not None
    store.put("a.tar.upload.json", replace(written, owner=GONE).encode())
    assert summary(collect(store, older_than_s=1, clock=clock)) == ([], [], [], 1)
    assert summary(collect(store, older_than_s=0, clock=clock)) == (["a.tar"], ["a.tar"], [], 0)
    assert keys(store) == store.list_uploads() == []


def test_an_upload_without_intent_goes_by_its_age(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """Killed between beginning an upload and writing its intent: only its age tells that nobody is at work."""
    killed_upload(artifact, store, "a.tar", "put")
    assert keys(store) == []
    clock.now += DAY_S - 5
    assert summary(collect(store, clock=clock)) == ([], [], [], 1)
    clock.now += 10
    assert summary(collect(store, clock=clock)) == (["a.tar"], [], [], 0)
    assert store.list_uploads() == []


def test_of_two_uploads_the_named_one_stays(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """An old upload beside the one that the intent of the same key names is nobody's."""
    store.create_multipart("a.tar", part_size=100)
    clock.now += DAY_S
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    assert summary(collect(store, clock=clock)) == (["a.tar"], [], [], 1)
    named = IntentKeeper(store, "a.tar").load()
    assert named is not None
    assert [found.upload_id for found in store.list_uploads()] == [named.upload_id]


def test_a_running_upload_is_never_touched(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """Even with no limit at all, an upload at work is left alone and ends well."""
    reports: list[GcReport] = []

    def at_every_request(request: Request) -> Hook | None:
        if request.operation in ("put_part", "list_parts", "complete_multipart"):
            return Hook(lambda _: reports.append(collect(store, older_than_s=0, payloads=True)))
        return None

    result = upload(FaultyStore(store, at_every_request), "a.tar", artifact, profile=SERIAL)
    assert len(reports) > 5
    assert all(summary(report) == ([], [], [], 1) for report in reports)
    assert verify(store, "a.tar").artifact_digest == result.artifact_digest


@pytest.mark.parametrize("operation", ["put", "list_parts", "put_part", "complete_multipart", "head"])
def test_an_upload_that_loses_the_race_with_gc_begins_anew(
    artifact: Artifact, store: LocalStore, clock: Clock, operation: str
) -> None:
    """Collected in the very moment it was taken up again, at any request, an upload sends everything again."""
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    clock.now += TTL_S + DAY_S + 10
    collected: list[GcReport] = []

    def faults(request: Request) -> Hook | None:
        if request.operation == operation and not collected:
            return Hook(lambda _: collected.append(collect(store, clock=clock)))
        return None

    result = upload(FaultyStore(store, faults), "a.tar", artifact, profile=SERIAL)
    assert collected
    assert verify(store, "a.tar", mode="deep").artifact_digest == result.artifact_digest
    collect(store, older_than_s=0, clock=lambda: clock.now + TTL_S)
    assert store.list_uploads() == []
    assert keys(store) == ["a.tar", "a.tar.manifest.json"]


def test_an_intent_that_was_taken_up_again_stays(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """Between looking and removing, somebody begins anew under the same key: that one's intent is not removed."""
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    clock.now += TTL_S + DAY_S + 10

    def begin_anew(_: Request) -> None:
        upload_id = store.create_multipart("a.tar", part_size=4096)
        keeper = IntentKeeper(store, "a.tar")
        before = keeper.load()
        assert before is not None
        assert keeper.begin(before.manifest_file, upload_id, 4096, replaces=None)

    watched = FaultyStore(store, lambda request: Hook(begin_anew) if request.operation == "abort_multipart" else None)
    assert summary(collect(watched, clock=clock)) == (["a.tar"], [], [], 0)
    assert keys(store) == ["a.tar.upload.json"]
    assert len(store.list_uploads()) == 1


def test_the_intent_of_a_finished_upload_goes(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """Killed after publishing, an upload leaves an intent whose upload is gone; the artifact stays."""
    killed_upload(artifact, store, "a.tar", "delete")
    assert keys(store) == ["a.tar", "a.tar.manifest.json", "a.tar.upload.json"]
    clock.now += TTL_S + DAY_S + 10
    assert summary(collect(store, clock=clock)) == ([], ["a.tar"], [], 0)
    assert keys(store) == ["a.tar", "a.tar.manifest.json"]
    verify(store, "a.tar")


def test_a_payload_whose_manifest_never_came_is_found_and_stays(
    artifact: Artifact, store: LocalStore, clock: Clock
) -> None:
    """A payload that nobody can see is shown, and removed only on demand."""
    killed_upload(artifact, store, "a.tar", "head")
    assert keys(store) == ["a.tar", "a.tar.upload.json"]
    clock.now += TTL_S + DAY_S + 10
    assert summary(collect(store, clock=clock)) == ([], ["a.tar"], ["a.tar"], 0)
    assert keys(store) == ["a.tar"]
    assert summary(collect(store, clock=clock)) == ([], [], ["a.tar"], 0)
    assert collect(store, payloads=True, dry_run=True, clock=clock).payloads == ["a.tar"]
    assert keys(store) == ["a.tar"]
    assert collect(store, payloads=True, clock=clock).payloads == ["a.tar"]
    assert keys(store) == []


def test_a_payload_that_is_published_meanwhile_stays(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """Between the listing and the removal the manifest comes: the payload is not without one any more."""
    upload(store, "a.tar", artifact, profile=SERIAL)
    store.delete("a.tar.manifest.json")
    clock.now += DAY_S + 10

    def publish(_: Request) -> None:
        store.put("a.tar.manifest.json", artifact.manifest_bytes)

    published = FaultyStore(store, lambda r: Hook(publish) if (r.operation, r.number) == ("get_range", 1) else None)
    assert collect(published, payloads=True, clock=clock).payloads == []
    verify(store, "a.tar")


def test_what_is_not_ours_stays(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """Other people's objects, young ones, refs, artifacts, and tars that only look like ours are never removed."""
    upload(store, "ok.tar", artifact, profile=SERIAL)
    payload = store.get("ok.tar", max_bytes=10**6).data
    others = {
        "notes.txt": b"hello",
        "blocks.bin": noise(2048),
        "empty": b"",
        "half.tar": payload[: len(payload) // 1024 * 512],
        "longer.tar": payload + bytes(512),
        "other.tar": payload[:600] + b"!" + payload[601:],
        "blobflow-probe/mine.tar": b"x" * 512,
        "blobflow-probe.json": b"{}",
    }
    for key, data in others.items():
        store.put(key, data)
    move_ref(store, "latest", "ok.tar", artifact.digest)
    before = keys(store)
    clock.now += 10 * DAY_S
    store.put("young.tar", payload)
    assert summary(collect(store, payloads=True, clock=clock)) == NOTHING
    assert keys(store) == sorted([*before, "young.tar"])


def test_only_below_the_prefix(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """What is not below the prefix is somebody else's."""
    for key in ("team/a.tar", "other/a.tar"):
        killed_upload(artifact, store, key, "put_part", 3)
    clock.now += 2 * DAY_S
    assert summary(collect(store, "team/", clock=clock)) == (["team/a.tar"], ["team/a.tar"], [], 0)
    assert keys(store) == ["other/a.tar.upload.json"]
    assert [found.key for found in store.list_uploads()] == ["other/a.tar"]


def test_a_dry_run_changes_nothing(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """A dry run says what the real one does afterwards, and sends nothing but questions."""
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    killed_upload(artifact, store, "b.tar", "head")
    clock.now += 2 * DAY_S
    watched = FaultyStore(store)
    planned = collect(watched, payloads=True, dry_run=True, clock=clock)
    assert {request.operation for request in watched.log} <= {"list", "list_uploads", "get", "head", "get_range"}
    assert summary(planned) == (["a.tar"], ["a.tar", "b.tar"], ["b.tar"], 0)
    assert summary(collect(store, payloads=True, clock=clock)) == summary(planned)


@pytest.mark.parametrize("unreadable", [b'{"format": "blobflow.upload/2"}', b"", bytes(5_000_000)])
def test_an_intent_of_a_later_version_is_left_alone(store: LocalStore, clock: Clock, unreadable: bytes) -> None:
    """What this version cannot read may be alive: neither the intent nor an upload of its key is touched."""
    store.put("a.tar.upload.json", unreadable)
    store.create_multipart("a.tar", part_size=100)
    clock.now += 10 * DAY_S
    report = collect(store, clock=clock)
    assert (summary(report), report.unreadable) == (([], [], [], 1), ["a.tar"])
    assert keys(store) == ["a.tar.upload.json"]


class TellsDate(LocalStore):
    """Says this of the beginning of every upload."""

    initiated: datetime | None = None

    @override
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        return [found._replace(initiated=self.initiated) for found in super().list_uploads(prefix)]


@pytest.mark.parametrize("initiated", [None, datetime(2010, 11, 10, tzinfo=timezone.utc)])
def test_an_upload_of_unknown_age_counts_as_new(
    tmp_path: Path, artifact: Artifact, clock: Clock, initiated: datetime | None
) -> None:
    """Without a date that can be believed, only the intent decides; a limit of 0 needs no date."""
    store = TellsDate(tmp_path / "store", now_ns=clock.ns)
    store.initiated = initiated
    store.create_multipart("nobody's.tar", part_size=100)
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    clock.now += 2 * DAY_S
    assert summary(collect(store, clock=clock)) == (["a.tar"], ["a.tar"], [], 1)
    assert summary(collect(store, older_than_s=0, clock=clock)) == (["nobody's.tar"], [], [], 0)


def test_what_a_killed_probe_left_goes(store: LocalStore, clock: Clock) -> None:
    """Wherever a probe is killed: its objects and uploads go when they are old."""
    for request_number in range(2, 100, 7):
        with suppress(Killed):
            probe(FaultyStore(store, dies_at(request_number)))
            break
    else:
        pytest.fail("a probe has no hundred requests")
    left = keys(store)
    uploads = store.list_uploads()
    assert left
    assert uploads
    assert collect(store, clock=clock).trials == []
    assert keys(store) == left
    clock.now += DAY_S
    report = collect(store, clock=clock)
    assert (report.trials, len(report.uploads)) == (left, len(uploads))
    assert keys(store) == store.list_uploads() == []


def test_one_stuck_upload_does_not_keep_the_others(store: LocalStore, clock: Clock) -> None:
    """What cannot be removed at the moment is named, and the rest is collected."""
    for key in ("a.tar", "b.tar", "c.tar"):
        store.create_multipart(key, part_size=100)
    clock.now += DAY_S

    def faults(request: Request) -> FailBefore | None:
        return FailBefore() if (request.operation, request.key) == ("abort_multipart", "b.tar") else None

    report = collect(FaultyStore(store, faults), clock=clock)
    assert (summary(report), report.failed) == ((["a.tar", "c.tar"], [], [], 1), ["b.tar"])
    assert summary(collect(store, clock=clock)) == (["b.tar"], [], [], 0)


def test_an_upload_that_cannot_be_aborted_keeps_its_intent(artifact: Artifact, store: LocalStore, clock: Clock) -> None:
    """The intent goes after the upload, so that the next run finds both."""
    killed_upload(artifact, store, "a.tar", "put_part", 3)
    clock.now += 2 * DAY_S
    stuck = FaultyStore(store, lambda request: FailBefore() if request.operation == "abort_multipart" else None)
    assert collect(stuck, clock=clock).failed == ["a.tar"]
    assert keys(store) == ["a.tar.upload.json"]


def test_a_store_without_uploads_has_none_to_collect() -> None:
    """Where uploads are single requests there is nothing to abort."""
    assert summary(collect(open_store("memory://collected"))) == NOTHING


# --------------------------------------------------------------------------------------------------------- real servers


@pytest.fixture(params=["strict", pytest.param("rgw", marks=pytest.mark.rgw)])
def endpoint(request: pytest.FixtureRequest) -> Iterator[S3Endpoint]:
    if request.param == "rgw":
        yield request.getfixturevalue("rgw_s3")
        return
    with StrictS3(Limits(min_part_size=1)) as server:
        yield server.endpoint
        server.endpoint.client.close()


def test_on_s3_no_part_is_left_to_be_paid_for(artifact: Artifact, endpoint: S3Endpoint) -> None:
    """An orphaned upload and its parts are gone from the server's own point of view; a live one stays."""
    bucket = endpoint.new_bucket()
    options: dict[str, Any] = {
        "endpoint_url": endpoint.endpoint_url,
        "access_key_id": endpoint.access_key_id,
        "secret_access_key": endpoint.secret_access_key,
    }
    with closing(open_store(f"s3://{bucket}/team", **options)) as store:
        orphan = store.create_multipart("orphan.tar", part_size=1000)
        store.put_part("orphan.tar", orphan, 1, Body.of(noise(1000)))
        killed_upload(artifact, store, "a.tar", "put_part")
        report = collect(store, older_than_s=0)
        assert summary(report) == (["orphan.tar"], [], [], 1)
        with pytest.raises(NoSuchUpload):
            store.list_parts("orphan.tar", orphan)
        later = datetime.now(timezone.utc).timestamp() + TTL_S + DEFAULT_AGE_S + 10
        assert summary(collect(store, clock=lambda: later)) == (["a.tar"], ["a.tar"], [], 0)
    assert "Uploads" not in endpoint.client.list_multipart_uploads(Bucket=bucket)


# --------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture
def stage(tmp_path: Path, artifact: Artifact) -> Path:
    """What a killed download left in `<tmp_path>/landing`."""
    store = local_store(tmp_path)
    upload(store, "a.tar", artifact, profile=SERIAL)
    with pytest.raises(Killed):
        download(FaultyStore(store, dies_at(6)), "a.tar", tmp_path / "landing" / "a", profile=SERIAL)
    (stage,) = (tmp_path / "landing").glob(f"{STAGE_PREFIX}*")
    return stage


@pytest.mark.parametrize("age_s", [-1.0, float("nan")])
def test_only_an_age_is_taken_for_one(tmp_path: Path, store: LocalStore, age_s: float) -> None:
    """A slip in arithmetic must not look like an empty store."""
    with pytest.raises(UsageError, match="is not valid"):
        collect(store, older_than_s=age_s)
    with pytest.raises(UsageError, match="is not valid"):
        collect_stages(tmp_path, older_than_s=age_s)


def test_the_stage_of_a_killed_download_goes_when_it_is_old(stage: Path, clock: Clock) -> None:
    """A stage stays while the download may be taken up again; then it goes whole."""
    clock.now += DAY_S - 60
    assert collect_stages(stage.parent, clock=clock) == []
    clock.now += 120
    assert collect_stages(stage.parent, dry_run=True, clock=clock) == [stage]
    assert stage.exists()
    assert collect_stages(stage.parent, clock=clock) == [stage]
    assert collect_stages(stage.parent, clock=clock) == list(stage.parent.iterdir()) == []


def test_a_stage_that_a_download_holds_stays(stage: Path, clock: Clock) -> None:
    """However old: a slow link may be silent for a long time."""
    clock.now += 10 * DAY_S
    with open(stage / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert collect_stages(stage.parent, clock=clock) == []
    assert (stage / "journal").exists()


def test_what_is_no_stage_stays(tmp_path: Path, stage: Path, clock: Clock) -> None:
    """Neighbours, files and links are not followed and not removed, whatever their names."""
    landing = stage.parent
    (tmp_path / "precious").mkdir()
    (landing / f"{STAGE_PREFIX}link").symlink_to(tmp_path / "precious")
    (landing / f"{STAGE_PREFIX}file").touch()
    (landing / "blobflow-download-data").mkdir()
    clock.now += 10 * DAY_S
    assert collect_stages(landing, clock=clock) == [stage]
    assert (tmp_path / "precious").is_dir()
    assert len(list(landing.iterdir())) == 3


# ------------------------------------------------------------------------------------------------------------ the shell


def test_the_command_collects_what_was_killed(
    tmp_path: Path, artifact: Artifact, stage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`blobflow gc` shows what it would do, does it, and finds nothing afterwards."""
    store = local_store(tmp_path)
    orphan = store.create_multipart("orphan.tar", part_size=100)
    killed_upload(artifact, store, "b.tar", "head")
    store.delete("b.tar.upload.json")

    def call(*arguments: str) -> str:
        options = ("--older-than", "0", "--stages", str(stage.parent), *arguments)
        assert run(["--store", str(store.root), "gc", *options]) == 0
        return capsys.readouterr().out

    assert call("--dry-run").splitlines() == [
        f"would abort  upload {orphan} of orphan.tar",
        "found  payload without manifest b.tar",
        f"would remove  {stage}",
        "3 found, 0 uploads kept",
    ]
    document = json.loads(call("--json", "--payloads"))
    assert document == {
        "status": "collected",
        "store": store.url,
        "prefix": "",
        "older_than_s": 0.0,
        "uploads": [{"key": "orphan.tar", "upload_id": orphan}],
        "intents": [],
        "trials": [],
        "payloads": ["b.tar"],
        "payloads_removed": 1,
        "stages": [str(stage)],
        "unreadable": [],
        "failed": [],
        "uploads_kept": 0,
    }
    assert call("--payloads") == "0 found, 0 uploads kept\n"
    download(store, "a.tar", tmp_path / "again")
    assert read_tree(tmp_path / "again" / "data") == TREE


@pytest.mark.parametrize("age", ["", "yesterday", "-1h", "1.5h", "7w", "1h30m"])
def test_an_age_without_meaning_is_refused(tmp_path: Path, age: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit that was mistyped must not collect anything."""
    assert run(["--store", str(tmp_path), "gc", "--older-than", age]) == 2
    assert "24h" in capsys.readouterr().err


# Layers


def killed_sync(path: Path, store: LocalStore, operation: str, number: int = 1) -> None:
    """A sync whose process dies before this request; its intent belongs to a process that is gone."""
    source = path / "layer source"
    if not source.exists():
        write_tree(source, TREE)
    with pytest.raises(Killed):
        LayerSync(FaultyStore(store, dies_before(operation, number)), home=path / "home", profile=SERIAL).sync(
            "web", source
        )
    for meta in list(store.list()):
        if meta.key.endswith(".upload.json"):
            document = json.loads(store.get(meta.key, max_bytes=1 << 20).data)
            store.put(meta.key, json.dumps(document | {"owner": GONE}).encode())


def test_a_killed_layer_upload_is_collected_when_it_is_old(store: LocalStore, clock: Clock, tmp_path: Path):
    """Not before: until then its host, or another one, continues it."""
    killed_sync(tmp_path, store, "put_part", 3)
    young = collect(store, clock=clock)
    assert (young.uploads, young.intents, young.uploads_kept) == ([], [], 1)
    clock.now += 2 * DAY_S
    old = collect(store, clock=clock)
    assert ([upload.key for upload in old.uploads], old.uploads_kept) == (old.intents, 0)
    assert len(old.intents) == 1
    assert (list(store.list()), store.list_uploads()) == ([], [])


def test_a_layer_without_metadata_is_found_and_one_with_it_stays(store: LocalStore, clock: Clock, tmp_path: Path):
    """Nobody sees the first, and only `payloads` removes it; the second stays even if no container names it."""
    killed_sync(tmp_path, store, "complete_multipart")
    (upload,) = store.list_uploads()
    store.complete_multipart(upload.key, upload.upload_id, store.list_parts(upload.key, upload.upload_id))
    store.delete(upload.key + ".upload.json")
    write_tree(tmp_path / "other", {"a": "b"})
    whole = LayerSync(store, home=tmp_path / "home").sync("other", tmp_path / "other")
    store.delete("containers/other.ref.json")
    assert collect(store, payloads=True, clock=clock).payloads == []
    clock.now += 2 * DAY_S
    assert collect(store, clock=clock).payloads == [upload.key]
    assert store.exists(upload.key)
    assert collect(store, payloads=True, clock=clock).payloads == [upload.key]
    left = [meta.key for meta in store.list()]
    assert left == [whole.key.replace(".tar.zst", ".layer.json"), whole.key]
    assert collect(store, payloads=True, older_than_s=0).payloads == []
