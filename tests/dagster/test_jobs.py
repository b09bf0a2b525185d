"""Garbage collection and probe, as Dagster runs them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import dagster as dg
import pytest

from blobflow.coordination.refs import move_ref, read_ref
from blobflow.dagster import (
    BlobflowResource,
    HandoffIOManager,
    gc_job,
    metadata as md,
    probe_check,
    probe_job,
    retention_job,
)
from blobflow.errors import StoreUnavailable, UsageError
from blobflow.stores.base import Body
from blobflow.stores.probe import REPORT_KEY, Finding, ProbedStore, ProbeReport
from blobflow.testing import FailBefore, Fault, Hook, Request
from blobflow.transport import list_artifacts, upload
from tests.dagster.kit import REMOTE, SNAPSHOT, FaultyResource, Place, failure
from tests.kit import artifact_of
from tests.servers import S3Endpoint
from tests.strict_s3 import StrictS3

DAY_S = 24 * 3600.0
GC_NODE, PRUNE_NODE = "blobflow_gc__collect", "blobflow_retention__prune"


@dg.op
def nothing() -> None: ...


@dg.job
def idle() -> None:
    nothing()


def run(place: Place, job: dg.JobDefinition, config: Any = None, **options: Any) -> dg.ExecuteInProcessResult:
    defs = dg.Definitions(jobs=[job], resources={"blobflow": place.resource(**options)})
    return defs.resolve_job_def(job.name).execute_in_process(
        instance=place.instance, run_config=config, raise_on_error=False
    )


def output(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """The metadata of the job's one output."""
    (event,) = (e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_OUTPUT)
    return {label: value.value for label, value in event.step_output_data.metadata.items()}


def left_behind(place: Place, *keys: str) -> None:
    """Uploads that nobody will come back for, begun two days ago as far as the store knows."""
    store = type(place.store)(place.home / "store", now_ns=lambda: time.time_ns() - int(2 * DAY_S * 1e9))
    for key in keys:
        store.put_part(key, store.create_multipart(key, part_size=4096), 1, Body.of(b"part"))


def uploads(place: Place) -> list[str]:
    return [upload.key for upload in place.store.list_uploads()]


# gc


def test_gc_removes_what_was_left_behind_and_says_so(place: Place):
    """Old uploads go, young ones stay, and the run tells of both."""
    left_behind(place, "orders/a.tar")
    place.store.create_multipart("orders/b.tar", part_size=4096)
    result = run(place, gc_job())
    told = output(result)
    assert uploads(place) == ["orders/b.tar"]
    assert (told[md.GC_UPLOADS], told[md.GC_UPLOADS_KEPT], told[md.GC_DRY_RUN]) == (1, 1, False)
    assert [record.data for record in told[md.GC_FOUND].records] == [{"what": "upload", "key": "orders/a.tar"}]


def test_gc_has_the_defaults_of_its_job_and_the_launchpad_changes_them(place: Place):
    """Arguments of `gc_job` are what a plain run uses; a run's own configuration comes first."""
    left_behind(place, "orders/a.tar", "others/a.tar")
    job = gc_job("tidy", prefix="others/")
    told = output(run(place, job, {"ops": {"tidy__collect": {"config": {"prefix": "orders/", "dry_run": True}}}}))
    assert [record.data["key"] for record in told[md.GC_FOUND].records] == ["orders/a.tar"]
    assert uploads(place) == ["orders/a.tar", "others/a.tar"]
    run(place, job)
    assert uploads(place) == ["orders/a.tar"]


def test_gc_that_could_not_remove_all_tries_again(place: Place):
    """What fails for a passing reason keeps nothing else waiting, and the step is retried."""
    left_behind(place, "orders/a.tar", "orders/b.tar")
    failed: list[str] = []

    def faults(request: Request) -> Fault | None:
        if request.operation == "abort_multipart" and request.key == "orders/a.tar" and not failed:
            failed.append(request.key)
            return FailBefore(StoreUnavailable("the store is down", operation="get"))
        return None

    FaultyResource.script(faults)
    step, message, _ = failure(run(place, gc_job(retry_policy=None)))
    assert (step, uploads(place)) == ("blobflow_gc__collect", ["orders/a.tar"])
    assert "'orders/a.tar'" in message

    failed.clear()
    result = run(place, gc_job(retry_policy=dg.RetryPolicy(max_retries=1)))
    assert result.success
    assert uploads(place) == []


# gc of what runs left


