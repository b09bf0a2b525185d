"""Checkpoints as observations: written from every kind of step, found from every kind of run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from blobflow.dagster import metadata as md
from blobflow.dagster.checkpoints import LIVE_S, TRANSFERS, ObservationCheckpoints, StepJournal, transfer_journal
from blobflow.dagster.fencing import RunFence
from blobflow.errors import StoreUnavailable, UsageError
from blobflow.testing import FailBefore, Fault, Hook, Request, read_tree
from blobflow.transport import ProgressEvent
from blobflow.transport.checkpoints import Checkpoint
from tests.clock import Clock
from tests.dagster.kit import MIRROR, REMOTE, FaultyResource, Place, facts, failure
from tests.kit import TREE
from tests.unit.test_journal import ID, record


@pytest.fixture
def ephemeral() -> Iterator[dg.DagsterInstance]:
    """An instance in memory."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def observations(instance: dg.DagsterInstance, transfer_id: str | None = None) -> list[dg.AssetObservation]:
    """The journal, oldest first."""
    wanted = dg.AssetRecordsFilter(asset_key=TRANSFERS, asset_partitions=[transfer_id] if transfer_id else None)
    found = instance.fetch_observations(wanted, limit=1000, ascending=True).records
    return [each.asset_observation for each in found if each.asset_observation]


def checkpoints(instance: dg.DagsterInstance, kind: str) -> list[Checkpoint]:
    """The checkpoints of all transfers of a kind, oldest first."""
    written = [
        Checkpoint.model_validate(value.data)
        for each in observations(instance)
        if isinstance(value := each.metadata[md.CHECKPOINT], dg.JsonMetadataValue)
    ]
    return [each for each in written if each.record.kind == kind]


def journal_of(instance: dg.DagsterInstance, clock: Clock, lines: list[str]) -> StepJournal:
    home = ObservationCheckpoints(instance, instance.report_runless_asset_event)
    return StepJournal(home, RunFence(instance, None), lines.append, writer="run-1", clock=clock)


def test_every_kind_of_context_writes_and_finds_checkpoints(ephemeral):
    """An op, an asset, an output and an input each continue the chain of the one before, by the transfer's id."""
    found: list[tuple[str, int]] = []

    def one_more(who: str, context: Any, **options: Any) -> None:
        journal = transfer_journal(context, **options)
        before = journal.load(ID)
        found.append((who, before.sequence if before else 0))
        journal.save(record(len(found)))

    class Keeper(dg.ConfigurableIOManager):
        name: str = "keeper"  # without a field Dagster asks pydantic for a deprecated attribute

        def setup_for_execution(self, context: dg.InitResourceContext) -> None:
            self._instance = context.instance

        def handle_output(self, context: dg.OutputContext, obj: object) -> None:
            one_more("output", context, instance=self._instance)

        def load_input(self, context: dg.InputContext) -> int:
            one_more("input", context)
            return 1

    @dg.asset(io_manager_key="keeper")
    def first(context) -> int:
        one_more("asset", context)
        return 1

    @dg.op
    def work(context) -> None:
        one_more("op", context)

    @dg.job
    def works() -> None:
        work()

    @dg.asset(ins={"first": dg.AssetIn(input_manager_key="keeper")})
    def second(first: int) -> None: ...

    assert works.execute_in_process(instance=ephemeral).success
    assert dg.materialize([first, second], instance=ephemeral, resources={"keeper": Keeper()}).success
    assert found == [("op", 0), ("asset", 1), ("output", 2), ("input", 3)]
    assert len(observations(ephemeral, ID)) == 4
    assert observations(ephemeral, "another") == []


def test_an_output_that_does_not_tell_its_instance_is_refused():
    """Without the instance no earlier checkpoint could be found, so the mistake is told at once."""
    with (
        dg.build_output_context() as context,
        pytest.raises(UsageError, match="does not have the Dagster instance") as refusal,
    ):
        transfer_journal(context)
    assert "setup_for_execution" in refusal.value.hint


def test_numbers_keep_their_labels(ephemeral):
    """Every observation of a transfer carries the same numeric labels, which is what Dagster plots."""
    clock = Clock(1_000_000.0)
    journal = journal_of(ephemeral, clock, [])
    journal.save(record(2, parts_resumed=2, bytes_resumed=200))
    clock.now += 10
    journal.save(record(7, parts_resumed=2, bytes_resumed=200))
    journal.save(record(10, "done", parts_resumed=2, bytes_resumed=200))
    numbers = [
        {label: value.value for label, value in each.metadata.items() if isinstance(value.value, int | float)}
        for each in observations(ephemeral, ID)
    ]
    assert len({frozenset(each) for each in numbers}) == 1
    assert [each[md.PERCENT] for each in numbers] == [20.0, 70.0, 100.0]
    assert numbers[1] == {
        md.BYTES_DONE: 700,
        md.SIZE: 1000,
        md.PERCENT: 70.0,
        md.PARTS_DONE: 7,
        md.BYTES_RESUMED: 200,
        md.THROUGHPUT: round(500 / 10 / 1e6, 3),
        md.RETRIES: 0,
    }


def test_a_transfer_without_checkpoints_shows_itself_every_thirty_seconds(ephemeral):
    """On a slow link a checkpoint may take an hour; that something moves is seen before."""
    clock, lines = Clock(1_000_000.0), list[str]()
    journal = journal_of(ephemeral, clock, lines)
    journal.save(record(0))
    for seconds in range(1, 2 * int(LIVE_S) + 2):
        clock.now = 1_000_000.0 + seconds
        journal.progress(ProgressEvent("upload", seconds * 5, 1000, 0))
    shown = [each.metadata[md.BYTES_DONE].value for each in observations(ephemeral, ID)]
    assert shown == [0, 150, 300]
    assert [c.record.parts_done for c in checkpoints(ephemeral, "upload")] == [0, 2, 3]


