"""Batches over any store: the window, its permits, the order of results, and whose error is whose."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from blobflow.batch import BatchExecutor, BatchResult, Delete, Deleted, Get, Got, Insert, Inserted, Operation, Payload
from blobflow.batch.stream import MAX_PAYLOAD_BYTES
from blobflow.errors import (
    AtCapacity,
    DeadlineExceeded,
    InvalidKey,
    ObjectChanged,
    OperationCrashed,
    PayloadTooLarge,
    PermissionMissing,
    SlowDown,
    StoreUnavailable,
    Unsupported,
    UsageError,
    WorkerDied,
)
from blobflow.limits import ByteBudget, Permits
from blobflow.stores import ObjectMeta, Store, open_store
from blobflow.stores.base import Body
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FailBefore, Fault, FaultyStore, Hook, Request, scripted_faults
from tests.kit import keys

SOON_S = 20.0
"""What never happens in a test that passes ends after this."""


@pytest.fixture
def store() -> Store:
    """A store in memory, without a sound from others."""
    return open_store(f"memory://{os.urandom(8).hex()}")


def faulty(store: Store, faults: Callable[[Request], Fault | None]) -> FaultyStore:
    return FaultyStore(store, faults)


class Gate:
    """Holds requests of a store until it is opened, and knows how many are in it."""

    def __init__(self, *operations: str) -> None:
        self.inside = 0
        self._operations = operations
        self._open = threading.Event()
        self._changed = threading.Condition()

    def __call__(self, request: Request) -> Fault | None:
        return Hook(self._hold) if request.operation in self._operations else None

    def _hold(self, _: Request) -> None:
        with self._changed:
            self.inside += 1
            self._changed.notify_all()
        assert self._open.wait(SOON_S)

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.inside >= count, SOON_S)

    def open(self) -> None:
        self._open.set()


def run(executor: BatchExecutor, operations: Iterable[Any]) -> list[BatchResult]:
    """The results, by index."""
    with executor.stream(operations) as results:
        return sorted(results, key=lambda result: result.index)


# The window and its permits


@pytest.mark.seed("4.1")
@pytest.mark.parametrize(
    ("free", "window"), [(1, 1), (10, 1), (11, 2), (30, 3), (70, 7), (100, 10), (500, 50), (1000, 100)]
)
def test_the_window_is_a_tenth_of_the_free_permits(store: Store, free: int, window: int) -> None:
    """A stream takes ceil(10 %) of what is free when it begins, in exact arithmetic."""
    with BatchExecutor(store, permits=free).stream([]) as results:
        assert results.window == window


@pytest.mark.seed("4.2")
def test_the_permits_are_taken_at_once_and_given_back_at_the_end(store: Store) -> None:
    """`free` drops by the window when the stream begins, and is whole again after its last operation."""
    executor = BatchExecutor(store, permits=100)
    results = executor.stream(Insert(f"k{n}", b"x") for n in range(25))
    assert executor.permits.free == 90
    assert len(list(results)) == 25
    assert executor.permits.free == 100
    assert repr(executor.permits) == "<Permits 100 of 100 free>"


@pytest.mark.seed("4.3")
def test_without_a_free_permit_nothing_is_read(store: Store) -> None:
    """At capacity, `stream` fails at once, before it looks at the input: with no permits, and with all of them held."""

    def input_() -> Iterator[Operation]:
        raise AssertionError("the input was read")
        yield

    with pytest.raises(AtCapacity):
        BatchExecutor(store, permits=0).stream(input_())
    permits = Permits(1)
    gate = Gate("put")
    with BatchExecutor(faulty(store, gate), permits=permits).stream([Insert("blocker", b"x")]) as blocker:
        waiting = threading.Thread(target=lambda: next(blocker))
        waiting.start()
        gate.wait_for(1)
        with pytest.raises(AtCapacity) as refusal:
            BatchExecutor(store, permits=permits).stream(input_())
        assert (refusal.value.limit, refusal.value.exit_code) == (1, 75)
        gate.open()
        waiting.join(SOON_S)
    assert permits.free == 1


@pytest.mark.seed("4.4")
def test_operations_take_no_further_permit(store: Store) -> None:
    """More operations than there are permits do not wait for each other's: they run within the window."""
    executor = BatchExecutor(store, permits=1)
    assert len(run(executor, [Insert(f"k{n}", b"x") for n in range(20)])) == 20


