"""The S3 store: AWS and everything that speaks its language (Ceph, MinIO, R2 ...).

Two planes share one configuration:

* the control plane is a botocore client without retries: listing, head, delete, copy, and the life of an upload;
* the data plane (`blobflow.stores.s3_wire`) carries the bytes: requests are signed by botocore, each attempt anew, and
  sent over pooled connections. Where they go (addressing style, dual stack, accelerate ...) is botocore's decision
  too, read from a request that it prepared.

Checksums: every body goes out with its CRC32C in a header, never with a trailer, and unsigned otherwise; an upload is
created with a CRC32C of the full object and completed with the combination of its parts. A server that refuses one of
these headers is asked again without, and the store remembers. What a server does with them is another matter (Ceph
16 and moto accept wrong ones): `blobflow.stores.probe` finds out.
"""
# botocore has no types
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import base64
import binascii
import html
import logging
import os
import re
import ssl
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal, cast
from urllib.parse import quote, urlsplit

import botocore
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.exceptions
import botocore.httpsession
import botocore.parsers
import botocore.session
import botocore.utils
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
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
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
    UploadIncomplete,
    UsageError,
)
from blobflow.stores.base import (
    Abilities,
    Body,
    ObjectMeta,
    PartMeta,
    PutMode,
    Server,
    Store,
    StoredObject,
    UploadMeta,
    check_key,
)
from blobflow.stores.s3_wire import Answer, Wire, WireError

_log = logging.getLogger(__name__)

MIN_PART_BYTES = 5 * 1024**2
MAX_PART_BYTES = 5 * 1024**3
MAX_PARTS = 10_000
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

_SAMPLE_KEY = "x"
_ERROR_BODY_BYTES = 64 * 1024


