"""HTTP/1.1 for large bodies: pooled connections, no copies, and timeouts on silence instead of on whole requests.

The S3 store sends all its requests here. It knows nothing of S3: the caller names the target and signs each attempt.
It stands on `http.client` because that moves a gibibyte for a third of the processor time of the usual clients.
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
"""What one send may carry. Over TLS a send returns only when all of it is gone, so on a slow link a large one would
look like silence."""

DRAIN_BYTES = 64 * 1024
"""The rest of an answer that is cheaper to read than a new connection is to open."""

MAX_FIELDS = 100
MAX_LINE_BYTES = 64 * 1024
"""As in `http.client`."""
MAX_HEAD_BYTES = 128 * 1024
"""Of an answer, with all that comes before it (`100 Continue`, hints for browsers), or of the trailers after it."""
MAX_CHUNK_LINE_BYTES = 4 * 1024
"""A size, and extensions that nobody uses."""

_NO_MESSAGE = http.client.HTTPMessage()

BROKEN = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""The other side is gone: what a connection shows that was closed while it lay idle."""


class RequestBody(Protocol):
    """Bytes to send. Each attempt iterates from the start."""

    size: int

    def __iter__(self) -> Iterator[Buffer]: ...


class HttpError(Exception):
    """An exchange failed below HTTP; the reason is the `__cause__`.

    Attributes:
        moved: Bytes of the body that had moved, in either direction.
        timeout_s: How long it was silent, if that is what happened.
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
        return os.strerror(error.errno)  # asyncio has words of its own
    return (isinstance(error, OSError) and error.strerror) or str(error)


class Response:
    """A response whose head was read. Leaving the `with` block gives the connection back, or drops it."""

    def __init__(self, response: _ResponseReader, idle_timeout_s: float, release: Callable[[bool], None]) -> None:
        self.status = response.status
        self.headers = response.fields
        """By names in lower case; the first of several."""
        self._response = response
        self._idle_timeout_s = idle_timeout_s
        self._release = release

    @property
    def length(self) -> int | None:
        """Bytes of the body still to come; None if the server did not say."""
        return self._response.length

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` with the next bytes of the body; fewer only where the body ends.

        Raises:
            WireError: the connection broke or went silent.
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
        self._response.close()  # it may own the socket, where the connection has let go of it
        self._release(reusable)


class HttpClient:
    """Connections to one origin, kept open between requests, for any number of threads.

    Args:
        origin: `http://host[:port]` or `https://host[:port]`.
        tls: Context for https; None is Python's default.
        connect_timeout_s: For a connection to be made.
        idle_timeout_s: For a single byte of a body to move on it, and for a whole head to come.
        max_idle: Connections kept while nobody uses them; how many are in use is up to the callers' threads.
        proxy: URL of an HTTP proxy to go through; the scheme may be missing.

    Raises:
        ValueError: a proxy that is spoken to over TLS, or by another protocol.
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
        # Last in, first out: the connection used last is the one the server is least likely to have closed.
        # A deque needs no lock, so that no fork can leave one locked.
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
        """Send a request and return the head of its answer.

        A connection that the server closed while it lay idle is replaced, once and silently, and an idempotent
        request is sent again on the new one.

        Args:
            target: Path and query, encoded.
            headers: Makes the headers of one attempt, `Host` included, so that every signature is fresh.
            idle_timeout_s: For this request instead of the usual one.

        Raises:
            WireError: no connection, or it broke or went silent before the head of the answer.
            SizeMismatch: the body is not as long as it says.
            UsageError: a header cannot be sent; its value is not shown.
        """
        timeout_s = self._idle_timeout_s if idle_timeout_s is None else idle_timeout_s
        given = sendable(headers())  # before there is a connection to lose: credentials may fail
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
                # A server that refuses early answers and closes: what it says is worth more than our broken pipe.
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
        """Send all of the body and return its length. Errors of the body's own source pass through as they are."""
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
        """Wait while the kernel still has bytes to deliver and gets rid of some.

        It takes megabytes at once, which a slow link may need longer for than the timeout; the server cannot answer
        before, and as long as they go, nothing is silent.
        """
        opened = _socket(connection)
        poll = select.poll()
        # Over TLS something to read need not be an answer: session tickets come at any time.
        poll.register(opened, 0 if self._secure else select.POLLIN)
        queued, moved_at, pause_s = unsent_bytes(opened), time.monotonic(), 0.001
        while queued and not poll.poll(pause_s * 1000):
            left = unsent_bytes(opened)
            if left < queued:
                queued, moved_at = left, time.monotonic()
                moved()
            elif time.monotonic() - moved_at > timeout_s:
                raise TimeoutError("the kernel cannot get rid of what was sent")
            pause_s = min(pause_s * 2, timeout_s / 8)

    def _take(self) -> http.client.HTTPConnection | None:
        """An idle connection on which nothing has happened since."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            poll = select.poll()
            poll.register(_socket(connection), select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()  # readable without a question: an end of file, or an answer to nobody
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
    """Return unless an error is a limit of this process, which no server lifts.

    Raises:
        SystemLimit: it is one.
    """
    if isinstance(error, OSError) and os_fault(error) is OsFault.OPEN_FILES:
        raise error_anywhere(error, f"no connection can be opened: {error.strerror}") or error from error


def sendable(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers without white space around their values.

    Raises:
        UsageError: naming one that cannot be sent; not its value, which may be a secret.
    """
    return {name: header_value(name, value) for name, value in headers.items()}


