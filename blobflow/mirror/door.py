"""Limits of a receiver before it has seen a token: connections, the time to their first byte, and heads of requests.

uvicorn limits none of these, and the limits of its parsers depend on which parser is installed. So they are set around
them: for connections where they are accepted, including those whose TLS handshake never ends; for heads where bytes
are passed to the parser. Nothing here parses HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import h11
from typing_extensions import override
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from blobflow.config import KIB

log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 16 * KIB
"""Largest head of a request; a sender's has about 400 bytes. The parser may get one more piece of a read: 256 KiB."""
HEAD_TIMEOUT_S: Final = 10.0
MAX_CONNECTIONS: Final = 256
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass
class Door:
    """The limits, and the connections that are open.

    Attributes:
        max_connections: Further connections are closed as soon as they are accepted.
        max_head_bytes: A request with a longer head ends its connection.
        head_timeout_s: Seconds for a connection to send a whole head, from its beginning, and after each answer.
    """

    max_connections: int = MAX_CONNECTIONS
    max_head_bytes: int = MAX_HEAD_BYTES
    head_timeout_s: float = HEAD_TIMEOUT_S
    inside: dict[int, _Guest] = field(default_factory=dict[int, "_Guest"])
    """Connections by their descriptor."""

    def listen(self, host: str, port: int) -> socket.socket:
        """A listening socket that accepts no more than `max_connections` at a time."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        plain = socket.create_server((host, port), family=family, backlog=128)
        listener = _Listener(plain.family, plain.type, plain.proto, fileno=plain.detach())
        listener.door = self
        return listener

    def protocol(self) -> type[asyncio.Protocol]:
        """The protocol class for uvicorn, whichever of its parsers is installed."""
        return type("GuardedProtocol", (_Guard, AutoHTTPProtocol), {"door": self})


class _Listener(socket.socket):
    door: Door

    @override
    def accept(self) -> tuple[socket.socket, Any]:
        plain, address = super().accept()
        if len(self.door.inside) >= self.door.max_connections:
            plain.close()
            log.warning("mirror.full connections=%d", len(self.door.inside))
            raise ConnectionAbortedError("as many connections as are allowed")  # which the event loop expects
        guest = _Guest(plain.family, plain.type, plain.proto, fileno=plain.detach())
        guest.door = self.door
        self.door.inside[guest.fileno()] = guest
        # Until the protocol looks after it, which with TLS is after the handshake.
        asyncio.get_running_loop().call_later(self.door.head_timeout_s, guest.give_up)
        return guest, address


class _Guest(socket.socket):
    """An accepted connection, counted until it is closed."""

    door: Door
    greeted = False

    def give_up(self) -> None:
        if not self.greeted:
            with suppress(OSError):
                self.shutdown(socket.SHUT_RDWR)

    @override
    def close(self) -> None:
        if self.door.inside.get(self.fileno()) is self:
            del self.door.inside[self.fileno()]
        super().close()


class _Guard:
    """A mixin for uvicorn's protocol class that enforces the limits on one connection.

    It looks at the connection twice in each `head_timeout_s`, and closes it if both looks find it waiting for a head.
    """

    door: Door
    cycle: Any
    conn: Any
    transport: asyncio.Transport
    _in_head = True
    _head_bytes = 0
    _header_bytes = 0
    _waited = False
    _looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        descriptor: int = transport.get_extra_info("socket").fileno()
        if descriptor in self.door.inside:
            self.door.inside[descriptor].greeted = True
        super().connection_made(transport)  # type: ignore[misc]
        self._look_later()

    def connection_lost(self, error: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(error)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        awaited, before = self._awaits_head(), self.cycle
        super().data_received(data)  # type: ignore[misc]
        if not awaited or not self._awaits_head() or self.cycle is not before:
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.door.max_head_bytes:
            log.warning("mirror.head_too_large bytes=%d", self._head_bytes)
            if not self._is_answering():
                self.transport.write(_TOO_LARGE)
            self.transport.close()

    # Callbacks of httptools; h11 has none.

    def on_message_begin(self) -> None:
        self._in_head = True
        self._header_bytes = 0
        super().on_message_begin()  # type: ignore[misc]

    def on_header(self, name: bytes, value: bytes) -> None:
        # Also those that come after the body, which nobody else counts.
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self.door.max_head_bytes:
            raise ValueError("more headers than any sender has")  # the parser makes a bad request of it
        super().on_header(name, value)  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()  # type: ignore[misc]

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()  # type: ignore[misc]

    def _awaits_head(self) -> bool:
        conn = getattr(self, "conn", None)
        return self._in_head if conn is None else conn.their_state is h11.IDLE

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self.door.head_timeout_s / 2, self._look)

    def _look(self) -> None:
        waits = self._awaits_head() and not self._is_answering()
        if waits and self._waited:
            log.info("mirror.no_request seconds=%g", self.door.head_timeout_s)
            self.transport.close()
            return
        self._waited = waits
        self._look_later()
