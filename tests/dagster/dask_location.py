"""A code location for Dask: a pipeline in lanes. The first that finds `<LANES_HOME>/broken` removes it and fails."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg
from dagster_dask import dask_executor  # pyright: ignore[reportMissingImports]

from blobflow.errors import StoreUnavailable
from blobflow.testing import FailBefore, Fault, Request
from tests.dagster.celery_location import in_lanes
from tests.dagster.kit import FaultyResource


def _faults(request: Request) -> Fault | None:
    if request.operation != "put_part":
        return None
    try:
        Path(os.environ["LANES_HOME"], "broken").unlink()
    except FileNotFoundError:
        return None
    return FailBefore(StoreUnavailable("the store is down", operation="put_part", key=request.key))


def orders() -> dg.JobDefinition:
    """Every step of it is a task of Dask."""
    FaultyResource.script(_faults)
    return in_lanes(dask_executor, FaultyResource)
