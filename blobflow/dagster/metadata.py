"""The metadata keys. Numbers keep their keys from run to run, because Dagster plots the values of a constant key."""

import heapq
from typing import TYPE_CHECKING, Any, Final, Union

import dagster as dg
from pydantic import JsonValue

from blobflow.artifact.artifact import Artifact
from blobflow.backends.base import ExportResult
from blobflow.transport import Healed
from blobflow.uploads.progress import TransferRecord

if TYPE_CHECKING:
    from blobflow.layers import LayerSyncResult

SIZE: Final = "dagster/size_bytes"
URI: Final = "dagster/uri"
ROW_COUNT: Final = "dagster/row_count"

STATUS: Final = "blobflow/status"
"""Result of the step: `exported`, `uploaded`, `healed`, `imported`, `unchanged`, or `skipped`."""
ARTIFACT_DIGEST: Final = "blobflow/artifact_digest"
CONTENT_DIGEST: Final = "blobflow/content_digest"
KEY: Final = "blobflow/key"
ROUND: Final = "blobflow/round"
"""Number of the export round that made a snapshot."""
DAMAGE: Final = "blobflow/damage"
"""Damage of an artifact that was healed."""
REASON: Final = "blobflow/reason"
"""Reason for which nothing was done."""
REF: Final = "blobflow/ref"
GENERATION: Final = "blobflow/generation"
"""Generation of the ref; it counts how often the ref was moved."""
MANIFEST_E_TAG: Final = "blobflow/manifest_e_tag"
"""ETag of the sibling manifest; while a listing shows it, the artifact is the same."""
ANNOUNCED: Final = "blobflow/announced"
"""`verified`: a ref names or has named the artifact. `published`: it is complete, but may not be verified yet."""
BACKEND: Final = "blobflow/backend"
CREATED_AT: Final = "blobflow/created_at"
CURSOR: Final = "blobflow/cursor"
MEMBERS: Final = "blobflow/members"
LARGEST_MEMBERS: Final = "blobflow/largest_members"
PARTITIONS: Final = "blobflow/partitions"
EXCLUDED: Final = "blobflow/excluded"
EXCLUDE_UNMATCHED: Final = "blobflow/exclude_unmatched"
"""Exclude patterns that matched nothing."""
SYMLINKS_SKIPPED: Final = "blobflow/symlinks_skipped"
LEFT_OUT: Final = "blobflow/left_out"
"""Paths that are not part of the source's content, such as `_delta_log/` of a Parquet dataset."""
SCRATCH: Final = "blobflow/scratch"
MIRROR_PATH: Final = "blobflow/mirror_path"
MIRROR_STATUS: Final = "blobflow/mirror_status"
SNAPSHOT: Final = "blobflow/snapshot"
"""Source, database, position and digest of the snapshot that is arriving at a receiver."""

LAYER_DIGEST: Final = "blobflow/layer_digest"
TAR_SIZE: Final = "blobflow/tar_bytes"
CODEC: Final = "blobflow/codec"
FILES_READ: Final = "blobflow/files_read"
"""Number of files read to detect changes; the stats of the others were enough."""
SYNC_SECONDS: Final = "blobflow/sync_seconds"

BYTES_SENT: Final = "blobflow/bytes_sent"
BYTES_RECEIVED: Final = "blobflow/bytes_received"
BYTES_DONE: Final = "blobflow/bytes_done"
BYTES_RESUMED: Final = "blobflow/resumed_from_bytes"
"""Bytes that earlier attempts, in any run, had already moved."""
PERCENT: Final = "blobflow/percent"
PARTS_DONE: Final = "blobflow/parts_done"
PARTS: Final = "blobflow/parts"
LANES: Final = "blobflow/lanes"
RETRIES: Final = "blobflow/retries"
"""Number of earlier attempts at the same transfer, in any run."""
CONTINUES: Final = "blobflow/continues"
"""Run of the previous attempt."""
CHECKPOINT: Final = "blobflow/checkpoint"
THROUGHPUT: Final = "blobflow/throughput_mb_per_s"
CHECKPOINTS: Final = "blobflow/checkpoints_saved"
VERIFY_MODE: Final = "blobflow/verify_mode"
PROOF: Final = "blobflow/proof"
"""Strength of a verification: `attested`, `unproven`, `sampled` or `proven`."""
BYTES_VERIFIED: Final = "blobflow/bytes_verified"

EXPORT_SECONDS: Final = "blobflow/export_seconds"
UPLOAD_SECONDS: Final = "blobflow/upload_seconds"
VERIFY_SECONDS: Final = "blobflow/verify_seconds"
DOWNLOAD_SECONDS: Final = "blobflow/download_seconds"
IMPORT_SECONDS: Final = "blobflow/import_seconds"

