"""The driver: threads that move numbered parts, and one calling thread that records their results.

Workers only move bytes. Everything with a consequence (checkpoints, progress, callbacks) happens in the calling
thread, which never blocks for longer than a tick. So it obeys an interrupt at once, such as Dagster's, and callbacks
need no locks.
"""

from __future__ import annotations

import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Generic, TypeVar

from blobflow.activity import activity_of, doing
from blobflow.engine.plan import Part, Parts
from blobflow.limits import memory_budget

log = logging.getLogger(__name__)

TICK_S: Final = 0.25
"""The longest time that the calling thread blocks while nothing happens."""
STALL_S: Final = 30.0
"""Longer than a part takes on a slow link (8 MiB at 2 Mbit/s); shorter than anybody watches a still log."""
_JOIN_S: Final = 10.0
"""How long a stopping pool waits for workers that hang in a system call; they are daemons and hold only memory."""

Result = TypeVar("Result")
Move = Callable[[Part, memoryview], Result]
"""`move(part, buffer)` moves one part through a buffer that belongs to its worker until it returns."""


class _Outcome(Generic[Result]):
    __slots__ = ("error", "part", "result")

    def __init__(self, part: Part | None, result: Result | None = None, error: BaseException | None = None) -> None:
        self.part = part
        self.result = result
        self.error = error


def move_parts(
    parts: Parts,
    move: Move[Result],
    *,
    workers: int,
    buffer_size: int,
    on_moved: Callable[[Part, Result], None],
    on_tick: Callable[[], None],
) -> None:
    """Move every part, `workers` at a time, and return when all are moved.

    Memory: `min(workers, len(parts)) * buffer_size` bytes, allocated once and released at the end. A worker begins
    when its buffer fits into the budget that all transfers of the process share. If no part is finished for `STALL_S`
    seconds, the log says what each worker is waiting for.

    Args:
        on_moved: Called in the calling thread after each part, in order of completion.
        on_tick: Called in the calling thread at least every `TICK_S` seconds; an exception from it stops the transfer.

    Raises:
        The first error of a worker, `on_moved` or `on_tick`. Parts that finished before it have been passed to
        `on_moved`; those in flight are abandoned.
    """
    outcomes: queue.SimpleQueue[_Outcome[Result]] = queue.SimpleQueue()
    pending = iter(parts)
    turn = threading.Lock()
    stopping = threading.Event()

    def work() -> None:
        part: Part | None = None
        try:
            with _buffer(buffer_size, stopping) as buffer:
                while not stopping.is_set():
                    with turn:
                        part = next(pending, None)
                    if part is None:
                        return
                    outcomes.put(_Outcome(part, result=move(part, buffer)))
        except BaseException as error:  # noqa: BLE001  # carried to the calling thread and raised there
            outcomes.put(_Outcome(part, error=error))

    threads = [
        threading.Thread(target=work, name=f"blobflow-worker-{i}", daemon=True) for i in range(min(workers, len(parts)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in range(len(parts)):
            outcome = _next(outcomes, on_tick, threads)
            if outcome.error is not None:
                raise outcome.error
            on_moved(outcome.part, outcome.result)  # pyright: ignore[reportArgumentType]  # no error: a part and a result
            on_tick()
    finally:
        stopping.set()
        for thread in threads:
            thread.join(_JOIN_S)


@contextmanager
def _buffer(size: int, stopping: threading.Event) -> Generator[memoryview]:
    """A buffer inside the budget of the process: first the permit, then the memory."""
    with doing(f"waiting for {size} bytes of the memory budget"):
        while not memory_budget.acquire(size, timeout_s=TICK_S):
            if stopping.is_set():
                yield memoryview(b"")
                return
    try:
        memory = mmap.mmap(-1, size)
        try:
            with memoryview(memory) as buffer:
                yield buffer
        finally:
            # Slices that live on in an error's traceback keep the memory mapped until they are gone.
            with suppress(BufferError):
                memory.close()
    finally:
        memory_budget.release(size)


def _next(
    outcomes: queue.SimpleQueue[_Outcome[Result]], on_tick: Callable[[], None], threads: Sequence[threading.Thread]
) -> _Outcome[Result]:
    explain_at = time.monotonic() + STALL_S
    while True:
        try:
            return outcomes.get(timeout=TICK_S)
        except queue.Empty:
            on_tick()
        if time.monotonic() >= explain_at:
            explain_at = time.monotonic() + STALL_S
            doings = "; ".join(activity_of(thread.ident) for thread in threads if thread.is_alive())
            log.warning("transfer.stalled seconds_without_a_part=%g workers=[%s]", STALL_S, doings)
