"""At-most-once export rounds: lease, export, upload, ref, completion; and the local artifact is gone afterwards."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blobflow.artifact.artifact import Artifact
from blobflow.backends.base import Exporter
from blobflow.config import ChunkProfile
from blobflow.errors import BlobflowError
from blobflow.lease import Lease, RefState, move_ref
from blobflow.stores.base import Store
from blobflow.transport import ProgressEvent, UploadResult, upload

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """A round that was won and published."""

    upload: UploadResult
    generation: int
    ref: RefState | None


def content_key(name: str, artifact: Artifact) -> str:
    """The immutable key of an artifact: the same content always goes to the same key, other content to another.

    Executable bits are content as well (`Manifest.same_content`), but the content digest does not know them.
    """
    manifest = artifact.manifest
    content, executables = (
        (digest or "").removeprefix("sha256:") for digest in (manifest.content_digest, manifest.executables_digest)
    )
    return f"{name}/{content[:16]}-{executables[:8]}.tar"


def run_export_round(
    store: Store,
    name: str,
    exporter: Exporter,
    *,
    scratch_dir: Path | None = None,
    ref: str | None = "latest",
    profile: ChunkProfile | None = None,
    ttl_s: float = 60.0,
    on_progress: Callable[[ProgressEvent], None] | None = None,
) -> RoundResult | None:
    """Export and publish once, however many processes try: None means that another one is doing it.

    The artifact goes to `<name>/<content digest>.tar`, then the ref `<name>/<ref>` is moved to it. On every path
    out of here the local artifact is deleted, and on every failure the lease is given up at once.

    Args:
        scratch_dir: Where the artifact is made; the system's temporary directory by default.
        ttl_s: Seconds without a sign of life after which others may take the round over.

    Raises:
        LeaseLost: this process was silent for longer than `ttl_s`, and another took over; nothing was published.
    """
    lease = Lease(store, f"{name}/round", ttl_s=ttl_s)
    if not lease.try_acquire():
        return None

    def renew() -> None:
        if lease.renewal_due():
            lease.renew()

    def alive(_done: int, _total: int) -> None:
        renew()

    def progress(event: ProgressEvent) -> None:
        renew()
        if on_progress:
            on_progress(event)

    scratch: Path | None = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".blobflow-round-", dir=scratch_dir))
        artifact = exporter.export(scratch / "artifact", on_progress=alive).artifact
        lease.renew()
        uploaded = upload(store, content_key(name, artifact), artifact, profile=profile, on_progress=progress)
        lease.renew()
        moved = move_ref(store, f"{name}/{ref}", uploaded.key, uploaded.artifact_digest) if ref else None
    except BaseException:
        lease.abandon()
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    generation = lease.generation
    try:
        lease.complete(artifact.manifest.cursor)
    except BlobflowError as error:
        # The artifact is published: losing the completion record costs observability, not correctness.
        log.warning("round.completion_failed name=%s error=%s", name, error)
    return RoundResult(upload=uploaded, generation=generation, ref=moved)
