"""What a receiver bears: strangers before the token, quotas behind it, and senders that must not meet."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blobflow.checksum import crc32c
from blobflow.errors import AtCapacity, DiskFull, ObjectTooLarge, PermissionMissing, StoreConfigurationError, UsageError
from blobflow.mirror import MirrorReceiver, Snapshot, SnapshotEnvelope, SnapshotId
from blobflow.mirror.client import MirrorClient
from blobflow.mirror.door import Door
from blobflow.mirror.server import MirrorServer, Sender, mirror_app, read_senders
from tests.clock import Clock
from tests.receivers import TOKEN, serving
from tests.unit import test_http_client
from tests.unit.test_mirror_http import request

certificate = test_http_client.certificate
DIGEST = "sha256:" + "0a" * 32
BYTES = b"abcdef"


@pytest.fixture(params=["httptools", "h11"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the parsers that uvicorn may find installed."""
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    chosen = {"httptools": HttpToolsProtocol, "h11": H11Protocol}[request.param]
    monkeypatch.setattr("blobflow.mirror.door.AutoHTTPProtocol", chosen)
    return request.param


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[MirrorReceiver]:
    with MirrorReceiver(tmp_path / "data") as opened:
        yield opened


def connect(server: MirrorServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def until_closed(connection: socket.socket) -> bytes:
    """What the server still says before it closes."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            said += piece
    return said


def chunk(
    source: str = "east", database: str = "orders", position: int = 1, total: bytes = BYTES, data: bytes = b"abc"
) -> SnapshotEnvelope:
    """The first bytes of a snapshot."""
    snapshot = SnapshotId(source, database, position, DIGEST)
    return SnapshotEnvelope(snapshot, len(total), crc32c(total), 0, data, crc32c(data), done=data == total)


# Before the token


@pytest.mark.parametrize(
    "endless",
    [
        lambda number: b"X-%d: y\r\n" % number * 1,
        lambda number: b"X: y" if not number else b"y" * 100,
        lambda number: b"x" * 100,
    ],
    ids=["headers", "value", "name"],
)
def test_a_head_that_never_ends_is_cut_off(
    receiver: MirrorReceiver, parser: str, endless: Callable[[int], bytes]
) -> None:
    """Headers, a value or a name without an end: the connection is closed soon after 16 KiB, whatever the parser."""
    with serving(receiver) as server, connect(server) as connection:
        connection.sendall(b"GET /v1/snapshots HTTP/1.1\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for number in range(200_000):
                piece = endless(number)
                connection.sendall(piece)
                sent += len(piece)
        said = until_closed(connection)
        assert sent < 8 << 20, "the server took it all"
        assert b" 200 " not in said
        assert request(server.url, "GET", "/v1/snapshots")[0] == 200  # others are served


def test_a_stranger_who_says_nothing_or_half_of_it_is_sent_away(receiver: MirrorReceiver, parser: str) -> None:
    """No first byte, half a head, or one byte now and then: closed after the time for a head."""
    door = Door(head_timeout_s=0.6)
    with serving(receiver, door=door) as server:
        for said in (b"", b"GET /v1/snapshots HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with connect(server) as connection:
                began = time.monotonic()
                connection.sendall(said)
                connection.settimeout(0.1)
                while True:
                    try:
                        if not connection.recv(100):
                            break
                    except TimeoutError:
                        with contextlib.suppress(ConnectionError):
                            connection.sendall(b"x" if said else b"")
                    except ConnectionError:
                        break
                    assert time.monotonic() - began < 20, "it may stay for ever"
        assert request(server.url, "GET", "/v1/snapshots")[0] == 200


def test_a_request_that_takes_long_is_not_taken_for_a_stranger(receiver: MirrorReceiver, parser: str) -> None:
    """The time for a head is none for a body: one that comes slowly is received whole."""
    frame = chunk(data=BYTES).encode()
    head = (
        f"POST /v1/frames HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(frame)}\r\n\r\n"
    )
    with serving(receiver, door=Door(head_timeout_s=0.2)) as server, connect(server) as connection:
        connection.sendall(head.encode())
        for at in range(0, len(frame), 20):
            connection.sendall(frame[at : at + 20])
            time.sleep(0.1)  # the promise is about time
        assert b" 200 OK" in connection.recv(65536)


def test_connections_are_counted_where_they_are_accepted(receiver: MirrorReceiver, parser: str) -> None:
    """More than are allowed are closed at once, and those that end make room again."""
    door = Door(max_connections=4)
    with serving(receiver, door=door) as server:
        held = [connect(server) for _ in range(4)]
        with connect(server) as one_more:
            assert until_closed(one_more) == b""
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                if request(server.url, "GET", "/v1/snapshots")[0] == 200:
                    break
            assert time.monotonic() < deadline
        assert len(door.inside) <= 1


def test_a_handshake_that_never_ends_is_given_up(receiver: MirrorReceiver, certificate: Path) -> None:
    """With TLS the time for the first byte counts as well, before there is a request at all."""
    door = Door(head_timeout_s=0.5)
    with serving(receiver, door=door, certificate=str(certificate), private_key=str(certificate)) as server:
        host, port = server.url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            began = time.monotonic()
            until_closed(connection)
            assert time.monotonic() - began < 20
    assert not door.inside


def test_nothing_is_told_to_who_has_no_token(receiver: MirrorReceiver) -> None:
    """Not even which addresses there are."""
    with serving(receiver) as server:
        for target in ("/", "/v1/snapshots", "/docs", "/v2/frames"):
            assert request(server.url, "GET", target, token=None)[0] == 401
        assert request(server.url, "GET", "/docs")[0] == 404


# Quotas


def test_a_snapshot_or_all_of_them_beyond_the_quota_are_refused(tmp_path: Path) -> None:
    """By what they declare, before a byte is written; what was removed makes room again."""
    with MirrorReceiver(tmp_path / "data", max_snapshot_bytes=10, max_total_bytes=15) as receiver:
        with pytest.raises(ObjectTooLarge):
            receiver.handle(chunk(total=bytes(11)))
        receiver.handle(chunk(data=BYTES))
        receiver.handle(chunk(position=2))
        with pytest.raises(DiskFull) as refusal:
            receiver.handle(chunk(position=3))
        assert refusal.value.limit == 15
        assert [each.position for each in receiver.snapshots()] == [1, 2]
        receiver.handle(chunk(position=2))  # begins again in its own place
        receiver.abort(chunk(position=2).id)
        receiver.handle(chunk(position=3))


def test_a_sender_has_so_many_sessions_and_no_more(tmp_path: Path) -> None:
    """Incomplete snapshots of one source are counted; another source is not hindered, and a complete one counts not."""
    with MirrorReceiver(tmp_path / "data", max_sessions=2) as receiver:
        receiver.handle(chunk(position=1))
        receiver.handle(chunk(position=2, database="users"))
        with pytest.raises(AtCapacity):
            receiver.handle(chunk(position=3))
        receiver.handle(chunk(position=3, source="west"))
        receiver.abort(chunk(position=1).id)
        receiver.handle(chunk(position=3))
    with MirrorReceiver(tmp_path / "data", max_sessions=2) as again, pytest.raises(AtCapacity):
        again.handle(chunk(position=4))  # also those of an earlier process count


def test_what_nobody_continues_expires(tmp_path: Path) -> None:
    """After the time, and not before; complete snapshots stay."""
    clock = Clock(now := time.time())
    with MirrorReceiver(tmp_path / "data", expire_after_s=3600, clock=clock) as receiver:
        receiver.handle(chunk(position=1, data=BYTES))
        receiver.handle(chunk(position=2))
        clock.now = now + 3000
        assert receiver.expire() == []
        for path in (tmp_path / "data").rglob("*.partial"):
            os.utime(path, (now + 3000, now + 3000))  # continued just now
        clock.now = now + 4000
        assert receiver.expire() == []
        clock.now = now + 8000
        assert [each.position for each in receiver.expire()] == [2]
        assert [each.position for each in receiver.snapshots()] == [1]


def test_asking_for_what_is_not_there_leaves_nothing_in_memory(receiver: MirrorReceiver) -> None:
    """A sender that asks for a thousand snapshots makes the receiver remember none of them."""
    for position in range(1000):
        assert receiver.status(chunk(position=position).id) is None
    assert len(receiver._slots) == 0


# Senders


@pytest.fixture
def two_senders(receiver: MirrorReceiver) -> Iterator[MirrorServer]:
    senders = [Sender("e" * 16, "east", "orders"), Sender("w" * 16, "west")]
    server = MirrorServer(receiver, senders=senders)
    import threading

    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join()


def test_one_sender_neither_sees_nor_touches_what_is_another_ones(
    two_senders: MirrorServer, receiver: MirrorReceiver, tmp_path: Path
) -> None:
    """Not in the list, not by name, not by frames, not by a deletion; and no answer tells whether it is there."""
    receiver.handle(chunk())
    receiver.handle(chunk(source="west"))
    receiver.handle(chunk(database="users"))
    (file := tmp_path / "file").write_bytes(BYTES)
    with (
        MirrorClient(two_senders.url, token="w" * 16, patience_s=0) as west,
        MirrorClient(two_senders.url, token="e" * 16, patience_s=0) as east,
    ):
        assert [found["source"] for found in west.snapshots()] == ["west"]
        assert [(found["source"], found["database"]) for found in east.snapshots()] == [("east", "orders")]
        for call in (west.status, west.abort):
            refusals: list[str] = []
            for theirs in (chunk().id, chunk(position=99).id):
                with pytest.raises(PermissionMissing) as refusal:
                    call(theirs)
                refusals.append(refusal.value.message)
            assert refusals[0] == refusals[1]
        with pytest.raises(PermissionMissing):
            east.push(Snapshot.of_file(file, source="east", database="users"))
        status, answer = request(two_senders.url, "POST", "/v1/frames", chunk(data=BYTES).encode(), token="w" * 16)
        assert (status, answer["error"]["type"]) == (403, "PermissionMissing")
        assert receiver.committed(chunk().id) is None
        assert east.push(Snapshot.of_file(file, source="east", database="orders")).status == "pushed"
        with pytest.raises(StoreConfigurationError), MirrorClient(two_senders.url, token="x" * 16) as nobody:
            nobody.snapshots()


def test_tokens_are_read_from_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    """A line for each sender; what is wrong is named by its line, never by its token."""
    path = tmp_path / "tokens"
    path.write_text(f"# ours\neast orders {'e' * 16}\nwest * {'w' * 16} # all of west\n")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="may be read by others"):
        read_senders(path)
    path.chmod(0o600)
    assert [(sender.source, sender.database) for sender in read_senders(path)] == [("east", "orders"), ("west", None)]
    assert "eeee" not in repr(read_senders(path))
    for wrong in ("east orders SECRETSECRET\n", "east SECRETSECRETSECRET\n", "../x orders SECRETSECRETSECRET\n", ""):
        path.write_text(wrong)
        with pytest.raises(UsageError) as refusal:
            read_senders(path)
        assert "SECRET" not in str(refusal.value) + refusal.value.hint
    path.write_text(f"east orders {'e' * 16}\nwest orders {'e' * 16}\n")
    with pytest.raises(UsageError, match="same token"):
        read_senders(path)


def test_a_receiver_without_a_token_is_none(receiver: MirrorReceiver) -> None:
    """Nobody opens one to everybody by leaving something out; white space around a token is not part of it."""
    with pytest.raises(UsageError):
        mirror_app(receiver)
    with pytest.raises(UsageError):
        mirror_app(receiver, token=" " * 20)
    assert Sender(f" {TOKEN}\n").token == TOKEN
