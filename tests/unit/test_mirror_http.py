"""Frames on the wire, and a receiver behind HTTP with its client."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from blobflow import upload
from blobflow.artifact.manifest import artifact_digest
from blobflow.checksum import crc32c
from blobflow.errors import (
    ChecksumMismatch,
    IntegrityError,
    NotFoundError,
    ObjectTooLarge,
    RefusedError,
    SourceChanged,
    SourceTruncated,
    StoreConfigurationError,
    StoreUnavailable,
    UsageError,
)
from blobflow.mirror import Bootstrapping, Following, MirrorReceiver, Snapshot, SnapshotEnvelope, SnapshotId
from blobflow.mirror.client import MirrorClient
from blobflow.mirror.envelope import FrameDecoder, head_bytes
from blobflow.mirror.sending import FileSource
from blobflow.mirror.server import MirrorServer, mirror_app
from blobflow.transport import read_manifest_bytes
from tests.fault_proxy import Corrupt, FaultProxy, Reset, Truncate, scripted_faults
from tests.fault_rules import Rule
from tests.kit import artifact_of, local_store, noise
from tests.receivers import TOKEN, serving
from tests.unit import test_http_client

certificate = test_http_client.certificate
"""A fixture: for 127.0.0.1, of a CA that nobody trusts."""

KIB = 1024
ORDERS = SnapshotId("east", "orders", 42, f"sha256:{0xA:064x}")
USERS = ORDERS._replace(database="users")


def envelope(data: bytes = b"abc", **changes: Any) -> SnapshotEnvelope:
    """The first half of a snapshot of six bytes."""
    return dataclasses.replace(SnapshotEnvelope(ORDERS, 6, crc32c(b"abcdef"), 0, data, crc32c(data)), **changes)


def detached(found: SnapshotEnvelope) -> SnapshotEnvelope:
    """With bytes of its own instead of a view that is used again."""
    return dataclasses.replace(found, data=bytes(found.data))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file to be sent."""
    path = tmp_path / "orders.db"
    path.write_bytes(noise(100 * KIB + 7))
    return path


@pytest.fixture
def snapshot(source: Path) -> Snapshot:
    return Snapshot.of_file(source, source="east", database="orders")


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[MirrorReceiver]:
    with MirrorReceiver(tmp_path / "mirror", checkpoint_bytes=16 * KIB) as made:
        yield made


@pytest.fixture
def server(receiver: MirrorReceiver) -> Iterator[MirrorServer]:
    with serving(receiver) as running:
        yield running


@pytest.fixture
def client(server: MirrorServer) -> Iterator[MirrorClient]:
    with MirrorClient(server.url, token=TOKEN, patience_s=0) as made:
        yield made


