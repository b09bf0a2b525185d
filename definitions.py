"""The demo's code location: wiring only.

`BLOBFLOW_SOURCE` is the directory that travels, by default Python's own standard library: thousands of real files
that every machine has. `BLOBFLOW_STORE` is where to, by default `.blobflow/store`, and `BLOBFLOW_MIRROR` is where it
is brought to life, by default `.blobflow/mirror`.
"""

import os
import sysconfig
from datetime import timedelta
from pathlib import Path

import dagster as dg

from blobflow.dagster import BlobflowResource, DirectoryExporter, DirectoryImporter, artifact_pipeline

HOME = Path(__file__).resolve().parent / ".blobflow"


def source() -> DirectoryExporter:
    """What is exported; symbolic links are skipped and counted."""
    if own := os.environ.get("BLOBFLOW_SOURCE"):
        return DirectoryExporter(path=Path(own).absolute(), symlinks="skip")
    return DirectoryExporter(
        path=Path(sysconfig.get_path("stdlib")),
        exclude=("__pycache__", "site-packages", "dist-packages"),
        symlinks="skip",
    )


demo = artifact_pipeline(
    name="demo",
    exporter=source(),
    importer=DirectoryImporter(path=Path(os.environ.get("BLOBFLOW_MIRROR") or HOME / "mirror")),
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=26), warn_window=timedelta(hours=25)),
)

blobflow = BlobflowResource(store=os.environ.get("BLOBFLOW_STORE") or str(HOME / "store"))

defs = dg.Definitions.merge(
    demo.definitions,
    dg.Definitions(
        resources={"blobflow": blobflow},
        executor=dg.in_process_executor,  # five short steps: a process for each would cost more than the work
    ),
)
