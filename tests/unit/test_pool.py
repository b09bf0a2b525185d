"""The pool: workers that move bytes, one thread that keeps the books."""

from __future__ import annotations

import mmap
import threading

import pytest

from blobflow.engine.plan import Part, TransferPlan
from blobflow.engine.pool import TICK_S, move_parts
from tests.kit import Killed

PLAN = TransferPlan(100, 10)


def move(_part: Part, _buffer: memoryview) -> int:
    return 0


def test_every_part_is_moved_once_and_told_in_the_calling_thread():
    """Results come to the thread that called, whichever worker made them."""
    told: dict[int, str] = {}
    threads: set[threading.Thread] = set()

    def moved(part: Part, result: str) -> None:
        assert part.number not in told
        told[part.number] = result
        threads.add(threading.current_thread())

    move_parts(
        list(PLAN),
        lambda part, _: f"part {part.number}",
        workers=3,
        buffer_size=10,
        on_moved=moved,
        on_tick=lambda: None,
    )
    assert told == {n: f"part {n}" for n in range(1, 11)}
    assert threads == {threading.current_thread()}


def test_no_more_buffers_than_workers():
    """Each worker has one buffer of the given size, and there are no more workers than parts."""
    buffers: set[int] = set()
    together = threading.Barrier(2)

    def note(_part: Part, buffer: memoryview) -> int:
        buffers.add(id(buffer))
        assert len(buffer) == 17
        together.wait(10)
        return 0

    move_parts(list(PLAN)[:2], note, workers=8, buffer_size=17, on_moved=lambda *_: None, on_tick=lambda: None)
    assert len(buffers) == 2


def test_nothing_to_move_is_done_at_once():
    """No parts, no threads."""
    move_parts([], move, workers=4, buffer_size=1, on_moved=lambda *_: None, on_tick=lambda: None)


def test_the_first_error_comes_out_and_the_rest_is_not_begun():
    """Parts told before the error stay told; nobody begins another part after it."""
    told: list[int] = []
    begun: list[int] = []

    def fails_at_three(part: Part, buffer: memoryview) -> int:
        begun.append(part.number)
        view = buffer[:5]  # a slice that lives on in the traceback must not keep the worker from cleaning up
        if part.number == 3:
            raise OSError("third")
        return len(view)

    with pytest.raises(OSError, match="third"):
        move_parts(
            list(PLAN),
            fails_at_three,
            workers=1,
            buffer_size=10,
            on_moved=lambda part, _: told.append(part.number),
            on_tick=lambda: None,
        )
    assert (told, begun) == ([1, 2], [1, 2, 3])


def test_whatever_a_worker_raises_reaches_the_caller():
    """Also what is no Exception."""

    def killed(_part: Part, _buffer: memoryview) -> int:
        raise Killed

    with pytest.raises(Killed):
        move_parts(list(PLAN), killed, workers=2, buffer_size=1, on_moved=lambda *_: None, on_tick=lambda: None)


def test_no_room_for_a_buffer_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch):
    """A worker that cannot even allocate its buffer tells the caller."""

    def no_room(*_: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("blobflow.engine.pool.mmap.mmap", no_room)
    with pytest.raises(OSError, match="Cannot allocate"):
        move_parts(list(PLAN), move, workers=2, buffer_size=1, on_moved=lambda *_: None, on_tick=lambda: None)


def test_the_caller_looks_up_while_nothing_moves():
    """A tick that raises stops the transfer although the worker sends nothing."""
    released = threading.Event()
    ticks = 0

    def waits(_part: Part, _buffer: memoryview) -> int:
        released.wait(30)
        return 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 2:
            released.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_parts(list(PLAN), waits, workers=1, buffer_size=1, on_moved=lambda *_: None, on_tick=tick)
    assert ticks == 2
    assert TICK_S <= 0.5


def test_an_error_of_the_books_stops_the_workers():
    """If the caller cannot take note of a part, no worker goes on, and none is left behind."""
    begun: list[int] = []

    def note(part: Part, _buffer: memoryview) -> int:
        begun.append(part.number)
        return 0

    def refuses(_part: Part, _result: int) -> None:
        raise ValueError("no room in the book")

    with pytest.raises(ValueError, match="no room in the book"):
        move_parts(list(PLAN), note, workers=1, buffer_size=1, on_moved=refuses, on_tick=lambda: None)
    assert begun[0] == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blobflow-worker")]
