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
        DirectoryExporter,
        DirectoryImporter,
        Exporter,
        ExportResult,
        Importer,
        ImportResult,
        export_artifact,
        import_artifact,
    )
    from blobflow.config import ChunkProfile
    from blobflow.engine.checkpoint import TransferCheckpoint, TransferRecord
    from blobflow.engine.transfer import TransferResult, transfer
    from blobflow.errors import BlobflowError
    from blobflow.lease import Lease, RefState, move_ref, read_ref
    from blobflow.rounds import RoundResult, run_export_round
    from blobflow.stores import Store, open_store
    from blobflow.transport import (
        ArtifactEntry,
        DownloadResult,
        ProgressEvent,
        UploadResult,
        VerifyResult,
        download,
        list_artifacts,
        read_manifest,
        upload,
        verify,
    )

_HOMES = {
    "blobflow.artifact.artifact": ("Artifact",),
    "blobflow.artifact.manifest": ("Manifest",),
    "blobflow.backends": (
        "DirectoryExporter",
        "DirectoryImporter",
        "ExportResult",
        "Exporter",
        "ImportResult",
        "Importer",
        "export_artifact",
        "import_artifact",
    ),
    "blobflow.config": ("ChunkProfile",),
    "blobflow.engine.checkpoint": ("TransferCheckpoint", "TransferRecord"),
    "blobflow.engine.transfer": ("TransferResult", "transfer"),
    "blobflow.errors": ("BlobflowError",),
    "blobflow.lease": ("Lease", "RefState", "move_ref", "read_ref"),
    "blobflow.rounds": ("RoundResult", "run_export_round"),
    "blobflow.stores": ("Store", "open_store"),
    "blobflow.transport": (
        "ArtifactEntry",
        "DownloadResult",
        "ProgressEvent",
        "UploadResult",
        "VerifyResult",
        "download",
        "list_artifacts",
        "read_manifest",
        "upload",
        "verify",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Artifact",
    "ArtifactEntry",
    "BlobflowError",
    "ChunkProfile",
    "DirectoryExporter",
    "DirectoryImporter",
    "DownloadResult",
    "ExportResult",
    "Exporter",
    "ImportResult",
    "Importer",
    "Lease",
    "Manifest",
    "ProgressEvent",
    "RefState",
    "RoundResult",
    "Store",
    "TransferCheckpoint",
    "TransferRecord",
    "TransferResult",
    "UploadResult",
    "VerifyResult",
    "__version__",
    "download",
    "export_artifact",
    "import_artifact",
    "list_artifacts",
    "move_ref",
    "open_store",
    "read_manifest",
    "read_ref",
    "run_export_round",
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
