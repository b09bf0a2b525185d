"""SIGKILL in the middle of a transfer: every kind of retry continues it, and the server saw no part twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from blobflow.dagster import metadata as md
from tests.dagster import location_s3
from tests.dagster.location_s3 import PART, PARTS, WORKERS
from tests.dagster.s3_pipeline import S3Pipeline, s3_pipeline
from tests.processes import kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ASSET = {"upload": "remote", "download": "mirror"}


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Pipeline]:
    with s3_pipeline(tmp_path, monkeypatch) as made:
        yield made


def told(orders: S3Pipeline, kind: str) -> dict[str, object]:
    """What the newest materialization says."""
    made = orders.instance.get_latest_materialization_event(dg.AssetKey(["orders", ASSET[kind]]))
    assert made is not None
    assert made.asset_materialization is not None
    return {label: value.value for label, value in made.asset_materialization.metadata.items()}


def check(orders: S3Pipeline, kind: str, retries: int = 1) -> None:
    """Whole at its place, moved once, and the UI says what was reused."""
    orders.check_whole()
    orders.check_sent_once(kind)
    facts = told(orders, kind)
    assert facts[md.RETRIES] == retries
    heads = 3 if kind == "download" else 0  # requests that fetch manifest and index before the parts
    least = (PARTS // 2 - 1 - heads - WORKERS) * PART
    resumed = facts["blobflow/resumed_from_bytes"]
    assert isinstance(resumed, int)
    assert resumed >= least
    if kind == "download":
        orders.check_mirror()


def prepare(orders: S3Pipeline, kind: str) -> None:
    """Everything before the asset whose transfer is killed, in this process."""
    assert orders.in_process("snapshot", *(["remote"] if kind == "download" else [])).success


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_a_killed_step_is_retried_in_the_same_run(orders: S3Pipeline, monkeypatch, kind: str):
    """RetryPolicy: the step's process is killed, the next one in the same run sends what is missing."""
    prepare(orders, kind)
    monkeypatch.setenv("ORDERS_RETRIES", "1")
    with orders.held(kind) as hold:

        def kill_the_step() -> None:
            hold.wait()
            kill(orders.step_pid())
            orders.server.script()
            hold.release()

        killer = threading.Thread(target=kill_the_step)
        killer.start()
        result = location_s3.run(orders.instance, ASSET[kind])
        killer.join()
    assert result.success
    assert len([e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_RESTARTED]) == 1
    check(orders, kind)


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_a_brand_new_run_continues_what_a_killed_run_began(orders: S3Pipeline, kind: str):
    """Worker and step are killed; a run that knows nothing of them continues, by the transfer's id alone."""
    prepare(orders, kind)
    with orders.held(kind) as hold, orders.worker(ASSET[kind]) as worker:
        hold.wait()
        worker.kill()
        kill(orders.step_pid())
    assert orders.in_process().success
    check(orders, kind)
