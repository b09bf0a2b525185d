"""Batches over S3 by coroutines: signed, checked, retried and translated as every other request is."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from blobflow.batch import BatchExecutor, BatchResult, Delete, Get, Got, Insert
from blobflow.batch.runners import LoopRunner
from blobflow.errors import (
    BlobflowError,
    DeadlineExceeded,
    InvalidKey,
    ObjectTooLarge,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    UsageError,
)
from blobflow.limits import AdaptiveLimit, Bandwidth
from blobflow.stores.base import Body
from blobflow.stores.limited import LimitedStore
from blobflow.stores.optional import Coroutines, coroutines_of
from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.store import S3Options, S3Store
from tests.fault_proxy import Corrupt, FaultProxy, Reset, Stall, Truncate, random_faults, scripted_faults
from tests.fault_rules import Rule
from tests.faults.clients import PREFIX, Stores
from tests.servers import Peer, S3Endpoint, scripted_server
from tests.strict_s3 import FailAfter, FailBefore, Hook, Refuse, StrictS3, Throttle

ODD_KEYS = ("plain", "with space", "plus+percent%41", "a&b=c;d?e#f", "grüße/日本語/🙂", "~tilde!$()*,:@[]^`{|}")


def run(store: Any, operations: Iterable[Any], **options: Any) -> list[BatchResult]:
    """The results, by index; on the way that is tested here, which is seen to."""
    executor = BatchExecutor(store, **{"window": 8, **options})
    with executor.stream(operations) as results:
        assert isinstance(results._runner, LoopRunner)
        found = sorted(results, key=lambda result: result.index)
    assert executor.permits.free == 500
    assert not [thread for thread in threading.enumerate() if thread.name == "blobflow-batch-loop"]
    return found


def content(result: BatchResult) -> bytes | None:
    response = result.unwrap()
    assert isinstance(response, Got)
    return None if response.payload is None else response.payload.read()


def test_every_key_and_size_arrives_signed_and_checked(strict_s3: StrictS3, stores: Stores) -> None:
    """Odd keys, an empty object and one of 1 MiB: signatures and CRC32C are accepted by a server that verifies both."""
    store = stores(strict_s3, session_token=None)
    payloads = {key: key.encode() for key in ODD_KEYS} | {"empty": b"", "large": os.urandom(1024**2)}
    inserted = run(store, (Insert(key, payload) for key, payload in payloads.items()))
    assert [result.error for result in inserted] == [None] * len(payloads)
    assert strict_s3.objects(stores.bucket(strict_s3)) == {f"{PREFIX}/{k}": p for k, p in payloads.items()}
    got = run(store, map(Get, [*payloads, "absent"]))
    assert [content(result) for result in got] == [*payloads.values(), None]
    for one, other in zip(inserted, got, strict=False):
        there = other.unwrap().payload.meta  # type: ignore[union-attr]
        assert there.e_tag == one.unwrap().meta.e_tag  # type: ignore[union-attr]
        assert there.crc32c is not None
    assert [result.error for result in run(store, map(Delete, [*payloads, "absent"]))] == [None] * (len(payloads) + 1)
    assert strict_s3.objects(stores.bucket(strict_s3)) == {}


def test_large_objects_are_streamed(strict_s3: StrictS3, stores: Stores) -> None:
    """A get of more than 1 MiB is not read into memory by the event loop; its payload reads ranges."""
    store = stores(strict_s3)
    large = os.urandom(1024**2 + 1)
    store.put("large", large)
    executor = BatchExecutor(store)
    (result,) = executor.stream([Get("large")])
    payload: Any = result.unwrap().payload  # type: ignore[union-attr]
    assert executor.permits.free == 450
    assert [len(piece) for piece in payload] == [1024**2, 1]
    assert (payload.meta.size, executor.permits.free) == (len(large), 500)


@pytest.mark.parametrize("operation", ["PutObject", "GetObject", "DeleteObject"])
@pytest.mark.parametrize(
    "action", [Refuse("SlowDown"), Refuse("InternalError"), Refuse("RequestTimeout"), FailBefore(), FailAfter()]
)
def test_what_passes_is_repeated(strict_s3: StrictS3, stores: Stores, operation: str, action: Any) -> None:
    """Refusals that pass and lost answers cost a retry, whichever of the operations they hit."""
    store = stores(strict_s3)
    store.put("k", b"payload")
    given = {"PutObject": Insert("k", b"payload"), "GetObject": Get("k"), "DeleteObject": Delete("k")}[operation]
    strict_s3.script(Rule(action, operation))
    (result,) = run(store, [given])
    assert result.error is None
    assert store.retries + (isinstance(action, FailBefore | FailAfter)) >= 1
    there = strict_s3.objects(stores.bucket(strict_s3))
    assert there == ({} if operation == "DeleteObject" else {f"{PREFIX}/k": b"payload"})


@pytest.mark.seed("W4.1", "W4.4")
def test_a_server_that_throttles_gets_fewer_at_a_time(strict_s3: StrictS3, stores: Stores) -> None:
    """SlowDown narrows the window of the stream although the store's own retries hide it, and everything succeeds."""
    store = stores(strict_s3)
    strict_s3.script(Rule(Throttle(200, burst=20), times=None))
    executor = BatchExecutor(store, window=16)
    narrowest = 16
    with executor.stream(Insert(f"k{number}", b"x") for number in range(60)) as results:
        for result in results:
            assert result.error is None
            narrowest = min(narrowest, results._state.limit.window)
    assert store.slow_downs > 0
    assert narrowest <= 8
    assert len(strict_s3.objects(stores.bucket(strict_s3))) == 60


