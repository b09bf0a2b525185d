"""Terminate stops a run: whatever step is interrupted, no retry policy lets it begin again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from blobflow.coordination.lease import Lease
from blobflow.dagster import (
    ArtifactIOManager,
    HandoffIOManager,
    batch_asset,
    gc_job,
    layer_assets,
    layer_restore_job,
    metadata as md,
)
from blobflow.errors import StoreUnavailable
from blobflow.testing import FailBefore, Fault, Hook, Request, write_tree
from tests.dagster.kit import STEPS, FaultyResource, Place, failure, succeeded
from tests.kit import TREE

# Dagster's own, of nested resources.
pytestmark = pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is:DeprecationWarning")

PATIENT = dg.RetryPolicy(max_retries=3, delay=0)
"""With which a run that is not stopped for good goes on to its end."""


def cancel(instance: dg.DagsterInstance, *, interrupt: bool) -> None:
    """What pressing Terminate does: the run is marked, then its worker is interrupted."""
    (run,) = instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    instance.report_run_canceling(run)
    if interrupt:
        os.kill(os.getpid(), signal.SIGINT)


def cancel_at(
    place: Place, operation: str, key: str = "", *, store: int = 0, interrupt: bool = True, after: Fault | None = None
) -> list[str]:
    """Terminate the run at its first request of that kind to a key that ends so; gives the keys at which it did.

    Args:
        store: Of the n-th store that is opened; 0: of any.
        after: What becomes of the request.
    """
    reached: list[str] = []

    def faults(request: Request) -> Fault | None:
        wanted = request.operation == operation and request.key.endswith(key)
        if reached or not wanted or (store and len(FaultyResource.opened) != store):
            return None
        reached.append(request.key)
        if after is not None:
            cancel(place.instance, interrupt=interrupt)
            return after
        return Hook(lambda _: cancel(place.instance, interrupt=interrupt))

    FaultyResource.script(faults)
    return reached


def check_stopped(place: Place, result: dg.ExecuteInProcessResult, step: str) -> None:
    """The run is cancelled, its step failed for good and said why, and nothing was tried again."""
    assert not result.success
    run = place.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.status is dg.DagsterRunStatus.CANCELED
    name, message, told = failure(result)
    assert name == step
    assert f"run {run.run_id} is being terminated" in message
    assert told[md.ERROR] == "StepOrphaned"
    kinds = {event.event_type for event in result.all_events}
    assert not kinds & {dg.DagsterEventType.STEP_UP_FOR_RETRY, dg.DagsterEventType.STEP_RESTARTED}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence looks at the run at every checkpoint."""
    monkeypatch.setattr("blobflow.dagster.fencing.INTERVAL_S", 0.0)


NODES: dict[str, tuple[str, str, int]] = {
    "orders__snapshot.export": ("put", "round.lease.json", 1),
    "orders__remote.upload": ("put_part", ".tar", 0),
    "orders__remote.verify": ("get_range", ".tar", 3),
    "orders__mirror.download": ("get_range", ".tar", 4),
}


@pytest.mark.parametrize("step", NODES)
def test_an_interrupted_node_fails_for_good(place: Place, step: str):
    """The interrupt is not turned into the step's retry, and no later step begins."""
    operation, key, store = NODES[step]
    reached = cancel_at(place, operation, key, store=store)
    result = place.run(place.pipeline(retry_policy=PATIENT, verify_mode="deep"))
    assert len(reached) == 1
    check_stopped(place, result, step)
    assert succeeded(result) == STEPS[: STEPS.index(step)]
    FaultyResource.script(lambda _: None)
    assert place.run().success
    assert Lease(place.store, "orders/round").try_acquire()


@pytest.mark.parametrize("step", ["orders__remote.upload", "orders__mirror.download"])
def test_a_checkpoint_stops_a_step_whose_interrupt_was_lost(place: Place, quick: None, step: str):
    """The worker was never interrupted, or somebody swallowed it: the next checkpoint sees the run's status."""
    operation, key, store = NODES[step]
    cancel_at(place, operation, key, store=store, interrupt=False)
    check_stopped(place, place.run(place.pipeline(retry_policy=PATIENT)), step)


