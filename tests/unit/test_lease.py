"""Leases and refs: small objects that are moved by compare-and-swap."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from blobflow import Lease, move_ref, read_ref
from blobflow.errors import ArtifactInvalid, InvalidKey, LeaseLost, StoreUnavailable, TransferBusy, Unsupported
from blobflow.owner import process_owner
from blobflow.stores.base import Abilities
from blobflow.stores.local import LocalStore
from blobflow.stores.retry import RetryingStore
from blobflow.testing import FailAfter, FaultyStore, Hook, Request, scripted_faults

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def lease(store: LocalStore | FaultyStore | RetryingStore, clock: Clock) -> Lease:
    return Lease(store, "orders/round", ttl_s=60.0, clock=clock)


def state(store: LocalStore) -> dict[str, object]:
    return json.loads(store.get("orders/round.lease.json", max_bytes=10_000).data)


def test_one_holds_a_lease_at_a_time(store: LocalStore, clock: Clock):
    """The second one is told no, not an error; after the release it is told yes."""
    first, second = lease(store, clock), lease(store, clock)
    assert first.try_acquire()
    assert not second.try_acquire()
    assert (repr(first), repr(second)) == (
        "<Lease orders/round held, generation 1>",
        "<Lease orders/round not held>",
    )
    first.abandon()
    assert second.try_acquire()
    assert second.generation == 2


def test_of_many_that_try_at_once_one_wins(store: LocalStore, clock: Clock):
    """Eight threads, one lease."""
    barrier = threading.Barrier(8)
    won: list[bool] = []

    def race() -> None:
        mine = lease(store, clock)
        barrier.wait()
        won.append(mine.try_acquire())

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_an_expired_lease_is_taken_over_and_its_holder_learns_of_it(store: LocalStore, clock: Clock):
    """The generation is the fencing token: the sleeper can neither renew nor complete."""
    sleeper, successor = lease(store, clock), lease(store, clock)
    sleeper.try_acquire()
    clock.now += 60.0
    assert successor.try_acquire()
    with pytest.raises(LeaseLost, match="taken over after generation 1"):
        sleeper.renew()
    with pytest.raises(LeaseLost, match="not held"):
        sleeper.complete("cursor")
    assert successor.generation == 2
    assert state(store)["cursor"] is None


def test_a_dead_holder_is_succeeded_at_once(store: LocalStore, clock: Clock):
    """A process of this machine that is gone need not be waited for."""
    lease(store, clock).try_acquire()
    held = state(store)
    held["owner"] = f"{process_owner().rpartition('/')[0]}/{10**9}"
    store.put("orders/round.lease.json", json.dumps(held).encode())
    assert lease(store, clock).try_acquire()


def test_renewal_is_due_after_a_third(store: LocalStore, clock: Clock):
    """And holds it for another full time."""
    mine, other = lease(store, clock), lease(store, clock)
    mine.try_acquire()
    clock.now += 19
    assert not mine.renewal_due()
    clock.now += 2
    assert mine.renewal_due()
    mine.renew()
    clock.now += 59
    assert not other.try_acquire()
    clock.now += 2
    assert other.try_acquire()


def test_a_completed_round_leaves_its_cursor(store: LocalStore, clock: Clock):
    """The next holder's state carries it on, also if that one gives up."""
    first = lease(store, clock)
    first.try_acquire()
    first.complete({"lsn": 42})
    second = lease(store, clock)
    second.try_acquire()
    second.abandon()
    assert (state(store)["cursor"], state(store)["owner"], state(store)["generation"]) == ({"lsn": 42}, "", 2)


def test_giving_up_never_raises(store: LocalStore, clock: Clock):
    """Not held, taken over, or the store is away: at the latest the lease expires."""
    mine = lease(store, clock)
    mine.abandon()
    mine.try_acquire()
    clock.now += 100
    lease(store, clock).try_acquire()
    mine.abandon()
    assert state(store)["generation"] == 2
    broken = FaultyStore(store, scripted_faults({("put", 2): FailAfter()}))
    clock.now += 100
    unlucky = lease(broken, clock)
    unlucky.try_acquire()
    unlucky.abandon()


