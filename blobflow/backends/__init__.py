"""Exporters make artifacts out of sources, importers bring them back to life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blobflow.artifact.artifact import Artifact
from blobflow.backends.base import Exporter, ExportResult, Importer, ImportResult, OnProgress
from blobflow.backends.directory import DirectoryExporter, DirectoryImporter

__all__ = [
    "DirectoryExporter",
    "DirectoryImporter",
    "ExportResult",
    "Exporter",
    "ImportResult",
    "Importer",
    "export_artifact",
    "import_artifact",
]


def export_artifact(
    source: Exporter | str | Path, dest: str | Path, *, on_progress: OnProgress | None = None, **options: Any
) -> ExportResult:
    """Make an artifact in the directory `dest`, which must be absent or empty.

    Args:
        source: An exporter, or a directory; then `options` are those of `DirectoryExporter`.
    """
    exporter = DirectoryExporter(path=Path(source), **options) if isinstance(source, str | Path) else source
    return exporter.export(Path(dest), on_progress=on_progress)


def import_artifact(
    artifact: Artifact | str | Path,
    importer: Importer,
    *,
    consume: bool = False,
    on_progress: OnProgress | None = None,
) -> ImportResult:
    """Verify every member of a local artifact, then bring it to life with `importer`; see `Importer`."""
    if not isinstance(artifact, Artifact):
        artifact = Artifact.open(artifact)
    return importer.import_artifact(artifact, consume=consume, on_progress=on_progress)
