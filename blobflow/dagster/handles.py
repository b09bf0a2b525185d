"""What the steps hand to each other: small values that any IO manager can keep. No payload ever passes here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import dagster as dg

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
    """An artifact on the disk of the machine that exported it."""

    key: str
    """Where it belongs in the store."""
    scratch: str
    """The directory that is removed once the artifact is verified in the store."""
    manifest_json: bytes
    round_number: int | None = None
    """Of the export round; a ref that a later round has moved is left alone. None: nothing keeps leases."""

    @property
    def path(self) -> Path:
        """The artifact directory."""
        return Path(self.scratch) / "artifact"

    @property
    def manifest(self) -> Manifest:
        return Manifest.parse(self.manifest_json)


@dataclass(frozen=True)
class UploadHandle:
    """An artifact that was brought into the store and awaits its verification."""

    key: str
    digest: str
    scratch: str
    status: str
    metadata: dict[str, Any] = field(default_factory=dict)
    round_number: int | None = None


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
    """Return if the artifact is the one that the caller names, or if he names none.

    Raises:
        DigestMismatch: it is another one; whoever can write to the store may have put it there.
    """
    if digest is not None and digest != remote.digest:
        raise DigestMismatch(
            f"{remote.key!r} is the artifact {remote.digest}, not {digest}",
            hint="give the digest that you trust, or look at who wrote to the store",
            what=remote.key,
            expected=digest,
            actual=remote.digest,
        )