@pytest.mark.seed("4.5")
def test_the_window_is_filled_and_the_input_is_pulled_no_further(store: Store) -> None:
    """Ten inserts are all in flight at a window of ten, and nothing beyond them has been pulled."""
    gate = Gate("put")
    pulled: list[int] = []

    def input_() -> Iterator[Operation]:
        for number in range(30):
            pulled.append(number)
            yield Insert(f"k{number}", b"x")

    told = 0
    with BatchExecutor(faulty(store, gate), permits=100).stream(input_()) as results:
        assert pulled == []
        opener = threading.Thread(target=lambda: (gate.wait_for(10), most.append(len(pulled)), gate.open()))
        most: list[int] = []
        opener.start()
        for _ in results:
            assert len(pulled) - told <= 10
            told += 1
        opener.join(SOON_S)
    assert (told, most) == (30, [10])


@pytest.mark.seed("4.6")
def test_results_come_in_the_order_of_completion(store: Store) -> None:
    """A slow operation 0 is told after a fast operation 1, with its own index."""
    fast_is_told = threading.Event()

    def wait(_: Request) -> None:
        assert fast_is_told.wait(SOON_S)

    def slow(request: Request) -> Fault | None:
        return Hook(wait) if request.key == "slow" else None

    with BatchExecutor(faulty(store, slow), window=2).stream([Insert("slow", b"0"), Insert("fast", b"1")]) as results:
        assert next(results).index == 1
        fast_is_told.set()
        assert [result.index for result in results] == [0]


@pytest.mark.seed("W4.1")
def test_the_window_is_configurable(store: Store) -> None:
    """A fraction or a number of one's own; never more than is free, and nonsense is refused."""
    with BatchExecutor(store, permits=100, fraction=0.5).stream([]) as results:
        assert results.window == 50
    with BatchExecutor(store, permits=100, window=30).stream([]) as results:
        assert results.window == 30
    with BatchExecutor(store, permits=20, window=30).stream([]) as results:
        assert results.window == 20
    nonsense: list[dict[str, Any]] = [
        {"fraction": 0.0},
        {"window": 0},
        {"deadline_s": 0.0},
        {"allow": {"fly"}},
        {"processes": 2},
    ]
    for wrong in nonsense:
        with pytest.raises(UsageError):
            BatchExecutor(store, **wrong)


@pytest.mark.seed("W4.1")
def test_slow_down_halves_the_window_and_success_widens_it(store: Store) -> None:
    """A store that says SlowDown gets half as many operations at a time, one more for each window that succeeds."""
    script = scripted_faults({("put", 5): FailBefore(SlowDown("slow", operation="put", retry_after_s=0.0))})
    # One request after the other, as results are taken: otherwise the window can widen again before anybody looks.
    begun, taken, pulled = 0, 0, 0
    changed = threading.Condition()

    def in_step(request: Request) -> Fault | None:
        nonlocal begun
        with changed:
            assert changed.wait_for(lambda: request.number == begun + 1 <= taken + 2, 60)
            begun += 1
            changed.notify_all()
        return script(request)

    def input_() -> Iterator[Operation]:
        nonlocal pulled
        for pulled in range(1, 201):
            yield Insert(f"k{pulled}", b"x")

    ahead: list[int] = []
    with BatchExecutor(faulty(store, in_step), window=16).stream(input_()) as results:
        for told, result in enumerate(results):
            assert result.error is None
            ahead.append(pulled - told)
            with changed:
                taken = told + 1
                changed.notify_all()
    assert max(ahead[:4]) == 16
    assert min(ahead[:60]) <= 9
    assert max(ahead[100:180]) == 16


@pytest.mark.seed("W4.1")
def test_latency_halves_the_window(store: Store) -> None:
    """Operations slower than `slow_s` say the same as SlowDown does."""
    with BatchExecutor(store, window=16, slow_s=0.0).stream(Insert(f"k{n}", b"x") for n in range(100)) as results:
        assert len(list(results)) == 100
        assert "window 1 of 16" in repr(results)


