"""When operations run: a window of them at a time, pulled lazily; results are returned in the order of completion.

`Window` decides and does no I/O; it belongs to the consumer's thread. The two streams feed it with input and
outcomes, one for threads that wait, one for coroutines that await. `Share` counts the users of the permits.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from queue import SimpleQueue
from typing import Any, Final, TypeAlias, cast

from typing_extensions import Self

from blobflow.backoff import DEFAULT_PATIENCE_S
from blobflow.batch.operations import (
    ALL_PERMISSIONS,
    PIECE_BYTES,
    BatchResult,
    Delete,
    Get,
    Got,
    Insert,
    Operation,
    Payload,
    Permission,
)
from blobflow.batch.runners import (
    Deliver,
    LoopRunner,
    Outcome,
    ProcessWorker,
    Runner,
    StoreFactory,
    StoreWorker,
    Task,
    ThreadRunner,
)
from blobflow.errors import AtCapacity, BlobflowError, PayloadTooLarge, PermissionMissing, SlowDown, UsageError
from blobflow.limits import AdaptiveLimit, ByteBudget, Permits, memory_budget
from blobflow.stores.base import ObjectMeta, Store, check_key
from blobflow.stores.optional import coroutines_of
from blobflow.stores.retry import RetryingStore

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
"""Maximum bytes of an insert; larger objects deserve an upload that can be resumed."""
DEFAULT_PERMITS: Final = 500
DEFAULT_FRACTION: Final = 0.10
DEFAULT_DEADLINE_S: Final = 300.0
"""More than a silent server (120 s) and the patience with a failing one (120 s) together; anything longer hangs."""
DEFAULT_SLOW_S: Final = 10.0
"""Longer than a small request takes anywhere, unless too many of them share a link or a server."""

_BUDGET_TICK_S: Final = 0.05

Item: TypeAlias = Operation | BaseException
Input: TypeAlias = Iterable[Item]
AsyncInput: TypeAlias = AsyncIterable[Item]


class Share:
    """The permits and bytes of a stream; they are released when the last user leaves.

    The stream itself, each operation under way, and each open payload enter once and leave once.
    """

    def __init__(self, permits: Permits, count: int, budget: ByteBudget) -> None:
        self.budget = budget
        self._permits = permits
        self._count = count
        self._users = 1
        self._held_bytes = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self, users: int = 1) -> None:
        with self._lock:
            self._users -= users
            if self._users:
                return
            held, self._held_bytes = self._held_bytes, 0
        self._permits.give_back(self._count)
        if held:
            self.budget.release(held)

    def hold(self, size: int, *, timeout_s: float = 0.0) -> bool:
        """Take bytes of the budget; they are released with the share at the latest."""
        if not self.budget.acquire(size, timeout_s=timeout_s):
            return False
        with self._lock:
            self._held_bytes += size
        return True

    def let_go(self, size: int) -> None:
        """Release bytes."""
        with self._lock:
            size = min(size, self._held_bytes)
            self._held_bytes -= size
        if size:
            self.budget.release(size)

    def payload(self, store: Callable[[], Store], meta: ObjectMeta) -> Payload:
        """An open payload; the permits are held while it is open."""
        self.enter()

        def read(offset: int, length: int) -> bytes:
            return store().get_range(meta.key, offset, length, e_tag=meta.e_tag)

        return Payload(meta, None, read, self.leave)


class Window:
    """Decides what to pull, what to begin, and which result is next.

    Args:
        begin: Begins a task; its outcome comes back through `settle`.
        slow_downs: Returns how often the store has sent SlowDown so far.
    """

    def __init__(
        self,
        size: int,
        share: Share,
        begin: Callable[[Task], None],
        *,
        allow: Collection[Permission],
        ordered: bool,
        max_payload_bytes: int,
        slow_s: float,
        slow_downs: Callable[[], int],
    ) -> None:
        self.limit = AdaptiveLimit(size)
        self.outstanding = 0
        """Tasks that began and have no outcome yet."""
        self.blocked: Task | None = None
        """The task that waits for bytes of the budget; nothing is pulled after it."""
        self.exhausted = False
        self.input_error: BaseException | None = None
        """The exception of the input; reported after everything before it."""
        self._share = share
        self._begin = begin
        self._allow = allow
        self._ordered = ordered
        self._max_payload_bytes = max_payload_bytes
        self._slow_s = slow_s
        self._slow_downs = slow_downs
        self._slow_downs_seen = slow_downs()
        self._pulled = 0
        self._told = 0
        self._ready: deque[tuple[BatchResult, int]] = deque()
        self._behind: dict[str, deque[Task]] = {}
        """Key -> tasks that wait for the operation under way on it, if order per key is kept."""

    @property
    def wants_input(self) -> bool:
        """Whether the next item may be pulled: at most a window of items is pulled and not yet reported."""
        return not self.exhausted and self.blocked is None and self._pulled - self._told < self.limit.window

    def accept(self, item: Item) -> None:
        """Take the next item of the input."""
        index = self._pulled
        self._pulled += 1
        if isinstance(item, BaseException):
            self._ready.append((BatchResult(index, error=item), 0))
            return
        try:
            key, size = self._checked(item)
        except BlobflowError as error:
            self._ready.append(
                (BatchResult(index, error=error, kind=getattr(item, "kind", ""), key=getattr(item, "key", None)), 0)
            )
            return
        task = Task(index, item, key, size)
        if size and not self._share.hold(size):
            self.blocked = task
        else:
            self._queue(task)

    def _checked(self, item: object) -> tuple[str, int]:
        """The key of an operation, and the bytes of the budget that it needs."""
        if not isinstance(item, Insert | Get | Delete):
            raise UsageError(
                f"{type(item).__name__} is not an operation",
                hint="a batch takes Insert, Get and Delete, and errors, which it passes through",
            )
        if item.permission not in self._allow:
            raise PermissionMissing(
                f"{item.kind} {item.key!r}: this batch has no permission to {item.permission}",
                operation=item.kind,
                key=item.key,
                permission=item.permission,
            )
        if not isinstance(item.key, str) and not (isinstance(item, Insert) and item.key is None):
            raise UsageError(f"{item.kind}: a key is text, not {type(item.key).__name__}")
        if isinstance(item, Insert):
            payload = cast("object", item.payload)
            if not isinstance(payload, bytes | bytearray | memoryview):
                raise UsageError(f"insert {item.key!r}: a payload is bytes, not {type(payload).__name__}")
            size = memoryview(item.payload).nbytes
            if size > self._max_payload_bytes:
                raise PayloadTooLarge(
                    f"insert {item.key!r}: {size} bytes are more than {self._max_payload_bytes}",
                    key=item.key,
                    actual=size,
                    limit=self._max_payload_bytes,
                )
            return check_key(uuid.uuid4().hex if item.key is None else item.key), size
        return check_key(item.key), PIECE_BYTES if isinstance(item, Get) else 0

    def unblock(self, *, timeout_s: float = 0.0) -> None:
        """Begin the task that waits for bytes, if enough are free now."""
        if self.blocked is not None and self._share.hold(self.blocked.held_bytes, timeout_s=timeout_s):
            task, self.blocked = self.blocked, None
            self._queue(task)

    def _queue(self, task: Task) -> None:
        if self._ordered:
            waiting = self._behind.get(task.key)
            if waiting is not None:
                waiting.append(task)
                return
            self._behind[task.key] = deque()
        self._start(task)

    def _start(self, task: Task) -> None:
        self.outstanding += 1
        self._share.enter()
        task.epoch = self.limit.epoch
        task.begun_at = time.monotonic()
        self._begin(task)

    def settle(self, outcome: Outcome) -> None:
        """Take the outcome of a task."""
        task, response, error = outcome
        self.outstanding -= 1
        self.limit.answered(task.epoch, self._is_slow(task, error))
        held = task.held_bytes
        if isinstance(response, Got) and response.payload is not None and not response.payload.is_open:
            held = response.payload.size  # the part of the reserved bytes that it uses
        elif held:
            held = 0
        self._share.let_go(task.held_bytes - held)
        self._ready.append((BatchResult(task.index, response, error, task.operation.kind, task.key), held))
        if self._ordered:
            waiting = self._behind[task.key]
            if waiting:
                self._start(waiting.popleft())
            else:
                del self._behind[task.key]
        self.unblock()

    def _is_slow(self, task: Task, error: BlobflowError | None) -> bool:
        said = self._slow_downs()
        asked = said != self._slow_downs_seen or isinstance(error, SlowDown)
        self._slow_downs_seen = said
        return asked or time.monotonic() - task.begun_at > self._slow_s

    def tell(self) -> BatchResult | None:
        """The next result, if there is one."""
        if not self._ready:
            return None
        result, held = self._ready.popleft()
        self._told += 1
        if held:
            self._share.let_go(held)
        if self.blocked is not None:
            self.unblock()
        return result

    def drop(self) -> None:
        """Pull nothing more and begin nothing more; close payloads that will not be reported."""
        self.exhausted = True
        self.blocked = None
        for waiting in self._behind.values():
            waiting.clear()
        while self._ready:
            result, _ = self._ready.popleft()
            if isinstance(result.response, Got) and result.response.payload is not None:
                result.response.payload.close()

    def __repr__(self) -> str:
        window = f"window {self.limit.window} of {self.limit.maximum}"
        return f"{self._pulled} pulled, {self.outstanding} under way, {self._told} reported, {window}"


class BatchStream(Iterator[BatchResult]):
    """The results of a batch as they complete. Use it in a `with` block, or call `close`.

    One thread iterates. An input that blocks it delays results that are ready; `BatchExecutor.astream` does not.

    Attributes:
        window: Permits that the stream holds.
    """

    def __init__(self, make: Callable[[Deliver], tuple[Window, Runner, Share]], operations: Input) -> None:
        self._mail: SimpleQueue[list[Outcome]] = SimpleQueue()
        self._closed = True  # until there is something to close
        self._state, self._runner, self._share = make(self._mail.put)
        self._closed = False
        self.window = self._state.limit.maximum
        self._operations = operations
        self._input: Iterator[Item] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BatchResult:
        if self._closed:
            raise StopIteration
        state = self._state
        while True:
            while state.wants_input:
                self._pull()
            if (result := state.tell()) is not None:
                return result
            if state.outstanding:
                for outcome in self._mail.get():
                    state.settle(outcome)
            elif state.blocked is not None:
                state.unblock(timeout_s=_BUDGET_TICK_S)
            else:
                self.close()
                raise state.input_error or StopIteration

    def _pull(self) -> None:
        try:
            if self._input is None:
                self._input = iter(self._operations)
            self._state.accept(next(self._input))
        except StopIteration:
            self._state.exhausted = True
        except Exception as error:  # noqa: BLE001  # raised again when everything before it is reported
            self._state.exhausted = True
            self._state.input_error = error

    def close(self) -> None:
        """Pull nothing more, let operations under way end, and release the permits; may be called again.

        Operations that were pulled but have not begun are dropped. It waits no longer than the deadline.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._state.drop()
            while self._state.outstanding:
                for outcome in self._mail.get():
                    self._state.settle(outcome)
            self._state.drop()
        finally:
            self._runner.stop()
            self._share.leave()
        self._runner.join()
        close = getattr(self._input, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:  # without waiting; operations under way end on their own
            self._closed = True
            self._state.drop()
            self._runner.stop()
            self._share.leave()

    def __repr__(self) -> str:
        return f"<BatchStream {'closed' if self._closed else 'open'}: {self._state!r}>"


class AsyncBatchStream(AsyncIterator[BatchResult]):
    """`BatchStream` for a coroutine. Use it in an `async with` block, or await `aclose`.

    While it waits for an asynchronous input, it returns results that are ready.
    """

    def __init__(self, make: Callable[[Deliver], tuple[Window, Runner, Share]], operations: Input | AsyncInput) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._closed = True
        # Not through the stream itself: its runner would keep it alive for ever.
        weakly = weakref.WeakMethod(self._deliver)
        self._state, self._runner, self._share = make(lambda outcomes: _call(weakly(), outcomes))
        self._closed = False
        self.window = self._state.limit.maximum
        self._operations = operations
        self._input: Iterator[Item] | AsyncIterator[Item] | None = None
        self._pulling: asyncio.Future[Item] | None = None

    def _deliver(self, outcomes: list[Outcome]) -> None:
        with suppress(RuntimeError):  # the loop is closed, and the stream with it
            self._loop.call_soon_threadsafe(self._take, outcomes)

    def _take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._state.settle(outcome)
        if self._closed:
            self._state.drop()
        self._arrived.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BatchResult:
        if self._closed:
            raise StopAsyncIteration
        state = self._state
        while True:
            self._pull()
            if (result := state.tell()) is not None:
                return result
            if state.outstanding or self._pulling is not None:
                self._arrived.clear()
                if self._pulling is None or not self._pulling.done():
                    await self._arrived.wait()
            elif state.blocked is not None:
                await asyncio.sleep(_BUDGET_TICK_S)
                state.unblock()
            else:
                await self.aclose()
                raise state.input_error or StopAsyncIteration

    def _pull(self) -> None:
        state = self._state
        try:
            if self._input is None:
                given = self._operations
                self._input = aiter(given) if isinstance(given, AsyncIterable) else iter(given)
            source = self._input
            if isinstance(source, AsyncIterator):
                if self._pulling is not None and self._pulling.done():
                    pulled, self._pulling = self._pulling, None
                    state.accept(pulled.result())
                if self._pulling is None and state.wants_input:
                    self._pulling = asyncio.ensure_future(_awaited(anext(source)))
                    self._pulling.add_done_callback(lambda _: self._arrived.set())
            else:
                while state.wants_input:
                    state.accept(next(source))
        except (StopIteration, _Ended):
            state.exhausted = True
        except Exception as error:  # noqa: BLE001  # raised again when everything before it is reported
            state.exhausted = True
            state.input_error = error

    async def aclose(self) -> None:
        """See `BatchStream.close`."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._pulling is not None:
                self._pulling.cancel()
                await asyncio.wait([self._pulling])
            self._state.drop()
            while self._state.outstanding:
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            self._runner.stop()
            self._share.leave()
        await asyncio.to_thread(self._runner.join)
        close = getattr(self._input, "aclose", None) or getattr(self._input, "close", None)
        if close is not None and (closing := close()) is not None:
            await closing

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._closed:
            self._closed = True
            self._state.drop()
            self._runner.stop()
            self._share.leave()

    def __repr__(self) -> str:
        return f"<AsyncBatchStream {'closed' if self._closed else 'open'}: {self._state!r}>"


def _call(deliver: Deliver | None, outcomes: list[Outcome]) -> None:
    if deliver is not None:
        deliver(outcomes)


class _Ended(Exception):
    """The end of an asynchronous input; StopAsyncIteration itself cannot pass through a future."""


async def _awaited(item: Awaitable[Item]) -> Item:
    try:
        return await item
    except StopAsyncIteration:
        raise _Ended from None


class BatchExecutor:
    """Executes many small operations on a store, a window of them at a time.

    ```python
    executor = BatchExecutor(open_store("s3://bucket/prefix"))
    with executor.stream(Insert(f"tiles/{n}", tile) for n, tile in tiles) as results:
        for result in results:
            if result.error:
                print(result.index, result.error)
    ```

    Results come in the order of completion, each with its index in the input. An operation that fails, raises, hangs or
    kills its process affects only its own item. On S3 one thread sends thousands of small requests per second; on other
    stores each operation of the window has a thread.

    Args:
        store: The store of the operations. With `processes`, a function that opens the store, because a store cannot be
            sent to another process: `functools.partial(open_store, url, ...)`.
        permits: Concurrent operations over all streams of this executor, or a `Permits` that several executors share.
        fraction: Share of the free permits that a stream takes when it begins, rounded up.
        window: Permits that a stream takes instead; fewer if no more are free.
        deadline_s: Seconds after which an operation under way is given up; None: never.
        ordered: Execute operations on one key one after the other, in the order of the input.
        allow: Permitted operations; others fail with `PermissionMissing`.
        max_payload_bytes: Maximum bytes of an insert, at most 1 MiB.
        budget: Budget for payload bytes in flight; by default that of all transfers of the process.
        slow_s: An operation that takes longer halves the window of its stream, as a SlowDown of the store does. The
            window grows again by one for each window of faster operations.
        patience_s: Seconds during which temporary failures are retried, if the store does not retry itself; stores
            from `open_store` do.
        processes: Execute the operations in that many processes, for stores whose client may crash.
    """

    def __init__(
        self,
        store: Store | StoreFactory,
        *,
        permits: Permits | int = DEFAULT_PERMITS,
        fraction: float = DEFAULT_FRACTION,
        window: int | None = None,
        deadline_s: float | None = DEFAULT_DEADLINE_S,
        ordered: bool = False,
        allow: Collection[Permission] = ALL_PERMISSIONS,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        budget: ByteBudget | None = None,
        slow_s: float = DEFAULT_SLOW_S,
        patience_s: float = DEFAULT_PATIENCE_S,
        processes: int = 0,
    ) -> None:
        for wrong, message in (
            (not 0 < fraction <= 1, f"the fraction of the permits must be above 0 and at most 1, not {fraction}"),
            (window is not None and window < 1, f"the window must be 1 operation or more, not {window}"),
            (deadline_s is not None and deadline_s <= 0, f"the deadline must be above 0 s, not {deadline_s} s"),
            (not 0 <= max_payload_bytes <= MAX_PAYLOAD_BYTES, f"max_payload_bytes must be 0 to {MAX_PAYLOAD_BYTES}"),
            (processes < 0, f"the number of processes must be 0 or more, not {processes}"),
            (unknown := set(allow) - ALL_PERMISSIONS, f"there is no permission {unknown and min(unknown)!r}"),
            (
                isinstance(store, Store) == bool(processes),
                "processes need a function that opens the store in each of them, and threads an open store",
            ),
        ):
            if wrong:
                raise UsageError(message)
        self.permits = permits if isinstance(permits, Permits) else Permits(permits)
        self._open_store: StoreFactory | None = None
        self._retrying: RetryingStore | None = None
        if isinstance(store, Store):
            self._retrying = _with_retries(store, patience_s)
        else:
            self._open_store = store
        self._patience_s = patience_s
        self._fraction = Fraction(str(fraction))
        self._window = window
        self._deadline_s = deadline_s
        self._ordered = ordered
        self._allow = frozenset(allow)
        self._max_payload_bytes = max_payload_bytes
        self._budget = budget
        self._slow_s = slow_s
        self._processes = processes

    def stream(self, operations: Input) -> BatchStream:
        """Take a window of permits and return the results of the operations, which are pulled on demand.

        Args:
            operations: `Insert`, `Get`, `Delete`; an error among them becomes the result in its place.

        Raises:
            AtCapacity: no permit is free; no input was read.
            StoreConfigurationError: the store's configuration does not say where to send requests.
        """
        return BatchStream(self._make, operations)

    def astream(self, operations: Input | AsyncInput) -> AsyncBatchStream:
        """`stream` for a coroutine; the input may be asynchronous.

        Raises:
            AtCapacity: no permit is free; no input was read.
        """
        return AsyncBatchStream(self._make, operations)

    def _make(self, deliver: Deliver) -> tuple[Window, Runner, Share]:
        coroutines = coroutines_of(self._retrying) if self._retrying is not None else None
        count = self.permits.take(self._wanted)
        if not count:
            raise AtCapacity(f"all {self.permits.limit} permits are taken", limit=self.permits.limit)
        share = Share(self.permits, count, self._budget or memory_budget)

        def delivered(outcomes: list[Outcome]) -> None:
            deliver(outcomes)
            share.leave(len(outcomes))

        def open_payload(meta: ObjectMeta) -> Payload:
            return share.payload(self._store, meta)

        try:
            if coroutines is not None:
                store = self._store()
                runner: Runner = LoopRunner(coroutines, store, open_payload, delivered, self._deadline_s)
            else:
                deadline_s = None if self._processes else self._deadline_s
                runner = ThreadRunner(self._worker(open_payload), delivered, deadline_s)
            window = Window(
                count,
                share,
                runner.begin,
                allow=self._allow,
                ordered=self._ordered,
                max_payload_bytes=self._max_payload_bytes,
                slow_s=self._slow_s,
                slow_downs=self._slow_downs,
            )
        except BaseException:
            share.leave()
            raise
        return window, runner, share

    def _worker(self, open_payload: Callable[[ObjectMeta], Payload]) -> Callable[[], Any]:
        if self._open_store is not None:
            opened = _Opening(self._open_store, self._patience_s)
            return lambda: ProcessWorker(opened, open_payload, self._deadline_s)
        shared = StoreWorker(self._store(), open_payload)
        return lambda: shared

    def _wanted(self, free: int) -> int:
        wanted = math.ceil(free * self._fraction) if self._window is None else self._window
        return min(wanted, self._processes) if self._processes else wanted

    def _store(self) -> Store:
        if self._retrying is None:
            assert self._open_store is not None
            self._retrying = _with_retries(self._open_store(), self._patience_s)
        return self._retrying

    def _slow_downs(self) -> int:
        return self._retrying.slow_downs if self._retrying is not None else 0

    def __repr__(self) -> str:
        return f"<BatchExecutor {self._retrying or self._open_store!r}, {self.permits!r}>"


def _with_retries(store: Store, patience_s: float) -> RetryingStore:
    return store if isinstance(store, RetryingStore) else RetryingStore(store, patience_s=patience_s)


class _Opening:
    """Opens a store with retries; can be sent to a process if `open_store` can."""

    def __init__(self, open_store: StoreFactory, patience_s: float) -> None:
        self._open_store = open_store
        self._patience_s = patience_s

    def __call__(self) -> Store:
        return _with_retries(self._open_store(), self._patience_s)
