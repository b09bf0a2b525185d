"""What the server holds in memory: buckets, objects, uploads; and a request for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from crc32c import crc32c

from tests.strict_s3.errors import base64_of
from tests.strict_s3.faults import Exchange


@dataclass(frozen=True)
class Limits:
    """AWS's numbers; tests make them small."""

    min_part_size: int = 5 * 1024**2
    max_part_size: int = 5 * 1024**3
    """Also the most that PutObject and CopyObject take."""
    max_parts: int = 10_000
    page_size: int = 1000
    """Entries per page of any listing, at most."""
    lists_parts: bool = True
    """Without, ListParts and the listing of uploads are refused, as small servers for development do."""
    gives_ranges: bool = True
    """Without, a GET of a range is answered with the whole object, as small servers for development do."""
    parts_outlive_abort: bool = False
    """A part whose request began before an abort is stored after it, and has to be aborted again."""


@dataclass(frozen=True)
class Content:
    """Bytes and what S3 tells of them."""

    data: bytes

    @cached_property
    def e_tag(self) -> str:
        return hashlib.md5(self.data, usedforsecurity=False).hexdigest()

    @cached_property
    def crc32c(self) -> str:
        return base64_of(crc32c(self.data).to_bytes(4, "big"))


@dataclass(frozen=True)
class StoredObject:
    data: bytes = field(repr=False)
    e_tag: str
    modified: float
    content_type: str
    checksum: str | None = None
    checksum_type: str | None = None


@dataclass
class Upload:
    key: str
    id: str
    initiated: float
    content_type: str
    algorithm: str | None
    checksum_type: str | None
    parts: dict[int, tuple[Content, float]] = field(default_factory=dict)
    aborted_after: int = 0
    """The number of the last request that had begun when it was aborted; 0 if it was not."""


@dataclass
class Bucket:
    objects: dict[str, StoredObject] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    deleted_after: dict[str, int] = field(default_factory=dict)
    """By key, the number of the last request that had begun when it was deleted."""


def is_listed(upload: Upload) -> bool:
    """Whether it can be seen: an aborted one only while parts of it came late."""
    return not upload.aborted_after or bool(upload.parts)


class Request(NamedTuple):
    exchange: Exchange
    target: str
    body: bytes
    authorization: str

    @property
    def headers(self) -> dict[str, str]:
        return self.exchange.headers

    @property
    def query(self) -> dict[str, str]:
        return self.exchange.query

    @property
    def key(self) -> str:
        return self.exchange.key
