"""What only some stores know or can do, and how to ask any store for it.

Each class here is a feature that a store may have besides those of `blobflow.stores.base.Store`. The functions ask a
store for its feature, and answer for a store that lacks it. Wrappers pass these calls on like all others; only
`coroutines` is a wrapper's own, so that no wrapper is bypassed unseen.
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
    """Its name by its own account, once it has answered."""


class ObjectAddress(NamedTuple):
    """The place of an object on its server, which another store of that server may be asked to copy from."""

    server: str
    """Scheme and host, whatever the bucket; never with credentials."""
    identity: str
    """Whose requests these are; servers let different people read different things."""
    path: str


class HasServer(ABC):
    """A store whose objects a server keeps."""

    @property
    @abstractmethod
    def server(self) -> Server:
        """The server."""

    @abstractmethod
    def address_of(self, key: str) -> ObjectAddress | None:
        """The object's place on the server; None where only this very store can copy it."""

    @abstractmethod
    def copy_from(self, address: ObjectAddress, meta: ObjectMeta, target: str) -> ObjectMeta:
        """See the function of this name."""


class HasClock(ABC):
    """A store that knows the time by the clock of its server or file system."""

    @abstractmethod
    def server_time_s(self) -> float | None:
        """See the function of this name."""


class HasRoom(ABC):
    """A store that knows how much more it can take."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes; None where that is unknown."""


class Coroutines(ABC):
    """Small objects of a store, whole, for the coroutines of one event loop: many requests at a time in one thread.

    Each method promises what the method of that name of `Store` does. A call that is cancelled leaves open whether
    it happened.
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
        """Release connections, in the event loop they belong to. The store itself remains open."""


class HasCoroutines(ABC):
    """A store that coroutines can use as well."""

    @abstractmethod
    def coroutines(self) -> Coroutines | None:
        """The same store for one event loop; None where threads have to do."""


def server_of(store: Reader) -> Server:
    """The server of a store; an empty one where there is none."""
    return store.server if isinstance(store, HasServer) else Server()


def server_time_s(store: Reader) -> float | None:
    """The server's clock as Unix time; None until a response carried one, and for stores without a clock.

    No request is sent: it is the time of the last response, and what has passed since. Servers tell it to the second.
    """
    return store.server_time_s() if isinstance(store, HasClock) else None


def free_bytes(store: Reader) -> int | None:
    """Bytes that a store has room for; None where that is unknown."""
    return store.free_bytes() if isinstance(store, HasRoom) else None


def check_room_for(store: Store, size: int) -> None:
    """Refuse to send more bytes than a store has room for, before the first one.

    Raises:
        DiskTooSmall: naming both numbers.
    """
    free = free_bytes(store)
    if free is not None and size > free:
        raise too_small(store.url, size, free)


def coroutines_of(store: Store) -> Coroutines | None:
    """The same store for one event loop; None where there is no such way, and threads have to do."""
    return store.coroutines() if isinstance(store, HasCoroutines) else None


def address_of(store: Reader, key: str) -> ObjectAddress | None:
    """The place of an object on its server; None where only this very store can copy it."""
    return store.address_of(key) if isinstance(store, HasServer) else None


def copy_from(store: Store, address: ObjectAddress, meta: ObjectMeta, target: str) -> ObjectMeta:
    """Copy an object of another store, which has the same server and identity.

    Args:
        store: The store to copy into.
        meta: What the other store says of the object; its entity tag pins it.

    Raises:
        Unsupported: this store has no such server.
    """
    if isinstance(store, HasServer):
        return store.copy_from(address, meta, target)
    raise cannot_copy(store, address)


def cannot_copy(store: Reader, address: ObjectAddress) -> Unsupported:
    """The error of a store that has no such server."""
    return Unsupported(
        f"{store.url} cannot copy from {address.path}", store=store.url, capability="copies by its server"
    )
