"""The Store protocol: where objects live, in the field's own vocabulary.

A store holds immutable byte strings under keys. Every method is synchronous, thread-safe and makes one attempt;
`blobflow.stores.retry.RetryingStore` repeats the attempts that failed for a passing reason. What each method
promises when it is called again after a crash or a lost answer stands in its docstring, and the contract suite in
`blobflow.testing.StoreContract` holds every implementation to it.
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
"""S3 allows 1,024 bytes; what is left is for the store's prefix and our own suffixes."""

RESERVED_SEGMENT = ".blobflow"
"""The local store keeps its uploads and locks below this name."""


class PutMode(Enum):
    """When a put may replace what is there."""

    OVERWRITE = "overwrite"
    CREATE = "create"
    """Only if the key is absent."""
    UPDATE = "update"
    """Only if the object still has the given e_tag (compare-and-swap)."""


class ObjectMeta(NamedTuple):
    """What a store says of an object without its bytes."""

    key: str
    size: int
    e_tag: str
    """Changes whenever the object is replaced, even by equal bytes in some stores. Opaque."""
    last_modified: datetime | None = None
    crc32c: int | None = None
    """Of the whole object, as the store tells it; whether that may be believed, `Capabilities.attests_crc32c` says."""
    metadata: Mapping[str, str] | None = None
    """What was put along with the bytes, where the store keeps such; names in lower case."""


class StoredObject(NamedTuple):
    """A small object, whole."""

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
    """What a store can do; plans are made from it."""

    multipart: bool = True
    """Parts in any order from any process, and resume by upload id."""
    conditional: bool = True
    """PutMode.CREATE and PutMode.UPDATE are atomic between processes."""
    min_part_size: int = 1
    """Bytes; the last part may be smaller."""
    max_part_size: int = 5 * 1024**3
    max_parts: int = 10_000
    max_put_size: int | None = None
    """Bytes of an object that is put in a single request; None: no limit that is known."""
    max_object_size: int | None = None
    """Bytes of any object, as its provider says; None: as many as `max_parts` of `max_part_size` have."""
    ranges: bool = True
    """A range of an object can be read. Without, nothing that is sent can be read back as artifacts are."""
    attests_crc32c: bool = False
    """The CRC32C that `head` tells was computed by the store itself, from the bytes that it keeps."""


def check_readable(store: Reader) -> None:
    """Refuse to send to a store from which nobody could read it; asking for its capabilities may send requests.

    Raises:
        Unsupported: its server ignores ranges.
    """
    if not store.capabilities().ranges:
        raise Unsupported(
            f"{store.url} cannot be read in ranges: what is sent there could not be verified or fetched",
            hint="`blobflow probe` shows what the server does; use another server, or another way to this one",
            store=store.url,
            capability="ranged GET",
        )


def check_put_size(store: Store, key: str, size: int) -> None:
    """Refuse an object that its store can only take in a single request, and that is too large for one.

    Raises:
        Unsupported: naming both sizes.
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
    """Refuse an object that is larger than its store takes any, before a byte of it is sent.

    Raises:
        Unsupported: naming both sizes.
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
    """Bytes on their way into a store: their number, their CRC32C, and the means to produce them again.

    Each attempt iterates anew, so that a retry never sends the rest of a half-read stream.

    Args:
        size: Total bytes.
        chunks: Gives the bytes from the start at every call, in buffers that are valid until the next one.
        crc32c: Checksum of all of them, if it is known beforehand.
        md5: Likewise; sent along by stores that can.
        metadata: Names and values to keep with the object. A store that cannot refuses it with `Unsupported`.
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
        """A body that lies in memory."""
        return cls(len(data), lambda: (data,), crc32c(data), metadata=metadata)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._chunks())

    def __repr__(self) -> str:
        return f"<Body {self.size} bytes>"


def plain(body: Buffer | Body, store: Store) -> Body:
    """`body` for a store that keeps nothing but bytes.

    Raises:
        Unsupported: it has metadata.
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
"""Most keys: nothing in them can be wrong but their length."""


def check_key(key: str) -> str:
    """`key` itself, if it is one: relative, `/`-separated, no empty, `.`, `..` or reserved segments.

    Raises:
        InvalidKey: naming the rule that is broken.
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
    """A place that objects are read from. Keys are relative to its URL, prefix included.

    Methods raise `ObjectNotFound`, `PreconditionFailed`, `NoSuchUpload`, `StoreUnavailable` (and its kinds),
    `TimedOut`, `StoreConfigurationError`, `InvalidKey`; nothing of the client library underneath escapes.
    """

    url: str
    """For people and metadata; never with credentials."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the store can do. The first call may send requests, where that has to be found out first."""

    @abstractmethod
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        """A small object whole.

        Raises:
            ObjectTooLarge: it has more than `max_bytes`; at most one chunk beyond that was read.
        """

    @abstractmethod
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        """Fill `buffer` with the object's bytes from `offset`.

        Args:
            e_tag: Pins the object: another one under the same key is refused.

        Raises:
            ObjectChanged: the object no longer has `e_tag`.
            SizeMismatch: the object ends before the buffer is full.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectMeta:
        """What the store says of the object."""

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
    """Objects made of parts, which any process may send in any order.

    In a store without `Capabilities.multipart` all of these raise `Unsupported`.
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
            private: As for `put`.
        """

    @abstractmethod
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        """Store part `part_number` (from 1). A part sent again replaces the earlier one.

        Raises:
            NoSuchUpload: completed, aborted or expired.
        """

    @abstractmethod
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        """All parts the store has, by number, from all pages.

        Raises:
            NoSuchUpload: completed, aborted or expired.
        """

    @abstractmethod
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        """All uploads under way whose keys start with `prefix`, from all pages."""

    @abstractmethod
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        """Make the object out of `parts` (dense from 1), replacing what the key held.

        After a lost answer the upload is gone: the caller settles `NoSuchUpload` by looking at the object.

        Raises:
            NoSuchUpload: completed, aborted or expired.
            UploadIncomplete: the store does not hold these parts.
        """

    @abstractmethod
    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the upload and its parts; unknown is not an error."""


class PutOptions(TypedDict, total=False):
    """The options of `Store.put`, for wrappers that pass them on."""

    mode: PutMode
    e_tag: str | None
    content_type: str
    private: bool


class Store(Reader, Multipart):
    """A place for objects: what reads, what writes a whole object, and multipart uploads.

    What only some stores can do besides is in `blobflow.stores.optional`.
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
        """Store `body` whole or not at all; once it returns, the object is durable and visible.

        Args:
            e_tag: With `PutMode.UPDATE`, the entity tag the object must still have.
            private: Where objects are files: nobody but their owner reads it. A bucket has its own rules.

        Raises:
            PreconditionFailed: the object exists (CREATE), or is another or absent (UPDATE).
            Unsupported: a conditional mode on a store without `Capabilities.conditional`.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; absent is not an error."""

    @abstractmethod
    def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy within the store without moving the bytes through this process where the store can."""
