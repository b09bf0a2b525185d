"""Runners, which execute operations: in threads, in processes with a thread for each, or as coroutines of one thread.

A runner begins a task and delivers its outcome exactly once: the store's response, an error, or an exceeded deadline.
An outcome is a value, so an exception in an operation affects no other. Runners know nothing of windows, and nobody
waits for them: they call `deliver` in their threads.
"""

from __future__ import annotations

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from typing_extensions import override

from blobflow.batch.operations import PIECE_BYTES, Deleted, Get, Got, Insert, Inserted, Operation, Payload, Response
from blobflow.errors import (
    BlobflowError,
    DeadlineExceeded,
    ObjectNotFound,
    ObjectTooLarge,
    OperationCrashed,
    StoreUnavailable,
    WorkerDied,
)
from blobflow.stores.base import Body, ObjectMeta, Store
from blobflow.stores.optional import Coroutines
from blobflow.untrusted import plain

if TYPE_CHECKING:
    import asyncio

_JOIN_S: Final = 10.0
"""Seconds that the end of a stream waits for idle threads."""

StoreFactory: TypeAlias = Callable[[], Store]


class Task:
    """One operation under way."""

    __slots__ = ("begun_at", "deadline_at", "ended", "epoch", "held_bytes", "index", "key", "operation")

    def __init__(self, index: int, operation: Operation, key: str, held_bytes: int) -> None:
        self.index = index
        self.operation = operation
        self.key = key
        self.held_bytes = held_bytes
        """Bytes held of the budget."""
        self.epoch = 0
        """Epoch of the adaptive limit when the task began."""
        self.begun_at = 0.0
        self.deadline_at = 0.0
        self.ended = False
        """Whether its outcome is decided; a second outcome is too late."""


class Outcome(NamedTuple):
    """The outcome of a task; either `response` or `error` is None."""

    task: Task
    response: Response | None
    error: BlobflowError | None


Deliver: TypeAlias = Callable[[list[Outcome]], None]
OpenPayload: TypeAlias = Callable[[ObjectMeta], Payload]
"""Makes a payload for an object that is too large to be read at once."""


class Runner(ABC):
    """Executes tasks; see the module."""

    @abstractmethod
    def begin(self, task: Task) -> None:
        """Begin a task; never waits for it."""

    @abstractmethod
    def stop(self) -> None:
        """Accept no more tasks; the runner ends after those under way. May be called again."""

    @abstractmethod
    def join(self) -> None:
        """Wait until the runner has ended; tasks past their deadline are not waited for."""


def perform(store: Store, operation: Operation, key: str, open_payload: OpenPayload) -> Response:
    """Execute an operation."""
    if isinstance(operation, Insert):
        return Inserted(key, store.put(key, Body.of(operation.payload, metadata=operation.metadata)))
    if isinstance(operation, Get):
        try:
            found = store.get(key, max_bytes=PIECE_BYTES)
            return Got(key, Payload(found.meta, found.data))
        except ObjectNotFound:
            return Got(key, None)
        except ObjectTooLarge:
            return _large(key, lambda: store.head(key), open_payload)
    store.delete(key)
    return Deleted(key)


def _large(key: str, head: Callable[[], ObjectMeta], open_payload: OpenPayload) -> Got:
    try:
        return Got(key, open_payload(head()))
    except ObjectNotFound:  # removed in between
        return Got(key, None)


def _failure(task: Task, error: BaseException) -> BlobflowError:
    """The error for an item."""
    if isinstance(error, BlobflowError):
        return error
    kind, key = task.operation.kind, task.key
    crash = OperationCrashed(
        f"{kind} {key!r}: {type(error).__name__}: {plain(str(error))}",
        operation=kind,
        key=key,
        error=type(error).__name__,
    )
    crash.__cause__ = error
    return crash


def _too_late(task: Task, deadline_s: float) -> DeadlineExceeded:
    kind, key = task.operation.kind, task.key
    return DeadlineExceeded(
        f"{kind} {key!r}: not done after {deadline_s:g} s", operation=kind, key=key, deadline_s=deadline_s
    )


# Threads


class Worker(ABC):
    """What a thread uses to execute tasks."""

    @abstractmethod
    def perform(self, task: Task) -> Response:
        """Execute the task's operation."""

    def close(self) -> None:
        """Release everything; called when the thread ends."""


class StoreWorker(Worker):
    """Calls the store in the thread itself; all threads share one."""

    def __init__(self, store: Store, open_payload: OpenPayload) -> None:
        self._store = store
        self._open_payload = open_payload

    @override
    def perform(self, task: Task) -> Response:
        return perform(self._store, task.operation, task.key, self._open_payload)


