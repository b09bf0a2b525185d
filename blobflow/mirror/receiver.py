"""The receiver of pushes: for each snapshot a state machine, its files, and one lock.

    <data_dir>/recv_snapshots/.lock                            one receiver at a time
    <data_dir>/recv_snapshots/<database>/<stem>.journal        the durable bytes: docs/mirror.md, "On disk"
    <data_dir>/recv_snapshots/<database>/<stem>.partial        the bytes that arrived so far
    <data_dir>/recv_snapshots/<database>/<stem>.snapshot       the same file, once it is complete

The stem is the position, in 20 digits, and the beginning of a hash of the snapshot's whole id: snapshots of one
database are stored beside each other, in the order of their positions, and none replaces another.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple, overload

from blobflow.checksum import Buffer
from blobflow.config import MIB
from blobflow.durable import append_at, lock, try_lock, write_all
from blobflow.errors import (
    AtCapacity,
    BlobflowError,
    DiskFull,
    ObjectTooLarge,
    SessionPoisoned,
    TransferBusy,
    storing,
    writing,
)
from blobflow.mirror import machine
from blobflow.mirror.envelope import SnapshotEnvelope, SnapshotId
from blobflow.mirror.machine import Cursor, ReceiverStatus, SessionState, Step
from blobflow.private import PrivateDirectory
from blobflow.trees import make_directories

log = logging.getLogger(__name__)

DEFAULT_CHECKPOINT_BYTES: Final = 64 * MIB


@dataclass(frozen=True)
class Pending:
    """More is to come."""

    bytes_done: int


@dataclass(frozen=True)
class Committed:
    """The snapshot is whole, durable, and has its final name."""

    id: SnapshotId
    path: Path


@dataclass
class _Slot:
    """What a receiver keeps in memory for a snapshot; only the holder of the lock acts on it."""

    files: _Files
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    """Threads that hold the lock or wait for it. A slot that nobody uses and that has no state is dropped."""
    state: SessionState | None = None
    """None: the state on disk decides."""
    poison: str = ""


class MirrorReceiver:
    """Receives pushed snapshots, any number of them at the same time, from any number of threads.

    What arrived survives the death of the process: the journal of each snapshot vouches for its bytes up to the last
    checkpoint. A snapshot that fails leaves all others alone, and continues from its last checkpoint. When it is
    complete, it gets the name `.snapshot` in one step. It stays `Bootstrapping` until `follow` notes its import.

    Args:
        data_dir: Created if it does not exist. Only one receiver, in one process, uses it at a time.
        on_progress: Called with the id and status of a snapshot after every MiB or more, at its end, and when it
            follows. No lock is held then. What it raises reaches the caller of `handle`; the chunk was accepted
            nevertheless.
        checkpoint_bytes: Bytes between two checkpoints: at most so many are sent again after a crash.
        max_snapshot_bytes: Larger snapshots are refused, by their declared size.
        max_total_bytes: Sum of the declared sizes of all snapshots; more are refused until others are removed.
        max_sessions: Incomplete snapshots of one source; more are refused until one of them is complete, dropped or
            expired.
        expire_after_s: An incomplete snapshot that nobody has continued for so long is dropped.
        clock: Seconds since the epoch; the modification times of files are compared with it.

    Raises:
        TransferBusy: another receiver uses the directory.
        RefusedError: its directory is a link, or belongs to another user.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        *,
        on_progress: Callable[[SnapshotId, ReceiverStatus], None] | None = None,
        checkpoint_bytes: int = DEFAULT_CHECKPOINT_BYTES,
        max_snapshot_bytes: int | None = None,
        max_total_bytes: int | None = None,
        max_sessions: int | None = None,
        expire_after_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = _snapshots_of(data_dir)
        self._on_progress = on_progress
        self._checkpoint_bytes = checkpoint_bytes
        self._max_snapshot_bytes = max_snapshot_bytes
        self._max_total_bytes = max_total_bytes
        self._max_sessions = max_sessions
        self._expire_after_s = expire_after_s
        self._clock = clock
        self._expired_at = float("-inf")
        self._beginning: dict[SnapshotId, int] = {}
        """Bytes of snapshots that were admitted and may not be on disk yet, so that their room is not given twice."""
        self._admission = threading.Lock()
        self._slots: dict[SnapshotId, _Slot] = {}
        self._guard = threading.Lock()
        with writing(self._directory), _directory_of(self._directory, make=True) as own:
            self._lock_file = own.open(".lock", os.O_RDWR | os.O_CREAT)
        if not try_lock(self._lock_file):
            os.close(self._lock_file)
            raise TransferBusy(f"another receiver uses {self._directory}", path=str(self._directory))

    def handle(self, envelope: SnapshotEnvelope) -> Pending | Committed:
        """Accept one chunk; see the table in `blobflow.mirror.machine`. It is written when this returns.

        Blocks until the disk has the bytes: call it in a thread, not in an event loop.

        Raises:
            OffsetRegressionError: continue at its `expected`.
            ChecksumMismatch: the chunk is damaged (send it again), or the whole snapshot is, and was dropped.
            SizeMismatch, KeyConflict: the chunk does not belong to the snapshot that was declared.
            RefusedError: the id is hostile.
            DiskFull, StoreUnavailable: the disk failed at `operation`. Send the chunk again, or the one that an
                `OffsetRegressionError` then asks for.
            SessionPoisoned: an earlier chunk ended in an unexpected error; continue at `expected`, or at 0.
        """
        envelope.id.checked()
        if self._max_snapshot_bytes is not None and envelope.total_bytes > self._max_snapshot_bytes:
            raise ObjectTooLarge(
                f"{envelope.id} has {envelope.total_bytes} bytes, {self._max_snapshot_bytes} are allowed",
                limit=self._max_snapshot_bytes,
            )
        with self._acting(envelope.id) as slot:
            before = self._loaded(slot, envelope.id)
            poison, slot.poison = slot.poison, ""
            if poison and envelope.offset:
                raise SessionPoisoned(
                    f"{envelope.id} was poisoned by {poison} in an earlier chunk; {before.offset} bytes are sound",
                    expected=before.offset,
                )
            step = machine.receive(before, envelope, checkpoint_bytes=self._checkpoint_bytes)
            begins = any(isinstance(action, machine.Begin) for action in step.actions)
            with self._admitted(envelope) if begins else nullcontext():
                self._perform(slot, step)
        after = step.state
        if after.committed and not before.committed:
            log.info("mirror.committed %s bytes=%d crc32c=%08x", _about(after.id), after.total_bytes, after.crc)
        self._report(envelope.id, step)
        return Committed(envelope.id, slot.files.snapshot) if after.committed else Pending(after.offset)

    def status(self, snapshot: SnapshotId) -> ReceiverStatus | None:
        """How much of a snapshot has arrived, which is where a sender continues; None if nothing has."""
        with self._acting(snapshot) as slot:
            state = self._loaded(slot, snapshot)
            return state.status if state.begun else None

    def committed(self, snapshot: SnapshotId) -> Committed | None:
        """The snapshot, if it is complete."""
        with self._acting(snapshot) as slot:
            return Committed(snapshot, slot.files.snapshot) if self._loaded(slot, snapshot).committed else None

    def follow(self, snapshot: SnapshotId, cursor: Cursor) -> None:
        """Note durably that the snapshot was imported and that its mirror follows the source from `cursor` on.

        Raises:
            IntegrityError: the snapshot is not complete.
        """
        with self._acting(snapshot) as slot:
            machine.follow(self._loaded(slot, snapshot), cursor)  # refuses what is not complete
            step = slot.files.follow(snapshot, cursor)
            slot.state = step.state
        log.info("mirror.following %s", _about(snapshot))
        self._report(snapshot, step)

    def abort(self, snapshot: SnapshotId) -> None:
        """Drop an incomplete snapshot; does nothing to others. May be called again."""
        with self._acting(snapshot) as slot:
            slot.poison = ""
            self._perform(slot, machine.abort(self._loaded(slot, snapshot)))
        log.info("mirror.aborted %s", _about(snapshot))

    def snapshots(self) -> dict[SnapshotId, ReceiverStatus]:
        """All snapshots in the directory, by database and position."""
        found = {snapshot: self.status(snapshot) for snapshot, _ in _journals(self._directory)}
        return {snapshot: status for snapshot, status in found.items() if status is not None}

    def close(self) -> None:
        """Checkpoint incomplete snapshots and free the directory for another receiver. May be called again."""
        with self._guard:
            descriptor, self._lock_file = self._lock_file, -1
            slots = list(self._slots.values())
        if descriptor < 0:
            return
        try:
            for slot in slots:
                with slot.lock:
                    if slot.state is not None:
                        self._perform(slot, machine.vouch(slot.state))
        finally:
            os.close(descriptor)

    def __enter__(self) -> MirrorReceiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        with self._guard:
            states = [slot.state for slot in self._slots.values()]
        return f"<MirrorReceiver {'; '.join(str(state) for state in states if state and state.begun) or 'idle'}>"

    def expire(self, *, every_s: float = 60.0) -> list[SnapshotId]:
        """Drop the incomplete snapshots that nobody has continued for `expire_after_s`, and return their ids.

        Args:
            every_s: A call within so many seconds of the last one does nothing.
        """
        now = self._clock()
        if self._expire_after_s is None or now - self._expired_at < every_s:
            return []
        self._expired_at = now
        gone: list[SnapshotId] = []
        for snapshot, files, state in _states(self._directory.parent):
            if not state.committed and now - files.changed_at() > self._expire_after_s:
                with self._acting(snapshot, wait=False) as slot:
                    # Looked at again: it may have been continued, or completed, since.
                    if slot is not None and now - files.changed_at() > self._expire_after_s:
                        slot.poison = ""
                        self._perform(slot, machine.abort(self._loaded(slot, snapshot)))
                        gone.append(snapshot)
        for snapshot in gone:
            log.warning("mirror.expired %s", _about(snapshot))
        return gone

    @contextmanager
    def _admitted(self, envelope: SnapshotEnvelope) -> Generator[None]:
        """Reserve room for a new snapshot until it is on disk.

        Raises:
            DiskFull: all snapshots together would be larger than `max_total_bytes`.
            AtCapacity: this source has `max_sessions` incomplete snapshots.
        """
        if self._max_total_bytes is None and self._max_sessions is None:
            yield
            return
        self.expire()
        with self._admission:
            self._admit(envelope)
            self._beginning[envelope.id] = envelope.total_bytes
        try:
            yield
        finally:
            with self._admission:
                del self._beginning[envelope.id]

    def _admit(self, envelope: SnapshotEnvelope) -> None:
        others = {snapshot: state for snapshot, _, state in _states(self._directory.parent)}
        others |= {snapshot: SessionState(snapshot, total) for snapshot, total in self._beginning.items()}
        others.pop(envelope.id, None)
        held = sum(state.total_bytes for state in others.values())
        if self._max_total_bytes is not None and held + envelope.total_bytes > self._max_total_bytes:
            raise DiskFull(
                f"{envelope.id} has {envelope.total_bytes} bytes, and {max(0, self._max_total_bytes - held)} of the"
                f" {self._max_total_bytes} that this receiver may hold are free",
                hint="import and prune older snapshots there, or allow the receiver more",
                limit=self._max_total_bytes,
            )
        open_ones = sum(not state.committed and state.id.source == envelope.id.source for state in others.values())
        if self._max_sessions is not None and open_ones >= self._max_sessions:
            raise AtCapacity(
                f"{open_ones} snapshots of {envelope.id.source} are under way, as many as are allowed",
                hint="finish or abort one of them; those that nobody continues expire",
                limit=self._max_sessions,
            )

    @overload
    def _acting(self, snapshot: SnapshotId) -> AbstractContextManager[_Slot]: ...
    @overload
    def _acting(self, snapshot: SnapshotId, *, wait: Literal[False]) -> AbstractContextManager[_Slot | None]: ...
    @contextmanager
    def _acting(self, snapshot: SnapshotId, *, wait: bool = True) -> Generator[_Slot | None]:
        """Hold the lock of a snapshot; gives None without `wait` if another thread holds it.

        Questions about snapshots that do not exist leave nothing in memory.
        """
        snapshot.checked()
        with self._guard:
            slot = self._slots.setdefault(snapshot, _Slot(_Files.of(self._directory, snapshot)))
            slot.users += 1
        locked = slot.lock.acquire(blocking=wait)
        try:
            yield slot if locked else None
        finally:
            if locked:
                slot.lock.release()
            with self._guard:
                slot.users -= 1
                known = slot.poison or (slot.state is not None and slot.state.begun)
                if not slot.users and not known:
                    del self._slots[snapshot]

    def _loaded(self, slot: _Slot, snapshot: SnapshotId) -> SessionState:
        if self._lock_file < 0:
            raise TransferBusy("the receiver is closed", path=str(self._directory))
        if slot.state is None or slot.state.committed:
            # A complete snapshot is other processes' as well: they note that it was imported, and remove it.
            slot.state = slot.files.restore(snapshot)
        return slot.state

    def _perform(self, slot: _Slot, step: Step) -> None:
        """Perform all actions of the machine. If one fails, the state is forgotten and read from disk again."""
        state, slot.state = slot.state, None
        try:
            for action in step.actions:
                slot.files.perform(action)
        except BlobflowError:
            raise
        except Exception as error:
            slot.poison = type(error).__name__
            log.exception("mirror.poisoned %s", _about(step.state.id))
            raise
        slot.state = step.state
        if step.error is not None:
            log.warning("mirror.refused %s bytes=%d", _about(step.state.id), state.offset if state else 0)
            raise step.error

    def _report(self, snapshot: SnapshotId, step: Step) -> None:
        if self._on_progress is not None:
            for status in step.reports:
                self._on_progress(snapshot, status)


