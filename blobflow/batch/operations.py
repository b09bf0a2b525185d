"""The values of a batch: operations and their results. No repr shows payload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, TypeAlias

from typing_extensions import Self

from blobflow.stores.base import ObjectMeta

Kind: TypeAlias = Literal["insert", "get", "delete"]
Permission: TypeAlias = Literal["read", "write", "delete"]

ALL_PERMISSIONS: Final[frozenset[Permission]] = frozenset({"read", "write", "delete"})


@dataclass(slots=True)
class Insert:
    """Store `payload` whole under `key`; it replaces an existing object.

    Attributes:
        key: The key; None for a generated unique key, which the response reports.
        payload: At most 1 MiB.
        metadata: Kept with the object if the store can (S3); otherwise the insert fails with `Unsupported`.
    """

    key: str | None
    payload: bytes | bytearray | memoryview
    metadata: Mapping[str, str] | None = None

    kind: ClassVar[Kind] = "insert"
    permission: ClassVar[Permission] = "write"

    def __repr__(self) -> str:
        return f"Insert(key={self.key!r}, payload=<{len(self.payload)} bytes>)"


@dataclass(slots=True)
class Get:
    """Read the object with the key `key`, if there is one."""

    key: str

    kind: ClassVar[Kind] = "get"
    permission: ClassVar[Permission] = "read"


@dataclass(slots=True)
class Delete:
    """Remove the object with the key `key`; a missing one is not an error."""

    key: str

    kind: ClassVar[Kind] = "delete"
    permission: ClassVar[Permission] = "delete"


Operation: TypeAlias = Insert | Get | Delete


@dataclass(slots=True)
class Inserted:
    """The response to an insert: the object is durable and visible."""

    key: str
    meta: ObjectMeta

    kind: ClassVar[Kind] = "insert"


@dataclass(slots=True)
class Got:
    """The response to a get; `payload` is None if there is no object."""

    key: str
    payload: Payload | None

    kind: ClassVar[Kind] = "get"


@dataclass(slots=True)
class Deleted:
    """The response to a delete: there is no object any more, whether or not there was one."""

    key: str

    kind: ClassVar[Kind] = "delete"


Response: TypeAlias = Inserted | Got | Deleted


@dataclass(slots=True)
class BatchResult:
    """The result of one item of the input.

    Attributes:
        index: Position in the input, from 0.
        response: The response of an operation that succeeded.
        error: The error of one that failed, or the error that was in the input.
        kind: Kind of the operation; empty for an error of the input.
        key: Key of the operation, also if it was generated.
    """

    index: int
    response: Response | None = None
    error: BaseException | None = None
    kind: Kind | Literal[""] = ""
    key: str | None = None

    def unwrap(self) -> Response:
        """The response; raises the error if there is one."""
        if self.response is None:
            raise self.error or AssertionError("neither a response nor an error")
        return self.response


class Payload:
    """The bytes of an object that was read.

    Small ones are already in memory. Those above 1 MiB are read on demand, pinned to one entity tag. The batch keeps
    its permits until the last byte is read, `close` is called, or the payload is garbage-collected.

    Attributes:
        meta: The store's metadata of the object.
    """

    __slots__ = ("__weakref__", "_close", "_data", "_read", "meta")

    def __init__(
        self,
        meta: ObjectMeta,
        data: bytes | None,
        read: Callable[[int, int], bytes] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.meta = meta
        self._data = data
        self._read = read
        self._close = close

    @property
    def size(self) -> int:
        """Total bytes."""
        return self.meta.size

    @property
    def is_open(self) -> bool:
        """Whether bytes are still to be read from the store, for which permits are held."""
        return self._close is not None

    def __iter__(self) -> Iterator[bytes]:
        """The bytes from the start, in pieces of at most 1 MiB."""
        if self._data is not None:
            if self._data:
                yield self._data
            return
        read = self._read
        assert read is not None
        for offset in range(0, self.size, PIECE_BYTES):
            if self._close is None:
                raise ValueError("the payload is closed")
            yield read(offset, min(PIECE_BYTES, self.size - offset))
        self.close()

    def read(self) -> bytes:
        """All bytes at once.

        Raises:
            ObjectChanged: the object was replaced since.
            ValueError: the payload was closed before it was read.
        """
        return self._data if self._data is not None else b"".join(self)

    def close(self) -> None:
        """Stop reading; may be called again."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.size} bytes>"


PIECE_BYTES: Final = 1024 * 1024
