"""SIGKILL at half of a transfer, wherever a step makes it: every kind of retry moves only what is missing."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import dagster as dg
import pytest

from blobflow.dagster.checkpoints import TRANSFERS
from tests.dagster import retry_location
from tests.dagster.kit import FaultyResource
from tests.dagster.retry_location import PART, PARTS, WORKERS, run, run_elsewhere
from tests.kit import sized
from tests.strict_s3 import StrictS3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is:DeprecationWarning"),
]

RETRIES, SHAPES = ("policy", "failure", "worker", "new"), ("ops", "asset", "graph")
PLACES = ("body", "handle_output", "load_input")
SOME = [
    ("policy", "ops", "handle_output"),
    ("failure", "graph", "load_input"),
    ("worker", "asset", "body"),
    ("new", "ops", "load_input"),
]
"""Every retry, every shape and every place."""
CASES = list(product(RETRIES, SHAPES, PLACES)) if sized(1, 0) else SOME


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "instance").mkdir()
    (tmp_path / "instance" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(tmp_path / "instance")) as instance:
        yield instance


@pytest.mark.parametrize(("retry", "shape", "where"), CASES)
def test_a_transfer_killed_at_half_continues(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, retry: str, shape: str, where: str
):
    """At the server's log: what moved twice is at most what was in flight; and the metadata say what was reused."""
    retry_location.write_original(tmp_path)
    with StrictS3() as server:
        bucket = server.new_bucket()
        monkeypatch.setenv("RETRY_S3", server.url)
        monkeypatch.setenv("RETRY_BUCKET", bucket)
        if retry in ("policy", "failure"):
            monkeypatch.setenv("RETRY_PROCESSES", "1")
        if retry == "policy":
            monkeypatch.setenv("RETRY_POLICY", "1")
        try:
            result = retried(instance, tmp_path, retry, shape, where)
        finally:
            while FaultyResource.opened:
                FaultyResource.opened.pop().close()

        assert result.success
        assert (tmp_path / "killed").exists()
        assert where == "body" or (tmp_path / "read").exists()
        if where == "load_input":
            ranges = [each for each in server.requests("GetObject", "*.tar") if each.bytes_out == PART]
            moved = [each.headers["range"] for each in ranges]
        else:
            moved = [str(each.part_number) for each in server.requests("UploadPart", "*.tar")]
        assert len(set(moved)) >= PARTS
        assert len(moved) - len(set(moved)) <= WORKERS
        assert server.uploads(bucket) == {}
    facts = told(instance, "download" if where == "load_input" else "upload")
    resumed = facts["blobflow/resumed_from_bytes"].value
    assert isinstance(resumed, int)
    assert resumed >= (PARTS // 2 - 1 - WORKERS) * PART
    assert facts["blobflow/retries"].value == 1
    print(f"{retry}, {shape}, {where}: {len(moved) - len(set(moved))} parts twice, resumed from {resumed}")


def retried(instance: dg.DagsterInstance, home: Path, retry: str, shape: str, where: str) -> dg.JobExecutionResult:
    """What ended well after a process was killed."""
    if retry == "policy":
        return run(instance, home, shape, where)
    if retry == "failure":
        first = run(instance, home, shape, where)
        assert not first.success
        return run(instance, home, shape, where, retry_of=first.run_id)
    assert run_elsewhere(home, shape, where) == -signal.SIGKILL
    if retry == "new":
        return run(instance, home, shape, where)
    (killed,) = instance.get_runs()
    instance.report_run_failed(killed, "the run worker is gone")  # as the daemon does, before it starts the retry
    return run(instance, home, shape, where, retry_of=killed.run_id)


def told(instance: dg.DagsterInstance, kind: str) -> dict[str, dg.MetadataValue]:
    """What the last checkpoint of such a transfer says."""
    records = instance.fetch_observations(dg.AssetRecordsFilter(asset_key=TRANSFERS), limit=100).records
    made = [record.asset_observation for record in records if record.asset_observation]
    done = [one for one in made if re.match(f"{kind} of '.*' done,", one.description or "")]
    assert done, [one.description for one in made]
    return dict(done[0].metadata)
