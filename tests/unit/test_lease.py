"""Leases and refs: small objects that are moved by compare-and-swap."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from blobflow import Lease, move_ref, read_ref
from blobflow.coordination.lease import End, LeaseMachine, Look, Now, Write
from blobflow.coordination.lease_store import Found, LeaseState, ObjectLeaseStore
from blobflow.coordination.refs import MAX_HISTORY, fence_ref, newest_round
from blobflow.errors import ArtifactInvalid, InvalidKey, LeaseLost, StoreUnavailable, TransferBusy, Unsupported
from blobflow.owner import process_owner
from blobflow.stores.local.store import LocalStore
from blobflow.stores.retry import RetryingStore
from blobflow.testing import FailAfter, FailBefore, FaultyStore, Hook, Request, scripted_faults
from tests.clock import Clock
from tests.kit import declare

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


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
    declare(store, conditional=False)
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
    assert sorted(found) == [
        *("fence_id", "generation", "history", "key", "made_by_round", "manifest_sha256"),
        *("round_number", "updated_at", "write_id"),
    ]
    assert found["manifest_sha256"] == B


def test_a_ref_is_never_moved_back_to_an_earlier_round(store: LocalStore):
    """Who wakes up late finds the ref moved by a later round, and it stays there."""
    move_ref(store, "latest", "5.tar", A, round_number=5)
    newer = move_ref(store, "latest", "6.tar", B, round_number=6)
    with pytest.raises(LeaseLost, match="belongs to round 6, and this is round 5") as refusal:
        move_ref(store, "latest", "5.tar", A, round_number=5)
    assert refusal.value.generation == 5
    assert read_ref(store, "latest") == newer


def test_a_round_that_changes_nothing_keeps_earlier_ones_away(store: LocalStore):
    """Round 7 finds the content of round 5 still named: round 6, which comes late, must not publish any more."""
    first = move_ref(store, "latest", "same.tar", A, round_number=5)
    kept = move_ref(store, "latest", "same.tar", A, round_number=7)
    assert (kept.generation, kept.updated_at, kept.round_number) == (first.generation, first.updated_at, 7)
    with pytest.raises(LeaseLost):
        move_ref(store, "latest", "6.tar", B, round_number=6)


def test_an_operator_moves_a_ref_where_he_likes(store: LocalStore):
    """By hand a ref may go back, and orphans of the rounds in between stay away; the next round moves it again."""
    move_ref(store, "latest", "6.tar", B, round_number=6)
    assert move_ref(store, "latest", "5.tar", A).round_number == 6
    with pytest.raises(LeaseLost):
        move_ref(store, "latest", "4.tar", B, round_number=4)
    assert move_ref(store, "latest", "7.tar", B, round_number=7).key == "7.tar"


def test_refs_of_older_versions_are_read(store: LocalStore):
    """A ref without a round number gives way to every round."""
    store.put(
        "latest.ref.json",
        json.dumps(
            {
                "key": "old.tar",
                "manifest_sha256": A,
                "generation": 3,
                "write_id": "w",
                "updated_at": "2026-01-01T00:00:00Z",
            }
        ).encode(),
    )
    assert move_ref(store, "latest", "new.tar", B, round_number=1).generation == 4


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


@pytest.mark.parametrize("key", ["x" * 100_000, "../../etc/passwd", "\x1b[2Jkey", "/key"])
def test_a_ref_that_names_no_key_is_not_believed(store: LocalStore, key: str):
    """What a ref names is printed and used by scripts, and anybody who writes to the bucket writes refs."""
    move_ref(store, "latest", "a.tar", A)
    document = json.loads(store.get("latest.ref.json", max_bytes=1 << 20).data)
    store.put("latest.ref.json", json.dumps({**document, "key": key}).encode())
    with pytest.raises(ArtifactInvalid, match="it is not a key") as refusal:
        read_ref(store, "latest")
    assert len(str(refusal.value)) < 400


def test_an_error_of_the_store_is_not_a_lost_race(store: LocalStore, clock: Clock):
    """Who could not even ask is told so, and may ask again."""
    faulty = FaultyStore(store, scripted_faults({("put", 1): FailBefore()}))
    mine = lease(faulty, clock)
    with pytest.raises(StoreUnavailable):
        mine.try_acquire()
    assert mine.try_acquire()
    assert mine.generation == 1


# Time


class Keeper(ObjectLeaseStore):
    """Leases of a local store, whose keeper tells the time that the test says; None: it does not tell."""

    def __init__(self, store: LocalStore, clock: Clock | None) -> None:
        super().__init__(store)
        self._told = clock

    def time_s(self) -> float | None:
        return self._told() if self._told else None


def test_the_keepers_clock_counts(store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """A machine whose own clock is years ahead takes nothing over, and one behind waits no longer than the others."""
    keeper = Keeper(store, clock)
    assert Lease(keeper, "orders/round").try_acquire()
    monkeypatch.setattr("time.time", lambda: 1e10)
    other = Lease(keeper, "orders/round", ticks=lambda: 0.0)
    assert not other.try_acquire()
    monkeypatch.setattr("time.time", lambda: 0.0)
    clock.now += 61
    assert other.try_acquire()


def test_a_record_that_stands_still_is_expired_whatever_the_clocks_say(store: LocalStore):
    """A holder whose clock was years ahead is dead: who saw its record unchanged for its time to live takes over."""
    Lease(Keeper(store, None), "orders/round", clock=lambda: 1e12, ttl_s=60.0).try_acquire()
    ticks = Clock()
    other = Lease(Keeper(store, None), "orders/round", ticks=ticks, ttl_s=5.0)
    assert not other.try_acquire()
    ticks.now += 59
    assert not other.try_acquire()
    ticks.now += 2
    assert other.try_acquire()


def test_each_renewal_begins_the_watch_anew(store: LocalStore):
    """A slow holder that renews is alive, however wrong its clock."""
    holder = Lease(store, "orders/round", clock=lambda: 0.0)
    holder.try_acquire()
    ticks = Clock()
    other = Lease(store, "orders/round", ticks=ticks, clock=lambda: -1.0)
    for _ in range(5):
        assert not other.try_acquire()
        ticks.now += 40
        holder.renew()


def test_without_a_shared_clock_one_more_time_to_live_is_waited(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """Two machines may differ by that much before one takes over from a holder that lives."""
    monkeypatch.setattr("time.time", clock)
    Lease(Keeper(store, None), "orders/round").try_acquire()
    clock.now += 119
    assert not Lease(Keeper(store, None), "orders/round").try_acquire()
    clock.now += 1
    assert Lease(Keeper(store, None), "orders/round").try_acquire()


# The heartbeat


class Beats(ObjectLeaseStore):
    """Leases of a local store that say when a renewal has been written, and fail when they are told to."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.fails = False
        self.asked = threading.Semaphore(0)

    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        try:
            if self.fails:
                raise StoreUnavailable("away", operation="get")
            return super().swap(name, state, version)
        finally:
            self.asked.release()

    def wait(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=30)


