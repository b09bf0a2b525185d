"""Layers: directories in a bucket, compressed, named by their content, sent when they changed (docs/layers.md).

The format and the codec; cutting compressed frames into parts; sending, scanning, restoring; the state of containers;
and `LayerSync`, which is all that somebody outside needs.
"""

from __future__ import annotations

from blobflow.layers.format import LAYER_SUFFIX, META_SUFFIX, LayerMeta
from blobflow.layers.state import PendingUpload, SyncState
from blobflow.layers.sync import LayerRestoreResult, LayerSync, LayerSyncResult

__all__ = [
    "LAYER_SUFFIX",
    "META_SUFFIX",
    "LayerMeta",
    "LayerRestoreResult",
    "LayerSync",
    "LayerSyncResult",
    "PendingUpload",
    "SyncState",
]