class S3Options(BaseModel):
    """Where a bucket is and how to talk to it.

    With access keys given here, or with `anonymous`, the environment (`AWS_*`) and the shared configuration files
    are not consulted; without them botocore's usual chain applies, refreshable credentials included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bucket: str = Field(min_length=1, description="Name of an existing bucket; it is never created.")
    prefix: str = Field(default="", description="Put before every key, with a `/` between.")
    endpoint_url: str | None = Field(default=None, description="For servers that are not AWS.")
    region: str | None = Field(default=None, description="Default: the chain's, then us-east-1.")
    access_key_id: str | None = Field(default=None, repr=False, description="Together with the secret, or not at all.")
    secret_access_key: SecretStr | None = Field(default=None, repr=False, description="Belongs to the access key id.")
    session_token: SecretStr | None = Field(default=None, repr=False, description="Of temporary credentials.")
    anonymous: bool = Field(default=False, description="Sign nothing, for public buckets.")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description="Bucket in the path or in the host name; auto is path for an endpoint_url, else botocore's choice.",
    )
    verify: bool | str = Field(default=True, description="Check TLS certificates; a path names a CA bundle.")
    connect_timeout: float = Field(default=10.0, gt=0, description="Seconds for a connection to be made.")
    idle_timeout: float = Field(default=120.0, gt=0, description="Seconds without a single byte before giving up.")
    max_connections: int = Field(default=32, ge=1, description="Connections kept open between requests, per plane.")

    @model_validator(mode="after")
    def _consistent(self) -> S3Options:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key belong together")
        if self.access_key_id is None and self.session_token is not None:
            raise ValueError("session_token needs access_key_id and secret_access_key")
        if self.anonymous and self.access_key_id is not None:
            raise ValueError("anonymous access takes no keys")
        if self.bucket.endswith("--x-s3"):
            raise ValueError("directory buckets (S3 Express One Zone) are not supported")
        if self.prefix.strip("/"):
            check_key(self.prefix.strip("/"))
        return self

    @property
    def explicit(self) -> bool:
        """Whether everything stands here and nothing is taken from the environment."""
        return self.anonymous or self.access_key_id is not None


class S3Store(Store):
    """Objects in a bucket, below a prefix.

    Threads share a store. A forked child makes connections of its own at its first call.
    Nothing is sent before the first call, so wrong credentials show there.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options
        self._prefix = options.prefix.strip("/") + "/" if options.prefix.strip("/") else ""
        self.url = f"s3://{options.bucket}/{self._prefix}".rstrip("/")
        self.abilities = Abilities(min_part_size=MIN_PART_BYTES, max_part_size=MAX_PART_BYTES, max_parts=MAX_PARTS)
        self._plane: _Plane | None = None
        # One lock per process: the parent's may be held, by a thread that does not exist here, when it forks.
        self._locks: dict[int, threading.Lock] = {}
        self._checksum_headers = True
        self._checksummed_uploads = True
        self._bare_if_match = False
        self._software = ""

    @property
    @override
    def server(self) -> Server:
        return Server(self._connected().endpoint, self._software)

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
    ) -> ObjectMeta:
        """See `Store.put`. A conflict with a concurrent write (409) is a retryable `StoreUnavailable`."""
        check_key(key)
        if (mode is PutMode.UPDATE) != (e_tag is not None):
            raise UsageError("an e_tag belongs to PutMode.UPDATE, and to it alone", key=key)
        headers = {"Content-Type": content_type}
        if mode is PutMode.CREATE:
            headers["If-None-Match"] = "*"
        elif e_tag is not None:
            headers["If-Match"] = e_tag.strip('"') if self._bare_if_match else e_tag
        content = body if isinstance(body, Body) else Body.of(body)
        call = _Call("put", key, conditional=mode is not PutMode.OVERWRITE, e_tag=e_tag)
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
        if not answered.get("etag"):
            raise StoreUnavailable(f"no ETag returned for {key!r}", operation="put", key=key)
        return ObjectMeta(key, content.size, _quoted(answered["etag"]), crc32c=_crc_in_headers(answered))

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)
        call = _Call("get", key)
        with self._exchange(call, "GET", {"x-amz-checksum-mode": "ENABLED"}) as answer:
            size = answer.length
            # One byte more than allowed tells an object of unknown size that just fits from one that does not.
            data = answer.read(max_bytes + 1) if size is None or size <= max_bytes else b""
            if len(data) > max_bytes or (size is not None and size > max_bytes):
                raise ObjectTooLarge(f"{key!r} has more than {max_bytes} bytes", key=key, limit=max_bytes)
            if size is not None and len(data) < size:
                raise _cut_short(call, len(data), size)
            headers = answer.headers
            modified = parsedate_to_datetime(headers["last-modified"]) if "last-modified" in headers else None
            e_tag = _quoted(headers.get("etag", ""))
            return StoredObject(data, ObjectMeta(key, len(data), e_tag, modified, _crc_in_headers(headers)))

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        check_key(key)
        buffer = buffer.cast("B")
        wanted = len(buffer)
        if not wanted:
            return
        call = _Call("get range", key, offset=offset, e_tag=e_tag)
        headers = {"Range": f"bytes={offset}-{offset + wanted - 1}"}
        if e_tag is not None:
            headers["If-Match"] = e_tag
        with self._exchange(call, "GET", headers) as answer:
            if answer.status != 206:
                raise Unsupported(
                    f"{call}: the server ignores ranges (status {answer.status})", store=self.url, ability="ranged GET"
                )
            found = _quoted(answer.headers.get("etag", ""))
            if e_tag is not None and found and found != e_tag:
                raise _changed(key, e_tag, found)
            given = answer.headers.get("content-range", "")
            covered = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", given.strip())
            if covered is None or int(covered[1]) != offset:
                raise StoreUnavailable(
                    f"{call}: asked for {headers['Range']!r}, got {given!r}",
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
                raise _cut_short(call, received, wanted)

    @override
    def head(self, key: str) -> ObjectMeta:
        check_key(key)
        call = _Call("head", key)
        try:
            found = self._control(call, "head_object", Key=self._full(key), ChecksumMode="ENABLED")
        except StoreConfigurationError as error:
            if error.fields.get("status") in (400, 403) and not error.fields.get("code"):
                raise self._reason(call) from error
            raise
        return ObjectMeta(
            key, found["ContentLength"], _quoted(found["ETag"]), found.get("LastModified"), _crc_in_result(found)
        )

    def _reason(self, refused: _Call) -> BlobflowError:
        """Why a HEAD was refused: its answer has no body that could say so, but that of a GET has.

        What passes (a token that has just expired, a clock that is off) looks like a lack of permission otherwise.
        """
        try:
            with self._exchange(refused, "GET", {"Range": "bytes=0-0"}):
                pass
        except SizeMismatch:
            pass  # an empty object, and we may read it
        except BlobflowError as reason:
            return reason
        return StoreUnavailable(f"{refused} was refused, but a GET was not", operation="head", key=refused.key)

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        """See `Store.list`. Keys that no store method takes (`a//b`, folder markers) are passed over."""
        query: dict[str, Any] = {"Prefix": self._prefix + prefix, "MaxKeys": PAGE}
        if start_after is not None:
            query["StartAfter"] = self._prefix + start_after
        last = ""
        while True:
            page = self._control(_Call("list", prefix or None), "list_objects_v2", **query)
            progress = False
            for entry in page.get("Contents", ()):
                full: str = entry["Key"]
                if full <= last:
                    continue
                last, progress = full, True
                key = self._relative(full)
                if key is not None and (start_after is None or key > start_after):
                    yield ObjectMeta(key, entry["Size"], _quoted(entry["ETag"]), entry.get("LastModified"))
            if not page.get("IsTruncated"):
                return
            if not progress:
                raise StoreUnavailable(f"the listing of {prefix!r} stands still at {last!r}", operation="list")
            query["ContinuationToken"] = page["NextContinuationToken"]

    @override
    def delete(self, key: str) -> None:
        check_key(key)
        try:
            self._control(_Call("delete", key), "delete_object", Key=self._full(key))
        except ObjectNotFound:
            _log.debug("delete_absent key=%s", key)

    @override
    def copy(self, source: str, target: str) -> ObjectMeta:
        """See `Store.copy`. The source is pinned: replaced meanwhile, the copy fails with `ObjectChanged`."""
        check_key(target)
        found = self.head(source)
        pin: dict[str, Any] = {
            "CopySource": {"Bucket": self.options.bucket, "Key": self._full(source)},
            "CopySourceIfMatch": found.e_tag,
        }
        call = _Call("copy", source, e_tag=found.e_tag)
        if found.size <= COPY_LIMIT_BYTES:
            answer = self._control(call, "copy_object", patient=True, Key=self._full(target), **pin)
            result = answer["CopyObjectResult"]
            modified = result.get("LastModified")
            return ObjectMeta(target, found.size, _quoted(result["ETag"]), modified, _crc_in_result(result))
        part_size = max(COPY_PART_BYTES, -(-found.size // MAX_PARTS))
        upload_id = self.create_multipart(target, part_size=part_size)
        try:
            parts: list[PartMeta] = []
            for number, offset in enumerate(range(0, found.size, part_size), start=1):
                size = min(part_size, found.size - offset)
                answer = self._control(
                    call,
                    "upload_part_copy",
                    patient=True,
                    Key=self._full(target),
                    UploadId=upload_id,
                    PartNumber=number,
                    CopySourceRange=f"bytes={offset}-{offset + size - 1}",
                    **pin,
                )
                result = answer["CopyPartResult"]
                parts.append(PartMeta(number, size, _quoted(result["ETag"]), _crc(result.get("ChecksumCRC32C"))))
            return self.complete_multipart(target, upload_id, parts)
        except BaseException:
            self.abort_multipart(target, upload_id)
            raise

    # Multipart uploads

    @override
    def create_multipart(self, key: str, *, part_size: int, content_type: str = "application/octet-stream") -> str:
        check_key(key)
        if part_size > MAX_PART_BYTES:
            raise UsageError(f"parts have at most {MAX_PART_BYTES} bytes, not {part_size}", key=key)
        query: dict[str, Any] = {"Key": self._full(key), "ContentType": content_type}
        call = _Call("create upload of", key)
        if self._checksummed_uploads:
            checks: dict[str, Any] = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
            try:
                return self._create(call, **query, **checks)
            except BlobflowError as error:
                if not _refuses_checksums(error.__cause__):
                    raise
                self._checksummed_uploads = False
                _log.info("checksum_refused store=%s operation=%r", self.url, call.operation)
        return self._create(call, **query)

    def _create(self, call: _Call, **query: Any) -> str:
        upload_id = self._control(call, "create_multipart_upload", **query).get("UploadId")
        if not upload_id:
            raise StoreUnavailable(f"no upload id returned for {call.key!r}", operation=call.operation, key=call.key)
        return upload_id

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        check_key(key)
        if not 1 <= part_number <= MAX_PARTS:
            raise UsageError(f"part numbers go from 1 to {MAX_PARTS}, not {part_number}", key=key)
        call = _Call(f"upload part {part_number} of", key, upload_id=upload_id)
        query = f"?partNumber={part_number}&uploadId={quote(upload_id, safe='-_.~')}"
        answered, crc = self._upload(call, body, {}, query)
        e_tag = answered.get("etag")
        if not e_tag:
            raise StoreUnavailable(
                f"no ETag returned for part {part_number} of {key!r}", operation=call.operation, key=key
            )
        return PartMeta(part_number, body.size, _quoted(e_tag), crc)

    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        return self.list_parts_by(key, upload_id, PAGE)

    @override
    def list_parts_by(self, key: str, upload_id: str, page_size: int) -> list[PartMeta]:
        check_key(key)
        call = _Call("list parts of", key, upload_id=upload_id)
        found: dict[int, PartMeta] = {}
        last = 0
        while True:
            page = self._control(
                call,
                "list_parts",
                Key=self._full(key),
                UploadId=upload_id,
                PartNumberMarker=last,
                MaxParts=page_size,
            )
            entries = page.get("Parts", ())
            for entry in entries:
                number: int = entry["PartNumber"]
                crc = _crc(entry.get("ChecksumCRC32C"))
                found[number] = PartMeta(number, entry["Size"], _quoted(entry["ETag"]), crc)
            newest = max(found, default=0)
            # A full page is not believed to be the last one: a server that forgets IsTruncated would cost data.
            if not page.get("IsTruncated") and len(entries) < page_size:
                return [found[number] for number in sorted(found)]
            if newest <= last:
                if not page.get("IsTruncated"):
                    return [found[number] for number in sorted(found)]
                raise StoreUnavailable(f"the list of parts of {key!r} stands still at {last}", operation=call.operation)
            last = newest

    @override
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        query: dict[str, Any] = {"Prefix": self._prefix + prefix, "MaxUploads": PAGE}
        found: dict[tuple[str, str], UploadMeta] = {}
        while True:
            page = self._control(_Call("list uploads", prefix or None), "list_multipart_uploads", **query)
            known = len(found)
            for entry in page.get("Uploads", ()):
                full: str = entry["Key"]
                key = self._relative(full)
                if key is not None and key.startswith(prefix):
                    found[full, entry["UploadId"]] = UploadMeta(key, entry["UploadId"], entry.get("Initiated"))
            if not page.get("IsTruncated"):
                return [found[name] for name in sorted(found)]
            if len(found) == known:
                raise StoreUnavailable(f"the list of uploads below {prefix!r} stands still", operation="list uploads")
            query["KeyMarker"] = page["NextKeyMarker"]
            query["UploadIdMarker"] = page["NextUploadIdMarker"]

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        """See `Store.complete_multipart`.

        The size of the whole goes along, and its CRC32C where all parts have one: a server that checks them refuses
        a wrong whole.
        """
        check_key(key)
        call = _Call("complete upload of", key, upload_id=upload_id)
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
        query: dict[str, Any] = {
            "Key": self._full(key),
            "UploadId": upload_id,
            "MultipartUpload": {"Parts": [{"PartNumber": part.part_number, "ETag": part.e_tag} for part in parts]},
        }
        checks: dict[str, Any] = {"MpuObjectSize": size}
        known = [(part.crc32c, part.size) for part in parts if part.crc32c is not None]
        if len(known) == len(parts):
            checks |= {"ChecksumType": "FULL_OBJECT", "ChecksumCRC32C": _base64(combine_all(known))}
        try:
            answer = self._control(call, "complete_multipart_upload", patient=True, **query, **checks)
        except BlobflowError as error:
            if not _refuses_checksums(error.__cause__):
                raise
            _log.info("checksum_refused store=%s operation=%r", self.url, call.operation)
            answer = self._control(call, "complete_multipart_upload", patient=True, **query)
        if not answer.get("ETag"):  # Ceph 16 leaves it empty
            made = self.head(key)
            if made.size != size:
                raise ObjectChanged(f"{key!r} was replaced as soon as it was complete", key=key, actual=made.e_tag)
            return made
        return ObjectMeta(key, size, _quoted(answer["ETag"]), crc32c=_crc_in_result(answer))

    @override
    def abort_multipart(self, key: str, upload_id: str) -> None:
        check_key(key)
        call = _Call("abort upload of", key, upload_id=upload_id)
        try:
            for _ in range(ABORT_ROUNDS):
                self._control(call, "abort_multipart_upload", Key=self._full(key), UploadId=upload_id)
                if not self.list_parts(key, upload_id):
                    return
        except NoSuchUpload:
            return
        raise StoreUnavailable(
            f"parts of {key!r} are still there after {ABORT_ROUNDS} aborts; somebody keeps sending them",
            operation="abort",
            key=key,
        )

    @override
    def close(self) -> None:
        plane, self._plane = self._plane, None
        if plane is not None:
            plane.close()

    # The planes

    def _full(self, key: str) -> str:
        return self._prefix + key

    def _relative(self, full: str) -> str | None:
        """The key behind the prefix, or None if somebody put something there that is no key."""
        try:
            return check_key(full.removeprefix(self._prefix)) if full.startswith(self._prefix) else None
        except InvalidKey:
            _log.debug("foreign_key store=%s key=%r", self.url, full)
            return None

    def _connected(self) -> _Plane:
        plane = self._plane
        if plane is None or plane.pid != os.getpid():
            with self._locks.setdefault(os.getpid(), threading.Lock()):
                plane = self._plane
                if plane is None or plane.pid != os.getpid():
                    if plane is not None:
                        # Only the child's copies of the descriptors; the parent's live on. The client is left
                        # alone: its pool has locks, which a thread of the parent may have held.
                        plane.wire.close()
                    try:
                        plane = self._plane = _Plane(self.options)
                    except (botocore.exceptions.BotoCoreError, ValueError, OSError) as error:
                        raise _translate(error, _Call("connect to", self.options.bucket), None) from error
        return plane

    def _control(self, call: _Call, method: str, *, patient: bool = False, **query: Any) -> dict[str, Any]:
        """One control-plane request; all its errors come out as ours."""
        plane = self._connected()
        client = plane.patient_client() if patient else plane.client
        try:
            return getattr(client, method)(Bucket=self.options.bucket, **query)
        except _BOTOCORE_ERRORS as error:
            raise self._failed(error, call, PATIENCE_S if patient else self.options.idle_timeout) from error

    @contextmanager
    def _exchange(
        self,
        call: _Call,
        method: str,
        headers: Mapping[str, str],
        query: str = "",
        body: Body | None = None,
        *,
        idempotent: bool = True,
    ) -> Generator[Answer, None, None]:
        """One data-plane request; gives the answer if it is a success. All errors come out as ours."""
        plane = self._connected()
        target = plane.target(self._full(call.key or "")) + query
        try:
            with plane.wire.send(
                method, target, lambda: plane.signed(method, target, headers), body, idempotent=idempotent
            ) as answer:
                self._software = answer.headers.get("server", self._software)
                refusal = None if answer.status < 300 else _Refusal.by_answer(answer)
                if refusal is None:
                    yield answer
            if refusal is not None:  # raised out here, so that the connection survives a mere "no"
                raise refusal
        except WireError as error:
            raise self._failed(
                error, replace(call, offset=(call.offset or 0) + error.moved), error.timeout_s
            ) from error
        except (_Refusal, *_BOTOCORE_ERRORS) as error:
            raise self._failed(error, call, None) from error

    def _upload(
        self, call: _Call, body: Body, headers: Mapping[str, str], query: str = "", *, idempotent: bool = True
    ) -> tuple[dict[str, str], int]:
        """PUT a body with its checksum; returns the answer's headers and the checksum."""
        crc = body.crc32c if body.crc32c is not None else _crc_of(body)
        headers = {**headers, "Content-Length": str(body.size)}
        if self._checksum_headers:
            try:
                checked = headers | {"x-amz-checksum-crc32c": _base64(crc)}
                with self._exchange(call, "PUT", checked, query, body, idempotent=idempotent) as answer:
                    return answer.headers, crc
            except ChecksumMismatch as error:
                if _crc_of(body) != crc:
                    raise
                raise StoreUnavailable(  # what lies here is right, so it was damaged on the way
                    f"{call}: damaged on the way", operation=call.operation, key=call.key
                ) from error
            except BlobflowError as error:
                if not _refuses_checksums(error.__cause__):
                    raise
                self._checksum_headers = False
                _log.info("checksum_refused store=%s operation=%r", self.url, call.operation)
        with self._exchange(call, "PUT", headers, query, body, idempotent=idempotent) as answer:
            return answer.headers, crc

    def _failed(self, error: Exception, call: _Call, timeout_s: float | None) -> BlobflowError:
        refusal = _Refusal.by(error)
        if refusal is not None and refusal.code in _STALE_CREDENTIALS:
            if self.options.explicit:
                return StoreConfigurationError(f"{call}: {refusal}", hint=_HINTS["ExpiredToken"], status=refusal.status)
            self.close()  # not for good: the next call connects anew, with new credentials from the chain
        return _translate(error, call, timeout_s)


class _Prepared(Exception):
    """A request that botocore made ready and must not send."""

    def __init__(self, url: str, authorization: str) -> None:
        super().__init__(url)
        self.url = url
        self.authorization = authorization


class _Plane:
    """What one process needs to talk to the bucket: clients, connections, and a way to sign."""

    def __init__(self, options: S3Options) -> None:
        self.pid = os.getpid()
        self._options = options
        self._session = _session(options)
        self._region = (
            options.region
            or (
                None
                if options.explicit
                else self._session.get_config_variable("region") or os.environ.get("AWS_REGION")
            )
            or "us-east-1"
        )
        self._lock = threading.Lock()
        self._patient: Any = None
        self.client = self._new_client(options.idle_timeout)
        self._credentials: Any = None if options.anonymous else self._session.get_credentials()
        url, self._signing = self._address()
        parts = urlsplit(url)
        self._host = parts.netloc
        self._base = parts.path.removesuffix(_SAMPLE_KEY)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self.endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self.wire = Wire(
            self._origin,
            connect_timeout_s=options.connect_timeout,
            idle_timeout_s=options.idle_timeout,
            max_idle=options.max_connections,
            tls=self._tls() if parts.scheme == "https" else None,
            proxy=botocore.utils.get_environ_proxies(self._origin).get(parts.scheme),
        )

    def _address(self) -> tuple[str, tuple[str, str]]:
        """Where an object lies, and the service and region its requests are signed for.

        Addressing, dual stack, accelerate, FIPS and the rest are botocore's decision: it prepares a request, which is
        caught before it is sent. (A presigned URL would not do: for most regions it names the global endpoint.)
        """

        def catch(request: Any, **_: Any) -> None:
            raise _Prepared(request.url, str(request.headers.get("Authorization", "")))

        events = self.client.meta.events
        events.register_first("before-send.s3.HeadObject", catch)
        try:
            self.client.head_object(Bucket=self._options.bucket, Key=_SAMPLE_KEY)
        except _Prepared as prepared:
            scope = re.search(r"/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request", prepared.authorization)
            signing = (scope["service"], scope["region"]) if scope is not None else ("s3", self._region)
            return prepared.url, signing
        finally:
            events.unregister("before-send.s3.HeadObject", catch)
        raise AssertionError("botocore sent a request without the before-send event")

    def patient_client(self) -> Any:
        """A client for the calls that take the server minutes; made when first needed."""
        with self._lock:
            if self._patient is None:
                self._patient = self._new_client(max(PATIENCE_S, self._options.idle_timeout))
            return self._patient

    def target(self, full_key: str) -> str:
        """Path of an object, as it stands on the request line."""
        return self._base + quote(full_key, safe="-_.~/")

    def signed(self, method: str, target: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        """All headers of one attempt, signed now, with the credentials that are valid now."""
        request = botocore.awsrequest.AWSRequest(method, self._origin + target, headers={"Host": self._host, **headers})
        if not self._options.anonymous:
            # None here means that the chain found nothing: botocore says so.
            frozen = self._credentials and self._credentials.get_frozen_credentials()
            _UnsignedPayload(frozen, *self._signing).add_auth(request)
        return dict(request.headers.items())

    def close(self) -> None:
        """Close the idle connections; requests under way end first."""
        self.wire.close()
        self.client.close()
        if self._patient is not None:
            self._patient.close()

    def _new_client(self, read_timeout_s: float) -> Any:
        options = self._options
        style = options.addressing_style
        config = botocore.config.Config(
            signature_version=botocore.UNSIGNED if options.anonymous else "s3v4",
            s3={"addressing_style": "path" if style == "auto" and options.endpoint_url else style},
            connect_timeout=options.connect_timeout,
            read_timeout=read_timeout_s,
            max_pool_connections=options.max_connections,
            retries={"mode": "standard", "total_max_attempts": 1},  # RetryingStore repeats, and knows when not to
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            ignore_configured_endpoint_urls=options.explicit or None,
        )
        return self._session.create_client(
            "s3",
            region_name=self._region,
            endpoint_url=options.endpoint_url,
            verify=None if options.verify is True else options.verify,
            config=config,
        )

    def _tls(self) -> ssl.SSLContext:
        """A context that trusts whom the control plane trusts."""
        verify = self._options.verify
        bundle = verify if isinstance(verify, str) else self._session.get_config_variable("ca_bundle")
        context = ssl.create_default_context(cafile=bundle or botocore.httpsession.get_cert_path(True))
        context.set_alpn_protocols(["http/1.1"])
        if verify is False:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class _UnsignedPayload(botocore.auth.S3SigV4Auth):
    """Signs the head only: the CRC32C header, which is signed, answers for the body."""

    @override
    def payload(self, request: Any) -> str:
        return "UNSIGNED-PAYLOAD"


def _session(options: S3Options) -> Any:
    session = botocore.session.Session()
    if options.explicit:
        # What stands in the options is all there is: neither variables nor files, not even a profile they name.
        for name, (_, _, default, conversion) in list(session.session_var_map.items()):
            if name in ("config_file", "credentials_file"):
                default = os.devnull
            session.session_var_map[name] = (None, None, default, conversion)
        session.get_component("config_store").set_config_variable("s3", {})
    if options.access_key_id is not None and options.secret_access_key is not None:
        token = options.session_token.get_secret_value() if options.session_token is not None else None
        session.set_credentials(options.access_key_id, options.secret_access_key.get_secret_value(), token)
    return session


# Errors


@dataclass(frozen=True)
class _Call:
    """What was being done, for messages and for the meaning of an answer."""

    operation: str
    key: str | None = None
    offset: int | None = None
    upload_id: str | None = None
    e_tag: str | None = None
    """The entity tag that was asked for."""
    conditional: bool = False
    """A conditional write: a missing or another object is an answer, not an error."""

    def __str__(self) -> str:
        return self.operation if self.key is None else f"{self.operation} {self.key!r}"


class _Refusal(Exception):
    """An answer that says no, from either plane."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers

    @classmethod
    def by_answer(cls, answer: Answer) -> _Refusal:
        """Reads the error document. Two patterns are enough, and no XML parser can be led astray."""
        text = answer.read(_ERROR_BODY_BYTES).decode("utf-8", "replace")
        code = re.search(r"<Code>\s*([^<]{1,100}?)\s*</Code>", text)
        message = re.search(r"<Message>\s*([^<]{1,1000}?)\s*</Message>", text)
        return cls(
            answer.status,
            html.unescape(code[1]) if code else "",
            html.unescape(message[1]) if message else "",
            answer.headers,
        )

    @classmethod
    def by(cls, error: BaseException | None) -> _Refusal | None:
        """The refusal in an exception of either plane, if it is one."""
        if isinstance(error, _Refusal):
            return error
        if not isinstance(error, botocore.exceptions.ClientError):
            return None
        response: dict[str, Any] = cast("Any", error).response
        about: dict[str, Any] = response.get("ResponseMetadata", {})
        said: dict[str, Any] = response.get("Error", {})
        code = str(said.get("Code") or "")
        return cls(
            about.get("HTTPStatusCode", 0),
            "" if code.isdigit() else code,  # botocore's stand-in where there is no body, as after a HEAD
            said.get("Message") or "",
            about.get("HTTPHeaders", {}),
        )


_BOTOCORE_ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.parsers.ResponseParserError,
)

_STALE_CREDENTIALS = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
_SLOW_DOWN = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"})
_PASSING = frozenset({
    "InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict", "IncompleteBody",
    "RequestTimeout", "RequestTimeTooSkewed",
    "XAmzContentSHA256Mismatch",  # what was signed here is right, so it was damaged on the way
})  # fmt: skip
_WRONG_PARTS = frozenset({"InvalidPart", "InvalidPartOrder", "EntityTooSmall"})
_WRONG_DIGEST = frozenset({"BadDigest", "XAmzContentChecksumMismatch"})
_WRONG_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_HINTS = {
    "NoSuchBucket": "create the bucket, or name another one; blobflow never creates buckets",
    "AccessDenied": "allow this operation to these credentials; without ListBucket a missing key looks like this too",
    "InvalidAccessKeyId": "the server does not know this access key: check the key and the endpoint",
    "SignatureDoesNotMatch": "check the secret key; behind a proxy, that it leaves path and Host as they are",
    "ExpiredToken": "get new temporary credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
}


def _translate(error: Exception, call: _Call, timeout_s: float | None) -> BlobflowError:
    """The error of ours that says what an error of a client library, of the wire or of the server means."""
    about: dict[str, Any] = {"operation": call.operation, "key": call.key, "offset": call.offset}
    refusal = _Refusal.by(error)
    if refusal is not None:
        return _translate_refusal(refusal, call, about)
    botocore_timeouts = (botocore.exceptions.ReadTimeoutError, botocore.exceptions.ConnectTimeoutError)
    if isinstance(error, botocore_timeouts) or (isinstance(error, WireError) and error.timeout_s is not None):
        where = "" if call.offset is None else f" at offset {call.offset}"
        return TimedOut(f"{call}: no byte for {timeout_s:g} s{where}", timeout_s=timeout_s, **about)
    reason = error.__cause__ if isinstance(error, WireError) else error
    if isinstance(reason, ssl.SSLCertVerificationError | botocore.exceptions.SSLError):
        return StoreConfigurationError(
            f"{call}: the server's certificate is not trusted: {reason}",
            hint="name the CA bundle that signed it",
            **about,
        )
    if isinstance(reason, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return StoreConfigurationError(
            f"{call}: {reason}",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, or pass the keys",
            **about,
        )
    passing = (
        WireError,
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.ConnectionError,
        botocore.exceptions.CredentialRetrievalError,
        botocore.exceptions.MetadataRetrievalError,
        botocore.exceptions.IncompleteReadError,
        botocore.parsers.ResponseParserError,
    )
    if isinstance(error, passing):
        return StoreUnavailable(f"{call}: {error}", **about)
    return StoreConfigurationError(f"{call}: {error}", **about)


def _translate_refusal(refusal: _Refusal, call: _Call, about: dict[str, Any]) -> BlobflowError:
    status, code = refusal.status, refusal.code
    said = f"{call}: {' '.join(filter(None, [str(status), code]))}{': ' if refusal.message else ''}{refusal.message}"
    about = {**about, "status": status, "code": code or None}
    match code:
        case "NoSuchUpload":
            return NoSuchUpload(said, key=call.key, upload_id=call.upload_id)
        case "NoSuchBucket":
            return StoreConfigurationError(said, hint=_HINTS[code], **about)
        case "KeyTooLongError":
            return InvalidKey(said, key=call.key, reason="the server says it is too long")
        case _ if code in _STALE_CREDENTIALS:
            return StoreUnavailable(said, hint=_HINTS["ExpiredToken"], **about)
        case _ if code in _WRONG_PARTS or "mp-object-size" in refusal.message:
            return UploadIncomplete(said, key=call.key)
        case _ if code in _WRONG_DIGEST:
            return ChecksumMismatch(said, what=str(call))
        case _ if code in _WRONG_REGION or status in (301, 307, 308):
            region = refusal.headers.get("x-amz-bucket-region")
            hint = f"the bucket is in region {region}: configure that" if region else "configure the bucket's region"
            return StoreConfigurationError(said, hint=hint, **about)
        case _ if code in _SLOW_DOWN or status in (429, 503):
            return SlowDown(said, retry_after_s=_seconds(refusal.headers.get("retry-after")), **about)
        case _ if status in (405, 501):
            return Unsupported(said, ability=call.operation)
        case _ if code in _PASSING or status >= 500 or status == 409:
            return StoreUnavailable(said, hint=_HINTS.get(code), **about)
        case _:
            pass
    if call.conditional and status in (404, 412):
        return PreconditionFailed(said, key=call.key, expected=call.e_tag)
    if status == 412:
        return _changed(call.key, call.e_tag, None)
    if status == 404 and call.upload_id is not None:  # Ceph says NoSuchKey
        return NoSuchUpload(said, key=call.key, upload_id=call.upload_id)
    if status == 404:
        return ObjectNotFound(f"no object {call.key!r}", key=call.key)
    if status == 416:
        return SizeMismatch(said, what=f"object {call.key!r}", expected=call.offset)
    return StoreConfigurationError(said, hint=_HINTS.get(code), **about)


def _refuses_checksums(error: BaseException | None) -> bool:
    """Whether a server turned a request down because it does not know the checksum headers."""
    refusal = _Refusal.by(error)
    if refusal is None or refusal.code in _WRONG_DIGEST:
        return False
    return refusal.status == 501 or (refusal.status == 400 and "checksum" in refusal.message.lower())


def _changed(key: str | None, expected: str | None, actual: str | None) -> ObjectChanged:
    return ObjectChanged(f"{key!r} was replaced while it was read", key=key, expected=expected, actual=actual)


def _cut_short(call: _Call, received: int, wanted: int) -> StoreUnavailable:
    return StoreUnavailable(
        f"{call}: the answer ended after {received} of {wanted} bytes",
        operation=call.operation,
        key=call.key,
        offset=(call.offset or 0) + received,
    )


def _seconds(retry_after: str | None) -> float | None:
    """The number of seconds in a Retry-After header; its other form, a date, is of no use between two clocks."""
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None


# Formats


def _quoted(e_tag: str) -> str:
    """Entity tags with their quotes, which some servers leave out in some answers."""
    return e_tag if not e_tag or e_tag.endswith('"') else f'"{e_tag}"'


def _base64(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _crc(value: str | None) -> int | None:
    """A CRC32C as S3 writes it; None for one that is composed of the parts' ("...-3")."""
    try:
        raw = base64.b64decode(value or "", validate=True)
    except binascii.Error:
        return None
    return int.from_bytes(raw, "big") if len(raw) == 4 else None


def _crc_in_headers(headers: Mapping[str, str]) -> int | None:
    whole = headers.get("x-amz-checksum-type") != "COMPOSITE"
    return _crc(headers.get("x-amz-checksum-crc32c")) if whole else None


def _crc_in_result(result: Mapping[str, Any]) -> int | None:
    return _crc(result.get("ChecksumCRC32C")) if result.get("ChecksumType") != "COMPOSITE" else None


def _crc_of(body: Body) -> int:
    crc = 0
    for chunk in body:
        crc = crc32c(chunk, crc)
    return crc
