"""HTTP/1.1 for small bodies and many requests at a time: one event loop, keep-alive connections, no threads.

`blobflow.http.client` moves large bodies, with one thread for each. A request costs a fifth of that here, because no
work passes between threads and nothing waits for the interpreter lock. The rules are the same: every attempt is signed
separately, timeouts are on silence, and a connection that died while idle is replaced once and silently.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from typing_extensions import override

from blobflow.http.client import (
    BROKEN,
    MAX_CHUNK_LINE_BYTES,
    MAX_HEAD_BYTES,
    MAX_LINE_BYTES,
    Chunks,
    HttpError,
    body_length,
    closes,
    is_chunked,
    read_head,
    refuse_limits,
    sendable,
    unsent_bytes,
)

_BUFFER_BYTES = 256 * 1024
_WATCH_S = 1.0
"""Longest interval between two checks for silence."""


class BufferedResponse(NamedTuple):
    """A response that was read completely."""

    status: int
    headers: dict[str, str]
    """Fields by their names in lower case; the first of several with one name."""
    body: bytes
    """At most one byte more than the given limit; then the connection is dropped, not read on."""
    length: int | None
    """Bytes of the body as the server announced them; None if it did not."""


class AsyncHttpClient:
    """Connections to one origin, for the coroutines of the running event loop.

    Args:
        origin: `http://host[:port]` or `https://host[:port]`.
        tls: Context for https.
        connect_timeout_s: Limit for making a connection.
        idle_timeout_s: Limit for a single byte of an expected body to move, and for a whole head to arrive.
    """

    def __init__(
        self, origin: str, *, tls: ssl.SSLContext | None, connect_timeout_s: float, idle_timeout_s: float
    ) -> None:
        parts = urlsplit(origin)
        self._origin = origin
        self._address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self._loop = asyncio.get_running_loop()
        # Shared by all connections: arrived bytes are copied out before another connection reads.
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._closed = False
        self._watch = self._loop.call_later(self._watch_s, self._look)

    @property
    def _watch_s(self) -> float:
        return min(_WATCH_S, self.idle_timeout_s / 4)

    async def request(
        self, method: str, target: str, headers: Callable[[], Mapping[str, str]], body: bytes, *, limit: int
    ) -> BufferedResponse:
        """Send an idempotent request and return its response.

        Args:
            headers: Makes the headers of one attempt, so that every signature is fresh.
            limit: Bytes that are wanted at most of a successful response's body.

        Raises:
            HttpError: there was no connection, or it broke or went silent before the end of the response.
            UsageError: a header cannot be sent; its value is not shown.
        """
        given = sendable(headers())
        if self._idle:
            try:
                return await self._attempt(self._idle.pop(), method, target, given, body, limit)
            except HttpError as error:
                if not isinstance(error.__cause__, BROKEN) or error.moved:
                    raise
            given = sendable(headers())
        return await self._attempt(await self._connection(), method, target, given, body, limit)

    async def _attempt(
        self,
        connection: _Connection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        limit: int,
    ) -> BufferedResponse:
        self._busy.add(connection)
        try:
            answer = await connection.exchange(method, target, headers, body, limit)
        except BaseException:
            connection.abort()
            raise
        finally:
            self._busy.discard(connection)
        if connection.is_reusable and not self._closed:
            self._idle.append(connection)
        else:
            connection.abort()
        return answer

    async def _connection(self) -> _Connection:
        host, port = self._address
        making = self._loop.create_connection(
            lambda: _Connection(self), host, port, ssl=self._tls, server_hostname=host if self._tls else None
        )
        try:
            _, connection = await asyncio.wait_for(making, self._connect_timeout_s)
        except (asyncio.TimeoutError, OSError) as error:
            cause = error if isinstance(error, OSError) else TimeoutError("no answer")
            refuse_limits(cause)
            raise HttpError(cause, 0, self._connect_timeout_s, f"{host}:{port}") from cause
        return connection

    def forget(self, connection: _Connection) -> None:
        """Forget a connection that the server closed, or on which it sent something that was not requested."""
        if connection in self._idle:
            self._idle.remove(connection)

    def _look(self) -> None:
        now = self._loop.time()
        for connection in list(self._busy):
            connection.look(now)
        if self._busy or not self._closed:
            self._watch = self._loop.call_later(self._watch_s, self._look)

    def retire(self) -> None:
        """Close the idle connections now, and the others when their responses are complete."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    def close(self) -> None:
        """Close all connections; pending requests fail."""
        self.retire()
        self._watch.cancel()
        for connection in list(self._busy):
            connection.abort()

    def __repr__(self) -> str:
        return f"<AsyncHttpClient {self._origin}, {len(self._idle)} idle, {len(self._busy)} busy>"


