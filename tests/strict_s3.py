"""A strict S3 in this process, with faults on demand.

It keeps AWS's rules where other servers for tests are lenient (checksums are checked, told and demanded; conditions
hold for Complete too; pages end; parts have a minimum size; signatures are verified), and it refuses with 501 whatever
it does not know, so that no test passes because a header was ignored. Everything is held in memory.

Rules: https://docs.aws.amazon.com/AmazonS3/latest/API/Welcome.html and, for checksums,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html. Left out: versions, ACLs, tags,
metadata, encryption, delimiters, presigned URLs, chunked signatures, and checksums other than CRC32C.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import formatdate
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import BinaryIO, NamedTuple, TypeAlias
from urllib.parse import quote, unquote
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from crc32c import crc32c

from tests.loopback import LoopbackServer, hang_up
from tests.servers import S3Endpoint

ACCESS_KEY_ID = "strict"
SECRET_ACCESS_KEY = "strict-secret"
REGION = "us-east-1"

MAX_KEY_BYTES = 1024
MAX_SKEW_S = 15 * 60


@dataclass(frozen=True)
class Rules:
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


# --------------------------------------------------------------------------------------------------------------- faults


class Response(NamedTuple):
    """What is sent back; names of headers are in lower case."""

    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes = b""


@dataclass
class Exchange:
    """One request and what became of it."""

    number: int
    """In order of arrival, from 1."""
    operation: str
    """AWS's name for it, or "Unknown"."""
    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    """Without Authorization."""
    bytes_in: int
    """Of the body, as many as arrived."""
    status: int | None = None
    """Of the answer, also of one that was dropped; None where it did not come to one."""
    code: str = ""
    """AWS's name of the error."""
    bytes_out: int = 0
    """Of the answer's body."""
    dropped: bool = False
    """The client did not get the answer."""

    @property
    def part_number(self) -> int | None:
        number = self.query.get("partNumber", "")
        return int(number) if number.isdecimal() else None


@dataclass(frozen=True)
class Refuse:
    """An error is answered, and nothing happens."""

    code: str
    status: int | None = None
    """Default: the one that AWS sends with this code."""
    retry_after_s: int | None = None


@dataclass(frozen=True)
class DropRequest:
    """The connection breaks, and nothing happens."""


@dataclass(frozen=True)
class DropAnswer:
    """It happens, and the connection breaks before the answer."""


@dataclass(frozen=True)
class Tamper:
    """It happens, and the answer is another: without a header it should have, for example."""

    change: Callable[[Response], Response]


@dataclass(frozen=True)
class Call:
    """`call` runs before it happens, when all of the request is there: to block it, or to do something before it."""

    call: Callable[[Exchange], object]


@dataclass(frozen=True)
class SlowBody:
    """The body of the answer comes in pieces with pauses between."""

    pieces: int
    pause_s: float


@dataclass(frozen=True)
class Late:
    """200 is said at once, then come blanks with pauses, then it happens: AWS's way with Complete and CopyObject.

    An error is then a part of the answer's body: the one that occurs, or `error`, with which nothing happens.
    """

    blanks: int = 0
    pause_s: float = 0.0
    error: str | None = None


