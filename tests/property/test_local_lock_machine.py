"""The locks of the local store: several processes want two keys of one lock file, and any of them may stop or die.

The processes live in one thread. Their files are real, so are flock and rename; what a process does next is decided
call by call. A killed process makes no further system call: the kernel closes its descriptors, and that is all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blobflow.errors import TransferBusy
from blobflow.private import PrivateDirectory
from blobflow.stores.local import locks
from blobflow.stores.local.locks import KeyLocks, lock_name
from tests.kit import Killed

PROCESSES = 3
PATIENCE_S = 30.0
KEY = "key"
NEIGHBOUR = next(name for number in count() if lock_name(name := f"neighbour-{number}") == lock_name(KEY))
"""Another key that the same lock file serves."""

processes = st.integers(0, PROCESSES - 1)
keys = st.sampled_from([KEY, NEIGHBOUR])
fuses = st.one_of(st.none(), st.integers(0, 14))
"""At which system call a process dies, counted from its next one; None: it lives."""


@dataclass
class Process:
    """One process: what it holds, and how long it lives."""

    fuse: int | None = None
    dead: bool = False
    files: set[int] = field(default_factory=set[int])
    key: str = ""
    temporary: str = ""
    """The file that it will rename; empty: it deletes, or holds nothing."""
    holding: AbstractContextManager[None] | None = None


class System:
    """The system calls of `blobflow.stores.local.locks`, each of which may be the last one of its process."""

    def __init__(self) -> None:
        self.acting = Process()

    def step(self) -> None:
        if self.acting.fuse is not None:
            self.acting.fuse -= 1
            self.acting.dead = self.acting.dead or self.acting.fuse < 0
        if self.acting.dead:
            raise Killed

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            self.step()
            return call(*args, **options)

        return counting

    def open(self, call: Callable[..., int]) -> Callable[..., int]:
        def opening(*args: Any, **options: Any) -> int:
            self.step()
            fd = call(*args, **options)
            self.acting.files.add(fd)
            return fd

        return opening

    def close(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def closing(fd: int) -> None:
            if not self.acting.dead:  # else the kernel does it, in `reap`
                self.step()
                self.acting.files.discard(fd)
                call(fd)

        return closing

    def reap(self, process: Process) -> None:
        """What the kernel does for a process that has died."""
        for fd in process.files:
            os.close(fd)
        process.files.clear()

    @contextmanager
    def patched(self) -> Generator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "unlink"):
                patch.setattr(PrivateDirectory, name, self.counted(getattr(PrivateDirectory, name)))
            patch.setattr(PrivateDirectory, "open", self.open(PrivateDirectory.open))
            patch.setattr(locks, "lock", self.counted(locks.lock))
            patch.setattr(locks, "try_lock", self.counted(locks.try_lock))
            patch.setattr(locks, "unlock_and_close", self.close(locks.unlock_and_close))
            calls = {name: getattr(os, name) for name in ("O_RDWR", "O_CREAT", "O_EXCL", "O_CLOEXEC")}
            calls |= {name: self.counted(getattr(os, name)) for name in ("pwrite", "pread")}
            patch.setattr(locks, "os", SimpleNamespace(**calls, close=self.close(os.close)))
            yield


class LockStory(RuleBasedStateMachine):
    """Three processes take, keep, use and lose the lock."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        for name in ("locks", "tmp", "objects"):
            (self.root / name).mkdir(mode=0o700)
        self.now = 0.0
        self.system = System()
        self.processes = [Process() for _ in range(PROCESSES)]
        self.entitled: Process | None = None
        """The oracle: the process that took the lock last, if it holds it still."""
        self.locks = KeyLocks(
            self._own, url="file:///store", patience_s=PATIENCE_S, clock=lambda: self.now, sleep=self._sleep
        )

    def teardown(self) -> None:
        for process in self.processes:
            if process.holding is not None:
                self._kill(process)
        shutil.rmtree(self.root)

    @contextmanager
    def _own(self, name: str) -> Iterator[PrivateDirectory]:
        with PrivateDirectory.at(self.root / name) as directory:
            yield directory

    def _sleep(self, seconds: float) -> None:
        self.now += seconds * 20  # fewer turns of the loop; what counts is the order of the limits

    def _acts(self, process: Process, act: Callable[[], object]) -> bool:
        """Let a process act; False: it died. Another one takes its place then, and knows nothing."""
        self.system.acting = process
        try:
            with self.system.patched():
                act()
        except Killed:
            self._bury(process)
            return False
        return True

    def _bury(self, process: Process) -> None:
        self.system.reap(process)
        self.processes[self.processes.index(process)] = Process()
        if self.entitled is process:
            self.entitled = None

    def _kill(self, process: Process) -> None:
        """While it does nothing: no line of its code runs any more."""
        process.dead = True
        holding = process.holding
        assert holding is not None
        self._acts(process, lambda: holding.__exit__(None, None, None))
        if process.files or process in self.processes:
            self._bury(process)

    def _takes(self, process: Process, key: str, *, writes: bool) -> None:
        process.key = key
        process.temporary = uuid.uuid4().hex if writes else ""
        if writes:
            (self.root / "tmp" / process.temporary).write_bytes(process.temporary.encode())
        process.holding = self.locks.held(key, process.temporary)
        process.holding.__enter__()

    @rule(number=processes, key=keys, writes=st.booleans(), fuse=fuses)
    def takes(self, number: int, key: str, writes: bool, fuse: int | None) -> None:
        """It gets the lock, unless a process that cannot be disarmed has it for this key."""
        process, before = self.processes[number], self.entitled
        if process.holding is not None:
            return
        blocked = before is not None and not before.temporary and before.key == key
        process.fuse, began = fuse, self.now
        try:
            lived = self._acts(process, lambda: self._takes(process, key, writes=writes))
        except TransferBusy:
            assert blocked, "a lock that can be broken was not"
            assert self.now - began >= PATIENCE_S
            process.holding = None
            return
        if not lived:
            # Whoever it displaced before it died has nothing left to rename, or is displaced already.
            if before is not None and before.temporary and not self._can_publish(before):
                self.entitled = None
            return
        process.fuse = None
        assert not blocked, "took what somebody else may be deleting"
        if before is not None:
            assert self.now - began > locks.BREAK_AFTER_S, "broke the lock of a holder that was not even slow"
            assert not self._can_publish(before), "a sleeper would have published"
        self.entitled = process

    def _can_publish(self, process: Process) -> bool:
        return bool(process.temporary) and (self.root / "tmp" / process.temporary).exists()

    @precondition(lambda self: any(process.holding for process in self.processes))
    @rule(number=processes, fuse=fuses)
    def finishes(self, number: int, fuse: int | None) -> None:
        """It renames its file and gives the lock back; only the one that took the lock last can."""
        process = self.processes[number]
        holding = process.holding
        if holding is None:
            return
        published = self._publish(process)
        assert published is (process is self.entitled and bool(process.temporary))
        process.fuse = fuse
        if self._acts(process, lambda: holding.__exit__(None, None, None)):
            process.fuse = process.holding = None
            assert not process.files, "a descriptor was left open"
            if self.entitled is process:
                self.entitled = None

    def _publish(self, process: Process) -> bool:
        if not self._can_publish(process):
            return False
        os.rename(self.root / "tmp" / process.temporary, self.root / "objects" / process.key)
        return True

    @rule(number=processes)
    def dies(self, number: int) -> None:
        """At rest, with the lock or without: its lock is free, whatever its note says."""
        if self.processes[number].holding is not None:
            self._kill(self.processes[number])

    @invariant()
    def at_most_one_can_publish(self) -> None:
        able = [process for process in self.processes if process.holding and self._can_publish(process)]
        assert able in ([], [self.entitled]), "two processes could publish"


LockStory.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
test_any_order_of_stops_and_deaths_lets_only_the_holder_publish = LockStory.TestCase
