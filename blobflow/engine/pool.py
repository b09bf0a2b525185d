"""The driver: threads that move numbered parts, and one calling thread that keeps the books.

Workers only move bytes. Everything with a consequence (checkpoints, progress, callbacks) happens in the calling
thread, which never blocks for longer than a tick: so an interrupt that arrives there, as Dagster's do, is obeyed at
once, and callbacks need no locks.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from blobflow.engine.plan import Part

TICK_S: Final = 0.25
"""How often the calling thread looks up while nothing happens."""
_JOIN_S: Final = 10.0
"""How long a stopping pool waits for workers that hang in a system call; they are daemons and hold only memory."""

Result = TypeVar("Result")
Move = Callable[[Part, memoryview], Result]
"""`move(part, buffer)` moves one part through a buffer that belongs to its worker until it returns."""


class _Outcome(Generic[Result]):
    __slots__ = ("error", "part", "result")

    def __init__(self, part: Part, result: Result | None = None, error: BaseException | None = None) -> None:
        self.part = part
        self.result = result
        self.error = error


def move_parts(
    parts: Sequence[Part],
    move: Move[Result],
    *,
    workers: int,
    buffer_size: int,
    on_moved: Callable[[Part, Result], None],
    on_tick: Callable[[], None],
) -> None:
    """Move every part, `workers` at a time, and return when all are moved.

    Memory: `min(workers, len(parts)) * buffer_size` bytes, allocated once and given back to the system at the end.

    Args:
        on_moved: Called in the calling thread after each part, in order of completion.
        on_tick: Called in the calling thread at least every `TICK_S` seconds; raising from it stops the transfer.

    Raises:
        The first error of a worker, `on_moved` or `on_tick`. Parts that finished before it have been told to
        `on_moved`, those in flight are abandoned.
    """
    outcomes: queue.SimpleQueue[_Outcome[Result]] = queue.SimpleQueue()
    pending = iter(parts)
    turn = threading.Lock()
    stopping = threading.Event()

    def work() -> None:
        with mmap.mmap(-1, buffer_size) as memory, memoryview(memory) as buffer:
            while not stopping.is_set():
                with turn:
                    part = next(pending, None)
                if part is None:
                    return
                try:
                    outcome = _Outcome(part, result=move(part, buffer))
                except BaseException as error:  # noqa: BLE001  # carried to the calling thread and raised there
                    outcome: _Outcome[Result] = _Outcome(part, error=error)
                outcomes.put(outcome)
                if outcome.error is not None:
                    return

    threads = [
        threading.Thread(target=work, name=f"blobflow-worker-{i}", daemon=True) for i in range(min(workers, len(parts)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in parts:
            outcome = _next(outcomes, on_tick)
            if outcome.error is not None:
                raise outcome.error
            on_moved(outcome.part, outcome.result)  # pyright: ignore[reportArgumentType]  # no error: a result
            on_tick()
    finally:
        stopping.set()
        for thread in threads:
            thread.join(_JOIN_S)


def _next(outcomes: queue.SimpleQueue[_Outcome[Result]], on_tick: Callable[[], None]) -> _Outcome[Result]:
    while True:
        try:
            return outcomes.get(timeout=TICK_S)
        except queue.Empty:
            on_tick()
