"""A proxy on loopback that spoils what passes through it, between any S3 client and any S3 server.

Bytes go through unchanged, the Host header included: the client signs for the proxy's address, and servers that verify
a signature with the Host they receive (the strict S3 here, Ceph, moto) accept it.

A request and an answer are both a `Message`; whoever scripts the proxy is shown each one when its head is there, and
may answer with a fault.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from typing import NamedTuple, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.fault_rules import Rule, Side, Slow
from tests.loopback import LoopbackServer, hang_up
from tests.strict_s3 import operation_of

PIECE_BYTES = 64 * 1024


class Message(NamedTuple):
    """A request on its way up, or an answer on its way down."""

    side: Side
    number: int
    """Counts the messages of this side, from 1, in the order in which their heads arrived."""
    operation: str
    """AWS's name for what was requested."""
    path: str
    """Bucket and key, decoded: `/bucket/key`."""
    status: int | None
    """Of an answer."""
    query: str = ""
    """As it was sent."""

    @property
    def key(self) -> str:
        return self.path[1:].partition("/")[2]

    @property
    def part_number(self) -> int | None:
        number = dict(parse_qsl(self.query)).get("partNumber", "")
        return int(number) if number.isdecimal() else None


@dataclass(frozen=True)
class Truncate:
    """Both connections are closed after so many bytes of the body; None: before the first byte of the head.

    So `Cut()` makes a request that never arrives, or loses an answer after its effect.
    """

    keep: int | None = None


@dataclass(frozen=True)
class Reset:
    """Like `Cut`, but the client's connection is reset (RST)."""

    keep: int | None = None


@dataclass(frozen=True)
class Stall:
    """After so many bytes of the body nothing moves any more, until the client gives up."""

    keep: int = 0


@dataclass(frozen=True)
class Corrupt:
    """One bit of one byte of the body is wrong; `at` counts from the end if it is negative."""

    at: int = 0


Fault: TypeAlias = Truncate | Reset | Stall | Corrupt | Slow
Faults: TypeAlias = Callable[[Message], Fault | None]


def no_faults(_: Message) -> None:
    """Everything passes."""


def scripted_faults(*rules: Rule[Fault]) -> Faults:
    """The fault of the first rule that strikes; every rule sees every message."""

    def faults(message: Message) -> Fault | None:
        struck = [rule.fault for rule in rules if rule.strikes(message)]
        return struck[0] if struck else None

    return faults


def random_faults(seed: int, rate: float, kinds: Sequence[Fault], *, most: int | None = None) -> Faults:
    """One of `kinds` for that share of the messages, at most `most` in all; the same ones for a seed and an order."""
    generator = random.Random(seed)
    left = most

    def faults(_: Message) -> Fault | None:
        nonlocal left
        draw, kind = generator.random(), generator.choice(kinds)
        if draw >= rate or left == 0:
            return None
        left = left - 1 if left is not None else None
        return kind

    return faults


