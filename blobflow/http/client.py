"""HTTP/1.1 for large bodies: pooled connections, no copies, and timeouts on silence instead of on whole requests.

The S3 store sends all its requests here. This module knows nothing of S3: the caller names the target and signs each
attempt. It uses `http.client`, which moves a gibibyte for a third of the processor time of the usual clients.
"""

from __future__ import annotations

import base64
import fcntl
import http.client
import io
import logging
import os
import re
import select
import socket
import ssl
import sys
import termios
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Protocol, cast
from urllib.parse import SplitResult, unquote, urlsplit

from typing_extensions import Buffer, override

from blobflow.activity import moved
from blobflow.credentials import header_value
from blobflow.errors import OsFault, SizeMismatch, error_anywhere, os_fault

_log = logging.getLogger(__name__)

SLICE_BYTES = 128 * 1024
"""Maximum bytes of one send. Over TLS a send returns only when all of it is gone, so on a slow link a large one would
look like silence."""

DRAIN_BYTES = 64 * 1024
"""The rest of a response below which reading it is cheaper than opening a new connection."""

MAX_FIELDS = 100
MAX_LINE_BYTES = 64 * 1024
"""The limit of `http.client`."""
MAX_HEAD_BYTES = 128 * 1024
"""Limit for a response's head with all before it (`100 Continue`, hints for browsers), or for its trailers."""
MAX_CHUNK_LINE_BYTES = 4 * 1024
"""Limit for a chunk size and its extensions, which nobody uses."""

_NO_MESSAGE = http.client.HTTPMessage()

BROKEN = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""The other side is gone: the errors of a connection that was closed while it was idle."""


class RequestBody(Protocol):
    """Bytes to send. Each attempt iterates from the start."""

    size: int

    def __iter__(self) -> Iterator[Buffer]: ...


class HttpError(Exception):
    """An exchange failed below HTTP; the reason is the `__cause__`.

    Attributes:
        moved: Bytes of the body that had moved, in either direction.
        timeout_s: Seconds of silence, if it timed out.
        connecting: `host:port`, if there was no connection to it.
    """

    def __init__(self, error: Exception, moved: int, timeout_s: float | None = None, connecting: str = "") -> None:
        super().__init__(
            f"no connection to {connecting}: {_reason(error)}" if connecting else f"{type(error).__name__}: {error}"
        )
        self.moved = moved
        self.connecting = connecting
        self.timeout_s = timeout_s if isinstance(error, TimeoutError) else None


def _reason(error: Exception) -> str:
    """Why there is no connection, in the system's words."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)  # asyncio replaces the system's text
    return (isinstance(error, OSError) and error.strerror) or str(error)


