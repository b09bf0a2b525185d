"""What this host or fleet knows of its containers: one row for each, and only a cache.

The truth is in the bucket. A row records the last known digests, the upload under way with its directory, and the
directories of restores. An unreadable row counts as lost.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Column, Double, MetaData, String, Table, Text, insert, select, update
from sqlalchemy.exc import IntegrityError

from blobflow.artifact.manifest import Sha256Digest
from blobflow.errors import UsageError, writing
from blobflow.private import PrivateDirectory
from blobflow.sql import NAME_LENGTH, SqlTable

log = logging.getLogger(__name__)

TABLE: Final = "blobflow_layers"


class PendingUpload(BaseModel):
    """An upload that was begun; saved before its first part."""

    model_config = ConfigDict(frozen=True)

    upload_id: str
    key: str
    digest: Sha256Digest
    part_size: int
    path: str
    """The directory that is uploaded."""
    started_at: datetime


class Restored(BaseModel):
    """A directory that a restore put in place."""

    model_config = ConfigDict(frozen=True)

    path: str
    device: int
    inode: int
    digest: Sha256Digest
    tree: Sha256Digest | None = None
    """Digest of its files' content; None, in rows of earlier versions, means `digest`."""

    @property
    def content(self) -> str:
        """Digest of its files' content, whoever may read them; see `tree_digest`."""
        return self.tree or self.digest


class SyncState(BaseModel):
    """The known state of one container."""

    model_config = ConfigDict(frozen=True)

    container: str
    path: str | None = None
    """The directory that was synced last."""
    local_digest: Sha256Digest | None = None
    """Digest of the directory when it was synced or restored last."""
    remote_digest: Sha256Digest | None = None
    """Digest of the layer that the container's ref names, as far as this state has seen it."""
    last_sync: datetime | None = None
    pending: PendingUpload | None = None
    restored: tuple[Restored, ...] = ()

    def with_restored(self, new: Restored, *, others: bool) -> SyncState:
        """The state with one more directory; without `others`, it replaces those at its path."""
        kept = tuple(one for one in self.restored if others or one.path != new.path)
        return self.model_copy(update={"restored": (*kept, new)})


class StateTable:
    """The rows of one store in the table `blobflow_layers`; any number of processes may use it at once.

    Args:
        url: SQLAlchemy URL, or the path of a SQLite file, which is created.
        scope: URL of the store: the same container in another store is another one.
    """

    def __init__(self, url: str | Path, scope: str, *, clock: Callable[[], float] = time.time) -> None:
        if isinstance(url, Path):
            with writing(url), PrivateDirectory.at(url.absolute().parent) as home:
                os.close(home.open(url.name, os.O_RDWR | os.O_CREAT))  # SQLite gives its other files the same mode
            url = f"sqlite:///{url.absolute()}"
        self._table = Table(
            TABLE,
            MetaData(),
            Column("scope", String(64), primary_key=True),
            Column("name", String(NAME_LENGTH), primary_key=True),
            Column("state", Text, nullable=False),
            Column("updated_at", Double, nullable=False),
        )
        self._database = SqlTable(url, self._table, operation="layer", wal=True)
        self.url = self._database.url
        self._scope = hashlib.sha256(scope.encode()).hexdigest()
        self._clock = clock

    def __repr__(self) -> str:
        return f"<StateTable {self.url}>"

    def load(self, name: str) -> SyncState | None:
        """The row of a container; None if it is missing or unreadable."""
        columns = self._table.c
        with self._database.connection(name) as connection:
            wanted = select(columns.state).where(columns.scope == self._scope, columns.name == name)
            text = connection.execute(wanted).scalar_one_or_none()
        return _parse(name, text) if text is not None else None

    def load_all(self) -> dict[str, SyncState]:
        """Every readable row, by container."""
        columns = self._table.c
        with self._database.connection("*") as connection:
            wanted = select(columns.name, columns.state).where(columns.scope == self._scope).order_by(columns.name)
            rows = [(str(name), str(text)) for name, text in connection.execute(wanted)]
        return {name: state for name, text in rows if (state := _parse(name, text)) is not None}

    def save(self, state: SyncState) -> None:
        """Write the row of a container."""
        name, columns = state.container, self._table.c
        if len(name) > NAME_LENGTH:
            raise UsageError(f"the name of a container has more than {NAME_LENGTH} characters", name=name)
        values = {"state": state.model_dump_json(), "updated_at": self._clock()}
        same = (columns.scope == self._scope) & (columns.name == name)
        with self._database.connection(name) as connection:
            if connection.execute(update(self._table).where(same).values(**values)).rowcount:
                return
        try:
            with self._database.connection(name) as connection:
                connection.execute(insert(self._table).values(scope=self._scope, name=name, **values))
        except IntegrityError:  # another process was faster
            with self._database.connection(name) as connection:
                connection.execute(update(self._table).where(same).values(**values))


def _parse(name: str, text: str) -> SyncState | None:
    try:
        state = SyncState.model_validate_json(text)
    except ValidationError as error:
        log.warning("layer.state_unreadable container=%s error=%s", name, error.errors(include_url=False)[0]["msg"])
        return None
    return state if state.container == name else None
