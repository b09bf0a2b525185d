"""What the steps hand to each other: small values that any IO manager can keep. No payload ever passes here."""

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
        description="Refuse every artifact but this one (sha256:...), whatever the store says.",
    )
}
"""Run config of the first step of a download."""


@dataclass(frozen=True)
class SnapshotHandle:
    """An artifact on the disk of the machine that exported it, or of which only the store has the content."""

    key: str
    """Where it belongs in the store."""
    scratch: str | None
    """The directory that is removed once the artifact is verified in the store; None: only the store has it."""
    manifest_json: bytes
    round_number: int | None = None
    """Of the export round; a ref that a later round has moved is left alone. None: nothing keeps leases."""
    generation: int | None = None
    """Of the round's lease, in whose record its completion is written. None: nothing keeps leases."""

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
    """An artifact that was brought into the store and awaits its verification."""

    key: str
    digest: str
    scratch: str | None
    status: str
    metadata: dict[str, Any] = field(default_factory=dict)
    round_number: int | None = None
    generation: int | None = None
    cursor: JsonValue = None
    """Of the exported snapshot, which may be later than that of equal content in the store."""

    @classmethod
    def of(cls, snapshot: SnapshotHandle, digest: str, status: str, metadata: dict[str, Any]) -> "UploadHandle":
        """That of `snapshot`, which is in the store as the artifact `digest`."""
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
    """An artifact that is on the importer's disk, or alive there already."""

    key: str
    digest: str
    metadata: dict[str, Any] = field(default_factory=dict)
    round_number: int | None = None


@dataclass(frozen=True)
class MirrorHandle:
    """A mirror that is alive. The value of the asset `[name, "mirror"]`."""

    path: str
    digest: str


def check_pinned(digest: str | None, remote: RemoteHandle) -> None:
    """Return if the artifact is `digest`, or if that is None.

    Raises:
        DigestMismatch: it is another one, which a process that can write to the store may have put there.
    """
    if digest is not None and digest != remote.digest:
        raise DigestMismatch(
            f"{remote.key!r} is the artifact {remote.digest}, not {digest}",
            hint="give the digest that you trust, or look at who wrote to the store",
            what=remote.key,
            expected=digest,
            actual=remote.digest,
        )