class _Connection(asyncio.BufferedProtocol):
    def __init__(self, client: AsyncHttpClient) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._waiting: asyncio.Future[BufferedResponse] | None = None
        self._received = bytearray()
        self._head: tuple[int, dict[str, str], int | None] | None = None
        self._framing = 0
        """Bytes so far that are not body: heads or trailers."""
        self._chunks: Chunks | None = None
        self._body = bytearray()
        """Bytes so far of a chunked body."""
        self._method = ""
        self._limit = 0
        self._keep = True
        self._moved_at = 0.0
        self._unsent = 0

    @property
    def is_reusable(self) -> bool:
        return self._keep and not self._transport.is_closing() and not self._transport.get_write_buffer_size()

    async def exchange(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes, limit: int
    ) -> BufferedResponse:
        head = "".join(
            [f"{method} {target} HTTP/1.1\r\n", *[f"{name}: {value}\r\n" for name, value in headers.items()], "\r\n"]
        )
        if self._transport.is_closing():
            gone = ConnectionResetError("the connection was closed")
            raise HttpError(gone, 0) from gone
        self._waiting = self._loop.create_future()
        self._method, self._limit, self._head = method, limit, None
        self._framing, self._chunks = 0, None
        self._body.clear()
        self._moved_at, self._unsent = self._loop.time(), 0
        self._transport.write(head.encode("latin-1") + body)
        return await self._waiting

    def look(self, now: float) -> None:
        """Fail if nothing has moved for too long."""
        if self._waiting is None or self._waiting.done():
            return
        opened: socket.socket = self._transport.get_extra_info("socket")
        unsent: int = self._transport.get_write_buffer_size() + unsent_bytes(opened)
        if unsent != self._unsent:  # the kernel is still delivering what was sent
            self._unsent, self._moved_at = unsent, now
        elif now - self._moved_at > self._client.idle_timeout_s:
            self._fail(TimeoutError("silence"))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: Exception) -> None:
        self._keep = False
        self.abort()
        if self._waiting is not None and not self._waiting.done():
            failure = HttpError(error, len(self._received), self._client.idle_timeout_s)
            failure.__cause__ = error
            self._waiting.set_exception(failure)

    # Callbacks of the event loop

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    @override
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._client.buffer

    @override
    def buffer_updated(self, nbytes: int) -> None:
        if self._waiting is None or self._waiting.done():
            self._fail(ConnectionResetError("a response without a request"))
            self._client.forget(self)
            return
        self._received += self._client.buffer[:nbytes]
        before = len(self._body)
        try:
            self._advance(at_end=False)
            # Arriving bytes alone are not progress: heads and chunk framing could go on for ever.
            if self._head is not None and (self._chunks is None or len(self._body) > before):
                self._moved_at = self._loop.time()
        except http.client.HTTPException as error:
            self._fail(error)

    @override
    def eof_received(self) -> bool:
        return False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._client.forget(self)
        if self._waiting is None or self._waiting.done():
            return
        try:
            if exc is None and self._head is not None:
                self._advance(at_end=True)
        except http.client.HTTPException as error:
            exc = error
        if not self._waiting.done():
            self._fail(exc or http.client.RemoteDisconnected("the connection ended before the end of the response"))

    # Parsing

    def _advance(self, *, at_end: bool) -> None:
        while self._head is None:
            end = self._received.find(b"\r\n\r\n")
            if self._framing + (end if end >= 0 else len(self._received)) > MAX_HEAD_BYTES:
                raise http.client.LineTooLong("head")
            if end < 0:
                return
            self._framing += end
            first, *lines = bytes(self._received[:end]).split(b"\r\n")
            del self._received[: end + 4]
            version, status, fields = read_head(first, lines)
            if status >= 200:  # not an interim response such as 100 Continue
                length = body_length(status, self._method, fields)
                self._head = (status, fields, length)
                self._chunks = Chunks() if length is None and is_chunked(fields) else None
                self._framing = 0
                self._keep = not closes(version, fields) and (length is not None or is_chunked(fields))
        status, fields, length = self._head
        limit = self._limit if status < 300 else MAX_LINE_BYTES
        if length is not None and (len(self._received) >= length or length > limit):
            self._keep = self._keep and len(self._received) == length
            self._end(status, fields, bytes(self._received[:length] if length <= limit else b""), length)
        elif self._chunks is not None:
            self._unchunk(self._chunks)
            if self._chunks.ended or len(self._body) > limit:
                self._keep = self._keep and self._chunks.ended and not self._received
                self._end(status, fields, bytes(self._body[: limit + 1]), None)
        elif length is None and (at_end or len(self._received) > limit):
            self._end(status, fields, bytes(self._received[: limit + 1]), None)

    def _unchunk(self, chunks: Chunks) -> None:
        """Move the received bytes of a chunked body to `_body`, without the framing between them."""
        while not chunks.ended:
            if chunks.left:
                taken = self._received[: chunks.left]
                if not taken:
                    return
                self._body += taken
                chunks.took(len(taken))
                del self._received[: len(taken)]
                self._framing = 0
                continue
            end = self._received.find(b"\r\n")
            if (end if end >= 0 else len(self._received)) > MAX_CHUNK_LINE_BYTES or self._framing > MAX_HEAD_BYTES:
                raise http.client.LineTooLong("chunk")
            if end < 0:
                return
            chunks.line(bytes(self._received[:end]))
            del self._received[: end + 2]
            self._framing += end + 2

    def _end(self, status: int, fields: dict[str, str], body: bytes, length: int | None) -> None:
        self._received.clear()
        assert self._waiting is not None
        self._waiting.set_result(BufferedResponse(status, fields, body, length))
