"""The Store protocol: the place of objects, with the usual operations of object stores.

A store holds immutable byte strings under keys. Every method is synchronous and thread-safe, and makes one attempt.
`blobflow.stores.retry.RetryingStore` repeats attempts after temporary errors. Each method's docstring says whether it
may be called again after a crash or a lost response. The contract suite `blobflow.testing.StoreContract` tests these
promises for every implementation.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import NamedTuple, TypedDict

from blobflow.checksum import Buffer, crc32c
from blobflow.errors import InvalidKey, ObjectNotFound, Unsupported

MAX_KEY_BYTES = 900
"""S3 allows 1,024 bytes; the rest is for the store's prefix and our suffixes."""

RESERVED_SEGMENT = ".blobflow"
"""Directory in which the local store keeps its uploads and locks."""


class PutMode(Enum):
    """Condition under which a put stores its object."""

    OVERWRITE = "overwrite"
    """Always; an existing object is replaced."""
    CREATE = "create"
    """Only if the key has no object."""
    UPDATE = "update"
    """Only if the object still has the given e_tag (compare-and-swap)."""


class ObjectMeta(NamedTuple):
    """The description of an object in its store, without the bytes."""

    key: str
    size: int
    e_tag: str
    """Changes whenever the object is replaced, even by equal bytes in some stores. Opaque."""
    last_modified: datetime | None = None
    crc32c: int | None = None
    """CRC32C of the whole object as the store reports it; reliable only with `Capabilities.attests_crc32c`."""
    metadata: Mapping[str, str] | None = None
    """Metadata that was put with the bytes, if the store keeps it; names are in lower case."""


class StoredObject(NamedTuple):
    """A small object: all of its bytes and its description."""

    data: bytes
    meta: ObjectMeta


class PartMeta(NamedTuple):
    """A part of a multipart upload that the store has acknowledged."""

    part_number: int
    size: int
    e_tag: str
    crc32c: int | None = None


class UploadMeta(NamedTuple):
    """A multipart upload under way."""

    key: str
    upload_id: str
    initiated: datetime | None = None


@dataclass(frozen=True)
class Capabilities:
    """Capabilities and limits of a store, from which plans are made."""

    multipart: bool = True
    """Uploads take parts in any order from any process, and continue by upload id."""
    conditional: bool = True
    """PutMode.CREATE and PutMode.UPDATE are atomic between processes."""
    min_part_size: int = 1
    """Fewest bytes of a part; the last part may be smaller."""
    max_part_size: int = 5 * 1024**3
    """Most bytes of a part."""
    max_parts: int = 10_000
    max_put_size: int | None = None
    """Most bytes of an object in a single put request; None if no limit is known."""
    max_object_size: int | None = None
    """Most bytes of any object, from the provider's documentation; None: `max_parts` times `max_part_size`."""
    ranges: bool = True
    """A range of an object can be read. Artifacts cannot be read from a store without it."""
    attests_crc32c: bool = False
    """The store itself computed the CRC32C that `head` reports, from the bytes that it keeps."""


def check_readable(store: Reader) -> None:
    """Refuse to send to a store that cannot be read in ranges. To find that out, requests may be sent.

    Raises:
        Unsupported: the store's server ignores ranges.
    """
    if not store.capabilities().ranges:
        raise Unsupported(
            f"{store.url} cannot be read in ranges: data sent there could not be verified or fetched",
            hint="`blobflow probe` shows what the server does; use another server, or another way to this one",
            store=store.url,
            capability="ranged GET",
        )


def check_put_size(store: Store, key: str, size: int) -> None:
    """Refuse an object that needs a single request, but is too large for one.

    Raises:
        Unsupported: the object is too large; the message gives both sizes.
    """
    limit = store.capabilities().max_put_size
    if limit is not None and size > limit:
        raise Unsupported(
            f"{key!r} has {size} bytes, and {store.url} takes at most {limit} in one request: it has no multipart"
            " uploads that can be relied upon",
            hint="`blobflow probe` shows why; use another server, or divide the source",
            store=store.url,
            capability="multipart uploads",
            key=key,
        )


