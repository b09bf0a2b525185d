"""A real webserver and a real daemon: runs that are killed, retried and terminated the way operators see it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.dagster import metadata as md
from blobflow.dagster.checkpoints import TRANSFERS
from tests.dagster.s3_pipeline import ROOT, S3Pipeline, s3_pipeline
from tests.dagster.test_retries_killed import ASSET, check, prepare
from tests.processes import is_gone, kill, wait_for
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = """
telemetry: {enabled: false}
run_retries: {enabled: true, max_retries: 2}
run_coordinator: {module: dagster, class: QueuedRunCoordinator, config: {dequeue_interval_seconds: 1}}
run_monitoring: {enabled: true, free_slots_after_run_end_seconds: 1, poll_interval_seconds: 2}
"""

LAUNCH = """mutation($p: ExecutionParams!) {launchRun(executionParams: $p) {
  __typename ... on LaunchRunSuccess {run {runId}} ... on PythonError {message stack}}}"""
REEXECUTE = """mutation($p: ReexecutionParams!) {launchRunReexecution(reexecutionParams: $p) {
  __typename ... on LaunchRunSuccess {run {runId}} ... on PythonError {message stack}}}"""
TERMINATE = """mutation($r: String!) {terminateRun(runId: $r, terminatePolicy: SAFE_TERMINATE) {
  __typename ... on TerminateRunFailure {message} ... on PythonError {message}}}"""
LOCATIONS = """{workspaceOrError {... on Workspace {locationEntries {name locationOrLoadError {
  __typename ... on RepositoryLocation {repositories {name}} ... on PythonError {message}}}}}}"""


class Operator:
    """Somebody at the web UI."""

    def __init__(self, url: str, orders: S3Pipeline) -> None:
        self._url = url
        self._orders = orders
        entry = wait_for(self._location)
        loaded = entry["locationOrLoadError"]
        assert loaded["__typename"] == "RepositoryLocation", loaded
        self._selector = {
            "repositoryLocationName": entry["name"],
            "repositoryName": loaded["repositories"][0]["name"],
            "jobName": "orders_job",
        }

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self._url}/graphql", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
        assert "errors" not in found, found
        return found["data"]

    def _location(self) -> dict[str, Any] | None:
        try:
            entries = self.ask(LOCATIONS)["workspaceOrError"]["locationEntries"]
        except OSError:
            return None  # the webserver is not up yet
        return entries[0] if entries and entries[0]["locationOrLoadError"] else None

    def materialize(self, stage: str, *, retries: int = 0) -> str:
        """Press Materialize; the run's id. The daemon starts a failed run again `retries` times."""
        selector = {**self._selector, "assetSelection": [{"path": ["orders", stage]}]}
        tags = [{"key": "dagster/max_retries", "value": str(retries)}]
        parameters = {"selector": selector, "runConfigData": {}, "executionMetadata": {"tags": tags}}
        made = self.ask(LAUNCH, p=parameters)["launchRun"]
        assert made["__typename"] == "LaunchRunSuccess", made
        return made["run"]["runId"]

    def reexecute_from_failure(self, run_id: str) -> str:
        """Press Re-execute from failure; the new run's id."""
        made = self.ask(REEXECUTE, p={"parentRunId": run_id, "strategy": "FROM_FAILURE"})["launchRunReexecution"]
        assert made["__typename"] == "LaunchRunSuccess", made
        return made["run"]["runId"]

    def terminate(self, run_id: str) -> None:
        """Press Terminate."""
        answer = self.ask(TERMINATE, r=run_id)["terminateRun"]
        assert answer["__typename"] == "TerminateRunSuccess", answer

    def wait_until(self, run_id: str, status: dg.DagsterRunStatus) -> None:
        """Until a run has ended that way."""

        def ended() -> bool:
            run = self._orders.instance.get_run_by_id(run_id)
            assert run is not None
            assert not run.is_finished or run.status is status, (run.status, self.told(run_id))
            return run.status is status

        wait_for(ended, 240)

    def told(self, run_id: str) -> list[str]:
        """The last lines of a run's log."""
        return [entry.message or entry.user_message for entry in self._orders.instance.all_logs(run_id)][-6:]

    def worker_pid(self, run_id: str) -> int:
        """The process of a run worker, from the run's log."""
        lines = [entry.message for entry in self._orders.instance.all_logs(run_id)]
        (pid,) = {found[1] for line in lines if (found := re.search(r"Started process for run \(pid: (\d+)\)", line))}
        return int(pid)


