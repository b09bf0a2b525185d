"""Layers: directories in a bucket, compressed, named by their content, sent when they changed (docs/layers.md).

Names and format, with the codec; cutting compressed frames into parts; sending, scanning, restoring; the state of
containers; and `LayerSync`, which is all that somebody outside needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blobflow.layers.format import LayerMeta
    from blobflow.layers.state import PendingUpload, SyncState
    from blobflow.layers.sync import LayerRestoreResult, LayerSync, LayerSyncResult

_HOMES = {
    "LayerMeta": "format",
    "LayerRestoreResult": "sync",
    "LayerSync": "sync",
    "LayerSyncResult": "sync",
    "PendingUpload": "state",
    "SyncState": "state",
}

__all__ = ["LayerMeta", "LayerRestoreResult", "LayerSync", "LayerSyncResult", "PendingUpload", "SyncState"]


def __getattr__(name: str) -> Any:
    # A collection of garbage needs the names of layers, and not what compresses them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