class Received(NamedTuple):
    """A complete snapshot in a receiver's directory."""

    id: SnapshotId
    path: Path
    status: ReceiverStatus


def read_snapshots(data_dir: str | os.PathLike[str]) -> dict[SnapshotId, ReceiverStatus]:
    """The status of each snapshot in a receiver's directory, by its journal. The receiver may be running."""
    return {snapshot: state.status for snapshot, _, state in _states(data_dir)}


def read_received(data_dir: str | os.PathLike[str]) -> list[Received]:
    """The complete snapshots in a receiver's directory, by database and position. The receiver may be running."""
    return [
        Received(snapshot, files.snapshot, state.status)
        for snapshot, files, state in _states(data_dir)
        if state.committed
    ]


def follow_received(data_dir: str | os.PathLike[str], snapshot: SnapshotId, cursor: Cursor) -> None:
    """`MirrorReceiver.follow` from another process. The receiver may be running.

    Raises:
        IntegrityError: the snapshot is not complete, or not there any more.
    """
    _Files.of(_snapshots_of(data_dir), snapshot.checked()).follow(snapshot, cursor)


def remove_received(data_dir: str | os.PathLike[str], snapshot: SnapshotId) -> None:
    """Remove a complete snapshot. The receiver may be running. May be called again."""
    _Files.of(_snapshots_of(data_dir), snapshot.checked()).remove()