def request(
    url: str, method: str, target: str, body: bytes | None = None, token: str | None = TOKEN
) -> tuple[int, dict[str, Any]]:
    """One plain request, without our client: the status and the document."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request(method, target, body, {"Authorization": f"Bearer {token}"} if token is not None else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


# Frames


def test_a_frame_has_the_bytes_of_the_page():
    """The layout is that of docs/mirror.md, byte for byte."""
    frame = envelope(done=True, offset=3).encode()
    expected = (
        "42464d53 0001 0001 000c 00000003 0000000000000003 0000000000000006 000000000000002a"
        f" {crc32c(b'abcdef'):08x} {crc32c(b'abc'):08x} {0xA:064x}"
    )
    assert frame[:78] == bytes.fromhex(expected)
    assert frame[:4] == b"BFMS"
    assert frame[78:90] == b"\x04east\x06orders"
    assert int.from_bytes(frame[90:94], "big") == crc32c(frame[:90])
    assert frame[94:] == b"abc"
    assert head_bytes(ORDERS) == 94


@pytest.mark.parametrize("cut", [1, 7, 78, 94, 10_000])
def test_frames_survive_any_cut_of_the_stream(cut: int):
    """Whatever the pieces, the same envelopes come out, of several snapshots in turns and without data too."""
    sent = [
        envelope(),
        envelope(id=USERS, data=b"", crc32c=0),
        envelope(offset=3, data=b"def", crc32c=crc32c(b"def"), done=True),
    ]
    stream = b"".join(one.encode() for one in sent)
    decoder = FrameDecoder()
    found = [detached(one) for at in range(0, len(stream), cut) for one in decoder.feed(stream[at : at + cut])]
    assert found == sent
    assert not decoder.pending
    assert detached(SnapshotEnvelope.decode(sent[0].encode())) == sent[0]


@pytest.mark.parametrize("position", range(94))
def test_a_damaged_head_is_refused(position: int):
    """Any changed byte of the head is found before anything of the frame is used."""
    frame = bytearray(envelope().encode())
    frame[position] ^= 0x10
    with pytest.raises(IntegrityError):
        SnapshotEnvelope.decode(frame)


@pytest.mark.parametrize("frame", [b"", envelope().encode()[:-1], envelope().encode() * 2, envelope().encode() + b"B"])
def test_what_is_not_exactly_one_frame_is_refused(frame: bytes):
    """Nothing less and nothing more."""
    with pytest.raises(IntegrityError, match="not exactly one frame"):
        SnapshotEnvelope.decode(frame)


def test_a_payload_beyond_the_limit_is_refused_before_it_comes():
    """Nobody can make a receiver hold more than it allows."""
    with pytest.raises(ObjectTooLarge) as refusal:
        list(FrameDecoder(max_payload_bytes=2).feed(envelope().head()))
    assert refusal.value.limit == 2


@pytest.mark.seed("W2.4")
def test_a_hostile_name_does_not_get_through_a_frame():
    """Names are checked where they come in."""
    with pytest.raises(RefusedError, match="id of a database"):
        SnapshotEnvelope.decode(envelope(id=ORDERS._replace(database="../../etc")).encode())


# Sources


@pytest.mark.parametrize("offset", [0, 1, 4096, 100 * KIB + 7])
def test_a_file_is_sent_from_any_offset(snapshot: Snapshot, source: Path, offset: int):
    """The chunks from an offset on are the rest of the file; the last one says so."""
    chunks = [detached(one) for one in snapshot.envelopes(offset, chunk_bytes=4096)]
    assert b"".join(bytes(one.data) for one in chunks) == source.read_bytes()[offset:]
    assert [one.offset for one in chunks] == [offset, *(one.end for one in chunks[:-1])]
    assert [one.done for one in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {one.id.digest for one in chunks} == {snapshot.id.digest}


def test_an_object_of_a_store_is_sent_pinned(tmp_path: Path):
    """The chunks are of the version that was declared; a replaced object ends the transfer instead of mixing in."""
    store = local_store(tmp_path)
    store.put("blob", noise(10_000))
    snapshot = Snapshot.of_object(store, "blob", source="east", database="orders", position=1)
    chunks = snapshot.envelopes(chunk_bytes=4096)
    assert bytes(next(chunks).data) == noise(10_000)[:4096]
    store.put("blob", noise(10_000, 2))
    with pytest.raises(SourceChanged):
        next(chunks)


def test_a_file_that_changes_is_not_sent_any_further(snapshot: Snapshot, source: Path):
    """A source that is written to never becomes a snapshot."""
    chunks = snapshot.envelopes(chunk_bytes=4096)
    next(chunks)
    with open(source, "r+b") as file:
        file.write(b"new")
    os.utime(source, ns=(1, 1))
    with pytest.raises(SourceChanged):
        next(chunks)


def test_a_source_that_ends_early_is_named(source: Path, snapshot: Snapshot):
    """What was declared and is not there is an error, never a short snapshot."""
    longer = dataclasses.replace(snapshot, total_bytes=snapshot.total_bytes + 1)
    with pytest.raises(SourceTruncated):
        list(longer.envelopes())
    with pytest.raises(NotFoundError):
        FileSource(source.with_name("none")).pin()


# HTTP


@pytest.mark.seed("2.4", "W2.1")
def test_a_snapshot_is_pushed_and_a_second_push_sends_nothing(
    receiver: MirrorReceiver, client: MirrorClient, snapshot: Snapshot, source: Path
):
    """What arrives is what was sent, request by request; what is there already is not sent again."""
    progress: list[int] = []
    pushed = client.push(
        snapshot, chunk_bytes=4096, request_bytes=30_000, on_progress=lambda done, _: progress.append(done)
    )
    size = source.stat().st_size
    assert (pushed.status, pushed.bytes_sent, pushed.bytes_resumed) == ("pushed", size, 0)
    assert progress == [0, 30_000, 60_000, 90_000, size]
    committed = receiver.committed(snapshot.id)
    assert committed is not None
    assert committed.path.read_bytes() == source.read_bytes()
    again = client.push(snapshot)
    assert (again.status, again.bytes_sent, again.bytes_resumed) == ("unchanged", 0, size)
    assert client.snapshots() == [client.status(snapshot.id)]
    receiver.follow(snapshot.id, "wal:9")
    assert (client.status(snapshot.id)["status"], client.status(snapshot.id)["cursor"]) == ("following", "wal:9")


def test_an_empty_file_is_pushed(client: MirrorClient, receiver: MirrorReceiver, tmp_path: Path):
    """Nothing at all arrives too."""
    (tmp_path / "empty").touch()
    snapshot = Snapshot.of_file(tmp_path / "empty", source="east", database="orders")
    assert client.push(snapshot).status == "pushed"
    assert receiver.status(snapshot.id) == Bootstrapping(0, 0)
    assert receiver.committed(snapshot.id) is not None


def test_an_artifact_is_pushed_by_its_manifest(client: MirrorClient, receiver: MirrorReceiver, tmp_path: Path):
    """The manifest knows size and checksum, so nothing is read beforehand; the digest names the artifact."""
    store = local_store(tmp_path)
    upload(store, "orders/1", artifact_of(tmp_path))
    snapshot = Snapshot.of_artifact(store, "orders/1", source="east", database="orders")
    assert snapshot.id.digest == artifact_digest(read_manifest_bytes(store, "orders/1"))
    client.push(snapshot)
    committed = receiver.committed(snapshot.id)
    assert committed is not None
    assert committed.path.read_bytes() == store.get("orders/1", max_bytes=1 << 20).data


@pytest.mark.seed("2.4")
def test_a_disk_that_hangs_keeps_nobody_else_waiting(
    server: MirrorServer, client: MirrorClient, snapshot: Snapshot, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """While a push waits for the disk in its thread, the server's event loop answers others and takes their pushes."""
    stuck, go_on = threading.Event(), threading.Event()
    real = os.pwrite

    def hangs(descriptor: int, data: Any, offset: int) -> int:
        if not stuck.is_set():
            stuck.set()
            assert go_on.wait(60)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", hangs)
    pushed: list[str] = []

    def push() -> None:
        with MirrorClient(server.url, token=TOKEN) as other:
            pushed.append(other.push(snapshot).status)

    waiting = threading.Thread(target=push)
    waiting.start()
    try:
        assert stuck.wait(60)
        users = Snapshot.of_file(source, source="east", database="users")
        assert client.status(users.id)["status"] == "absent"
        assert client.push(users).status == "pushed"
        assert pushed == []
    finally:
        go_on.set()
        waiting.join()
    assert pushed == ["pushed"]