class Response:
    """A response whose head was read. Leaving the `with` block returns the connection to the pool, or drops it."""

    def __init__(self, response: _ResponseReader, idle_timeout_s: float, release: Callable[[bool], None]) -> None:
        self.status = response.status
        self.headers = response.fields
        """Fields by their names in lower case; the first of several with one name."""
        self._response = response
        self._idle_timeout_s = idle_timeout_s
        self._release = release

    @property
    def length(self) -> int | None:
        """Bytes of the body still to come; None if the server did not announce them."""
        return self._response.length

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` with the next bytes of the body; fewer only at the end of the body.

        Raises:
            HttpError: the connection broke or went silent.
        """
        filled = 0
        try:
            while filled < len(buffer):
                received = self._response.receive_into(buffer[filled:])
                if not received:
                    break
                filled += received
                moved()
        except (OSError, http.client.HTTPException) as error:
            raise HttpError(error, filled, self._idle_timeout_s) from error
        return filled

    def read(self, limit: int) -> bytes:
        """The rest of the body, cut off after `limit` bytes."""
        buffer = memoryview(bytearray(limit if self.length is None else min(limit, self.length)))
        return bytes(buffer[: self.read_into(buffer)])

    def __enter__(self) -> Response:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reusable = kind is None and not self._response.will_close
        if reusable and self.length is not None and self.length <= DRAIN_BYTES:
            try:
                self._response.read()
            except (OSError, http.client.HTTPException):
                reusable = False
        reusable = reusable and self._response.isclosed()
        self._response.close()  # it may own the socket, if the connection has released it
        self._release(reusable)


class HttpClient:
    """Connections to one origin, kept open between requests, for any number of threads.

    Args:
        origin: `http://host[:port]` or `https://host[:port]`.
        tls: Context for https; None is Python's default.
        connect_timeout_s: Limit for making a connection.
        idle_timeout_s: Limit for a single byte of a body to move, and for a whole head to arrive.
        max_idle: Idle connections to keep; the callers' threads determine how many are in use.
        proxy: URL of an HTTP proxy to go through; the scheme may be missing.

    Raises:
        ValueError: the proxy needs TLS or another protocol.
    """

    def __init__(
        self,
        origin: str,
        *,
        connect_timeout_s: float,
        idle_timeout_s: float,
        max_idle: int,
        tls: ssl.SSLContext | None = None,
        proxy: str | None = None,
    ) -> None:
        parts = urlsplit(origin)
        self._origin = origin
        self._host = parts.hostname or ""
        self._port = parts.port
        self._secure = parts.scheme == "https"
        self._tls = tls if tls is not None or not self._secure else ssl.create_default_context()
        self._proxy = _proxy_parts(proxy) if proxy else None
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._max_idle = max_idle
        # Last in, first out: the server is least likely to have closed the connection used last.
        # A deque needs no lock, so no fork can leave one locked.
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._closed = False

    def send(
        self,
        method: str,
        target: str,
        headers: Callable[[], Mapping[str, str]],
        body: RequestBody | None = None,
        *,
        idempotent: bool = True,
        idle_timeout_s: float | None = None,
    ) -> Response:
        """Send a request and return the head of its response.

        A connection that the server closed while it was idle is replaced, once and silently. An idempotent request is
        sent again on the new one.

        Args:
            target: Path and query, encoded.
            headers: Makes the headers of one attempt, including `Host`, so that every signature is fresh.
            idle_timeout_s: For this request instead of the usual one.

        Raises:
            HttpError: there was no connection, or it broke or went silent before the head of the response.
            SizeMismatch: the body's length differs from its `size`.
            UsageError: a header cannot be sent; its value is not shown.
        """
        timeout_s = self._idle_timeout_s if idle_timeout_s is None else idle_timeout_s
        given = sendable(headers())  # before a connection is taken: getting credentials may fail
        connection = self._take()
        reused = connection is not None
        try:
            return self._attempt(connection or self._connection(), method, target, given, body, timeout_s)
        except HttpError as error:
            if not (reused and idempotent and isinstance(error.__cause__, BROKEN)):
                raise
            _log.debug("stale_connection origin=%s error=%s", self._origin, error)
        return self._attempt(self._connection(), method, target, sendable(headers()), body, timeout_s)

    def close(self) -> None:
        """Close the idle connections; those in use are closed when they come back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def __repr__(self) -> str:
        return f"<HttpClient {self._origin}, {len(self._idle)} idle>"

    def _attempt(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: RequestBody | None,
        timeout_s: float,
    ) -> Response:
        try:
            self._send_head(connection, method, target, headers, timeout_s)
            try:
                sent = self._send_body(connection, body, timeout_s) if body is not None else 0
            except HttpError as error:
                # A server may refuse early, answer and close: its response is worth more than our broken pipe.
                if not isinstance(error.__cause__, BROKEN):
                    raise
                answer = self._answer(connection, error.moved, timeout_s, reusable=False)
                if answer.status < 400:
                    raise
                return answer
            return self._answer(connection, sent, timeout_s)
        except BaseException:
            connection.close()
            raise

    def _send_head(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        waiting_s, connecting = timeout_s, ""
        try:
            if connection.sock is None:
                waiting_s, connecting = self._connect_timeout_s, f"{connection.host}:{connection.port}"
                connection.connect()  # turns Nagle's algorithm off
                waiting_s, connecting = timeout_s, ""
            opened = _socket(connection)
            if opened.gettimeout() != timeout_s:
                opened.settimeout(timeout_s)
            if self._proxy is not None and not self._secure:
                target = self._origin + target
                headers = {**headers, **_proxy_authorization(self._proxy)}
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
        except (OSError, http.client.HTTPException, ValueError) as error:
            refuse_limits(error)
            raise HttpError(error, 0, waiting_s, connecting) from error

    def _send_body(self, connection: http.client.HTTPConnection, body: RequestBody, timeout_s: float) -> int:
        """Send the whole body and return its length. Errors of the body's source pass through unchanged."""
        sent = 0
        for chunk in body:
            view = memoryview(chunk).cast("B")
            if sent + len(view) > body.size:
                raise SizeMismatch(
                    "the body is longer than it says", what="body", expected=body.size, actual=sent + len(view)
                )
            position = 0
            while position < len(view):
                try:
                    taken = _socket(connection).send(view[position : position + SLICE_BYTES])
                except OSError as error:
                    raise HttpError(error, sent + position, timeout_s) from error
                position += taken
                moved()
            sent += position
        if sent != body.size:
            raise SizeMismatch("the body is shorter than it says", what="body", expected=body.size, actual=sent)
        return sent

    def _answer(
        self, connection: http.client.HTTPConnection, sent: int, timeout_s: float, *, reusable: bool = True
    ) -> Response:
        try:
            if sent:
                self._outlast_send_queue(connection, timeout_s)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise HttpError(error, sent, timeout_s) from error
        assert isinstance(response, _ResponseReader)
        return Response(response, timeout_s, lambda at_end: self._give_back(connection, reusable and at_end))

    def _outlast_send_queue(self, connection: http.client.HTTPConnection, timeout_s: float) -> None:
        """Wait while the kernel still delivers sent bytes.

        The kernel takes megabytes at once. On a slow link they may need longer than the timeout, and the server cannot
        answer before. While the queue shrinks, the connection is not silent.
        """
        opened = _socket(connection)
        poll = select.poll()
        # Over TLS, readable bytes need not be a response: session tickets come at any time.
        poll.register(opened, 0 if self._secure else select.POLLIN)
        queued, moved_at, pause_s = unsent_bytes(opened), time.monotonic(), 0.001
        while queued and not poll.poll(pause_s * 1000):
            left = unsent_bytes(opened)
            if left < queued:
                queued, moved_at = left, time.monotonic()
                moved()
            elif time.monotonic() - moved_at > timeout_s:
                raise TimeoutError("the kernel cannot deliver what was sent")
            pause_s = min(pause_s * 2, timeout_s / 8)

    def _take(self) -> http.client.HTTPConnection | None:
        """An idle connection on which nothing has arrived since its last use; None if there is none."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            poll = select.poll()
            poll.register(_socket(connection), select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()  # readable without a request: an end of file, or an unexpected response
        return None

    def _give_back(self, connection: http.client.HTTPConnection, reusable: bool) -> None:
        if reusable and not self._closed and len(self._idle) < self._max_idle:
            self._idle.append(connection)
        else:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._host, self._port
        if self._proxy is not None:
            host, port = self._proxy.hostname or "", self._proxy.port
        if self._secure:
            connection = http.client.HTTPSConnection(host, port, timeout=self._connect_timeout_s, context=self._tls)
            if self._proxy is not None:
                connection.set_tunnel(self._host, self._port, _proxy_authorization(self._proxy))
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._connect_timeout_s)
        connection.response_class = _ResponseReader
        return connection


def refuse_limits(error: Exception) -> None:
    """Return unless an error is a limit of this process, which no server can lift.

    Raises:
        SystemLimit: it is such a limit.
    """
    if isinstance(error, OSError) and os_fault(error) is OsFault.OPEN_FILES:
        raise error_anywhere(error, f"no connection can be opened: {error.strerror}") or error from error


def sendable(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers without white space around their values.

    Raises:
        UsageError: one cannot be sent. It is named; its value is not shown, because it may be a secret.
    """
    return {name: header_value(name, value) for name, value in headers.items()}


def read_head(first: bytes, lines: Sequence[bytes]) -> tuple[int, int, dict[str, str]]:
    """Version (10 or 11), status and fields of a response; names in lower case, the first of several with one name.

    Raises:
        http.client.HTTPException: the lines are not a head.
    """
    status = _STATUS.fullmatch(first)
    if status is None:
        raise http.client.BadStatusLine(repr(first[:80]))
    if len(lines) > MAX_FIELDS:
        raise http.client.HTTPException(f"the head has more than {MAX_FIELDS} fields")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or name != name.strip():  # RFC 9112 no longer allows folded lines
            raise http.client.HTTPException("a line of the head is no field")
        known = fields.setdefault(name.lower(), value.strip())
        if name.lower() in _FRAMING and known != value.strip():
            raise http.client.HTTPException(f"the head has two fields {name[:40]} that differ")
    return 10 + int(status[1]), int(status[2]), fields


_FRAMING = frozenset({"content-length", "transfer-encoding"})
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*?)?(?:\r?\n)?", re.DOTALL)


