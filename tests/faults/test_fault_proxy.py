"""The fault proxy passes everything on unchanged, except what it was told to spoil."""

from __future__ import annotations

import http.client
import socket
import threading
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
)

from tests.fault_proxy import (
    Corrupt,
    Fault,
    FaultProxy,
    Message,
    Reset,
    Stall,
    Truncate,
    random_faults,
    scripted_faults,
)
from tests.fault_rules import Rule, Slow
from tests.faults.clients import Clients
from tests.servers import Peer, scripted_server
from tests.strict_s3 import Late, Limits, StrictS3

BUCKET = "bucket"
DATA = bytes(range(256)) * 1000


@pytest.fixture
def client(strict_s3: StrictS3, proxy: FaultProxy, clients: Clients) -> Any:
    """A client of the proxy."""
    client = clients(proxy)
    client.create_bucket(Bucket=BUCKET)
    return client


def put(client: Any, data: bytes = DATA, **query: Any) -> Any:
    return client.put_object(Bucket=BUCKET, Key="key", Body=data, **query)


def get(client: Any, **query: Any) -> bytes:
    return client.get_object(Bucket=BUCKET, Key="key", **query)["Body"].read()


def test_without_faults_nothing_changes(client: Any, strict_s3: StrictS3, proxy: FaultProxy) -> None:
    """Bodies, ranges, refusals, answers without a body and chunked ones pass, signed for the proxy's address."""
    put(client)
    assert strict_s3.objects(BUCKET) == {"key": DATA}
    assert get(client) == DATA
    assert get(client, Range="bytes=5-9") == DATA[5:10]
    assert client.head_object(Bucket=BUCKET, Key="key")["ContentLength"] == len(DATA)
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket=BUCKET, Key="absent")
    where = {"Bucket": BUCKET, "Key": "key"}
    where["UploadId"] = client.create_multipart_upload(**where)["UploadId"]
    e_tag = client.upload_part(**where, PartNumber=1, Body=b"part")["ETag"]
    strict_s3.script(Rule(Late(blanks=3), "CompleteMultipartUpload"))
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": e_tag}]})
    assert get(client) == b"part"
    client.delete_object(Bucket=BUCKET, Key="key")
    assert strict_s3.objects(BUCKET) == {}
    assert proxy.struck() == []
    seen = [(message.operation, message.status) for message, _ in proxy.messages if message.side == "answer"]
    assert seen == [(each.operation, each.status) for each in strict_s3.log]
    assert {each.headers["host"] for each in strict_s3.log} == {f"127.0.0.1:{proxy.port}"}


def test_an_early_refusal_passes(client: Any, strict_s3: StrictS3) -> None:
    """A server that refuses before it has read the body is heard."""
    strict_s3.limits = Limits(max_part_size=10)
    with pytest.raises(ClientError, match="EntityTooLarge"):
        put(client, DATA * 20)
    put(client, b"small")


@pytest.mark.parametrize("fault", [Truncate(), Reset(), Truncate(0), Truncate(1000), Reset(1000), Truncate(len(DATA))])
def test_a_request_is_cut(client: Any, strict_s3: StrictS3, proxy: FaultProxy, fault: Truncate | Reset) -> None:
    """Only so many bytes of the body arrive, and the client finds its connection broken."""
    proxy.faults = scripted_faults(Rule(fault, "PutObject", side="request"))
    with pytest.raises(HTTPClientError):
        put(client)
    arrived = [] if fault.keep is None else [fault.keep]
    strict_s3.wait_until(lambda: [each.bytes_in for each in strict_s3.requests("PutObject")] == arrived)
    assert [message.operation for message in proxy.struck("request")] == ["PutObject"]
    put(client)
    assert strict_s3.objects(BUCKET) == {"key": DATA}


@pytest.mark.parametrize("fault", [Truncate(), Reset()])
def test_an_answer_is_lost(client: Any, strict_s3: StrictS3, proxy: FaultProxy, fault: Fault) -> None:
    """What was asked for happens, and the client does not learn of it."""
    proxy.faults = scripted_faults(Rule(fault, "PutObject", side="answer"))
    with pytest.raises(ConnectionClosedError):
        put(client)
    assert strict_s3.objects(BUCKET) == {"key": DATA}
    assert [message.status for message in proxy.struck("answer")] == [200]


