"""What the S3 store does on connections that stall, break, lie or are refused, byte by byte."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from blobflow.batch import BatchExecutor, BatchResult, Get, Insert
from blobflow.errors import (
    ObjectChanged,
    SizeMismatch,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
)
from blobflow.stores.base import Body, PartMeta, PutMode
from blobflow.stores.s3.store import S3Options, S3Store
from tests.loopback import LoopbackServer
from tests.servers import Peer, free_port, scripted_server

MIB = 1024 * 1024


@pytest.fixture
def open_s3() -> Iterator[Callable[..., S3Store]]:
    stores: list[S3Store] = []

    def make(url: str, **options: Any) -> S3Store:
        keys = {"access_key_id": "key", "secret_access_key": "secret"}
        stores.append(S3Store(S3Options.model_validate({"bucket": "bucket", "endpoint_url": url} | keys | options)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def gives(data: bytes, total: int | None = None, **headers: str) -> Callable[[Peer], None]:
    """A script that answers one ranged GET of `data`."""

    def script(peer: Peer) -> None:
        peer.request()
        covered = f"bytes 0-{len(data) - 1}/{total or len(data)}"
        peer.answer(206, data, **{"content_range": covered, "etag": '"e"'} | headers)

    return script


def stores_it(peer: Peer) -> None:
    peer.request()
    peer.answer(200, etag='"e"')


@pytest.mark.seed("0.13")
def test_a_stalled_download_times_out_at_its_offset(open_s3: Callable[..., S3Store]) -> None:
    """A body that stops after 100 bytes raises TimedOut within the timeout, naming operation, key, offset, seconds."""

    def stall(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 206 -\r\ncontent-length: 1000\r\ncontent-range: bytes 500-1499/9999\r\n\r\n" + bytes(100))
        peer.wait_until_closed()

    with scripted_server(stall) as url:
        store = open_s3(url, idle_timeout=1)
        began = time.monotonic()
        with pytest.raises(TimedOut) as silence:
            store.get_range("a key", 500, 1000)
        took = time.monotonic() - began
    assert str(silence.value) == "get range 'a key': no byte for 1 s at offset 600"
    assert silence.value.fields == {"operation": "get range", "key": "a key", "offset": 600, "timeout_s": 1}
    assert 1 <= took < 5  # far below any retry, far above a busy machine's hiccups


@pytest.mark.seed("0.14")
def test_a_stalled_upload_times_out_at_its_offset(open_s3: Callable[..., S3Store]) -> None:
    """A server that stops reading in the middle of a part raises TimedOut with the bytes that had left."""

    def stall(peer: Peer) -> None:
        peer.head()
        released.wait(20)

    released = threading.Event()
    with scripted_server(stall) as url:
        store = open_s3(url, idle_timeout=0.4)
        with pytest.raises(TimedOut) as silence:
            store.put_part("k", "id", 3, Body.of(bytes(64 * MIB)))
        released.set()
    assert str(silence.value).startswith("upload part 3 of 'k': no byte for 0.4 s at offset ")
    assert silence.value.offset is not None
    assert 0 < silence.value.offset < 64 * MIB


def test_a_server_that_never_answers_times_out(open_s3: Callable[..., S3Store]) -> None:
    """Silence after the whole request was read is TimedOut, whatever was asked."""
    with scripted_server(Peer.wait_until_closed, Peer.wait_until_closed) as url:
        store = open_s3(url, idle_timeout=0.2)
        for call in (lambda: store.get("k", max_bytes=1), lambda: store.head("k")):
            with pytest.raises(TimedOut) as silence:
                call()
            assert silence.value.timeout_s == 0.2
            assert "offset" not in str(silence.value)


@pytest.mark.seed("W0.9", "W1.6")
def test_a_slow_dribble_never_times_out(open_s3: Callable[..., S3Store]) -> None:
    """One byte every third of the timeout goes on for longer than the timeout."""
    timeout = 0.3

    def dribble(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 206 -\r\ncontent-length: 9\r\ncontent-range: bytes 0-8/9\r\n\r\n")
        for byte in b"123456789":
            pace.wait(timeout / 3)
            peer.send(bytes([byte]))

    pace = threading.Event()
    with scripted_server(dribble) as url:
        store = open_s3(url, idle_timeout=timeout)
        began = time.monotonic()
        assert store.get_range("k", 0, 9) == b"123456789"
        assert time.monotonic() - began > 2 * timeout


@pytest.mark.seed("W0.9", "W1.6")
def test_a_slow_reader_never_times_out(open_s3: Callable[..., S3Store]) -> None:
    """A part that leaves in small portions for longer than the timeout arrives.

    Most of it waits in the sender's kernel when the last send returns: its going is no silence.
    """
    timeout = 0.4
    data = os.urandom(4 * MIB)
    received: list[bytes] = []

    def read_slowly(peer: Peer) -> None:
        peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        _, headers = peer.head()
        left = int(headers["content-length"])
        while left:
            pace.wait(timeout / 20)
            received.append(peer.read(min(left, 64 * 1024)))
            left -= len(received[-1])
        peer.answer(200, etag='"e"')

    pace = threading.Event()
    with scripted_server(read_slowly) as url:
        began = time.monotonic()
        open_s3(url, idle_timeout=timeout).put_part("k", "id", 1, Body.of(data))
        assert time.monotonic() - began > 2 * timeout
    assert b"".join(received) == data


def test_bytes_stuck_in_the_kernel_are_silence(open_s3: Callable[..., S3Store]) -> None:
    """A part that fits into the kernel's buffers and is never read there times out all the same."""

    def never_read(peer: Peer) -> None:
        peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        peer.head()
        released.wait(20)

    released = threading.Event()
    with scripted_server(never_read) as url:
        store = open_s3(url, idle_timeout=0.4)
        began = time.monotonic()
        with pytest.raises(TimedOut):
            store.put_part("k", "id", 1, Body.of(bytes(MIB)))
        took = time.monotonic() - began
        released.set()
    assert 0.4 <= took < 5