# Whose error is whose


@pytest.mark.seed("4.7")
def test_an_exception_is_its_items_own(store: Store) -> None:
    """What one operation raises, be it an interrupt, is told as the error of that item; the others succeed."""

    def defect(request: Request) -> Fault | None:
        def raise_(_: Request) -> None:
            raise ZeroDivisionError("a defect") if request.key == "bad" else SystemExit(3)

        return Hook(raise_) if request.key in ("bad", "worse") else None

    executor = BatchExecutor(faulty(store, defect), permits=100)
    results = run(executor, [Insert(key, b"x") for key in ("a", "bad", "b", "worse", "c")])
    assert [result.error is None for result in results] == [True, False, True, False, True]
    crash = results[1].error
    assert isinstance(crash, OperationCrashed)
    assert (crash.operation, crash.key, crash.error) == ("insert", "bad", "ZeroDivisionError")
    assert isinstance(crash.__cause__, ZeroDivisionError)
    assert isinstance(results[3].error, OperationCrashed)
    with pytest.raises(OperationCrashed):
        results[1].unwrap()
    assert executor.permits.free == 100


class Deadly(LocalStore):
    """A store whose client takes the process down, or never answers."""

    def put(self, key: str, body: Any, **options: Any) -> ObjectMeta:
        if key == "deadly":
            os._exit(7)
        if key == "hanging":
            threading.Event().wait()
        return super().put(key, body, **options)


@pytest.mark.seed("4.7", "W4.4")
def test_a_dying_process_costs_its_item_alone(tmp_path: Path) -> None:
    """In worker processes `os._exit` and a hang in one operation are typed errors of that item; the rest succeeds."""
    executor = BatchExecutor(
        functools.partial(Deadly, tmp_path), processes=2, window=2, ordered=True, deadline_s=SOON_S
    )
    operations = [Insert("a", b"1"), Insert("deadly", b"2"), Insert("b", memoryview(b"3")), Get("a"), Get("absent")]
    results = run(executor, [*operations, Insert("c", b"4"), Delete("b"), Insert("x" * 2000, b"")])
    died = results[1].error
    assert isinstance(died, WorkerDied)
    assert (died.operation, died.key, died.status) == ("insert", "deadly", 7)
    assert isinstance(results[-1].error, InvalidKey)
    assert [result.error is None for result in results] == [True, False, True, True, True, True, True, False]
    assert keys(LocalStore(tmp_path)) == ["a", "c"]


@pytest.mark.seed("W4.2", "W4.4")
def test_a_hanging_process_is_killed(tmp_path: Path) -> None:
    """A process that hangs is killed at the deadline; large objects are streamed by the parent."""
    large = os.urandom(3 * MAX_PAYLOAD_BYTES)
    LocalStore(tmp_path).put("large", large)
    executor = BatchExecutor(functools.partial(Deadly, tmp_path), processes=1, deadline_s=8.0)
    results = run(executor, [Insert("hanging", b"1"), Get("large")])
    assert isinstance(results[0].error, DeadlineExceeded)
    response = results[1].unwrap()
    assert isinstance(response, Got)
    assert response.payload is not None
    assert response.payload.read() == large
    assert executor.permits.free == 500


@pytest.mark.seed("4.8")
def test_errors_of_the_input_pass_through(store: Store) -> None:
    """[operation, error, operation] gives three results, one of them with the very same error."""
    error = ValueError("line 2 is no operation")
    results = run(BatchExecutor(store), [Insert("a", b"x"), error, Insert("b", b"x")])
    assert [result.index for result in results] == [0, 1, 2]
    assert results[1].error is error
    assert (results[1].kind, results[1].key) == ("", None)
    assert keys(store) == ["a", "b"]


def test_what_is_no_operation_is_its_items_error(store: Store) -> None:
    """Foreign things and impossible keys in the input are typed errors of their items."""
    wrong: list[Any] = ["nonsense", Get("../up"), Insert("/x", b""), Get(5), Get(None), Insert("k", "text")]  # type: ignore[arg-type]
    results = run(BatchExecutor(store), [*wrong, Insert("k", memoryview(b"fine"))])
    kinds = [UsageError, InvalidKey, InvalidKey, UsageError, UsageError, UsageError, type(None)]
    assert [type(result.error) for result in results] == kinds


