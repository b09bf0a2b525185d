"""blobflow for Dagster: artifacts are assets; transfers are steps that report progress and continue where they stopped.

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
from blobflow.dagster.batch import batch_asset, batch_op
from blobflow.dagster.checkpoints import transfer_journal
from blobflow.dagster.component import ArtifactMirrorComponent, ArtifactPipelineComponent
from blobflow.dagster.handles import MirrorHandle, RemoteHandle, SnapshotHandle
from blobflow.dagster.handoff import HandoffIOManager
from blobflow.dagster.io_manager import ArtifactIOManager, ArtifactRef
from blobflow.dagster.jobs import gc_job, probe_check, probe_job, retention_job
from blobflow.dagster.layers import layer_assets, layer_restore_job
from blobflow.dagster.mirror import ArtifactMirror, artifact_mirror, mirror_condition
from blobflow.dagster.pipeline import ArtifactPipeline, artifact_pipeline, build_pipeline, export_schedule
from blobflow.dagster.receiving import ReceiverResource, received_mirror
from blobflow.dagster.resource import BlobflowResource, ProfileConfig
from blobflow.dagster.sensors import artifact_partitions, manifest_sensor, ref_sensor
from blobflow.dagster.spec import BlobflowAssetProps, BlobflowTranslator, PipelineSpec

__all__ = [
    "ArtifactIOManager",
    "ArtifactMirror",
    "ArtifactMirrorComponent",
    "ArtifactPipeline",
    "ArtifactPipelineComponent",
    "ArtifactRef",
    "BlobflowAssetProps",
    "BlobflowResource",
    "BlobflowTranslator",
    "DirectoryExporter",
    "DirectoryImporter",
    "HandoffIOManager",
    "MirrorHandle",
    "PipelineSpec",
    "ProfileConfig",
    "ReceiverResource",
    "RemoteHandle",
    "SnapshotHandle",
    "artifact_mirror",
    "artifact_partitions",
    "artifact_pipeline",
    "batch_asset",
    "batch_op",
    "build_pipeline",
    "export_schedule",
    "gc_job",
    "layer_assets",
    "layer_restore_job",
    "manifest_sensor",
    "mirror_condition",
    "probe_check",
    "probe_job",
    "received_mirror",
    "ref_sensor",
    "retention_job",
    "transfer_journal",
]
