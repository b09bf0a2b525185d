"""Memory, bandwidth and requests in flight are bounded over all transfers of a process."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from blobflow.activity import activity_of, doing
from blobflow.config import KIB, ChunkProfile
from blobflow.engine import pool
from blobflow.engine.plan import TransferPlan
from blobflow.errors import SlowDown
from blobflow.limits import AdaptiveLimit, Bandwidth, ByteBudget, shared_bandwidth, shared_requests
from blobflow.stores import Body, open_store
from blobflow.stores.limited import LimitedStore
from blobflow.stores.local.store import LocalStore
from blobflow.stores.retry import RetryingStore
from blobflow.testing import FailBefore, FaultyStore, Request, scripted_faults
from tests.clock import Clock


def test_a_budget_lets_no_more_through_than_it_has() -> None:
    """Whoever finds the budget used up waits until somebody gives bytes back."""
    budget = ByteBudget(100)
    assert budget.acquire(60, timeout_s=0)
    assert not budget.acquire(60, timeout_s=0.01)
    budget.release(60)
    assert budget.acquire(60, timeout_s=0)
    assert repr(budget) == "<ByteBudget 60 of 100 bytes held>"


def test_a_request_above_the_budget_takes_its_turn_alone() -> None:
    """A budget smaller than one buffer makes transfers slow, not impossible."""
    budget = ByteBudget(10)
    assert budget.acquire(50, timeout_s=0)
    assert not budget.acquire(1, timeout_s=0.01)
    budget.release(50)
    assert budget.acquire(1, timeout_s=0)


def test_workers_share_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of eight workers under a budget of two buffers holds two at a time, and moves every part."""
    budget = ByteBudget(2 * KIB)
    monkeypatch.setattr(pool, "memory_budget", budget)
    most = 0
    moved: list[int] = []

    def move(part: object, buffer: memoryview) -> int:
        nonlocal most
        most = max(most, budget.held_bytes)
        return len(buffer)

    pool.move_parts(
        list(TransferPlan(64 * KIB, KIB)),
        move,
        workers=8,
        buffer_size=KIB,
        on_moved=lambda part, _: moved.append(part.number),
        on_tick=lambda: None,
    )
    assert sorted(moved) == list(range(1, 65))
    assert most <= 2 * KIB
    assert budget.held_bytes == 0


def test_bandwidth_is_an_average_with_bursts_of_a_second() -> None:
    """Ten chunks of 1,000 bytes at 1,000 bytes per second take nine seconds after a burst of one."""
    clock = Clock()
    bandwidth = Bandwidth(1000, clock=clock, sleep=clock.sleep)
    begin = clock.now
    for _ in range(10):
        bandwidth.take(1000)
    assert clock.now - begin == pytest.approx(9.0)


def test_a_chunk_larger_than_a_second_is_paid_for_afterwards() -> None:
    """A part of ten seconds' worth goes at once; the next one waits for it."""
    clock = Clock()
    bandwidth = Bandwidth(1000, clock=clock, sleep=clock.sleep)
    begin = clock.now
    bandwidth.take(10_000)
    assert clock.now == begin
    bandwidth.take(1)
    assert clock.now - begin == pytest.approx(10.0)


@pytest.mark.parametrize("make", [ByteBudget, Bandwidth, AdaptiveLimit])
def test_a_limit_of_nothing_is_refused(make: type) -> None:
    """A limit that lets nothing through would hang for ever, so it is refused."""
    with pytest.raises(ValueError, match="must be above 0"):
        make(0)


def test_slow_down_halves_the_window_once_and_success_raises_it() -> None:
    """Four requests that were under way together halve the window once; each round of successes adds one."""
    limit = AdaptiveLimit(16)
    with limit.slot() as first, limit.slot() as second:
        first(True)
        second(True)
    assert limit.window == 8
    for _ in range(9):
        with limit.slot() as answered:
            answered(False)
    assert limit.window == 9
    for _ in range(10):
        with limit.slot() as answered:
            answered(True)
    assert limit.window == 1


