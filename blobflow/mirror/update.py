"""Bring a mirror up to date: download, import and record, unless it is current.

| step | skipped if |
|---|---|
| download into the importer's staging (`stage_artifact`) | the mirror shows the artifact, or it has landed already |
| refuse to replace a newer artifact by an older one | no ref is given |
| import from the staging by a rename, and record it in the mirror's history | the mirror shows the artifact |

Every step may be repeated after a crash, by this process or another one that sees the same directory.
"""

from __future__ import annotations

from dataclasses import dataclass

from blobflow.artifact.artifact import Artifact
from blobflow.backends import Importer, ImportResult
from blobflow.backends.base import OnBytes
from blobflow.config import ChunkProfile
from blobflow.coordination.refs import check_round, read_ref
from blobflow.stores.base import Reader
from blobflow.transport import DownloadResult, download
from blobflow.uploads.progress import OnProgress, OnRecord


@dataclass(frozen=True)
class MirrorUpdate:
    """What an update downloaded and imported; each is `unchanged` if there was nothing to do."""

    download: DownloadResult
    imported: ImportResult


def shown(importer: Importer, digest: str) -> Artifact | None:
    """The artifact that the mirror shows, if it is the artifact `digest`."""
    current = importer.current()
    return current if current is not None and current.digest == digest else None


def stage_artifact(
    store: Reader,
    key: str,
    digest: str,
    importer: Importer,
    *,
    profile: ChunkProfile | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> DownloadResult:
    """Download the artifact into the importer's staging, so that the import is a rename.

    No request is made if the mirror shows the artifact or the staging has it already. The result is then `unchanged`,
    and its path says where the artifact is. Bytes that an earlier process or lanes have landed are not fetched again.

    Args:
        digest: The artifact (`sha256:...`) that `key` must hold.

    Raises:
        DigestMismatch: `key` holds another artifact.
        (and everything that `download` raises)
    """
    at_hand = shown(importer, digest) or _landed(importer, digest)
    if at_hand is None:
        return download(
            store,
            key,
            importer.staging(digest),
            profile=profile,
            expected_digest=digest,
            on_progress=on_progress,
            on_checkpoint=on_checkpoint,
        )
    return DownloadResult(
        status="unchanged",
        key=key,
        path=at_hand.path,
        artifact_digest=digest,
        manifest=at_hand.manifest,
        bytes_total=at_hand.payload_size,
        seconds=0.0,
    )


def update_mirror(
    store: Reader,
    key: str,
    digest: str,
    importer: Importer,
    *,
    ref: str | None = None,
    round_number: int | None = None,
    profile: ChunkProfile | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
    on_import: OnBytes | None = None,
) -> MirrorUpdate:
    """Have the mirror show the artifact `digest`, which is published under `key`.

    Args:
        ref: The full name of the ref that the mirror follows, e.g. `orders/latest`. A mirror that shows what the ref
            names does not go back to the artifact of an earlier round.
        round_number: The round that made the artifact; None if it is not known: then nothing is refused.
        on_progress: See `download`.
        on_checkpoint: See `download`.
        on_import: Called with the bytes imported and the bytes in total.

    Raises:
        LeaseLost: the mirror shows the artifact of a later round already.
        TransferBusy: another process imports into this mirror, or downloads for it.
        (and everything that `download` and the importer raise)
    """
    downloaded = stage_artifact(
        store, key, digest, importer, profile=profile, on_progress=on_progress, on_checkpoint=on_checkpoint
    )
    if ref is not None:
        _check_newer(store, ref, digest, round_number, importer)
    artifact = Artifact.open(downloaded.path)
    imported = importer.import_artifact(artifact, consume=True, on_progress=on_import, key=key)
    return MirrorUpdate(downloaded, imported)


def _landed(importer: Importer, digest: str) -> Artifact | None:
    """The complete artifact in the importer's staging; the import verifies its members."""
    staging = importer.staging(digest)
    if not Artifact.is_artifact(staging):
        return None
    landed = Artifact.open(staging)
    return landed if landed.digest == digest else None


def _check_newer(store: Reader, ref: str, digest: str, round_number: int | None, importer: Importer) -> None:
    """Return unless the mirror shows what the ref names and the artifact is from an earlier round.

    Raises:
        LeaseLost: it would go back.
    """
    named, current = read_ref(store, ref), importer.current()
    if named and current and current.digest == named.manifest_sha256 != digest:
        check_round(ref, named, round_number)
