"""blobflow moves large artifacts between directories, stores and machines, whole or not at all.

The public names of the core; the Dagster integration is in `blobflow.dagster`. Names are loaded when they are first
used, so that `import blobflow` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from blobflow.version import __version__

if TYPE_CHECKING:
    from blobflow.artifact.artifact import Artifact
    from blobflow.artifact.manifest import Manifest
    from blobflow.backends import (
        AppendLogExporter,
        AppendLogImporter,
        DirectoryExporter,
        DirectoryImporter,
        Exporter,
        ExportResult,
        Importer,
        ImportResult,
        ParquetExporter,
        ParquetImporter,
        SqliteExporter,
        SqliteImporter,
        export_artifact,
        import_artifact,
    )
    from blobflow.backends.append_log import AppendLog
    from blobflow.batch import BatchExecutor, BatchResult, Delete, Deleted, Get, Got, Insert, Inserted
    from blobflow.config import ChunkProfile
    from blobflow.engine.checkpoint import TransferCheckpoint, TransferRecord
    from blobflow.engine.ends import FileTarget, ObjectSource, ObjectTarget
    from blobflow.engine.http_source import HttpSource
    from blobflow.engine.transfer import TransferResult, transfer
    from blobflow.errors import BlobflowError
    from blobflow.follow import MirrorStatus, mirror_history, mirror_status
    from blobflow.layers import LayerRestoreResult, LayerSync, LayerSyncResult
    from blobflow.lease import Lease, Leases, RefState, StoreLeases, move_ref, read_ref
    from blobflow.lease_sql import SqlLeases
    from blobflow.mirror import MirrorReceiver, Snapshot, SnapshotEnvelope, SnapshotId
    from blobflow.rounds import RoundResult, run_export_round
    from blobflow.stores import Store, open_store
    from blobflow.transport import (
        ArtifactEntry,
        CopyResult,
        DownloadResult,
        DownloadTicket,
        LaneResult,
        ProgressEvent,
        UploadResult,
        UploadTicket,
        VerifyResult,
        begin_download,
        begin_upload,
        commit_upload,
        copy_artifact,
        download,
        fetch_lane,
        list_artifacts,
        read_manifest,
        send_parts,
        upload,
        verify,
    )

_HOMES = {
    "blobflow.artifact.artifact": ("Artifact",),
    "blobflow.artifact.manifest": ("Manifest",),
    "blobflow.backends": (
        "AppendLogExporter",
        "AppendLogImporter",
        "DirectoryExporter",
        "DirectoryImporter",
        "ExportResult",
        "Exporter",
        "ImportResult",
        "Importer",
        "ParquetExporter",
        "ParquetImporter",
        "SqliteExporter",
        "SqliteImporter",
        "export_artifact",
        "import_artifact",
    ),
    "blobflow.backends.append_log": ("AppendLog",),
    "blobflow.batch": ("BatchExecutor", "BatchResult", "Delete", "Deleted", "Get", "Got", "Insert", "Inserted"),
    "blobflow.config": ("ChunkProfile",),
    "blobflow.engine.checkpoint": ("TransferCheckpoint", "TransferRecord"),
    "blobflow.engine.ends": ("FileTarget", "ObjectSource", "ObjectTarget"),
    "blobflow.engine.http_source": ("HttpSource",),
    "blobflow.engine.transfer": ("TransferResult", "transfer"),
    "blobflow.errors": ("BlobflowError",),
    "blobflow.follow": ("MirrorStatus", "mirror_history", "mirror_status"),
    "blobflow.layers": ("LayerRestoreResult", "LayerSync", "LayerSyncResult"),
    "blobflow.lease": ("Lease", "Leases", "RefState", "StoreLeases", "move_ref", "read_ref"),
    "blobflow.lease_sql": ("SqlLeases",),
    "blobflow.mirror": ("MirrorReceiver", "Snapshot", "SnapshotEnvelope", "SnapshotId"),
    "blobflow.rounds": ("RoundResult", "run_export_round"),
    "blobflow.stores": ("Store", "open_store"),
    "blobflow.transport": (
        "ArtifactEntry",
        "CopyResult",
        "DownloadResult",
        "DownloadTicket",
        "LaneResult",
        "ProgressEvent",
        "UploadResult",
        "UploadTicket",
        "VerifyResult",
        "begin_download",
        "begin_upload",
        "commit_upload",
        "copy_artifact",
        "download",
        "fetch_lane",
        "list_artifacts",
        "read_manifest",
        "send_parts",
        "upload",
        "verify",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AppendLog",
    "AppendLogExporter",
    "AppendLogImporter",
    "Artifact",
    "ArtifactEntry",
    "BatchExecutor",
    "BatchResult",
    "BlobflowError",
    "ChunkProfile",
    "CopyResult",
    "Delete",
    "Deleted",
    "DirectoryExporter",
    "DirectoryImporter",
    "DownloadResult",
    "DownloadTicket",
    "ExportResult",
    "Exporter",
    "FileTarget",
    "Get",
    "Got",
    "HttpSource",
    "ImportResult",
    "Importer",
    "Insert",
    "Inserted",
    "LaneResult",
    "LayerRestoreResult",
    "LayerSync",
    "LayerSyncResult",
    "Lease",
    "Leases",
    "Manifest",
    "MirrorReceiver",
    "MirrorStatus",
    "ObjectSource",
    "ObjectTarget",
    "ParquetExporter",
    "ParquetImporter",
    "ProgressEvent",
    "RefState",
    "RoundResult",
    "Snapshot",
    "SnapshotEnvelope",
    "SnapshotId",
    "SqlLeases",
    "SqliteExporter",
    "SqliteImporter",
    "Store",
    "StoreLeases",
    "TransferCheckpoint",
    "TransferRecord",
    "TransferResult",
    "UploadResult",
    "UploadTicket",
    "VerifyResult",
    "__version__",
    "begin_download",
    "begin_upload",
    "commit_upload",
    "copy_artifact",
    "download",
    "export_artifact",
    "fetch_lane",
    "import_artifact",
    "list_artifacts",
    "mirror_history",
    "mirror_status",
    "move_ref",
    "open_store",
    "read_manifest",
    "read_ref",
    "run_export_round",
    "send_parts",
    "transfer",
    "upload",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
