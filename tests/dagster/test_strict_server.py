"""Every Dagster feature on a server that keeps all of AWS's rules, where other tests have a lenient one or a directory.

A lenient server takes what AWS would refuse: wrong checksums, conditions on Complete, unsigned headers. This one
answers 501 to whatever it does not know, so that nothing passes because it was ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.coordination.refs import read_ref
from blobflow.dagster import (
    ArtifactIOManager,
    DirectoryImporter,
    HandoffIOManager,
    artifact_mirror,
    artifact_partitions,
    batch_asset,
    gc_job,
    layer_assets,
    layer_restore_job,
    manifest_sensor,
    metadata as md,
    ref_sensor,
    retention_job,
)
from blobflow.stores import Store
from blobflow.testing import read_tree, write_tree
from tests.dagster.kit import MIRROR, REMOTE, SMALL, FaultyResource, Place, facts, failure
from tests.faults.test_proof import forged
from tests.kit import TREE, keys
from tests.strict_s3 import Limits, StrictS3

pytestmark = pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is:DeprecationWarning")


class StrictPlace(Place):
    """A place whose store is a bucket of the strict server."""

    settings: dict[str, Any]
    bucket: Store

    def resource(self, **options: Any) -> FaultyResource:
        settings = {**self.settings, "scratch_dir": str(self.scratch), "custom_profile": SMALL}
        return FaultyResource(**{**settings, **options})

    def execute(self, job: Any, config: dict[str, Any] | None = None) -> dg.ExecuteInProcessResult:
        """A run of a job with the place's resource."""
        defs = dg.Definitions(jobs=[job], resources={"blobflow": self.resource()})
        return defs.resolve_job_def(job.name).execute_in_process(instance=self.instance, run_config=config)


@pytest.fixture
def rules() -> Limits:
    """Those of the server; a test may have others."""
    return Limits(min_part_size=1)


@pytest.fixture
def place(tmp_path: Path, instance: dg.DagsterInstance, rules: Limits) -> Iterator[StrictPlace]:
    FaultyResource.script(lambda _: None)
    with StrictS3(rules) as server:
        endpoint = server.endpoint
        place = StrictPlace(tmp_path, instance)
        place.settings = {
            "store": f"s3://{endpoint.new_bucket()}/backups",
            "endpoint_url": endpoint.endpoint_url,
            "region": endpoint.region,
            "access_key_id": endpoint.access_key_id,
            "secret_access_key": endpoint.secret_access_key,
        }
        place.write()
        with closing(place.resource().get_store()) as place.bucket:
            yield place
        endpoint.client.close()
        assert {exchange.operation for exchange in server.log if exchange.status == 501} == set()


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_pipeline_runs_and_says_what_is_known(place: StrictPlace, lanes: int):
    """Five nodes, a lease, a ref; the blocking check says `attested`, because only the server's checksum agreed."""
    result = place.run(place.pipeline(lanes=lanes))
    assert result.success
    assert read_tree(place.current) == TREE
    (check,) = result.get_asset_check_evaluations()
    assert check.passed
    assert check.metadata[md.PROOF].value == facts(result, REMOTE)[md.PROOF] == "attested"
    assert check.description is not None
    assert check.description.startswith("attested: ")
    ref = read_ref(place.bucket, "orders/latest")
    assert ref is not None
    assert [facts(place.run(place.pipeline(lanes=lanes)), asset)[md.STATUS] for asset in (REMOTE, MIRROR)] == [
        "unchanged",
        "unchanged",
    ]


def test_the_blocking_check_of_a_forged_payload_says_no_more_than_attested(place: StrictPlace):
    """A payload with an equal CRC32C gets by where nobody reads it, under the weaker word; `deep` heals it."""
    assert place.run(select=[REMOTE, dg.AssetKey(["orders", "snapshot"])]).success
    store = place.bucket
    (key,) = [key for key in keys(store) if key.endswith(".tar")]
    payload = store.get(key, max_bytes=10**7).data
    store.put(key, forged(payload, len(payload) - 15_000))
    again = place.run(select=[REMOTE, dg.AssetKey(["orders", "snapshot"])])
    assert facts(again, REMOTE)[md.PROOF] == "attested"
    deep = place.run(place.pipeline(verify_mode="deep"), select=[REMOTE, dg.AssetKey(["orders", "snapshot"])])
    (check,) = deep.get_asset_check_evaluations()
    assert check.passed
    assert "; healed: it was damaged (member 'big.bin' has SHA-256" in str(check.description)
    assert facts(deep, REMOTE)[md.PROOF] == "proven"
    assert store.get(key, max_bytes=10**7).data == payload


def test_handles_are_handed_on_through_it(place: StrictPlace):
    """With `HandoffIOManager` the small values of the steps lie in the bucket, too."""
    also = dg.Definitions(resources={"io_manager": HandoffIOManager(blobflow=place.resource())})
    assert place.run(also=also).success
    assert "handoff/assets/orders/remote.json" in keys(place.bucket)