def test_what_does_not_pass_is_told(strict_s3: StrictS3, stores: Stores) -> None:
    """Refusals that waiting does not heal are errors of their item, in our words."""
    store = stores(strict_s3)
    strict_s3.script(
        Rule(Refuse("AccessDenied"), "PutObject", key=f"{PREFIX}/denied"),
        Rule(Refuse("KeyTooLongError"), "GetObject", key=f"{PREFIX}/long"),
    )
    denied, fine, long = run(store, [Insert("denied", b"x"), Insert("fine", b"x"), Get("long")])
    assert isinstance(denied.error, StoreConfigurationError)
    assert (denied.error.operation, denied.error.key, denied.error.status) == ("put", "denied", 403)
    assert fine.error is None
    assert isinstance(long.error, InvalidKey)
    assert store.retries == 0


def test_damage_on_the_way_is_sent_again(strict_s3: StrictS3, proxy: FaultProxy, stores: Stores) -> None:
    """A payload that was damaged on the way up is refused by its checksum and sent again."""
    store = stores(strict_s3, proxy)
    proxy.faults = scripted_faults(Rule(Corrupt(10), "PutObject", side="request"))
    (result,) = run(store, [Insert("k", bytes(1000))])
    assert result.error is None
    assert store.retries == 1
    assert strict_s3.objects(stores.bucket(strict_s3)) == {f"{PREFIX}/k": bytes(1000)}


def test_content_md5_goes_along_where_it_is_asked_for(strict_s3: StrictS3, stores: Stores) -> None:
    """The option of the store holds for batches too."""
    assert run(stores(strict_s3, content_md5=True), [Insert("k", b"payload")])[0].error is None
    (put,) = [each for each in strict_s3.log if each.operation == "PutObject"]
    assert {"content-md5", "x-amz-checksum-crc32c"} <= put.headers.keys()