@pytest.mark.seed("W2.3")
def test_two_databases_share_one_connection(server: MirrorServer, receiver: MirrorReceiver):
    """Frames of two snapshots in turns in one body are both right."""
    wholes = {ORDERS: noise(50, 1), USERS: noise(50, 2)}
    frames = [
        SnapshotEnvelope(
            which, 50, crc32c(whole), at, whole[at : at + 10], crc32c(whole[at : at + 10]), at == 40
        ).encode()
        for at, (which, whole) in itertools.product(range(0, 50, 10), wholes.items())
    ]
    status, document = request(server.url, "POST", "/v1/frames", b"".join(frames))
    assert (status, document["frames"]) == (200, 10)
    assert [(one["database"], one["complete"]) for one in document["snapshots"]] == [("orders", True), ("users", True)]
    for which, whole in wholes.items():
        committed = receiver.committed(which)
        assert committed is not None
        assert committed.path.read_bytes() == whole


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN.upper()])
@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/v1/snapshots"), ("GET", "/v1/snapshot"), ("DELETE", "/v1/snapshot"), ("POST", "/v1/frames")],
)
def test_nobody_gets_in_without_the_token(
    server: MirrorServer, receiver: MirrorReceiver, token: str | None, method: str, target: str
):
    """Every request is refused, and nothing of it is taken."""
    status, document = request(server.url, method, target, envelope().encode(), token)
    assert (status, document["error"]["message"]) == (401, "the token is missing or wrong")
    assert receiver.snapshots() == {}


def test_the_client_says_that_the_token_is_wrong(
    server: MirrorServer, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
):
    """A wrong token fails at once, and stands in no message and no log."""
    caplog.set_level(logging.DEBUG, "blobflow")
    wrong = "wrong and still a secret"
    with MirrorClient(server.url, token=wrong) as client, pytest.raises(StoreConfigurationError) as refusal:
        client.push(snapshot)
    assert wrong not in f"{refusal.value} {client!r} {server!r} {caplog.text}"
    assert TOKEN not in caplog.text


def test_a_short_token_is_refused(receiver: MirrorReceiver):
    """A token that can be guessed keeps nobody out."""
    with pytest.raises(UsageError, match="fewer than 16"):
        mirror_app(receiver, token="short")