def test_an_io_manager_keeps_and_loads_directories(place: StrictPlace):
    """What one asset returns, the next one gets."""

    @dg.asset
    def model() -> Path:
        return place.source

    @dg.asset
    def report(model: Path) -> None:
        assert read_tree(model) == TREE

    manager = ArtifactIOManager(blobflow=place.resource())
    result = dg.materialize([model, report], instance=place.instance, resources={"io_manager": manager})
    assert result.success
    (made,) = result.asset_materializations_for_node("model")
    assert made.metadata[md.PROOF].value == "attested"


def test_a_mirror_follows_it(place: StrictPlace):
    """The mirror of another deployment shows what the ref names; its sensor notices that the ref moved."""
    assert place.run(select=[REMOTE, dg.AssetKey(["orders", "snapshot"])]).success
    mirror = artifact_mirror("orders", DirectoryImporter(path=place.home / "mirror"), retry_policy=None)
    defs = dg.Definitions.merge(mirror.definitions, dg.Definitions(resources={"blobflow": place.resource()}))
    assert defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=place.instance).success
    assert read_tree(place.current) == TREE


def test_sensors_tell_what_is_there(place: StrictPlace):
    """An artifact is announced once, and a ref that moved as well."""
    assert place.run(select=[REMOTE, dg.AssetKey(["orders", "snapshot"])]).success

    @dg.asset(key=["elsewhere", "remote"], partitions_def=artifact_partitions("orders"))
    def known() -> None: ...

    for sensor in (
        manifest_sensor("orders", asset_key=["elsewhere", "remote"], partitions_def=artifact_partitions("orders")),
        ref_sensor("orders", asset_key=["elsewhere", "remote"]),
    ):
        defs = dg.Definitions(assets=[known], sensors=[sensor], resources={"blobflow": place.resource()})
        with dg.build_sensor_context(
            instance=place.instance,
            instance_ref=place.instance.get_ref(),
            repository_def=defs.get_repository_def(),
            resources={"blobflow": place.resource()},
        ) as context:
            result: Any = sensor.evaluate_tick(context)
        assert len(result.asset_events) == 1


def test_garbage_and_retention_are_jobs_on_it(place: StrictPlace):
    """What was left behind goes, what a ref names stays."""
    assert place.run(select=[REMOTE, dg.AssetKey(["orders", "snapshot"])]).success
    store = place.bucket
    store.create_multipart("orders/lost.tar", part_size=1)
    assert place.execute(gc_job(older_than_s=0.0, payloads=True)).success
    assert store.list_uploads() == []
    assert place.execute(retention_job(keep_last=1)).success
    assert read_ref(store, "orders/latest") is not None
    assert place.run().success


def test_layers_are_synced_and_restored(place: StrictPlace):
    """Containers' directories, shared by content."""
    source = write_tree(place.home / "web", TREE)
    assets = layer_assets({"web": source}, home=place.home / "state", retry_policy=None)
    restore = layer_restore_job(home=place.home / "elsewhere", retry_policy=None)
    defs = dg.Definitions(assets=assets, jobs=[restore], resources={"blobflow": place.resource()})
    assert defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=place.instance).success
    config = {"container": "web", "path": str(place.home / "restored")}
    job = defs.resolve_job_def("blobflow_layer_restore")
    run_config = {"ops": {"blobflow_layer_restore__restore": {"config": config}}}
    assert job.execute_in_process(instance=place.instance, run_config=run_config).success
    assert read_tree(place.home / "restored") == TREE


def test_batches_run_on_it(place: StrictPlace):
    """Small objects, inserted, read and deleted."""
    entries = [
        {"op": "insert", "key": "k", "payload": "some"},
        {"op": "get", "key": "k"},
        {"op": "delete", "key": "k"},
    ]
    file = place.home / "operations.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    asset = batch_asset("fixtures", file)
    result = dg.materialize([asset], instance=place.instance, resources={"blobflow": place.resource()})
    assert result.success
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]


@pytest.mark.parametrize("rules", [Limits(lists_parts=False)])
def test_a_pipeline_works_without_a_list_of_parts(place: StrictPlace):
    """On a server that lists no parts a pipeline sends its artifact in one request."""
    assert place.run().success
    assert FaultyResource.count("create_multipart") == 0
    assert read_tree(place.current) == TREE


@pytest.mark.parametrize("rules", [Limits(lists_parts=False)])
def test_lanes_without_a_list_of_parts_fail_before_the_first_byte(place: StrictPlace):
    """Lanes need parts: the step fails for good, and says that one lane would do."""
    step, message, metadata = failure(place.run(place.pipeline(lanes=2)))
    assert step == "orders__remote.upload.plan"
    assert "multipart uploads" in message
    assert "one lane" in metadata[md.HINT]
    assert [key for key in keys(place.bucket) if key.startswith("orders/") and key.endswith(".tar")] == []


@pytest.mark.parametrize("rules", [Limits(gives_ranges=False)])
def test_a_pipeline_to_a_server_that_ignores_ranges_fails_before_its_export(place: StrictPlace):
    """What nobody could read is refused by the first step, before the source is read."""
    step, message, _ = failure(place.run())
    assert step == "orders__snapshot.export"
    assert "cannot be read in ranges" in message
    assert not place.scratch.exists()