@pytest.mark.seed("W1.7")
def test_a_heartbeat_renews_while_the_holder_is_busy(store: LocalStore):
    """Without a call of the holder the record changes again and again; at the end of the block the thread is gone."""
    leases = Beats(store)
    mine = Lease(leases, "orders/round", ttl_s=0.3)
    mine.try_acquire()
    before = state(store)
    with mine.heartbeat():
        leases.wait(4)
    after = state(store)
    assert (after["generation"], after["owner"]) == (before["generation"], before["owner"])
    assert after["write_id"] != before["write_id"]
    assert [thread.name for thread in threading.enumerate() if "lease" in thread.name] == []


@pytest.mark.seed("W1.7")
def test_a_heartbeat_tells_of_a_loss_and_outlives_an_outage(store: LocalStore):
    """A store that is away is asked again; another holder is final, and known without asking."""
    leases = Beats(store)
    mine = Lease(leases, "orders/round", ttl_s=0.3)
    mine.try_acquire()
    leases.wait()
    leases.fails = True
    with mine.heartbeat():
        leases.wait(3)
        mine.check()
        leases.fails = False
        leases.wait(2)
        beating = next(thread for thread in threading.enumerate() if thread.name == "blobflow-lease-orders/round")
        other = Lease(store, "orders/round", clock=lambda: 1e12)
        while not other.try_acquire():
            pass  # a renewal came in between
        beating.join(30)
        with pytest.raises(LeaseLost):
            mine.check()