class FaultProxy(LoopbackServer):
    """Listens on a free loopback port and passes everything on to `upstream`; use it in a `with` block.

    Args:
        upstream: `http://host:port` of the server.
        faults: Asked for every message, one at a time, so that it may keep a state without a lock.
        sleep: How the time of `Slow` passes.

    Attributes:
        faults: May be replaced at any time.
        messages: Every message whose head arrived, with the fault it met.
    """

    def __init__(
        self, upstream: str, faults: Faults = no_faults, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        address = urlsplit(upstream)
        self._upstream = (address.hostname or "", address.port or 80)
        self.faults = faults
        self.messages: list[tuple[Message, Fault | None]] = []
        self._sleep = sleep
        self._counts: Counter[Side] = Counter()
        self._lock = threading.Lock()
        super().__init__()

    def struck(self, side: Side | None = None) -> list[Message]:
        """The messages that met a fault."""
        with self._lock:
            return [message for message, fault in self.messages if fault is not None and side in (None, message.side)]

    def serve(self, connection: socket.socket) -> None:
        with (
            self.connected_to(self._upstream) as upstream,
            connection.makefile("rb") as asked,
            upstream.makefile("rb") as told,
            suppress(_Broken),
        ):
            while True:
                # Whoever hangs up between two requests, the other side learns of it at once.
                ready, _, _ = select.select([connection, upstream], [], [])
                if upstream in ready or not self._exchange(_Pipe(asked, upstream), _Pipe(told, connection)):
                    return

    def _exchange(self, up: _Pipe, down: _Pipe) -> bool:
        """Pass one request and its answer on; whether the connections may be used again."""
        head = up.head()
        if head is None:
            return False
        method, target, _ = head.line.split(" ", 2)
        operation, (path, _, query) = operation_of(method, target, head.fields), target.partition("?")
        expects = head.fields.get("expect", "").lower() == "100-continue"
        fault = self._fault("request", operation, path, None, query)
        self._pass_head(up, head, fault, down)
        if not expects or self._continues(down):
            # A server that refuses early closes early: what it says is in its answer.
            with suppress(ConnectionError):
                self._pass_body(up, head, fault, down)
        answer = down.head()
        if answer is None:
            return False
        status = int(answer.line.split(" ", 2)[1])
        fault = self._fault("answer", operation, path, status, query)
        self._pass_head(down, answer, fault, down)
        if method != "HEAD" and status not in (204, 304):
            self._pass_body(down, answer, fault, down)
        if "close" in (head.fields.get("connection", "").lower(), answer.fields.get("connection", "").lower()):
            hang_up(down.to)
            return False
        return True

    def _continues(self, down: _Pipe) -> bool:
        """Pass "100 Continue" on; False if the server answers the request without its body."""
        if not down.peek().startswith(b"HTTP/1.1 100"):
            return False
        interim = down.head()
        if interim is not None:
            down.to.sendall(interim.raw)
        return True

    def _fault(self, side: Side, operation: str, path: str, status: int | None, query: str) -> Fault | None:
        with self._lock:
            self._counts[side] += 1
            message = Message(side, self._counts[side], operation, unquote(path), status, query)
            fault = self.faults(message)
            self.messages.append((message, fault))
        return fault

    def _pass_head(self, pipe: _Pipe, head: _Head, fault: Fault | None, down: _Pipe) -> None:
        if isinstance(fault, Truncate | Reset) and fault.keep is None:
            _break_off(down, fault)
        pipe.to.sendall(head.raw)

    def _pass_body(self, pipe: _Pipe, head: _Head, fault: Fault | None, down: _Pipe) -> None:
        if head.fields.get("transfer-encoding", "").lower() == "chunked":
            position = 0
            while True:
                line = pipe.stream.readline()
                if not line:
                    raise _Broken
                pipe.to.sendall(line)
                size = int(line.split(b";")[0], 16)
                self._pass_bytes(pipe, size, position, None, fault, down)
                pipe.to.sendall(pipe.stream.readline())
                position += size
                if not size:
                    return
        size = int(head.fields.get("content-length", 0))
        self._pass_bytes(pipe, size, 0, size, fault, down)

    def _pass_bytes(
        self, pipe: _Pipe, size: int, position: int, total: int | None, fault: Fault | None, down: _Pipe
    ) -> None:
        """Pass `size` bytes of a body on, which begin at `position` of it."""
        end = position + size
        limit = getattr(fault, "keep", None)
        at = fault.at if isinstance(fault, Corrupt) else None
        if at is not None and at < 0:
            at = None if total is None else at + total
        while position < end or limit == position:
            if limit is not None and limit <= position:
                if isinstance(fault, Stall):
                    _wait_until_closed(down.to)
                _break_off(down, fault)
            stop = end if limit is None else min(end, limit)
            most = fault.piece_bytes if isinstance(fault, Slow) else PIECE_BYTES
            piece = pipe.read(min(most, stop - position))
            if at is not None and position <= at < position + len(piece):
                piece[at - position] ^= 0x01
            pipe.to.sendall(piece)
            position += len(piece)
            if isinstance(fault, Slow):
                self._sleep(len(piece) / fault.bytes_per_s)


class _Broken(Exception):
    """The exchange is over, and both connections with it."""


class _Head(NamedTuple):
    raw: bytes
    line: str
    fields: dict[str, str]


@dataclass(frozen=True)
class _Pipe:
    """One direction: where bytes are read, and where they are sent."""

    stream: BufferedReader
    to: socket.socket

    def head(self) -> _Head | None:
        """The head of the next message; None where there is none any more."""
        lines: list[bytes] = []
        while (line := self.stream.readline()) not in (b"\r\n", b"\n"):
            if not line:
                return None
            lines.append(line)
        pairs = [text.decode("latin-1").partition(":") for text in lines[1:]]
        fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return _Head(b"".join(lines) + b"\r\n", lines[0].decode("latin-1").strip(), fields)

    def read(self, most: int) -> bytearray:
        """Some of the next bytes; the exchange is over where there are none."""
        try:
            piece = bytearray(self.stream.read1(most))
        except ConnectionError as error:
            raise _Broken from error
        if not piece:
            raise _Broken
        return piece

    def peek(self) -> bytes:
        """The first bytes of what comes next."""
        return self.stream.peek(16)


def _break_off(down: _Pipe, fault: Fault | None) -> None:
    if isinstance(fault, Reset):
        # Closing with a linger time of zero sends a RST instead of a FIN.
        down.to.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise _Broken


def _wait_until_closed(connection: socket.socket) -> None:
    """Until the client hangs up, or the proxy is closed. What it still sends is not read."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