def test_an_input_that_fails_is_told_last(store: Store) -> None:
    """An input that raises ends the stream with its error, after everything before it was told."""

    def input_() -> Iterator[Operation]:
        yield Insert("a", b"x")
        yield Insert("b", b"x")
        raise OSError("the file went away")

    executor = BatchExecutor(store, permits=100)
    told: list[BatchResult] = []
    with pytest.raises(OSError, match="went away"):
        list(executor.stream(input_()))
    with executor.stream(input_()) as results:
        told += [next(results), next(results)]
        with pytest.raises(OSError, match="went away"):
            next(results)
    assert sorted(result.index for result in told) == [0, 1]
    assert executor.permits.free == 100


@pytest.mark.seed("4.9")
def test_closing_early_lets_running_operations_finish(store: Store) -> None:
    """After one result the consumer closes: what is in flight lands, nothing more is pulled, and all permits return."""
    gate = Gate("put")
    pulled: list[int] = []

    def faults(request: Request) -> Fault | None:
        return None if request.key == "k0" else gate(request)

    def input_() -> Iterator[Operation]:
        for number in range(100):
            pulled.append(number)
            yield Insert(f"k{number}", b"x")

    executor = BatchExecutor(faulty(store, faults), permits=100, window=5)
    results = executor.stream(input_())
    assert next(results).index == 0
    gate.wait_for(4)
    opener = threading.Thread(target=gate.open)
    opener.start()
    results.close()
    opener.join(SOON_S)
    assert executor.permits.free == 100
    assert keys(store) == [f"k{number}" for number in pulled]
    assert len(pulled) == 5
    assert list(results) == []
    results.close()


@pytest.mark.seed("4.9")
def test_a_stream_that_is_forgotten_gives_its_permits_back(store: Store) -> None:
    """Dropped without a close, a stream holds its permits until its last operation has ended, and no longer."""
    gate = Gate("put")
    executor = BatchExecutor(faulty(store, gate), permits=10, window=2)
    results = executor.stream([ValueError("first"), Insert("a", b"x"), Insert("b", b"x")])
    assert next(results).index == 0
    gate.wait_for(1)
    del results
    gc.collect()
    assert executor.permits.free == 8
    gate.open()
    ends = time.monotonic() + SOON_S
    while executor.permits.free < 10:
        assert time.monotonic() < ends
        gc.collect()
    assert keys(store) == ["a"]


# Operations


@pytest.mark.seed("4.10")
def test_an_insert_without_a_key_gets_one(store: Store) -> None:
    """Keys are made, unique, and told."""
    results = run(BatchExecutor(store), [Insert(None, b"a"), Insert(None, b"b")])
    made = [result.key for result in results]
    assert len(set(made)) == 2
    for result, payload in zip(results, (b"a", b"b"), strict=True):
        response = result.unwrap()
        assert isinstance(response, Inserted)
        assert store.get(response.key, max_bytes=10).data == payload
        assert response.meta.size == 1


@pytest.mark.seed("4.10", "W4.5")
def test_a_payload_above_a_mebibyte_is_refused(store: Store) -> None:
    """1 MiB goes in; one byte more is a typed error of that item, and nothing is sent."""
    results = run(BatchExecutor(store), [Insert("a", bytes(1024**2)), Insert("b", bytes(1024**2 + 1))])
    assert results[0].error is None
    refused = results[1].error
    assert isinstance(refused, PayloadTooLarge)
    assert (refused.key, refused.actual, refused.limit) == ("b", 1024**2 + 1, 1024**2)
    assert keys(store) == ["a"]


@pytest.mark.seed("4.10")
def test_metadata_is_refused_where_it_cannot_be_kept(tmp_path: Path, store: Store) -> None:
    """A store that keeps bytes only says so, for that item; nothing is stored without its metadata."""
    for kept_nowhere in (LocalStore(tmp_path), store):
        results = run(BatchExecutor(kept_nowhere), [Insert("a", b"x", {"colour": "red"}), Insert("b", b"x", {})])
        assert isinstance(results[0].error, Unsupported)
        assert keys(kept_nowhere) == ["b"]


