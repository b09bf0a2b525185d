"""The stores of lease records, which replace them by compare-and-swap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue
from typing_extensions import override

from blobflow.coordination.records import read_record, write_record
from blobflow.errors import Unsupported, setting
from blobflow.stores.base import Store
from blobflow.stores.optional import server_time_s
from blobflow.transport.catalog import LEASE_SUFFIX
from blobflow.untrusted import Counter, Seconds, Timestamp


class LeaseState(BaseModel):
    """The content of a lease record."""

    model_config = ConfigDict(frozen=True)

    generation: Counter
    owner: str
    """The holder; empty if nobody holds it."""
    expires_at: Timestamp
    """Unix time, by the store's clock if it reports one."""
    write_id: str
    cursor: JsonValue = None
    """Cursor of the last completed round."""
    ttl_s: Seconds = 60.0
    """A live holder writes a new record at least that often."""


class Found(NamedTuple):
    """A record, and the version that a swap must name."""

    state: LeaseState
    version: str


class LeaseStore(ABC):
    """Keeps the records of leases by name, and replaces them by compare-and-swap between processes."""

    url: str
    """URL for people; never with credentials."""

    @abstractmethod
    def read(self, name: str) -> Found | None:
        """The record; None if there is none."""

    @abstractmethod
    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        """Replace the record `version` (None: no record) by `state`.

        Returns:
            The version of the new record; None if there was another one.

        Raises:
            StoreUnavailable, TimedOut: it may or may not have been written.
        """

    @abstractmethod
    def time_s(self) -> float | None:
        """Unix time by the store's own clock, which all holders share; None if it reports none."""

    def close(self) -> None:
        """Release connections."""


class ObjectLeaseStore(LeaseStore):
    """Leases as objects `<name>.lease.json` of a store with conditional writes.

    Raises:
        Unsupported: the store has no conditional writes.
    """

    def __init__(self, store: Store) -> None:
        if not store.capabilities().conditional:
            raise Unsupported(
                f"{store!r} has no conditional writes, so it cannot hold a lease",
                hint=f"`blobflow probe` shows what it can do; keep the leases in a SQL database ({setting('leases')}),"
                " or the rounds in a store that has them",
                store=store.url,
                capability="conditional writes",
            )
        self.url = store.url
        self._store = store

    @override
    def read(self, name: str) -> Found | None:
        found = read_record(self._store, name + LEASE_SUFFIX, LeaseState)
        return Found(*found) if found else None

    @override
    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        return write_record(self._store, name + LEASE_SUFFIX, state, version)

    @override
    def time_s(self) -> float | None:
        return server_time_s(self._store)
