"""The protocols of exporters and importers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from pydantic import JsonValue

from blobflow.artifact.artifact import Artifact

OnBytes: TypeAlias = Callable[[int, int], None]
"""Called in the calling thread with bytes done and total bytes; an exception from it stops the work cleanly."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote and what it left out."""

    artifact: Artifact
    members: int
    bytes: int
    excluded: int
    """Entries that matched an exclude pattern; a directory counts once."""
    symlinks_skipped: int
    seconds: float
    unmatched: tuple[str, ...] = ()
    """Exclude patterns that matched nothing."""
    left_out: tuple[str, ...] = ()
    """Paths that the exporter knows are not content of the source: `_delta_log/` of a Parquet dataset."""


@dataclass(frozen=True)
class ImportResult:
    """The artifact that was imported, and where its data is."""

    status: Literal["imported", "unchanged"]
    path: Path
    artifact_digest: str
    members: int
    bytes: int
    cursor: JsonValue
    seconds: float
    removed_versions: list[str] = field(default_factory=list[str])


class Exporter(Protocol):
    """Makes an artifact from a source."""

    @property
    def backend(self) -> str:
        """Name of the backend; it is in the manifest and selects the importer."""
        ...

    def export(self, dest: Path, *, on_progress: OnBytes | None = None) -> ExportResult:
        """Write an artifact into `dest`, which must be absent or an empty directory.

        The manifest is written last, so a killed export does not leave an artifact.
        """
        ...


class Importer(Protocol):
    """Turns an artifact into live data at its target."""

    @property
    def backend(self) -> str:
        """The backend of the artifacts that it imports."""
        ...

    def staging(self, artifact_digest: str) -> Path:
        """Where a download for this importer should land, so that `consume` needs no copy."""
        ...

    def current(self) -> Artifact | None:
        """The artifact that is live now; None before the first import."""
        ...

    def cursor(self) -> JsonValue:
        """The target's position in the source's history, from which following continues; None if there is none."""
        ...

    def import_artifact(
        self,
        artifact: Artifact,
        *,
        consume: bool = False,
        on_progress: OnBytes | None = None,
        key: str | None = None,
    ) -> ImportResult:
        """Verify every member, then put the artifact in place in one atomic step.

        May be called again after a crash; an artifact that is live already is not imported again (`unchanged`).

        Args:
            consume: The artifact directory may be moved away instead of copied.
            key: Key under which the artifact was published, for the target's history.
        """
        ...