@pytest.mark.seed("W1.7")
def test_who_hangs_is_not_kept_alive(store: LocalStore):
    """The heartbeat asks whether there is life; after a no the lease runs out."""
    mine = Lease(Beats(store), "orders/round", ttl_s=0.03)
    mine.try_acquire()
    before, asked = state(store), threading.Event()

    def hangs() -> bool:
        asked.set()
        return False

    with mine.heartbeat(hangs):
        assert asked.wait(30)
    assert state(store) == before


# Writes without answers


def test_a_lost_answer_needs_no_retries(store: LocalStore, clock: Clock):
    """On a bare store, too, every write whose answer was lost is recognised."""
    mine = lease(FaultyStore(store, lambda r: FailAfter() if r.operation == "put" else None), clock)
    assert mine.try_acquire()
    mine.renew()
    mine.complete("done")
    assert (state(store)["cursor"], state(store)["generation"]) == ("done", 1)


def test_a_conflict_without_another_writer_is_no_loss(store: LocalStore, clock: Clock):
    """S3 may refuse a write although nobody else has written; it is sent again, and not for ever."""

    class Moody(ObjectLeaseStore):
        moods = 0

        def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
            self.moods -= 1
            return None if self.moods >= 0 else super().swap(name, state, version)

    leases = Moody(store)
    mine = Lease(leases, "orders/round", clock=clock)
    leases.moods = 2
    assert mine.try_acquire()
    leases.moods = 100
    with pytest.raises(TransferBusy):
        mine.renew()
    leases.moods = 0
    mine.renew()
    assert mine.generation == 1


def test_an_answer_that_comes_late_is_no_conflict(store: LocalStore, clock: Clock):
    """A renewal that seemed unsent arrives before the next one: the holder knows it for its own."""

    class Slow(ObjectLeaseStore):
        late: tuple[str, LeaseState, str | None] | None = None

        def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
            if self.late is None and state.generation == 1 and version is not None:
                self.late = (name, state, version)
                raise StoreUnavailable("it is on its way", operation="get")
            return super().swap(name, state, version)

        def arrive(self) -> None:
            assert self.late
            assert super().swap(*self.late)

    leases = Slow(store)
    mine = Lease(leases, "orders/round", clock=clock)
    mine.try_acquire()
    with pytest.raises(StoreUnavailable):
        mine.renew()
    leases.arrive()
    mine.renew()
    mine.complete("done")
    assert state(store)["cursor"] == "done"


def test_who_has_it_already_renews_it(store: LocalStore, clock: Clock):
    """Asking twice is no deadlock with oneself."""
    mine = lease(store, clock)
    assert mine.try_acquire()
    assert mine.try_acquire()
    assert mine.generation == 1


def test_a_machine_reads_as_a_story(store: LocalStore):
    """The repr of what decides shows where it is."""
    machine, now = LeaseMachine("me", 60.0), Now(1000.0, 0.0)
    assert (repr(machine), machine.acquire(now)) == ("<LeaseMachine>", Look())
    write = machine.seen(None, now)
    assert isinstance(write, Write)
    assert (write.version, repr(machine)) == (None, "<LeaseMachine writing generation 1>")
    assert machine.doubtful(refused=False) == Look()
    assert machine.seen(Found(write.state, "v1"), now) == End(done=True)
    assert repr(machine) == "<LeaseMachine holding generation 1>"


# Refs: fences, history, lost answers