def test_no_more_requests_are_in_flight_than_the_window_allows() -> None:
    """A third request waits until one of two is answered."""
    limit = AdaptiveLimit(2)
    inside = threading.Event()

    def third() -> None:
        with limit.slot():
            inside.set()

    waiting = threading.Thread(target=third)
    with limit.slot():
        with limit.slot():
            waiting.start()
            assert not inside.wait(0.05)
        assert inside.wait(5)
    waiting.join(5)


def test_a_store_that_says_slow_down_gets_fewer_requests_and_everything_arrives(tmp_path: Path) -> None:
    """SlowDown narrows the window, is repeated, and never fails the call."""
    slow = [FailBefore(SlowDown("slow down", operation="get")) for _ in range(3)]
    faulty = FaultyStore(LocalStore(tmp_path), scripted_faults({("put_part", n + 1): slow[n] for n in range(3)}))
    limit = AdaptiveLimit(8)
    store = RetryingStore(LimitedStore(faulty, requests=limit), sleep=lambda _: None)
    upload_id = store.create_multipart("k", part_size=4)
    part = store.put_part("k", upload_id, 1, Body.of(b"data"))
    store.complete_multipart("k", upload_id, [part])
    assert store.get("k", max_bytes=10).data == b"data"
    assert limit.window == 2  # 8, 4, 2, 1, and one more for the success


def test_stores_of_a_process_share_their_limits(tmp_path: Path) -> None:
    """Two stores opened with the same rate draw from one bucket; so do two of one endpoint with its requests."""
    assert shared_bandwidth(5e6) is shared_bandwidth(5e6)
    assert shared_requests("http://a", 4) is not shared_requests("http://b", 4)
    first = open_store(tmp_path / "a", bandwidth_bytes_per_s=5e6)
    second = open_store(tmp_path / "b", bandwidth_bytes_per_s=5e6)
    inner = [store.store for store in (first, second) if isinstance(store, RetryingStore)]
    assert isinstance(inner[0], LimitedStore)
    assert isinstance(inner[1], LimitedStore)
    assert inner[0].bandwidth is inner[1].bandwidth


def test_a_thread_says_what_it_waits_for() -> None:
    """The innermost block counts, and afterwards the thread is idle again."""
    me = threading.get_ident()
    with doing("outer"):
        with doing("inner"):
            assert activity_of(me) == "inner for 0 s"
        assert activity_of(me) == "outer for 0 s"
    assert activity_of(me) == "idle"


def test_a_stalled_pool_explains_itself(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no part is finished, the log says what each worker is waiting for."""
    monkeypatch.setattr(pool, "STALL_S", 0.0)
    release = threading.Event()

    def move(part: object, buffer: memoryview) -> None:
        with doing("waiting for the moon"):
            release.wait(30)

    def tick() -> None:
        if "waiting for the moon" in caplog.text:
            release.set()

    with caplog.at_level("WARNING", logger="blobflow.engine.pool"):
        profile = ChunkProfile.custom(4, 1)
        pool.move_parts(
            list(TransferPlan(4, 4)),
            move,
            workers=profile.workers,
            buffer_size=profile.chunk_size,
            on_moved=lambda *_: None,
            on_tick=tick,
        )
    assert "transfer.stalled" in caplog.text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_begins_with_everything_free(tmp_path: Path) -> None:
    """What threads of the parent hold and have locked is free in the child, and stays held in the parent."""
    budget, requests = ByteBudget(100), AdaptiveLimit(1)
    store = FaultyStore(RetryingStore(LocalStore(tmp_path)), lambda _: None)
    inside, leave = threading.Barrier(2), threading.Event()

    def hold() -> None:
        def wait(_: Request) -> None:
            inside.wait()
            leave.wait(20)

        assert budget.acquire(100, timeout_s=0)
        with requests.slot():
            store.faults = wait  # faults are asked for under the store's lock
            store.exists("k")
        budget.release(100)

    def use() -> bool:
        store.faults = lambda _: None
        with requests.slot():
            store.put("k", b"child")
        return budget.acquire(100, timeout_s=0)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            os._exit(0 if use() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert not budget.acquire(1, timeout_s=0), "the parent's own count stands"
    leave.set()
    holder.join()
    assert use()
    assert store.get("k", max_bytes=10).data == b"child"