def test_an_error_that_passes_is_not_retried_in_a_terminated_run(place: Place):
    """The store fails at the same moment: nobody waits for its next attempt."""
    cancel_at(
        place, "put_part", interrupt=False, after=FailBefore(StoreUnavailable("the store is down", operation="get"))
    )
    check_stopped(place, place.run(place.pipeline(retry_policy=PATIENT)), "orders__remote.upload")


def test_a_terminated_verification_says_nothing_of_the_artifact(place: Place, quick: None):
    """That somebody stopped the run is no damage: the check `verified` is not evaluated."""
    cancel_at(place, "get_range", ".tar", store=3, interrupt=False)
    result = place.run(place.pipeline(retry_policy=PATIENT, verify_mode="deep"))
    check_stopped(place, result, "orders__remote.verify")
    assert result.get_asset_check_evaluations() == []


def test_a_step_does_not_begin_in_a_run_that_is_being_terminated(place: Place):
    """A step of the user's own survived the interrupt, as Dagster's retry: ours, which follows it, does nothing."""
    attempts: list[int] = []

    @dg.asset(retry_policy=PATIENT)
    def loaded() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            cancel(place.instance, interrupt=True)

    pipeline = place.pipeline(retry_policy=PATIENT, deps=["loaded"])
    result = place.run(pipeline, also=dg.Definitions(assets=[loaded]))
    assert len(attempts) == 2
    assert succeeded(result) == ["loaded"]
    run = place.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.status is dg.DagsterRunStatus.CANCELED
    step, message, _ = failure(result)
    assert (step, "is being terminated" in message) == ("orders__snapshot.export", True)
    assert FaultyResource.opened == []


def test_another_pipeline_of_the_run_does_not_begin(place: Place):
    """Steps that depend on nothing that was interrupted are of the same run, and stop as well."""
    from blobflow.dagster import DirectoryExporter, DirectoryImporter, artifact_pipeline

    other = artifact_pipeline(
        "products",
        DirectoryExporter(path=place.source),
        DirectoryImporter(path=place.home / "products"),
        retry_policy=PATIENT,
    )
    cancel_at(place, "put_part")
    result = place.run(place.pipeline(retry_policy=PATIENT), also=other.definitions)
    run = place.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.status is dg.DagsterRunStatus.CANCELED
    failed = {event.step_key for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_FAILURE}
    assert failed <= {"orders__remote.upload", "products__snapshot.export", "products__remote.upload"}
    assert len(succeeded(result)) <= 2
    assert not (place.home / "products").exists()


@pytest.mark.parametrize(
    ("step", "operation"),
    [("orders__remote.upload.lane_1", "put_part"), ("orders__mirror.download.lane_0", "get_range")],
)
def test_an_interrupted_lane_fails_for_good(place: Place, step: str, operation: str):
    """Lanes are steps like any other."""
    kind = step.split(".")[1]
    seen: list[str] = []

    def faults(request: Request) -> Fault | None:
        if request.operation == operation and not seen:
            (run,) = place.instance.get_runs()
            begun = [e.step_key for e in place.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_START)]
            if begun[-1] == step:
                seen.append(kind)
                return Hook(lambda _: cancel(place.instance, interrupt=True))
        return None

    FaultyResource.script(faults)
    result = place.run(place.pipeline(lanes=2, retry_policy=PATIENT))
    assert seen == [kind]
    run = place.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.status is dg.DagsterRunStatus.CANCELED
    assert step not in succeeded(result)
    assert not [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]
    assert "orders__mirror.import_" not in succeeded(result)


@pytest.mark.parametrize(("step", "operation"), [("model", "put_part"), ("scores", "get_range")])
def test_an_interrupted_io_manager_fails_for_good(place: Place, step: str, operation: str):
    """While it stores what a step returned, or fetches what a step asks for."""

    @dg.asset(io_manager_key="artifacts", retry_policy=PATIENT)
    def model() -> Path:
        return place.source

    @dg.asset(retry_policy=PATIENT)
    def scores(model: Path) -> None:
        assert model.is_dir()

    cancel_at(place, operation, ".tar", store=0 if operation == "put_part" else 2)
    result = dg.materialize(
        [model, scores],
        instance=place.instance,
        resources={"artifacts": ArtifactIOManager(blobflow=place.resource())},
        raise_on_error=False,
    )
    check_stopped(place, result, step)


