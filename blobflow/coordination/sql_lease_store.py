"""Leases in a SQL database: one row for each, replaced by an UPDATE that names the write id it replaces.

So stores without conditional writes can have rounds. Fleets that already have a database (Dagster's) need no other
place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import JSON, BigInteger, Column, Double, MetaData, String, Table, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from typing_extensions import override

from blobflow.coordination.lease_store import Found, LeaseState, LeaseStore
from blobflow.errors import ArtifactInvalid
from blobflow.sql import NAME_LENGTH, SqlTable
from blobflow.untrusted import as_model

TABLE: Final = "blobflow_leases"

_CLOCKS: Final = {
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
    "mysql": "SELECT unix_timestamp(now(6))",
    "mariadb": "SELECT unix_timestamp(now(6))",
}
"""Queries for a server's time. SQLite needs none: its users are on the machine with the file."""


class SqlLeaseStore(LeaseStore):
    """Leases in the table `blobflow_leases`, which is created on first use.

    Args:
        url: SQLAlchemy URL, e.g. `sqlite:////var/lib/leases.db` or `postgresql+psycopg2://user@host/db`.
        clock: Unix time in seconds, if the database has no clock.

    Raises:
        StoreConfigurationError: the URL is invalid, or its driver is not installed.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._table = _table()
        self._database = SqlTable(url, self._table, operation="lease")
        self.url = self._database.url
        self._clock = clock
        self._server_clock = _CLOCKS.get(self._database.dialect)
        self._told: tuple[float, float] | None = None
        """The server's time, and the monotonic time at which it was reported."""

    def __repr__(self) -> str:
        return f"<SqlLeaseStore {self.url}>"

    @override
    def read(self, name: str) -> Found | None:
        columns = self._table.c
        with self._database.connection(name) as connection:
            row = connection.execute(select(self._table).where(columns.name == name)).mappings().first()
            if self._server_clock is not None:
                self._told = float(connection.execute(text(self._server_clock)).scalar_one()), time.monotonic()
        if row is None:
            return None
        try:
            state = as_model(LeaseState, {key: value for key, value in row.items() if key != "name"}, "lease")
        except ArtifactInvalid as error:
            raise ArtifactInvalid(
                f"the row {name!r} of {TABLE} is not a lease: {error.message}",
                hint="another program wrote it; look at it, then remove it",
                key=name,
                what="record",
            ) from error
        return Found(state, state.write_id)

    @override
    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        columns, values = self._table.c, state.model_dump(mode="json")
        with self._database.connection(name) as connection:
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
            return self._clock() if self._database.dialect == "sqlite" else None
        return self._told[0] + time.monotonic() - self._told[1] if self._told else None


def _table() -> Table:
    return Table(
        TABLE,
        MetaData(),
        Column("name", String(NAME_LENGTH), primary_key=True),
        Column("generation", BigInteger, nullable=False),
        Column("owner", String(NAME_LENGTH), nullable=False),
        Column("expires_at", Double, nullable=False),
        Column("write_id", String(32), nullable=False),
        Column("cursor", JSON),
        Column("ttl_s", Double, nullable=False),
    )