def test_a_lost_answer_is_settled_by_reading_back(store: LocalStore, clock: Clock):
    """The write arrived, its answer did not: with retries the holder recognises its own write."""
    faulty = FaultyStore(store, scripted_faults({("put", n): FailAfter() for n in (1, 3, 5)}))
    mine = lease(RetryingStore(faulty, sleep=lambda _: None), clock)
    assert mine.try_acquire()
    mine.renew()
    mine.complete("done")
    assert (state(store)["cursor"], state(store)["generation"]) == ("done", 1)


def test_a_store_without_conditional_writes_holds_no_lease(store: LocalStore):
    """A clear refusal instead of a lease that protects nothing."""
    store.abilities = Abilities(conditional=False)
    with pytest.raises(Unsupported, match="no conditional writes"):
        Lease(store, "orders/round")


def test_what_is_no_lease_is_refused(store: LocalStore, clock: Clock):
    """Somebody else's object is named, not replaced; a bad name is no key."""
    store.put("orders/round.lease.json", b'{"generation": "many"}')
    with pytest.raises(ArtifactInvalid, match="is not a LeaseState"):
        lease(store, clock).try_acquire()
    with pytest.raises(InvalidKey):
        Lease(store, "../round")


def test_a_ref_names_an_artifact(store: LocalStore):
    """Absent, then one, then another; each move counts, a move to where it is does not."""
    assert read_ref(store, "orders/latest") is None
    first = move_ref(store, "orders/latest", "orders/1.tar", A)
    assert move_ref(store, "orders/latest", "orders/1.tar", A) == first == read_ref(store, "orders/latest")
    second = move_ref(store, "orders/latest", "orders/2.tar", B)
    assert (first.generation, second.generation) == (1, 2)
    found = json.loads(store.get("orders/latest.ref.json", max_bytes=10_000).data)
    assert sorted(found) == ["generation", "key", "manifest_sha256", "updated_at", "write_id"]
    assert found["manifest_sha256"] == B


def test_two_that_move_a_ref_both_arrive(store: LocalStore):
    """One after the other: no move is lost, the generation counts both."""

    def other_first(_: Request) -> None:
        move_ref(store, "latest", "other.tar", B)

    faulty = FaultyStore(store, lambda r: Hook(other_first) if (r.operation, r.number) == ("put", 1) else None)
    assert move_ref(faulty, "latest", "mine.tar", A).generation == 2
    found = read_ref(store, "latest")
    assert found is not None
    assert found.key == "mine.tar"


def test_a_ref_that_never_stands_still_is_busy(store: LocalStore):
    """The number of attempts is bounded."""
    count = iter(range(1000))

    def disturb(_: Request) -> None:
        move_ref(store, "latest", f"other-{next(count)}.tar", B)

    faulty = FaultyStore(store, lambda r: Hook(disturb) if r.operation == "put" else None)
    with pytest.raises(TransferBusy):
        move_ref(faulty, "latest", "mine.tar", A)


def test_a_ref_is_checked_on_both_ways(store: LocalStore):
    """A digest that is none is not written, an object that is no ref is not believed."""
    with pytest.raises(ValidationError):
        move_ref(store, "latest", "a.tar", "sha256:short")
    store.put("latest.ref.json", b"{}")
    with pytest.raises(ArtifactInvalid, match="is not a RefState"):
        read_ref(store, "latest")


def test_an_error_of_the_store_is_not_a_lost_race(store: LocalStore, clock: Clock):
    """Who could not even ask is told so."""
    faulty = FaultyStore(store, scripted_faults({("put", 1): FailAfter()}))
    with pytest.raises(StoreUnavailable):
        lease(faulty, clock).try_acquire()