def handed_on(place: Place) -> list[str]:
    return [meta.key for meta in place.store.list() if meta.key.startswith(("handoff/runs/", "runs/"))]


def aged(place: Place, days: float) -> None:
    """As if all objects had been written so long ago."""
    for path in (place.home / "store").rglob("*.json"):
        then = path.stat().st_mtime - days * DAY_S
        os.utime(path, (then, then))


NESTED = pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is:DeprecationWarning")  # Dagster's own


def lanes_handed_on(place: Place) -> str:
    """A run of a pipeline in lanes, whose steps handed on through the store; its id."""
    blobflow = place.resource()
    pipeline = place.pipeline(lanes=2)
    place.write()
    defs = dg.Definitions.merge(
        pipeline.definitions,
        dg.Definitions(resources={"blobflow": blobflow, "io_manager": HandoffIOManager(blobflow=blobflow)}),
    )
    result = defs.resolve_job_def("orders_job").execute_in_process(instance=place.instance)
    assert result.success
    return result.run_id


@NESTED
def test_gc_removes_what_finished_runs_handed_on(place: Place):
    """A month later, when nobody starts them again; what assets handed on stays for the runs to come."""
    run_id = lanes_handed_on(place)
    before = handed_on(place)
    assert len(before) >= 6
    assert all(key.startswith(f"handoff/runs/{run_id}/") for key in before)
    aged(place, 29)
    assert output(run(place, gc_job()))[md.GC_RUNS] == 0
    aged(place, 2)
    assert output(run(place, gc_job(), {"ops": {GC_NODE: {"config": {"dry_run": True}}}}))[md.GC_RUNS] == 1
    assert handed_on(place) == before
    assert output(run(place, gc_job()))[md.GC_RUNS] == 1
    assert handed_on(place) == []
    assert [meta.key for meta in place.store.list("handoff/assets/")] != []
    assert place.run(place.pipeline(lanes=2)).success


@NESTED
def test_gc_leaves_what_a_retry_may_read(place: Place):
    """While a run of the same family is under way, its ancestors' values stay, however old."""
    run_id = lanes_handed_on(place)
    aged(place, 60)
    child = place.instance.create_run_for_job(idle, root_run_id=run_id, parent_run_id=run_id)
    assert output(run(place, gc_job()))[md.GC_RUNS] == 0
    place.instance.report_run_canceled(child)
    assert output(run(place, gc_job()))[md.GC_RUNS] == 1


def test_gc_knows_what_is_a_runs_own(place: Place):
    """A pipeline called `runs` keeps its refs; the refs of outputs of ops go with their runs, also of deleted ones."""
    run_id = str(uuid.uuid4())
    own = [f"runs/{run_id}/train/result/latest.ref.json", f"runs/{run_id}/many/result/key/latest.ref.json"]
    others = ["runs/latest.ref.json", f"runs/{run_id}/latest.ref.json", "runs/eu/a/b/latest.ref.json"]
    for key in own + others:
        place.store.put(key, b"{}")
    aged(place, 31)
    assert output(run(place, gc_job()))[md.GC_RUNS] == 1
    assert sorted(handed_on(place)) == sorted(others)


# retention


def test_retention_keeps_the_last_and_the_named(place: Place):
    """Of three snapshots the newest stays, and the one that a ref names; the run's metadata say so."""
    keys: list[str] = []
    for number in range(3):
        place.write({"file": f"number {number}"})
        assert place.run().success
        named = read_ref(place.store, "orders/latest")
        assert named is not None
        keys.append(named.key)
    named = read_ref(place.store, "orders/latest")
    assert named is not None
    move_ref(place.store, "orders/audited", keys[0], named.manifest_sha256)
    job = retention_job(prefix="orders/", keep_last=1)
    told = output(run(place, job, {"ops": {PRUNE_NODE: {"config": {"dry_run": True}}}}))
    assert (told[md.PRUNE_REMOVED], told[md.PRUNE_NAMED], told[md.PRUNE_DRY_RUN]) == (1, 1, True)
    assert sorted(entry.key for entry in list_artifacts(place.store)) == sorted(keys)
    told = output(run(place, job))
    assert [record.data for record in told[md.PRUNE_FOUND].records] == [
        {"what": "removed", "key": keys[1]},
        {"what": "kept, a ref names it", "key": keys[0]},
    ]
    assert sorted(entry.key for entry in list_artifacts(place.store)) == sorted([keys[0], keys[2]])
    assert place.run().success


