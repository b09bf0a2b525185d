"""SQLite databases: a snapshot of one that is written to, and a mirror that swaps whole databases."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, TypeAlias, cast

from pydantic import ConfigDict, Field, JsonValue
from typing_extensions import override

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.privacy import file_is_private
from blobflow.backends.base import ExportResult, OnBytes
from blobflow.backends.files import export_files
from blobflow.backends.versioned_importer import VersionedImporter
from blobflow.durable import SQLITE_FULL
from blobflow.errors import (
    ArtifactInvalid,
    DiskFull,
    HostileArtifact,
    NotFoundError,
    RefusedError,
    TransferBusy,
    UnsupportedSource,
    UsageError,
    expanded,
    writing,
)
from blobflow.fields import KnownFields
from blobflow.untrusted import quoted

log = logging.getLogger(__name__)

BACKEND: Final = "sqlite"
DATABASE_NAME: Final = "database.sqlite"
"""The one member of the artifacts, so that readers of a mirror open `<path>/current/database.sqlite`."""

_STEP_PAGES: Final = 4096
"""Pages copied between two progress callbacks: 16 MiB of a database with the usual pages."""
_STEP_INSTRUCTIONS: Final = 10_000_000
"""SQLite's instructions between two progress callbacks during a check: a few tenths of a second."""

Damaged: TypeAlias = type[UnsupportedSource] | type[ArtifactInvalid]
"""The error for a damaged database: in the source of an export, or in an artifact."""

_COPY_BYTES: Final = 1 << 20
_WAL_VERSIONS: Final = slice(18, 20)
"""The bytes of a database's header with its WAL mode (https://www.sqlite.org/fileformat.html)."""
_ALL: Final = 2**31 - 1
"""Maximum number of rows that a check reports."""
_MISSING: Final = re.compile(
    r"no such collation sequence: (?P<collation>.+)|(?:unknown|no such) function: (?P<function>.+?)(?:\(\))?"
)
_BROKEN_CONSTRAINT: Final = re.compile(r"(?:NULL|TEXT|NUMERIC|non-\w+) value in |CHECK constraint failed in ")
"""SQLite's report of rows that are stored correctly, but that the schema does not allow."""
_NOT_WRITABLE: Final = ("unable to open database file", "attempt to write a readonly database")
_BUSY: Final = ("database is locked", "database table is locked", "database schema is locked")


