"""The operations: what a request does to a bucket, and what S3 answers."""

from __future__ import annotations

import base64
import binascii
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from email.utils import formatdate
from itertools import pairwise
from typing import NamedTuple, TypeAlias
from urllib.parse import quote, unquote
from xml.etree import ElementTree as ET

from tests.strict_s3.errors import Children, S3Error, Value, base64_of, timestamp, xml_document
from tests.strict_s3.faults import Exchange, Response
from tests.strict_s3.state import Bucket, Content, Limits, Request, StoredObject, Upload, is_listed


def operation_of(method: str, target: str, headers: Mapping[str, str]) -> str:
    """AWS's name of what a request asks for; "Unknown" if it is not one of those served here.

    Args:
        headers: By names in lower case.
    """
    path, _, query = target.partition("?")
    names = {name.partition("=")[0] for name in query.split("&")}
    if "/" not in path[1:].removesuffix("/"):
        marker = next(iter(names & {"list-type", "uploads"}), "")
        return _OF_BUCKETS.get((method, marker), "Unknown")
    marker = next(iter(names & {"uploadId", "uploads"}), "")
    operation = _OF_OBJECTS.get((method, marker), "Unknown")
    if "x-amz-copy-source" in headers:
        return {"PutObject": "CopyObject", "UploadPart": "UploadPartCopy"}.get(operation, "Unknown")
    return operation


_OF_BUCKETS = {
    ("PUT", ""): "CreateBucket",
    ("HEAD", ""): "HeadBucket",
    ("GET", "list-type"): "ListObjectsV2",
    ("GET", "uploads"): "ListMultipartUploads",
}
_OF_OBJECTS = {
    ("PUT", ""): "PutObject",
    ("GET", ""): "GetObject",
    ("HEAD", ""): "HeadObject",
    ("DELETE", ""): "DeleteObject",
    ("POST", "uploads"): "CreateMultipartUpload",
    ("PUT", "uploadId"): "UploadPart",
    ("GET", "uploadId"): "ListParts",
    ("POST", "uploadId"): "CompleteMultipartUpload",
    ("DELETE", "uploadId"): "AbortMultipartUpload",
}

_Handle: TypeAlias = "Callable[[Operations, Bucket, Request], Response]"


class _Operation(NamedTuple):
    handle: _Handle
    queries: frozenset[str]
    headers: frozenset[str]


OPERATIONS: dict[str, _Operation] = {}

_ALWAYS = frozenset({"x-amz-date", "x-amz-content-sha256", "x-amz-security-token"})


def _serves(operation: str, *, queries: str = "", headers: str = "") -> Callable[[_Handle], _Handle]:
    """Registers a method for an operation, with the parameters and the meaningful headers that it understands."""

    def register(handle: _Handle) -> _Handle:
        OPERATIONS[operation] = _Operation(handle, frozenset(queries.split()), frozenset(headers.split()) | _ALWAYS)
        return handle

    return register


