"""Retries: what is repeated, how long, and how a lost answer is settled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blobflow.errors import (
    BlobflowError,
    NoSuchUpload,
    ObjectChanged,
    PreconditionFailed,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    TransferBusy,
)
from blobflow.stores import Body, ObjectMeta, PutMode
from blobflow.stores.local.store import LocalStore
from blobflow.stores.retry import RetryingStore
from blobflow.testing import (
    FailAfter,
    FailBefore,
    Fault,
    FaultyStore,
    Hook,
    Request,
    Truncate,
    random_faults,
    scripted_faults,
)
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyStore:
    return FaultyStore(LocalStore(tmp_path))


@pytest.fixture
def store(faulty: FaultyStore, clock: Clock) -> RetryingStore:
    return RetryingStore(faulty, patience_s=120.0, sleep=clock.sleep, clock=clock)


def always(error: BlobflowError) -> Callable[[Request], Fault]:
    return lambda request: FailBefore(error)


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable("reset", operation="get"),
        SlowDown("slow down", operation="get"),
        TimedOut("silence", operation="get"),
    ],
)
def test_passing_failures_are_repeated(faulty: FaultyStore, store: RetryingStore, error: BlobflowError) -> None:
    """A call succeeds after failures that pass by themselves, and they are counted."""
    faulty.store.put("key", b"data")
    faulty.faults = scripted_faults({("get_range", n): FailBefore(error) for n in (1, 2, 3)})
    assert store.get_range("key", 1, 2) == b"at"
    assert (faulty.count("get_range"), store.retries) == (4, 3)


@pytest.mark.parametrize(
    "error",
    [
        ObjectChanged("changed", key="k"),
        TransferBusy("busy"),
        StoreConfigurationError("denied"),
        PreconditionFailed("no", key="k"),
    ],
)
def test_other_errors_pass_through_at_once(faulty: FaultyStore, store: RetryingStore, error: BlobflowError) -> None:
    """What waiting does not heal is not repeated, retryable by a new run or not."""
    faulty.faults = always(error)
    with pytest.raises(type(error)) as refusal:
        store.head("key")
    assert refusal.value is error
    assert (faulty.count("head"), store.retries) == (1, 0)


def test_errors_of_the_caller_pass_through(faulty: FaultyStore, store: RetryingStore) -> None:
    """What a body raises is not repeated, not even if it is an interrupt."""

    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put("key", Body(2, chunks))
    assert faulty.count("put") == 1


def test_patience_ends(faulty: FaultyStore, store: RetryingStore, clock: Clock) -> None:
    """After 120 s without success the last error comes out; the last attempt is made when they are over."""
    faulty.faults = always(StoreUnavailable("down", operation="head", key="key"))
    with pytest.raises(StoreUnavailable, match="down") as refusal:
        store.head("key")
    assert (refusal.value.operation, refusal.value.key) == ("head", "key")
    assert sum(clock.slept) == pytest.approx(120.0)
    assert faulty.count("head") == len(clock.slept) + 1
    assert len(clock.slept) < 60


def test_waits_grow_with_full_jitter(faulty: FaultyStore, store: RetryingStore, clock: Clock) -> None:
    """The waits stay below a bound that doubles up to 20 s, and are spread over all of it."""
    faulty.faults = always(StoreUnavailable("down", operation="get"))
    first_waits: list[float] = []
    for _ in range(60):
        clock.slept.clear()
        with pytest.raises(StoreUnavailable):
            store.head("key")
        for attempt, wait in enumerate(clock.slept):
            assert 0 <= wait <= min(20.0, 0.25 * 2**attempt)
        first_waits.append(clock.slept[0])
    assert min(first_waits) < 0.05
    assert max(first_waits) > 0.20


def test_a_long_silence_is_repeated_too(faulty: FaultyStore, store: RetryingStore, clock: Clock) -> None:
    """An attempt that took longer than the patience to fail is still repeated: patience begins with the failure."""

    def stall(request: Request) -> None:
        if request.number == 1:
            clock.now += 300.0
            raise TimedOut("no byte for 300 s", operation="get")

    faulty.store.put("key", b"data")
    faulty.faults = lambda request: Hook(stall)
    assert store.get("key", max_bytes=10).data == b"data"


def test_the_store_may_ask_for_a_longer_wait(faulty: FaultyStore, store: RetryingStore, clock: Clock) -> None:
    """`Retry-After` is honoured, and is no reason to wait where it exceeds the patience."""
    faulty.store.put("key", b"data")
    faulty.faults = scripted_faults({("head", 1): FailBefore(SlowDown("later", retry_after_s=45.0, operation="get"))})
    store.head("key")
    assert clock.slept == [45.0]
    clock.slept.clear()
    faulty.faults = always(SlowDown("much later", retry_after_s=500.0, operation="get"))
    with pytest.raises(SlowDown, match="much later"):
        store.head("key")
    assert clock.slept == []


def test_patience_is_each_calls_own(faulty: FaultyStore, store: RetryingStore, clock: Clock) -> None:
    """A success gives the next call its whole patience."""
    faulty.store.put("key", b"data")
    for first in (1, 3, 5):
        clock.now += 100
        faulty.faults = scripted_faults(
            {("head", first): FailBefore(SlowDown("later", retry_after_s=100.0, operation="get"))}
        )
        store.head("key")
    assert clock.slept == [100.0, 100.0, 100.0]


def test_retries_are_logged(
    faulty: FaultyStore, store: RetryingStore, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """Every retry leaves one line with operation, key, attempt and wait."""
    faulty.store.put("key", b"secret data")
    faulty.faults = scripted_faults({("get", 1): FailBefore(), ("get", 2): FailBefore()})
    with caplog.at_level(logging.INFO, logger="blobflow"):
        store.get("key", max_bytes=100)
    assert [record.getMessage() for record in caplog.records] == [
        f"store.retry operation=get key=key attempt={attempt} wait_s={wait:.2f} error=StoreUnavailable"
        for attempt, wait in enumerate(clock.slept, 1)
    ]
    assert len(clock.slept) == 2


# Bodies and listings


def test_each_attempt_sends_the_whole_body(faulty: FaultyStore, store: RetryingStore) -> None:
    """A body that was half sent when the connection broke is sent again from its start."""
    pieces = [b"abc", b"def", b"ghi"]
    faulty.faults = scripted_faults({("put", 1): Truncate(keep=4), ("put_part", 1): Truncate(keep=4)})
    store.put("key", Body(9, lambda: pieces))
    assert faulty.store.get("key", max_bytes=9).data == b"abcdefghi"
    upload_id = store.create_multipart("large", part_size=9)
    part = store.put_part("large", upload_id, 1, Body(9, lambda: pieces))
    store.complete_multipart("large", upload_id, [part])
    assert faulty.store.get("large", max_bytes=9).data == b"abcdefghi"


def test_a_range_is_filled_again_from_its_start(faulty: FaultyStore, store: RetryingStore) -> None:
    """A range that broke off is read again whole."""
    faulty.store.put("key", b"0123456789")
    faulty.faults = scripted_faults({("get_range", 1): Truncate(keep=3)})
    assert store.get_range("key", 2, 6) == b"234567"


def test_listings_continue_where_they_broke(faulty: FaultyStore, store: RetryingStore) -> None:
    """A listing that fails in the middle goes on after the last key: nothing twice, nothing left out."""
    keys = [f"k{number:02}" for number in range(20)]
    for key in keys:
        faulty.store.put(key, b"")
    faulty.faults = scripted_faults(
        {("list", 1): Truncate(keep=7), ("list", 2): Truncate(keep=0), ("list", 3): Truncate(keep=5)}
    )
    assert [meta.key for meta in store.list("k", start_after="k01")] == keys[2:]
    assert faulty.count("list") == 4
    assert store.retries == 3


def test_the_patience_of_a_listing_begins_anew_with_every_key(
    faulty: FaultyStore, store: RetryingStore, clock: Clock
) -> None:
    """A listing that keeps moving never runs out of patience; one that stands still does."""
    keys = [f"k{number}" for number in range(6)]
    for key in keys:
        faulty.store.put(key, b"")
    late = SlowDown("later", retry_after_s=100.0, operation="get")
    faulty.faults = lambda request: Truncate(keep=1, error=late)
    listing = store.list()
    assert [next(listing).key for _ in keys] == keys
    assert sum(clock.slept) == 500.0
    faulty.faults = always(StoreUnavailable("down", operation="get"))
    with pytest.raises(StoreUnavailable):
        list(store.list())


# Conditional writes


@pytest.mark.parametrize("mode", [PutMode.CREATE, PutMode.UPDATE])
def test_a_lost_answer_is_settled_by_reading_back(faulty: FaultyStore, store: RetryingStore, mode: PutMode) -> None:
    """A conditional put whose first answer was lost meets its own success, and reports it as such."""
    e_tag = faulty.store.put("ref", b"before").e_tag if mode is PutMode.UPDATE else None
    faulty.faults = scripted_faults({("put", 1): FailAfter()})
    meta = store.put("ref", b"mine", mode=mode, e_tag=e_tag)
    assert meta == faulty.store.head("ref")
    assert faulty.store.get("ref", max_bytes=10).data == b"mine"
    assert faulty.count("put") == 2


@pytest.mark.parametrize("theirs", [b"theirs, longer", b"thei", b"t"])
def test_a_race_lost_while_retrying_is_lost(faulty: FaultyStore, store: RetryingStore, theirs: bytes) -> None:
    """Other bytes under the key mean that somebody else won, even after a failed attempt."""

    def overtake(request: Request) -> None:
        if request.number == 1:
            faulty.store.put("ref", theirs)
            raise StoreUnavailable("reset", operation="get")

    faulty.faults = lambda request: Hook(overtake) if request.operation == "put" else None
    with pytest.raises(PreconditionFailed):
        store.put("ref", b"mine", mode=PutMode.CREATE)
    assert faulty.store.get("ref", max_bytes=100).data == theirs


def test_a_race_lost_at_once_is_not_read_back(faulty: FaultyStore, store: RetryingStore) -> None:
    """Without a failed attempt there is nothing to settle, not even when the bytes are equal."""
    faulty.store.put("ref", b"same")
    with pytest.raises(PreconditionFailed):
        store.put("ref", b"same", mode=PutMode.CREATE)
    assert [request.operation for request in faulty.log] == ["put"]


def test_an_object_that_went_meanwhile_is_a_lost_race(faulty: FaultyStore, store: RetryingStore) -> None:
    """If the object is gone by the time it is read back, nobody knows who wrote it; the refusal stands."""
    e_tag = faulty.store.put("ref", b"before").e_tag

    def remove(request: Request) -> None:
        if request.number == 1:
            faulty.store.delete("ref")
            raise StoreUnavailable("reset", operation="get")

    faulty.faults = lambda request: Hook(remove) if request.operation == "put" else None
    with pytest.raises(PreconditionFailed):
        store.put("ref", b"mine", mode=PutMode.UPDATE, e_tag=e_tag)


def test_large_objects_are_not_read_back(faulty: FaultyStore, store: RetryingStore) -> None:
    """Above 2 MiB the refusal stands and nothing is read."""
    faulty.faults = scripted_faults({("put", 1): FailAfter()})
    with pytest.raises(PreconditionFailed):
        store.put("large", bytes(2 * 1024 * 1024 + 1), mode=PutMode.CREATE)
    assert faulty.count("get") == 0


def test_reading_back_is_repeated_too(faulty: FaultyStore, store: RetryingStore) -> None:
    """The read that settles a lost answer may fail for a passing reason as well."""
    faulty.faults = scripted_faults({("put", 1): FailAfter(), ("get", 1): FailBefore(), ("get", 2): FailBefore()})
    store.put("ref", b"mine", mode=PutMode.CREATE)


# All together


@pytest.mark.parametrize("seed", range(8))
def test_an_upload_survives_any_faults(faulty: FaultyStore, store: RetryingStore, seed: int) -> None:
    """With a fault at every third request an upload comes through; only a lost complete is left to the caller."""
    faulty.faults = random_faults(seed, 1 / 3)
    data = bytes(range(100))
    upload_id = store.create_multipart("large", part_size=30)
    for number in (1, 2, 3, 4):
        store.put_part("large", upload_id, number, Body.of(data[(number - 1) * 30 : number * 30]))
    parts = store.list_parts("large", upload_id)
    completed: ObjectMeta | None = None
    with suppress(NoSuchUpload):
        completed = store.complete_multipart("large", upload_id, parts)
    found = store.get("large", max_bytes=100)
    assert found.data == data
    assert completed is None or completed.e_tag == found.meta.e_tag
    assert store.get_range("large", 7, 50) == data[7:57]
    store.delete("large")
    assert list(store.list()) == []


def test_the_repr_shows_the_state(faulty: FaultyStore, store: RetryingStore) -> None:
    """The repr names the store and the retries so far."""
    faulty.faults = scripted_faults({("delete", 1): FailBefore()})
    store.delete("key")
    assert repr(store) == f"<RetryingStore <FaultyStore {faulty.url}>, 1 retries>"
    store.close()