@pytest.mark.parametrize(
    ("body", "status", "kind", "field"),
    [
        (envelope(offset=3).encode(), 409, "OffsetRegressionError", ("expected", 0)),
        (envelope(crc32c=1).encode(), 422, "ChecksumMismatch", ("what", "chunk")),
        (envelope(done=True).encode(), 422, "SizeMismatch", ("expected", 6)),
        (envelope(data=bytes(65), total_bytes=65).encode(), 413, "ObjectTooLarge", ("limit", 64)),
        (b"GARBAGE" * 20, 422, "IntegrityError", ("message", "the stream is not at a frame of a snapshot")),
        (envelope().encode()[:-1], 422, "IntegrityError", ("message", "the body ended inside a frame")),
        (envelope(id=ORDERS._replace(source="-")).encode(), 409, "RefusedError", ("what", "source")),
    ],
)
def test_refusals_are_documents(
    receiver: MirrorReceiver, body: bytes, status: int, kind: str, field: tuple[str, object]
):
    """Each refusal has its status and says the type of the error and its fields."""
    with serving(receiver, max_frame_bytes=64) as server:
        got, document = request(server.url, "POST", "/v1/frames", body)
    assert (got, document["error"]["type"], document["error"][field[0]]) == (status, kind, field[1])


def test_a_refusal_early_in_a_long_body_arrives(server: MirrorServer, client: MirrorClient, tmp_path: Path):
    """The rest of the body is passed over, not held, and the connection serves on."""
    (tmp_path / "long").write_bytes(noise(3 << 20))
    snapshot = Snapshot.of_file(tmp_path / "long", source="east", database="orders")
    body = b"".join(one.encode() for one in snapshot.envelopes(chunk_bytes=64 * KIB))
    assert request(server.url, "POST", "/v1/frames", b"garbage" + body)[0] == 422
    assert client.status(snapshot.id)["status"] == "absent"
    client.push(snapshot, chunk_bytes=64 * KIB)
    assert client.status(snapshot.id)["complete"]


@pytest.mark.parametrize("query", ["", "source=a", urlencode(ORDERS._replace(digest="x")._asdict()), "position=x"])
def test_a_query_that_names_no_snapshot_is_refused(server: MirrorServer, query: str):
    """All four parts of an id are needed, and well-formed."""
    status, document = request(server.url, "GET", f"/v1/snapshot?{query}")
    assert status in (400, 409)
    assert document["error"]["type"] in ("UsageError", "RefusedError")


@pytest.mark.seed("2.12")
def test_abort_over_http(client: MirrorClient, server: MirrorServer, receiver: MirrorReceiver):
    """What is there of a snapshot goes; twice is as good as once."""
    assert request(server.url, "POST", "/v1/frames", envelope().encode())[0] == 200
    assert client.status(ORDERS)["bytes_done"] == 3
    client.abort(ORDERS)
    client.abort(ORDERS)
    assert (client.status(ORDERS)["status"], receiver.snapshots()) == ("absent", {})


def test_an_error_of_the_receiver_arrives_as_itself(client: MirrorClient, snapshot: Snapshot):
    """The client raises what the receiver raised, with its fields."""
    lying = dataclasses.replace(snapshot, total_crc32c=snapshot.total_crc32c ^ 1)
    with pytest.raises(ChecksumMismatch) as refusal:
        client.push(lying)
    assert (refusal.value.what, refusal.value.actual) == ("snapshot", snapshot.total_crc32c)


