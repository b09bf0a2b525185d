"""What a mirror shows, its position, and whether it is behind; any process may read it from the directory."""

from __future__ import annotations

import stat
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import JsonValue

from blobflow.artifact.manifest import Manifest
from blobflow.backends.mirror_history import HistoryEntry, read_history
from blobflow.backends.registry import BACKENDS, backend_classes
from blobflow.backends.versioned_importer import CURRENT_NAME, INCOMING_NAME, shown_artifact
from blobflow.coordination.refs import read_ref
from blobflow.errors import ArtifactNotFound, NotFoundError, expanded
from blobflow.stores.base import Reader
from blobflow.transport import read_manifest_file
from blobflow.trees import Opened, walk

_BLOCK_BYTES: Final = 512
"""Unit of `st_blocks`, whatever the file system's own (stat(2))."""


@dataclass(frozen=True)
class MirrorStatus:
    """What a mirror shows, and its position."""

    path: Path
    state: Literal["empty", "bootstrapping", "following"]
    """`bootstrapping`: nothing is shown yet, and something is arriving; `following`: an artifact was imported."""
    backend: str | None = None
    artifact_digest: str | None = None
    """Digest of the artifact that is shown, or that the shown data began with."""
    key: str | None = None
    """Key under which it was published; None if the mirror does not know."""
    cursor: JsonValue = None
    """Position of the mirror in the source's history."""
    created_at: datetime | None = None
    """When the artifact was made."""
    imported_at: datetime | None = None
    bytes_incoming: int = 0
    """Bytes on disk of downloads that are arriving, or have arrived and were not imported."""
    bytes_total: int | None = None
    """Size of the artifact that the store offers, if it was asked for."""
    offered_key: str | None = None
    offered_digest: str | None = None
    behind: bool | None = None
    """Whether the store offers an artifact that the mirror does not have yet; None: it was not asked, or has none."""

    def __str__(self) -> str:
        if self.state == "following":
            words = f"Following{{{self.cursor!r}}}"
        elif self.state == "bootstrapping":
            words = f"Bootstrapping{{{self.bytes_incoming}, {self.bytes_total}}}"
        else:
            words = "Empty"
        return f"{words}, behind {self.offered_key}" if self.behind else words

    def to_dict(self) -> dict[str, Any]:
        """The status as the command line prints it under `--json`."""
        document = asdict(self)
        for name in ("created_at", "imported_at"):
            document[name] = moment.isoformat() if (moment := document[name]) else None
        return {**document, "path": str(self.path)}


class _Offer(NamedTuple):
    key: str
    digest: str
    manifest: Manifest | None
    """None: `key` now holds another artifact than the one that the ref names."""


def mirror_status(path: str | Path, store: Reader | None = None, ref: str | None = None) -> MirrorStatus:
    """What the mirror in a directory shows, and, with a store, whether it is behind. Nothing is changed or locked.

    Args:
        store: Compare the mirror with what this store offers.
        ref: The full name of the ref to compare with (`orders/latest`); by default the mirror is compared with the
            artifact that is published now under the key that it was imported from.

    Raises:
        NotFoundError: there is no such directory.
        ChecksumMismatch: the data that is shown is damaged, so its cursor cannot be read.
    """
    path = expanded(path).absolute()
    if not path.is_dir():
        raise NotFoundError(f"there is no mirror in {path}", path=str(path))
    history = read_history(path)
    shown = shown_artifact(path)
    last = next((entry for entry in reversed(history) if shown and entry.artifact_digest == shown.digest), None)
    key = last.key if last else None
    offer = _offer(store, ref, key) if store else None
    incoming = _bytes_below(path / INCOMING_NAME)
    offered: dict[str, Any] = {}
    if offer:
        offered = {
            "offered_key": offer.key,
            "offered_digest": offer.digest,
            "bytes_total": offer.manifest.bytes if offer.manifest else None,
            "behind": True,
        }
    if shown is None:
        state = "bootstrapping" if incoming else "empty"
        return MirrorStatus(path, state, bytes_incoming=incoming, **offered)
    manifest = shown.manifest
    known = manifest.backend in BACKENDS
    cursor = backend_classes(manifest.backend)[1](path=path).cursor() if known else manifest.cursor
    if offer:
        offered["behind"] = offer.digest != shown.digest and not _has_passed(cursor, manifest, offer.manifest)
        key = key or (offer.key if offer.digest == shown.digest else None)
    return MirrorStatus(
        path,
        "following",
        backend=manifest.backend,
        artifact_digest=shown.digest,
        key=key,
        cursor=cursor,
        created_at=manifest.created_at,
        imported_at=last.imported_at if last else _changed_at(path / CURRENT_NAME),
        bytes_incoming=incoming,
        **offered,
    )


def mirror_history(path: str | Path) -> list[HistoryEntry]:
    """The artifacts that were imported into a mirror, with their cursors, oldest first; the oldest of many are gone."""
    return read_history(expanded(path))


def _offer(store: Reader, ref: str | None, key: str | None) -> _Offer | None:
    digest = None
    if ref is not None:
        state = read_ref(store, ref)
        key, digest = (state.key, state.manifest_sha256) if state else (None, None)
    if key is None:
        return None
    try:
        found = read_manifest_file(store, key)
    except ArtifactNotFound:
        return None
    return _Offer(key, digest or found.digest, found.manifest if digest in (None, found.digest) else None)


def _has_passed(cursor: JsonValue, shown: Manifest, offered: Manifest | None) -> bool:
    """Whether a mirror that moved on after its import has everything that the offered artifact has."""
    if offered is None:
        return False
    moved_on = cursor != shown.cursor and shown.backend == offered.backend
    return moved_on and isinstance(cursor, int) and isinstance(offered.cursor, int) and cursor >= offered.cursor


def _bytes_below(directory: Path) -> int:
    """Bytes that files take on disk; parts that have not arrived are holes and take none."""
    total = 0
    try:
        with Opened(directory) as root:
            for entry in walk(root):
                total += entry.status.st_blocks * _BLOCK_BYTES if stat.S_ISREG(entry.status.st_mode) else 0
    except OSError:  # absent; or it landed, or was imported, at this moment
        pass
    return total


def _changed_at(link: Path) -> datetime:
    return datetime.fromtimestamp(link.lstat().st_mtime, timezone.utc)