@contextmanager
def running(program: str, *options: str, log: Path) -> Generator[None]:
    """One of Dagster's programs, until the block ends."""
    command = [str(Path(sys.executable).with_name(program)), *options]
    with (
        open(log, "wb") as file,
        subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=file, stderr=file) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Pipeline]:
    with s3_pipeline(tmp_path, monkeypatch, SETTINGS) as made:
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "instance"))
        yield made


@contextmanager
def operated(orders: S3Pipeline) -> Generator[Operator]:
    """The webserver and the daemon."""
    port = free_port()
    location = ("-m", "tests.dagster.location_s3")
    with (
        running("dagster-webserver", "-h", "127.0.0.1", "-p", str(port), *location, log=orders.home / "web.log"),
        running("dagster-daemon", "run", *location, log=orders.home / "daemon.log"),
    ):
        yield Operator(f"http://127.0.0.1:{port}", orders)


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_reexecution_from_failure_continues(orders: S3Pipeline, kind: str):
    """The step's process is killed, the run fails, and the button sends what is missing."""
    prepare(orders, kind)
    with operated(orders) as operator:
        with orders.held(kind) as hold:
            failed = operator.materialize(ASSET[kind])
            hold.wait()
            kill(orders.step_pid())
            operator.wait_until(failed, dg.DagsterRunStatus.FAILURE)
        again = operator.reexecute_from_failure(failed)
        operator.wait_until(again, dg.DagsterRunStatus.SUCCESS)
    check(orders, kind)


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_the_daemon_retries_a_killed_run_worker(orders: S3Pipeline, monkeypatch, kind: str):
    """The worker is killed, its orphaned step stops by itself, and the run that the daemon starts continues."""
    prepare(orders, kind)
    monkeypatch.setenv("ORDERS_RETRIES", "5")
    with operated(orders) as operator:
        with orders.held(kind) as hold:
            first = operator.materialize(ASSET[kind], retries=2)
            hold.wait()
            orphan = orders.step_pid()
            kill(operator.worker_pid(first))
            wait_for(lambda: is_gone(orphan))
        operator.wait_until(first, dg.DagsterRunStatus.FAILURE)
        (retry,) = wait_for(
            lambda: [run.run_id for run in orders.instance.get_runs() if run.parent_run_id == first], 120
        )
        operator.wait_until(retry, dg.DagsterRunStatus.SUCCESS)
    check(orders, kind)


@pytest.mark.parametrize("executor", ["in_process", "multiprocess"])
@pytest.mark.parametrize("kind", ["upload", "download"])
def test_terminate_stops_a_run_with_retries_left(orders: S3Pipeline, monkeypatch, kind: str, executor: str):
    """The step has a retry policy, into which Dagster turns interrupts: the run ends nevertheless, and at once."""
    prepare(orders, kind)
    monkeypatch.setenv("ORDERS_RETRIES", "5")
    monkeypatch.setenv("ORDERS_EXECUTOR", executor)
    with operated(orders) as operator:
        with orders.held(kind) as hold:
            stopped = operator.materialize(ASSET[kind])
            hold.wait()
            operator.terminate(stopped)
            operator.wait_until(stopped, dg.DagsterRunStatus.CANCELED)
        events = [entry.dagster_event for entry in orders.instance.all_logs(stopped)]
        kinds = {event.event_type for event in events if event is not None}
        assert dg.DagsterEventType.STEP_FAILURE in kinds
        assert not kinds & {dg.DagsterEventType.STEP_UP_FOR_RETRY, dg.DagsterEventType.STEP_RESTARTED}
        assert dg.DagsterEventType.ASSET_MATERIALIZATION not in kinds
        again = operator.materialize(ASSET[kind])
        operator.wait_until(again, dg.DagsterRunStatus.SUCCESS)
    check(orders, kind)


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_terminate_leaves_a_transfer_that_can_go_on(orders: S3Pipeline, kind: str):
    """The step is interrupted, writes its last checkpoint, and the next run continues there."""
    prepare(orders, kind)
    with operated(orders) as operator:
        with orders.held(kind) as hold:
            stopped = operator.materialize(ASSET[kind])
            hold.wait()
            operator.terminate(stopped)
            operator.wait_until(stopped, dg.DagsterRunStatus.CANCELED)
        wait_for(lambda: is_gone(orders.step_pid()))
        last = orders.instance.fetch_observations(dg.AssetRecordsFilter(asset_key=TRANSFERS), limit=1).records[0]
        assert last.asset_observation is not None
        assert last.asset_observation.metadata[md.STATUS].value == "failed"
        assert last.run_id == stopped
        again = operator.materialize(ASSET[kind])
        operator.wait_until(again, dg.DagsterRunStatus.SUCCESS)
    check(orders, kind)
