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
    from blobflow.coordination.lease import Lease
    from blobflow.coordination.lease_store import LeaseStore, ObjectLeaseStore
    from blobflow.coordination.refs import RefState, move_ref, read_ref
    from blobflow.coordination.rounds import RoundResult, run_export_round
    from blobflow.coordination.sql_lease_store import SqlLeaseStore
    from blobflow.errors import BlobflowError
    from blobflow.layers import LayerRestoreResult, LayerSync, LayerSyncResult
    from blobflow.mirror import MirrorReceiver, Snapshot, SnapshotEnvelope, SnapshotId
    from blobflow.mirror.status import MirrorStatus, mirror_history, mirror_status
    from blobflow.stores import Store, open_store
    from blobflow.streams.checkpoint import TransferCheckpoint
    from blobflow.streams.ends import FileTarget, ObjectSource, ObjectTarget
    from blobflow.streams.http_source import HttpSource
    from blobflow.streams.transfer import TransferResult, transfer
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
    from blobflow.uploads.progress import TransferRecord

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
    "blobflow.streams.checkpoint": ("TransferCheckpoint",),
    "blobflow.streams.ends": ("FileTarget", "ObjectSource", "ObjectTarget"),
    "blobflow.streams.http_source": ("HttpSource",),
    "blobflow.streams.transfer": ("TransferResult", "transfer"),
    "blobflow.uploads.progress": ("TransferRecord",),
    "blobflow.errors": ("BlobflowError",),
    "blobflow.mirror.status": ("MirrorStatus", "mirror_history", "mirror_status"),
    "blobflow.layers": ("LayerRestoreResult", "LayerSync", "LayerSyncResult"),
    "blobflow.coordination.lease": ("Lease",),
    "blobflow.coordination.lease_store": ("LeaseStore", "ObjectLeaseStore"),
    "blobflow.coordination.refs": ("RefState", "move_ref", "read_ref"),
    "blobflow.coordination.sql_lease_store": ("SqlLeaseStore",),
    "blobflow.mirror": ("MirrorReceiver", "Snapshot", "SnapshotEnvelope", "SnapshotId"),
    "blobflow.coordination.rounds": ("RoundResult", "run_export_round"),
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
    "LeaseStore",
    "Manifest",
    "MirrorReceiver",
    "MirrorStatus",
    "ObjectLeaseStore",
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
    "SqlLeaseStore",
    "SqliteExporter",
    "SqliteImporter",
    "Store",
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