def body_length(status: int, method: str | None, fields: Mapping[str, str]) -> int | None:
    """Bytes of a response's body; None if it is chunked, or ends with the connection.

    Raises:
        http.client.HTTPException: the length is invalid, or the encoding is not supported.
    """
    if status in (204, 304) or method == "HEAD":
        return 0
    if is_chunked(fields):
        return None
    if fields.get("transfer-encoding", "").lower() not in ("", "identity"):
        raise http.client.HTTPException("the body comes in an encoding that was not asked for")
    length = fields.get("content-length")
    if length is not None and not re.fullmatch("[0-9]{1,19}", length):
        raise http.client.HTTPException("the Content-Length is not a number of bytes")
    return None if length is None else int(length)


def is_chunked(fields: Mapping[str, str]) -> bool:
    """Whether the body of a response is chunked."""
    return fields.get("transfer-encoding", "").lower() == "chunked"


def closes(version: int, fields: Mapping[str, str]) -> bool:
    """Whether the server closes the connection after this response."""
    connection = fields.get("connection", "").lower()
    return "close" in connection or (version == 10 and "keep-alive" not in connection)


class Chunks:
    """The position of a reader in a chunked body. It is given the framing between the body's bytes, line by line.

    Attributes:
        left: Bytes of the current chunk still to come; if 0, a line comes next.
        ended: Whether the body and its trailers are complete.
    """

    def __init__(self) -> None:
        self.left = 0
        self.ended = False
        self._expects: Literal["size", "end of chunk", "trailer"] = "size"
        self._trailers = 0

    def took(self, count: int) -> None:
        """Record that `count` bytes of the current chunk were read."""
        self.left -= count

    def line(self, line: bytes) -> None:
        """Record a line, without its line end.

        Raises:
            http.client.HTTPException: such a line may not come here.
        """
        if self._expects == "size":
            digits = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", line, re.DOTALL)
            if digits is None:
                raise http.client.HTTPException("this is not the size of a chunk")
            self.left = int(digits[1], 16)
            self._expects = "end of chunk" if self.left else "trailer"
        elif self._expects == "end of chunk":
            if line:
                raise http.client.HTTPException("a chunk is longer than it says")
            self._expects = "size"
        elif line:
            self._trailers += 1
            if self._trailers > MAX_FIELDS:
                raise http.client.HTTPException(f"the body has more than {MAX_FIELDS} trailers")
        else:
            self.ended = True