def _snapshots_of(data_dir: str | os.PathLike[str]) -> Path:
    return Path(data_dir).absolute() / "recv_snapshots"


def _states(data_dir: str | os.PathLike[str]) -> Iterator[tuple[SnapshotId, _Files, SessionState]]:
    """What is on disk of each snapshot of which there is something, by database and position."""
    for snapshot, files in _journals(_snapshots_of(data_dir)):
        state = files.restore(snapshot, repair=False)
        if state.begun:
            yield snapshot, files, state


def _journals(directory: Path) -> list[tuple[SnapshotId, _Files]]:
    """The snapshots that have a journal, by database and position."""
    found: list[tuple[SnapshotId, _Files]] = []
    for journal in sorted(directory.glob("*/*.journal")):
        with suppress(FileNotFoundError):  # it may be aborted at this moment
            snapshot = machine.identify(journal.read_bytes())
            if snapshot is not None and (files := _Files.of(directory, snapshot)).journal == journal:
                found.append((snapshot, files))
    return found


def _about(snapshot: SnapshotId) -> str:
    return f"database={snapshot.database} position={snapshot.position} source={snapshot.source}"


class _Files:
    """The files of one snapshot. They are opened for each action, so any number of snapshots may be open."""

    def __init__(self, directory: Path, stem: str) -> None:
        self._directory = directory
        self.journal = directory / f"{stem}.journal"
        self.partial = directory / f"{stem}.partial"
        self.snapshot = directory / f"{stem}.snapshot"
        self._journal_end = 0

    @classmethod
    def of(cls, directory: Path, snapshot: SnapshotId) -> _Files:
        token = hashlib.sha256("\0".join(map(str, snapshot)).encode()).hexdigest()[:16]
        return cls(directory / snapshot.database, f"{snapshot.position:020d}-{token}")

    def restore(self, snapshot: SnapshotId, *, repair: bool = True) -> SessionState:
        """The state on disk. `repair` cuts off the bytes that the journal does not vouch for."""
        with _doing("read journal", self.journal):
            try:
                journal = self.journal.read_bytes()
            except FileNotFoundError:
                journal = b""
            partial_bytes = self.partial.stat().st_size if self.partial.exists() else None
            state, self._journal_end = machine.restore(
                snapshot, journal, partial_bytes=partial_bytes, committed=self.snapshot.exists()
            )
        if repair and not state.committed and partial_bytes is not None and partial_bytes > state.offset:
            with _doing("truncate partial file", self.partial), self._own() as own, _file(own, self.partial) as file:
                os.ftruncate(file, state.offset)
        return state

    def _own(self, *, make: bool = False) -> AbstractContextManager[PrivateDirectory]:
        """The directory of the database; a link in its place is not followed."""
        return _directory_of(self._directory.parent, self._directory.name, make=make)

    def changed_at(self) -> float:
        """When the last bytes arrived, in seconds since the epoch."""
        times = [0.0]
        for path in (self.journal, self.partial):
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
        return max(times)

    def follow(self, snapshot: SnapshotId, cursor: Cursor) -> Step:
        """Record that a complete snapshot was imported. Other processes may do the same at the same time."""
        with suppress(FileNotFoundError), self._own() as own, _file(own, self.journal, os.O_RDONLY) as journal:
            lock(journal)
            # Without repair: an incomplete snapshot belongs to the receiver, which may be writing to it.
            step = machine.follow(self.restore(snapshot, repair=False), cursor)
            for action in step.actions:
                self.perform(action)
            return step
        return machine.follow(SessionState(snapshot), cursor)  # raises: the snapshot is not there

    def remove(self) -> None:
        """Remove a complete snapshot, then its journal, by which a repeated call finds it."""
        with _doing("remove snapshot", self.snapshot), suppress(FileNotFoundError), self._own() as own:
            if own.has(self.snapshot.name):
                own.unlink(self.snapshot.name)
                own.unlink(self.journal.name)
                own.sync()

    def perform(self, action: machine.Action) -> None:
        match action:
            case machine.Begin(record):
                self._begin(record)
            case machine.Write(offset, data):
                self._write(offset, data)
            case machine.Checkpoint(record):
                self._checkpoint(record)
            case machine.Commit():
                self._commit()
            case machine.Discard():
                self._discard()

    def _begin(self, record: bytes) -> None:
        with _doing("make directory", self._directory), self._own(make=True):
            pass
        with _doing("begin journal", self.journal), self._own() as own:
            fresh = self.journal.with_suffix(".journal-new")
            with _file(own, fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
                self._journal_end = append_at(file, 0, record)
            own.rename(fresh.name, self.journal.name)
            own.sync()
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        with _doing("open partial file", self.partial), self._own() as own, _file(own, self.partial, flags):
            own.sync()

    def _write(self, offset: int, data: Buffer) -> None:
        with _doing("write partial chunk", self.partial), self._own() as own, _file(own, self.partial) as file:
            write_all(file, data, offset)

    def _checkpoint(self, record: bytes) -> None:
        with _doing("sync partial file", self.partial), self._own() as own:
            if own.has(self.partial.name):
                with _file(own, self.partial, os.O_RDONLY) as file:
                    os.fdatasync(file)
        with _doing("append to journal", self.journal), self._own() as own, _file(own, self.journal) as file:
            self._journal_end = append_at(file, self._journal_end, record)

    def _commit(self) -> None:
        reading = os.O_RDONLY
        with _doing("sync partial file", self.partial), self._own() as own, _file(own, self.partial, reading) as file:
            os.fsync(file)
        with _doing("rename partial to snapshot", self.snapshot), self._own() as own:
            own.rename(self.partial.name, self.snapshot.name)
            own.sync()

    def _discard(self) -> None:
        with _doing("remove partial file", self.partial), suppress(FileNotFoundError), self._own() as own:
            # The journal first: without it nothing vouches for the rest.
            own.unlink(self.journal.name)
            own.unlink(self.partial.name)
            own.sync()
        self._journal_end = 0


@contextmanager
def _directory_of(received: Path, database: str | None = None, *, make: bool = False) -> Generator[PrivateDirectory]:
    """The private directory of all received snapshots, or of one database; a user chose the place of `received`."""
    if make:
        make_directories(received.parent, 0o700)
    above = os.open(received.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        own = PrivateDirectory.within(above, received.name, received, make=make)
    finally:
        os.close(above)
    with own:
        if database is None:
            yield own
            return
        with own.below(database, make=make) as below:
            yield below


@contextmanager
def _file(directory: PrivateDirectory, path: Path, flags: int = os.O_RDWR) -> Generator[int]:
    descriptor = directory.open(path.name, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _doing(operation: str, path: Path) -> AbstractContextManager[None]:
    """Translate the operating system's errors into ours, with the operation that failed."""
    return storing(operation, path=str(path), operation=operation)
