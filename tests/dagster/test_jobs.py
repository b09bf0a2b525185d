"""Garbage collection and probe, as Dagster runs them."""

from __future__ import annotations

import time
from typing import Any

import dagster as dg
import pytest

from blobflow.dagster import BlobflowResource, gc_job, probe_check, probe_job
from blobflow.dagster import metadata as md
from blobflow.errors import StoreUnavailable, UsageError
from blobflow.stores.base import Body
from blobflow.stores.probe import REPORT_KEY, Finding, ProbedStore
from blobflow.testing import FailBefore, Fault, Request
from tests.dagster.kit import REMOTE, SNAPSHOT, FaultyResource, Place, failure
from tests.servers import S3Endpoint

DAY_S = 24 * 3600.0


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
            return FailBefore(StoreUnavailable("the store is down"))
        return None

    FaultyResource.script(faults)
    step, message, _ = failure(run(place, gc_job(retry_policy=None)))
    assert (step, uploads(place)) == ("blobflow_gc__collect", ["orders/a.tar"])
    assert "'orders/a.tar'" in message

    failed.clear()
    result = run(place, gc_job(retry_policy=dg.RetryPolicy(max_retries=1)))
    assert result.success
    assert uploads(place) == []


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
    """A place whose store is a bucket."""
    settings = moto(moto_s3)
    monkeypatch.setattr(place, "resource", lambda **options: BlobflowResource(**settings, **options), raising=False)
    return place


def test_the_probe_job_shows_what_the_server_can_do(s3_place: Place):
    """A table of findings in the run, and a fresh report in the store for everybody."""
    told = output(run(s3_place, probe_job()))
    rows = {record.data["ability"]: record.data["holds"] for record in told[md.FINDINGS].records}
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
    assert made.keys() == probed(s3_place).report().findings.keys()
    assert {check.asset_key for check in made.values()} == {REMOTE}


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
    with pytest.raises(UsageError, match="'software' is no guarantee"):
        probe_check(SNAPSHOT, errors=["software"])
