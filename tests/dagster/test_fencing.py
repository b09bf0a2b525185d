"""A step that outlives its run: it stops by itself, and it cannot harm what came after it."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from blobflow.coordination.refs import read_ref
from blobflow.dagster import DirectoryImporter, metadata as md
from blobflow.dagster.checkpoints import transfer_journal
from blobflow.dagster.fencing import INTERVAL_S, RunFence, StepOrphaned
from blobflow.testing import Fault, Hook, Request, read_tree, write_tree
from blobflow.transport import verify
from tests.clock import Clock
from tests.dagster import location_s3
from tests.dagster.kit import MIRROR, REMOTE, FaultyResource, Place, failure, materialization
from tests.dagster.location_s3 import PARTS, WORKERS
from tests.dagster.s3_pipeline import S3Pipeline, s3_pipeline
from tests.fault_rules import Rule
from tests.kit import sized
from tests.processes import is_gone, wait_for
from tests.strict_s3 import Exchange, Hook as ServerHook


class Watched:
    """An instance that counts how often it is asked for a run."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self.asked = 0

    def get_run_by_id(self, run_id: str) -> dg.DagsterRun | None:
        self.asked += 1
        return self._instance.get_run_by_id(run_id)

    def all_logs(self, run_id: str, of_type: dg.DagsterEventType) -> object:
        return self._instance.all_logs(run_id, of_type)


@dg.op
def nothing() -> None: ...


@dg.job
def idle() -> None:
    nothing()


@pytest.fixture
def ephemeral() -> Iterator[dg.DagsterInstance]:
    """An instance in memory."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def run(ephemeral: dg.DagsterInstance) -> dg.DagsterRun:
    """A run that is under way."""
    return ephemeral.create_run_for_job(idle, status=dg.DagsterRunStatus.STARTED)


def step_worker_started(run: dg.DagsterRun) -> dg.DagsterEvent:
    """What a multiprocess executor's step process logs first."""
    from dagster._core.events import EngineEventData  # noqa: TID251  # the event has no public maker

    return dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.STEP_WORKER_STARTED.value,
        job_name=run.job_name,
        event_specific_data=EngineEventData({"pid": dg.MetadataValue.text(str(os.getpid()))}),
    )


@pytest.mark.parametrize("how", ["failed", "canceled"])
def test_a_step_stops_when_its_run_is_over(how: str, ephemeral: dg.DagsterInstance, run: dg.DagsterRun):
    """Failed or cancelled, it is nobody's step any more; the error says why, and stays."""
    fence = RunFence(ephemeral, run.run_id, clock=lambda: 0.0)
    fence.check(now=True)
    if how == "failed":
        ephemeral.report_run_failed(run)
    else:
        ephemeral.report_run_canceled(run)
    with pytest.raises(StepOrphaned, match=f"run {run.run_id} is over") as stopped:
        fence.check(now=True)
    assert not stopped.value.retryable
    assert "moved data is kept" in stopped.value.hint
    with pytest.raises(StepOrphaned):
        fence.check()


def test_the_run_is_looked_at_every_few_seconds(ephemeral: dg.DagsterInstance, run: dg.DagsterRun):
    """A thousand ticks cost four queries, and the database learns nothing of how fast parts are."""
    watched, clock = Watched(ephemeral), Clock(0)
    fence = RunFence(watched, run.run_id, clock=clock)  # pyright: ignore[reportArgumentType]
    for tick in range(1000):
        clock.now = tick * (4 * INTERVAL_S + 0.1) / 1000
        fence.check()
    assert watched.asked == 4


def test_a_step_stops_when_its_run_is_being_terminated(ephemeral: dg.DagsterInstance, run: dg.DagsterRun):
    """An interrupt that Dagster turns into a retry, or that somebody swallowed, does not keep the step alive."""
    ephemeral.report_run_canceling(run)
    with pytest.raises(StepOrphaned, match=f"run {run.run_id} is being terminated"):
        RunFence(ephemeral, run.run_id).check(now=True)