class _Reader(io.RawIOBase):
    """A socket's bytes. Framing, which is everything except the body, has a limit in bytes and a deadline.

    Without them, a head that goes on for ever would never count as silence.
    """

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened
        self._raw = cast("io.RawIOBase", opened.makefile("rb", buffering=0))
        self._timeout_s = opened.gettimeout()
        self._ends_at: float | None = None
        self._left = 0

    @contextmanager
    def framing(self) -> Generator[None]:
        """Mark the block as reading framing, e.g. a head; each such block has the idle timeout as its deadline."""
        # More than a head, because one read may also return some of the body.
        self._left = 2 * MAX_HEAD_BYTES
        self._timeout_s = self._socket.gettimeout()
        self._ends_at = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        try:
            yield
        finally:
            self._ends_at, self._left = None, 0

    @override
    def readinto(self, buffer: Any, /) -> int | None:
        if self._ends_at is None:
            return self._raw.readinto(buffer)
        left_s = self._ends_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the head of a response, or the framing of its body, does not end")
        self._socket.settimeout(left_s)
        try:
            count = self._raw.readinto(buffer)
        finally:
            self._socket.settimeout(self._timeout_s)
        self._left -= count or 0
        if self._left < 0:
            raise http.client.LineTooLong("head")
        return count

    @override
    def readable(self) -> bool:
        return True

    @override
    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _ResponseReader(http.client.HTTPResponse):
    fields: dict[str, str]
    _method: str | None

    def __init__(self, opened: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None):
        super().__init__(opened, debuglevel, method, url)
        self.fp.close()
        self._reader = _Reader(opened)
        self.fp = io.BufferedReader(self._reader)
        self._chunks: Chunks | None = None

    def _read_status(self) -> tuple[str, int, str]:
        """The status of a proxy that opens a tunnel, as `http.client` asks for it; the fields are read and dropped."""
        try:
            with self._reader.framing():
                version, status, _ = self._final_head()
        finally:
            # Also after a failure: until 3.11.4 Python leaves the response open then, and with it the socket.
            self.fp.close()
            self.fp = cast("io.BufferedReader", io.BytesIO())
        return f"HTTP/1.{version % 10}", status, ""

    @override
    def begin(self) -> None:
        """Read the head.

        `http.client` uses the standard library's mail parser for this. That takes a quarter of the time of a small
        request, and takes the end of the connection for the end of the head.
        """
        with self._reader.framing():
            version, status, fields = self._final_head()
        self.fields, self.headers, self.msg = fields, _NO_MESSAGE, _NO_MESSAGE
        self.version, self.status, self.code = version, status, status
        self.will_close = closes(version, fields)
        self.length = body_length(status, self._method, fields)
        self.chunked = self.length is None and is_chunked(fields)
        self._chunks = Chunks() if self.chunked else None
        if self.length is None and not self.chunked:
            self.will_close = True  # the body ends with the connection

    def _final_head(self) -> tuple[int, int, dict[str, str]]:
        """The head of the final response, after interim ones (`100 Continue`, hints for browsers)."""
        version, status, fields = self._head()
        while status < 200:
            version, status, fields = self._head()
        return version, status, fields

    def _head(self) -> tuple[int, int, dict[str, str]]:
        """The next head on the connection: version, status, fields."""
        first = self._line()
        lines: list[bytes] = []
        while (line := self._line()) not in (b"\r\n", b"\n"):
            lines.append(line)
            if len(lines) > MAX_FIELDS:
                break
        return read_head(first, lines)

    def _line(self) -> bytes:
        line = self.fp.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            if len(line) == MAX_LINE_BYTES:
                raise http.client.LineTooLong("head")
            raise http.client.RemoteDisconnected("the connection ended before the end of the head")
        return line

    def receive_into(self, view: memoryview) -> int:
        """Read the next bytes into `view`; waits for the first byte, not for all, so that silence has an offset."""
        if self._chunks is not None:
            return self._receive_chunk(self._chunks, view)
        if self.length is None:
            return self.readinto(view)
        received = self.fp.readinto1(view[: self.length]) if self.length else 0
        self.length -= received
        return received

    def _receive_chunk(self, chunks: Chunks, view: memoryview) -> int:
        if not chunks.left and not chunks.ended:
            with self._reader.framing():
                while not chunks.left and not chunks.ended:
                    line = self.fp.readline(MAX_CHUNK_LINE_BYTES)
                    if not line.endswith(b"\n"):
                        raise (
                            http.client.LineTooLong("chunk")
                            if len(line) == MAX_CHUNK_LINE_BYTES
                            else http.client.RemoteDisconnected("the connection ended before the end of the body")
                        )
                    chunks.line(line.removesuffix(b"\n").removesuffix(b"\r"))
        if chunks.ended:
            self.close()  # as `http.client` does at the end of a body: the connection stays open
            return 0
        received = self.fp.readinto1(view[: chunks.left])
        if not received:
            raise http.client.IncompleteRead(b"", chunks.left)
        chunks.took(received)
        return received


def _socket(connection: http.client.HTTPConnection) -> socket.socket:
    opened: socket.socket | None = connection.sock
    if opened is None:
        raise http.client.NotConnected
    return opened


def unsent_bytes(opened: socket.socket) -> int:
    """Bytes the kernel took and the other side has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(opened, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _proxy_parts(proxy: str) -> SplitResult:
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy.lstrip('/')}")
    if parts.scheme != "http":
        raise ValueError(f"only proxies at http:// can be used, and this one is at {parts.scheme}://")
    return parts


def _proxy_authorization(proxy: Any) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