def check_object_size(store: Store, key: str, size: int) -> None:
    """Refuse an object that is too large for its store, before any byte is sent.

    Raises:
        Unsupported: the object is too large; the message gives both sizes.
    """
    limit = store.capabilities().max_object_size
    if limit is not None and size > limit:
        raise Unsupported(
            f"{key!r} has {size} bytes, and {store.url} takes objects of at most {limit}",
            hint="divide the source, or use another provider",
            store=store.url,
            capability=f"objects of {size} bytes",
            key=key,
        )


class Body:
    """Bytes to send to a store: their size, their CRC32C, and a function that produces them again.

    Each attempt iterates from the start, so a retry never sends the rest of a half-read stream.

    Args:
        size: Total bytes.
        chunks: Returns all bytes from the start at every call. Each buffer is valid until the next one.
        crc32c: CRC32C of all bytes, if it is known beforehand.
        md5: MD5 of all bytes, if it is known beforehand; sent by stores that support it.
        metadata: Names and values to keep with the object. A store without metadata refuses it with `Unsupported`.
    """

    __slots__ = ("_chunks", "crc32c", "md5", "metadata", "size")

    def __init__(
        self,
        size: int,
        chunks: Callable[[], Iterable[Buffer]],
        crc32c: int | None = None,
        *,
        md5: bytes | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.size = size
        self.crc32c = crc32c
        self.md5 = md5
        self.metadata = metadata
        self._chunks = chunks

    @classmethod
    def of(cls, data: Buffer, *, metadata: Mapping[str, str] | None = None) -> Body:
        """A body of bytes in memory."""
        return cls(len(data), lambda: (data,), crc32c(data), metadata=metadata)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._chunks())

    def __repr__(self) -> str:
        return f"<Body {self.size} bytes>"


def plain(body: Buffer | Body, store: Store) -> Body:
    """`body` as a `Body`, for a store that keeps only bytes.

    Raises:
        Unsupported: `body` has metadata.
    """
    content = body if isinstance(body, Body) else Body.of(body)
    if content.metadata:
        raise Unsupported(
            f"{store.url} keeps no metadata with an object",
            hint="leave it out, or put it into the object; S3 keeps it",
            store=store.url,
            capability="metadata",
        )
    return content


def key_segment(name: str) -> str:
    """Any name as one segment of a key or a path; different names stay different."""
    segment = name.replace("%", "%25").replace("/", "%2F")
    return segment.replace(".", "%2E") if segment in (".", "..") else segment


_PLAIN_KEY = re.compile("[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}(?:/[A-Za-z0-9_-][A-Za-z0-9._-]{0,254})*")
"""Matches most keys; if it matches, only the length can be wrong."""


def check_key(key: str) -> str:
    """`key` itself, if it is valid: relative, `/`-separated, no empty, `.`, `..` or reserved segments.

    Raises:
        InvalidKey: the key is invalid; the message names the broken rule.
    """

    def refuse(reason: str) -> InvalidKey:
        return InvalidKey(
            f"invalid key {key!r}: {reason}",
            hint="keys are relative, '/'-separated, without empty, '.' or '..' segments",
            key=key,
            reason=reason,
        )

    if len(key) <= MAX_KEY_BYTES and _PLAIN_KEY.fullmatch(key):
        return key
    try:
        encoded = key.encode("utf-8")
    except UnicodeEncodeError:
        raise refuse("it is not valid Unicode") from None
    if not key:
        raise refuse("it is empty")
    if len(encoded) > MAX_KEY_BYTES:
        raise refuse(f"{len(encoded)} bytes are more than {MAX_KEY_BYTES}")
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in key):
        raise refuse("it contains a control character")
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise refuse(f"segment {segment!r} is not allowed")
        if segment == RESERVED_SEGMENT:
            raise refuse(f"segment {segment!r} is reserved")
        if len(segment.encode()) > 255:
            raise refuse("a segment is longer than 255 bytes")
    return key


def is_key(path: str) -> bool:
    """Whether a path may be listed: what `check_key` refuses cannot be read either (names that are not UTF-8 too)."""
    try:
        check_key(path)
    except InvalidKey:
        return False
    return True


