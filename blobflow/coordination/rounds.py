"""At-most-once export rounds: lease, export, upload, ref, completion; and the local artifact is gone afterwards."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blobflow.artifact.artifact import Artifact
from blobflow.backends.base import Exporter
from blobflow.config import ChunkProfile
from blobflow.coordination.lease import Lease
from blobflow.coordination.lease_store import LeaseStore, ObjectLeaseStore
from blobflow.coordination.refs import RefState, fence_ref, name_artifact, newest_round
from blobflow.errors import BlobflowError
from blobflow.stores.base import Store, check_key
from blobflow.transport import ProgressEvent, UploadResult, upload
from blobflow.transport.catalog import MANIFEST_SUFFIX, check_artifact_key
from blobflow.trees import remove_tree

log = logging.getLogger(__name__)

DEFAULT_TTL_S: Final = 60.0
DEFAULT_SILENCE_S: Final = 3600.0
"""Longer than exporters that tell no progress usually take; shorter than a night."""


@dataclass(frozen=True)
class RoundResult:
    """A round that was won and published."""

    upload: UploadResult
    generation: int
    ref: RefState | None


def check_name(name: str) -> str:
    """`name` itself, if keys of contents (`content_key`) may begin with it: known before there is any content.

    Raises:
        InvalidKey: naming the rule that is broken.
    """
    longest = f"{name}/{'0' * 16}-{'0' * 8}-{'0' * 8}.tar"
    check_key(check_artifact_key(longest) + MANIFEST_SUFFIX)
    return name


def content_key(name: str, artifact: Artifact) -> str:
    """The immutable key of an artifact: the same content always goes to the same key, other content to another.

    Executable and private files are content as well (`Manifest.same_content`), but the content digest does not know
    of either.
    """
    manifest = artifact.manifest
    content, executables = (
        (digest or "").removeprefix("sha256:") for digest in (manifest.content_digest, manifest.executables_digest)
    )
    private = f"-{hashlib.sha256(manifest.private.encode()).hexdigest()[:8]}" if manifest.private is not None else ""
    return f"{name}/{content[:16]}-{executables[:8]}{private}.tar"


def round_number(store: Store, lease: Lease, ref: str) -> int:
    """The number of the round that `lease` is held for, above that of every round that has moved or fenced `ref`.

    It is the lease's generation, unless somebody removed the lease's object and the count began again.
    """
    return max(lease.generation, newest_round(store, ref) + 1)


def run_export_round(
    store: Store,
    name: str,
    exporter: Exporter,
    *,
    scratch_dir: Path | None = None,
    ref: str | None = "latest",
    profile: ChunkProfile | None = None,
    ttl_s: float = DEFAULT_TTL_S,
    max_silence_s: float = DEFAULT_SILENCE_S,
    leases: LeaseStore | str | None = None,
    on_progress: Callable[[ProgressEvent], None] | None = None,
) -> RoundResult | None:
    """Export and publish once, however many processes try: None means that another one is doing it.

    The artifact goes to `<name>/<content digest>.tar`, then the ref `<name>/<ref>` is moved to it. The lease is
    renewed by a heartbeat; winning it keeps every earlier round from moving the ref any more. On every path out of
    here the local artifact is deleted, and on every failure the lease is given up at once.

    Args:
        scratch_dir: Where the artifact is made; the system's temporary directory by default.
        ttl_s: Seconds without a sign of life of the process after which others may take the round over.
        max_silence_s: Seconds without progress of the export or the upload after which the lease is no longer
            renewed; who hangs for good does not hold the round for ever.
        leases: Where the lease is kept, or the SQLAlchemy URL of a database that keeps it; the store by default.

    Raises:
        LeaseLost: this process was silent for too long, and another took over; the ref is the other's.
        TransferBusy: `prune` removes the very artifact at this moment; the next round uploads it again.
        Unsupported: the store has no conditional writes, and no other place for the lease was named.
    """
    with _opened(store, leases) as opened:
        lease = Lease(opened, f"{name}/round", ttl_s=ttl_s)
        if not lease.try_acquire():
            return None
        generation = lease.generation
        scratch: Path | None = None
        try:
            with kept_alive(lease, max_silence_s) as progress:

                def report(event: ProgressEvent) -> None:
                    progress()
                    if on_progress:
                        on_progress(event)

                number = fence_ref(store, f"{name}/{ref}", generation, still_ours=lease.renew) if ref else None
                scratch = Path(tempfile.mkdtemp(prefix=".blobflow-round-", dir=scratch_dir))
                artifact = exporter.export(scratch / "artifact", on_progress=progress).artifact
                lease.renew()
                uploaded = upload(store, content_key(name, artifact), artifact, profile=profile, on_progress=report)
                lease.renew()
                moved = None
                if ref:
                    target = (uploaded.key, uploaded.artifact_digest)
                    moved = name_artifact(store, f"{name}/{ref}", *target, round_number=number)
        except BaseException:
            lease.abandon()
            raise
        finally:
            if scratch is not None:
                with suppress(OSError):
                    remove_tree(scratch)
        try:
            lease.complete(artifact.manifest.cursor)
        except BlobflowError as error:
            # The artifact is published: losing the completion record costs observability, not correctness.
            log.warning("round.completion_failed name=%s error=%s", name, error)
        return RoundResult(upload=uploaded, generation=generation, ref=moved)


@contextmanager
def kept_alive(lease: Lease, max_silence_s: float = DEFAULT_SILENCE_S) -> Generator[Callable[..., None]]:
    """Renew the lease in a heartbeat during the block, for as long as the work in it makes progress.

    Gives what the work calls as it goes on, with any arguments; that raises `LeaseLost` once another one has the lease.
    """
    progressed_at = time.monotonic()

    def progress(*_: object) -> None:
        nonlocal progressed_at
        progressed_at = time.monotonic()
        lease.check()

    with lease.heartbeat(lambda: time.monotonic() - progressed_at < max_silence_s):
        yield progress


@contextmanager
def _opened(store: Store, leases: LeaseStore | str | None) -> Generator[LeaseStore]:
    """Where the lease is kept; closed at the end of the block if it was opened here."""
    if isinstance(leases, str):
        from blobflow.coordination.sql_lease_store import SqlLeaseStore

        opened: LeaseStore = SqlLeaseStore(leases)
    else:
        opened = leases or ObjectLeaseStore(store)
    try:
        yield opened
    finally:
        if opened is not leases:
            opened.close()