@pytest.mark.parametrize("seed", range(3))
def test_cuts_and_resets_anywhere_are_survived(
    strict_s3: StrictS3, proxy: FaultProxy, stores: Stores, seed: int
) -> None:
    """Over a network that breaks at random places, requests and answers alike, every operation comes through."""
    store = stores(strict_s3, proxy)
    proxy.faults = random_faults(
        seed, 0.1, [Truncate(), Reset(), Truncate(keep=0), Reset(keep=1), Truncate(keep=150), Reset(keep=700)]
    )
    payloads = {f"k{number}": os.urandom(1000) for number in range(40)}
    assert not [r for r in run(store, (Insert(k, p) for k, p in payloads.items())) if r.error]
    assert [content(result) for result in run(store, map(Get, payloads))] == list(payloads.values())
    assert not [r for r in run(store, map(Delete, payloads)) if r.error]
    assert len(proxy.struck()) > 5
    assert strict_s3.objects(stores.bucket(strict_s3)) == {}


@pytest.mark.parametrize(("side", "operation"), [("request", "PutObject"), ("answer", "GetObject")])
def test_silence_is_noticed(strict_s3: StrictS3, proxy: FaultProxy, stores: Stores, side: Any, operation: str) -> None:
    """Where nothing moves for the idle timeout, the attempt is given up and made again."""
    store = stores(strict_s3, proxy, idle_timeout=0.4)
    store.put("k", b"payload")
    proxy.faults = scripted_faults(Rule(Stall(keep=0), operation, side=side))
    (result,) = run(store, [Insert("k", bytes(3000)) if operation == "PutObject" else Get("k")])
    assert result.error is None
    assert store.retries == 1


def test_a_silent_server_is_a_timeout(strict_s3: StrictS3, proxy: FaultProxy, stores: Stores) -> None:
    """Without patience left, silence is told as such, with its length."""
    inner = stores(strict_s3, proxy, idle_timeout=0.3).store
    proxy.faults = scripted_faults(Rule(Stall(keep=0), "GetObject", side="answer", every=True))
    (result,) = run(RetryingStore(inner, patience_s=0.0), [Get("k")])
    assert isinstance(result.error, TimedOut)
    assert (result.error.timeout_s, result.error.key) == (0.3, "k")


@pytest.mark.seed("W4.4")
def test_a_hung_request_ends_at_its_deadline(strict_s3: StrictS3, stores: Stores) -> None:
    """A request that the server never answers is cancelled at the deadline; in a window of one the next one runs."""
    gate = threading.Event()
    strict_s3.script(Rule(Hook(lambda _: gate.wait(20)), "PutObject", key=f"{PREFIX}/hung"))
    try:
        late, *others = run(
            stores(strict_s3),
            [Insert("hung", b"x"), *(Insert(f"k{n}", b"x") for n in range(5))],
            window=1,
            deadline_s=0.3,
        )
    finally:
        gate.set()
    assert isinstance(late.error, DeadlineExceeded)
    assert [result.error for result in others] == [None] * 5


def test_credentials_that_expire_are_refreshed(strict_s3: StrictS3, stores: Stores, monkeypatch: Any) -> None:
    """After ExpiredToken the next attempt asks for credentials anew, and its connections are new ones."""
    store = stores(strict_s3)
    inner: Any = store.store
    made: list[Any] = []
    closed = S3Store.failed

    def failed(self: S3Store, error: Exception, call: Any, access: Any = None) -> BlobflowError:
        made.append(self._access)
        self.options = self.options.model_copy(update={"access_key_id": self.options.access_key_id})
        return closed(self, error, call, access)

    monkeypatch.setattr(S3Store, "failed", failed)
    monkeypatch.setattr(S3Options, "explicit", property(lambda _: False))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", strict_s3.endpoint.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", strict_s3.endpoint.secret_access_key)
    strict_s3.script(Rule(Refuse("ExpiredToken"), "PutObject", nth=3))
    assert not [r for r in run(store, [Insert(f"k{n}", b"x") for n in range(6)]) if r.error]
    assert made
    assert inner.connected() is not made[0]


# What a server may say