class Operations:
    """The operations of a server that has these.

    Attributes:
        limits: May be replaced between requests.
        log: Every request, in order of arrival.
    """

    limits: Limits
    log: list[Exchange]
    _clock: Callable[[], float]
    _buckets: dict[str, Bucket]
    _lock: threading.Condition

    def _perform(self, request: Request) -> Response:
        exchange = request.exchange
        with self._lock:
            bucket = self._buckets.get(exchange.bucket)
            if exchange.operation == "CreateBucket":
                if bucket is not None:
                    raise S3Error("BucketAlreadyOwnedByYou")
                bucket = self._buckets[exchange.bucket] = Bucket()
            if bucket is None:
                raise S3Error("NoSuchBucket", "The specified bucket does not exist")
            if exchange.operation in ("ListParts", "ListMultipartUploads") and not self.limits.lists_parts:
                raise S3Error("MethodNotAllowed")
            return OPERATIONS[exchange.operation].handle(self, bucket, request)

    # Buckets

    @_serves("CreateBucket")
    def _create_bucket(self, _bucket: Bucket, _request: Request) -> Response:
        return Response()

    @_serves("HeadBucket")
    def _head_bucket(self, _bucket: Bucket, _request: Request) -> Response:
        return Response()

    @_serves("ListObjectsV2", queries="list-type prefix start-after continuation-token max-keys encoding-type")
    def _list_objects(self, bucket: Bucket, request: Request) -> Response:
        query, shown = request.query, _shown(request)
        prefix, token = query.get("prefix", ""), query.get("continuation-token")
        after = query.get("start-after", "")
        if token is not None:
            try:
                after = base64.b64decode(token, validate=True).decode()
            except ValueError:
                raise S3Error("InvalidArgument", "The continuation token provided is incorrect") from None
        keys = [
            k for k in sorted(bucket.objects, key=str.encode) if k.startswith(prefix) and k.encode() > after.encode()
        ]
        page = keys[: self._page(query, "max-keys")]
        truncated = len(page) < len(keys)
        entries: Children = []
        for key in page:
            found = bucket.objects[key]
            entry: Children = [
                ("Key", shown(key)),
                ("LastModified", timestamp(found.modified)),
                ("ETag", f'"{found.e_tag}"'),
                ("Size", len(found.data)),
            ]
            entries.append(("Contents", entry))
        return _xml(
            "ListBucketResult",
            ("Name", request.exchange.bucket),
            ("EncodingType", query.get("encoding-type")),
            ("Prefix", shown(prefix)),
            ("KeyCount", len(page)),
            ("IsTruncated", truncated),
            ("NextContinuationToken", base64_of(page[-1].encode()) if truncated else None),
            *entries,
        )

    @_serves("ListMultipartUploads", queries="uploads prefix key-marker upload-id-marker max-uploads encoding-type")
    def _list_uploads(self, bucket: Bucket, request: Request) -> Response:
        query, shown = request.query, _shown(request)
        prefix, key_marker = query.get("prefix", ""), query.get("key-marker", "")
        id_marker = query.get("upload-id-marker", "") if key_marker else ""
        found = sorted(
            (
                (each.key.encode(), each.id)
                for each in bucket.uploads.values()
                if is_listed(each) and each.key.startswith(prefix)
            ),
        )
        # Without an id marker the whole key counts as seen.
        after = (key_marker.encode(), id_marker or "\U0010ffff")
        found = [each for each in found if each > after]
        page = found[: self._page(query, "max-uploads")]
        truncated = len(page) < len(found)
        entries: Children = []
        for key, upload_id in page:
            entry: Children = [
                ("Key", shown(key.decode())),
                ("UploadId", upload_id),
                ("Initiated", timestamp(bucket.uploads[upload_id].initiated)),
            ]
            entries.append(("Upload", entry))
        return _xml(
            "ListMultipartUploadsResult",
            ("Bucket", request.exchange.bucket),
            ("EncodingType", query.get("encoding-type")),
            ("Prefix", shown(prefix)),
            ("NextKeyMarker", shown(page[-1][0].decode()) if truncated else None),
            ("NextUploadIdMarker", page[-1][1] if truncated else None),
            ("IsTruncated", truncated),
            *entries,
        )

    def _page(self, query: Mapping[str, str], name: str) -> int:
        asked = query.get(name, str(self.limits.page_size))
        if not asked.isdecimal():
            raise S3Error("InvalidArgument", f"Provided {name} not an integer or within integer range")
        return min(int(asked), self.limits.page_size)

    # Objects

    @_serves(
        "PutObject", headers="content-md5 x-amz-checksum-crc32c x-amz-sdk-checksum-algorithm if-match if-none-match"
    )
    def _put_object(self, bucket: Bucket, request: Request) -> Response:
        content = _checked_content(request)
        self._check_write_condition(bucket, request)
        checksummed = "x-amz-checksum-crc32c" in request.headers
        found = bucket.objects[request.key] = StoredObject(
            content.data,
            content.e_tag,
            self._clock(),
            request.headers.get("content-type", "binary/octet-stream"),
            content.crc32c if checksummed else None,
            "FULL_OBJECT" if checksummed else None,
        )
        return Response(200, {"etag": f'"{found.e_tag}"', **_checksum_headers(found)})

    def _check_write_condition(self, bucket: Bucket, request: Request) -> None:
        """https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html."""
        if_match, if_none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
        found = bucket.objects.get(request.key)
        if if_none_match is not None:
            if if_none_match != "*" or if_match is not None:
                raise S3Error("NotImplemented", "A header you provided implies functionality that is not implemented")
            if found is not None:
                raise S3Error("PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
            if bucket.deleted_after.get(request.key, 0) >= request.exchange.number:
                raise S3Error("ConditionalRequestConflict", "A conflicting operation occurred during the request.")
        if if_match is not None:
            if found is None:
                raise S3Error("NoSuchKey", "The specified key does not exist.")
            if if_match.strip('"') != found.e_tag:
                raise S3Error("PreconditionFailed", "At least one of the pre-conditions you specified did not hold")

    @_serves("GetObject", headers="range if-match if-none-match x-amz-checksum-mode")
    def _get_object(self, bucket: Bucket, request: Request) -> Response:
        found = self._read(bucket, request)
        wanted = request.headers.get("range")
        if wanted is None or not self.limits.gives_ranges:
            return Response(200, _object_headers(request, found), found.data)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
        if asked is None or not (asked[1] or asked[2]):
            raise S3Error("NotImplemented", f"range {wanted!r} is not served here")
        size = len(found.data)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        else:
            first, last = max(0, size - int(asked[2])), size - 1
        if first > last:
            raise S3Error("InvalidRange", "The requested range is not satisfiable", content_range=f"bytes */{size}")
        headers = {**_object_headers(request, found), "content-range": f"bytes {first}-{last}/{size}"}
        # A checksum of the whole would say nothing of a part of it.
        headers = {name: value for name, value in headers.items() if not name.startswith("x-amz-checksum")}
        return Response(206, headers, found.data[first : last + 1])

    @_serves("HeadObject", headers="if-match if-none-match x-amz-checksum-mode")
    def _head_object(self, bucket: Bucket, request: Request) -> Response:
        found = self._read(bucket, request)
        return Response(200, {**_object_headers(request, found), "content-length": str(len(found.data))})

    def _read(self, bucket: Bucket, request: Request) -> StoredObject:
        found = bucket.objects.get(request.key)
        if found is None:
            raise S3Error("NoSuchKey", "The specified key does not exist.")
        if request.headers.get("if-match", found.e_tag).strip('"') not in (found.e_tag, "*"):
            raise S3Error("PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
        if request.headers.get("if-none-match", "").strip('"') in (found.e_tag, "*"):
            raise S3Error("NotModified", etag=f'"{found.e_tag}"')
        return found

    @_serves("DeleteObject")
    def _delete_object(self, bucket: Bucket, request: Request) -> Response:
        if bucket.objects.pop(request.key, None) is not None:
            bucket.deleted_after[request.key] = len(self.log)
        return Response(204)

    @_serves("CopyObject", headers="x-amz-copy-source x-amz-copy-source-if-match x-amz-metadata-directive")
    def _copy_object(self, bucket: Bucket, request: Request) -> Response:
        source, name = self._copy_source(request)
        if name == (request.exchange.bucket, request.key):
            raise S3Error(
                "InvalidRequest", "This copy request is illegal because it is trying to copy an object to itself"
            )
        if len(source.data) > self.limits.max_part_size:
            raise S3Error("InvalidRequest", "The specified copy source is larger than the maximum allowable size")
        content = Content(source.data)
        found = bucket.objects[request.key] = StoredObject(
            content.data,
            content.e_tag,
            self._clock(),
            source.content_type,
            content.crc32c if source.checksum else None,
            "FULL_OBJECT" if source.checksum else None,
        )
        return _xml(
            "CopyObjectResult",
            ("ETag", f'"{found.e_tag}"'),
            ("LastModified", timestamp(found.modified)),
            ("ChecksumCRC32C", found.checksum),
            ("ChecksumType", found.checksum_type),
        )

    def _copy_source(self, request: Request) -> tuple[StoredObject, tuple[str, str]]:
        bucket_name, _, key = unquote(request.headers["x-amz-copy-source"]).removeprefix("/").partition("/")
        bucket = self._buckets.get(bucket_name)
        if bucket is None:
            raise S3Error("NoSuchBucket", "The specified bucket does not exist")
        found = bucket.objects.get(key)
        if found is None:
            raise S3Error("NoSuchKey", "The specified key does not exist.")
        if request.headers.get("x-amz-copy-source-if-match", found.e_tag).strip('"') != found.e_tag:
            raise S3Error("PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
        return found, (bucket_name, key)

    # Multipart uploads

    @_serves("CreateMultipartUpload", queries="uploads", headers="x-amz-checksum-algorithm x-amz-checksum-type")
    def _create_upload(self, bucket: Bucket, request: Request) -> Response:
        algorithm = request.headers.get("x-amz-checksum-algorithm")
        kind = request.headers.get("x-amz-checksum-type")
        if algorithm not in (None, "CRC32C"):
            raise S3Error("NotImplemented", f"{algorithm} is not served here")
        if kind not in (None, "FULL_OBJECT", "COMPOSITE") or (kind and not algorithm):
            raise S3Error("InvalidRequest", "Value for x-amz-checksum-type header is invalid.")
        upload = Upload(
            key=request.key,
            # In order of their beginning, which is also the order in which AWS lists those of one key.
            id=f"{request.exchange.number:08x}.{uuid.uuid4().hex}",
            initiated=self._clock(),
            content_type=request.headers.get("content-type", "binary/octet-stream"),
            algorithm=algorithm,
            checksum_type=(kind or "COMPOSITE") if algorithm else None,
        )
        bucket.uploads[upload.id] = upload
        headers = {"x-amz-checksum-algorithm": algorithm, "x-amz-checksum-type": upload.checksum_type or ""}
        return _xml(
            "InitiateMultipartUploadResult",
            ("Bucket", request.exchange.bucket),
            ("Key", request.key),
            ("UploadId", upload.id),
            headers={name: value for name, value in headers.items() if value},
        )

    @_serves(
        "UploadPart",
        queries="uploadId partNumber",
        headers="content-md5 x-amz-checksum-crc32c x-amz-sdk-checksum-algorithm",
    )
    def _upload_part(self, bucket: Bucket, request: Request) -> Response:
        upload, number = self._upload_for_part(bucket, request)
        content = _checked_content(request)
        given = "CRC32C" if "x-amz-checksum-crc32c" in request.headers else None
        # With a checksum of the full object AWS computes what the client leaves out; otherwise both must agree.
        if given != upload.algorithm and not (given is None and upload.checksum_type == "FULL_OBJECT"):
            raise S3Error(
                "InvalidRequest",
                f"Checksum Type mismatch occurred, expected checksum Type: {upload.algorithm or 'null'}, "
                f"actual checksum Type: {given or 'null'}",
            )
        upload.parts[number] = content, self._clock()
        headers = {"etag": f'"{content.e_tag}"'}
        if upload.algorithm:
            headers["x-amz-checksum-crc32c"] = content.crc32c
        return Response(200, headers)

    @_serves(
        "UploadPartCopy",
        queries="uploadId partNumber",
        headers="x-amz-copy-source x-amz-copy-source-if-match x-amz-copy-source-range",
    )
    def _upload_part_copy(self, bucket: Bucket, request: Request) -> Response:
        upload, number = self._upload_for_part(bucket, request)
        source, _ = self._copy_source(request)
        data = source.data
        wanted = request.headers.get("x-amz-copy-source-range")
        if wanted is not None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            if asked is None or not int(asked[1]) <= int(asked[2]) < len(data):
                raise S3Error("InvalidArgument", f"Range specified is not valid for source object of size: {len(data)}")
            data = data[int(asked[1]) : int(asked[2]) + 1]
        content = Content(data)
        upload.parts[number] = content, self._clock()
        return _xml(
            "CopyPartResult",
            ("ETag", f'"{content.e_tag}"'),
            ("LastModified", timestamp(self._clock())),
            ("ChecksumCRC32C", content.crc32c if upload.algorithm else None),
        )

    def _upload_for_part(self, bucket: Bucket, request: Request) -> tuple[Upload, int]:
        number = request.exchange.part_number
        if number is None or not 1 <= number <= self.limits.max_parts:
            raise S3Error(
                "InvalidArgument", f"Part number must be an integer between 1 and {self.limits.max_parts}, inclusive"
            )
        upload = bucket.uploads.get(request.query["uploadId"])
        was_under_way = upload is not None and upload.aborted_after >= request.exchange.number
        if upload is not None and self.limits.parts_outlive_abort and was_under_way and upload.key == request.key:
            return upload, number
        return self._upload(bucket, request), number

    def _upload(self, bucket: Bucket, request: Request) -> Upload:
        upload = bucket.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key or upload.aborted_after:
            raise S3Error(
                "NoSuchUpload",
                "The specified multipart upload does not exist. The upload ID may be invalid, "
                "or the upload may have been aborted or completed.",
            )
        return upload

    @_serves("ListParts", queries="uploadId part-number-marker max-parts")
    def _list_parts(self, bucket: Bucket, request: Request) -> Response:
        upload = bucket.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key or not is_listed(upload):
            upload = self._upload(bucket, request)
        marker = request.query.get("part-number-marker") or "0"
        if not marker.isdecimal():
            raise S3Error("InvalidArgument", "Argument part-number-marker must be an integer")
        numbers = [number for number in sorted(upload.parts) if number > int(marker)]
        page = numbers[: self._page(request.query, "max-parts")]
        truncated = len(page) < len(numbers)
        entries: Children = []
        for number in page:
            content, modified = upload.parts[number]
            entry: Children = [
                ("PartNumber", number),
                ("LastModified", timestamp(modified)),
                ("ETag", f'"{content.e_tag}"'),
                ("Size", len(content.data)),
                ("ChecksumCRC32C", content.crc32c if upload.algorithm else None),
            ]
            entries.append(("Part", entry))
        return _xml(
            "ListPartsResult",
            ("Bucket", request.exchange.bucket),
            ("Key", request.key),
            ("UploadId", upload.id),
            ("PartNumberMarker", marker),
            ("NextPartNumberMarker", page[-1] if page else 0),
            ("IsTruncated", truncated),
            ("ChecksumAlgorithm", upload.algorithm),
            ("ChecksumType", upload.checksum_type),
            *entries,
        )

    @_serves(
        "CompleteMultipartUpload",
        queries="uploadId",
        headers="x-amz-checksum-crc32c x-amz-checksum-type x-amz-mp-object-size if-match if-none-match",
    )
    def _complete_upload(self, bucket: Bucket, request: Request) -> Response:
        upload = self._upload(bucket, request)
        parts = self._completed_parts(upload, request.body)
        data = b"".join(content.data for content in parts)
        size = request.headers.get("x-amz-mp-object-size", str(len(data)))
        if size != str(len(data)):
            raise S3Error(
                "InvalidRequest",
                f"The provided 'x-amz-mp-object-size' header value {size} does not match what was computed: "
                f"{len(data)}",
            )
        kind = request.headers.get("x-amz-checksum-type", upload.checksum_type)
        if kind != upload.checksum_type:
            raise S3Error(
                "InvalidRequest",
                f"The upload was created using the {upload.checksum_type} checksum mode. "
                "The complete request must use the same checksum mode.",
            )
        checksum: str | None = None
        if upload.checksum_type == "FULL_OBJECT":
            checksum = Content(data).crc32c
        elif upload.checksum_type == "COMPOSITE":
            raw = b"".join(base64.b64decode(content.crc32c) for content in parts)
            checksum = f"{Content(raw).crc32c}-{len(parts)}"
        given = request.headers.get("x-amz-checksum-crc32c")
        if given is not None and upload.algorithm is None:
            raise S3Error("InvalidRequest", "The upload was created without a checksum.")
        if given is not None and given != checksum:
            raise S3Error("BadDigest", "The CRC32C you specified did not match the calculated checksum.")
        self._check_write_condition(bucket, request)
        tags = b"".join(bytes.fromhex(content.e_tag) for content in parts)
        del bucket.uploads[upload.id]
        found = bucket.objects[request.key] = StoredObject(
            data,
            f"{Content(tags).e_tag}-{len(parts)}",
            self._clock(),
            upload.content_type,
            checksum,
            upload.checksum_type,
        )
        return _xml(
            "CompleteMultipartUploadResult",
            ("Bucket", request.exchange.bucket),
            ("Key", request.key),
            ("ETag", f'"{found.e_tag}"'),
            ("ChecksumCRC32C", found.checksum),
            ("ChecksumType", found.checksum_type),
        )

    def _completed_parts(self, upload: Upload, body: bytes) -> list[Content]:
        """The parts that the request names, each held against what is stored."""
        try:
            listed = [
                {child.tag.rpartition("}")[2]: (child.text or "").strip() for child in part}
                for part in ET.fromstring(body)
            ]
            numbers = [int(part["PartNumber"]) for part in listed]
            tags = [part["ETag"].strip('"') for part in listed]
        except (ET.ParseError, KeyError, ValueError):
            raise S3Error("MalformedXML", "The XML you provided was not well-formed") from None
        if not listed:
            raise S3Error("MalformedXML", "You must specify at least one part")
        if any(first >= second for first, second in pairwise(numbers)):
            raise S3Error("InvalidPartOrder", "The list of parts was not in ascending order.")
        parts: list[Content] = []
        for number, e_tag, part in zip(numbers, tags, listed, strict=True):
            content = upload.parts[number][0] if number in upload.parts else None
            if upload.checksum_type == "COMPOSITE" and "ChecksumCRC32C" not in part:
                raise S3Error(
                    "InvalidRequest",
                    "The upload was created using a crc32c checksum. The complete request must include the checksum "
                    f"for each part. It was missing for part {number} in the request.",
                )
            given = part.get("ChecksumCRC32C")
            if content is None or content.e_tag != e_tag or given not in (None, content.crc32c):
                raise S3Error("InvalidPart", f"Part {number} could not be found, or its entity tag does not match.")
            parts.append(content)
        if upload.algorithm and numbers != list(range(1, len(numbers) + 1)):
            # "... generates an HTTP 500 Internal Server Error": that is what AWS documents.
            raise S3Error("InternalError", "Part numbers of an upload with checksums must be consecutive from 1.")
        if any(len(content.data) < self.limits.min_part_size for content in parts[:-1]):
            raise S3Error("EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
        return parts

    @_serves("AbortMultipartUpload", queries="uploadId")
    def _abort_upload(self, bucket: Bucket, request: Request) -> Response:
        upload = bucket.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key or not is_listed(upload):
            upload = self._upload(bucket, request)
        upload.parts.clear()
        upload.aborted_after = len(self.log)
        return Response(204)


def _checked_content(request: Request) -> Content:
    """The body of a request, after it was held against the checksums that came with it."""
    content = Content(request.body)
    for name, actual, size, unreadable in (
        ("content-md5", base64_of(bytes.fromhex(content.e_tag)), 16, "InvalidDigest"),
        ("x-amz-checksum-crc32c", content.crc32c, 4, "InvalidRequest"),
    ):
        given = request.headers.get(name)
        if given is None:
            continue
        try:
            readable = len(base64.b64decode(given, validate=True)) == size
        except binascii.Error:
            readable = False
        if not readable:
            raise S3Error(unreadable, f"Value for {name} header is invalid.")
        if given != actual:
            raise S3Error("BadDigest", f"The {name} you specified did not match the calculated checksum.")
    return content


def _object_headers(request: Request, found: StoredObject) -> dict[str, str]:
    asked = request.headers.get("x-amz-checksum-mode") == "ENABLED"
    return {
        "etag": f'"{found.e_tag}"',
        "last-modified": formatdate(found.modified, usegmt=True),
        "content-type": found.content_type,
        "accept-ranges": "bytes",
        **(_checksum_headers(found) if asked else {}),
    }


def _checksum_headers(found: StoredObject) -> dict[str, str]:
    if found.checksum is None or found.checksum_type is None:
        return {}
    return {"x-amz-checksum-crc32c": found.checksum, "x-amz-checksum-type": found.checksum_type}


def _xml(name: str, *children: tuple[str, Value], headers: Mapping[str, str] | None = None) -> Response:
    return Response(200, {"content-type": "application/xml", **(headers or {})}, xml_document(name, children))


def _shown(request: Request) -> Callable[[str], str]:
    """How keys are written in a listing."""
    encoding = request.query.get("encoding-type")
    if encoding not in (None, "url"):
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request")
    return (lambda key: quote(key, safe="/")) if encoding else lambda key: key
