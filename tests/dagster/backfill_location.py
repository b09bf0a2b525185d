"""A code location for backfills: the pipeline `orders` in `BACKFILL_HOME`, with a partition for each region."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from blobflow.dagster import BlobflowResource, DirectoryExporter, DirectoryImporter, artifact_pipeline
from tests.kit import sized

REGIONS = [f"region-{number:02}" for number in range(sized(50, 8))]


def definitions(home: Path) -> dg.Definitions:
    """What daemon and web server load."""
    pipeline = artifact_pipeline(
        "orders",
        partitions_def=dg.StaticPartitionsDefinition(REGIONS),
        exporter=lambda region: DirectoryExporter(path=home / "source" / region),
        importer=lambda region: DirectoryImporter(path=home / "mirror" / region),
    )
    resource = BlobflowResource(store=str(home / "store"), scratch_dir=str(home / "scratch"))
    return dg.Definitions.merge(
        pipeline.definitions, dg.Definitions(resources={"blobflow": resource}, executor=dg.in_process_executor)
    )


if "BACKFILL_HOME" in os.environ:
    defs = definitions(Path(os.environ["BACKFILL_HOME"]))