@pytest.mark.seed("4.11")
def test_what_is_missing_is_no_error(store: Store) -> None:
    """A get of a missing key has no payload; a delete of a missing key is done, twice as well as once."""
    store.put("a", b"payload")
    got, missing, gone, gone_again = run(
        BatchExecutor(store, ordered=True), [Get("a"), Get("b"), Delete("c"), Delete("c")]
    )
    response = got.unwrap()
    assert isinstance(response, Got)
    assert response.payload is not None
    assert response.payload.read() == b"payload"
    assert response.payload.meta.size == 7
    assert missing.unwrap() == Got("b", None)
    assert gone.unwrap() == gone_again.unwrap() == Deleted("c")


@pytest.mark.seed("4.12")
@pytest.mark.parametrize(
    ("operation", "kind", "permission"),
    [(Insert("k", b""), "insert", "write"), (Get("k"), "get", "read"), (Delete("k"), "delete", "delete")],
)
def test_operations_know_what_they_are(operation: Operation, kind: str, permission: str, store: Store) -> None:
    """Every operation has its key, kind and permission; without the permission it is a typed error of its item."""
    assert (operation.key, operation.kind, operation.permission) == ("k", kind, permission)
    allowed = {"read", "write", "delete"} - {permission}
    executor = BatchExecutor(faulty(store, lambda _: FailBefore()), allow=allowed)  # type: ignore[arg-type]
    (result,) = run(executor, [operation])
    assert isinstance(result.error, PermissionMissing)
    assert (result.error.permission, result.error.operation, result.error.key) == (permission, kind, "k")
    assert (result.kind, result.key) == (kind, "k")


@pytest.mark.seed("4.13")
def test_no_repr_shows_payload() -> None:
    """Operations, responses, payloads and results are shown without a byte of what they carry."""
    meta = ObjectMeta("k", 6, '"tag"')
    payload = Payload(meta, b"secret")
    shown = [
        repr(Insert("k", b"secret")),
        repr(Got("k", payload)),
        repr(BatchResult(0, Got("k", payload))),
        repr(payload),
    ]
    assert not [text for text in shown if "secret" in text]
    assert shown[:2] == ["Insert(key='k', payload=<6 bytes>)", "Got(key='k', payload=<6 bytes>)"]
    assert repr(Got("k", None)) == "Got(key='k', payload=None)"


@pytest.mark.seed("4.14")
def test_an_empty_input_has_no_results(store: Store) -> None:
    """Nothing in, nothing out, and nothing is held afterwards."""
    executor = BatchExecutor(store, permits=10)
    assert list(executor.stream([])) == []
    assert executor.permits.free == 10


@pytest.mark.seed("4.14")
def test_a_mixed_input_succeeds(store: Store) -> None:
    """Get, get of a missing key, insert and delete all succeed, each with its key."""
    store.put("key1", b"hello")
    operations = [Get("key1"), Get("nonexistent"), Insert("key2", b"world"), Delete("key1")]
    results = run(BatchExecutor(store, ordered=True), operations)
    assert [result.unwrap().key for result in results] == ["key1", "nonexistent", "key2", "key1"]
    assert keys(store) == ["key2"]


# What the seed does not do


@pytest.mark.seed("W4.2")
def test_permits_are_held_while_a_payload_is_open(store: Store) -> None:
    """A large object is read when it is asked for, and its stream's permits return when it is read or closed."""
    large = os.urandom(2 * MAX_PAYLOAD_BYTES + 5)
    store.put("large", large)
    executor = BatchExecutor(store, permits=100)
    for end in (Payload.read, Payload.close, lambda payload: None):
        (result,) = executor.stream([Get("large")])
        response = result.unwrap()
        assert isinstance(response, Got)
        payload = response.payload
        assert payload is not None
        assert payload.is_open
        assert executor.permits.free == 90
        assert end(payload) in (large, None)
        del payload, response, result
        assert executor.permits.free == 100
    (result,) = executor.stream([Get("large")])
    payload: Any = result.unwrap().payload  # type: ignore[union-attr]
    pieces = iter(payload)
    assert next(pieces) == large[:MAX_PAYLOAD_BYTES]
    store.put("large", bytes(len(large)))
    with pytest.raises(ObjectChanged):
        next(pieces)
    payload.close()
    with pytest.raises(ValueError, match="closed"):
        payload.read()