def test_a_connection_closed_while_idle_is_replaced(open_s3: Callable[..., S3Store]) -> None:
    """A pooled connection that the server closed meanwhile costs the caller nothing, not even a conditional put."""
    closed = threading.Event()

    def first(peer: Peer) -> None:
        stores_it(peer)
        peer.close()
        closed.set()

    with scripted_server(first, stores_it) as url:
        store = open_s3(url)
        store.put("a", b"1")
        closed.wait(20)
        assert store.put("b", b"2", mode=PutMode.CREATE).e_tag == '"e"'


def test_a_connection_that_dies_under_the_request_is_replaced_once(open_s3: Callable[..., S3Store]) -> None:
    """A pooled connection that closes when the next request comes is replaced, with a fresh signature and body."""
    seen: list[tuple[str, dict[str, str], bytes]] = []

    def first(peer: Peer) -> None:
        stores_it(peer)
        seen.append(peer.request())

    def second(peer: Peer) -> None:
        seen.append(peer.request())
        peer.answer(200, etag='"new"')

    with scripted_server(first, second) as url:
        store = open_s3(url)
        store.put("a", b"1")
        assert store.put_part("k", "id", 1, Body.of(b"part")).e_tag == '"new"'
    assert [(line, body) for line, _, body in seen] == [
        ("PUT /bucket/k?partNumber=1&uploadId=id HTTP/1.1", b"part"),
    ] * 2


def test_a_conditional_put_is_never_sent_twice_unseen(open_s3: Callable[..., S3Store]) -> None:
    """A conditional put whose connection dies may have succeeded: the caller hears of it and settles it."""

    def first(peer: Peer) -> None:
        stores_it(peer)
        peer.request()

    with scripted_server(first) as url:
        store = open_s3(url, idle_timeout=5)
        store.put("a", b"1")
        with pytest.raises(StoreUnavailable):
            store.put("k", b"2", mode=PutMode.CREATE)


def test_a_new_connection_that_dies_is_an_error(open_s3: Callable[..., S3Store]) -> None:
    """Only pooled connections are replaced: a server that hangs up at once is unavailable, retryably."""
    with scripted_server(Peer.request) as url, pytest.raises(StoreUnavailable) as gone:
        open_s3(url).get("k", max_bytes=1)
    assert gone.value.retryable


