"""Healing: a process that has the content of a damaged artifact uploads it again.

| step | a reader sees |
|---|---|
| `verify` fails on a payload with this entity tag | the damaged artifact |
| evidence is written to `<key>.damaged.json` | the damaged artifact |
| the payload is sent again, as parts of a new upload | the damaged artifact |
| the sibling manifest is removed, while the upload's intent blocks all other uploads | `ReplacementInProgress` |
| the payload is replaced in one step, the manifest is published | the whole artifact |

A process trusts only its own failed verification; neither the evidence nor anything else in the store makes it heal. A
payload that was replaced meanwhile is left alone, and so is an artifact of other content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.config import ChunkProfile
from blobflow.errors import ArtifactInvalid, ArtifactNotFound, IntegrityError, ObjectChanged, ObjectNotFound
from blobflow.stores.base import Store
from blobflow.transport.catalog import DAMAGED_SUFFIX, read_manifest_file
from blobflow.transport.reading import VerifyMode, VerifyResult, verify
from blobflow.transport.uploading import UploadRequest, UploadResult, run
from blobflow.uploads.progress import OnProgress, OnRecord

log = logging.getLogger(__name__)

_QUOTED: Final = 200
"""Maximum characters of an error's message in the evidence."""


@dataclass(frozen=True)
class Healed:
    """The repair of an artifact that was damaged, and is whole again."""

    found: IntegrityError
    """The error of the verification."""
    upload: UploadResult
    """The upload that replaced it."""


def verify_or_heal(
    store: Store,
    key: str,
    artifact: Artifact | None,
    *,
    mode: VerifyMode = "auto",
    expected_digest: str | None = None,
    profile: ChunkProfile | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
    on_damage: Callable[[IntegrityError], None] = lambda _: None,
) -> tuple[VerifyResult, Healed | None]:
    """Prove that the artifact under `key` is whole, as `verify` does; if it is damaged, upload it again and prove that.

    May be called again after a crash: it continues the upload.

    Args:
        artifact: The local artifact. Only a stored artifact with the same content is healed; None: none is.
        on_damage: Called with the damage before anything is sent.

    Raises:
        IntegrityError: it is damaged, and `artifact` has other content, or the payload is damaged again.
        ObjectChanged: it was replaced meanwhile; try again.
        SourceChanged, ChecksumMismatch: the files differ from those that were exported; the damaged artifact stays.
    """
    arguments: dict[str, Any] = {"mode": mode, "profile": profile}
    arguments |= {"on_progress": on_progress, "on_checkpoint": on_checkpoint}
    pinned = _e_tag(store, key)
    try:
        return verify(store, key, expected_digest=expected_digest, **arguments), None
    except IntegrityError as found:
        if artifact is None or (stored := _manifest_of(store, key, artifact)) is None:
            raise
        if expected_digest not in (None, stored.digest) or _e_tag(store, key) != pinned:
            raise ObjectChanged(f"the artifact {key!r} was replaced while it was verified", key=key) from found
        on_damage(found)
        log.warning("artifact.damaged key=%s e_tag=%s error=%s", key, pinned, type(found).__name__)
        _leave_evidence(store, key, stored.digest, pinned, found)
        payload = artifact
        if stored.manifest.same_body(artifact.manifest):
            # The same artifact that was there, so that recorded refs and digests stay right.
            payload = artifact.adopt(stored)
        request = UploadRequest(
            store, key, payload, profile or ChunkProfile(), False, on_progress, on_checkpoint, damaged=pinned or "gone"
        )
        uploaded = run(request)
        result = verify(store, key, expected_digest=uploaded.artifact_digest, **arguments)
        return result, Healed(found, uploaded)


def _manifest_of(store: Store, key: str, artifact: Artifact) -> ManifestFile | None:
    """The sibling manifest, if it has the content of the local artifact."""
    try:
        stored = read_manifest_file(store, key)
    except (ArtifactNotFound, ArtifactInvalid):
        return None
    return stored if stored.manifest.same_content(artifact.manifest) else None


def _e_tag(store: Store, key: str) -> str | None:
    """Entity tag of the payload; None if there is none."""
    try:
        return store.head(key).e_tag
    except ObjectNotFound:
        return None


def _leave_evidence(store: Store, key: str, digest: str, e_tag: str | None, found: IntegrityError) -> None:
    """Record the damage beside the artifact, for the search for its cause."""
    try:
        payload = store.head(key)
        size, modified = payload.size, payload.last_modified
    except ObjectNotFound:
        size = modified = None
    evidence = {
        "format": "blobflow.damaged/1",
        "key": key,
        "artifact_digest": digest,
        "found_at": datetime.now(timezone.utc).isoformat(),
        "error": type(found).__name__,
        "message": found.message[:_QUOTED],
        "payload": {
            "e_tag": e_tag,
            "size": size,
            "last_modified": modified.isoformat() if modified is not None else None,
        },
    }
    data = json.dumps(evidence, ensure_ascii=False, indent=1).encode()
    store.put(key + DAMAGED_SUFFIX, data, content_type="application/json")