GC_DRY_RUN: Final = "blobflow/gc_dry_run"
GC_UPLOADS: Final = "blobflow/gc_uploads"
GC_UPLOADS_KEPT: Final = "blobflow/gc_uploads_kept"
GC_INTENTS: Final = "blobflow/gc_intents"
GC_TRIALS: Final = "blobflow/gc_trials"
GC_PAYLOADS: Final = "blobflow/gc_payloads"
GC_RUNS: Final = "blobflow/gc_runs"
"""Number of runs whose values, passed between steps, were removed."""
GC_FOUND: Final = "blobflow/gc_found"

PRUNE_DRY_RUN: Final = "blobflow/prune_dry_run"
PRUNE_REMOVED: Final = "blobflow/prune_removed"
PRUNE_KEPT: Final = "blobflow/prune_kept"
PRUNE_NAMED: Final = "blobflow/prune_named"
"""Number of artifacts kept only because a ref names them."""
PRUNE_FOUND: Final = "blobflow/prune_found"

BATCH_RESULTS: Final = "blobflow/batch_results"
"""Path of the table of results."""
BATCH_EXECUTED: Final = "blobflow/batch_executed"
"""Number of operations that this run executed; operations done by earlier runs count as resumed."""
BATCH_RESUMED: Final = "blobflow/batch_resumed"
BATCH_DONE: Final = "blobflow/batch_done"
BATCH_ABSENT: Final = "blobflow/batch_absent"
BATCH_FAILED: Final = "blobflow/batch_failed"
BATCH_FAILURES: Final = "blobflow/batch_failures"
BATCH_KIND: Final = "blobflow/batch_operations/"
"""Prefix of the key; the kind of an operation follows."""
BATCH_SECONDS: Final = "blobflow/batch_seconds"

FINDINGS: Final = "blobflow/probe_findings"
SOFTWARE: Final = "blobflow/server_software"
PROBED_AT: Final = "blobflow/probed_at"

ERROR: Final = "blobflow/error"
HINT: Final = "blobflow/hint"
ERROR_FIELD: Final = "blobflow/error/"
"""Prefix of the key; the name of a field of the error follows."""

_ROWS: Final = 20


def throughput(bytes_moved: int, seconds: float) -> dict[str, float]:
    """Megabytes (10^6 bytes) per second; empty if nothing moved."""
    return {THROUGHPUT: round(bytes_moved / 1e6 / seconds, 3)} if bytes_moved and seconds > 0 else {}


def cursor(value: JsonValue) -> dict[str, Any]:
    """The snapshot's position in the source's history; empty for sources without a history."""
    if value is None:
        return {}
    return {CURSOR: dg.MetadataValue.json(value) if isinstance(value, dict | list) else value}


def left_out(result: Union[ExportResult, "LayerSyncResult"], log: dg.DagsterLogManager) -> dict[str, Any]:
    """Counts and paths of what an export left out; a pattern that matched nothing is also named in the log."""
    facts: dict[str, Any] = {EXCLUDED: result.excluded, SYMLINKS_SKIPPED: result.symlinks_skipped}
    for pattern in result.unmatched:
        log.info("exclude.unmatched pattern=%r", pattern)
    if result.unmatched:
        facts[EXCLUDE_UNMATCHED] = dg.MetadataValue.json(list(result.unmatched))
    if paths := getattr(result, "left_out", ()):
        facts[LEFT_OUT] = dg.MetadataValue.json(list(paths))
    return facts


def largest_members(artifact: Artifact) -> dict[str, Any]:
    """A table of the largest members by path and size."""
    index = artifact.index
    top = heapq.nlargest(_ROWS, range(len(index)), key=index.sizes.__getitem__)
    records = [dg.TableRecord({"path": index.paths[i], "bytes": index.sizes[i]}) for i in top]
    schema = dg.TableSchema([dg.TableColumn("path"), dg.TableColumn("bytes", "int")])
    return {LARGEST_MEMBERS: dg.MetadataValue.table(records, schema)}


def healing(healed: Healed | None) -> dict[str, Any]:
    """Damage of an artifact and the bytes that its repair sent; empty if the artifact was intact."""
    if healed is None:
        return {}
    return {
        STATUS: "healed",
        DAMAGE: f"{type(healed.found).__name__}: {healed.found.message}",
        BYTES_SENT: healed.upload.bytes_sent,
        BYTES_RESUMED: healed.upload.bytes_resumed,
    }


def parts_table(record: TransferRecord) -> dict[str, Any]:
    """A table of the parts and bytes that were found done, and of those that were moved."""
    moved = record.parts_done - record.parts_resumed
    rows = [
        ("found done", record.parts_resumed, record.bytes_resumed),
        ("moved", moved, record.bytes_done - record.bytes_resumed),
    ]
    records = [dg.TableRecord({"what": what, "parts": parts, "bytes": size}) for what, parts, size in rows]
    schema = dg.TableSchema([dg.TableColumn("what"), dg.TableColumn("parts", "int"), dg.TableColumn("bytes", "int")])
    return {PARTS: dg.MetadataValue.table(records, schema)}