@pytest.mark.parametrize("rules", [{"keep_last": 3}, {"keep_within_s": 60.0}])
def test_part_of_a_configuration_keeps_the_rest(place: Place, rules: dict[str, Any]):
    """A run that is only told to be a dry run has the job's prefix and rules."""
    artifact = artifact_of(place.home / "made")
    for key in ("orders/1.tar", "other/1.tar"):
        upload(place.store, key, artifact)
    aged(place, 1)
    job = retention_job(prefix="orders/", **rules)
    told = output(run(place, job, {"ops": {PRUNE_NODE: {"config": {"dry_run": True}}}}))
    assert (told[md.PRUNE_REMOVED], told[md.PRUNE_KEPT]) == ((0, 1) if "keep_last" in rules else (1, 0))


@pytest.mark.parametrize(
    ("job", "node", "config", "told"),
    [
        (retention_job(keep_last=3), PRUNE_NODE, {"keep_last": -1}, "keep_last: -1 keeps nothing"),
        (gc_job(), GC_NODE, {"older_than_s": -1.0}, "an age of -1 seconds is not valid"),
        (gc_job(), GC_NODE, {"runs_older_than_s": -1.0}, "an age of -1 seconds is not valid"),
    ],
)
def test_a_wrong_value_fails_at_once(place: Place, job: dg.JobDefinition, node: str, config: dict[str, Any], told: str):
    """What only somebody can mend is not tried four times."""
    result = run(place, job, {"ops": {node: {"config": config}}})
    assert told in failure(result)[1]
    assert not [event for event in result.all_events if event.is_step_up_for_retry]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (retention_job, "no rule says what to keep"),
        (partial(retention_job, keep_last=0), "keep_last=0 keeps nothing"),
        (partial(gc_job, older_than_s=-1.0), "is not valid"),
    ],
)
def test_wrong_rules_are_refused(make: Callable[[], dg.JobDefinition], told: str):
    """When the code location is loaded, not in the night."""
    with pytest.raises(UsageError, match=told):
        make()


def test_content_that_comes_back_while_it_is_pruned_is_tried_again(place: Place):
    """The ref is moved to an artifact that is being removed: the step is retried, and the ref names what is whole."""
    place.write({"file": "first"})
    assert place.run().success
    first = read_ref(place.store, "orders/latest")
    assert first is not None
    place.write({"file": "second"})
    assert place.run().success
    place.write({"file": "first"})
    manifest = place.store.get(first.key + ".manifest.json", max_bytes=1 << 20).data
    left = ["remove", "put back"]

    def faults(request: Request) -> Fault | None:
        # The pruner removes the manifest when the step moves the ref, and sees the ref a moment later.
        if request.operation == "put" and request.key == "orders/latest.ref.json" and len(left) == 2:
            left.pop(0)
            return Hook(lambda _: place.store.delete(first.key + ".manifest.json"))
        if request.operation == "put" and request.key == "orders/latest.ref.json" and len(left) == 1:
            left.pop(0)
            return Hook(put_back)
        return None

    def put_back(_: Request) -> None:
        place.store.put(first.key + ".manifest.json", manifest)

    FaultyResource.script(faults)
    result = place.run(place.pipeline(retry_policy=dg.RetryPolicy(max_retries=2, delay=0.01)))
    assert result.success
    assert left == []
    assert [e.step_key for e in result.all_events if e.is_step_up_for_retry] == ["orders__remote.verify"]
    named = read_ref(place.store, "orders/latest")
    assert named is not None
    assert named.key == first.key


# probe


def moto(s3: S3Endpoint) -> dict[str, Any]:
    """The resource's settings for a new bucket."""
    return {
        "store": f"s3://{s3.new_bucket()}/backups",
        "endpoint_url": s3.endpoint_url,
        "region": s3.region,
        "access_key_id": s3.access_key_id,
        "secret_access_key": s3.secret_access_key,
    }


def probed(place: Place) -> ProbedStore:
    """The store of a place with a bucket."""
    store = place.resource().get_store()
    assert isinstance(store, ProbedStore)
    return store