class Reader(ABC):
    """A place from which objects are read. Keys are relative to its URL, including the prefix.

    Methods raise `ObjectNotFound`, `PreconditionFailed`, `NoSuchUpload`, `StoreUnavailable` (and its subclasses),
    `TimedOut`, `StoreConfigurationError` and `InvalidKey`. They never raise exceptions of a client library.
    """

    url: str
    """URL for people and metadata; never with credentials."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """The store's capabilities. The first call may send requests to find them out."""

    @abstractmethod
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        """A small object, with all of its bytes.

        Raises:
            ObjectTooLarge: the object has more than `max_bytes`. At most one chunk beyond that was read.
        """

    @abstractmethod
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        """Fill `buffer` with the object's bytes from `offset`.

        Args:
            e_tag: Entity tag that the object must have, or None for any object.

        Raises:
            ObjectChanged: the object no longer has `e_tag`.
            SizeMismatch: the object ends before the buffer is full.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectMeta:
        """The object's description, without its bytes."""

    @abstractmethod
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        """Objects whose keys start with `prefix`, in UTF-8 order of the key, lazily, page by page.

        Args:
            prefix: A plain string prefix; it need not end at a `/`.
            start_after: Only keys greater than this one.
        """

    def close(self) -> None:
        """Release connections. The store may not be used afterwards."""

    def get_range(self, key: str, offset: int, length: int, *, e_tag: str | None = None) -> bytes:
        """`length` bytes from `offset`; see `get_range_into`."""
        buffer = bytearray(length)
        self.get_range_into(key, offset, memoryview(buffer), e_tag=e_tag)
        return bytes(buffer)

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        try:
            self.head(key)
        except ObjectNotFound:
            return False
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"


class Multipart(ABC):
    """Uploads of objects in parts, which any process may send in any order.

    In a store without `Capabilities.multipart`, all these methods raise `Unsupported`.
    """

    @abstractmethod
    def create_multipart(
        self,
        key: str,
        *,
        part_size: int,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> str:
        """Begin an upload of equal parts (the last one may be smaller) and return its upload id.

        The id is valid in every process until complete or abort. Nothing is visible under the key before complete.

        Args:
            private: The same as for `put`.
        """

    @abstractmethod
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        """Store part `part_number` (from 1). A part sent again replaces the earlier one.

        Raises:
            NoSuchUpload: the upload was completed or aborted, or has expired.
        """

    @abstractmethod
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        """All parts that the store has, by number, from all pages.

        Raises:
            NoSuchUpload: the upload was completed or aborted, or has expired.
        """

    @abstractmethod
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        """All uploads under way whose keys start with `prefix`, from all pages."""

    @abstractmethod
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        """Make the object out of `parts` (numbered from 1 without gaps); it replaces an existing object of the key.

        After a lost response the upload is gone. The caller then checks the object to settle `NoSuchUpload`.

        Raises:
            NoSuchUpload: the upload was completed or aborted, or has expired.
            UploadIncomplete: the store does not hold these parts.
        """

    @abstractmethod
    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the upload and its parts; an unknown upload is not an error."""


class PutOptions(TypedDict, total=False):
    """The options of `Store.put`, for wrappers that pass them on."""

    mode: PutMode
    e_tag: str | None
    content_type: str
    private: bool


class Store(Reader, Multipart):
    """A place for objects: reads, writes of whole objects, and multipart uploads.

    Features that only some stores have are in `blobflow.stores.optional`.
    """

    @abstractmethod
    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> ObjectMeta:
        """Store all of `body` or nothing. When it returns, the object is durable and visible.

        Args:
            e_tag: With `PutMode.UPDATE`, the entity tag that the object must still have.
            private: If objects are files, only their owner may read this one. A bucket has its own rules.

        Raises:
            PreconditionFailed: with CREATE, the object exists. With UPDATE, it was replaced or does not exist.
            Unsupported: the mode is conditional, and the store lacks `Capabilities.conditional`.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; a missing object is not an error."""

    @abstractmethod
    def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy within the store; if the store can, the bytes do not pass through this process."""
