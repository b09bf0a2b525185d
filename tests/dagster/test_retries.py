"""Runs that failed or were killed, and the runs that take up where they stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg

from blobflow.coordination.refs import read_ref
from blobflow.dagster import metadata as md
from blobflow.testing import read_tree
from tests.dagster import location
from tests.dagster.kit import REMOTE, STEPS, Place
from tests.kit import TREE

ROOT = Path(__file__).resolve().parents[2]


def remote_facts(result: dg.JobExecutionResult) -> dict[str, object]:
    (made,) = (m for m in result.asset_materializations_for_node("orders__remote") if m.asset_key == REMOTE)
    return {label: value.value for label, value in made.metadata.items()}


def step_keys(result: dg.JobExecutionResult) -> list[str | None]:
    return [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_SUCCESS]


def test_a_retry_from_failure_sends_only_the_missing_parts(place: Place, monkeypatch):
    """Re-executing a failed run from its upload exports nothing again and continues the upload."""
    monkeypatch.setenv("ORDERS_HOME", str(place.home))
    monkeypatch.setenv("ORDERS_OUTAGE", "5")
    failed = location.run(place.instance)
    assert step_keys(failed) == STEPS[:1]

    monkeypatch.delenv("ORDERS_OUTAGE")
    retried = location.run(place.instance, retry_of=failed.run_id)

    assert retried.success
    assert step_keys(retried) == STEPS[1:]
    remote = remote_facts(retried)
    assert remote[md.BYTES_RESUMED] == 4 * 4096
    assert read_tree(place.current) == TREE


def test_a_retry_after_a_newer_round_does_not_publish_an_old_snapshot(place: Place, monkeypatch):
    """A failed run that is retried after a newer one has published leaves the newer snapshot in place."""
    monkeypatch.setenv("ORDERS_HOME", str(place.home))
    monkeypatch.setenv("ORDERS_OUTAGE", "5")
    failed = location.run(place.instance)
    monkeypatch.delenv("ORDERS_OUTAGE")
    (place.source / "new").write_text("newer")
    assert location.run(place.instance).success
    before = read_ref(place.store, "orders/latest")

    retried = location.run(place.instance, retry_of=failed.run_id)

    assert retried.success
    assert remote_facts(retried)[md.STATUS] == "unchanged"
    assert read_ref(place.store, "orders/latest") == before
    assert (place.current / "new").read_text() == "newer"


def test_a_run_that_uses_a_snapshot_keeps_it(place: Place, monkeypatch):
    """A newer round removes no scratch directory that an unfinished run works in."""
    monkeypatch.setenv("ORDERS_HOME", str(place.home))
    monkeypatch.setenv("ORDERS_OUTAGE", "5")
    failed = location.run(place.instance)
    monkeypatch.delenv("ORDERS_OUTAGE")
    (scratch,) = (manifest.parent.parent for manifest in place.scratch.rglob("MANIFEST.json"))
    working = place.instance.create_run_for_job(location.orders(str(place.home)), status=dg.DagsterRunStatus.STARTED)
    (scratch / f"run-{working.run_id}").touch()

    assert location.run(place.instance).success
    assert (scratch / "artifact" / "MANIFEST.json").exists()
    assert failed.run_id == scratch.name


def test_a_new_run_continues_what_a_killed_process_began(place: Place, monkeypatch):
    """After SIGKILL in the middle of an upload, a brand-new run of another process sends only the rest."""
    killed = subprocess.run(
        [sys.executable, "-c", "from tests.dagster import location; location.main()"],
        env={**os.environ, "ORDERS_HOME": str(place.home), "ORDERS_KILL": "6"},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL

    monkeypatch.setenv("ORDERS_HOME", str(place.home))
    result = location.run(place.instance)

    assert result.success
    assert step_keys(result) == STEPS
    remote = remote_facts(result)
    assert remote[md.BYTES_RESUMED] == 5 * 4096
    assert read_tree(place.current) == TREE