def test_nobody_listening_is_unavailable(open_s3: Callable[..., S3Store]) -> None:
    """A refused connection is StoreUnavailable, whatever is asked."""
    store = open_s3(f"http://127.0.0.1:{free_port()}")
    for call in (lambda: store.get("k", max_bytes=1), lambda: store.head("k")):
        with pytest.raises(StoreUnavailable):
            call()


def test_a_body_cut_short_is_retryable(open_s3: Callable[..., S3Store]) -> None:
    """A connection that ends inside the body is StoreUnavailable at the offset it reached."""

    def cut(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 206 -\r\ncontent-length: 10\r\ncontent-range: bytes 0-9/10\r\n\r\n12345")

    with scripted_server(cut) as url, pytest.raises(StoreUnavailable) as short:
        open_s3(url).get_range("k", 0, 10)
    assert short.value.offset == 5
    assert short.value.retryable


def test_an_early_refusal_is_heard(open_s3: Callable[..., S3Store]) -> None:
    """A server that refuses and hangs up in the middle of a body is understood, Retry-After included."""

    def refuse(peer: Peer) -> None:
        peer.head()
        peer.refuse(503, "SlowDown", retry_after="7")

    with scripted_server(refuse) as url, pytest.raises(SlowDown) as slow:
        open_s3(url).put_part("k", "id", 1, Body.of(bytes(64 * MIB)))
    assert slow.value.retry_after_s == 7.0


def test_a_connection_refused_early_is_not_used_again(open_s3: Callable[..., S3Store]) -> None:
    """After an answer to half a request the next request has a connection of its own."""

    def refuse(peer: Peer) -> None:
        peer.head()
        peer.refuse(503, "SlowDown")

    with scripted_server(refuse, stores_it) as url:
        store = open_s3(url)
        with pytest.raises(SlowDown):
            store.put("k", bytes(64 * MIB))
        store.put("k", b"1")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (gives(b"12", 2), SizeMismatch),
        (gives(b"12345", content_range="bytes 1-5/9"), StoreUnavailable),
        (gives(b"12345", content_range="nonsense"), StoreUnavailable),
        (gives(b"12345", etag='"other"'), ObjectChanged),
    ],
)
def test_an_answer_to_another_question_is_refused(
    open_s3: Callable[..., S3Store], script: Callable[[Peer], None], error: type[Exception]
) -> None:
    """A 206 with another range, another object or fewer bytes than the object should have never fills the buffer."""
    buffer = bytearray(b"-----")
    with scripted_server(script) as url, pytest.raises(error):
        open_s3(url).get_range_into("k", 0, memoryview(buffer), e_tag='"e"')
    assert buffer == b"-----"


def test_a_server_without_ranges_is_unsupported(open_s3: Callable[..., S3Store]) -> None:
    """A 200 to a ranged GET says that the ability is missing."""

    def whole(peer: Peer) -> None:
        peer.request()
        peer.answer(200, b"123456789")

    with scripted_server(whole) as url, pytest.raises(Unsupported) as refusal:
        open_s3(url).get_range("k", 0, 3)
    assert refusal.value.capability == "ranged GET"


def test_a_range_is_one_by_its_content_range(open_s3: Callable[..., S3Store]) -> None:
    """A server that answers a range with 200 (`rclone serve s3`) is read, if it says which range it gives."""

    def ranged(peer: Peer) -> None:
        peer.request()
        peer.answer(200, b"345", content_range="bytes 3-5/10")

    with scripted_server(ranged) as url:
        assert open_s3(url).get_range("k", 3, 3) == b"345"


