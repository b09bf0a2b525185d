"""SIGKILL with all lanes in flight: a retry from failure runs every one of them, and moves only what is missing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.dagster import metadata as md
from blobflow.transport import list_artifacts
from blobflow.transport.remote import RemoteArtifact
from tests.dagster import location_s3
from tests.dagster.location_s3 import PART, PARTS, WORKERS
from tests.dagster.s3_pipeline import S3Pipeline, s3_pipeline
from tests.fault_rules import Rule
from tests.processes import is_gone, wait_for
from tests.strict_s3 import Exchange, Hook

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LANES = 6
PATIENCE_S = 300.0
FIRST_HELD = PARTS // 2 + 1
HELD = list(range(FIRST_HELD, FIRST_HELD + LANES * WORKERS))
"""The parts that are in flight when the worker is killed: of each lane as many as it has workers."""


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Pipeline]:
    with s3_pipeline(tmp_path, monkeypatch) as made:
        monkeypatch.setenv("ORDERS_LANES", str(LANES))
        yield made


class Gate:
    """Holds the first request for each of some parts until it is opened."""

    def __init__(self, numbers: list[int], number_of: Callable[[Exchange], int | None]) -> None:
        self._number_of = number_of
        self._waited_for = set(numbers)
        self._changed = threading.Condition()
        self._open = False

    def __call__(self, exchange: Exchange) -> None:
        number = self._number_of(exchange)
        with self._changed:
            if number in self._waited_for:
                self._waited_for.remove(number)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._open, PATIENCE_S)

    def wait(self) -> None:
        """Until all of them have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._waited_for, PATIENCE_S), self._waited_for

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()


@contextmanager
def held(orders: S3Pipeline, kind: str, number_of: Callable[[Exchange], int | None]) -> Iterator[Gate]:
    """Hold every lane when half of its parts are through, as many requests as it has workers."""
    gate = Gate(HELD, number_of)
    operation = {"upload": "UploadPart", "download": "GetObject"}[kind]
    orders.server.script(Rule(Hook(gate), operation=operation, key="orders/*.tar", times=None))
    try:
        yield gate
    finally:
        gate.open()
        orders.server.script()


def step_pids(orders: S3Pipeline, run_id: str) -> dict[str, int]:
    """The processes of a run's steps."""
    entries = orders.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTED)
    events = [entry.dagster_event for entry in entries if entry.dagster_event is not None]
    found: dict[str, int] = {}
    for event in events:
        pid = event.engine_event_data.metadata.get("pid")
        assert isinstance(pid, dg.TextMetadataValue)
        assert pid.value is not None
        found[event.step_key or ""] = int(pid.value)
    return found


def killed_run(orders: S3Pipeline) -> str:
    """The id of the run whose worker is dead, after the daemon has noticed it."""
    (run,) = orders.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    orders.instance.report_run_failed(run, "the run worker is gone")
    return run.run_id


def lane_pids(orders: S3Pipeline, run_id: str) -> list[int]:
    """The processes of a run's lanes."""
    pids = [pid for step, pid in step_pids(orders, run_id).items() if ".lane_" in step]
    assert len(pids) == LANES
    return pids


def steps_of(result: dg.JobExecutionResult) -> set[str | None]:
    return {e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_SUCCESS}


def told(result: dg.JobExecutionResult, stage: str) -> dict[str, Any]:
    """The metadata of the asset's materialization."""
    (made,) = result.asset_materializations_for_node(f"orders__{stage}")
    return {label: value.value for label, value in made.metadata.items()}


def check_moved_once(numbers: list[int]) -> None:
    """Every part was moved, and twice only what was in flight when the lanes were killed."""
    times = Counter(numbers)
    assert sorted(times) == list(range(1, max(times) + 1))
    assert sorted(number for number in times if times[number] > 1) == HELD
    assert max(times.values()) == 2


def retry(orders: S3Pipeline, run_id: str) -> dg.JobExecutionResult:
    """The re-execution from failure, as the UI and the daemon start it."""
    job = dg.build_reconstructable_job(location_s3.__name__, location_s3.orders.__name__)
    options = dg.ReexecutionOptions.from_failure(run_id, orders.instance)
    return dg.execute_job(job, orders.instance, reexecution_options=options, raise_on_error=False)


def test_a_worker_killed_with_six_lanes_in_flight_loses_no_part(orders: S3Pipeline):
    """All six are run again; each sends what it lacks, and twice no more than it had in flight."""
    assert orders.in_process("snapshot").success
    with held(orders, "upload", lambda exchange: exchange.part_number) as gate:
        with orders.worker("remote") as worker:
            gate.wait()
            worker.kill()
        run_id = killed_run(orders)
        result = retry(orders, run_id)  # beside the orphans, whose requests are still held

    assert result.success
    assert steps_of(result) == {
        *(f"orders__remote.upload.lane_{lane}" for lane in range(LANES)),
        "orders__remote.upload.commit",
        "orders__remote.verify",
    }
    orders.check_whole()
    check_moved_once([each.part_number or 0 for each in orders.moved("upload")])
    for pid in lane_pids(orders, run_id):
        wait_for(lambda pid=pid: is_gone(pid))
    facts = told(result, "remote")
    assert facts[md.BYTES_RESUMED] == (HELD[0] - 1) * PART
    assert facts[md.BYTES_SENT] == facts[md.SIZE] - facts[md.BYTES_RESUMED]


def test_a_worker_killed_with_six_lanes_of_a_download_in_flight_continues(orders: S3Pipeline):
    """The orphans leave the stage by themselves; after that all six lanes fetch what they lack."""
    assert orders.in_process("snapshot", "remote").success
    store = location_s3.Marking.opened[-1]
    (entry,) = list_artifacts(store)
    start = RemoteArtifact.open(store, entry.key, None).open_layout().data_start

    def number_of(exchange: Exchange) -> int | None:
        offset = int(exchange.headers["range"].removeprefix("bytes=").partition("-")[0])
        return (offset - start) // PART + 1 if offset >= start else None

    seen = len(orders.server.requests("GetObject", "orders/*.tar"))
    with held(orders, "download", number_of) as gate:
        with orders.worker("mirror") as worker:
            gate.wait()
            worker.kill()
        run_id = killed_run(orders)
        for pid in lane_pids(orders, run_id):
            wait_for(lambda pid=pid: is_gone(pid))
        result = retry(orders, run_id)

    assert result.success
    assert steps_of(result) == {
        *(f"orders__mirror.download.lane_{lane}" for lane in range(LANES)),
        "orders__mirror.download.assemble",
        "orders__mirror.import_",
    }
    orders.check_mirror()
    numbers = [number_of(each) for each in orders.server.requests("GetObject", "orders/*.tar")[seen:]]
    check_moved_once([number for number in numbers if number])
    facts = told(result, "mirror")
    assert facts[md.BYTES_RESUMED] == (HELD[0] - 1) * PART
    assert not list((orders.home / "mirror").rglob(".blobflow-download-*"))