@pytest.mark.parametrize("fault", [Truncate(keep=1000), Reset(keep=1000)])
def test_an_answer_is_cut(client: Any, proxy: FaultProxy, fault: Fault) -> None:
    """The client receives so many bytes at most, and never takes them for all."""
    put(client)
    proxy.faults = scripted_faults(Rule(fault, "GetObject", side="answer"))
    with pytest.raises((IncompleteReadError, HTTPClientError)):
        get(client)
    assert get(client) == DATA


@pytest.mark.parametrize(("fault", "kind"), [(Truncate(keep=10), b""), (Reset(keep=10), ConnectionResetError)])
def test_a_cut_ends_and_a_reset_resets(fault: Fault, kind: Any) -> None:
    """A cut is an end of file, a reset is a RST, both after exactly so many bytes."""

    def answer(peer: Peer) -> None:
        peer.head()
        peer.answer(200, b"0123456789abcdef")
        peer.wait_until_closed()

    with (
        scripted_server(answer) as upstream,
        FaultProxy(upstream, scripted_faults(Rule(fault, side="answer"))) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port)) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while not received.endswith(b"0123456789"):
            received += connection.recv(1000)
        if isinstance(kind, bytes):
            assert connection.recv(1000) == kind
        else:
            with pytest.raises(kind):
                connection.recv(1000)


@pytest.mark.parametrize("side", ["request", "answer"])
def test_nothing_moves_in_a_stall(strict_s3: StrictS3, clients: Clients, side: Any) -> None:
    """The connection stays open and silent until the client gives up."""
    with FaultProxy(strict_s3.url) as proxy:
        client = clients(proxy, config={"read_timeout": 0.2})
        client.create_bucket(Bucket=BUCKET)
        put(client)
        proxy.faults = scripted_faults(Rule(Stall(keep=1000), side=side, times=None))
        with pytest.raises(ReadTimeoutError):
            put(client) if side == "request" else get(client)
        assert len(proxy.struck(side)) == 1


@pytest.mark.parametrize(("at", "where"), [(0, 0), (70_000, 70_000), (-1, len(DATA) - 1)])
def test_a_byte_is_corrupted(at: int, where: int) -> None:
    """One bit of one byte of a body differs, in either direction, and nothing else."""
    arrived: list[bytes] = []

    def echo(peer: Peer) -> None:
        for _ in range(2):
            arrived.append(peer.request()[2])
            peer.answer(200, DATA)

    wrong = bytearray(DATA)
    wrong[where] ^= 0x01
    faults = scripted_faults(Rule(Corrupt(at), side="request"), Rule(Corrupt(at), side="answer", nth=2))
    with scripted_server(echo) as upstream, FaultProxy(upstream, faults) as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
        for answer in (DATA, wrong):
            connection.request("PUT", "/bucket/key", body=DATA)
            assert connection.getresponse().read() == answer
        connection.close()
    assert arrived == [wrong, DATA]


