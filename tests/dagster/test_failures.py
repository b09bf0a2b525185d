"""What a step raises in the place of the core's errors."""

from __future__ import annotations

import dagster as dg
import pytest

from blobflow.dagster import metadata as md
from blobflow.dagster.failures import MAX_WAIT_S, as_dagster_error
from blobflow.errors import ChecksumMismatch, SlowDown, StoreUnavailable

POLICY = dg.RetryPolicy(max_retries=2, delay=10)


def test_an_error_that_passes_asks_for_a_retry():
    """The policy decides how often and how long after."""
    raised = as_dagster_error(StoreUnavailable("down"), retry_number=0, retry_policy=POLICY)
    assert isinstance(raised, dg.RetryRequested)
    assert (raised.max_retries, raised.seconds_to_wait) == (2, 10)


@pytest.mark.parametrize(("asked", "waits"), [(1.0, 10), (60.0, 60), (86_400.0, MAX_WAIT_S)])
def test_the_store_may_ask_for_more_patience(asked, waits):
    """Retry-After is honoured where it is longer than the policy's delay, up to a limit."""
    raised = as_dagster_error(SlowDown("slow", retry_after_s=asked), retry_number=1, retry_policy=POLICY)
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
        md.HINT: ChecksumMismatch.default_hint,
        md.ERROR_FIELD + "what": "part 3",
        md.ERROR_FIELD + "expected": 1,
        md.ERROR_FIELD + "actual": 2,
    }