@contextmanager
def looped(url: str, **options: Any) -> Iterator[Callable[..., Any]]:
    """Calls a method of the coroutines of a store, one attempt each."""
    given = {"bucket": "bucket", "endpoint_url": url, "access_key_id": "key", "secret_access_key": "secret"}
    store = S3Store(S3Options.model_validate(given | options))
    loop = asyncio.new_event_loop()
    coroutines = store.coroutines()
    assert coroutines is not None

    def call(method: str, *arguments: Any, **named: Any) -> Any:
        return loop.run_until_complete(getattr(coroutines, method)(*arguments, **named))

    try:
        yield call
        loop.run_until_complete(coroutines.close())
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()
        store.close()


def says(*answers: bytes) -> Callable[[Peer], None]:
    """One raw answer to each request of a connection."""

    def script(peer: Peer) -> None:
        for answer in answers:
            peer.request()
            peer.send(answer)

    return script


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nETag: x\r\n\r\n3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\n\r\n"
TRAILED = CHUNKED[:-2] + b"Some: trailer\r\n\r\n"


@pytest.mark.parametrize("answer", [CHUNKED, TRAILED])
def test_chunked_answers_are_read(answer: bytes) -> None:
    """A body in chunks, with and without a trailer, byte by byte, leaves the connection usable."""

    def byte_by_byte(peer: Peer) -> None:
        for _ in range(2):
            peer.request()
            for byte in answer:
                peer.send(bytes([byte]))

    with scripted_server(byte_by_byte) as url, looped(url) as call:
        assert call("get", "k", max_bytes=5).data == b"abcde"
        assert call("get", "k", max_bytes=5).data == b"abcde"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123456789", ObjectTooLarge),
        (CHUNKED.replace(b"3\r\nabc", b"9\r\nabcdefghi"), ObjectTooLarge),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nshort", StoreUnavailable),
        (CHUNKED[:-9], StoreUnavailable),
        (CHUNKED.replace(b"3\r\n", b"-3\r\n"), StoreUnavailable),
        (b"no http at all\r\n\r\n", StoreUnavailable),
        (b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n", StoreUnavailable),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 101 + b"\r\n", StoreUnavailable),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, StoreUnavailable),
        (b"", StoreUnavailable),
        (b"HTTP/1.1 503 -\r\nContent-Length: 0\r\nRetry-After: 7\r\n\r\n", SlowDown),
    ],
)
def test_answers_that_are_none(answer: bytes, kind: type[BlobflowError]) -> None:
    """What is too large, cut short or no HTTP is a typed error and costs the connection; a mere "no" does not."""
    fine = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    scripts = [says(answer, fine)] if kind is SlowDown else [says(answer), says(fine)]
    with scripted_server(*scripts) as url, looped(url) as call:
        with pytest.raises(kind) as told:
            call("get", "k", max_bytes=8)
        assert call("get", "k", max_bytes=8).data == b"ok"
    if kind is SlowDown:
        assert isinstance(told.value, SlowDown)
        assert told.value.retry_after_s == 7.0


def test_a_body_may_end_with_the_connection() -> None:
    """HTTP/1.0's way: no length, and the end of the connection is the end of the body; "go on" is no answer."""
    old = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\nETag: x\r\n\r\nall of it"
    with scripted_server(says(old), says(old)) as url, looped(url) as call:
        assert call("get", "k", max_bytes=50).data == b"all of it"
        with pytest.raises(ObjectTooLarge):
            call("get", "k", max_bytes=3)


def test_a_connection_that_died_idle_is_replaced_silently() -> None:
    """A server may close between two requests, or speak out of turn; no attempt fails for it."""
    fine = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with scripted_server(says(fine), says(fine + b"more"), says(fine)) as url, looped(url) as call:
        for _ in range(3):
            assert call("get", "k", max_bytes=8).data == b"ok"