def test_an_error_of_the_source_passes_through(open_s3: Callable[..., S3Store]) -> None:
    """An OSError raised by the body itself is the caller's, not a broken connection, and is not retried."""

    def source() -> Iterator[bytes]:
        yield b"12"
        raise TimeoutError("the disk is slow")

    with scripted_server(Peer.wait_until_closed) as url, pytest.raises(TimeoutError, match="the disk is slow"):
        open_s3(url).put("k", Body(4, source, crc32c=0))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_connections_of_its_own(open_s3: Callable[..., S3Store]) -> None:
    """Parent and child share no connection after a fork, and the parent keeps its own."""

    def parents(peer: Peer) -> None:
        gives(b"1")(peer)
        gives(b"3")(peer)

    with scripted_server(parents, gives(b"2")) as url:
        store = open_s3(url)
        assert store.get_range("k", 0, 1) == b"1"
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if store.get_range("k", 0, 1) == b"2" else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert store.get_range("k", 0, 1) == b"3"


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/2.0 200 -\r\n\r\n",
        b"HTTP/1.1 099 -\r\n\r\n",
        b"HTTP/1.1 200 -\r\nno field\r\n\r\n",
        b"HTTP/1.1 200 -\r\netag : x\r\n\r\n",
        b"HTTP/1.1 200 -\r\na: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 -\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 -\r\na: " + b"b" * 65536 + b"\r\n\r\n",
        b"HTTP/1.1 200 -\r\ncontent-length: 1\r\n",
        b"HTTP/1.1 200 -\r\ncontent-len",
        b"",
    ],
    ids=range(11),
)
def test_a_head_that_is_none_is_unavailable(open_s3: Callable[..., S3Store], head: bytes) -> None:
    """What is not HTTP/1, and a head without an end, is a passing failure, never an answer without fields."""

    def serve(peer: Peer) -> None:
        peer.request()
        peer.send(head)

    with scripted_server(serve) as url, pytest.raises(StoreUnavailable) as wrong:
        open_s3(url).get("k", max_bytes=1)
    assert wrong.value.retryable


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", 1),
        (b"HTTP/1.1 200\nCONTENT-LENGTH:1\nContent-Length: 1\n\nx", 1),
        (b"HTTP/1.1 200 -\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", 1),
        (
            b"HTTP/1.1 100 -\r\n\r\nHTTP/1.1 103 -\r\nlink: y\r\n\r\nHTTP/1.1 200 -\r\ncontent-length: 1\r\n\r\nx",
            1,
        ),
        (b"HTTP/1.0 200 -\r\nconnection: Keep-Alive\r\ncontent-length: 1\r\n\r\nx", 1),
        (b"HTTP/1.0 200 -\r\ncontent-length: 1\r\n\r\nx", 2),
        (b"HTTP/1.1 200 -\r\nconnection: Close\r\ncontent-length: 1\r\n\r\nx", 2),
    ],
    ids=range(7),
)
def test_every_spelling_of_an_answer_is_understood(
    open_s3: Callable[..., S3Store], answer: bytes, connections: int
) -> None:
    """Fields of any case, bodies by length and by chunk, interim answers: and the connection goes on where it may."""

    def serve(times: int) -> Callable[[Peer], None]:
        def script(peer: Peer) -> None:
            for _ in range(times):
                peer.request()
                peer.send(answer)
            if times == 1:
                peer.wait_until_closed()

        return script

    with scripted_server(*[serve(2 // connections)] * connections) as url:
        store = open_s3(url)
        for _ in range(2):
            assert store.get("k", max_bytes=5).data == b"x"


def test_a_body_may_end_with_its_connection(open_s3: Callable[..., S3Store]) -> None:
    """Without a length the end of the connection is that of the body."""

    def serve(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 -\r\n\r\nhello")

    with scripted_server(serve) as url:
        assert open_s3(url).get("k", max_bytes=5).data == b"hello"


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No proxy but those of the test."""
    for name in ("no_proxy", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_requests_go_through_the_proxy(
    open_s3: Callable[..., S3Store], proxies: pytest.MonkeyPatch, scheme: str
) -> None:
    """With http_proxy set, with or without its scheme, the proxy is asked for the whole URL, and told who asks."""
    asked: list[str] = []

    def proxy(peer: Peer) -> None:
        for status in (200, 204):
            line, headers, _ = peer.request()
            asked.append(f"{line} {headers['host']}")
            assert base64.b64decode(headers["proxy-authorization"].removeprefix("Basic ")) == b"user:pass word"
            assert "proxy" not in headers["authorization"]
            peer.answer(status, b"x" if status == 200 else b"")

    with scripted_server(proxy) as url:
        proxies.setenv("http_proxy", url.replace("http://", f"{scheme}user:pass%20word@"))
        store = open_s3("http://s3.example.test")
        assert store.get("k", max_bytes=1).data == b"x"
        store.delete("k")
    assert asked == [
        "GET http://s3.example.test/bucket/k HTTP/1.1 s3.example.test",
        "DELETE http://s3.example.test/bucket/k HTTP/1.1 s3.example.test",
    ]


def test_no_proxy_is_kept(open_s3: Callable[..., S3Store], proxies: pytest.MonkeyPatch) -> None:
    """A host that no_proxy names is asked directly."""
    proxies.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    proxies.setenv("no_proxy", "localhost,127.0.0.1")
    with scripted_server(gives(b"1")) as url:
        assert open_s3(url).get_range("k", 0, 1) == b"1"


class ConnectProxy(LoopbackServer):
    """Takes CONNECT alone, and connects to one server whatever it is asked for.

    Attributes:
        asked: The request lines and the credentials.
    """

    def __init__(self, server: str, status: int = 200) -> None:
        self.asked: list[tuple[str, str]] = []
        self._server = ("127.0.0.1", int(server.rpartition(":")[2]))
        self._status = status
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        peer = Peer(connection)
        line, headers = peer.head()
        self.asked.append((line, headers.get("proxy-authorization", "")))
        if self._status != 200:
            peer.refuse(self._status, "Forbidden")
            return
        with self.connected_to(self._server) as server:
            peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            upwards = threading.Thread(target=pump, args=(connection, server))
            upwards.start()
            pump(server, connection)
            upwards.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Hand on what comes until one side ends."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_tls_goes_through_a_tunnel(
    open_s3: Callable[..., S3Store], proxies: pytest.MonkeyPatch, tls: ssl.SSLContext, certificate: Path
) -> None:
    """With https_proxy set, the proxy is asked once for a tunnel, with its password, and sees nothing of the rest.

    The certificate is held against the name of the server, not of the proxy, and is that of a CA of one's own.
    """
    data = os.urandom(MIB)

    def serve(peer: Peer) -> None:
        line, headers, body = peer.request()
        assert (line, headers["host"], body) == ("PUT /bucket/k HTTP/1.1", "s3.example.test", data)
        assert "proxy-authorization" not in headers
        peer.answer(200, etag='"e"')
        gives(data)(peer)

    with scripted_server(serve, tls=tls) as url, ConnectProxy(url) as proxy:
        proxies.setenv("https_proxy", proxy.url.replace("http://", "http://user:word@"))
        store = open_s3("https://s3.example.test", verify=str(certificate))
        store.put("k", data)
        assert store.get_range("k", 0, len(data)) == data
        store.close()
    word = base64.b64encode(b"user:word").decode()
    # Python 3.12 says HTTP/1.1 here, earlier ones 1.0.
    assert [(line[:-1], given) for line, given in proxy.asked] == [
        ("CONNECT s3.example.test:443 HTTP/1.", f"Basic {word}")
    ]


def test_a_tunnel_for_another_name_is_not_trusted(
    open_s3: Callable[..., S3Store], proxies: pytest.MonkeyPatch, tls: ssl.SSLContext, certificate: Path
) -> None:
    """A proxy that leads somewhere else is found out by the certificate, before anything is sent."""
    with scripted_server(Peer.head, tls=tls) as url, ConnectProxy(url) as proxy:
        proxies.setenv("https_proxy", proxy.url)
        with pytest.raises(StoreConfigurationError, match="certificate"):
            open_s3("https://other.example.test", verify=str(certificate)).get("k", max_bytes=1)


def test_a_refused_tunnel_is_unavailable(open_s3: Callable[..., S3Store], proxies: pytest.MonkeyPatch) -> None:
    """A proxy that refuses to connect is named as the reason, retryably: proxies restart too."""
    with ConnectProxy("127.0.0.1:1", status=403) as proxy:
        proxies.setenv("https_proxy", proxy.url)
        with pytest.raises(StoreUnavailable, match="Tunnel connection failed: 403"):
            open_s3("https://s3.example.test").get("k", max_bytes=1)


def test_a_server_at_an_ipv6_address(open_s3: Callable[..., S3Store]) -> None:
    """An endpoint at [::1] is reached, and told so in the Host header."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    hosts: list[str] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with closing(Peer(connection)) as peer:
            hosts.append(peer.request()[1]["host"])
            peer.answer(200, b"x")

    with listener:
        netloc = f"[::1]:{listener.getsockname()[1]}"
        thread = threading.Thread(target=serve)
        thread.start()
        assert open_s3(f"http://{netloc}").get("k", max_bytes=1).data == b"x"
        thread.join(timeout=20)
    assert hosts == [netloc]


def test_the_bucket_in_the_host_name(open_s3: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual addressing asks the bucket's own host, for objects and for listings, and signs for it."""
    resolve = socket.getaddrinfo

    def resolve_test(host: str, *more: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "bucket.s3.example.test" else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_test)
    asked: list[str] = []

    def serve(peer: Peer) -> None:
        for body in (b"x", b"<ListBucketResult/>"):
            line, headers, _ = peer.request()
            asked.append(f"{headers['host'].partition(':')[0]} {line}")
            assert "SignedHeaders=host;" in headers["authorization"]
            peer.answer(200, body)

    with scripted_server(serve) as url:
        store = open_s3(url.replace("127.0.0.1", "s3.example.test"), addressing_style="virtual")
        assert store.get("a/b", max_bytes=1).data == b"x"
        assert list(store.list()) == []
    query = "list-type=2&encoding-type=url&max-keys=1000&prefix="
    assert asked == [
        "bucket.s3.example.test GET /a/b HTTP/1.1",
        f"bucket.s3.example.test GET /?{query} HTTP/1.1",
    ]


def test_patience_is_for_one_request(open_s3: Callable[..., S3Store]) -> None:
    """Complete may take longer than the timeout; the next request on the same connection has the usual one again."""
    timeout = 0.2

    def serve(peer: Peer) -> None:
        peer.request()
        pace.wait(3 * timeout)
        peer.answer(200, b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")
        peer.request()
        peer.wait_until_closed()

    pace = threading.Event()
    with scripted_server(serve) as url:
        store = open_s3(url, idle_timeout=timeout)
        assert store.complete_multipart("k", "id", [PartMeta(1, 1, '"1"', 0)]).e_tag == '"e"'
        with pytest.raises(TimedOut) as silence:
            store.head("k")
    assert silence.value.timeout_s == timeout


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.create_multipart("k", part_size=5),
        lambda store: store.complete_multipart("k", "id", [PartMeta(1, 1, '"1"', 0)]),
    ],
)
def test_what_must_not_happen_twice_is_not_sent_twice_unseen(
    open_s3: Callable[..., S3Store], call: Callable[[S3Store], object]
) -> None:
    """Create and complete whose connection dies may have succeeded: the caller hears of it and settles it."""

    def serve(peer: Peer) -> None:
        stores_it(peer)
        peer.request()

    with scripted_server(serve) as url:
        store = open_s3(url, idle_timeout=5)
        store.put("a", b"1")
        with pytest.raises(StoreUnavailable):
            call(store)


def test_what_may_happen_twice_is_sent_again(open_s3: Callable[..., S3Store]) -> None:
    """Questions and deletions on a pooled connection that dies under them are sent again on a new one."""
    seen: list[str] = []

    def serve(answer: Callable[[Peer], None]) -> Callable[[Peer], None]:
        def script(peer: Peer) -> None:
            seen.append(peer.request()[0])
            answer(peer)
            peer.request()

        return script

    def last(peer: Peer) -> None:
        seen.append(peer.request()[0])
        peer.answer(204)

    with scripted_server(
        serve(lambda peer: peer.answer(200, etag='"e"')),
        serve(lambda peer: peer.send(b"HTTP/1.1 200 -\r\ncontent-length: 5\r\netag: x\r\n\r\n")),
        serve(lambda peer: peer.answer(200, b"<ListBucketResult/>")),
        last,
    ) as url:
        store = open_s3(url)
        store.put("k", b"1")
        assert store.head("k").size == 5
        assert list(store.list()) == []
        store.delete("k")
    assert [line.partition(" ")[0] for line in seen] == ["PUT", "HEAD", "GET", "DELETE"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and s3.example.test that nobody trusts, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("s3.example.test")]
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_tls_trusts_whom_it_is_told_to(open_s3: Callable[..., S3Store], tls: ssl.SSLContext, certificate: Path) -> None:
    """With the right CA bundle, or without verification, megabytes move in both directions, and a HEAD has none."""
    data = os.urandom(3 * MIB)

    def serve(peer: Peer) -> None:
        assert peer.request()[2] == data
        peer.answer(200, etag='"e"')
        gives(data)(peer)
        peer.request()
        peer.send(b"HTTP/1.1 200 -\r\ncontent-length: 5\r\netag: x\r\n\r\n")

    for verify in (str(certificate), False):
        with scripted_server(serve, tls=tls) as url:
            store = open_s3(url, verify=verify)
            store.put("k", data)
            assert store.get_range("k", 0, len(data)) == data
            assert store.head("k").size == 5


def test_the_environment_names_a_ca_bundle(
    open_s3: Callable[..., S3Store], tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS_CA_BUNDLE is trusted where the environment counts at all, and not where the keys are explicit."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with scripted_server(gives(b"1"), Peer.head, tls=tls) as url:
        assert open_s3(url, access_key_id=None, secret_access_key=None).get_range("k", 0, 1) == b"1"
        with pytest.raises(StoreConfigurationError, match="certificate"):
            open_s3(url).get_range("k", 0, 1)


def test_a_stranger_s_certificate_is_a_configuration_error(
    open_s3: Callable[..., S3Store], tls: ssl.SSLContext
) -> None:
    """By default an unknown certificate is refused, with a hint and without retries."""
    with scripted_server(Peer.head, Peer.head, tls=tls) as url:
        store = open_s3(url)
        for call in (lambda: store.get("k", max_bytes=1), lambda: store.head("k")):
            with pytest.raises(StoreConfigurationError, match="certificate") as untrusted:
                call()
            assert "CA bundle" in untrusted.value.hint
            assert not untrusted.value.retryable


def test_a_closed_store_keeps_no_connection(open_s3: Callable[..., S3Store]) -> None:
    """Closing hangs up the idle connections: the server sees the end."""
    ended = threading.Event()

    def serve(peer: Peer) -> None:
        stores_it(peer)
        peer.wait_until_closed()
        ended.set()

    with scripted_server(serve) as url:
        with closing(open_s3(url)) as store:
            store.put("k", b"1")
        assert ended.wait(20)


def test_batches_go_over_tls(open_s3: Callable[..., S3Store], tls: ssl.SSLContext, certificate: Path) -> None:
    """The coroutines of a batch trust the same authorities, and move a mebibyte both ways on one connection."""
    data = os.urandom(MIB)

    def serve(peer: Peer) -> None:
        assert peer.request()[2] == data
        peer.answer(200, etag='"e"')
        peer.request()
        peer.answer(200, data, etag='"e"')

    def batch(store: S3Store, *operations: Insert | Get) -> list[BatchResult]:
        return list(BatchExecutor(store, window=1).stream(operations))

    with scripted_server(serve, tls=tls) as url:
        inserted, got = batch(open_s3(url, verify=str(certificate)), Insert("k", data), Get("k"))
        assert inserted.error is None
        assert got.unwrap().payload.read() == data  # type: ignore[union-attr]
    with scripted_server(Peer.head, tls=tls) as url:
        (untrusted,) = batch(open_s3(url), Get("k"))
        assert isinstance(untrusted.error, StoreConfigurationError)
        assert "CA bundle" in untrusted.error.hint