def test_a_step_without_a_run_is_not_fenced(ephemeral: dg.DagsterInstance):
    """Ops that are called by a test, and inputs that do not tell their run, go on."""
    RunFence(ephemeral, None).check(now=True)
    with dg.build_op_context(instance=ephemeral) as context:
        transfer_journal(context).fence.check(now=True)


def test_a_step_process_stops_when_its_run_worker_died(ephemeral: dg.DagsterInstance, run: dg.DagsterRun):
    """Nobody may ever mark the run as failed, so the process that started the step counts as well."""
    alive = True
    fence = RunFence(ephemeral, run.run_id, parent_alive=lambda: alive)
    ephemeral.report_dagster_event(step_worker_started(run), run.run_id)
    fence.check(now=True)
    alive = False
    with pytest.raises(StepOrphaned, match=r"the worker of run .* is gone"):
        fence.check(now=True)


def test_a_run_worker_goes_on_without_its_code_server(ephemeral: dg.DagsterInstance, run: dg.DagsterRun):
    """It is no step process: the run's status alone decides."""
    fence = RunFence(ephemeral, run.run_id, parent_alive=lambda: False)
    fence.check(now=True)
    ephemeral.report_run_failed(run)
    with pytest.raises(StepOrphaned):
        fence.check(now=True)


def once(operation: str, number: int, does: object) -> None:
    """Run `does` at that request, the first time it comes."""
    left = [does]

    def faults(request: Request) -> Fault | None:
        if left and (request.operation, request.number) == (operation, number):
            return Hook(left.pop())  # pyright: ignore[reportArgumentType]
        return None

    FaultyResource.script(faults)


def test_an_orphaned_upload_stops_at_its_next_part(place: Place, monkeypatch):
    """The run is marked as failed while parts move: the step ends with a failure that is not retried."""
    monkeypatch.setattr("blobflow.dagster.fencing.INTERVAL_S", 0.0)

    def end_the_run(_: Request) -> None:
        (run,) = place.instance.get_runs()
        place.instance.report_run_failed(run)

    once("put_part", 3, end_the_run)
    result = place.run(place.pipeline(retry_policy=dg.RetryPolicy(max_retries=3)))
    step, message, told = failure(result)
    assert step == "orders__remote.upload"
    assert "this step stops, because run" in message
    assert told[md.ERROR] == "StepOrphaned"
    assert FaultyResource.count("complete_multipart") == 0
    assert materialization(result, REMOTE) is None


@pytest.mark.parametrize("moment", ["verify", "download"])
def test_a_step_that_wakes_up_late_moves_nothing_back(place: Place, moment: str):
    """While it slept a newer round was published and mirrored: neither ref nor mirror go back to the older one."""

    def newer_round(_: Request) -> None:
        write_tree(place.source, {"newer": "file"})
        assert place.run(resource=place.resource()).success

    # Each step opens one store: export, upload, verify, download.
    opened_by = {"verify": 3, "download": 4}[moment]
    left = [newer_round]

    def faults(request: Request) -> Fault | None:
        reads = request.operation == "get" and request.key.endswith(".tar.manifest.json")
        if left and len(FaultyResource.opened) == opened_by and reads:
            return Hook(left.pop())
        return None

    FaultyResource.script(faults)
    result = place.run()

    assert left == []
    step, message, told = failure(result)
    assert step == {"verify": "orders__remote.verify", "download": "orders__mirror.import_"}[moment]
    assert "belongs to round 2, and this is round 1" in message
    assert told[md.ERROR] == "LeaseLost"
    assert "newer snapshot" in told[md.HINT]
    assert materialization(result, MIRROR) is None
    assert read_tree(place.current) == read_tree(place.source)
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    assert ref.round_number == 2


