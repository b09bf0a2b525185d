"""The metadata keys. Numbers keep their labels from run to run, because Dagster plots what has a constant label."""

import heapq
from typing import Any, Final

import dagster as dg
from pydantic import JsonValue

from blobflow.artifact.artifact import Artifact

SIZE: Final = "dagster/size_bytes"
URI: Final = "dagster/uri"

STATUS: Final = "blobflow/status"
"""What the step did: `exported`, `uploaded`, `imported`, or `unchanged`."""
ARTIFACT_DIGEST: Final = "blobflow/artifact_digest"
CONTENT_DIGEST: Final = "blobflow/content_digest"
KEY: Final = "blobflow/key"
REF: Final = "blobflow/ref"
BACKEND: Final = "blobflow/backend"
CREATED_AT: Final = "blobflow/created_at"
CURSOR: Final = "blobflow/cursor"
MEMBERS: Final = "blobflow/members"
LARGEST_MEMBERS: Final = "blobflow/largest_members"
EXCLUDED: Final = "blobflow/excluded"
SYMLINKS_SKIPPED: Final = "blobflow/symlinks_skipped"
SCRATCH: Final = "blobflow/scratch"
MIRROR_PATH: Final = "blobflow/mirror_path"
MIRROR_STATUS: Final = "blobflow/mirror_status"

BYTES_SENT: Final = "blobflow/bytes_sent"
BYTES_RECEIVED: Final = "blobflow/bytes_received"
BYTES_RESUMED: Final = "blobflow/bytes_resumed"
THROUGHPUT: Final = "blobflow/throughput_mb_per_s"
CHECKPOINTS: Final = "blobflow/checkpoints_saved"
VERIFY_MODE: Final = "blobflow/verify_mode"
BYTES_VERIFIED: Final = "blobflow/bytes_verified"

EXPORT_SECONDS: Final = "blobflow/export_seconds"
UPLOAD_SECONDS: Final = "blobflow/upload_seconds"
VERIFY_SECONDS: Final = "blobflow/verify_seconds"
DOWNLOAD_SECONDS: Final = "blobflow/download_seconds"
IMPORT_SECONDS: Final = "blobflow/import_seconds"

ERROR: Final = "blobflow/error"
HINT: Final = "blobflow/hint"
ERROR_FIELD: Final = "blobflow/error/"
"""Before the name of a field of the error."""

_ROWS: Final = 20


def throughput(bytes_moved: int, seconds: float) -> dict[str, float]:
    """Megabytes (10^6) per second; nothing where nothing moved."""
    return {THROUGHPUT: round(bytes_moved / 1e6 / seconds, 3)} if bytes_moved and seconds > 0 else {}


def cursor(value: JsonValue) -> dict[str, Any]:
    """Where in the source's history a snapshot stands; nothing for sources that have no history."""
    if value is None:
        return {}
    return {CURSOR: dg.MetadataValue.json(value) if isinstance(value, dict | list) else value}


def largest_members(artifact: Artifact) -> dict[str, Any]:
    """A table of the largest members by path and size."""
    index = artifact.index
    top = heapq.nlargest(_ROWS, range(len(index)), key=index.sizes.__getitem__)
    records = [dg.TableRecord({"path": index.paths[i], "bytes": index.sizes[i]}) for i in top]
    schema = dg.TableSchema([dg.TableColumn("path"), dg.TableColumn("bytes", "int")])
    return {LARGEST_MEMBERS: dg.MetadataValue.table(records, schema)}
