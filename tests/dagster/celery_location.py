"""A code location for Celery workers: what steps hand to each other goes through the store."""

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

LANES = 3
PART = 64 * 1024


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
        custom_profile=ProfileConfig(chunk_size=PART, checkpoint_interval=4, workers=2),
    )
    defs = dg.Definitions.merge(
        pipeline.definitions,
        dg.Definitions(
            resources={"blobflow": blobflow, "io_manager": HandoffIOManager(blobflow=blobflow)}, executor=executor
        ),
    )
    return defs.resolve_job_def("orders_job")


def orders() -> dg.JobDefinition:
    """Every step of it is a Celery task."""
    return in_lanes(celery_executor.configured({"broker": os.environ["BROKER"], "backend": os.environ["BROKER"]}))


def main() -> None:
    job = dg.build_reconstructable_job("tests.dagster.celery_location", orders.__name__)
    with dg.DagsterInstance.get() as instance:
        retry = dg.ReexecutionOptions.from_failure(sys.argv[1], instance) if len(sys.argv) > 1 else None
        result = dg.execute_job(job, instance, reexecution_options=retry, raise_on_error=False)
    sys.exit(0 if result.success else 1)


if __name__ == "__main__":
    main()
