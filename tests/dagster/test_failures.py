"""What a step raises in the place of the core's errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.dagster import ArtifactIOManager, BlobflowResource, failures, metadata as md
from blobflow.dagster.checkpoints import TRANSFERS
from blobflow.dagster.failures import MAX_WAIT_S, as_dagster_error
from blobflow.errors import ChecksumMismatch, SlowDown, StoreUnavailable
from blobflow.stores import Store
from tests.dagster.kit import Place
from tests.servers import free_port

SECRET = "not-for-anybody"

POLICY = dg.RetryPolicy(max_retries=2, delay=10)


def test_an_error_that_passes_asks_for_a_retry():
    """The policy decides how often and how long after."""
    raised = as_dagster_error(StoreUnavailable("down", operation="get"), retry_number=0, retry_policy=POLICY)
    assert isinstance(raised, dg.RetryRequested)
    assert (raised.max_retries, raised.seconds_to_wait) == (2, 10)


@pytest.mark.parametrize(("asked", "waits"), [(1.0, 10), (60.0, 60), (86_400.0, MAX_WAIT_S)])
def test_the_store_may_ask_for_more_patience(asked, waits):
    """Retry-After is honoured where it is longer than the policy's delay, up to a limit."""
    raised = as_dagster_error(
        SlowDown("slow", retry_after_s=asked, operation="get"), retry_number=1, retry_policy=POLICY
    )
    assert isinstance(raised, dg.RetryRequested)
    assert raised.seconds_to_wait == waits


@pytest.mark.parametrize(("retry_number", "policy"), [(2, POLICY), (0, None)])
def test_the_last_attempt_fails_with_the_reason(retry_number, policy):
    """After the last retry the step shows the error itself, not that retries are used up."""
    error = StoreUnavailable("the store is down", operation="put_part", key="k")
    raised = as_dagster_error(error, retry_number=retry_number, retry_policy=policy)
    assert isinstance(raised, dg.Failure)
    assert (raised.description or "").startswith("the store is down. Hint: ")


def test_an_error_that_stays_fails_at_once_with_its_fields():
    """Damage is not retried; kind, hint and fields stand in the failure's metadata."""
    error = ChecksumMismatch("differs", what="part 3", expected=1, actual=2)
    raised = as_dagster_error(error, retry_number=0, retry_policy=POLICY)
    assert isinstance(raised, dg.Failure)
    assert not raised.allow_retries
    assert {label: value.value for label, value in raised.metadata.items()} == {
        md.ERROR: "ChecksumMismatch",
        md.HINT: ChecksumMismatch.hint,
        md.ERROR_FIELD + "what": "part 3",
        md.ERROR_FIELD + "expected": 1,
        md.ERROR_FIELD + "actual": 2,
    }


class Impatient(BlobflowResource):
    """Gives a store up after seconds instead of minutes."""

    def get_store(self, **_: Any) -> Store:
        return super().get_store(patience_s=3.0)


@pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is deprecated")  # Dagster's own
@pytest.mark.parametrize("who", ["a node of a pipeline", "an output of the IO manager"])
def test_the_event_log_says_what_a_step_waits_for(place: Place, monkeypatch: pytest.MonkeyPatch, who: str):
    """While a store is down, the run's log names it, its server, the request and the reason."""
    monkeypatch.setattr(failures, "SILENT_S", 0.5)
    endpoint = f"http://127.0.0.1:{free_port()}"
    down = Impatient(
        store="s3://orders/backup",
        endpoint_url=endpoint,
        region="us-east-1",
        access_key_id="AKIA",
        secret_access_key=SECRET,
        scratch_dir=str(place.scratch),
    )

    @dg.asset(io_manager_key="artifacts")
    def model() -> Path:
        return place.source

    if who == "a node of a pipeline":
        defs = dg.Definitions.merge(
            place.pipeline(retry_policy=None).definitions, dg.Definitions(resources={"blobflow": down})
        )
    else:
        defs = dg.Definitions([model], resources={"artifacts": ArtifactIOManager(blobflow=down)})
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=place.instance, raise_on_error=False
    )
    assert not result.success
    told = [entry.user_message for entry in place.instance.all_logs(result.run_id)]
    waits = [line for line in told if line.startswith("step.waits no progress for ")]
    assert waits
    assert f"in s3://orders/backup at {endpoint}: " in waits[0]
    assert "refused" in waits[0].lower()
    assert SECRET not in "\n".join(told)


def test_a_transfer_is_found_by_its_key(place: Place):
    """Its partition of `blobflow/transfers` is called after kind and key, and each description names the key."""
    assert place.run().success
    (key,) = {meta.key for meta in place.store.list() if meta.key.endswith(".tar")}
    records = place.instance.fetch_observations(TRANSFERS, limit=100).records
    shown = {str(record.partition_key).rpartition("-")[0] for record in records}
    plain = re.sub(r"[^A-Za-z0-9]+", "_", key)
    assert shown == {f"{kind}-{plain}" for kind in ("upload", "verify", "download")}
    descriptions = [made.description for record in records if (made := record.asset_observation)]
    assert all(repr(key) in str(description) for description in descriptions)