@pytest.fixture
def s3_place(place: Place, moto_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place whose store is a bucket of a lenient server."""
    return at_bucket(place, moto_s3, monkeypatch)


@pytest.fixture
def strict_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place whose store is a bucket of a server that keeps all of AWS's rules."""
    with StrictS3() as server:
        yield at_bucket(place, server.endpoint, monkeypatch)
        server.endpoint.client.close()


def at_bucket(place: Place, s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> Place:
    """`place` with a new bucket as its store."""
    settings = moto(s3)
    monkeypatch.setattr(place, "resource", lambda **options: BlobflowResource(**settings, **options), raising=False)
    return place


def test_the_probe_job_shows_what_the_server_can_do(s3_place: Place):
    """A table of findings in the run, what was found is renewed for this user, and the store has a report."""
    told = output(run(s3_place, probe_job()))
    rows = {record.data["capability"]: record.data["holds"] for record in told[md.FINDINGS].records}
    assert (rows["create only"], rows["refuses wrong crc32c"]) == ("yes", "no")
    store = probed(s3_place)
    first = store.report().probed_at
    assert store.exists(REPORT_KEY)
    run(s3_place, probe_job())
    assert store.report().probed_at > first
    again = store.report().probed_at
    run(s3_place, probe_job("look"), {"ops": {"look__probe": {"config": {"fresh": False}}}})
    assert store.report().probed_at == again


def test_a_local_store_is_probed_as_well(place: Place):
    """A store without server answers the same questions."""
    told = output(run(place, probe_job()))
    assert told[md.URI] == place.store.url
    assert told[md.SOFTWARE] == "none"


def checks(place: Place, **options: Any) -> dict[str, dg.AssetCheckEvaluation]:
    """The evaluations of the checks, by name, in a run of nothing but them."""
    pipeline = place.pipeline()
    defs = dg.Definitions.merge(
        pipeline.definitions,
        dg.Definitions(
            asset_checks=[probe_check(pipeline.remote, **options)],
            jobs=[
                dg.define_asset_job(
                    "checks", selection=dg.AssetSelection.checks_for_assets(pipeline.remote) - verified(pipeline)
                )
            ],
            resources={"blobflow": place.resource()},
        ),
    )
    result = defs.resolve_job_def("checks").execute_in_process(instance=place.instance)
    return {check.check_name: check for check in result.get_asset_check_evaluations()}


def verified(pipeline: Any) -> dg.AssetSelection:
    """The pipeline's own check, which is evaluated where the asset is made."""
    return dg.AssetSelection.checks(dg.AssetCheckKey(pipeline.remote.key, "verified"))


def test_every_guarantee_of_the_store_is_a_check(s3_place: Place):
    """What holds passes; what does not is a warning, and the evidence says what was seen."""
    made = checks(s3_place)
    assert made["create_only"].passed
    lost = made["refuses_wrong_crc32c"]
    assert (lost.passed, lost.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert lost.description == "a put with a wrong CRC32C was accepted"
    assert made.keys() == ProbeReport.guarantees().keys()
    assert {check.asset_key for check in made.values()} == {REMOTE}


def test_every_check_of_a_good_store_passes(strict_place: Place):
    """A server without fault has one passed check for each guarantee, also for what did not have to be tried."""
    made = checks(strict_place)
    assert made.keys() == ProbeReport.guarantees().keys()
    assert [name for name, check in made.items() if not check.passed] == []
    assert (made["refuses_wrong_md5"].description or "").startswith("not tried")


def test_every_check_of_a_local_store_is_evaluated(place: Place):
    """A directory attests nothing, and keeps everything else."""
    made = checks(place)
    assert made.keys() == ProbeReport.guarantees().keys()
    assert [name for name, check in made.items() if not check.passed] == ["attests_crc32c"]


def test_a_lost_guarantee_of_correctness_is_an_error(s3_place: Place, monkeypatch):
    """Leases without compare-and-swap are none: that is an error, and so is what the caller calls one."""
    lost = Finding(holds=False, evidence="an object with another e_tag was replaced")
    report = probed(s3_place).report().model_copy(update={"compare_and_swap": lost})
    monkeypatch.setattr(ProbedStore, "report", lambda *_, **__: report)
    assert checks(s3_place)["compare_and_swap"].severity == dg.AssetCheckSeverity.ERROR
    made = checks(s3_place, errors=["refuses_wrong_crc32c"])
    assert made["compare_and_swap"].severity == dg.AssetCheckSeverity.WARN
    assert made["refuses_wrong_crc32c"].severity == dg.AssetCheckSeverity.ERROR


def test_only_guarantees_can_be_errors():
    """A name that is none is refused when the code location is loaded."""
    with pytest.raises(UsageError, match="'software' is not a guarantee"):
        probe_check(SNAPSHOT, errors=["software"])