def test_more_pushes_than_are_allowed_wait(receiver: MirrorReceiver, snapshot: Snapshot):
    """A receiver that is busy tells the client to wait, and the client does."""
    waits: list[float] = []

    with serving(receiver, max_pushes=1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        held = socket.create_connection((host, int(port)))
        head = f"POST /v1/frames HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9999\r\n\r\n"
        held.sendall(head.encode() + envelope(id=USERS).encode())
        while receiver.status(USERS) is None:  # until the held request is at work
            time.sleep(0.01)

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            held.close()

        with MirrorClient(server.url, token=TOKEN, sleep=sleep) as client:
            assert client.push(snapshot).status == "pushed"
    assert waits
    assert waits[0] >= 1.0


def test_a_silent_sender_is_dropped(receiver: MirrorReceiver):
    """A body of which no byte comes does not hold its place for ever; what came before stays."""
    with serving(receiver, idle_timeout_s=0.05) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as held:
            head = (
                f"POST /v1/frames HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9999\r\n\r\n"
            )
            held.sendall(head.encode() + envelope().encode())
            assert held.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert receiver.status(ORDERS) == Bootstrapping(3, 6)


def test_a_receiver_that_is_gone_is_named(snapshot: Snapshot):
    """When the patience is used up, the error says who does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    now = itertools.count(0.0, 10.0)
    waits: list[float] = []
    client = MirrorClient(
        f"http://127.0.0.1:{port}", token=TOKEN, patience_s=60, sleep=waits.append, clock=lambda: next(now)
    )
    with client, pytest.raises(StoreUnavailable, match=rf"no connection to 127\.0\.0\.1:{port}: Connection refused"):
        client.push(snapshot)
    assert len(waits) == 6


def test_a_damaged_chunk_is_sent_again(
    client: MirrorClient, receiver: MirrorReceiver, snapshot: Snapshot, source: Path
):
    """One bad chunk on the way costs one request, not the snapshot."""
    real = SnapshotEnvelope.head
    damaged: list[int] = []

    def head(one: SnapshotEnvelope) -> bytes:
        made = real(one)
        if one.offset == 8192 and not damaged:
            damaged.append(one.offset)
            assert isinstance(one.data, memoryview)
            one.data[0] ^= 0xFF
        return made

    with pytest.MonkeyPatch.context() as patch, MirrorClient(client.url, token=TOKEN, sleep=lambda _: None) as patient:
        patch.setattr(SnapshotEnvelope, "head", head)
        pushed = patient.push(snapshot, chunk_bytes=4096)
    size = source.stat().st_size
    assert damaged == [8192]
    assert pushed.bytes_sent == size + (size - 8192)
    committed = receiver.committed(snapshot.id)
    assert committed is not None
    assert committed.path.read_bytes() == source.read_bytes()


def test_a_push_over_tls_trusts_whom_it_is_told_to(receiver: MirrorReceiver, snapshot: Snapshot, certificate: Path):
    """With a certificate the receiver speaks https; a stranger's is refused at once."""
    with serving(receiver, certificate=str(certificate), private_key=str(certificate)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with (
            MirrorClient(server.url, token=TOKEN) as careful,
            pytest.raises(StoreConfigurationError, match="certificate that is not trusted"),
        ):
            careful.push(snapshot)
        with MirrorClient(server.url, token=TOKEN, tls=ssl.create_default_context(cafile=certificate)) as client:
            assert client.push(snapshot).status == "pushed"


@pytest.mark.parametrize("url", ["ftp://host", "host:80", "http://", "http://user:secret@host", "http://host?x=1"])
def test_what_is_no_url_of_a_receiver_is_refused(url: str):
    """A token goes into no URL."""
    with pytest.raises(UsageError) as refusal:
        MirrorClient(url, token=TOKEN)
    assert "secret" not in str(refusal.value)


def test_following_is_told_to_nobody_who_asks_too_early(
    receiver: MirrorReceiver, client: MirrorClient, snapshot: Snapshot
):
    """A complete snapshot is still bootstrapping, until somebody imported it."""
    client.push(snapshot)
    document = client.status(snapshot.id)
    assert (document["status"], document["complete"]) == ("bootstrapping", True)
    receiver.follow(snapshot.id, None)
    assert receiver.status(snapshot.id) == Following(None)


@pytest.mark.parametrize(
    "fault",
    [
        Rule(Truncate(), side="answer", success=True, nth=3, every=True),
        Rule(Reset(keep=20_000), side="request", nth=2, every=True),
        Rule(Truncate(keep=0), side="request", nth=3, every=True),
        Rule(Corrupt(at=5000), side="request", nth=2, every=True),
    ],
    ids=["lost answers", "reset in the middle", "cut at the body", "damaged bytes"],
)
def test_a_push_gets_through_a_bad_network(
    server: MirrorServer, receiver: MirrorReceiver, snapshot: Snapshot, source: Path, fault: Rule
):
    """Lost answers, broken connections, damaged bytes: the push asks where the receiver stands, and goes on there."""
    with FaultProxy(server.url, scripted_faults(fault)) as proxy:
        with MirrorClient(proxy.url, token=TOKEN, sleep=lambda _: None) as client:
            pushed = client.push(snapshot, chunk_bytes=4096, request_bytes=12_288)
        struck = [hit for _, hit in proxy.messages if hit is not None]
    assert struck
    assert (pushed.status, pushed.bytes_resumed) == ("pushed", 0)
    committed = receiver.committed(snapshot.id)
    assert committed is not None
    assert committed.path.read_bytes() == source.read_bytes()