def test_checksums_that_are_refused_are_left_out() -> None:
    """A server that does not know the checksum header is asked again without, once for all."""
    seen: list[dict[str, str]] = []

    def old_server(peer: Peer) -> None:
        for refused in (True, False, False):
            seen.append(peer.request()[1])
            if refused:
                peer.refuse(400, "InvalidArgument", "x-amz-checksum-crc32c is unknown")
            else:
                peer.answer(200, etag='"1"')

    with scripted_server(old_server) as url, looped(url) as call:
        for _ in range(2):
            assert call("put", "k", Body.of(b"x")).e_tag == '"1"'
    assert ["x-amz-checksum-crc32c" in headers for headers in seen] == [True, False, False]


def test_a_put_without_an_etag_is_no_success() -> None:
    """An answer that does not say what was stored is a passing error."""
    bare = says(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with scripted_server(bare) as url, looped(url) as call, pytest.raises(StoreUnavailable, match="no ETag"):
        call("put", "k", Body.of(b"x"))


def test_nobody_there_is_told_as_such() -> None:
    """A refused connection is a passing error."""
    with looped("http://127.0.0.1:9") as call, pytest.raises(StoreUnavailable):
        call("delete", "k")


@pytest.mark.seed("4.10")
@pytest.mark.parametrize("server", ["moto", pytest.param("rgw", marks=pytest.mark.rgw)])
def test_metadata_is_kept_by_s3(request: pytest.FixtureRequest, stores: Stores, server: str) -> None:
    """What an insert says of its object comes back with it, by a get of a batch and by the store's own head."""
    endpoint: S3Endpoint = request.getfixturevalue(f"{server}_s3")
    store = stores(endpoint)
    metadata = {"colour": "dark red", "number-of-legs": "4"}
    inserted, wrong, bare = run(
        store, [Insert("k", b"x", metadata), Insert("w", b"x", {"Größe": "5"}), Insert("bare", b"x")]
    )
    assert inserted.unwrap().meta.metadata == metadata  # type: ignore[union-attr]
    assert isinstance(wrong.error, UsageError)
    got, got_bare = run(store, [Get("k"), Get("bare")])
    assert got.unwrap().payload.meta.metadata == metadata  # type: ignore[union-attr]
    assert store.head("k").metadata == metadata
    assert bare.error is None
    assert got_bare.unwrap().payload.meta.metadata is None  # type: ignore[union-attr]


def test_a_proxy_means_threads(strict_s3: StrictS3, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy a batch takes the way of every other request."""
    inner = stores(strict_s3).store
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert coroutines_of(inner) is None


# Limits


class Held(Coroutines):
    """Requests that end when they are told to."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.gate = asyncio.Event()

    async def _hold(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await self.gate.wait()
        self.inside -= 1

    async def put(self, key: str, body: Body) -> Any:
        await self._hold()

    async def get(self, key: str, *, max_bytes: int) -> Any:
        await self._hold()
        raise SlowDown("slow down", operation="get")

    async def delete(self, key: str) -> None:
        await self._hold()

    async def close(self) -> None:
        pass


def test_requests_in_flight_are_limited_for_coroutines_too(
    strict_s3: StrictS3, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for a place without a thread, get one in turn, and one that is cancelled takes none along."""

    async def main() -> None:
        held = Held()
        inner = stores(strict_s3).store
        monkeypatch.setattr(inner, "coroutines", lambda: held)
        limit = AdaptiveLimit(2)
        limited = LimitedStore(inner, requests=limit, bandwidth=Bandwidth(1e9)).coroutines()
        assert limited is not None
        tasks = [asyncio.ensure_future(limited.put(f"k{n}", Body.of(b"x"))) for n in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert held.inside == 2
        tasks[2].cancel()
        held.gate.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert Counter(type(end).__name__ for end in ended) == {"NoneType": 5, "CancelledError": 1}
        assert held.most == 2
        with pytest.raises(SlowDown):
            await limited.get("k", max_bytes=1)
        assert limit.window == 1
        await limited.delete("k")
        await limited.close()

    asyncio.run(main())
