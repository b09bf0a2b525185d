"""A code location for processes that get killed: the pipeline `orders` between directories and a loopback S3.

`ORDERS_HOME`: the directory of everything; `ORDERS_S3`: the endpoint; `ORDERS_BUCKET`; `ORDERS_RETRIES`: of each step;
`ORDERS_LANES`: of transfers, which run at once; `ORDERS_EXECUTOR`: `in_process`, if not a process for each step;
`ORDERS_FENCE_S`: seconds between two looks at the run. Every step writes its process id to `<ORDERS_HOME>/pid`. `main`
materializes assets, given by their last names, in a run worker of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg

from blobflow.dagster import (
    BlobflowResource,
    DirectoryExporter,
    DirectoryImporter,
    ProfileConfig,
    artifact_pipeline,
)
from blobflow.stores import Store
from tests.kit import sized
from tests.strict_s3 import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

PART = sized(8 << 20, 64 << 10)
PARTS = sized((1 << 30) // PART, 24)
"""Of the pipeline's source: the promised size is 1 GiB, in the parts of the default profile."""
WORKERS = 2
TUNED = {
    # Parts as small as the server of these tests takes them, so that a transfer of many parts is small.
    "blobflow.stores.s3.store.MIN_PART_BYTES": PART,
    # A step that stops need not wait for a server that holds its requests.
    "blobflow.engine.pool._JOIN_S": 0.2,
}


class Marking(BlobflowResource):
    """Tells which process is at work, and remembers the stores that this one has to close."""

    opened: ClassVar[list[Store]] = []

    def get_store(self, **options: Any) -> Store:
        Path(os.environ["ORDERS_HOME"], "pid").write_text(str(os.getpid()))
        self.opened.append(super().get_store(**options))
        return self.opened[-1]


def definitions() -> dg.Definitions:
    """The pipeline, its steps in processes of their own."""
    home = Path(os.environ["ORDERS_HOME"])
    retries = int(os.environ.get("ORDERS_RETRIES", "0"))
    lanes = int(os.environ.get("ORDERS_LANES", "1"))
    pipeline = artifact_pipeline(
        "orders",
        exporter=DirectoryExporter(path=home / "source"),
        importer=DirectoryImporter(path=home / "mirror"),
        retry_policy=dg.RetryPolicy(max_retries=retries, delay=0.5) if retries else None,
        verify_mode="shallow",
        lanes=lanes,
    )
    resource = Marking(
        store=f"s3://{os.environ['ORDERS_BUCKET']}",
        endpoint_url=os.environ["ORDERS_S3"],
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        region=REGION,
        custom_profile=ProfileConfig(chunk_size=PART, checkpoint_interval=4, workers=WORKERS),
        scratch_dir=str(home / "scratch"),
    )
    executor = dg.multiprocess_executor.configured({"max_concurrent": lanes})
    if os.environ.get("ORDERS_EXECUTOR") == "in_process":
        executor = dg.in_process_executor
    return dg.Definitions.merge(
        pipeline.definitions, dg.Definitions(resources={"blobflow": resource}, executor=executor)
    )


def orders() -> dg.JobDefinition:
    """The pipeline's own job."""
    return definitions().resolve_job_def("orders_job")


def run(instance: dg.DagsterInstance, *stages: str) -> dg.JobExecutionResult:
    """A run of some of the assets, all by default."""
    selected = [dg.AssetKey(["orders", stage]) for stage in stages] or None
    job = dg.build_reconstructable_job(__name__, orders.__name__)
    return dg.execute_job(job, instance, asset_selection=selected, raise_on_error=False)


def main() -> None:
    with dg.DagsterInstance.from_config(str(Path(os.environ["ORDERS_HOME"]) / "instance")) as instance:
        result = run(instance, *sys.argv[1:])
    sys.exit(0 if result.success else 1)


if "ORDERS_S3" in os.environ:  # in a process of its own, not in that of the tests
    for name, value in {**TUNED, "blobflow.dagster.fencing.INTERVAL_S": float(os.environ["ORDERS_FENCE_S"])}.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    defs = definitions()