@pytest.mark.parametrize("operation", ["put", "get"])
def test_an_interrupted_handoff_fails_for_good(place: Place, operation: str):
    """Likewise for small values."""

    @dg.op(retry_policy=PATIENT)
    def one() -> int:
        return 1

    @dg.op(retry_policy=PATIENT)
    def two(number: int) -> None:
        assert number == 1

    @dg.job(resource_defs={"io_manager": HandoffIOManager(blobflow=place.resource())})
    def job() -> None:
        two(one())

    cancel_at(place, operation, ".json")
    result = job.execute_in_process(instance=place.instance, raise_on_error=False)
    check_stopped(place, result, {"put": "one", "get": "two"}[operation])


def test_an_interrupted_layer_fails_for_good(place: Place, tmp_path: Path):
    """A sync, and a restore."""
    source = write_tree(tmp_path / "web", TREE)
    (asset,) = layer_assets({"web": source}, home=tmp_path / "state", retry_policy=PATIENT)
    resources = {"blobflow": place.resource()}

    def sync() -> dg.ExecuteInProcessResult:
        return dg.materialize([asset], instance=place.instance, resources=resources, raise_on_error=False)

    reached = cancel_at(place, "put_part")
    if not (result := sync()).success:
        check_stopped(place, result, "layers__web")
    assert reached
    FaultyResource.script(lambda _: None)
    assert sync().success

    restore = layer_restore_job(home=tmp_path / "elsewhere", retry_policy=PATIENT)
    defs = dg.Definitions(jobs=[restore], resources=resources)
    cancel_at(place, "get_range")
    config = {"container": "web", "path": str(tmp_path / "back")}
    result = defs.resolve_job_def("blobflow_layer_restore").execute_in_process(
        instance=place.instance,
        raise_on_error=False,
        run_config={"ops": {"blobflow_layer_restore__restore": {"config": config}}},
    )
    check_stopped(place, result, "blobflow_layer_restore__restore")


@pytest.mark.parametrize("interrupt", [True, False])
def test_an_interrupted_batch_fails_for_good(place: Place, tmp_path: Path, quick: None, interrupt: bool):
    """By the interrupt, or by the run's status at its next operation."""
    path = tmp_path / "o.jsonl"
    lines = [{"op": "insert", "key": f"k{number}", "payload": "x"} for number in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asset = batch_asset("fixtures", path, window=1, retry_policy=PATIENT)
    cancel_at(place, "put", "k3", interrupt=interrupt)
    result = dg.materialize(
        [asset], instance=place.instance, resources={"blobflow": place.resource()}, raise_on_error=False
    )
    check_stopped(place, result, "fixtures")


def test_an_interrupted_job_of_an_operator_fails_for_good(place: Place):
    """Garbage collection, and with it every op that raises the core's errors as Dagster's."""
    cancel_at(place, "list_uploads")
    defs = dg.Definitions(jobs=[gc_job(retry_policy=PATIENT)], resources={"blobflow": place.resource()})
    result = defs.resolve_job_def("blobflow_gc").execute_in_process(instance=place.instance, raise_on_error=False)
    check_stopped(place, result, "blobflow_gc__collect")


def test_an_interrupt_without_terminate_is_retried(place: Place):
    """The machine goes down, or a scheduler takes the node away: the run is still wanted."""
    left: list[Callable[[], None]] = [lambda: os.kill(os.getpid(), signal.SIGINT)]

    def faults(request: Request) -> Fault | None:
        return Hook(lambda _: left.pop()()) if left and request.operation == "put_part" else None

    FaultyResource.script(faults)
    result = place.run(place.pipeline(retry_policy=PATIENT))
    assert result.success
    assert [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_RESTARTED] == [
        "orders__remote.upload"
    ]
