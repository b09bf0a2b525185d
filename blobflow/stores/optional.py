"""Features that only some stores have, and functions that use them with any store.

Each class here is a feature that a store may have in addition to `blobflow.stores.base.Store`. The functions use the
feature, and return a default for a store that lacks it. Wrappers pass these calls on like all others. Only
`coroutines` must be implemented by each wrapper, so that a wrapper is never bypassed by accident.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from blobflow.durable import too_small
from blobflow.errors import Unsupported
from blobflow.stores.base import Body, ObjectMeta, Reader, Store, StoredObject


class Server(NamedTuple):
    """The server of a store."""

    endpoint: str = ""
    """Scheme and host; never with credentials."""
    software: str = ""
    """Name that the server gives itself; empty before its first response."""


class ObjectAddress(NamedTuple):
    """The place of an object on its server, from which another store of that server may copy."""

    server: str
    """Scheme and host, without the bucket; never with credentials."""
    identity: str
    """Identity that sends the requests; identities may have different permissions."""
    path: str


class HasServer(ABC):
    """A store whose objects a server keeps."""

    @property
    @abstractmethod
    def server(self) -> Server:
        """The server."""

    @abstractmethod
    def address_of(self, key: str) -> ObjectAddress | None:
        """The object's place on the server; None if only this store can copy it."""

    @abstractmethod
    def copy_from(self, address: ObjectAddress, meta: ObjectMeta, target: str) -> ObjectMeta:
        """See the function of this name."""


class HasClock(ABC):
    """A store that knows the time of its server's or file system's clock."""

    @abstractmethod
    def server_time_s(self) -> float | None:
        """See the function of this name."""


class HasRoom(ABC):
    """A store that knows its free space."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes of free space; None if unknown."""


class Coroutines(ABC):
    """Reads and writes small objects of a store in the coroutines of one event loop: many requests in one thread.

    Each method keeps the promises of the `Store` method with the same name. A cancelled call may or may not have
    taken effect.
    """

    @abstractmethod
    async def put(self, key: str, body: Body) -> ObjectMeta:
        """See `Store.put`, with `PutMode.OVERWRITE`."""

    @abstractmethod
    async def get(self, key: str, *, max_bytes: int) -> StoredObject:
        """See `Store.get`."""

    @abstractmethod
    async def delete(self, key: str) -> None:
        """See `Store.delete`."""

    @abstractmethod
    async def close(self) -> None:
        """Release connections, in the event loop that they belong to. The store itself remains open."""


class HasCoroutines(ABC):
    """A store that coroutines can use as well."""

    @abstractmethod
    def coroutines(self) -> Coroutines | None:
        """The same store for one event loop; None if threads must be used."""


def server_of(store: Reader) -> Server:
    """The server of a store; an empty `Server` for a store without one."""
    return store.server if isinstance(store, HasServer) else Server()


def server_time_s(store: Reader) -> float | None:
    """The server's clock as Unix time; None until a response carried one, and for stores without a clock.

    No request is sent: the result is the time of the last response plus the seconds since then. Servers report whole
    seconds.
    """
    return store.server_time_s() if isinstance(store, HasClock) else None


def free_bytes(store: Reader) -> int | None:
    """Bytes of free space in a store; None if unknown."""
    return store.free_bytes() if isinstance(store, HasRoom) else None


def check_room_for(store: Store, size: int) -> None:
    """Refuse to send more bytes than a store has room for, before any byte is sent.

    Raises:
        DiskTooSmall: the free space is too small; the message gives both numbers.
    """
    free = free_bytes(store)
    if free is not None and size > free:
        raise too_small(store.url, size, free)


def coroutines_of(store: Store) -> Coroutines | None:
    """The same store for one event loop; None if threads must be used."""
    return store.coroutines() if isinstance(store, HasCoroutines) else None


def address_of(store: Reader, key: str) -> ObjectAddress | None:
    """The place of an object on its server; None if only this store can copy it."""
    return store.address_of(key) if isinstance(store, HasServer) else None


def copy_from(store: Store, address: ObjectAddress, meta: ObjectMeta, target: str) -> ObjectMeta:
    """Copy an object of another store that has the same server and identity.

    Args:
        store: The store to copy into.
        meta: The object's description in the other store; its entity tag pins the object.

    Raises:
        Unsupported: this store is not on that server.
    """
    if isinstance(store, HasServer):
        return store.copy_from(address, meta, target)
    raise cannot_copy(store, address)


def cannot_copy(store: Reader, address: ObjectAddress) -> Unsupported:
    """The error of a store that is not on the object's server."""
    return Unsupported(
        f"{store.url} cannot copy from {address.path}", store=store.url, capability="copies by its server"
    )
