"""A step that outlives its run, or whose run is being terminated, stops by itself.

When a run worker is killed, its step processes live on, beside the retry that takes their place. They can do no harm
to what is stored (parts are idempotent, publishing is conditional, a ref is never moved back), but they cost bandwidth
and hold locks. And when a run is terminated, Dagster turns the interrupt of a step that has a retry policy into a
retry, which under the in-process executor runs to the end. So a step checks its run's status when it begins, now and
then, and when it was interrupted.
"""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any, Final

import dagster as dg

from blobflow.errors import BlobflowError

log = logging.getLogger(__name__)

INTERVAL_S: Final = 3.0
"""Seconds between two looks at the run's status: 3 ms each, and soon enough after a crash."""


class StepOrphaned(BlobflowError):
    """The run of this step is over or being terminated, or its run worker died.

    Of no group: it says nothing of the artifact that the step was at.

    Attributes:
        run_id: The run.
        reason: Why the step stops.
    """

    hint: str = "nothing is lost: what was moved is kept, and the next attempt continues there"
    run_id: str
    reason: str


class RunFence:
    """Tells a step when to stop.

    Args:
        instance: Where the run is kept; None: of a step that belongs to no run.
        run_id: None: likewise; then it never stops.
        interval_s: Seconds between two looks; by default `INTERVAL_S`.
        clock: Seconds, monotonic.
        parent_alive: Whether the process that started this one still lives; None: of a process that has no such.
    """

    def __init__(
        self,
        instance: dg.DagsterInstance | None,
        run_id: str | None,
        *,
        interval_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        parent_alive: Callable[[], bool] | None = None,
    ) -> None:
        self._instance = instance
        self._run_id = run_id
        self._interval_s = INTERVAL_S if interval_s is None else interval_s
        self._clock = clock
        self._looked_at = clock()
        if parent_alive is None and (parent := multiprocessing.parent_process()) is not None:
            # Not os.getppid: a step that was started by a fork server is not a child of its run worker.
            parent_alive = parent.is_alive
        self._parent_alive = parent_alive
        self._ended: StepOrphaned | None = None

    def __repr__(self) -> str:
        return f"<RunFence of {self._run_id} {'closed' if self._ended else 'open'}>"

    def check(self, *, now: bool = False) -> None:
        """Return if the step is still wanted. Looks at most every `interval_s` seconds, unless `now`.

        Raises:
            StepOrphaned: it is not. Once raised, raised ever after.
        """
        if self._instance is None or self._run_id is None:
            return
        at = self._clock()
        if self._ended is None and (now or at - self._looked_at >= self._interval_s):
            self._looked_at = at
            reason = self._reason(self._instance, self._run_id)
            if reason:
                log.warning("step.orphaned run=%s reason=%r", self._run_id, reason)
                self._ended = StepOrphaned(
                    f"this step stops, because {reason}",
                    run_id=self._run_id,
                    reason=reason,
                )
        if self._ended is not None:
            raise self._ended

    def _reason(self, instance: dg.DagsterInstance, run_id: str) -> str:
        """Why this step is not wanted any more; empty if it is."""
        run = instance.get_run_by_id(run_id)
        if run is not None and run.is_finished:
            return f"run {run_id} is over ({run.status.value})"
        if run is not None and run.status is dg.DagsterRunStatus.CANCELING:
            return f"run {run_id} is being terminated"
        if self._parent_alive is not None and not self._parent_alive():
            if _is_step_worker(instance, run_id):
                return f"the worker of run {run_id} is gone"
            # A run worker whose code server went away does its work to the end.
            self._parent_alive = None
        return ""


def _is_step_worker(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether this process runs one step for a run worker, and is not the run worker itself."""
    started = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTED)
    return any(_pid(entry.dagster_event) == str(os.getpid()) for entry in started)


def _pid(event: Any) -> str | None:
    pid = event.engine_event_data.metadata.get("pid")
    return pid.value if pid is not None else None
