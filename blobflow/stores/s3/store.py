"""The S3 store: AWS and everything that speaks its language (Ceph, MinIO, R2 ...).

What S3 is asked, and what its answers mean. Where it is, who is asking and how that is signed is in
`blobflow.stores.s3.endpoint`, the wire in `blobflow.http.client`, the documents in `blobflow.stores.s3.xml`; there is
no client library's client. Every call is one attempt, signed for itself.

Checksums: every body goes out with its CRC32C in a header, never with a trailer, and unsigned otherwise; an upload is
created with a CRC32C of the full object and completed with the combination of its parts. A server that refuses one of
these headers is asked again without, and the store remembers. What a server does with them is another matter (Ceph
16 and moto accept wrong ones): `blobflow.stores.probe` finds out, and the option `content_md5` sends what Ceph checks.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import quote

from typing_extensions import override

from blobflow.checksum import Buffer, combine_all, crc32c
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    InvalidKey,
    NoSuchUpload,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    SizeMismatch,
    StoreConfigurationError,
    StoreUnavailable,
    Unsupported,
    UploadIncomplete,
    UsageError,
)
from blobflow.forks import reset_after_fork_of
from blobflow.http.client import HttpError, Response
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
from blobflow.stores.s3.endpoint import UNSIGNED_PAYLOAD, S3Endpoint
from blobflow.stores.s3.errors import (
    BOTOCORE_ERRORS,
    HINTS,
    STALE_CREDENTIALS,
    RequestContext,
    S3Error,
    changed,
    cut_short,
    refuses_checksums,
    translate,
)
from blobflow.stores.s3.options import S3Options, largest_object
from blobflow.stores.s3.xml import (
    MAX_ANSWER_BYTES,
    ErrorResponse,
    Made,
    MalformedResponse,
    quoted,
    read_crc32c,
    read_made,
    read_objects,
    read_parts,
    read_time,
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

PATIENCE_S = 900.0
"""Complete and copy answer when the server is done with gigabytes, which may take minutes without a byte."""

PAGE = 1000
"""Entries per listing page: what S3 gives at most."""

ABORT_ROUNDS = 5
"""A part that was under way while its upload was aborted may appear afterwards; then it is aborted again."""

_SKEW_S = 60.0
"""Less is not why a request is refused: S3 takes a quarter of an hour."""

_EMPTY = {"Content-Length": "0"}


class S3Store(Store, HasServer, HasClock, HasCoroutines):
    """Objects in a bucket, below a prefix.

    Threads share a store. A forked child makes connections of its own at its first call.
    Nothing is sent before the first call, so wrong credentials show there.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options
        self._prefix = options.prefix.strip("/") + "/" if options.prefix.strip("/") else ""
        self.url = f"s3://{options.bucket}/{self._prefix}".rstrip("/")
        self._capabilities = Capabilities(
            min_part_size=MIN_PART_BYTES,
            max_part_size=MAX_PART_BYTES,
            max_parts=MAX_PARTS,
            max_put_size=MAX_PUT_BYTES,
            max_object_size=options.max_object_size or largest_object(options.endpoint_url),
        )
        self._access: S3Endpoint | None = None
        self.checksum_headers = True
        """Whether the server takes CRC32C headers, as far as is known."""
        self._checksummed_uploads = True
        self._bare_if_match = False
        self._software = ""
        self._answered = ("", 0.0)
        self._region: str | None = None
        """Where the bucket is, once a server has said that it is elsewhere."""
        self._skew_s = 0.0
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`; only the child's copies of the descriptors are closed, the parent's live on."""
        self._connecting = threading.Lock()
        self.close()

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
        return _meta(key, int(size), headers)

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
            # A full page is not believed to be the last one: a server that forgets IsTruncated would cost data.
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
            if page.next_markers in seen:  # a page of nothing but foreign uploads is no standstill
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
        """Whether an upload that was aborted still has parts; a server that lists none is taken at its word."""
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

    @override
    def close(self) -> None:
        access, self._access = self._access, None
        if access is not None:
            access.close()

    # Requests

    def full_key(self, key: str) -> str:
        """The key with the prefix; that is the bucket's own for the empty one."""
        return self._prefix + key

    def _relative(self, full: str) -> str | None:
        """The key behind the prefix, or None if somebody put something there that is no key."""
        try:
            return check_key(full.removeprefix(self._prefix)) if full.startswith(self._prefix) else None
        except InvalidKey:
            _log.debug("foreign_key store=%s key=%r", self.url, full)
            return None

    @staticmethod
    def _tag(e_tag: str, call: RequestContext) -> str:
        if not e_tag:
            raise StoreUnavailable(f"no ETag returned for {call.key!r}", operation=call.operation, key=call.key)
        return e_tag

    def connected(self) -> S3Endpoint:
        """This process's way to the bucket."""
        access = self._access
        if access is None:
            with self._connecting:
                access = self._access
                if access is None:
                    try:
                        options = self.options.model_copy(update={"region": self._region or self.options.region})
                        access = self._access = S3Endpoint(options, skew_s=self._skew_s)
                    except (*BOTOCORE_ERRORS, ValueError, OSError) as error:
                        raise translate(error, RequestContext("connect to", self.options.bucket)) from error
        return access

    @contextmanager
    def _exchange(
        self,
        call: RequestContext,
        method: str,
        full_key: str,
        query: Mapping[str, str] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        payload: str = UNSIGNED_PAYLOAD,
        idempotent: bool = True,
        patient: bool = False,
    ) -> Generator[Response, None, None]:
        """One request; gives the answer if it is a success. All errors come out as ours.

        Args:
            full_key: With the prefix; empty for the bucket itself.
            payload: See `S3Endpoint.signed`.
            idempotent: It may be sent again unseen where a connection turns out to be dead.
            patient: The server may be silent for minutes.
        """
        access = self.connected()
        target = access.target(full_key) + _written(query or {})
        given = headers or {}
        try:
            with access.client.send(
                method,
                target,
                lambda: access.signed(method, target, given, payload),
                body,
                idempotent=idempotent,
                idle_timeout_s=max(PATIENCE_S, self.options.idle_timeout) if patient else None,
            ) as answer:
                self.heard(answer.headers)
                refusal = None if answer.status < 300 else S3Error.by_answer(answer)
                if refusal is None:
                    yield answer
            if refusal is not None:  # raised out here, so that the connection survives a mere "no"
                raise refusal
        except HttpError as error:
            if call.offset is not None or body is not None or error.moved:
                call = replace(call, offset=(call.offset or 0) + error.moved)
            raise self.failed(error, call) from error
        except (S3Error, *BOTOCORE_ERRORS) as error:
            raise self.failed(error, call, access) from error

    def _ask(
        self,
        call: RequestContext,
        method: str,
        full_key: str,
        query: Mapping[str, str] | None = None,
        *,
        read: Callable[[bytes], _T],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        patient: bool = False,
        idempotent: bool = True,
    ) -> _T:
        """One request that is answered with a document, as `read` understands it; see `_exchange`.

        What cannot be understood of a GET is asked for once more: a byte may have been damaged on the way.
        """
        may_ask_again = method == "GET"
        while True:
            document, size, answered = self._document(
                call, method, full_key, query, headers=headers, body=body, patient=patient, idempotent=idempotent
            )
            try:
                return read(document)
            except MalformedResponse as error:
                if error.ended_early and (size is None or document):
                    raise cut_short(call, len(document), None) from error
                if not may_ask_again:
                    raise self._not_understood(call, str(error)) from error
                may_ask_again = False
            except ErrorResponse as error:
                # What fails after it began may succeed another time, as botocore has it too, unless the code says more.
                refusal = S3Error(500, error.code, error.message, answered)
                raise self.failed(refusal, call) from refusal

    def _document(
        self,
        call: RequestContext,
        method: str,
        full_key: str,
        query: Mapping[str, str] | None,
        *,
        headers: Mapping[str, str] | None,
        body: bytes | None,
        patient: bool,
        idempotent: bool,
    ) -> tuple[bytes, int | None, Mapping[str, str]]:
        """The document that a request is answered with, its length if the server said it, and the answer's headers."""
        with self._exchange(
            call,
            method,
            full_key,
            query,
            headers=headers,
            body=None if body is None else Body(len(body), lambda: (body,)),
            payload=UNSIGNED_PAYLOAD if body is None else hashlib.sha256(body).hexdigest(),
            idempotent=idempotent,
            patient=patient,
        ) as answer:
            size, document = answer.length, answer.read(MAX_ANSWER_BYTES)
            answered = answer.headers
        if len(document) == MAX_ANSWER_BYTES:
            raise self._not_understood(call, f"it has more than {MAX_ANSWER_BYTES} bytes and does not end")
        if size is not None and len(document) < size:
            raise cut_short(call, len(document), size)
        return document, size, answered

    def _not_understood(self, call: RequestContext, reason: str) -> Unsupported:
        """An answer in another dialect. It is final: the server would give it the next time as well."""
        return Unsupported(
            f"{call}: the answer of {self.connected().endpoint} cannot be understood: {reason}",
            hint="check that the endpoint is an S3 API and not a web page; `blobflow probe` shows what it can do",
            store=self.url,
            capability=call.operation,
            key=call.key,
        )

    def _upload(
        self,
        call: RequestContext,
        body: Body,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None = None,
        *,
        idempotent: bool = True,
    ) -> tuple[dict[str, str], int]:
        """PUT a body with its checksums; returns the answer's headers and the CRC32C."""
        crc, md5 = self.checksums_of(body, call)
        if self.checksum_headers:
            try:
                return self._put(call, body, with_checksums(headers, body, crc, md5), query, idempotent=idempotent), crc
            except BlobflowError as error:
                if not self.has_refused_checksums(error, call):
                    raise
        return self._put(call, body, with_checksums(headers, body, None, md5), query, idempotent=idempotent), crc

    def has_refused_checksums(self, error: BlobflowError, call: RequestContext) -> bool:
        """Whether the server turned a request down for its checksum header, which it will not get again then."""
        if not refuses_checksums(error.__cause__):
            return False
        self.checksum_headers = False
        _log.info("checksum_refused store=%s operation=%r", self.url, call.operation)
        return True

    def _put(
        self,
        call: RequestContext,
        body: Body,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None,
        *,
        idempotent: bool,
    ) -> dict[str, str]:
        full_key = self.full_key(call.key or "")
        try:
            with self._exchange(
                call, "PUT", full_key, query, headers=headers, body=body, idempotent=idempotent
            ) as answer:
                return answer.headers
        except ChecksumMismatch as error:
            if not is_intact(body, headers):
                raise
            raise damaged(call) from error

    def checksums_of(self, body: Body, call: RequestContext) -> tuple[int, bytes | None]:
        """CRC32C and MD5 that go along; the latter only where it was asked for."""
        hashing = self.options.content_md5 and body.md5 is None
        if body.crc32c is not None and not hashing:
            return body.crc32c, body.md5
        crc, md5 = _digests(body, with_md5=hashing)
        if body.crc32c not in (None, crc):
            raise ChecksumMismatch(f"{call}: the source has other bytes than before", what=str(call))
        return crc, md5 if hashing else body.md5

    def heard(self, headers: Mapping[str, str]) -> None:
        """Remember what the server says of itself in every answer."""
        self._software = headers.get("server", self._software)
        self._answered = (headers.get("date", ""), time.monotonic())

    def failed(self, error: Exception, call: RequestContext, access: S3Endpoint | None = None) -> BlobflowError:
        """Our error for one of the wire, of the server or of botocore.

        Stale credentials are dropped, another region and the server's clock are taken up: the next attempt, which the
        error asks for, is made with what was learned.

        Args:
            access: What the refused request was sent by.
        """
        refusal = S3Error.by(error)
        if refusal is not None and refusal.code in STALE_CREDENTIALS:
            if self.options.explicit:
                return StoreConfigurationError(f"{call}: {refusal}", hint=HINTS["ExpiredToken"], status=refusal.status)
            self.close()  # not for good: the next call connects anew, with new credentials from the chain
        if refusal is not None and access is not None and (learned := self._learn(refusal, access)):
            return StoreUnavailable(
                f"{call}: {refusal}; {learned}", operation=call.operation, key=call.key, status=refusal.status
            )
        if refusal is not None and refusal.status == 404 and refusal.code in call.means_no_bucket:
            # Not the object that was asked for, which may be one of the probe's.
            return StoreConfigurationError(
                f"there is no bucket {self.options.bucket!r}" + (f": {refusal.message}" if refusal.message else ""),
                hint=HINTS["NoSuchBucket"],
                operation=call.operation,
                bucket=self.options.bucket,
                status=404,
                code="NoSuchBucket",
            )
        return translate(error, call)

    def _learn(self, refusal: S3Error, access: S3Endpoint) -> str:
        """What a refusal says about how to ask, which the next attempt does; empty where it says nothing new."""
        region, skew_s = refusal.region, refusal.clock_skew_s()
        if region is not None and region != access.region:
            _log.info("s3.region store=%s signed=%s actual=%s", self.url, access.region, region)
            self._region = region
            if self._access is access:  # else another thread has learned it before
                self.close()
            return f"the bucket is in region {region}"
        if skew_s is not None and abs(skew_s - access.skew_s) > _SKEW_S:
            _log.warning("s3.clock store=%s ahead_s=%.0f", self.url, skew_s)
            self._skew_s = access.skew_s = skew_s
            return f"the server's clock is {skew_s:+.0f} s from this machine's"
        return ""


def _written(query: Mapping[str, str]) -> str:
    """A query as it stands on the request line, and as it is signed."""
    pairs = (f"{name}={quote(value, safe='-_.~')}" for name, value in query.items())
    return f"?{'&'.join(pairs)}" if query else ""


def stored(
    call: RequestContext, headers: Mapping[str, str], data: bytes, size: int | None, max_bytes: int
) -> StoredObject:
    """The object in the answer to a GET.

    Args:
        data: Its body, or more than `max_bytes` of it; nothing where `size` says that already.
        size: What the server announced, if it did.

    Raises:
        ObjectTooLarge: see `Store.get`.
        StoreUnavailable: the answer ended early.
    """
    key = call.key or ""
    if len(data) > max_bytes or (size is not None and size > max_bytes):
        raise ObjectTooLarge(f"{key!r} has more than {max_bytes} bytes", key=key, limit=max_bytes)
    if size is not None and len(data) < size:
        raise cut_short(call, len(data), size)
    return StoredObject(data, _meta(key, len(data), headers))


def put_result(call: RequestContext, body: Body, answered: Mapping[str, str]) -> ObjectMeta:
    """What the answer to a PUT says of the object.

    Raises:
        StoreUnavailable: it does not say enough.
    """
    key = call.key or ""
    if not answered.get("etag"):
        raise StoreUnavailable(f"no ETag returned for {key!r}", operation="put", key=key)
    return ObjectMeta(key, body.size, quoted(answered["etag"]), None, _crc_in(answered), body.metadata)


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
    """Whether a body, read once more, has the checksums that its headers tell: else it was not damaged on the way."""
    crc, md5 = _digests(body, with_md5="Content-MD5" in headers)
    actual = {"x-amz-checksum-crc32c": write_crc32c(crc), "Content-MD5": _base64(md5)}
    return all(headers.get(name, value) == value for name, value in actual.items())


def damaged(call: RequestContext) -> StoreUnavailable:
    """A body that the server refuses and that is intact here was damaged on the way."""
    return StoreUnavailable(f"{call}: damaged on the way", operation=call.operation, key=call.key)


def with_checksums(headers: Mapping[str, str], body: Body, crc: int | None, md5: bytes | None) -> dict[str, str]:
    """`headers`, and those that tell the length and the checksums of a body."""
    given = {**headers, "Content-Length": str(body.size)}
    if md5 is not None:
        given["Content-MD5"] = _base64(md5)
    if crc is not None:
        given["x-amz-checksum-crc32c"] = write_crc32c(crc)
    return given


def _meta(key: str, size: int, headers: Mapping[str, str]) -> ObjectMeta:
    metadata = {n.removeprefix("x-amz-meta-"): v for n, v in headers.items() if n.startswith("x-amz-meta-")}
    modified = read_time(headers.get("last-modified"))
    return ObjectMeta(key, size, quoted(headers.get("etag", "")), modified, _crc_in(headers), metadata or None)


def _crc_in(headers: Mapping[str, str]) -> int | None:
    whole = headers.get("x-amz-checksum-type") != "COMPOSITE"
    return read_crc32c(headers.get("x-amz-checksum-crc32c")) if whole else None


def _digests(body: Body, *, with_md5: bool) -> tuple[int, bytes]:
    """CRC32C and MD5 of a body, which is read for it; the MD5 costs ten times as much, and is of nothing without."""
    crc, md5 = 0, hashlib.md5(usedforsecurity=False)
    for chunk in body:
        crc = crc32c(chunk, crc)
        if with_md5:
            md5.update(chunk)
    return crc, md5.digest()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
