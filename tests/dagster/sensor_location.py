"""A code location for a real daemon: the manifest sensor of the store in `SENSOR_STORE`, switched on.

`SENSOR_RUNS=1`: with a run for every artifact.
"""

from __future__ import annotations

import os

import dagster as dg

from blobflow.dagster import BlobflowResource, artifact_partitions, manifest_sensor


@dg.asset(key=["orders", "mirror"], deps=[["orders", "remote"]], partitions_def=artifact_partitions("orders"))
def mirror() -> None:
    """Stands for a mirror."""


def definitions() -> dg.Definitions:
    """What the daemon loads."""
    store = os.environ.get("SENSOR_STORE")
    if store is None:  # a tool looks at the module, not the daemon
        return dg.Definitions()
    sensor = manifest_sensor(
        "orders",
        announce="published",
        target=mirror if os.environ.get("SENSOR_RUNS") else None,
        minimum_interval_seconds=1,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    return dg.Definitions(assets=[mirror], sensors=[sensor], resources={"blobflow": BlobflowResource(store=store)})


defs = definitions()