class SqliteExporter(KnownFields):
    """Exports an SQLite database at one moment, by SQLite's online backup, while others continue to write to it.

    Everything is read in one read transaction. Nobody waits for it if the database is in WAL mode; in the other journal
    modes writers wait to commit until the copy is made. The copy has no journal beside it, whatever the mode of the
    source. The source is only read: only its application may roll back a journal that a killed writer left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="The database file.")
    cursor_query: str | None = Field(
        default=None,
        description="A query whose first row is the cursor (one column: its value; several: a list), read in the same"
        " transaction as the data, e.g. `SELECT max(id) FROM events`. Without it the cursor is the schema version and"
        " the user version.",
    )
    busy_timeout_s: float = Field(default=5.0, ge=0, description="Seconds to wait for a writer that is committing.")

    @property
    def backend(self) -> str:
        return BACKEND

    def export(self, dest: Path, *, on_progress: OnBytes | None = None) -> ExportResult:
        """Write an artifact of the database into `dest`; see `Exporter.export`.

        Raises:
            NotFoundError: there is no such file.
            TransferBusy: writers kept the database locked for longer than `busy_timeout_s`.
            UnsupportedSource: it is not a SQLite database, or it is damaged.
            RefusedError: a killed writer left a journal that must be rolled back first.
            UsageError: the cursor query fails, or returns a value that JSON cannot hold.
            DestinationNotEmpty: `dest` holds something.
            DiskFull: there is no room at `dest`.
        """
        path = expanded(self.path).absolute()
        if not path.is_file():
            raise NotFoundError(f"database {self.path} does not exist", path=str(self.path))
        status = path.stat()
        size = status.st_size

        def alive(*_: int) -> None:
            if on_progress:
                on_progress(0, size)

        def write(data: Path) -> JsonValue:
            target = data / DATABASE_NAME
            with writing(dest), _errors_of(path):
                try:
                    return self._backup(path, target, alive)
                except sqlite3.OperationalError as error:
                    if not _lies_still(path, error):
                        raise
                    log.info("sqlite.copied path=%s reason=%s", path, error)
                    target.unlink(missing_ok=True)
                    return self._copy(path, target, alive)

        return export_files(
            dest, backend=BACKEND, write=write, on_progress=on_progress, private=file_is_private(status.st_mode)
        )

    def _backup(self, path: Path, target: Path, alive: Callable[..., None]) -> JsonValue:
        """Let SQLite copy the database while others write to it; returns the cursor."""
        with (
            closing(_connect(path, "mode=ro", timeout_s=self.busy_timeout_s)) as source,
            closing(_connect(target, "mode=rwc")) as copy,
        ):
            # The transaction begins with the first read, and fixes the state for the whole export.
            source.execute("BEGIN")
            source.execute("SELECT 1 FROM sqlite_master").fetchone()
            cursor = self._cursor(source)
            copy.execute("PRAGMA synchronous=OFF")  # an unfinished artifact is deleted as a whole
            source.backup(copy, pages=_STEP_PAGES, progress=alive)
            # The copy of a source in WAL mode would be in it too, and create files beside it when it is opened.
            copy.execute("PRAGMA journal_mode=DELETE")
            _check(copy, path, alive, UnsupportedSource)
        return cursor

    def _copy(self, path: Path, target: Path, alive: Callable[..., None]) -> JsonValue:
        """Copy a database without writers, and let SQLite apply the log beside it to the copy; returns the cursor."""
        files = [Path(f"{path}{suffix}") for suffix in ("", "-wal") if os.path.exists(f"{path}{suffix}")]
        before = [_version(file) for file in files]
        for file in files:
            with open(file, "rb") as original, open(f"{target}{str(file)[len(str(path)) :]}", "xb") as copy:
                while chunk := original.read(_COPY_BYTES):
                    copy.write(chunk)
                    alive()
        if before != [_version(file) for file in files]:
            raise TransferBusy(f"another process writes to {path}", path=str(path))
        with closing(_connect(target, "mode=rw")) as connection:
            cursor = self._cursor(connection)
            connection.execute("PRAGMA journal_mode=DELETE")
            _check(connection, path, alive, UnsupportedSource)
        return cursor

    def _cursor(self, source: sqlite3.Connection) -> JsonValue:
        if self.cursor_query is None:
            # PRAGMA data_version means nothing to another connection, and the change counter in the file's header
            # does not advance in WAL mode (https://www.sqlite.org/pragma.html#pragma_data_version).
            return {name: _pragma(source, name) for name in ("schema_version", "user_version")}
        return _query_cursor(source, self.cursor_query)


class SqliteImporter(VersionedImporter):
    """Keeps a mirror of an SQLite database: `<path>/current/database.sqlite` is always one whole database.

    A reader that has the old one open continues to read it, until it opens the path again. The mirror is for reading:
    the next import discards what was written to it. The import does not wait for writers, but refuses while a
    transaction is open.
    """

    application_id: int | None = Field(
        default=None, description="Refuse databases with another `PRAGMA application_id`; None: accept any."
    )
    user_version: int | None = Field(
        default=None, description="Refuse databases with another `PRAGMA user_version`; None: accept any."
    )
    cursor_query: str | None = Field(
        default=None,
        description="A query on the mirror whose first row is its cursor, for mirrors that other means than imports"
        " advance further.",
    )

    @property
    @override
    def backend(self) -> str:
        return BACKEND

    @property
    def database(self) -> Path:
        """The path that readers open."""
        return self.data / DATABASE_NAME

    @override
    def cursor(self) -> JsonValue:
        if self.cursor_query is None or not self.database.exists():
            return super().cursor()
        with _errors_of(self.database), closing(_connect(self.database, "mode=ro")) as connection:
            return _query_cursor(connection, self.cursor_query)

    @override
    def prepare(self, artifact: Artifact) -> None:
        if artifact.index.paths != [DATABASE_NAME]:
            # The first process that opens the database would apply a journal beside it.
            raise HostileArtifact(
                f"{artifact!r} is not a database: it has members {', '.join(map(quoted, artifact.index.paths[:3]))}",
                path=str(artifact.path),
                reason="members",
            )

    @override
    def verify_open(self, artifact: Artifact) -> None:
        database = artifact.data / DATABASE_NAME
        # Immutable: nothing is locked, and no file is created beside a database that may still be refused.
        with (
            _errors_of(database, ArtifactInvalid),
            closing(_connect(database, "mode=ro&immutable=1")) as connection,
        ):
            _check(connection, database, _nothing, ArtifactInvalid)
            for name, expected in (("application_id", self.application_id), ("user_version", self.user_version)):
                actual = _pragma(connection, name)
                if expected is not None and actual != expected:
                    raise RefusedError(
                        f"the database in {artifact!r} has {name} {actual}, this mirror accepts {expected}",
                        hint="import the database that the mirror is meant for, or change what it accepts",
                        expected=expected,
                        actual=actual,
                    )

    @override
    def swap(self, version: Path) -> None:
        with _writers_held_off(self.database):
            super().swap(version)


def _query_cursor(connection: sqlite3.Connection, query: str) -> JsonValue:
    """The first row that a query returns: its value, or the list of its values; None if there is no row.

    Raises:
        UsageError: the query fails, or returns a value that JSON cannot hold.
    """
    try:
        row = cast("tuple[object, ...] | None", connection.execute(query).fetchone())
        value = row[0] if row and len(row) == 1 else row and list(row)
        return cast("JsonValue", json.loads(json.dumps(value, allow_nan=False)))
    except sqlite3.Error as error:
        if str(error) in _BUSY:
            raise
        raise UsageError(f"the cursor query fails: {error}", hint="try it on the database") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"the cursor query returns a value that JSON cannot hold: {error}") from error


def _connect(path: Path, parameters: str, *, timeout_s: float = 0.0) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{Path(os.path.realpath(path)).as_uri()}?{parameters}", uri=True, timeout=timeout_s, isolation_level=None
    )
    # The schema of a database from elsewhere must not run our code (https://www.sqlite.org/security.html).
    connection.execute("PRAGMA trusted_schema=OFF")
    return connection


@contextmanager
def _errors_of(path: Path, damaged: Damaged = UnsupportedSource) -> Generator[None]:
    """Translate errors of SQLite about the database at `path`."""
    try:
        yield
    except sqlite3.Error as error:
        # Python reports the codes only since 3.11; the messages are SQLite's, and have been the same for decades.
        message = str(error)
        if message in _BUSY:
            raise TransferBusy(f"database {path} is locked by a writer", path=str(path)) from error
        if message == SQLITE_FULL:
            raise DiskFull(f"no room left for the copy of {path}", path=str(path)) from error
        if message == "attempt to write a readonly database":
            raise RefusedError(
                f"database {path} has a journal that a killed writer left",
                hint="let its application open it once, which rolls the journal back",
                path=str(path),
            ) from error
        raise damaged(
            f"database {path} cannot be read: {message}", path=str(path), reason=message, what="database"
        ) from error


@contextmanager
def _writers_held_off(database: Path) -> Generator[None]:
    """Block writers of the database that is shown now; the swap would silently discard their commits.

    Raises:
        TransferBusy: a writer has an open transaction.
    """
    if not database.exists():
        yield
        return
    with closing(_connect(database, "mode=rw")) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if str(error) in _BUSY:
                raise TransferBusy(
                    f"another process writes to {database}",
                    hint="end the transaction, or wait for it",
                    path=str(database),
                ) from error
            # Read-only or damaged: then there are no writers, and replacing it with a whole database is right.
            log.info("sqlite.not_held path=%s error=%s", database, error)
        yield


def _lies_still(path: Path, error: sqlite3.Error) -> bool:
    """Whether the database is in WAL mode in a directory where SQLite cannot create the file that readers share.

    Every writer creates that file. So there is no writer, at least not on this machine.
    """
    if str(error) not in _NOT_WRITABLE or os.path.exists(f"{path}-journal"):
        return False
    with open(path, "rb") as file:
        header = file.read(_WAL_VERSIONS.stop)
    return header[_WAL_VERSIONS] == b"\2\2" and not os.access(path.parent, os.W_OK, effective_ids=True)


def _version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _check(connection: sqlite3.Connection, path: Path, alive: Callable[[], None], damaged: Damaged) -> None:
    """Let SQLite prove that the database is whole; an exception from `alive` ends the check and is raised here.

    Rows that break a constraint are allowed: the application may have written them before the constraint. If an index
    or a column needs a collation or a function of the application, the other tables are checked in full. These tables
    are checked by their pages, rows and counts, which needs neither.
    """
    failures: list[BaseException] = []

    def on_step() -> int:
        try:
            alive()
        except BaseException as failure:  # noqa: BLE001 - it comes out below; SQLite itself would swallow it
            failures.append(failure)
        return len(failures)

    connection.set_progress_handler(on_step, _STEP_INSTRUCTIONS)
    try:
        # cell_size_check: find damage before it can do harm (https://www.sqlite.org/security.html).
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("PRAGMA ignore_check_constraints=ON")
        found = _damage(connection)
    except sqlite3.Error:
        if failures:
            raise failures[0] from None
        raise
    finally:
        connection.set_progress_handler(None, 0)
    if found is not None:
        raise damaged(f"database {path} is damaged: {found}", path=str(path), reason=found, what="database")


def _damage(connection: sqlite3.Connection) -> str | None:
    """The first damage that SQLite finds; None if there is none."""
    try:
        return _first_damage(connection, f"integrity_check({_ALL})")
    except sqlite3.Error as error:
        if not _MISSING.fullmatch(str(error)):
            raise
        log.info("sqlite.needs_application error=%s", error)
    for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        try:
            found = _first_damage(connection, f"""integrity_check("{table.replace('"', '""')}")""")
        except sqlite3.Error as error:
            if not _MISSING.fullmatch(str(error)):
                raise
            found = None
        if found is not None:
            return found
    named: set[str] = set()
    while True:
        try:
            return _first_damage(connection, f"quick_check({_ALL})")
        except sqlite3.Error as error:
            missing = _MISSING.fullmatch(str(error))
            if missing is None or missing[0] in named:
                raise
            named.add(missing[0])
            # They only have to exist: a quick check compares and computes nothing.
            if missing["collation"]:
                connection.create_collation(missing["collation"], lambda one, other: (one > other) - (one < other))
            else:
                connection.create_function(missing["function"], -1, lambda *_: None, deterministic=True)


def _first_damage(connection: sqlite3.Connection, pragma: str) -> str | None:
    for (found,) in connection.execute(f"PRAGMA {pragma}"):
        if found != "ok" and not _BROKEN_CONSTRAINT.match(found):
            return found
    return None


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _nothing() -> None:
    """A progress callback that does nothing."""
