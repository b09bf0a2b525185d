"""Handles that steps pass to each other: small values that any IO manager can keep, never the payload."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import dagster as dg
from pydantic import JsonValue

from blobflow.artifact.manifest import Manifest
from blobflow.errors import DigestMismatch

PIN: Final = {
    "digest": dg.Field(
        dg.Noneable(str),
        default_value=None,
        description="Accept only this artifact (sha256:...), whatever the ref in the store names.",
    )
}
"""Config of the first step of a download."""


@dataclass(frozen=True)
class SnapshotHandle:
    """An exported artifact: on the disk of the machine that exported it, or only in the store."""

    key: str
    """Key of the artifact in the store."""
    scratch: str | None
    """Directory that is removed once the artifact is verified in the store; None if only the store has the content."""
    manifest_json: bytes
    round_number: int | None = None
    """Number of the export round; a ref that a later round has moved is left alone. None without a lease store."""
    generation: int | None = None
    """Generation of the round's lease, whose record gets the round's completion. None without a lease store."""

    @property
    def path(self) -> Path:
        """The artifact directory."""
        assert self.scratch is not None, "only the store has the content of this snapshot"
        return Path(self.scratch) / "artifact"

    @property
    def manifest(self) -> Manifest:
        return Manifest.parse(self.manifest_json)


@dataclass(frozen=True)
class UploadHandle:
    """An uploaded artifact that is not verified yet."""

    key: str
    digest: str
    scratch: str | None
    status: str
    metadata: dict[str, Any] = field(default_factory=dict)
    round_number: int | None = None
    generation: int | None = None
    cursor: JsonValue = None
    """Cursor of the exported snapshot; it may be later than that of equal content in the store."""

    @classmethod
    def of(cls, snapshot: SnapshotHandle, digest: str, status: str, metadata: dict[str, Any]) -> "UploadHandle":
        """The handle of `snapshot` after its upload as the artifact `digest`."""
        return cls(
            snapshot.key,
            digest,
            snapshot.scratch,
            status,
            metadata,
            snapshot.round_number,
            snapshot.generation,
            snapshot.manifest.cursor,
        )


@dataclass(frozen=True)
class RemoteHandle:
    """A verified artifact in the store. The value of the asset `[name, "remote"]`."""

    key: str
    digest: str
    round_number: int | None = None


@dataclass(frozen=True)
class StagedHandle:
    """An artifact on the importer's disk, or already imported there."""

    key: str
    digest: str
    metadata: dict[str, Any] = field(default_factory=dict)
    round_number: int | None = None


@dataclass(frozen=True)
class MirrorHandle:
    """An imported mirror. The value of the asset `[name, "mirror"]`."""

    path: str
    digest: str


def check_pinned(digest: str | None, remote: RemoteHandle) -> None:
    """Return if `digest` is None or the artifact's digest.

    Raises:
        DigestMismatch: it is another artifact. Any process that can write to the store may have put it there.
    """
    if digest is not None and digest != remote.digest:
        raise DigestMismatch(
            f"{remote.key!r} is the artifact {remote.digest}, not {digest}",
            hint="give the digest that you trust, or find out who wrote to the store",
            what=remote.key,
            expected=digest,
            actual=remote.digest,
        )