def read_head(first: bytes, lines: Sequence[bytes]) -> tuple[int, int, dict[str, str]]:
    """Version (10 or 11), status and fields of an answer; names in lower case, the first of several.

    Raises:
        http.client.HTTPException: this is no head.
    """
    status = _STATUS.fullmatch(first)
    if status is None:
        raise http.client.BadStatusLine(repr(first[:80]))
    if len(lines) > MAX_FIELDS:
        raise http.client.HTTPException(f"the head has more than {MAX_FIELDS} fields")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or name != name.strip():  # RFC 9112 lets nobody fold lines any more
            raise http.client.HTTPException("a line of the head is no field")
        known = fields.setdefault(name.lower(), value.strip())
        if name.lower() in _FRAMING and known != value.strip():
            raise http.client.HTTPException(f"the head has two fields {name[:40]} that differ")
    return 10 + int(status[1]), int(status[2]), fields


_FRAMING = frozenset({"content-length", "transfer-encoding"})
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*?)?(?:\r?\n)?", re.DOTALL)


def body_length(status: int, method: str | None, fields: Mapping[str, str]) -> int | None:
    """Bytes of an answer's body; None if they come in chunks, or to the end of the connection.

    Raises:
        http.client.HTTPException: the head says something that is no length, or an encoding that is none of ours.
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
    """Whether the body of an answer comes in chunks."""
    return fields.get("transfer-encoding", "").lower() == "chunked"


def closes(version: int, fields: Mapping[str, str]) -> bool:
    """Whether the server closes the connection after this answer."""
    connection = fields.get("connection", "").lower()
    return "close" in connection or (version == 10 and "keep-alive" not in connection)


class Chunks:
    """Where in a chunked body its reader is: what stands between the bytes of the body comes in here, line by line.

    Attributes:
        left: Bytes of the present chunk still to come; if there are none, a line comes next.
        ended: The body and its trailers are at their end.
    """

    def __init__(self) -> None:
        self.left = 0
        self.ended = False
        self._expects: Literal["size", "end of chunk", "trailer"] = "size"
        self._trailers = 0

    def took(self, count: int) -> None:
        """So many bytes of the present chunk were read."""
        self.left -= count

    def line(self, line: bytes) -> None:
        """A line, without its end.

        Raises:
            http.client.HTTPException: it is none that may come here.
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
    """A socket's bytes. What is no body has to come to an end: in so many bytes, and before an instant.

    Bytes alone prove nothing: a head that goes on for ever never falls silent.
    """

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened
        self._raw = cast("io.RawIOBase", opened.makefile("rb", buffering=0))
        self._timeout_s = opened.gettimeout()
        self._ends_at: float | None = None
        self._left = 0

    @contextmanager
    def framing(self) -> Generator[None]:
        """In the block comes what is no body; one after the other may be silent for the idle timeout."""
        # More than a head: what is read at once may hold some of the body.
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
            raise TimeoutError("the head of an answer, or what stands between its bytes, does not end")
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
        """The status of a proxy that opens a tunnel, which `http.client` asks for; the fields are read away here."""
        try:
            with self._reader.framing():
                version, status, _ = self._final_head()
        finally:
            # Also where it fails: until 3.11.4 Python leaves the response open then, and with it the socket.
            self.fp.close()
            self.fp = cast("io.BufferedReader", io.BytesIO())
        return f"HTTP/1.{version % 10}", status, ""

    @override
    def begin(self) -> None:
        """Read the head.

        `http.client` itself has this done by the standard library's mail parser, which takes a quarter of the time of a
        small request, and takes the end of the connection for the end of the head.
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
            self.will_close = True  # the end of the connection is that of the body

    def _final_head(self) -> tuple[int, int, dict[str, str]]:
        """The head of the answer itself: not "go on", nor hints for browsers."""
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
        """Put what arrives next into `view`; waits for the first byte, not for all, so that silence has an offset."""
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
            self.close()  # as `http.client` does at the end of a body: the connection goes on
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
