"""A table in a SQL database: created by its first use, with a new connection for each request.

SQLAlchemy comes with Dagster; the caller provides the driver of the database. A new connection for each request means
that neither a fork nor a failover of the server leaves a dead one. It is affordable: a row is written a few times a
minute. Every statement is one transaction. So a process that is stopped between two statements holds no lock that
others wait for.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Table, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from blobflow.durable import SQLITE_FULL
from blobflow.errors import BlobflowError, DiskFull, StoreConfigurationError, StoreUnavailable

NAME_LENGTH: Final = 255
"""MySQL does not index longer columns of four-byte characters by default."""
_BUSY_S: Final = 30
"""Seconds that SQLite waits for another writer, whose transaction is one statement."""
_SQLITE_OPTIONS: Final = frozenset(
    {"timeout", "isolation_level", "detect_types", "check_same_thread", "cached_statements"}
)
"""Options that Python's driver takes; more with `uri=true`."""
_LIBPQ: Final = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""A server that vanished is noticed within half a minute; by default libpq waits for hours."""


_SQLITE_READ_ONLY: Final = "attempt to write a readonly database"
_SQLITE_REASONS: Final = frozenset({
    SQLITE_FULL, _SQLITE_READ_ONLY, "database disk image is malformed", "database is locked", "disk I/O error",
    "file is not a database", "unable to open database file",
})  # fmt: skip
"""SQLite's messages that hold no value; https://www.sqlite.org/rescode.html."""


class SqlTable:
    """One table and the way to its database.

    Args:
        url: SQLAlchemy URL, e.g. `sqlite:////var/lib/leases.db` or `postgresql+psycopg2://user@host/db`.
        operation: What a row is, for errors.
        wal: Whether a SQLite file gets a write-ahead log, so that readers and a writer do not wait for each other. It
            needs a local file system.

    Raises:
        StoreConfigurationError: the URL is invalid, or its driver is not installed.
    """

    def __init__(self, url: str, table: Table, *, operation: str, wal: bool = False) -> None:
        try:
            parsed = make_url(url)
            unknown = sorted(parsed.query.keys() - _SQLITE_OPTIONS)
            if parsed.get_backend_name() == "sqlite" and unknown and "uri" not in parsed.query:
                raise StoreConfigurationError(
                    f"the URL of an SQLite database has an option that SQLite does not know: {', '.join(unknown)}",
                    hint="take it out of the URL; an SQLite database has no password",
                )
            self.url = _shown(parsed)
            """The URL for people: without the password, and without the query, which may hold one."""
            self._engine = create_engine(
                parsed,
                poolclass=NullPool,
                isolation_level="AUTOCOMMIT",
                connect_args=_connect_options(parsed),
                hide_parameters=True,
            )
        except (ArgumentError, NoSuchModuleError, ValueError):
            # Not `from`: SQLAlchemy's message may repeat the URL.
            raise StoreConfigurationError(
                "not the URL of a SQL database that SQLAlchemy knows",
                hint="e.g. sqlite:////var/lib/leases.db or postgresql+psycopg2://user@host/db",
            ) from None
        except ModuleNotFoundError as error:
            raise StoreConfigurationError(
                f"the driver {error.name} of {self.url} is not installed", hint=f"pip install {error.name}"
            ) from error
        self.dialect = self._engine.dialect.name
        self._table = table
        self._operation = operation
        self._wal = wal and self.dialect == "sqlite"
        self._is_made = False

    @contextmanager
    def connection(self, name: str) -> Generator[Connection]:
        """A connection for the block.

        Args:
            name: Name of the row, for errors.

        Raises:
            StoreUnavailable: the database failed. If the response was lost, the statement may or may not have run.
            StoreConfigurationError: the database refused the statement or the connection.
            sqlalchemy.exc.IntegrityError: a row with this key exists already.
        """
        what = f"{self._operation} {name!r}: {self.url}"
        try:
            self._make()
            with self._connect() as connection:
                yield connection
        except (OperationalError, InterfaceError, InternalError) as error:
            raise _failed(error, what, self._operation, name) from error
        except IntegrityError:
            raise  # the row exists already: the caller decides
        except DBAPIError as error:
            raise StoreConfigurationError(
                f"{what} refused with {_named(error)}",
                hint=f"look at the table {self._table.name} and at the rights of this user",
                operation=self._operation,
                key=name,
            ) from error

    def _connect(self) -> Connection:
        try:
            return self._engine.connect()
        except (TypeError, ValueError):
            # An error of the driver. Not `from`: it may repeat the option that it rejects.
            raise StoreConfigurationError(
                f"{self._operation}: the driver of {self.url} does not take the options in its query",
                hint="look at the query of the URL",
                operation=self._operation,
            ) from None

    def _make(self) -> None:
        if self._is_made:
            return
        if self._wal:
            with self._connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        try:
            with self._connect() as connection:
                connection.execute(CreateTable(self._table, if_not_exists=True))
        except (IntegrityError, ProgrammingError):
            # Postgres: another process created the table, or only the type of its rows (a duplicate object), between
            # our check and our attempt. Any other error occurs again now.
            with self._connect() as connection:
                connection.execute(CreateTable(self._table, if_not_exists=True))
        self._is_made = True


def _failed(error: DBAPIError, what: str, operation: str, key: str) -> BlobflowError:
    """The error for a failure of the database; it does not repeat the driver's message, which may hold values."""
    message = f"{what} failed with {_named(error)}"
    reason = str(error.orig)
    if reason == SQLITE_FULL:
        return DiskFull(message, operation=operation, key=key)
    if reason == _SQLITE_READ_ONLY:
        hint = "give permission to write the file and its directory, or name another place"
        return StoreConfigurationError(message, hint=hint, operation=operation, key=key)
    return StoreUnavailable(message, operation=operation, key=key)


def _named(error: DBAPIError) -> str:
    """The type of a driver's error, with its message if that is one of SQLite's fixed sentences."""
    reason = str(error.orig)
    return type(error.orig).__name__ + (f": {reason}" if reason in _SQLITE_REASONS else "")


def _shown(url: URL) -> str:
    """A URL for people; of its query, only its presence is shown."""
    return url.set(query={}).render_as_string(hide_password=True) + ("?..." if url.query else "")


def _connect_options(url: URL) -> dict[str, Any]:
    """Driver options besides the URL; the URL's options win."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": _BUSY_S}
    if url.drivername in ("postgresql", "postgresql+psycopg2", "postgresql+psycopg"):
        return {name: value for name, value in _LIBPQ.items() if name not in url.query}
    return {}