def test_the_next_attempt_says_where_it_begins(ephemeral):
    """The step's log names the run before and the bytes that are kept; its observation links to that run."""
    clock, lines = Clock(1_000_000.0), list[str]()
    journal_of(ephemeral, clock, lines).save(record(0))
    home = ObservationCheckpoints(ephemeral, ephemeral.report_runless_asset_event)
    second = StepJournal(home, RunFence(ephemeral, None), lines.append, writer="run-2", clock=clock)
    second.save(record(4, parts_resumed=4, bytes_resumed=400))
    assert lines == ["upload.resumed attempt=2 after=run-1 resumed_from_bytes=400 parts=4/10"]
    last = observations(ephemeral, ID)[-1]
    assert last.metadata[md.CONTINUES] == dg.MetadataValue.dagster_run("run-1")
    assert second.metadata()[md.RETRIES] == 1
    rows = [dict(row.data) for row in second.metadata()[md.PARTS].records]
    assert rows == [{"what": "found done", "parts": 4, "bytes": 400}, {"what": "moved", "parts": 0, "bytes": 0}]


def test_a_run_leaves_one_finished_story_per_transfer(place: Place):
    """Upload, verify and download each begin and end in the journal, and the materializations say what was reused."""
    result = place.run()
    assert result.success
    for kind in ("upload", "verify", "download"):
        told = checkpoints(place.instance, kind)
        assert [each.record.state for each in told] == ["running", "done"]
        assert len({each.record.transfer_id for each in told}) == 1
        assert {each.writer for each in told} == {result.run_id}
    for asset in (REMOTE, MIRROR):
        told = facts(result, asset)
        assert (told["blobflow/resumed_from_bytes"], told[md.RETRIES], told[md.PERCENT]) == (0, 0, 100.0)
        moved = told[md.PARTS].records[1].data
        assert moved["parts"] > 5

    assert place.run().success
    assert len(checkpoints(place.instance, "upload")) == 2


def test_an_interrupted_step_leaves_a_last_checkpoint(place: Place):
    """Terminate raises a BaseException in the step: the transfer's last state is kept, and a new run continues it."""

    def terminate(_: Request) -> None:
        raise dg.DagsterExecutionInterruptedError

    def faults(request: Request) -> Fault | None:
        return Hook(terminate) if (request.operation, request.number) == ("put_part", 5) else None

    FaultyResource.script(faults)
    assert not place.run().success
    (begun, last) = checkpoints(place.instance, "upload")
    assert (begun.record.state, last.record.state, last.record.parts_done) == ("running", "failed", 4)

    FaultyResource.script(lambda _: None)
    result = place.run()
    remote = facts(result, REMOTE)
    assert (remote["blobflow/resumed_from_bytes"], remote[md.RETRIES]) == (4 * 4096, 1)
    assert checkpoints(place.instance, "upload")[-1].continues == begun.writer
    assert read_tree(place.current) == TREE


def test_a_journal_of_a_newer_version_stops_no_transfer(place: Place, monkeypatch):
    """After a downgrade the newer records are not interpreted, and the store says what is missing."""
    monkeypatch.setattr(
        "blobflow.transport.checkpoints.Checkpoint.to_json",
        lambda self: self.model_copy(update={"version": 2}).model_dump_json(),
    )

    def faults(request: Request) -> Fault | None:
        down = (request.operation, request.number) == ("put_part", 5)
        return FailBefore(StoreUnavailable("down", operation="put_part", key=request.key)) if down else None

    FaultyResource.script(faults)
    assert not place.run().success
    monkeypatch.undo()
    FaultyResource.script(lambda _: None)
    result = place.run()
    assert result.success
    remote = facts(result, REMOTE)
    assert (remote["blobflow/resumed_from_bytes"], remote[md.RETRIES]) == (4 * 4096, 0)


def test_a_transfer_whose_last_words_were_lost_is_settled(place: Place, monkeypatch):
    """The upload was published and its process died before the last record: the next run finds it whole and says so."""
    real = StepJournal.save

    def dies_before_done(self: StepJournal, told: Any) -> Checkpoint | None:
        if told.kind == "upload" and told.state == "done":
            raise RuntimeError("killed")
        return real(self, told)

    monkeypatch.setattr(StepJournal, "save", dies_before_done)
    assert not place.run().success
    assert checkpoints(place.instance, "upload")[-1].record.state == "running"
    monkeypatch.undo()
    result = place.run()
    assert facts(result, REMOTE)[md.STATUS] == "unchanged"
    assert checkpoints(place.instance, "upload")[-1].record.state == "done"


def test_a_failed_step_says_how_far_it_came(place: Place):
    """The failure carries the error, the remedy, and what is kept for the next attempt."""

    def faults(request: Request) -> Fault | None:
        if request.operation == "put_part" and request.number >= 4:
            return FailBefore(StoreUnavailable("the store is down", operation="put_part", key=request.key))
        return None

    FaultyResource.script(faults)
    step, message, told = failure(place.run())
    assert step == "orders__remote.upload"
    assert "continues where it stopped" in message
    assert (told[md.ERROR], told[md.BYTES_DONE], told[md.PARTS_DONE]) == ("StoreUnavailable", 3 * 4096, 3)
    assert told[md.PARTS].records[1].data["parts"] == 3