@pytest.mark.seed("W4.3")
def test_operations_on_one_key_keep_their_order(store: Store) -> None:
    """With an order per key, a get before a delete always finds the object, however many keys there are."""
    for number in range(50):
        store.put(f"k{number}", b"x")
    operations = [operation for n in range(50) for operation in (Get(f"k{n}"), Delete(f"k{n}"), Get(f"k{n}"))]
    results = run(BatchExecutor(store, window=30, ordered=True), operations)
    found = [getattr(result.unwrap(), "payload", None) is not None for result in results]
    assert found == [True, False, False] * 50


@pytest.mark.seed("W4.4")
@pytest.mark.parametrize("window", [1, 3])
def test_a_hung_operation_delays_nobody_beyond_its_deadline(store: Store, window: int) -> None:
    """It is told as too late, its place in the window is taken by the next one, and its permits do not wait for it."""
    gate = Gate("put")
    hung = faulty(store, lambda request: gate(request) if request.key == "hung" else None)
    executor = BatchExecutor(hung, permits=10, window=window, deadline_s=0.3)
    results = run(executor, [Insert("hung", b"x"), *(Insert(f"k{n}", b"x") for n in range(10))])
    late = results[0].error
    assert isinstance(late, DeadlineExceeded)
    assert (late.operation, late.key, late.deadline_s) == ("insert", "hung", 0.3)
    assert all(result.error is None for result in results[1:])
    assert executor.permits.free == 10
    gate.open()


@pytest.mark.seed("W4.4")
def test_operations_are_repeated(store: Store) -> None:
    """What fails for a passing reason is done again within the deadline; what does not pass is told."""
    script = scripted_faults({("put", 1): FailBefore(), ("put", 2): FailBefore()})
    assert run(BatchExecutor(faulty(store, script)), [Insert("a", b"x")])[0].error is None
    always = faulty(store, lambda _: FailBefore(StoreUnavailable("down", operation="get")))
    (result,) = run(BatchExecutor(always, patience_s=0.0), [Insert("a", b"x")])
    assert isinstance(result.error, StoreUnavailable)


@pytest.mark.seed("W4.5")
def test_payload_in_flight_keeps_to_the_budget(store: Store) -> None:
    """However wide the window, no more bytes than the budget are under way; a larger payload goes alone."""
    budget = ByteBudget(250)
    most = 0

    def watch(request: Request) -> Fault | None:
        nonlocal most
        most = max(most, budget.held_bytes)
        return None

    executor = BatchExecutor(faulty(store, watch), window=20, budget=budget)
    results = run(executor, [Insert(f"k{n}", bytes(100)) for n in range(40)] + [Insert("big", bytes(700))])
    assert [result.error for result in results] == [None] * 41
    assert most in (200, 700)
    gets = run(executor, [Get(f"k{n}") for n in range(10)])
    assert all(result.error is None for result in gets)
    assert budget.held_bytes == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("insert"), st.sampled_from("abc"), st.binary(max_size=8)),
            st.tuples(st.sampled_from(["get", "delete"]), st.sampled_from("abc"), st.none()),
            st.just(("error", "", None)),
        ),
        max_size=30,
    ),
    st.integers(1, 8),
    st.integers(1, 40),
)
@pytest.mark.seed("W4.3", "W4.5")
def test_an_ordered_batch_is_a_dictionary(steps: list[tuple[str, str, bytes | None]], window: int, room: int) -> None:
    """Whatever the operations, the window and the budget: with an order per key the results are those of a dict."""
    model: dict[str, bytes] = {}
    expected: list[Any] = []
    operations: list[Any] = []
    for kind, key, payload in steps:
        if kind == "insert":
            model[key] = payload or b""
            operations.append(Insert(key, payload or b""))
            expected.append("inserted")
        elif kind == "get":
            operations.append(Get(key))
            expected.append(model.get(key))
        elif kind == "delete":
            model.pop(key, None)
            operations.append(Delete(key))
            expected.append("deleted")
        else:
            operations.append(ValueError("in the input"))
            expected.append(operations[-1])
    store = open_store(f"memory://{os.urandom(8).hex()}")
    budget = ByteBudget(room)
    executor = BatchExecutor(store, window=window, ordered=True, budget=budget)

    def outcome(result: BatchResult) -> Any:
        if result.error is not None:
            return result.error
        match result.unwrap():
            case Inserted():
                return "inserted"
            case Deleted():
                return "deleted"
            case Got(payload=payload):
                return payload and payload.read()

    assert [outcome(result) for result in run(executor, operations)] == expected
    assert {key: store.get(key, max_bytes=100).data for key in keys(store)} == model
    assert (executor.permits.free, budget.held_bytes) == (500, 0)


