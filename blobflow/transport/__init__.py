"""Moving artifacts: upload, copy, read the manifest, verify, download. The wire format is in docs/format.md.

The order matters. Upload: intent, parts, complete, sibling manifest last, intent removed. Download: manifest, head
(embedded manifest and index), parts, proof, one rename. So a reader sees a whole artifact or none, and after a crash
the bucket shows what is left to do.
"""

from __future__ import annotations

from blobflow.transport.catalog import (
    MANIFEST_SUFFIX,
    ArtifactEntry,
    check_artifact_key,
    list_artifacts,
    read_manifest,
    read_manifest_bytes,
    read_manifest_file,
)
from blobflow.transport.copying import CopyResult, copy_artifact
from blobflow.transport.healing import Healed, verify_or_heal
from blobflow.transport.lanes import (
    DownloadTicket,
    LaneResult,
    UploadTicket,
    begin_download,
    begin_upload,
    commit_upload,
    fetch_lane,
    send_parts,
)
from blobflow.transport.reading import PROOF_MEANS, DownloadResult, Proof, VerifyMode, VerifyResult, download, verify
from blobflow.transport.uploading import UploadResult, upload
from blobflow.uploads.progress import ProgressEvent

__all__ = [
    "MANIFEST_SUFFIX",
    "PROOF_MEANS",
    "ArtifactEntry",
    "CopyResult",
    "DownloadResult",
    "DownloadTicket",
    "Healed",
    "LaneResult",
    "ProgressEvent",
    "Proof",
    "UploadResult",
    "UploadTicket",
    "VerifyMode",
    "VerifyResult",
    "begin_download",
    "begin_upload",
    "check_artifact_key",
    "commit_upload",
    "copy_artifact",
    "download",
    "fetch_lane",
    "list_artifacts",
    "read_manifest",
    "read_manifest_bytes",
    "read_manifest_file",
    "send_parts",
    "upload",
    "verify",
    "verify_or_heal",
]