class ThreadRunner(Runner):
    """A thread for each concurrent task; threads are kept for later tasks.

    A thread cannot be interrupted. One that is still busy at its deadline is given up: its task gets an outcome, and
    another thread replaces it. It ends when its call returns.

    Args:
        deadline_s: Seconds from the start of a task; None if the workers enforce it.
    """

    def __init__(self, make_worker: Callable[[], Worker], deliver: Deliver, deadline_s: float | None) -> None:
        self._make_worker = make_worker
        self._deliver = deliver
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._running: dict[Task, None] = {}
        """Tasks in the order of their deadlines."""
        self._threads: set[threading.Thread] = set()
        """All threads except those that were given up."""
        self._by_task: dict[Task, threading.Thread] = {}
        self._idle = 0
        self._stopped = False
        self._watcher: threading.Thread | None = None

    @override
    def begin(self, task: Task) -> None:
        with self._changed:
            if self._deadline_s is not None:
                task.deadline_at = task.begun_at + self._deadline_s
                if self._watcher is None:
                    self._watcher = threading.Thread(target=self._watch, name="blobflow-batch-watch", daemon=True)
                    self._watcher.start()
                elif not self._running:
                    self._changed.notify()
            self._running[task] = None
            needed = not self._idle
            if not needed:
                self._idle -= 1
        if needed:
            thread = threading.Thread(target=self._work, name="blobflow-batch", daemon=True)
            with self._changed:
                self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                with self._changed:
                    self._threads.discard(thread)
                message = f"no thread for {task.key!r}: {error}"
                self._end(task, None, StoreUnavailable(message, operation=task.operation.kind, key=task.key))
                return
        self._queue.put(task)

    def _work(self) -> None:
        worker = self._make_worker()
        me = threading.current_thread()
        try:
            while (task := self._queue.get()) is not None:
                with self._changed:
                    if task.ended:  # its deadline passed before a thread took it
                        self._idle += 1
                        continue
                    self._by_task[task] = me
                response = error = None
                try:
                    response = worker.perform(task)
                except BaseException as raised:  # noqa: BLE001  # it belongs to the item
                    error = _failure(task, raised)
                if not self._end(task, response, error, idle=1):
                    if isinstance(response, Got) and response.payload is not None:
                        response.payload.close()
                    return
                del task, response, error
        finally:
            worker.close()
            with self._changed:
                self._threads.discard(me)

    def _end(self, task: Task, response: Response | None, error: BlobflowError | None, *, idle: int = 0) -> bool:
        """Decide a task's outcome, unless it is decided already."""
        with self._changed:
            if task.ended:
                return False
            task.ended = True
            del self._running[task]
            self._by_task.pop(task, None)
            self._idle += idle
            if self._stopped:
                self._changed.notify()
        self._deliver([Outcome(task, response, error)])
        return True

    def _watch(self) -> None:
        deadline_s = self._deadline_s
        assert deadline_s is not None
        while True:
            with self._changed:
                oldest = next(iter(self._running), None)
                if oldest is None and self._stopped:
                    return
                left_s = None if oldest is None else oldest.deadline_at - time.monotonic()
                if oldest is None or left_s is None or left_s > 0:
                    self._changed.wait(left_s)
                    continue
                thread = self._by_task.get(oldest)
                if thread is not None:
                    self._threads.discard(thread)
            self._end(oldest, None, _too_late(oldest, deadline_s))

    @override
    def stop(self) -> None:
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify()
            threads = len(self._threads)
        for _ in range(threads):
            self._queue.put(None)

    @override
    def join(self) -> None:
        with self._changed:
            threads = [*self._threads, *([self._watcher] if self._watcher else [])]
        for thread in threads:
            thread.join(_JOIN_S)


# Processes


class ProcessWorker(Worker):
    """Sends each operation to a separate process, which is started on demand and replaced when it dies.

    Args:
        open_store: Opens the store in the process; it is pickled for that.
        deadline_s: A process that is busy for longer is killed.
    """

    def __init__(self, open_store: StoreFactory, open_payload: OpenPayload, deadline_s: float | None) -> None:
        self._open_store = open_store
        self._open_payload = open_payload
        self._deadline_s = deadline_s
        self._process: Any = None
        self._connection: Connection[Any, Any] | None = None

    @override
    def perform(self, task: Task) -> Response:
        connection = self._connection or self._start()
        operation = task.operation
        if isinstance(operation, Insert):
            operation = Insert(task.key, bytes(operation.payload), operation.metadata)
        try:
            connection.send((operation, task.key))
            if not connection.poll(self._deadline_s):
                self._process.kill()
                self.close()
                raise _too_late(task, self._deadline_s or 0.0)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            process = self._process
            self.close()
            kind, key = task.operation.kind, task.key
            raise WorkerDied(
                f"{kind} {key!r}: its process ended with exit code {process.exitcode}",
                operation=kind,
                key=key,
                status=process.exitcode,
            ) from error
        if isinstance(answer, BlobflowError):
            raise answer
        if isinstance(answer, ObjectMeta):
            return Got(task.key, self._open_payload(answer))
        return answer

    def _start(self) -> Connection[Any, Any]:
        # Never a fork: connections, locks and threads of this process cannot be used in another.
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._open_store), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = ours
        return ours

    @override
    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._process.join(_JOIN_S)
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join()


