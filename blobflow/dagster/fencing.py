"""Stops a step that outlives its run, or whose run is being terminated.

When a run worker is killed, its step processes continue, beside the retry that replaces them. They cannot harm stored
data: parts are idempotent, publishing is conditional, and a ref never moves back. But they cost bandwidth and hold
locks. When a run is terminated, Dagster turns the interrupt of a step with a retry policy into a retry. Under the
in-process executor, that retry runs to the end. So a step checks its run's status at its start, every few seconds, and
after an interrupt.
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
"""Seconds between two checks of the run's status. Each takes 3 ms, and a crash is noticed soon enough."""


class StepOrphaned(BlobflowError):
    """The run of this step is over or being terminated, or its run worker died.

    It belongs to no error group: it says nothing about the artifact that the step worked on.

    Attributes:
        run_id: Id of the run.
        reason: Reason for which the step stops.
    """

    hint: str = "nothing is lost: moved data is kept, and the next attempt continues there"
    run_id: str
    reason: str


class RunFence:
    """Raises in a step that must stop, because its run is over, being terminated, or without its worker.

    Args:
        instance: Instance that keeps the run; None for a step without a run, which never stops.
        run_id: Id of the run; None for a step without a run, which never stops.
        interval_s: Seconds between two checks of the run's status; by default `INTERVAL_S`.
        clock: Seconds, monotonic.
        parent_alive: Returns whether the process that started this one still lives; by default the parent of a
            process that multiprocessing started.
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
            # Not os.getppid: if a fork server starts the step, the step is not a child of its run worker.
            parent_alive = parent.is_alive
        self._parent_alive = parent_alive
        self._ended: StepOrphaned | None = None

    def __repr__(self) -> str:
        return f"<RunFence of {self._run_id} {'closed' if self._ended else 'open'}>"

    def check(self, *, now: bool = False) -> None:
        """Return if the step may go on. Reads the run's status at most every `interval_s` seconds, unless `now`.

        Raises:
            StepOrphaned: the step must stop. All later calls raise it as well.
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
        """Reason for which this step must stop; empty if it may go on."""
        run = instance.get_run_by_id(run_id)
        if run is not None and run.is_finished:
            return f"run {run_id} is over ({run.status.value})"
        if run is not None and run.status is dg.DagsterRunStatus.CANCELING:
            return f"run {run_id} is being terminated"
        if self._parent_alive is not None and not self._parent_alive():
            if _is_step_worker(instance, run_id):
                return f"the worker of run {run_id} is gone"
            # This is a run worker whose code server is gone: it works on to the end.
            self._parent_alive = None
        return ""


def _is_step_worker(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether this process runs a single step for a run worker, rather than being the run worker."""
    started = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTED)
    return any(_pid(entry.dagster_event) == str(os.getpid()) for entry in started)


def _pid(event: Any) -> str | None:
    pid = event.engine_event_data.metadata.get("pid")
    return pid.value if pid is not None else None
