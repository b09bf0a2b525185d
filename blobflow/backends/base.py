"""What an exporter and an importer promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from pydantic import JsonValue

from blobflow.artifact.artifact import Artifact

OnBytes: TypeAlias = Callable[[int, int], None]
"""Called in the calling thread with bytes done and bytes in total; raising from it stops the work cleanly."""


@dataclass(frozen=True)
class ExportResult:
    """What an export made and what it left out."""

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
    """Paths that are none of the source's content, as its exporter knows: `_delta_log/` of a Parquet dataset."""


@dataclass(frozen=True)
class ImportResult:
    """Where the imported data lives."""

    status: Literal["imported", "unchanged"]
    path: Path
    artifact_digest: str
    members: int
    bytes: int
    cursor: JsonValue
    seconds: float
    removed_versions: list[str] = field(default_factory=list[str])


class Exporter(Protocol):
    """Makes an artifact of a source."""

    @property
    def backend(self) -> str:
        """Stands in the manifest and picks the importer."""
        ...

    def export(self, dest: Path, *, on_progress: OnBytes | None = None) -> ExportResult:
        """Write an artifact into `dest`, which must be absent or an empty directory.

        The manifest is written last: a killed export leaves something that is no artifact.
        """
        ...


class Importer(Protocol):
    """Brings an artifact to life at its target."""

    @property
    def backend(self) -> str:
        """The backend of the artifacts it takes."""
        ...

    def staging(self, artifact_digest: str) -> Path:
        """Where a download for this importer should land, so that `consume` needs no copy."""
        ...

    def current(self) -> Artifact | None:
        """The artifact that is alive now."""
        ...

    def cursor(self) -> JsonValue:
        """Where in the source's history the target stands, which is where following it goes on; None: nowhere yet."""
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

        May be called again after a crash; an artifact that is alive already is left alone (`unchanged`).

        Args:
            consume: The artifact directory may be moved away instead of copied.
            key: Under which the artifact was published, for the target's history.
        """
        ...
