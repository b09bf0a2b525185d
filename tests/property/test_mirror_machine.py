"""The receiving machine against a disk that tears, forgets and fails, and an oracle that is a plain byte string.

The oracle knows nothing of states, checkpoints or journals: it keeps the bytes that were acknowledged, and says which
chunk must be taken. After a death it lets the machine say how much survived, and holds it to the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from blobflow.checksum import crc32c
from blobflow.errors import BlobflowError, ChecksumMismatch, KeyConflict, OffsetRegressionError, SizeMismatch
from blobflow.mirror import machine
from blobflow.mirror.envelope import SnapshotEnvelope, SnapshotId
from blobflow.mirror.machine import Begin, Checkpoint, Commit, Discard, SessionState, Write
from tests.kit import sized

ID = SnapshotId("east", "orders", 42, f"sha256:{0:064x}")
WHOLES = (b"abcdefghijklmnop", b"abcdefghXYZ", b"abc" * 6, b"")
"""What senders believe the snapshot to be: some begin alike, so that a chunk may belong to several."""
CHECKPOINT_BYTES = 5

Death = Literal["kill", "power"]


class _Died(Exception):
    """The process ends here, or the disk fails here."""


@dataclass
class _File:
    """What a reader sees, and what a power cut leaves."""

    seen: bytes | None = None
    durable: bytes | None = None

    def sync(self) -> None:
        self.durable = self.seen


@dataclass
class _Disk:
    """The three files of a snapshot. Each step of an action may be the last one."""

    partial: _File = field(default_factory=_File)
    journal: _File = field(default_factory=_File)
    snapshot: _File = field(default_factory=_File)
    journal_end: int = 0
    steps_left: int | None = None

    def perform(self, action: machine.Action) -> None:
        match action:
            case Begin(record):
                self._step()
                self.journal = _File(record, record)
                self.journal_end = len(record)
                self._step()
                self.partial = _File(b"", self.partial.durable or b"")  # an old end may come back
            case Write(offset, data):
                self._write(offset, bytes(data[: len(data) // 2]))
                self._step()
                self._write(offset, bytes(data))
            case Checkpoint(record):
                self._step()
                self.partial.sync()
                self._step()
                kept = (self.journal.seen or b"")[: self.journal_end]
                self.journal.seen = kept + record[: len(record) // 2]
                self._step()
                self.journal = _File(kept + record, kept + record)
                self.journal_end = len(kept + record)
            case Commit():
                self._step()
                self.partial.sync()
                self._step()
                self.snapshot, self.partial = replace(self.partial), _File()
            case Discard():
                self._step()
                self.journal, self.journal_end = _File(), 0
                self._step()
                self.partial = _File()

    def die(self, death: Death) -> None:
        """After a kill, everything that was written is there; after a power cut, only what was synced."""
        if death == "power":
            for file in (self.partial, self.journal, self.snapshot):
                file.seen = file.durable
        self.steps_left = None

    def restored(self) -> SessionState:
        partial = self.partial.seen
        partial_bytes = None if partial is None else len(partial)
        state, self.journal_end = machine.restore(
            ID, self.journal.seen or b"", partial_bytes=partial_bytes, committed=self.snapshot.seen is not None
        )
        if partial is not None and not state.committed:
            self.partial.seen = partial[: state.offset]  # as `restore` demands
        return state

    def _write(self, offset: int, data: bytes) -> None:
        assert self.partial.seen is not None, "written before there was a file"
        before = self.partial.seen[:offset].ljust(offset, b"\0")
        self.partial.seen = before + data + self.partial.seen[offset + len(data) :]

    def _step(self) -> None:
        if self.steps_left is not None:
            if not self.steps_left:
                raise _Died
            self.steps_left -= 1


@dataclass
class _Oracle:
    """What must be there."""

    whole: bytes = b""
    held: bytes | None = None
    taken: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    complete: bytes | None = None

    def expects(
        self, whole: bytes, offset: int, data: bytes, *, damaged: bool, done: bool
    ) -> type[BlobflowError] | None:
        """Take the chunk, or say how it must be refused."""
        end = offset + len(data)
        if damaged:
            return ChecksumMismatch
        if self.complete is not None:
            return None if whole == self.complete else KeyConflict
        if end > len(whole) or (done and end != len(whole)):
            return SizeMismatch
        same = self.held is not None and whole == self.whole
        if not (same and data and (offset, data) in self.taken):
            if offset == 0 and not (same and self.held == b""):
                self.whole, self.held, self.taken = whole, b"", []
            elif offset != len(self.held or b""):
                return OffsetRegressionError
            elif not same:
                return KeyConflict
            assert self.held is not None
            if data:
                self.held += data
                self.taken.append((offset, data))
        if done:
            if self.held != self.whole:
                self.held = None
                return ChecksumMismatch
            self.complete = self.held
        return None


class Receiving(RuleBasedStateMachine):
    """Chunks, restarts and aborts in any order; kills, power cuts and failures at any step of any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = _Disk()
        self.oracle = _Oracle()
        self.state = SessionState(ID)
        self.vouched = 0

    @rule(
        whole=st.sampled_from(WHOLES),
        at=st.sampled_from(["next", "next", "next", "zero", "again", "any"]),
        anywhere=st.integers(0, 18),
        size=st.integers(0, 6),
        lie=st.sampled_from([None] * 8 + ["data", "damage"]),
        done=st.sampled_from(["honest"] * 5 + ["early"]),
        dies_after=st.sampled_from([None] * 6 + [0, 1, 2, 3, 4, 5]),
        death=st.sampled_from(["kill", "power"]),
    )
    def chunk(
        self,
        whole: bytes,
        at: str,
        anywhere: int,
        size: int,
        lie: str | None,
        done: str,
        dies_after: int | None,
        death: Death,
    ) -> None:
        held = len(self.oracle.held or b"")
        if at == "next" and self.oracle.held is not None:
            whole = self.oracle.whole
        offset, data = {"next": held, "zero": 0, "any": anywhere}.get(at, held), b""
        if at == "again" and self.oracle.taken:
            whole = self.oracle.whole
            offset, data = self.oracle.taken[anywhere % len(self.oracle.taken)]
        else:
            data = whole[offset : offset + size]
            if lie == "data":
                data = data.upper()
        finished = offset + len(data) == len(whole) if done == "honest" else True
        crc = crc32c(data) ^ (lie == "damage")
        envelope = SnapshotEnvelope(ID, len(whole), crc32c(whole), offset, data, crc, finished)

        before = replace(self.oracle, taken=list(self.oracle.taken))
        expected = self.oracle.expects(whole, offset, data, damaged=lie == "damage", done=finished)
        self._do(
            lambda: machine.receive(self.state, envelope, checkpoint_bytes=CHECKPOINT_BYTES),
            expected,
            before,
            dies_after,
            death,
        )

    @rule(dies_after=st.sampled_from([None, None, None, 0, 1]), death=st.sampled_from(["kill", "power"]))
    def abort(self, dies_after: int | None, death: Death) -> None:
        before = replace(self.oracle, taken=list(self.oracle.taken))
        if self.oracle.complete is None:
            self.oracle.held, self.oracle.taken = None, []
        self._do(lambda: machine.abort(self.state), None, before, dies_after, death)

    @rule()
    def close(self) -> None:
        """A good end vouches for everything."""
        self._do(lambda: machine.vouch(self.state), None, self.oracle, None, "kill")
        self._revive("power", [self.oracle])
        assert self.oracle.held is None or self.state.offset == len(self.oracle.held)

    @rule(death=st.sampled_from(["kill", "power"]))
    def die(self, death: Death) -> None:
        self._revive(death, [self.oracle])

    @precondition(lambda self: self.oracle.complete is not None)
    @rule(cursor=st.one_of(st.none(), st.integers(), st.text(max_size=3)), death=st.sampled_from(["kill", "power"]))
    def follow(self, cursor: str | int | None, death: Death) -> None:
        self._do(lambda: machine.follow(self.state, cursor), None, self.oracle, None, death)
        self._revive(death, [self.oracle])
        assert self.state.following
        assert self.state.cursor == cursor

    @invariant()
    def what_is_held_is_on_disk(self) -> None:
        if self.oracle.complete is not None:
            assert self.state.committed
            assert self.disk.snapshot.seen == self.disk.snapshot.durable == self.oracle.complete
            return
        assert not self.state.committed
        assert self.state.begun == (self.oracle.held is not None)
        held = self.oracle.held or b""
        assert (self.state.offset, self.state.crc) == (len(held), crc32c(held))
        assert (self.disk.partial.seen or b"")[: len(held)] == held
        assert self.state.offset - self.state.durable < CHECKPOINT_BYTES

    def _do(
        self,
        make: Callable[[], machine.Step],
        expected: type[BlobflowError] | None,
        before: _Oracle,
        dies_after: int | None,
        death: Death,
    ) -> None:
        """Have the machine decide, do it on the disk as the driver does, and die on the way if so it shall be."""
        refusal = None
        step = machine.Step(self.state)
        try:
            step = make()
        except BlobflowError as error:
            refusal = error
        if refusal is not None:
            assert type(refusal) is expected
            if isinstance(refusal, OffsetRegressionError):
                assert refusal.expected == len(self.oracle.held or b"")
            return
        assert type(step.error) is (expected or type(None))
        self.disk.steps_left = dies_after
        try:
            for action in step.actions:
                self.disk.perform(action)
        except _Died:
            fresh = replace(self.oracle, held=b"", taken=[], complete=None)
            self._revive(death, [before, self.oracle, fresh, replace(fresh, held=None)])
        else:
            self.state = step.state
        self.disk.steps_left = None

    def _revive(self, death: Death, possible: list[_Oracle]) -> None:
        """Start again from the disk: what it vouches for is a beginning of something that was there."""
        durable = self.state.durable
        self.disk.die(death)
        self.state = self.disk.restored()
        held = (self.disk.partial.seen or b"")[: self.state.offset]
        if self.state.committed:
            right = [oracle for oracle in possible if oracle.complete == self.disk.snapshot.seen]
            assert right, "what is complete is not what was sent"
            self.oracle = right[0]
            return
        declared = (self.state.total_bytes, self.state.total_crc32c)
        for oracle in possible:
            content = oracle.held if oracle.complete is None else oracle.complete
            if content is None or not self.state.begun:
                matches = content is None and not self.state.begun
            else:
                matches = content.startswith(held) and declared == (len(oracle.whole), crc32c(oracle.whole))
            if matches:
                break
        else:
            raise AssertionError(f"{held!r} survived, which nobody sent")
        if len(possible) == 1:
            assert self.state.offset >= durable, "a checkpoint was lost"
        survived = held if self.state.begun else None
        self.oracle = _Oracle(oracle.whole, survived, oracle.taken[:1] if held else [])


@pytest.mark.seed("W2.6")
def test_no_interleaving_corrupts_anything():
    """Whatever is sent, and wherever it dies, what is held is what was sent, and what is complete is right."""
    run_state_machine_as_test(Receiving, settings=settings(max_examples=150, stateful_step_count=25, deadline=None))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.seed("W2.6")
def test_ten_thousand_interleavings_corrupt_nothing():
    """The same, at full size 10,000 times."""
    examples = sized(10_000, 2_000)
    run_state_machine_as_test(
        Receiving, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None)
    )
