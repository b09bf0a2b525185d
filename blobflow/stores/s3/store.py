"""The S3 store: AWS and every server that speaks the S3 protocol (Ceph, MinIO, R2 ...).

This module makes the requests and interprets the responses. Addresses, credentials and signatures are in
`blobflow.stores.s3.endpoint`, a single request and its errors in `blobflow.stores.s3.requests`, the connections in
`blobflow.http.client`, and the documents in `blobflow.stores.s3.xml`. No client of a client library is used. Every call
is one attempt, with a new signature.

Checksums: every body goes out with its CRC32C in a header, never with a trailer, and unsigned otherwise; an upload is
created with a CRC32C of the full object and completed with the combination of its parts. A server that refuses one of
these headers is asked again without, and the store remembers. What a server does with them is another matter (Ceph
16 and moto accept wrong ones): `blobflow.stores.probe` finds out, and the option `content_md5` sends what Ceph checks.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import quote

from typing_extensions import override

from blobflow.checksum import Buffer, combine_all
from blobflow.errors import (
    BlobflowError,
    NoSuchUpload,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
    SizeMismatch,
    StoreConfigurationError,
    StoreUnavailable,
    Unsupported,
    UploadIncomplete,
    UsageError,
)
from blobflow.stores.base import (
    Body,
    Capabilities,
    ObjectMeta,
    PartMeta,
    PutMode,
    Store,
    StoredObject,
    UploadMeta,
    check_key,
)
from blobflow.stores.optional import Coroutines, HasClock, HasCoroutines, HasServer, ObjectAddress, Server, cannot_copy
from blobflow.stores.s3.errors import BOTOCORE_ERRORS, RequestContext, changed, cut_short, refuses_checksums
from blobflow.stores.s3.messages import object_meta, put_headers, put_result, stored
from blobflow.stores.s3.options import S3Options, largest_object
from blobflow.stores.s3.requests import S3Requests
from blobflow.stores.s3.xml import (
    Made,
    quoted,
    read_made,
    read_objects,
    read_parts,
    read_upload_id,
    read_uploads,
    write_completion,
    write_crc32c,
)

__all__ = ["S3Options", "S3Store"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

MIN_PART_BYTES = 5 * 1024**2
MAX_PART_BYTES = 5 * 1024**3
MAX_PARTS = 10_000
MAX_PUT_BYTES = 5 * 1024**3
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""

COPY_LIMIT_BYTES = 5 * 1024**3
"""CopyObject takes no more; larger objects are copied in parts."""
COPY_PART_BYTES = 512 * 1024**2


PAGE = 1000
"""Entries per listing page: what S3 gives at most."""

ABORT_ROUNDS = 5
"""A part that was under way while its upload was aborted may appear afterwards; then it is aborted again."""


_EMPTY = {"Content-Length": "0"}


class S3Store(S3Requests, Store, HasServer, HasClock, HasCoroutines):
    """Objects in a bucket, below a prefix.

    Threads share a store. A forked child makes new connections at its first call. Nothing is sent before the first
    call, so wrong credentials are reported there.
    """

    def __init__(self, options: S3Options) -> None:
        super().__init__(options)
        self._capabilities = Capabilities(
            min_part_size=MIN_PART_BYTES,
            max_part_size=MAX_PART_BYTES,
            max_parts=MAX_PARTS,
            max_put_size=MAX_PUT_BYTES,
            max_object_size=options.max_object_size or largest_object(options.endpoint_url),
        )
        self._checksummed_uploads = True
        self._bare_if_match = False

    @override
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    @override
    def server(self) -> Server:
        return Server(self.connected().endpoint, self._software)

    @override
    def server_time_s(self) -> float | None:
        date, at = self._answered
        try:
            return parsedate_to_datetime(date).timestamp() + time.monotonic() - at
        except ValueError:
            return None

    # Objects

    @override
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
        """See `Store.put`. A conflict with a concurrent write (409) is a retryable `StoreUnavailable`."""
        check_key(key)
        if (mode is PutMode.UPDATE) != (e_tag is not None):
            raise UsageError("an e_tag belongs to PutMode.UPDATE, and to it alone", key=key)
        content = body if isinstance(body, Body) else Body.of(body)
        headers = put_headers(content, content_type)
        if mode is PutMode.CREATE:
            headers["If-None-Match"] = "*"
        elif e_tag is not None:
            headers["If-Match"] = e_tag.strip('"') if self._bare_if_match else e_tag
        call = RequestContext("put", key, conditional=mode is not PutMode.OVERWRITE, e_tag=e_tag)
        # A conditional write must not be repeated unseen: it would meet its own success and call it a lost race.
        try:
            answered, _ = self._upload(call, content, headers, idempotent=mode is PutMode.OVERWRITE)
        except PreconditionFailed as lost:
            if mode is not PutMode.UPDATE or self._bare_if_match:
                raise
            # Ceph 16 compares with its own spelling, which has no quotes. If the object has the very tag it was
            # said not to have, try that spelling; a race that is really lost is lost again.
            try:
                actual = self.head(key).e_tag
            except ObjectNotFound:
                raise lost from None
            if actual != e_tag:
                raise PreconditionFailed(lost.message, key=key, expected=e_tag, actual=actual) from lost
            headers["If-Match"] = actual.strip('"')
            answered, _ = self._upload(call, content, headers, idempotent=False)
            self._bare_if_match = True
        return put_result(call, content, answered)

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)
        call = RequestContext("get", key)
        with self._exchange(call, "GET", self.full_key(key), headers={"x-amz-checksum-mode": "ENABLED"}) as answer:
            size = answer.length
            # One byte more than allowed tells an object of unknown size that just fits from one that does not.
            data = answer.read(max_bytes + 1) if size is None or size <= max_bytes else b""
            return stored(call, answer.headers, data, size, max_bytes)

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        check_key(key)
        buffer = buffer.cast("B")
        wanted = len(buffer)
        if not wanted:
            return
        call = RequestContext("get range", key, offset=offset, e_tag=e_tag)
        headers = {"Range": f"bytes={offset}-{offset + wanted - 1}"}
        if e_tag is not None:
            headers["If-Match"] = e_tag
        with self._exchange(call, "GET", self.full_key(key), headers=headers) as answer:
            given = answer.headers.get("content-range", "")
            covered = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", given.strip())
            # Whether it is a range, Content-Range says: `rclone serve s3` answers one with 200.
            if covered is None and (answer.status != 206 or not given):
                raise Unsupported(
                    f"{call}: the server ignores ranges (status {answer.status})",
                    store=self.url,
                    capability="ranged GET",
                )
            found = quoted(answer.headers.get("etag", ""))
            if e_tag is not None and found and found != e_tag:
                raise changed(key, e_tag, found)
            if covered is None or int(covered[1]) != offset:
                raise StoreUnavailable(
                    f"{call}: asked for {headers['Range']!r}, got {given[:100]!r}",
                    operation=call.operation,
                    key=key,
                    offset=offset,
                )
            end = int(covered[2]) + 1
            if end < offset + wanted:
                raise SizeMismatch(
                    f"{key!r} ends at {end}, before {offset + wanted}",
                    what=f"object {key!r}",
                    expected=offset + wanted,
                    actual=end,
                )
            received = answer.read_into(buffer)
            if received < wanted:
                raise cut_short(call, received, wanted)

    @override
    def head(self, key: str) -> ObjectMeta:
        check_key(key)
        call = RequestContext("head", key)
        try:
            with self._exchange(call, "HEAD", self.full_key(key), headers={"x-amz-checksum-mode": "ENABLED"}) as answer:
                headers = answer.headers
        except StoreConfigurationError as error:
            if error.status in (400, 403) and not error.code:
                raise self._reason(call) from error
            raise
        size = headers.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,19}", size):
            raise self._not_understood(call, "it tells no size")
        return object_meta(key, int(size), headers)

    def _reason(self, refused: RequestContext) -> BlobflowError:
        """Why a HEAD was refused: its answer has no body that could say so, but that of a GET has.

        What passes (a token that has just expired, a clock that is off) looks like a lack of permission otherwise.
        """
        try:
            with self._exchange(refused, "GET", self.full_key(refused.key or ""), headers={"Range": "bytes=0-0"}):
                pass
        except SizeMismatch:
            pass  # an empty object, and we may read it
        except BlobflowError as reason:
            return reason
        return StoreUnavailable(f"{refused} was refused, but a GET was not", operation="head", key=refused.key)

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        """See `Store.list`. Keys that no store method takes (`a//b`, folder markers) are passed over."""
        query = {
            "list-type": "2",
            "encoding-type": "url",  # XML 1.0 cannot write every key
            "max-keys": str(PAGE),
            "prefix": self._prefix + prefix,
        }
        if start_after is not None:
            query["start-after"] = self._prefix + start_after
        last = ""
        while True:
            page = self._ask(RequestContext("list", prefix or None), "GET", "", query, read=read_objects)
            progress = False
            for entry in page.entries:
                if entry.key <= last:
                    continue
                last, progress = entry.key, True
                key = self._relative(entry.key)
                if key is not None and (start_after is None or key > start_after):
                    yield ObjectMeta(key, entry.size, entry.e_tag, entry.modified)
            if page.next_token is None:
                return
            if not progress:
                raise self._not_understood(
                    RequestContext("list", prefix or None), f"the listing stands still at {last!r}"
                )
            query["continuation-token"] = page.next_token

    @override
    def delete(self, key: str) -> None:
        check_key(key)
        try:
            with self._exchange(RequestContext("delete", key), "DELETE", self.full_key(key)):
                pass
        except ObjectNotFound:
            _log.debug("delete_absent key=%s", key)

    @override
    def copy(self, source: str, target: str) -> ObjectMeta:
        """See `Store.copy`. The source is pinned: replaced meanwhile, the copy fails with `ObjectChanged`."""
        check_key(target)
        return self._copy(self._path(source), self.head(source), target)

    @override
    def address_of(self, key: str) -> ObjectAddress:
        check_key(key)
        access = self.connected()
        try:
            identity = access.identity()
        except BOTOCORE_ERRORS as error:
            raise self.failed(error, RequestContext("connect to", self.options.bucket)) from error
        return ObjectAddress(access.server, identity, self._path(key))

    @override
    def copy_from(self, address: ObjectAddress, meta: ObjectMeta, target: str) -> ObjectMeta:
        """See `HasServer.copy_from`. Objects of any bucket of the server that this identity may read."""
        if self.address_of(target)[:2] != address[:2]:
            raise cannot_copy(self, address)
        return self._copy(address.path, meta, target)

    def _path(self, key: str) -> str:
        return f"{self.options.bucket}/{self.full_key(key)}"

    def _copy(self, path: str, found: ObjectMeta, target: str) -> ObjectMeta:
        headers = {
            "x-amz-copy-source": quote(path, safe="-_.~/"),
            "x-amz-copy-source-if-match": found.e_tag,
        }
        call = RequestContext("copy", found.key, e_tag=found.e_tag)
        if found.size <= COPY_LIMIT_BYTES:
            made = self._ask(call, "PUT", self.full_key(target), headers=headers | _EMPTY, read=read_made, patient=True)
            return ObjectMeta(target, found.size, self._tag(made.e_tag, call), made.modified, made.crc32c)
        part_size = max(COPY_PART_BYTES, -(-found.size // MAX_PARTS))
        upload_id = self.create_multipart(target, part_size=part_size)
        try:
            parts: list[PartMeta] = []
            for number, offset in enumerate(range(0, found.size, part_size), start=1):
                size = min(part_size, found.size - offset)
                made = self._ask(
                    call,
                    "PUT",
                    self.full_key(target),
                    {"partNumber": str(number), "uploadId": upload_id},
                    headers=headers | _EMPTY | {"x-amz-copy-source-range": f"bytes={offset}-{offset + size - 1}"},
                    read=read_made,
                    patient=True,
                )
                parts.append(PartMeta(number, size, self._tag(made.e_tag, call), made.crc32c))
            return self.complete_multipart(target, upload_id, parts)
        except BaseException:
            self.abort_multipart(target, upload_id)
            raise

    # Multipart uploads

    @override
    def create_multipart(
        self,
        key: str,
        *,
        part_size: int,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> str:
        check_key(key)
        if part_size > MAX_PART_BYTES:
            raise UsageError(f"parts have at most {MAX_PART_BYTES} bytes, not {part_size}", key=key)
        headers = {"Content-Type": content_type, **_EMPTY}
        call = RequestContext("create upload of", key)
        if self._checksummed_uploads:
            checks = {"x-amz-checksum-algorithm": "CRC32C", "x-amz-checksum-type": "FULL_OBJECT"}
            try:
                return self._create(call, headers | checks)
            except BlobflowError as error:
                if not refuses_checksums(error.__cause__):
                    raise
                self._checksummed_uploads = False
                _log.info("checksum_refused store=%s operation=%r", self.url, call.operation)
        return self._create(call, headers)

    def _create(self, call: RequestContext, headers: Mapping[str, str]) -> str:
        # Repeated unseen, it would leave an upload that nobody knows.
        upload_id = self._ask(
            call,
            "POST",
            self.full_key(call.key or ""),
            {"uploads": ""},
            headers=headers,
            read=read_upload_id,
            idempotent=False,
        )
        if not upload_id:
            raise StoreUnavailable(f"no upload id returned for {call.key!r}", operation=call.operation, key=call.key)
        return upload_id

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        check_key(key)
        if not 1 <= part_number <= MAX_PARTS:
            raise UsageError(f"part numbers go from 1 to {MAX_PARTS}, not {part_number}", key=key)
        call = RequestContext(f"upload part {part_number} of", key, upload_id=upload_id)
        query = {"partNumber": str(part_number), "uploadId": upload_id}
        answered, crc = self._upload(call, body, {}, query)
        e_tag = answered.get("etag")
        if not e_tag:
            raise StoreUnavailable(
                f"no ETag returned for part {part_number} of {key!r}", operation=call.operation, key=key
            )
        return PartMeta(part_number, body.size, quoted(e_tag), crc)

    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        return self.list_parts_by(key, upload_id, PAGE)

    def list_parts_by(self, key: str, upload_id: str, page_size: int) -> list[PartMeta]:
        """`list_parts` in pages of at most `page_size`."""
        check_key(key)
        call = RequestContext("list parts of", key, upload_id=upload_id)
        found: dict[int, PartMeta] = {}
        last = 0
        while True:
            page = self._ask(
                call,
                "GET",
                self.full_key(key),
                {"uploadId": upload_id, "part-number-marker": str(last), "max-parts": str(page_size)},
                read=read_parts,
            )
            found.update((part.part_number, part) for part in page.entries)
            newest = max(found, default=0)
            # A full page may not be the last one, even without IsTruncated: if a server forgets it, data would be lost.
            if not page.truncated and len(page.entries) < page_size:
                return [found[number] for number in sorted(found)]
            if newest <= last:
                if not page.truncated:
                    return [found[number] for number in sorted(found)]
                raise self._not_understood(call, f"the list stands still at part {last}")
            last = newest

    @override
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        # Not encoding-type: Ceph 16 encodes these keys then, and does not say so.
        query = {"uploads": "", "max-uploads": str(PAGE), "prefix": self._prefix + prefix}
        found: dict[tuple[str, str], UploadMeta] = {}
        seen: set[tuple[str, str]] = set()
        while True:
            page = self._ask(RequestContext("list uploads", prefix or None), "GET", "", query, read=read_uploads)
            for entry in page.entries:
                key = self._relative(entry.key)
                if key is not None and key.startswith(prefix):
                    found[entry.key, entry.upload_id] = UploadMeta(key, entry.upload_id, entry.initiated)
            if page.next_markers is None:
                return [found[name] for name in sorted(found)]
            if page.next_markers in seen:  # a page with only foreign uploads still makes progress
                raise self._not_understood(RequestContext("list uploads", prefix or None), "the list stands still")
            seen.add(page.next_markers)
            query["key-marker"], query["upload-id-marker"] = page.next_markers

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        """See `Store.complete_multipart`.

        The size of the whole goes along, and its CRC32C where all parts have one: a server that checks them refuses
        a wrong whole.
        """
        check_key(key)
        call = RequestContext("complete upload of", key, upload_id=upload_id)
        for expected, part in enumerate(parts, start=1):
            if part.part_number != expected:
                raise UploadIncomplete(
                    f"part {expected} of {key!r} is missing: part {part.part_number} stands in its place",
                    key=key,
                    expected=expected,
                    actual=part.part_number,
                )
        if not parts:
            raise UploadIncomplete(f"an upload of {key!r} without parts cannot be completed", key=key, actual=0)
        size = sum(part.size for part in parts)
        body = write_completion(parts)
        checks = {"x-amz-mp-object-size": str(size)}
        known = [(part.crc32c, part.size) for part in parts if part.crc32c is not None]
        if len(known) == len(parts):
            checks |= {
                "x-amz-checksum-type": "FULL_OBJECT",
                "x-amz-checksum-crc32c": write_crc32c(combine_all(known)),
            }

        def complete(headers: Mapping[str, str]) -> Made:
            # Repeated unseen, it would meet its own success and call it an unknown upload.
            return self._ask(
                call,
                "POST",
                self.full_key(key),
                {"uploadId": upload_id},
                headers={**headers, "Content-Type": "application/xml", "Content-Length": str(len(body))},
                body=body,
                read=read_made,
                patient=True,
                idempotent=False,
            )

        try:
            made = complete(checks)
        except BlobflowError as error:
            if not refuses_checksums(error.__cause__):
                raise
            _log.info("checksum_refused store=%s operation=%r", self.url, call.operation)
            made = complete({})
        if not made.e_tag:  # Ceph 16 leaves it empty
            there = self.head(key)
            if there.size != size:
                raise ObjectChanged(f"{key!r} was replaced as soon as it was complete", key=key, actual=there.e_tag)
            return there
        return ObjectMeta(key, size, made.e_tag, crc32c=made.crc32c)

    @override
    def abort_multipart(self, key: str, upload_id: str) -> None:
        check_key(key)
        call = RequestContext("abort upload of", key, upload_id=upload_id)
        try:
            for _ in range(ABORT_ROUNDS):
                with self._exchange(call, "DELETE", self.full_key(key), {"uploadId": upload_id}):
                    pass
                if not self._has_parts(key, upload_id):
                    return
        except NoSuchUpload:
            return
        raise StoreUnavailable(
            f"parts of {key!r} are still there after {ABORT_ROUNDS} aborts; somebody keeps sending them",
            operation="abort",
            key=key,
        )

    def _has_parts(self, key: str, upload_id: str) -> bool:
        """Whether an aborted upload still has listed parts; False if the server does not list parts."""
        try:
            return bool(self.list_parts(key, upload_id))
        except Unsupported:
            return False

    @override
    def coroutines(self) -> Coroutines | None:
        """See `Store.coroutines`; None where a proxy is in between."""
        if not self.connected().is_direct:
            return None
        # Loads asyncio, which only batches need.
        from blobflow.stores.s3.coroutines import S3Coroutines

        return S3Coroutines(self)
