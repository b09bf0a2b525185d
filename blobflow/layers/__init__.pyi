from blobflow.layers.format import LayerMeta as LayerMeta
from blobflow.layers.state import (
    PendingUpload as PendingUpload,
    SyncState as SyncState,
)
from blobflow.layers.sync import (
    LayerRestoreResult as LayerRestoreResult,
    LayerSync as LayerSync,
    LayerSyncResult as LayerSyncResult,
)
