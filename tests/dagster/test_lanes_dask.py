"""Lanes on Dask, which applies no retry policies, and goes on with the next steps when one has failed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import dagster as dg
import pytest

from blobflow.coordination.refs import read_ref
from blobflow.dagster import metadata as md
from blobflow.stores.local.store import LocalStore
from blobflow.testing import read_tree, write_tree
from blobflow.transport import list_artifacts
from tests.kit import noise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

if find_spec("dagster_dask") is not None:  # no dependency: it brings numpy, pandas and a plotting library
    from tests.dagster.celery_location import PART
    from tests.dagster.dask_location import orders

    CLUSTER = {"execution": {"config": {"cluster": {"local": {"n_workers": 2, "dashboard_address": None}}}}}

    def test_a_lane_that_fails_on_dask_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The run fails, neither ref nor mirror changes, and a new run moves what is missing."""
        monkeypatch.setenv("LANES_HOME", str(tmp_path))
        (tmp_path / "instance").mkdir()
        (tmp_path / "instance" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        store, tree = LocalStore(tmp_path / "store"), {"first": noise(10 * PART, 1)}
        write_tree(tmp_path / "source", tree)
        job = dg.build_reconstructable_job(orders.__module__, orders.__name__)
        with dg.DagsterInstance.from_config(str(tmp_path / "instance")) as instance:

            def run() -> dg.JobExecutionResult:
                return dg.execute_job(job, instance, run_config=CLUSTER, raise_on_error=False)

            assert run().success
            assert read_tree(tmp_path / "mirror" / "current") == tree
            published = read_ref(store, "orders/latest")

            newer = {"second": noise(10 * PART, 2)}
            write_tree(tmp_path / "source", newer)
            (tmp_path / "broken").touch()
            failed = run()
            assert not failed.success
            assert read_ref(store, "orders/latest") == published
            assert len(list(list_artifacts(store))) == 1
            assert read_tree(tmp_path / "mirror" / "current") == tree

            again = run()
            assert again.success
            outputs = [e for e in again.all_events if e.event_type == dg.DagsterEventType.STEP_OUTPUT]
            lanes = [e.step_output_data for e in outputs if ".upload.lane_" in (e.step_key or "")]
            resumed = sum(lane.metadata[md.BYTES_RESUMED].value for lane in lanes)  # pyright: ignore[reportCallIssue, reportArgumentType]
            assert resumed >= 2 * 6 * PART
        assert read_tree(tmp_path / "mirror" / "current") == read_tree(tmp_path / "source")
        assert read_ref(store, "orders/latest") != published
