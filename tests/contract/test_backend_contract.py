"""The contract of backends, for each that blobflow has."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from blobflow import DirectoryExporter, DirectoryImporter
from blobflow.backends import (
    AppendLog,
    AppendLogExporter,
    AppendLogImporter,
    ParquetExporter,
    ParquetImporter,
    SqliteExporter,
    SqliteImporter,
)
from blobflow.backends.append_log import read_state
from blobflow.backends.sqlite import DATABASE_NAME
from blobflow.testing import BackendContract
from tests.kit import read_parquet, write_parquet


@pytest.mark.seed("1.24")
class TestDirectory(BackendContract):
    """Files read where they lie."""

    def write_source(self, source: Path, revision: int) -> None:
        (source / "file").write_text(f"revision {revision}")

    def exporter(self, source: Path) -> DirectoryExporter:
        return DirectoryExporter(path=source)

    def importer(self, target: Path) -> DirectoryImporter:
        return DirectoryImporter(path=target)

    def revision_of(self, target: Path) -> int:
        return int((target / "current" / "file").read_text().split()[1])


@pytest.mark.seed("1.24")
class TestAppendLog(BackendContract):
    """One record for each revision."""

    def write_source(self, source: Path, revision: int) -> None:
        with AppendLog(source) as log:
            log.append("revision", revision)

    def exporter(self, source: Path) -> AppendLogExporter:
        return AppendLogExporter(path=source)

    def importer(self, target: Path) -> AppendLogImporter:
        return AppendLogImporter(path=target)

    def revision_of(self, target: Path) -> int:
        revision = read_state(target / "current").items["revision"]
        assert isinstance(revision, int)
        return revision


@pytest.mark.seed("1.24")
class TestParquet(BackendContract):
    """One file for each revision."""

    def write_source(self, source: Path, revision: int) -> None:
        folder = source / f"year={2000 + revision}"
        folder.mkdir()
        write_parquet(folder / "part-0.parquet", {"number": [revision] * revision})

    def exporter(self, source: Path) -> ParquetExporter:
        return ParquetExporter(path=source)

    def importer(self, target: Path) -> ParquetImporter:
        return ParquetImporter(path=target)

    def revision_of(self, target: Path) -> int:
        return max(read_parquet(path, "number")[0] for path in (target / "current").glob("year=*/*.parquet"))


@pytest.mark.seed("1.24")
class TestSqlite(BackendContract):
    """One row for each revision."""

    def write_source(self, source: Path, revision: int) -> None:
        with closing(sqlite3.connect(source / "db")) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS revisions (number INTEGER PRIMARY KEY)")
            connection.execute("INSERT INTO revisions VALUES (?)", (revision,))

    def exporter(self, source: Path) -> SqliteExporter:
        return SqliteExporter(path=source / "db", cursor_query="SELECT max(number) FROM revisions")

    def importer(self, target: Path) -> SqliteImporter:
        return SqliteImporter(path=target)

    def revision_of(self, target: Path) -> int:
        with closing(sqlite3.connect(target / "current" / DATABASE_NAME)) as connection:
            return connection.execute("SELECT max(number) FROM revisions").fetchone()[0]