def test_rounds_count_on_when_the_lease_was_removed(place: Place):
    """Somebody tidied the lease away, so its generations begin again: the next round publishes nevertheless."""
    assert place.run().success
    place.store.delete("orders/round.lease.json")
    write_tree(place.source, {"newer": "file"})
    assert place.run().success
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    assert ref.round_number == 2
    assert (place.current / "newer").exists()
    assert DirectoryImporter(path=place.home / "mirror").current() is not None


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Pipeline]:
    with s3_pipeline(tmp_path, monkeypatch) as made:
        yield made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "trial", [0, 1, *(pytest.param(trial, marks=pytest.mark.slow) for trial in range(2, sized(20, 6)))]
)
def test_an_orphan_and_its_successor_end_with_one_artifact(orders: S3Pipeline, monkeypatch, trial: int):
    """The run worker is killed, its step lives on beside the next run, and together they publish one right artifact.

    In every other trial the fence never closes: that nothing is harmed does not depend on the orphan noticing.
    """
    assert orders.in_process("snapshot").success
    fenced = trial % 2 == 0
    monkeypatch.setenv("ORDERS_FENCE_S", "0.2" if fenced else "1e9")
    chance = random.Random(trial)
    with orders.held("upload", at=chance.randrange(2, PARTS - 2)) as hold, orders.worker("remote") as worker:
        hold.wait()
        orphan = orders.step_pid()
        worker.kill()
        worker.wait()
        assert not is_gone(orphan)
        # The orphan wakes up when its successor sends, or just before it publishes.
        moment = chance.choice(["UploadPart", "CompleteMultipartUpload"])
        orders.server.script(Rule(ServerHook(lambda _: hold.release()), operation=moment))
        if fenced:
            wait_for(lambda: is_gone(orphan))
            hold.release()
        successor = orders.in_process("remote")
        hold.release()
        wait_for(lambda: is_gone(orphan))
    check_one_artifact(orders, successor)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("trial", range(sized(20, 1)))
def test_an_orphan_and_its_successor_run_side_by_side(orders: S3Pipeline, monkeypatch, trial: int):
    """Both send the same parts for half a minute, one as slowly as the other, and one right artifact comes of it.

    In every other trial the orphan notices in the middle of it that nobody waits for it.
    """
    together_s = sized(30, 2)
    assert orders.in_process("snapshot").success
    monkeypatch.setenv("ORDERS_FENCE_S", str(together_s * 1.5 + 10) if trial % 2 == 0 else "1e9")
    first = random.Random(trial).randrange(2, PARTS // 2)
    each_s = 2 * together_s * WORKERS / (PARTS // 2)
    over = threading.Event()
    began: list[float] = []
    with orders.held("upload", at=first) as hold, orders.worker("remote") as worker:
        hold.wait()
        orphan = orders.step_pid()
        worker.kill()
        worker.wait()

        def slowly(_: Exchange) -> None:
            began.append(time.monotonic())
            hold.release()
            over.wait(each_s)

        orders.server.script(Rule(ServerHook(slowly), operation="UploadPart", times=None))
        ended: list[float] = []
        watcher = threading.Thread(target=lambda: (wait_for(lambda: is_gone(orphan)), ended.append(time.monotonic())))
        watcher.start()
        successor = orders.in_process("remote")
        ended.append(time.monotonic())
        over.set()
        watcher.join()
    together = min(ended) - min(began)
    print(f"trial {trial}: together for {together:.1f} s, parts sent {len(orders.moved('upload'))}")
    assert together >= together_s
    check_one_artifact(orders, successor)


def check_one_artifact(orders: S3Pipeline, successor: dg.ExecuteInProcessResult) -> None:
    """The successor succeeded, and what it published is whole."""
    assert successor.success
    orders.check_whole()
    store = location_s3.Marking.opened[-1]
    ref = read_ref(store, "orders/latest")
    assert ref is not None
    verify(store, ref.key, mode="deep", expected_digest=ref.manifest_sha256)
