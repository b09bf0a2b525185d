"""Translates the core's errors into Dagster's: temporary errors are retried, others fail at once with a hint."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import dagster as dg

from blobflow.activity import SILENCE_S, reporting_waits
from blobflow.dagster import metadata as md
from blobflow.dagster.fencing import RunFence, StepOrphaned
from blobflow.errors import BlobflowError, TemporaryError, Value

DEFAULT_RETRY_POLICY: Final = dg.RetryPolicy(
    max_retries=3, delay=10, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS
)
"""Retry policy of every step and job, unless the user gives another. The store repeats requests for two minutes before
a step fails, so three more attempts outlive most outages."""
MAX_WAIT_S: Final = 300.0
"""Most seconds that a step waits for its next attempt, even if the store asks for more."""


SILENT_S: float = SILENCE_S
"""Seconds without progress after which a step logs what it waits for."""


def as_dagster_error(
    error: BlobflowError,
    *,
    retry_number: int,
    retry_policy: dg.RetryPolicy | None,
    facts: Mapping[str, Any] | None = None,
) -> dg.Failure | dg.RetryRequested:
    """The exception that a step raises in place of `error`: a retry if that may help, otherwise a failure.

    Args:
        retry_number: Retries of this step so far.
        retry_policy: Number of retries after temporary errors, and the delays between them.
        facts: More metadata, such as the step's progress.
    """
    if error.retryable and retry_policy is not None and retry_number < retry_policy.max_retries:
        asked = error.retry_after_s if isinstance(error, TemporaryError) else None
        wait = max(retry_policy.calculate_delay(retry_number + 1), asked or 0.0)
        return dg.RetryRequested(max_retries=retry_policy.max_retries, seconds_to_wait=min(wait, MAX_WAIT_S))
    said = error.to_dict(as_field)
    description = f"{said['message']}. Hint: {said['hint']}." if said["hint"] else said["message"]
    return dg.Failure(description, metadata={**error_metadata(error), **(facts or {})}, allow_retries=False)


def as_field(name: str, value: Value | None) -> str:
    """The name of a setting (`blobflow.errors.setting`) in messages and hints: a field of a component or resource."""
    return name if value is None else f"{name}: {value}"


def error_metadata(error: BlobflowError) -> dict[str, Any]:
    """The error's type, hint and fields as metadata."""
    facts = error.to_dict(as_field)
    facts.pop("message")
    known = {md.ERROR: facts.pop("type"), md.HINT: facts.pop("hint")}
    return {**known, **{md.ERROR_FIELD + name: value for name, value in facts.items()}}


@contextmanager
def dagster_errors(
    context: dg.OpExecutionContext,
    retry_policy: dg.RetryPolicy | None,
    facts: Callable[[], Mapping[str, Any]] = dict,
    *,
    fence: RunFence | None = None,
) -> Iterator[None]:
    """Raises the core's errors as Dagster's, and stops a step whose run is over or being terminated.

    Args:
        facts: Returns more metadata for a failure, such as the step's progress.
        fence: Fence of the step's run; a new one by default.
    """
    with waits_logged(context.log), stopped_for_good(fence or RunFence(context.instance, context.run_id), facts):
        try:
            yield
        except BlobflowError as error:
            raised = as_dagster_error(
                error, retry_number=context.retry_number, retry_policy=retry_policy, facts=facts()
            )
            if isinstance(raised, dg.RetryRequested):
                context.log.warning("step.retry wait_s=%.0f error=%r", raised.seconds_to_wait, error.message)
            raise raised from error


@contextmanager
def waits_logged(log: dg.DagsterLogManager) -> Iterator[None]:
    """Logs waits on the step's log: while a store does not answer or every attempt fails, with place, reason and time.

    Retries are otherwise logged on standard error only, which does not appear in the log of a run.
    """
    with reporting_waits(lambda wait: log.warning("step.waits %s", wait), silence_s=SILENT_S):
        yield


@contextmanager
def io_manager_errors(fence: RunFence, facts: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
    """`dagster_errors` for an IO manager, which does not see the step's retry policy.

    A temporary error becomes a failure to which Dagster applies that policy. Other errors fail the step at once.
    """
    with stopped_for_good(fence, facts):
        try:
            yield
        except BlobflowError as error:
            raised = as_dagster_error(error, retry_number=0, retry_policy=None, facts=facts())
            if isinstance(raised, dg.Failure):
                raised.allow_retries = error.retryable
            raise raised from error


@contextmanager
def stopped_for_good(fence: RunFence, facts: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
    """Fails a step whose run is over or being terminated, in a way that no policy retries.

    Dagster retries a step after an interrupt or any other exception, even while its run is being terminated. So the
    run's status is checked before the block, which may be such a retry, and after every exception from the block.
    """
    try:
        fence.check(now=True)
        yield
    except GeneratorExit:
        raise
    except BaseException as raised:
        if isinstance(raised, dg.Failure) and not raised.allow_retries:
            raise
        try:
            fence.check(now=True)
        except StepOrphaned as stopped:
            failure = as_dagster_error(stopped, retry_number=0, retry_policy=None, facts=facts())
            raise failure from (raised if raised is not stopped else stopped)
        raise
