"""A peer that keeps talking holds nobody for ever: whatever is no body has an end, in bytes and in time."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any, Final

import pytest

from blobflow.errors import BlobflowError, StoreUnavailable, TimedOut
from blobflow.http.client import MAX_CHUNK_LINE_BYTES, Chunks
from blobflow.mirror.client import MirrorClient
from blobflow.stores.optional import Coroutines
from blobflow.stores.s3.store import S3Options, S3Store
from blobflow.streams.http_source import HttpSource
from tests.servers import Peer, scripted_server

MIB: Final = 1024 * 1024
IDLE_S: Final = 0.4
TAKEN_BYTES: Final = 16 * MIB
"""Above what the kernel takes of a client that reads nothing; far below what a second of sending is."""


def s3_store(url: str) -> S3Store:
    keys: dict[str, Any] = {"access_key_id": "key", "secret_access_key": "secret", "idle_timeout": IDLE_S}
    return S3Store(S3Options(bucket="bucket", endpoint_url=url, **keys))


def by_store(url: str) -> object:
    with closing(s3_store(url)) as store:
        return store.get("k", max_bytes=1000).data


def by_batch(url: str) -> object:
    async def get() -> bytes:
        with closing(s3_store(url)) as store:
            found = store.coroutines()
            assert isinstance(found, Coroutines)
            try:
                return (await found.get("k", max_bytes=1000)).data
            finally:
                await found.close()

    return asyncio.run(get())


def by_source(url: str) -> object:
    source = HttpSource(url, idle_timeout_s=IDLE_S, patience_s=0, sleep=lambda _: None)
    source.pin()
    return None


def by_receiver(url: str) -> object:
    with MirrorClient(url, token="a token of sixteen", idle_timeout_s=IDLE_S) as client:
        return client.snapshots()


def by_tunnel(url: str) -> object:
    source = HttpSource(
        "https://127.0.0.1:1/", proxy=url, idle_timeout_s=IDLE_S, connect_timeout_s=IDLE_S, patience_s=0
    )
    source.pin()
    return None


WIRES: Final = [by_store, by_batch, by_source, by_receiver, by_tunnel]
CHUNKED: Final = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\netag: "e"\r\n\r\n'

ENDLESS: Final = {
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "status line": (b"HTTP/1.1 200 ", b"OK"),
    "fields": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
    "value": (b"HTTP/1.1 200 OK\r\na: ", b"b"),
}
ENDLESS_BODIES: Final = {
    "chunk line": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"t: v\r\n"),
    "trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nt: ", b"v"),
}


def cases() -> list[Any]:
    found: list[Any] = []
    for client in WIRES:
        # What answers a CONNECT has no body, and a source is pinned by the head.
        known = ENDLESS if client in (by_tunnel, by_source) else ENDLESS | ENDLESS_BODIES
        for name, (head, unit) in known.items():
            found.append(pytest.param(client, head, unit, id=f"{client.__name__}-{name}"))
    return found


@pytest.mark.parametrize(("client", "head", "unit"), cases())
def test_what_floods_is_dropped(client: Callable[[str], object], head: bytes, unit: bytes):
    """As fast as the network goes: after some kilobytes it is a failure, and memory is not what ends it."""
    taken = 0

    def floods(peer: Peer) -> None:
        nonlocal taken
        peer.head()
        block = unit * (MIB // len(unit))
        with suppress(OSError):
            peer.send(head)
            while taken < 8 * TAKEN_BYTES:
                peer.send(block)
                taken += len(block)

    with scripted_server(floods) as url, pytest.raises(StoreUnavailable) as wrong:
        client(url)
    assert taken < TAKEN_BYTES
    assert wrong.value.retryable


@pytest.mark.parametrize(("client", "head", "unit"), cases())
def test_what_dribbles_is_silent(client: Callable[[str], object], head: bytes, unit: bytes):
    """A byte now and then is no progress: the idle timeout counts on, and is not begun again by each of them."""
    dropped = threading.Event()

    def dribbles(peer: Peer) -> None:
        peer.head()
        with suppress(OSError):
            peer.send(head)
            while not dropped.wait(IDLE_S / 8):
                peer.send(unit)

    try:
        with scripted_server(dribbles) as url:
            try:
                with pytest.raises(BlobflowError) as wrong:
                    client(url)
            finally:
                dropped.set()
    finally:
        dropped.set()
    assert isinstance(wrong.value, TimedOut)


@pytest.mark.parametrize("client", [by_store, by_batch], ids=["store", "batch"])
def test_a_slow_body_is_progress(client: Callable[[str], object]):
    """Each byte of a body is what was asked for, however slowly it comes, in chunks or not."""

    def slowly(head: bytes, units: list[bytes], end: bytes) -> Callable[[Peer], None]:
        def script(peer: Peer) -> None:
            peer.request()
            peer.send(head)
            for unit in units:
                threading.Event().wait(IDLE_S / 4)
                peer.send(unit)
            peer.send(end)

        return script

    plain = slowly(b'HTTP/1.1 200 OK\r\ncontent-length: 8\r\netag: "e"\r\n\r\n', [b"x"] * 8, b"")
    chunks = slowly(CHUNKED, [b"1\r\nx\r\n"] * 8, b"0\r\n\r\n")
    for script in (plain, chunks):
        with scripted_server(script) as url:
            assert client(url) == b"x" * 8


@pytest.mark.parametrize("client", [by_store, by_batch, by_receiver, by_source], ids=lambda client: client.__name__)
@pytest.mark.parametrize(
    "fields",
    [
        b"content-length: -1\r\n",
        b"content-length: +2\r\n",
        b"content-length: 0x2\r\n",
        b"content-length: 2, 2\r\n",
        b"content-length: \r\n",
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"content-length: 99999999999999999999\r\n",
        b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: gzip\r\n",
    ],
)
def test_a_length_that_is_none_is_an_error(client: Callable[[str], object], fields: bytes):
    """Not a body to the end of the connection: what follows could be anything."""

    def answers(peer: Peer) -> None:
        peer.request()
        peer.send(b'HTTP/1.1 200 OK\r\netag: "e"\r\n' + fields + b"\r\n{}")

    with scripted_server(answers) as url, pytest.raises(StoreUnavailable):
        client(url)


@pytest.mark.parametrize("client", [by_store, by_batch], ids=["store", "batch"])
@pytest.mark.parametrize(
    "body",
    [
        b"1\r\nxy\r\n0\r\n\r\n",
        b"-1\r\nx\r\n0\r\n\r\n",
        b"g\r\n",
        b"1" * 16 + b"\r\n",
        b"\r\n",
        b"0\r\n" + b"a: b\r\n" * 101,
    ],
    ids=["longer than it says", "negative", "no number", "too large", "empty", "trailers"],
)
def test_chunks_that_are_none_are_an_error(client: Callable[[str], object], body: bytes):
    """What stands between the bytes of a body is checked, line by line."""

    def answers(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED + body)
        peer.wait_until_closed()

    with scripted_server(answers) as url, pytest.raises(StoreUnavailable):
        client(url)


@pytest.mark.parametrize("client", [by_store, by_batch], ids=["store", "batch"])
@pytest.mark.parametrize("sizes", [[1] * 300, [1000], [999, 1], [7, 300, 1]])
def test_chunks_of_any_size_are_one_body(client: Callable[[str], object], sizes: list[int]):
    """With extensions and trailers, cut anywhere on the way."""
    body = bytes(range(1, 251)) * 4
    sent, at = CHUNKED, 0
    for number, size in enumerate(sizes):
        extension = b";name=value" if number % 2 else b" "
        sent += b"%x%s\r\n%s\r\n" % (size, extension, body[at : at + size])
        at += size
    sent += b"0\r\nx-trailer: y\r\n\r\n"

    def answers(peer: Peer) -> None:
        peer.request()
        for cut in range(0, len(sent), 13):
            peer.send(sent[cut : cut + 13])

    with scripted_server(answers) as url:
        assert client(url) == body[:at]


def test_the_reader_of_chunks_says_where_it_is():
    """Lines in, the number of bytes that come next out."""
    chunks = Chunks()
    chunks.line(b"A;x")
    assert (chunks.left, chunks.ended) == (10, False)
    chunks.took(10)
    chunks.line(b"")
    chunks.line(b"0")
    chunks.line(b"trailer: x")
    assert not chunks.ended
    chunks.line(b"")
    assert (chunks.left, chunks.ended) == (0, True)
    with pytest.raises(http.client.HTTPException):
        Chunks().line(b"x" * MAX_CHUNK_LINE_BYTES)
