"""The backends by name, and the functions that export and import with any of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from blobflow.artifact.artifact import Artifact
from blobflow.backends.base import Exporter, ExportResult, Importer, ImportResult, OnBytes
from blobflow.backends.directory import DirectoryExporter
from blobflow.backends.versioned_importer import VersionedImporter
from blobflow.errors import RefusedError

BACKENDS: Final = {
    "append-log": ("blobflow.backends.append_log", "AppendLogExporter", "AppendLogImporter"),
    "directory": ("blobflow.backends.directory", "DirectoryExporter", "DirectoryImporter"),
    "parquet": ("blobflow.backends.parquet", "ParquetExporter", "ParquetImporter"),
    "sqlite": ("blobflow.backends.sqlite", "SqliteExporter", "SqliteImporter"),
}
"""The modules of each backend's exporter and importer; loaded on first use."""


def backend_classes(backend: str) -> tuple[type[Any], type[VersionedImporter]]:
    """The exporter and the importer class of a backend; both take a `path`.

    Raises:
        RefusedError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise RefusedError(f"there is no backend {backend!r}", hint=f"there are {', '.join(sorted(BACKENDS))}")
    home, exporter, importer = BACKENDS[backend]
    module = importlib.import_module(home)
    return getattr(module, exporter), getattr(module, importer)


def export_artifact(
    source: Exporter | str | Path, dest: str | Path, *, on_progress: OnBytes | None = None, **options: Any
) -> ExportResult:
    """Make an artifact in the directory `dest`, which must be missing or empty.

    Args:
        source: An exporter, or a directory; for a directory, `options` are those of `DirectoryExporter`.
    """
    exporter = DirectoryExporter(path=Path(source), **options) if isinstance(source, str | Path) else source
    return exporter.export(Path(dest), on_progress=on_progress)


def import_artifact(
    artifact: Artifact | str | Path,
    importer: Importer,
    *,
    consume: bool = False,
    on_progress: OnBytes | None = None,
    key: str | None = None,
) -> ImportResult:
    """Verify every member of a local artifact, then import it with `importer`; see `Importer`."""
    if not isinstance(artifact, Artifact):
        artifact = Artifact.open(artifact)
    return importer.import_artifact(artifact, consume=consume, on_progress=on_progress, key=key)
