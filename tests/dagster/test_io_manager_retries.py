"""`ArtifactIOManager` in steps that are killed or fail, and in the attempts that come after them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.coordination.refs import read_ref
from blobflow.dagster import metadata as md
from blobflow.testing import read_tree
from tests.dagster import io_location
from tests.dagster.io_location import PART_BYTES
from tests.dagster.kit import Place
from tests.kit import TREE
from tests.strict_s3 import StrictS3

pytestmark = pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is:DeprecationWarning")


def step_keys(result: dg.JobExecutionResult) -> list[str | None]:
    return [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_SUCCESS]


@pytest.mark.slow
def test_killed_steps_are_retried_with_what_is_missing(place: Place, monkeypatch: pytest.MonkeyPatch):
    """SIGKILL in `handle_output` and in `load_input`: the server's log shows each part sent and each byte got once."""
    with StrictS3() as server:
        bucket = server.new_bucket()
        for name, value in {
            "STORE": f"s3://{bucket}",
            "ENDPOINT": server.endpoint.endpoint_url,
            "KEY_ID": server.endpoint.access_key_id,
            "SECRET": server.endpoint.secret_access_key,
            "KILL_PUT": 4,
            "KILL_GET": 6,  # the head of the payload for the upload's proof comes before, in another process
        }.items():
            monkeypatch.setenv(f"MODELS_{name}", str(value))
        result = io_location.run(place, "assets")

        assert result.success
        assert (place.home / "killed-PUT").exists()
        assert (place.home / "killed-GET").exists()
        assert step_keys(result) == ["model", "scores"]
        sent = server.requests("UploadPart", "model/*")
        assert [each.part_number for each in sent] == [1, 2, 3, 4, 5, 6]
        (made,) = (m for m in result.asset_materializations_for_node("model"))
        facts: dict[str, Any] = {label: value.value for label, value in made.metadata.items()}
        assert facts[md.BYTES_RESUMED] == 3 * PART_BYTES
        assert facts[md.BYTES_SENT] == sum(each.bytes_in for each in sent if (each.part_number or 0) > 3)
        ranges = [each.headers["range"] for each in server.requests("GetObject", "model/*.tar")]
        large = [each for each in ranges if ranges.count(each) == 1]
        assert len(large) >= 5
        fetched = sum(each.bytes_out for each in server.requests("GetObject", "model/*.tar"))
        assert fetched < facts[md.SIZE] + PART_BYTES
    assert len(list((place.scratch / "inputs").iterdir())) == 1
    assert list((place.scratch / "outputs").iterdir()) == []


def test_a_retry_from_failure_loads_what_the_parent_run_made(place: Place, monkeypatch: pytest.MonkeyPatch):
    """A job of ops: the child run repeats only the step that failed, on the output of its parent's run."""
    monkeypatch.setenv("MODELS_BROKEN", "1")
    failed = io_location.run(place, "ops")
    assert step_keys(failed) == ["train"]
    monkeypatch.delenv("MODELS_BROKEN")
    # Another run in between has outputs of its own, and another machine has no cache.
    assert io_location.run(place, "ops").success
    shutil.rmtree(place.scratch)

    retried = io_location.run(place, "ops", retry_of=failed.run_id)

    assert retried.success
    assert step_keys(retried) == ["score"]
    assert read_tree(Path((place.home / "read").read_text())) == TREE
    assert read_ref(place.store, f"runs/{failed.run_id}/train/result/latest")
    assert read_ref(place.store, f"runs/{retried.run_id}/train/result/latest") is None


def test_a_new_run_of_ops_continues_the_upload_of_another(place: Place, monkeypatch: pytest.MonkeyPatch):
    """The ref belongs to the run, the content does not: the parts that a failed run has sent are not sent again."""
    monkeypatch.setenv("MODELS_OUTAGE", "5")
    assert not io_location.run(place, "ops").success
    monkeypatch.delenv("MODELS_OUTAGE")
    result = io_location.run(place, "ops")
    assert result.success
    handled: Any
    (handled,) = (
        e.event_specific_data
        for e in result.all_events
        if e.event_type == dg.DagsterEventType.HANDLED_OUTPUT and e.step_key == "train"
    )
    assert handled.metadata[md.BYTES_RESUMED].value == 4 * 4096
