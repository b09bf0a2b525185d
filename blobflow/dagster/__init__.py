"""blobflow for Dagster: artifacts as assets, transfers as steps that say what they did and continue where they stopped.

```python
orders = artifact_pipeline(
    name="orders",
    exporter=DirectoryExporter(path="/var/lib/orders"),
    importer=DirectoryImporter(path="/srv/mirror/orders"),
)
defs = dg.Definitions.merge(
    orders.definitions,
    dg.Definitions(resources={"blobflow": BlobflowResource(store="s3://backups/orders")}),
)
```
"""

from blobflow.backends import DirectoryExporter, DirectoryImporter
from blobflow.dagster.automation import export_schedule
from blobflow.dagster.handles import MirrorHandle, RemoteHandle, SnapshotHandle
from blobflow.dagster.pipeline import ArtifactPipeline, artifact_pipeline
from blobflow.dagster.resource import BlobflowResource, ProfileConfig
from blobflow.dagster.translator import BlobflowAssetProps, BlobflowTranslator

__all__ = [
    "ArtifactPipeline",
    "BlobflowAssetProps",
    "BlobflowResource",
    "BlobflowTranslator",
    "DirectoryExporter",
    "DirectoryImporter",
    "MirrorHandle",
    "ProfileConfig",
    "RemoteHandle",
    "SnapshotHandle",
    "artifact_pipeline",
    "export_schedule",
]
