"""The store that all pipelines of the project share."""

import os
from pathlib import Path

import dagster as dg

from blobflow.dagster import BlobflowResource

PROJECT = Path(__file__).resolve().parents[2]


@dg.definitions
def store() -> dg.Definitions:
    """`REGIONS_STORE`, e.g. s3://bucket/prefix; by default a directory in the project."""
    url = os.environ.get("REGIONS_STORE") or str(PROJECT / "store")
    return dg.Definitions(resources={"blobflow": BlobflowResource(store=url)})