class Throttle:
    """SlowDown for requests beyond a rate."""

    def __init__(
        self,
        per_second: float,
        *,
        burst: int = 1,
        retry_after_s: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refusal = Refuse("SlowDown", retry_after_s=retry_after_s)
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()

    def admits(self) -> bool:
        """Whether one more request is within the rate, which it then uses up."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


Action: TypeAlias = Refuse | DropRequest | DropAnswer | Tamper | Call | SlowBody | Late | Throttle


@dataclass
class Fault:
    """`action` for the requests that fit: from the `nth` one on, `times` times (None: for ever)."""

    action: Action
    operation: str = "*"
    """A pattern, as of a shell."""
    key: str = "*"
    """A pattern of the whole key."""
    part: int | None = None
    nth: int = 1
    times: int | None = 1
    seen: int = field(default=0, init=False)

    def strikes(self, exchange: Exchange) -> bool:
        """Count the request if it fits; whether it is one of those that are hit."""
        if not (
            fnmatchcase(exchange.operation, self.operation)
            and fnmatchcase(exchange.key, self.key)
            and self.part in (None, exchange.part_number)
        ):
            return False
        self.seen += 1
        return self.nth <= self.seen and (self.times is None or self.seen < self.nth + self.times)


# --------------------------------------------------------------------------------------------------------------- errors

_STATUS = {
    "AccessDenied": 403,
    "AuthorizationHeaderMalformed": 400,
    "BadDigest": 400,
    "BucketAlreadyOwnedByYou": 409,
    "ConditionalRequestConflict": 409,
    "EntityTooLarge": 400,
    "EntityTooSmall": 400,
    "ExpiredToken": 400,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidArgument": 400,
    "InvalidDigest": 400,
    "InvalidPart": 400,
    "InvalidPartOrder": 400,
    "InvalidRange": 416,
    "InvalidRequest": 400,
    "KeyTooLongError": 400,
    "MalformedXML": 400,
    "MethodNotAllowed": 405,
    "MissingContentLength": 411,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchUpload": 404,
    "NotImplemented": 501,
    "NotModified": 304,
    "PreconditionFailed": 412,
    "RequestTimeTooSkewed": 403,
    "RequestTimeout": 400,
    "ServiceUnavailable": 503,
    "SignatureDoesNotMatch": 403,
    "SlowDown": 503,
    "XAmzContentSHA256Mismatch": 400,
}


class S3Error(Exception):
    """A refusal, by AWS's code."""

    def __init__(self, code: str, message: str = "", *, status: int | None = None, **headers: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.status = status or _STATUS[code]
        self.message = message or code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def document(self) -> bytes:
        return _document("Error", [("Code", self.code), ("Message", self.message)])


# ---------------------------------------------------------------------------------------------------------------- state


@dataclass(frozen=True)
class _Content:
    """Bytes and what S3 tells of them."""

    data: bytes

    @cached_property
    def e_tag(self) -> str:
        return hashlib.md5(self.data, usedforsecurity=False).hexdigest()

    @cached_property
    def crc32c(self) -> str:
        return _base64(crc32c(self.data).to_bytes(4, "big"))


@dataclass(frozen=True)
class _Object:
    data: bytes = field(repr=False)
    e_tag: str
    modified: float
    content_type: str
    checksum: str | None = None
    checksum_type: str | None = None


@dataclass
class _Upload:
    key: str
    id: str
    initiated: float
    content_type: str
    algorithm: str | None
    checksum_type: str | None
    parts: dict[int, tuple[_Content, float]] = field(default_factory=dict)
    aborted_after: int = 0
    """The number of the last request that had begun when it was aborted; 0 if it was not."""


@dataclass
class _Bucket:
    objects: dict[str, _Object] = field(default_factory=dict)
    uploads: dict[str, _Upload] = field(default_factory=dict)
    deleted_after: dict[str, int] = field(default_factory=dict)
    """By key, the number of the last request that had begun when it was deleted."""


# -------------------------------------------------------------------------------------------------------------- routing


class _Request(NamedTuple):
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

_Handle: TypeAlias = "Callable[[StrictS3, _Bucket, _Request], Response]"


class _Operation(NamedTuple):
    handle: _Handle
    queries: frozenset[str]
    headers: frozenset[str]


_OPERATIONS: dict[str, _Operation] = {}

_ALWAYS = frozenset({"x-amz-date", "x-amz-content-sha256", "x-amz-security-token"})


def _serves(operation: str, *, queries: str = "", headers: str = "") -> Callable[[_Handle], _Handle]:
    """Registers a method for an operation, with the parameters and the meaningful headers that it understands."""

    def register(handle: _Handle) -> _Handle:
        _OPERATIONS[operation] = _Operation(handle, frozenset(queries.split()), frozenset(headers.split()) | _ALWAYS)
        return handle

    return register


# --------------------------------------------------------------------------------------------------------------- server


class StrictS3(LoopbackServer):
    """The server. It serves until it is closed; use it in a `with` block.

    Args:
        rules: Its limits.
        clock: Seconds since the epoch, for dates and for the age of signatures.

    Attributes:
        rules: May be replaced between requests.
        credentials: Secrets by access key id.
        expired: Access key ids that are answered with ExpiredToken.
        log: Every request, in order of arrival.
    """

    def __init__(self, rules: Rules | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.rules = rules or Rules()
        self.credentials = {ACCESS_KEY_ID: SECRET_ACCESS_KEY}
        self.expired: set[str] = set()
        self.log: list[Exchange] = []
        self._clock = clock
        self._faults: list[Fault] = []
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Condition(threading.RLock())
        super().__init__()

    @cached_property
    def endpoint(self) -> S3Endpoint:
        """How to reach it."""
        return S3Endpoint("strict", self.url, ACCESS_KEY_ID, SECRET_ACCESS_KEY, REGION)

    def new_bucket(self) -> str:
        """The name of a fresh, empty bucket, made without a request."""
        with self._lock:
            name = f"bucket-{len(self._buckets)}"
            self._buckets[name] = _Bucket()
        return name

    def script(self, *faults: Fault) -> None:
        """From now on, these faults instead of the earlier ones; the first that strikes is the one."""
        with self._lock:
            self._faults = list(faults)

    def requests(self, operation: str = "*", key: str = "*") -> list[Exchange]:
        """The requests whose operation and key fit these patterns."""
        with self._lock:
            return [each for each in self.log if fnmatchcase(each.operation, operation) and fnmatchcase(each.key, key)]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that becomes true with a request, also one whose client has hung up already."""
        with self._lock:
            assert self._lock.wait_for(holds, timeout=20), f"not in 20 s; the last requests: {self.log[-5:]}"

    def objects(self, bucket: str) -> dict[str, bytes]:
        """All objects of a bucket."""
        with self._lock:
            return {key: found.data for key, found in sorted(self._buckets[bucket].objects.items())}

    def uploads(self, bucket: str) -> dict[str, str]:
        """The keys of the uploads that take up room in a bucket, by their ids."""
        with self._lock:
            return {each.id: each.key for each in self._buckets[bucket].uploads.values() if _is_there(each)}

    # The connection

    def serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            while (request := self._receive(connection, stream)) is not None:
                goes_on = self._play(connection, request)
                with self._lock:
                    self._lock.notify_all()
                if not goes_on:
                    return

    def _receive(self, connection: socket.socket, stream: BinaryIO) -> _Request | None:
        """The next request with its body; None at the end."""
        line = stream.readline().decode("latin-1").split()
        if len(line) != 3:
            return None
        method, target, _ = line
        headers: dict[str, str] = {}
        while text := stream.readline().decode("latin-1").rstrip("\r\n"):
            name, _, value = text.partition(":")
            name = name.lower()
            headers[name] = f"{headers[name]},{value.strip()}" if name in headers else value.strip()
        authorization = headers.pop("authorization", "")
        path, _, query = target.partition("?")
        bucket, _, key = path[1:].partition("/")
        with self._lock:
            exchange = Exchange(
                number=len(self.log) + 1,
                operation=operation_of(method, target, headers),
                method=method,
                bucket=unquote(bucket),
                key=unquote(key),
                query=dict(_pairs(query)),
                headers=headers,
                bytes_in=0,
            )
            self.log.append(exchange)
        length = int(headers.get("content-length", 0))
        if length > self.rules.max_part_size and method == "PUT":
            refusal = S3Error("EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
            self._send(connection, exchange, self._refuse(exchange, refusal, connection="close"))
            hang_up(connection)
            return None
        if headers.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = stream.read(length)
        with self._lock:
            exchange.bytes_in = len(body)
            self._lock.notify_all()
        return _Request(exchange, target, body, authorization) if len(body) == length else None

    def _play(self, connection: socket.socket, request: _Request) -> bool:
        """Do what is asked, and answer; whether the connection goes on."""
        exchange = request.exchange
        with self._lock:
            struck = [each.action for each in self._faults if each.strikes(exchange)]
        action = struck[0] if struck else None
        try:
            self._admit(request)
            match action:
                case DropRequest():
                    exchange.dropped = True
                    return False
                case Refuse():
                    raise _scripted(action)
                case Throttle() if not action.admits():
                    raise _scripted(action.refusal)
                case Call():
                    action.call(exchange)
                case Late():
                    self._send_late(connection, request, action)
                    return True
                case _:
                    pass
            answer = self._perform(request)
        except S3Error as error:
            answer = self._refuse(exchange, error)
        if isinstance(action, Tamper):
            answer = action.change(answer)
        exchange.status = answer.status
        if isinstance(action, DropAnswer):
            exchange.dropped = True
            return False
        self._send(connection, exchange, answer, action if isinstance(action, SlowBody) else SlowBody(1, 0.0))
        return request.headers.get("connection", "").lower() != "close"

    def _refuse(self, exchange: Exchange, error: S3Error, **headers: str) -> Response:
        exchange.code = error.code
        body = b"" if exchange.method == "HEAD" or error.status == 304 else error.document()
        return Response(error.status, {"content-type": "application/xml", **error.headers, **headers}, body)

    def _send(
        self, connection: socket.socket, exchange: Exchange, answer: Response, pace: SlowBody = SlowBody(1, 0.0)
    ) -> None:
        exchange.status = answer.status
        exchange.bytes_out = len(answer.body)
        step = max(1, -(-len(answer.body) // pace.pieces))
        pieces = [answer.body[start : start + step] for start in range(0, len(answer.body), step)]
        head = _head(exchange, answer.status, {"content-length": str(len(answer.body)), **answer.headers})
        try:
            connection.sendall(head + (pieces[0] if pieces else b""))
            for piece in pieces[1:]:
                time.sleep(pace.pause_s)
                connection.sendall(piece)
        except OSError:
            exchange.dropped = True
            raise

    def _send_late(self, connection: socket.socket, request: _Request, late: Late) -> None:
        def send(data: bytes) -> None:
            try:
                connection.sendall(b"%x\r\n%b\r\n" % (len(data), data))
            except OSError:
                request.exchange.dropped = True  # and goes on: what was asked for happens all the same

        head = _head(request.exchange, 200, {"transfer-encoding": "chunked", "content-type": "application/xml"})
        connection.sendall(head)
        send(_XML)
        for _ in range(late.blanks):
            time.sleep(late.pause_s)
            send(b" ")
        try:
            if late.error is not None:
                raise S3Error(late.error, "scripted")
            body = self._perform(request).body
        except S3Error as error:
            request.exchange.code = error.code
            body = error.document()
        request.exchange.status, request.exchange.bytes_out = 200, len(body)
        send(body.removeprefix(_XML))
        send(b"")

    # Admission

    def _admit(self, request: _Request) -> None:
        exchange = request.exchange
        self._verify_signature(request)
        operation = _OPERATIONS.get(exchange.operation)
        if operation is None:
            raise S3Error("NotImplemented", f"{exchange.method} {request.target} is not served here")
        unknown = exchange.query.keys() - operation.queries
        unknown |= {name for name in exchange.headers if _is_meaningful(name)} - operation.headers
        if unknown or "transfer-encoding" in exchange.headers:
            raise S3Error("NotImplemented", f"{exchange.operation} does not know {sorted(unknown)} here")
        if exchange.method in ("PUT", "POST") and "content-length" not in exchange.headers:
            raise S3Error("MissingContentLength", "You must provide the Content-Length HTTP header.")
        if len(exchange.key.encode()) > MAX_KEY_BYTES:
            raise S3Error("KeyTooLongError", "Your key is too long")

    def _verify_signature(self, request: _Request) -> None:
        """Signature version 4: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html."""
        headers = request.headers
        if not request.authorization:
            raise S3Error("AccessDenied", "Access Denied")
        given = _AUTHORIZATION.fullmatch(request.authorization)
        if given is None:
            raise S3Error("AuthorizationHeaderMalformed", "The authorization header is malformed")
        secret = self.credentials.get(given["id"])
        if secret is None:
            raise S3Error("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
        if (given["region"], given["service"]) != (REGION, "s3"):
            raise S3Error("AuthorizationHeaderMalformed", f"expecting '{REGION}' and 's3'", x_amz_bucket_region=REGION)
        stamp = headers.get("x-amz-date", "")
        try:
            signed_at = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
        except ValueError:
            raise S3Error("AccessDenied", "AWS authentication requires a valid Date or x-amz-date header") from None
        if abs(self._clock() - signed_at) > MAX_SKEW_S or not stamp.startswith(given["date"]):
            raise S3Error("RequestTimeTooSkewed", "The difference between the times is too large.")
        names = given["headers"].split(";")
        needed = {"host", *(name for name in headers if name.startswith("x-amz-"))}
        if not needed.issubset(names) or not headers.keys() >= set(names):
            raise S3Error("AccessDenied", "There were headers present in the request which were not signed")
        if "x-amz-content-sha256" not in headers:
            raise S3Error("InvalidRequest", "Missing required header for this request: x-amz-content-sha256")
        path, _, query = request.target.partition("?")
        pairs = sorted((quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in _pairs(query))
        payload = headers["x-amz-content-sha256"]
        canonical = "\n".join((
            request.exchange.method,
            quote(unquote(path), safe="/-_.~"),
            "&".join(f"{name}={value}" for name, value in pairs),
            *(f"{name}:{' '.join(headers[name].split())}" for name in names),
            "",
            given["headers"],
            payload,
        ))  # fmt: skip
        scope = f"{given['date']}/{REGION}/s3/aws4_request"
        text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        key = f"AWS4{secret}".encode()
        for step in (*scope.split("/"), text):
            key = hmac.digest(key, step.encode(), "sha256")
        if not hmac.compare_digest(key.hex(), given["signature"]):
            raise S3Error("SignatureDoesNotMatch", f"The canonical request should have been: {canonical!r}")
        if given["id"] in self.expired:
            raise S3Error("ExpiredToken", "The provided token has expired.")
        if payload != "UNSIGNED-PAYLOAD" and payload != hashlib.sha256(request.body).hexdigest():
            raise S3Error("XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' is not that of the body.")

    def _perform(self, request: _Request) -> Response:
        exchange = request.exchange
        with self._lock:
            bucket = self._buckets.get(exchange.bucket)
            if exchange.operation == "CreateBucket":
                if bucket is not None:
                    raise S3Error("BucketAlreadyOwnedByYou")
                bucket = self._buckets[exchange.bucket] = _Bucket()
            if bucket is None:
                raise S3Error("NoSuchBucket", "The specified bucket does not exist")
            if exchange.operation in ("ListParts", "ListMultipartUploads") and not self.rules.lists_parts:
                raise S3Error("MethodNotAllowed")
            return _OPERATIONS[exchange.operation].handle(self, bucket, request)

    # Buckets

    @_serves("CreateBucket")
    def _create_bucket(self, _bucket: _Bucket, _request: _Request) -> Response:
        return Response()

    @_serves("HeadBucket")
    def _head_bucket(self, _bucket: _Bucket, _request: _Request) -> Response:
        return Response()

    @_serves("ListObjectsV2", queries="list-type prefix start-after continuation-token max-keys encoding-type")
    def _list_objects(self, bucket: _Bucket, request: _Request) -> Response:
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
        entries: _Children = []
        for key in page:
            found = bucket.objects[key]
            entry: _Children = [
                ("Key", shown(key)),
                ("LastModified", _timestamp(found.modified)),
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
            ("NextContinuationToken", _base64(page[-1].encode()) if truncated else None),
            *entries,
        )

    @_serves("ListMultipartUploads", queries="uploads prefix key-marker upload-id-marker max-uploads encoding-type")
    def _list_uploads(self, bucket: _Bucket, request: _Request) -> Response:
        query, shown = request.query, _shown(request)
        prefix, key_marker = query.get("prefix", ""), query.get("key-marker", "")
        id_marker = query.get("upload-id-marker", "") if key_marker else ""
        found = sorted(
            (
                (each.key.encode(), each.id)
                for each in bucket.uploads.values()
                if _is_there(each) and each.key.startswith(prefix)
            ),
        )
        # Without an id marker the whole key counts as seen.
        after = (key_marker.encode(), id_marker or "\U0010ffff")
        found = [each for each in found if each > after]
        page = found[: self._page(query, "max-uploads")]
        truncated = len(page) < len(found)
        entries: _Children = []
        for key, upload_id in page:
            entry: _Children = [
                ("Key", shown(key.decode())),
                ("UploadId", upload_id),
                ("Initiated", _timestamp(bucket.uploads[upload_id].initiated)),
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
        asked = query.get(name, str(self.rules.page_size))
        if not asked.isdecimal():
            raise S3Error("InvalidArgument", f"Provided {name} not an integer or within integer range")
        return min(int(asked), self.rules.page_size)

    # Objects

    @_serves(
        "PutObject", headers="content-md5 x-amz-checksum-crc32c x-amz-sdk-checksum-algorithm if-match if-none-match"
    )
    def _put_object(self, bucket: _Bucket, request: _Request) -> Response:
        content = _checked_content(request)
        self._check_write_condition(bucket, request)
        checksummed = "x-amz-checksum-crc32c" in request.headers
        found = bucket.objects[request.key] = _Object(
            content.data,
            content.e_tag,
            self._clock(),
            request.headers.get("content-type", "binary/octet-stream"),
            content.crc32c if checksummed else None,
            "FULL_OBJECT" if checksummed else None,
        )
        return Response(200, {"etag": f'"{found.e_tag}"', **_checksum_headers(found)})

    def _check_write_condition(self, bucket: _Bucket, request: _Request) -> None:
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
    def _get_object(self, bucket: _Bucket, request: _Request) -> Response:
        found = self._read(bucket, request)
        wanted = request.headers.get("range")
        if wanted is None or not self.rules.gives_ranges:
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
    def _head_object(self, bucket: _Bucket, request: _Request) -> Response:
        found = self._read(bucket, request)
        return Response(200, {**_object_headers(request, found), "content-length": str(len(found.data))})

    def _read(self, bucket: _Bucket, request: _Request) -> _Object:
        found = bucket.objects.get(request.key)
        if found is None:
            raise S3Error("NoSuchKey", "The specified key does not exist.")
        if request.headers.get("if-match", found.e_tag).strip('"') not in (found.e_tag, "*"):
            raise S3Error("PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
        if request.headers.get("if-none-match", "").strip('"') in (found.e_tag, "*"):
            raise S3Error("NotModified", etag=f'"{found.e_tag}"')
        return found

    @_serves("DeleteObject")
    def _delete_object(self, bucket: _Bucket, request: _Request) -> Response:
        if bucket.objects.pop(request.key, None) is not None:
            bucket.deleted_after[request.key] = len(self.log)
        return Response(204)

    @_serves("CopyObject", headers="x-amz-copy-source x-amz-copy-source-if-match x-amz-metadata-directive")
    def _copy_object(self, bucket: _Bucket, request: _Request) -> Response:
        source, name = self._copy_source(request)
        if name == (request.exchange.bucket, request.key):
            raise S3Error(
                "InvalidRequest", "This copy request is illegal because it is trying to copy an object to itself"
            )
        if len(source.data) > self.rules.max_part_size:
            raise S3Error("InvalidRequest", "The specified copy source is larger than the maximum allowable size")
        content = _Content(source.data)
        found = bucket.objects[request.key] = _Object(
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
            ("LastModified", _timestamp(found.modified)),
            ("ChecksumCRC32C", found.checksum),
            ("ChecksumType", found.checksum_type),
        )

    def _copy_source(self, request: _Request) -> tuple[_Object, tuple[str, str]]:
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
    def _create_upload(self, bucket: _Bucket, request: _Request) -> Response:
        algorithm = request.headers.get("x-amz-checksum-algorithm")
        kind = request.headers.get("x-amz-checksum-type")
        if algorithm not in (None, "CRC32C"):
            raise S3Error("NotImplemented", f"{algorithm} is not served here")
        if kind not in (None, "FULL_OBJECT", "COMPOSITE") or (kind and not algorithm):
            raise S3Error("InvalidRequest", "Value for x-amz-checksum-type header is invalid.")
        upload = _Upload(
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
    def _upload_part(self, bucket: _Bucket, request: _Request) -> Response:
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
    def _upload_part_copy(self, bucket: _Bucket, request: _Request) -> Response:
        upload, number = self._upload_for_part(bucket, request)
        source, _ = self._copy_source(request)
        data = source.data
        wanted = request.headers.get("x-amz-copy-source-range")
        if wanted is not None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            if asked is None or not int(asked[1]) <= int(asked[2]) < len(data):
                raise S3Error("InvalidArgument", f"Range specified is not valid for source object of size: {len(data)}")
            data = data[int(asked[1]) : int(asked[2]) + 1]
        content = _Content(data)
        upload.parts[number] = content, self._clock()
        return _xml(
            "CopyPartResult",
            ("ETag", f'"{content.e_tag}"'),
            ("LastModified", _timestamp(self._clock())),
            ("ChecksumCRC32C", content.crc32c if upload.algorithm else None),
        )

    def _upload_for_part(self, bucket: _Bucket, request: _Request) -> tuple[_Upload, int]:
        number = request.exchange.part_number
        if number is None or not 1 <= number <= self.rules.max_parts:
            raise S3Error(
                "InvalidArgument", f"Part number must be an integer between 1 and {self.rules.max_parts}, inclusive"
            )
        upload = bucket.uploads.get(request.query["uploadId"])
        was_under_way = upload is not None and upload.aborted_after >= request.exchange.number
        if upload is not None and self.rules.parts_outlive_abort and was_under_way and upload.key == request.key:
            return upload, number
        return self._upload(bucket, request), number

    def _upload(self, bucket: _Bucket, request: _Request) -> _Upload:
        upload = bucket.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key or upload.aborted_after:
            raise S3Error(
                "NoSuchUpload",
                "The specified multipart upload does not exist. The upload ID may be invalid, "
                "or the upload may have been aborted or completed.",
            )
        return upload

    @_serves("ListParts", queries="uploadId part-number-marker max-parts")
    def _list_parts(self, bucket: _Bucket, request: _Request) -> Response:
        upload = bucket.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key or not _is_there(upload):
            upload = self._upload(bucket, request)
        marker = request.query.get("part-number-marker") or "0"
        if not marker.isdecimal():
            raise S3Error("InvalidArgument", "Argument part-number-marker must be an integer")
        numbers = [number for number in sorted(upload.parts) if number > int(marker)]
        page = numbers[: self._page(request.query, "max-parts")]
        truncated = len(page) < len(numbers)
        entries: _Children = []
        for number in page:
            content, modified = upload.parts[number]
            entry: _Children = [
                ("PartNumber", number),
                ("LastModified", _timestamp(modified)),
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
    def _complete_upload(self, bucket: _Bucket, request: _Request) -> Response:
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
            checksum = _Content(data).crc32c
        elif upload.checksum_type == "COMPOSITE":
            raw = b"".join(base64.b64decode(content.crc32c) for content in parts)
            checksum = f"{_Content(raw).crc32c}-{len(parts)}"
        given = request.headers.get("x-amz-checksum-crc32c")
        if given is not None and upload.algorithm is None:
            raise S3Error("InvalidRequest", "The upload was created without a checksum.")
        if given is not None and given != checksum:
            raise S3Error("BadDigest", "The CRC32C you specified did not match the calculated checksum.")
        self._check_write_condition(bucket, request)
        tags = b"".join(bytes.fromhex(content.e_tag) for content in parts)
        del bucket.uploads[upload.id]
        found = bucket.objects[request.key] = _Object(
            data,
            f"{_Content(tags).e_tag}-{len(parts)}",
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

    def _completed_parts(self, upload: _Upload, body: bytes) -> list[_Content]:
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
        parts: list[_Content] = []
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
        if any(len(content.data) < self.rules.min_part_size for content in parts[:-1]):
            raise S3Error("EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
        return parts

    @_serves("AbortMultipartUpload", queries="uploadId")
    def _abort_upload(self, bucket: _Bucket, request: _Request) -> Response:
        upload = bucket.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key or not _is_there(upload):
            upload = self._upload(bucket, request)
        upload.parts.clear()
        upload.aborted_after = len(self.log)
        return Response(204)


def _is_there(upload: _Upload) -> bool:
    """Whether it can be seen: an aborted one only while parts of it came late."""
    return not upload.aborted_after or bool(upload.parts)


def _scripted(refusal: Refuse) -> S3Error:
    headers = {} if refusal.retry_after_s is None else {"retry_after": str(refusal.retry_after_s)}
    return S3Error(refusal.code, "scripted", status=refusal.status, **headers)


def _checked_content(request: _Request) -> _Content:
    """The body of a request, after it was held against the checksums that came with it."""
    content = _Content(request.body)
    for name, actual, size, unreadable in (
        ("content-md5", _base64(bytes.fromhex(content.e_tag)), 16, "InvalidDigest"),
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


def _object_headers(request: _Request, found: _Object) -> dict[str, str]:
    asked = request.headers.get("x-amz-checksum-mode") == "ENABLED"
    return {
        "etag": f'"{found.e_tag}"',
        "last-modified": formatdate(found.modified, usegmt=True),
        "content-type": found.content_type,
        "accept-ranges": "bytes",
        **(_checksum_headers(found) if asked else {}),
    }


def _checksum_headers(found: _Object) -> dict[str, str]:
    if found.checksum is None or found.checksum_type is None:
        return {}
    return {"x-amz-checksum-crc32c": found.checksum, "x-amz-checksum-type": found.checksum_type}


# -------------------------------------------------------------------------------------------------------------- formats

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<id>[^/]+)/(?P<date>\d{8})/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request, ?"
    r"SignedHeaders=(?P<headers>[^,]+), ?Signature=(?P<signature>[0-9a-f]{64})"
)
_XML = b'<?xml version="1.0" encoding="UTF-8"?>\n'

_Children: TypeAlias = "list[tuple[str, _Value]]"
_Value: TypeAlias = "str | int | bool | _Children | None"


def _document(name: str, children: Sequence[tuple[str, _Value]]) -> bytes:
    def element(name: str, value: _Value) -> Iterable[str]:
        if value is None:
            return
        yield f"<{name}>"
        if isinstance(value, list):
            for child in value:
                yield from element(*child)
        else:
            yield escape(str(value).lower() if isinstance(value, bool) else str(value))
        yield f"</{name}>"

    return _XML + "".join(element(name, list(children))).encode()


def _xml(name: str, *children: tuple[str, _Value], headers: Mapping[str, str] | None = None) -> Response:
    return Response(200, {"content-type": "application/xml", **(headers or {})}, _document(name, children))


def _head(exchange: Exchange, status: int, headers: Mapping[str, str]) -> bytes:
    fields = {"x-amz-request-id": f"{exchange.number:016X}", **headers}
    lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


def _shown(request: _Request) -> Callable[[str], str]:
    """How keys are written in a listing."""
    encoding = request.query.get("encoding-type")
    if encoding not in (None, "url"):
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request")
    return (lambda key: quote(key, safe="/")) if encoding else lambda key: key


def _pairs(query: str) -> list[tuple[str, str]]:
    pairs = [each.partition("=") for each in query.split("&") if each]
    return [(unquote(name), unquote(value)) for name, _, value in pairs]


def _is_meaningful(header: str) -> bool:
    return header.startswith(("x-amz-", "if-")) or header in ("range", "content-md5")


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
