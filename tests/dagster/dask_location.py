"""A code location for Dask: a pipeline in lanes. The first that finds `<LANES_HOME>/broken` removes it and fails."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg
from dagster_dask import dask_executor  # pyright: ignore[reportMissingImports]

from blobflow.dagster import DirectoryExporter, DirectoryImporter, ProfileConfig, artifact_pipeline
from blobflow.errors import StoreUnavailable
from blobflow.testing import FailBefore, Fault, Request
from tests.dagster.kit import FaultyResource

LANES = 3
PART = 64 * 1024


def _faults(request: Request) -> Fault | None:
    if request.operation != "put_part":
        return None
    try:
        Path(os.environ["LANES_HOME"], "broken").unlink()
    except FileNotFoundError:
        return None
    return FailBefore(StoreUnavailable("the store is down", operation="put_part", key=request.key))


def orders() -> dg.JobDefinition:
    """The pipeline's own job, every step of which is a task of Dask."""
    home = Path(os.environ["LANES_HOME"])
    FaultyResource.script(_faults)
    pipeline = artifact_pipeline(
        "orders",
        exporter=DirectoryExporter(path=home / "source"),
        importer=DirectoryImporter(path=home / "mirror"),
        lanes=LANES,
    )
    blobflow = FaultyResource(
        store=str(home / "store"),
        scratch_dir=str(home / "scratch"),
        custom_profile=ProfileConfig(chunk_size=PART, checkpoint_interval=4, workers=2),
    )
    defs = dg.Definitions.merge(
        pipeline.definitions, dg.Definitions(resources={"blobflow": blobflow}, executor=dask_executor)
    )
    return defs.resolve_job_def("orders_job")
