"""A code location for Celery workers: what steps hand to each other goes through the store.

While `<LANES_HOME>/held` is there, each lane of an upload stores `BEFORE_HELD` parts; the others wait and are noted
there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import dagster as dg
from dagster_celery import celery_executor

from blobflow.dagster import (
    BlobflowResource,
    DirectoryExporter,
    DirectoryImporter,
    HandoffIOManager,
    ProfileConfig,
    artifact_pipeline,
)
from blobflow.testing import Fault, Hook, Request
from tests.dagster.kit import FaultyResource
from tests.processes import wait_for

LANES = 3
WORKERS = 2
"""Of each lane."""
PART = 64 * 1024
BEFORE_HELD = 8
"""Of a lane's 17 parts."""


def in_lanes(executor: dg.ExecutorDefinition, resource: type[BlobflowResource] = BlobflowResource) -> dg.JobDefinition:
    """The own job of a pipeline below `LANES_HOME`."""
    home = Path(os.environ["LANES_HOME"])
    pipeline = artifact_pipeline(
        "orders",
        exporter=DirectoryExporter(path=home / "source"),
        importer=DirectoryImporter(path=home / "mirror"),
        lanes=LANES,
    )
    blobflow = resource(
        store=str(home / "store"),
        scratch_dir=str(home / "scratch"),
        custom_profile=ProfileConfig(chunk_size=PART, checkpoint_interval=4, workers=WORKERS),
    )
    defs = dg.Definitions.merge(
        pipeline.definitions,
        dg.Definitions(
            resources={"blobflow": blobflow, "io_manager": HandoffIOManager(blobflow=blobflow)}, executor=executor
        ),
    )
    return defs.resolve_job_def("orders_job")


def _hold(request: Request) -> Fault | None:
    held = Path(os.environ["LANES_HOME"], "held")
    if request.operation != "put_part" or request.number <= BEFORE_HELD or not held.is_dir():
        return None

    def wait(_: Request) -> None:
        (held / f"{os.getpid()}-{request.number}").touch()
        wait_for(lambda: not held.is_dir())

    return Hook(wait)


def orders() -> dg.JobDefinition:
    """Every step of it is a Celery task."""
    FaultyResource.script(_hold)
    celery = celery_executor.configured({"broker": os.environ["BROKER"], "backend": os.environ["BROKER"]})
    return in_lanes(celery, FaultyResource)


def main() -> None:
    job = dg.build_reconstructable_job("tests.dagster.celery_location", orders.__name__)
    with dg.DagsterInstance.get() as instance:
        retry = dg.ReexecutionOptions.from_failure(sys.argv[1], instance) if len(sys.argv) > 1 else None
        result = dg.execute_job(job, instance, reexecution_options=retry, raise_on_error=False)
    sys.exit(0 if result.success else 1)


if __name__ == "__main__":
    main()