def _serve(connection: Connection[Any, Any], open_store: StoreFactory) -> None:
    """The process: executes what it receives until its parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    store: Store | None = None
    try:
        while True:
            operation, key = connection.recv()
            try:
                store = store or open_store()
                answer: Any = _plain(perform(store, operation, key, lambda meta: Payload(meta, None)))
            except Exception as error:  # noqa: BLE001  # it belongs to the item
                answer = _failure(Task(0, operation, key, 0), error)
            connection.send(answer)
    except EOFError:
        pass
    finally:
        if store is not None:
            store.close()


def _plain(response: Response) -> Any:
    """A response in a form that can be sent; only the metadata of an object that is too large."""
    if isinstance(response, Got) and response.payload is not None and response.payload.size > PIECE_BYTES:
        return response.payload.meta
    return response


# Coroutines


class LoopRunner(Runner):
    """All tasks as coroutines of one event loop, in a separate thread.

    Outcomes are delivered together, once per turn of the loop, and tasks are taken likewise. So the threads wake each
    other a few times per window instead of twice per operation.
    """

    def __init__(
        self,
        coroutines: Coroutines,
        store: Store,
        open_payload: OpenPayload,
        deliver: Deliver,
        deadline_s: float | None,
    ) -> None:
        import asyncio  # takes 40 ms to import, and only this runner needs it

        self._asyncio = asyncio
        self._coroutines = coroutines
        self._store = store
        self._open_payload = open_payload
        self._deliver = deliver
        self._deadline_s = deadline_s
        self._pending: deque[Task] = deque()
        self._called = False
        self._running: dict[Task, asyncio.Task[None]] = {}
        self._outcomes: list[Outcome] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(started)), name="blobflow-batch-loop", daemon=True
        )
        self._thread.start()
        started.wait()

    async def _main(self, started: threading.Event) -> None:
        self._loop = self._asyncio.get_running_loop()
        self._over = self._loop.create_future()
        started.set()
        try:
            await self._over
        finally:
            await self._coroutines.close()

    @override
    def begin(self, task: Task) -> None:
        self._pending.append(task)
        self._call()

    @override
    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._called = False
            self._call()

    @override
    def join(self) -> None:
        self._thread.join(_JOIN_S)

    def _call(self) -> None:
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._called = False  # before the check: a task that comes later calls again
        while self._pending:
            task = self._pending.popleft()
            self._running[task] = self._loop.create_task(self._run(task))
        if self._deadline_s is not None and self._timer is None and self._running:
            self._look()
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._stopped and not self._running and not self._outcomes and not self._over.done():
            self._over.set_result(None)

    async def _run(self, task: Task) -> None:
        response = error = None
        try:
            response = await self._perform(task)
        except self._asyncio.CancelledError:
            error = _too_late(task, self._deadline_s or 0.0)
        except BaseException as raised:  # noqa: BLE001  # it belongs to the item
            error = _failure(task, raised)
        del self._running[task]
        if not self._outcomes:
            self._loop.call_soon(self._flush)
        self._outcomes.append(Outcome(task, response, error))

    async def _perform(self, task: Task) -> Response:
        operation, key = task.operation, task.key
        if isinstance(operation, Insert):
            return Inserted(
                key, await self._coroutines.put(key, Body.of(operation.payload, metadata=operation.metadata))
            )
        if isinstance(operation, Get):
            try:
                found = await self._coroutines.get(key, max_bytes=PIECE_BYTES)
                return Got(key, Payload(found.meta, found.data))
            except ObjectNotFound:
                return Got(key, None)
            except ObjectTooLarge:
                pass
            return await self._asyncio.to_thread(_large, key, lambda: self._store.head(key), self._open_payload)
        await self._coroutines.delete(key)
        return Deleted(key)

    def _flush(self) -> None:
        outcomes, self._outcomes = self._outcomes, []
        self._deliver(outcomes)
        self._end_if_over()

    def _look(self) -> None:
        """Cancel tasks past their deadline, and schedule the next check."""
        deadline_s = self._deadline_s
        assert deadline_s is not None
        now = time.monotonic()
        for task, running in self._running.items():  # the oldest first
            left_s = task.begun_at + deadline_s - now
            if left_s > 0:
                self._timer = self._loop.call_later(left_s, self._look)
                return
            running.cancel()
        self._timer = None
