"""A code location that other processes load: the pipeline `orders` in the directory `ORDERS_HOME`.

`ORDERS_OUTAGE=n`: the store is down from the n-th part on. `ORDERS_KILL=n`: the process is killed there.
`main` runs it once, in the instance below `ORDERS_HOME`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import dagster as dg

from blobflow.errors import StoreUnavailable
from blobflow.testing import FailBefore, Fault, Request
from tests.dagster.kit import FaultyResource, Place


def _faults(request: Request) -> Fault | None:
    if request.operation == "put_part":
        if request.number >= int(os.environ.get("ORDERS_OUTAGE", "1000")):
            return FailBefore(StoreUnavailable("the store is down", operation="put_part", key=request.key))
        if request.number >= int(os.environ.get("ORDERS_KILL", "1000")):
            os.kill(os.getpid(), signal.SIGKILL)
    return None


def orders(home: str) -> dg.JobDefinition:
    """The pipeline's own job; the implicit asset job cannot be rebuilt from a function."""
    FaultyResource.script(_faults)
    with dg.DagsterInstance.ephemeral() as unused:
        place = Place(Path(home), unused)
    defs = dg.Definitions.merge(
        place.pipeline().definitions,
        dg.Definitions(resources={"blobflow": place.resource()}, executor=dg.in_process_executor),
    )
    return defs.resolve_job_def("orders_job")


def run(instance: dg.DagsterInstance, *, retry_of: str | None = None) -> dg.JobExecutionResult:
    """A new run, or the retry of a failed one from its failed step."""
    job = dg.build_reconstructable_job(__name__, orders.__name__, (os.environ["ORDERS_HOME"],))
    retry = dg.ReexecutionOptions.from_failure(retry_of, instance) if retry_of else None
    return dg.execute_job(job, instance, reexecution_options=retry, raise_on_error=False)


def main() -> None:
    instance_home = str(Path(os.environ["ORDERS_HOME"]) / "instance")
    with dg.DagsterInstance.local_temp(instance_home, overrides={"telemetry": {"enabled": False}}) as instance:
        run(instance)
