"""What the data plane does on connections that stall, break, lie or are refused, byte by byte."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from blobflow.errors import (
    ObjectChanged,
    SizeMismatch,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
)
from blobflow.stores.base import Body, PutMode
from blobflow.stores.s3 import S3Options, S3Store
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
    assert 0 < silence.value.offset < 64 * MIB


def test_a_server_that_never_answers_times_out(open_s3: Callable[..., S3Store]) -> None:
    """Silence after the whole request was read is TimedOut on both planes."""
    with scripted_server(Peer.wait_until_closed, Peer.wait_until_closed) as url:
        store = open_s3(url, idle_timeout=0.2)
        for call in (lambda: store.get("k", max_bytes=1), lambda: store.head("k")):
            with pytest.raises(TimedOut) as silence:
                call()
            assert silence.value.timeout_s == 0.2


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
    """A refused connection is StoreUnavailable on both planes."""
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
    assert refusal.value.ability == "ranged GET"


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


def test_both_planes_go_through_the_proxy(open_s3: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """With http_proxy set, the proxy is asked for the whole URL by either plane."""
    asked: list[str] = []

    def proxy(peer: Peer) -> None:
        line, headers, _ = peer.request()
        asked.append(f"{line} {headers['host']}")
        if line.startswith("GET"):
            peer.answer(200, b"x")
        else:
            peer.answer(204)

    with scripted_server(proxy, proxy) as url:
        for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", url)
        store = open_s3("http://s3.example.test")
        assert store.get("k", max_bytes=1).data == b"x"
        store.delete("k")
    assert asked == [
        "GET http://s3.example.test/bucket/k HTTP/1.1 s3.example.test",
        "DELETE http://s3.example.test/bucket/k HTTP/1.1 s3.example.test",
    ]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody trusts, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
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
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
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


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_tls_trusts_whom_it_is_told_to(open_s3: Callable[..., S3Store], tls: ssl.SSLContext, certificate: Path) -> None:
    """With the right CA bundle, or without verification, both planes talk; megabytes move in both directions."""
    data = os.urandom(3 * MIB)

    def serve(peer: Peer) -> None:
        assert peer.request()[2] == data
        peer.answer(200, etag='"e"')
        gives(data)(peer)

    def head(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 -\r\ncontent-length: 5\r\netag: x\r\n\r\n")

    for verify in (str(certificate), False):
        with scripted_server(serve, head, tls=tls) as url:
            store = open_s3(url, verify=verify)
            store.put("k", data)
            assert store.get_range("k", 0, len(data)) == data
            assert store.head("k").size == 5


def test_a_stranger_s_certificate_is_a_configuration_error(
    open_s3: Callable[..., S3Store], tls: ssl.SSLContext
) -> None:
    """By default an unknown certificate is refused by both planes, with a hint and without retries."""
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
