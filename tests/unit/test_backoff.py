"""One rule for when a failed attempt is repeated, held by everybody who repeats any."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from typing_extensions import override

from blobflow.backoff import Backoff, jittered_wait_s
from blobflow.errors import SlowDown, StoreUnavailable, TimedOut
from blobflow.mirror.client import MirrorClient
from blobflow.mirror.sending import Snapshot
from blobflow.stores import coroutines
from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.store import S3Options, S3Store
from blobflow.streams.http_source import HttpSource
from tests.loopback import LoopbackServer
from tests.servers import Peer


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class BusyServer(LoopbackServer):
    """Refuses every request, as a store, a file server and a receiver do it."""

    def __init__(self) -> None:
        self.retry_after_s: int | None = None
        self.requests = 0
        super().__init__()

    @override
    def serve(self, connection: socket.socket) -> None:
        peer = Peer(connection)
        try:
            while peer.request()[0]:
                self.requests += 1
                told = {} if self.retry_after_s is None else {"retry_after_s": self.retry_after_s}
                body = json.dumps({"error": {"type": "SlowDown", "message": "busy", **told}}).encode()
                headers = {} if self.retry_after_s is None else {"retry_after": str(self.retry_after_s)}
                peer.answer(503, body, **headers)
        finally:
            peer.close()


@pytest.fixture
def server() -> Generator[BusyServer]:
    with BusyServer() as busy:
        yield busy


@pytest.fixture
def clock() -> Clock:
    return Clock()


User = Callable[[str, Clock, Path], None]
"""Asks the server at a URL for something, with 120 s of patience."""


def s3_store(url: str) -> S3Store:
    keys = {"access_key_id": "key", "secret_access_key": "secret"}
    return S3Store(S3Options.model_validate({"bucket": "bucket", "endpoint_url": url} | keys))


def store(url: str, clock: Clock, tmp_path: Path) -> None:
    inner = s3_store(url)
    try:
        RetryingStore(inner, patience_s=120.0, sleep=clock.sleep, clock=clock).get("key", max_bytes=10)
    finally:
        inner.close()


def store_coroutine(url: str, clock: Clock, tmp_path: Path) -> None:
    inner = s3_store(url)

    async def sleep(seconds: float) -> None:
        clock.sleep(seconds)

    async def get() -> None:
        retrying = RetryingStore(inner, patience_s=120.0, clock=clock).coroutines()
        assert retrying is not None
        try:
            await retrying.get("key", max_bytes=10)
        finally:
            await retrying.close()

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coroutines.asyncio, "sleep", sleep)
            asyncio.run(get())
    finally:
        inner.close()


def http_source(url: str, clock: Clock, tmp_path: Path) -> None:
    HttpSource(f"{url}/file", patience_s=120.0, sleep=clock.sleep, clock=clock).pin()


def mirror_client(url: str, clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "snapshot").write_bytes(b"bytes")
    snapshot = Snapshot.of_file(tmp_path / "snapshot", source="here", database="orders", position=1)
    with MirrorClient(url, token="t" * 16, patience_s=120.0, sleep=clock.sleep, clock=clock) as client:
        client.push(snapshot)


@pytest.fixture(params=[store, store_coroutine, http_source, mirror_client], ids=lambda user: user.__name__)
def user(request: pytest.FixtureRequest) -> User:
    return request.param


@pytest.mark.parametrize(
    ("retry_after_s", "waits"),
    [
        (300, []),  # more than all of the patience: one request, and no wait
        (121, []),
        (120, [120.0]),
        (50, [50.0, 50.0]),  # the 20 s that are left are not enough, and are not waited for either
        (30, [30.0] * 4),
    ],
)
def test_the_server_is_given_the_time_it_asks_for_or_up(
    user: User, server: BusyServer, clock: Clock, tmp_path: Path, retry_after_s: int, waits: list[float]
):
    """Nobody calls before Retry-After is over; where that is later than the patience ends, it fails at once."""
    server.retry_after_s = retry_after_s
    with pytest.raises(SlowDown) as refusal:
        user(server.url, clock, tmp_path)
    assert refusal.value.retry_after_s == retry_after_s
    assert clock.waits == waits
    assert server.requests == len(waits) + 1


def test_the_last_attempt_is_made_when_the_patience_ends(user: User, server: BusyServer, clock: Clock, tmp_path: Path):
    """Without Retry-After the waits are below a bound that doubles up to 20 s, and use all of the patience."""
    with pytest.raises(SlowDown):
        user(server.url, clock, tmp_path)
    assert sum(clock.waits) == pytest.approx(120.0)
    assert all(0 <= wait <= min(20.0, 0.25 * 2**n) for n, wait in enumerate(clock.waits))
    assert server.requests == len(clock.waits) + 1


class TestBackoff:
    def test_patience_begins_with_the_first_failure(self, clock: Clock):
        """An attempt that was silent for longer than the patience is still repeated."""
        backoff = Backoff(120.0, clock)
        clock.now += 300.0
        clock.now += backoff.wait_s(TimedOut("no byte for 300 s", operation="get"))
        clock.now += 120.0
        late = StoreUnavailable("down", operation="get")
        with pytest.raises(StoreUnavailable) as last:
            backoff.wait_s(late)
        assert last.value is late
        assert repr(backoff) == "<Backoff after 2 failures>"

    def test_no_patience_is_one_attempt(self, clock: Clock):
        """Whatever the server asks for."""
        for error in (StoreUnavailable("down", operation="get"), SlowDown("busy", retry_after_s=0.0, operation="get")):
            with pytest.raises(StoreUnavailable):
                Backoff(0.0, clock).wait_s(error)

    def test_a_random_wait_is_prolonged_to_what_the_server_asks_for(self, clock: Clock):
        """Late waits are random up to 20 s; the server's 10 s are their lower bound then."""
        backoff = Backoff(1e6, clock)
        waits = [backoff.wait_s(SlowDown("busy", retry_after_s=10.0, operation="get")) for _ in range(200)]
        assert min(waits) == 10.0
        assert 15.0 < max(waits) <= 20.0

    def test_waits_are_spread_over_all_of_their_range(self):
        """Full jitter: else many clients that failed together come back together."""
        waits = [jittered_wait_s(4, first_s=0.25, longest_s=20.0) for _ in range(300)]
        assert min(waits) < 0.2
        assert 1.8 < max(waits) <= 2.0

    def test_any_number_of_failures_has_a_wait(self):
        """Days of patience are thousands of failures, and 2**5000 is not a float."""
        assert 0 <= jittered_wait_s(5000, first_s=0.25, longest_s=20.0) <= 20.0