# Coroutines


def test_an_asynchronous_batch(store: Store) -> None:
    """`astream` takes plain and asynchronous inputs and gives the same results."""

    async def input_() -> AsyncIterator[Operation]:
        for number in range(30):
            await asyncio.sleep(0)
            yield Insert(f"a{number}", b"x")

    async def main() -> None:
        executor = BatchExecutor(store, permits=100)
        for operations in (input_(), [Insert(f"b{number}", b"x") for number in range(30)]):
            async with executor.astream(operations) as results:
                assert executor.permits.free == 90
                assert sorted([result.index async for result in results]) == list(range(30))
            assert executor.permits.free == 100
        with pytest.raises(AtCapacity):
            BatchExecutor(store, permits=0).astream([])

    asyncio.run(main())
    assert len(keys(store)) == 60


def test_an_input_that_waits_delays_no_result(store: Store) -> None:
    """A result is told while the input makes the stream wait for its next operation: questions may follow answers."""

    async def main() -> None:
        asked: asyncio.Queue[Operation | None] = asyncio.Queue()

        async def input_() -> AsyncIterator[Operation]:
            while (operation := await asked.get()) is not None:
                yield operation

        async with BatchExecutor(store).astream(input_()) as results:
            for number in range(3):
                asked.put_nowait(Insert(f"k{number}", b"x"))
                assert (await asyncio.wait_for(anext(results), SOON_S)).index == number
            asked.put_nowait(None)
            assert [result async for result in results] == []

    asyncio.run(main())


@pytest.mark.seed("4.8", "4.9")
def test_an_asynchronous_batch_may_end_early(store: Store) -> None:
    """Closed after one result, in the middle of waiting for input, it lets running operations land."""
    executor = BatchExecutor(store, permits=100)
    error = ValueError("in the input")
    raised = Counter[str]()

    async def input_() -> AsyncIterator[Any]:
        try:
            yield error
            yield Insert("a", b"x")
            await asyncio.sleep(SOON_S)
        finally:
            raised["closed"] += 1

    async def main() -> None:
        async with executor.astream(input_()) as results:
            assert (await anext(results)).error is error
            assert (await anext(results)).index == 1
        assert [result async for result in results] == []

        async def broken() -> AsyncIterator[Operation]:
            yield Insert("b", b"x")
            raise OSError("the connection went away")

        results = executor.astream(broken())
        assert (await anext(results)).index == 0
        with pytest.raises(OSError, match="went away"):
            await anext(results)

    asyncio.run(main())
    assert raised["closed"] == 1
    assert executor.permits.free == 100
    assert keys(store) == ["a", "b"]


def test_an_asynchronous_batch_that_is_forgotten_gives_its_permits_back(store: Store) -> None:
    """Dropped in the middle without a close, it lets what is under way land, and gives its permits back then."""
    gate = Gate("put")
    executor = BatchExecutor(faulty(store, gate), permits=10, window=2)

    async def main() -> None:
        results = executor.astream([ValueError("first"), Insert("a", b"x"), Insert("b", b"x")])
        assert (await anext(results)).index == 0
        gate.wait_for(1)

    asyncio.run(main())
    gc.collect()
    assert executor.permits.free == 8
    gate.open()
    ends = time.monotonic() + SOON_S
    while executor.permits.free < 10:
        assert time.monotonic() < ends
    assert keys(store) == ["a"]


def test_bodies_keep_their_metadata() -> None:
    """A body in memory carries what is to be kept with it."""
    assert Body.of(b"x", metadata={"a": "b"}).metadata == {"a": "b"}
