"""No value in Dagster's storage decides: each asset alone finds what it works on in the store, or on the disk."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest

from blobflow import DirectoryExporter, DirectoryImporter, ExportResult
from blobflow.backends.base import OnBytes
from blobflow.backends.sqlite import SqliteExporter, SqliteImporter
from blobflow.coordination.lease_store import ObjectLeaseStore
from blobflow.coordination.refs import move_ref, read_ref
from blobflow.dagster import metadata as md
from blobflow.errors import StoreUnavailable
from blobflow.testing import FailBefore, Fault, Request, read_tree, write_tree
from tests.dagster.kit import MIRROR, REMOTE, SNAPSHOT, STEPS, FaultyResource, Place, facts, failure, succeeded
from tests.kit import TREE


@pytest.fixture
def elsewhere(place: Place, tmp_path: Path) -> Iterator[Place]:
    """The same store, seen from a new machine: another DAGSTER_HOME, another scratch directory, no mirror."""
    home = tmp_path / "elsewhere"
    (home / "instance").mkdir(parents=True)
    (home / "store").symlink_to(place.home / "store")
    overrides = {"telemetry": {"enabled": False}}
    with dg.DagsterInstance.local_temp(str(home / "instance"), overrides=overrides) as instance:
        yield Place(home, instance)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_mirror_alone_is_restored_on_a_new_machine(place: Place, elsewhere: Place, lanes: int):
    """A restore drill in one click: the store is all that is left."""
    assert place.run().success
    result = elsewhere.run(elsewhere.pipeline(lanes=lanes), select=[MIRROR])
    assert result.success
    assert read_tree(elsewhere.current) == TREE
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    assert facts(result, MIRROR)[md.ARTIFACT_DIGEST] == ref.manifest_sha256


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_remote_asset_alone_is_verified_on_a_new_machine(place: Place, elsewhere: Place, lanes: int):
    """Nothing is sent, all that the ref names is proven again, and the ref stays as it was."""
    assert place.run().success
    before = read_ref(place.store, "orders/latest")
    result = elsewhere.run(elsewhere.pipeline(lanes=lanes, verify_mode="deep"), select=[REMOTE])
    assert result.success
    assert facts(result, REMOTE)[md.STATUS] == "unchanged"
    (check,) = result.get_asset_check_evaluations()
    assert check.passed
    assert read_ref(place.store, "orders/latest") == before


@pytest.mark.parametrize("ref", ["latest", None])
def test_partitions_are_found_each_by_its_own(place: Place, elsewhere: Place, ref: str | None):
    """On a new machine, with a ref and without one."""
    names = ["eu", "us/west"]

    def pipeline(at: Place):
        return at.pipeline(
            ref=ref,
            partitions_def=dg.StaticPartitionsDefinition(names),
            exporter=lambda partition: DirectoryExporter(path=place.home / "sources" / partition),
            importer=lambda partition: DirectoryImporter(path=at.home / "mirrors" / partition),
        )

    for number, name in enumerate(names):
        write_tree(place.home / "sources" / name, {"n": str(number)})
        assert place.run(pipeline(place), partition_key=name).success
    for number, name in enumerate(names):
        assert elsewhere.run(pipeline(elsewhere), partition_key=name, select=[REMOTE, MIRROR]).success
        assert read_tree(elsewhere.home / "mirrors" / name / "current") == {"n": str(number)}


def test_a_mirror_alone_shows_what_the_ref_names_now(place: Place):
    """An operator moved it back: that is what the mirror goes by, and not what this deployment saw last."""
    assert place.run().success
    first = read_ref(place.store, "orders/latest")
    write_tree(place.source, {"newer": "file"})
    assert place.run().success
    assert first is not None
    move_ref(place.store, "orders/latest", first.key, first.manifest_sha256)
    assert place.run(select=[MIRROR]).success
    assert read_tree(place.current) == TREE


def test_without_a_ref_a_run_mirrors_what_it_stored(place: Place):
    """Content that comes back is older in the store than what took its place meanwhile."""
    for content in ("a", "b", "a"):
        write_tree(place.source, {"file": content})
        result = place.run(place.pipeline(ref=None))
        assert result.success
        assert (place.current / "file").read_text() == content


def test_a_snapshot_that_waits_on_the_disk_is_sent_by_a_run_of_its_own(place: Place):
    """Exported by one run, uploaded by the next one, as when both are materialized one by one."""
    exported = place.run(select=[SNAPSHOT])
    assert succeeded(exported) == STEPS[:1]
    result = place.run(select=[REMOTE, MIRROR])
    assert result.success
    assert facts(result, REMOTE)[md.STATUS] == "uploaded"
    assert read_tree(place.current) == TREE


def test_a_snapshot_that_a_later_round_overtook_is_not_sent(place: Place, elsewhere: Place):
    """It waits on this disk, and another machine has published since: the remote asset is what the ref names."""
    assert place.run(select=[SNAPSHOT]).success
    write_tree(elsewhere.source, {"newer": "file"})
    assert elsewhere.run().success
    result = place.run(select=[REMOTE])
    assert result.success
    assert facts(result, REMOTE)[md.STATUS] == "unchanged"
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    assert facts(result, REMOTE)[md.KEY] == ref.key


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_scratch_directory_that_steps_do_not_share_is_never_taken_for_nothing_new(place: Place, lanes: int):
    """The export of this run is not at hand: the run fails, although the ref names an older artifact."""
    assert place.run().success
    write_tree(place.source, {"newer": "file"})
    with pytest.MonkeyPatch.context() as patch:
        # What a second machine sees of the first one's directory.
        patch.setattr(
            "blobflow.dagster.scratch.leave_note", lambda scratch, *_: shutil.rmtree(scratch, ignore_errors=True)
        )
        result = place.run(place.pipeline(lanes=lanes))
    step, message, told = failure(result)
    assert step == ("orders__remote.upload" if lanes == 1 else "orders__remote.upload.plan")
    assert "exported artifact is not in" in message
    assert "scratch_dir that they all share" in told[md.HINT]


def test_a_store_that_has_nothing_is_named(place: Place):
    """Neither an export nor a ref: each asset alone says what to do."""
    for select, wanted in ((REMOTE, "materialize orders/snapshot"), (MIRROR, "materialize orders/remote")):
        _, message, _ = failure(place.run(select=[select]))
        assert "there is no ref 'orders/latest'" in message
        assert wanted in message


def test_what_is_stored_under_the_ref_is_what_it_names(place: Place, elsewhere: Place):
    """Somebody put another artifact in its place: the remote asset alone does not bless it."""
    assert place.run().success
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    move_ref(place.store, "orders/latest", ref.key, "sha256:" + "0" * 64)
    _, _, told = failure(elsewhere.run(select=[REMOTE]))
    assert told[md.ERROR] == "DigestMismatch"


# The round's completion


def test_the_cursor_is_recorded_when_the_ref_has_moved(place: Place):
    """Not before: an upload that fails leaves no record of a completed round."""
    record = ObjectLeaseStore(place.store)
    database = place.home / "orders.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        connection.execute("PRAGMA user_version = 7")
        connection.commit()

    def outage(request: Request) -> Fault | None:
        return FailBefore(StoreUnavailable("down", operation="get")) if request.operation == "put_part" else None

    FaultyResource.script(outage)
    pipeline = place.pipeline(
        exporter=SqliteExporter(path=database), importer=SqliteImporter(path=place.home / "mirror")
    )
    assert not place.run(pipeline).success
    found = record.read("orders/round")
    assert found is not None
    assert (found.state.owner, found.state.cursor) == ("", None)

    FaultyResource.script(lambda _: None)
    result = place.run(pipeline)
    assert result.success
    found = record.read("orders/round")
    assert found is not None
    assert found.state.cursor is not None
    assert (found.state.owner, found.state.cursor) == ("", facts(result, SNAPSHOT)[md.CURSOR])
    assert found.state.generation == 2


def test_a_round_that_a_later_one_overtook_records_nothing(place: Place):
    """The record belongs to the later round, which may be held at this moment."""
    from blobflow.coordination.lease import Lease, record_completion

    leases = ObjectLeaseStore(place.store)
    first, second = Lease(leases, "orders/round"), Lease(leases, "orders/round")
    assert first.try_acquire()
    first.release()
    assert second.try_acquire()
    assert not record_completion(leases, "orders/round", 1, "late")
    second.check()
    second.release()
    assert record_completion(leases, "orders/round", 2, "in time")
    assert record_completion(leases, "orders/round", 2, "in time")
    found = leases.read("orders/round")
    assert found is not None
    assert found.state.cursor == "in time"


class Nested:
    """An exporter that runs the pipeline once more while it exports."""

    backend = "directory"

    def __init__(self, place: Place, *, partition_key: str | None = None) -> None:
        self.place = place
        self.partition_key = partition_key
        self.results: list[dg.ExecuteInProcessResult] = []

    def __call__(self, partition: str) -> Nested:
        del partition
        return self

    def export(self, dest: Path, *, on_progress: OnBytes | None = None) -> ExportResult:
        plain = self.place.pipeline(retry_policy=dg.RetryPolicy(max_retries=2, delay=0))
        if not self.results:
            self.results.append(self.place.run(plain))
        return DirectoryExporter(path=self.place.source).export(dest, on_progress=on_progress)


def test_a_run_that_meets_a_running_round_has_nothing_to_do(place: Place):
    """It is skipped with a reason, retries nothing, and exports nothing after the other one has ended."""
    nested = Nested(place)
    outer = place.run(place.pipeline(exporter=nested))
    assert outer.success
    (inner,) = nested.results
    assert inner.success
    kinds = {event.event_type for event in inner.all_events}
    assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in kinds
    assert dg.DagsterEventType.ASSET_MATERIALIZATION not in kinds
    skipped = {e.step_key for e in inner.all_events if e.event_type == dg.DagsterEventType.STEP_SKIPPED}
    assert skipped == set(STEPS[1:])
    (record,) = place.instance.fetch_observations(SNAPSHOT, limit=10).records
    assert record.asset_observation is not None
    assert record.run_id == inner.run_id
    assert f"run {outer.run_id} is exporting 'orders'" in (record.asset_observation.description or "")
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    assert ref.generation == 1