@pytest.mark.seed("W1.7")
def test_a_fence_keeps_earlier_rounds_away(store: LocalStore):
    """Before the newer round has published anything; readers see no difference."""
    first = move_ref(store, "latest", "5.tar", A, round_number=5)
    assert fence_ref(store, "latest", 6) == 6
    with pytest.raises(LeaseLost, match="belongs to round 6, and this is round 5"):
        move_ref(store, "latest", "5b.tar", B, round_number=5)
    found = read_ref(store, "latest")
    assert found is not None
    assert (found.key, found.generation, found.updated_at) == (first.key, first.generation, first.updated_at)
    assert move_ref(store, "latest", "6.tar", B, round_number=6).generation == 2


def test_a_ref_that_is_only_fenced_names_nothing(store: LocalStore):
    """There is no such ref for readers, and the first round that comes too late finds it closed."""
    assert (fence_ref(store, "latest", 3), newest_round(store, "latest")) == (3, 3)
    assert read_ref(store, "latest") is None
    with pytest.raises(LeaseLost):
        move_ref(store, "latest", "2.tar", A, round_number=2)
    moved = move_ref(store, "latest", "3.tar", A, round_number=3)
    assert (moved.generation, moved.history) == (1, ())


def test_a_fence_goes_on_where_a_lease_was_removed(store: LocalStore):
    """The count of a new lease begins at 1; that of the ref does not."""
    move_ref(store, "latest", "9.tar", A, round_number=9)
    assert fence_ref(store, "latest", 1) == 10


def test_a_sleeper_does_not_fence_its_successor(store: LocalStore):
    """Who wakes up before its fence, and finds a later one, looks after its lease; the successor's number stays."""

    def lost() -> None:
        raise LeaseLost("lease 'orders/round' was taken over", name="orders/round")

    assert fence_ref(store, "latest", 7) == 7
    with pytest.raises(LeaseLost):
        fence_ref(store, "latest", 6, still_ours=lost)
    assert newest_round(store, "latest") == 7
    move_ref(store, "latest", "7.tar", A, round_number=7)


def test_a_ref_remembers_where_it_was(store: LocalStore):
    """The latest first, with the round that moved it, and no more than fit."""
    for number in range(1, MAX_HISTORY + 4):
        move_ref(store, "latest", f"{number}.tar", A, round_number=number)
    fence_ref(store, "latest", 99)
    found = read_ref(store, "latest")
    assert found is not None
    assert [entry.round_number for entry in found.entries()] == list(range(MAX_HISTORY + 3, 2, -1))
    assert [entry.key for entry in found.history] == [f"{n}.tar" for n in range(MAX_HISTORY + 2, 2, -1)]


def test_the_longest_history_can_be_read(store: LocalStore):
    """Keys of full length, in the characters that take most room."""
    for number in range(MAX_HISTORY + 3):
        key = "/".join(["\N{ROCKET}" * 60, '"' * 250, "\\" * 250, f"{number}"])
        move_ref(store, "latest", key, A)
    assert read_ref(store, "latest") is not None


def test_a_move_whose_answer_was_lost_is_recognised(store: LocalStore):
    """On a bare store; also if another one has moved the ref on before it was read back."""
    faulty = FaultyStore(store, scripted_faults({("put", 1): FailAfter(), ("put", 2): FailAfter()}))
    first = move_ref(faulty, "latest", "1.tar", A, round_number=1)
    assert read_ref(store, "latest") == first

    def moved_on(_: Request) -> None:
        move_ref(store, "latest", "3.tar", A, round_number=3)

    faulty.faults = lambda r: (
        FailAfter()
        if r == ("put", "latest.ref.json", 2)
        else Hook(moved_on)
        if (r.operation, r.number) == ("get", 4)
        else None
    )
    second = move_ref(faulty, "latest", "2.tar", B, round_number=2)
    found = read_ref(store, "latest")
    assert found is not None
    assert [entry.key for entry in found.entries()] == ["3.tar", "2.tar", "1.tar"]
    assert (second.key, found.generation) == ("2.tar", 3)


def test_a_move_that_never_arrived_says_so(store: LocalStore):
    """The error of the store, and the ref where it was."""
    faulty = FaultyStore(store, lambda r: FailBefore() if r.operation == "put" else None)
    with pytest.raises(StoreUnavailable):
        move_ref(faulty, "latest", "1.tar", A)
    assert read_ref(store, "latest") is None