def test_a_byte_of_a_chunked_body_is_corrupted() -> None:
    """Positions count the bytes of the body, not those of its framing."""

    def answer(peer: Peer) -> None:
        peer.head()
        peer.send(b"HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n")
        peer.wait_until_closed()

    with (
        scripted_server(answer) as upstream,
        FaultProxy(upstream, scripted_faults(Rule(Corrupt(4), side="answer"))) as proxy,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"abcddfg"
        connection.close()


def test_a_body_is_slow(strict_s3: StrictS3, clients: Clients) -> None:
    """A body takes its size divided by the rate, in small pieces."""
    naps: list[float] = []
    with FaultProxy(strict_s3.url, sleep=naps.append) as proxy:
        client = clients(proxy)
        client.create_bucket(Bucket=BUCKET)
        proxy.faults = scripted_faults(Rule(Slow(bytes_per_s=100_000), "PutObject", side="request"))
        put(client)
    assert sum(naps) == pytest.approx(len(DATA) / 100_000)
    assert max(naps) <= 0.05 + 1e-9
    assert strict_s3.objects(BUCKET) == {"key": DATA}


def test_who_hangs_up_is_missed_on_the_other_side() -> None:
    """A server that closes an idle connection closes the client's too, and the reverse."""
    closed = threading.Event()

    def hang_up(peer: Peer) -> None:
        peer.head()
        peer.answer(200)

    def be_left(peer: Peer) -> None:
        peer.head()
        peer.answer(200)
        peer.wait_until_closed()
        closed.set()

    with scripted_server(hang_up, be_left) as upstream, FaultProxy(upstream) as proxy:
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
                peer = Peer(connection)
                peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert peer.head()[0] == "HTTP/1.1 200 -"
                if not proxy.messages[2:]:
                    assert peer.read(1) == b""
                peer.close()
        assert closed.wait(20)


def test_the_proxy_closes_in_the_middle_of_everything(strict_s3: StrictS3, clients: Clients) -> None:
    """Closing does not wait for a stall, nor for a server that takes its time."""
    client = clients(strict_s3)
    client.create_bucket(Bucket=BUCKET)
    put(client)
    strict_s3.script(Rule(Slow(bytes_per_s=100_000), "GetObject"))
    moved = threading.Event()

    def stall(message: Message) -> Fault | None:
        if message.side == "answer" and message.operation == "GetObject":
            moved.set()
        return Stall(keep=10) if message.operation == "PutObject" and message.side == "request" else None

    failures: list[Exception] = []

    def try_to(call: Any) -> None:
        try:
            call(clients_of_proxy.pop())
        except Exception as error:  # noqa: BLE001  # whatever botocore makes of it
            failures.append(error)

    with FaultProxy(strict_s3.url, stall) as proxy:
        clients_of_proxy = [clients(proxy), clients(proxy)]
        threads = [threading.Thread(target=try_to, args=(call,)) for call in (put, get)]
        for thread in threads:
            thread.start()
        assert moved.wait(20)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(failures) == 2


def messages(count: int) -> list[Message]:
    """Answers of which every second one is a success."""
    return [Message("answer", n, "PutObject", f"/b/{n}", 200 if n % 2 else 503) for n in range(1, count + 1)]


def test_rules_choose_messages() -> None:
    """By side, operation, path and success; from the n-th, so many times, or every n-th."""
    cut = Truncate()

    def struck(rule: Rule) -> list[int]:
        faults = scripted_faults(rule)
        return [message.number for message in messages(12) if faults(message) is cut]

    assert struck(Rule(cut, side="answer")) == [1]
    assert struck(Rule(cut, side="request")) == []
    assert struck(Rule(cut, "Get*", side="answer")) == []
    assert struck(Rule(cut, side="answer", key="1*", times=None)) == [1, 10, 11, 12]
    assert struck(Rule(cut, side="answer", nth=3, times=2)) == [3, 4]
    assert struck(Rule(cut, side="answer", success=True, nth=2, every=True)) == [3, 7, 11]
    reset = Reset()
    both = scripted_faults(Rule(cut, side="answer", nth=2), Rule(reset, side="answer", nth=2, times=2))
    assert [both(message) for message in messages(4)] == [None, cut, reset, None]


def test_a_seed_decides_everything() -> None:
    """The same seed gives the same faults, another seed others, at about the rate and never more than the most."""
    kinds = [Truncate(), Corrupt(7), Reset(keep=3)]

    def drawn(seed: int, most: int | None = None) -> list[Fault | None]:
        faults = random_faults(seed, 0.2, kinds, most=most)
        return [faults(message) for message in messages(500)]

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    assert 60 < sum(fault is not None for fault in first) < 140
    assert {type(fault) for fault in first} == {Truncate, Corrupt, Reset, type(None)}
    assert [fault for fault in drawn(1, most=5) if fault] == [fault for fault in first if fault][:5]
