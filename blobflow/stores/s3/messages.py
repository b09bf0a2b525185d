"""Headers of S3 requests and responses that describe an object."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping

from blobflow.checksum import crc32c
from blobflow.errors import ObjectTooLarge, StoreUnavailable, UsageError
from blobflow.stores.base import Body, ObjectMeta, StoredObject
from blobflow.stores.s3.errors import RequestContext, cut_short
from blobflow.stores.s3.xml import quoted, read_crc32c, read_time, write_crc32c


def stored(
    call: RequestContext, headers: Mapping[str, str], data: bytes, size: int | None, max_bytes: int
) -> StoredObject:
    """The object in the response to a GET.

    Args:
        data: The body, or more than `max_bytes` of it; empty if `size` is already too large.
        size: Size that the server announced; None if it announced none.

    Raises:
        ObjectTooLarge: see `Store.get`.
        StoreUnavailable: the response ended early.
    """
    key = call.key or ""
    if len(data) > max_bytes or (size is not None and size > max_bytes):
        raise ObjectTooLarge(f"{key!r} has more than {max_bytes} bytes", key=key, limit=max_bytes)
    if size is not None and len(data) < size:
        raise cut_short(call, len(data), size)
    return StoredObject(data, object_meta(key, len(data), headers))


def put_result(call: RequestContext, body: Body, answered: Mapping[str, str]) -> ObjectMeta:
    """The description of the object in the response to a PUT.

    Raises:
        StoreUnavailable: the response lacks a part of the description.
    """
    key = call.key or ""
    if not answered.get("etag"):
        raise StoreUnavailable(f"no ETag returned for {key!r}", operation="put", key=key)
    return ObjectMeta(key, body.size, quoted(answered["etag"]), None, whole_crc32c(answered), body.metadata)


def put_headers(body: Body, content_type: str = "application/octet-stream") -> dict[str, str]:
    """The headers that describe an object to be put.

    Raises:
        UsageError: its metadata cannot be headers.
    """
    headers = {"Content-Type": content_type}
    for name, value in (body.metadata or {}).items():
        if not re.fullmatch("[a-z0-9-]+", name) or not re.fullmatch(r"[!-~](?:[ -~]*[!-~])?", value) or "  " in value:
            raise UsageError(
                f"metadata {name!r} cannot be kept by S3",
                hint="names: lower-case letters, digits and '-'; values: printable ASCII, single spaces between words",
            )
        headers[f"x-amz-meta-{name}"] = value
    return headers


def is_intact(body: Body, headers: Mapping[str, str]) -> bool:
    """Whether a body, read once more, still has the checksums of its headers. If so, it was damaged on the way."""
    crc, md5 = digests(body, with_md5="Content-MD5" in headers)
    actual = {"x-amz-checksum-crc32c": write_crc32c(crc), "Content-MD5": _base64(md5)}
    return all(headers.get(name, value) == value for name, value in actual.items())


def damaged(call: RequestContext) -> StoreUnavailable:
    """A body that the server refuses and that is intact here was damaged on the way."""
    return StoreUnavailable(f"{call}: damaged on the way", operation=call.operation, key=call.key)


def with_checksums(headers: Mapping[str, str], body: Body, crc: int | None, md5: bytes | None) -> dict[str, str]:
    """`headers`, with the length and the checksums of a body added."""
    given = {**headers, "Content-Length": str(body.size)}
    if md5 is not None:
        given["Content-MD5"] = _base64(md5)
    if crc is not None:
        given["x-amz-checksum-crc32c"] = write_crc32c(crc)
    return given


def object_meta(key: str, size: int, headers: Mapping[str, str]) -> ObjectMeta:
    """The description of an object in the headers of a response."""
    metadata = {n.removeprefix("x-amz-meta-"): v for n, v in headers.items() if n.startswith("x-amz-meta-")}
    modified = read_time(headers.get("last-modified"))
    return ObjectMeta(key, size, quoted(headers.get("etag", "")), modified, whole_crc32c(headers), metadata or None)


def whole_crc32c(headers: Mapping[str, str]) -> int | None:
    """The CRC32C of the whole object, if the headers of a response have it."""
    whole = headers.get("x-amz-checksum-type") != "COMPOSITE"
    return read_crc32c(headers.get("x-amz-checksum-crc32c")) if whole else None


def digests(body: Body, *, with_md5: bool) -> tuple[int, bytes]:
    """CRC32C and MD5 of a body, which is read for it; the MD5 costs ten times as much, and is of nothing without."""
    crc, md5 = 0, hashlib.md5(usedforsecurity=False)
    for chunk in body:
        crc = crc32c(chunk, crc)
        if with_md5:
            md5.update(chunk)
    return crc, md5.digest()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
