"""Leases in a SQL database: one row for each, replaced by an UPDATE that names the write id it replaces.

So stores without conditional writes can have rounds, and fleets that have a database anyway (Dagster's) need no other
place. SQLAlchemy comes with Dagster; the driver of the database is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Double,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable
from typing_extensions import override

from blobflow.errors import ArtifactInvalid, StoreConfigurationError, StoreUnavailable
from blobflow.lease import Found, Leases, LeaseState

TABLE: Final = "blobflow_leases"

_CLOCKS: Final = {
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
    "mysql": "SELECT unix_timestamp(now(6))",
    "mariadb": "SELECT unix_timestamp(now(6))",
}
"""How a server tells its time. SQLite has none: whoever opens the file is on the machine that holds it."""

_NAME_LENGTH: Final = 255
"""MySQL indexes no longer column of four-byte characters by default."""
_BUSY_S: Final = 30
"""How long SQLite waits for another writer, whose transaction is one statement."""
_LIBPQ: Final = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""A server that vanished is noticed within half a minute. libpq's own answer is to wait for it, for hours."""


class SqlLeases(Leases):
    """Leases in the table `blobflow_leases`, which is made by the first use.

    Every request has a connection of its own, so that neither forks nor a failover of the server leave a dead one
    behind; a lease is written a few times a minute. Every statement is a transaction of its own: a process that is
    stopped between two of them holds no lock of the server's that others wait for.

    Args:
        url: Of SQLAlchemy, e.g. `sqlite:////var/lib/leases.db` or `postgresql+psycopg2://user@host/db`.
        clock: Seconds since the epoch, where the database has no clock.

    Raises:
        StoreConfigurationError: not such a URL, or its driver is not installed.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        try:
            parsed = make_url(url)
            self.url = parsed.render_as_string(hide_password=True)
            self._engine = create_engine(
                parsed,
                poolclass=NullPool,
                isolation_level="AUTOCOMMIT",
                connect_args=_connect_options(parsed),
                hide_parameters=True,
            )
        except (ArgumentError, NoSuchModuleError) as error:
            raise StoreConfigurationError(
                "not the URL of a SQL database that SQLAlchemy knows",
                hint="e.g. sqlite:////var/lib/leases.db or postgresql+psycopg2://user@host/db",
            ) from error
        except ModuleNotFoundError as error:
            raise StoreConfigurationError(
                f"the driver {error.name} of {self.url} is not installed", hint=f"pip install {error.name}"
            ) from error
        self._clock = clock
        self._server_clock = _CLOCKS.get(self._engine.dialect.name)
        self._table = _table()
        self._is_made = False
        self._told: tuple[float, float] | None = None
        """The server's time, and the monotonic second at which it told it."""

    def __repr__(self) -> str:
        return f"<SqlLeases {self.url}>"

    @override
    def read(self, name: str) -> Found | None:
        columns = self._table.c
        with self._connection(name) as connection:
            row = connection.execute(select(self._table).where(columns.name == name)).mappings().first()
            if self._server_clock is not None:
                self._told = float(connection.execute(text(self._server_clock)).scalar_one()), time.monotonic()
        if row is None:
            return None
        try:
            state = LeaseState.model_validate({key: value for key, value in row.items() if key != "name"})
        except ValidationError as error:
            raise ArtifactInvalid(
                f"the row {name!r} of {TABLE} is no lease: {error.errors(include_url=False)[0]['msg']}",
                hint="somebody else wrote it; look at it, then remove it",
                key=name,
            ) from error
        return Found(state, state.write_id)

    @override
    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        columns, values = self._table.c, state.model_dump(mode="json")
        with self._connection(name) as connection:
            if version is None:
                try:
                    connection.execute(insert(self._table).values(name=name, **values))
                except IntegrityError:
                    return None
            else:
                same = (columns.name == name) & (columns.write_id == version)
                if connection.execute(update(self._table).where(same).values(**values)).rowcount != 1:
                    return None
        return state.write_id

    @override
    def time_s(self) -> float | None:
        if self._server_clock is None:
            return self._clock() if self._engine.dialect.name == "sqlite" else None
        return self._told[0] + time.monotonic() - self._told[1] if self._told else None

    @contextmanager
    def _connection(self, name: str) -> Generator[Connection]:
        """A connection for the block, and the driver's errors as ours."""
        try:
            self._make_table()
            with self._engine.connect() as connection:
                yield connection
        except (OperationalError, InterfaceError, InternalError) as error:
            # Whether a statement whose answer was lost has happened, nobody knows: the lease is read back.
            raise StoreUnavailable(
                f"lease {name!r}: {self.url} failed with {type(error.orig).__name__}", operation="lease", key=name
            ) from error
        except DBAPIError as error:
            raise StoreConfigurationError(
                f"lease {name!r}: {self.url} refused with {type(error.orig).__name__}",
                hint=f"look at the table {TABLE} and at the rights of this user",
                operation="lease",
                key=name,
            ) from error

    def _make_table(self) -> None:
        if self._is_made:
            return
        try:
            with self._engine.connect() as connection:
                connection.execute(CreateTable(self._table, if_not_exists=True))
        except IntegrityError:
            # Postgres: another one made it at this moment, between our look and our attempt.
            with self._engine.connect() as connection:
                connection.execute(CreateTable(self._table, if_not_exists=True))
        self._is_made = True


def _connect_options(url: URL) -> dict[str, Any]:
    """What the driver is told beside the URL, which has the last word."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": _BUSY_S}
    if url.drivername in ("postgresql", "postgresql+psycopg2", "postgresql+psycopg"):
        return {name: value for name, value in _LIBPQ.items() if name not in url.query}
    return {}


def _table() -> Table:
    return Table(
        TABLE,
        MetaData(),
        Column("name", String(_NAME_LENGTH), primary_key=True),
        Column("generation", BigInteger, nullable=False),
        Column("owner", String(_NAME_LENGTH), nullable=False),
        Column("expires_at", Double, nullable=False),
        Column("write_id", String(32), nullable=False),
        Column("cursor", JSON),
        Column("ttl_s", Double, nullable=False),
    )
