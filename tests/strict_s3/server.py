"""The server: connections, admission, faults."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import BinaryIO
from urllib.parse import unquote

from tests.fault_rules import PAUSE_S, Rule, Slow
from tests.loopback import LoopbackServer, hang_up
from tests.servers import S3Endpoint
from tests.strict_s3.errors import XML_DECLARATION, S3Error, query_pairs
from tests.strict_s3.faults import (
    Exchange,
    FailAfter,
    FailBefore,
    Fault,
    Hook,
    Late,
    Refuse,
    Response,
    Tamper,
    Throttle,
)
from tests.strict_s3.operations import OPERATIONS, Operations, operation_of
from tests.strict_s3.signatures import REGION, verify_signature
from tests.strict_s3.state import Bucket, Limits, Request, is_listed

ACCESS_KEY_ID = "strict"
SECRET_ACCESS_KEY = "strict-secret"
MAX_KEY_BYTES = 1024


class StrictS3(Operations, LoopbackServer):
    """The server. It serves until it is closed; use it in a `with` block.

    Args:
        limits: Its numbers; AWS's unless a test makes them small.
        clock: Seconds since the epoch, for dates and for the age of signatures.

    Attributes:
        limits: May be replaced between requests.
        credentials: Secrets by access key id.
        expired: Access key ids that are answered with ExpiredToken.
        log: Every request, in order of arrival.
    """

    def __init__(self, limits: Limits | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.limits = limits or Limits()
        self.credentials = {ACCESS_KEY_ID: SECRET_ACCESS_KEY}
        self.expired: set[str] = set()
        self.log: list[Exchange] = []
        self._clock = clock
        self._rules: list[Rule[Fault]] = []
        self._buckets: dict[str, Bucket] = {}
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
            self._buckets[name] = Bucket()
        return name

    def script(self, *rules: Rule[Fault]) -> None:
        """From now on, these rules instead of the earlier ones; the first that strikes decides."""
        with self._lock:
            self._rules = list(rules)

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
            return {each.id: each.key for each in self._buckets[bucket].uploads.values() if is_listed(each)}

    # The connection

    def serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            while (request := self._receive(connection, stream)) is not None:
                goes_on = self._play(connection, request)
                with self._lock:
                    self._lock.notify_all()
                if not goes_on:
                    return

    def _receive(self, connection: socket.socket, stream: BinaryIO) -> Request | None:
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
                query=dict(query_pairs(query)),
                headers=headers,
                bytes_in=0,
            )
            self.log.append(exchange)
        length = int(headers.get("content-length", 0))
        if length > self.limits.max_part_size and method == "PUT":
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
        return Request(exchange, target, body, authorization) if len(body) == length else None

    def _play(self, connection: socket.socket, request: Request) -> bool:
        """Do what is asked, and answer; whether the connection goes on."""
        exchange = request.exchange
        with self._lock:
            struck = [each.fault for each in self._rules if each.strikes(exchange)]
        fault = struck[0] if struck else None
        try:
            self._admit(request)
            match fault:
                case FailBefore():
                    exchange.dropped = True
                    return False
                case Refuse():
                    raise _scripted(fault)
                case Throttle() if not fault.admits():
                    raise _scripted(fault.refusal)
                case Hook():
                    fault.call(exchange)
                case Late():
                    self._send_late(connection, request, fault)
                    return True
                case _:
                    pass
            answer = self._perform(request)
        except S3Error as error:
            answer = self._refuse(exchange, error)
        if isinstance(fault, Tamper):
            answer = fault.change(answer)
        exchange.status = answer.status
        if isinstance(fault, FailAfter):
            exchange.dropped = True
            return False
        self._send(connection, exchange, answer, fault if isinstance(fault, Slow) else None)
        return request.headers.get("connection", "").lower() != "close"

    def _refuse(self, exchange: Exchange, error: S3Error, **headers: str) -> Response:
        exchange.code = error.code
        body = b"" if exchange.method == "HEAD" or error.status == 304 else error.document()
        return Response(error.status, {"content-type": "application/xml", **error.headers, **headers}, body)

    def _send(self, connection: socket.socket, exchange: Exchange, answer: Response, pace: Slow | None = None) -> None:
        exchange.status = answer.status
        exchange.bytes_out = len(answer.body)
        step = max(1, len(answer.body)) if pace is None else pace.piece_bytes
        pieces = [answer.body[start : start + step] for start in range(0, len(answer.body), step)]
        head = _head(exchange, answer.status, {"content-length": str(len(answer.body)), **answer.headers})
        try:
            connection.sendall(head + (pieces[0] if pieces else b""))
            for piece in pieces[1:]:
                time.sleep(PAUSE_S)
                connection.sendall(piece)
        except OSError:
            exchange.dropped = True
            raise

    def _send_late(self, connection: socket.socket, request: Request, late: Late) -> None:
        def send(data: bytes) -> None:
            try:
                connection.sendall(b"%x\r\n%b\r\n" % (len(data), data))
            except OSError:
                request.exchange.dropped = True  # and goes on: what was asked for happens all the same

        head = _head(request.exchange, 200, {"transfer-encoding": "chunked", "content-type": "application/xml"})
        connection.sendall(head)
        send(XML_DECLARATION)
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
        send(body.removeprefix(XML_DECLARATION))
        send(b"")

    # Admission

    def _admit(self, request: Request) -> None:
        exchange = request.exchange
        verify_signature(request, self.credentials, self.expired, self._clock())
        operation = OPERATIONS.get(exchange.operation)
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


def _scripted(refusal: Refuse) -> S3Error:
    headers = {} if refusal.retry_after_s is None else {"retry_after": str(refusal.retry_after_s)}
    return S3Error(refusal.code, "scripted", status=refusal.status, **headers)


def _head(exchange: Exchange, status: int, headers: Mapping[str, str]) -> bytes:
    fields = {"x-amz-request-id": f"{exchange.number:016X}", **headers}
    lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


def _is_meaningful(header: str) -> bool:
    return header.startswith(("x-amz-", "if-")) or header in ("range", "content-md5")
