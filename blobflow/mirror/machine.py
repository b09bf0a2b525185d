"""The rules for receiving a snapshot: a state machine without I/O, one for each snapshot.

    state, envelope -> `receive` -> state, actions

The actions are performed in order; only then the new state counts. If one fails, for any reason, the state is dropped
and `restore` makes it again from the disk. So there is one way to recover, after a full disk, a bug or
a power cut. It costs at most the bytes after the last checkpoint.

| chunk | result |
|---|---|
| continues at the offset reached | appended |
| at offset 0 | starts the snapshot again, unless the same chunk is already there |
| already received: same offset, length, checksum | acknowledged again; the first chunk and the last 64 are remembered |
| at another offset | refused, with the expected offset |
| its bytes do not match its CRC32C | refused: one bad chunk costs one chunk |
| goes past the declared size, or is the last one and ends before it | refused |
| belongs to a complete snapshot | acknowledged: a complete snapshot never changes |

A refusal changes nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeAlias

from pydantic import JsonValue

from blobflow.checksum import Buffer, combine_crc32c, crc32c
from blobflow.config import MIB
from blobflow.durable import whole_lines
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    IntegrityError,
    KeyConflict,
    OffsetRegressionError,
    SizeMismatch,
)
from blobflow.mirror.envelope import SnapshotEnvelope, SnapshotId
from blobflow.untrusted import read_object

JOURNAL_FORMAT: Final = "blobflow.mirror-journal/1"
REPORT_EVERY_BYTES: Final = MIB
REMEMBERED_CHUNKS: Final = 64
"""More than any sender has in flight."""

Cursor: TypeAlias = JsonValue


@dataclass(frozen=True)
class Bootstrapping:
    """A snapshot is arriving, or has arrived and was not imported yet."""

    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class Following:
    """The snapshot was imported; its mirror follows the source from `cursor` on."""

    cursor: Cursor


ReceiverStatus: TypeAlias = Bootstrapping | Following


class Chunk(NamedTuple):
    """A chunk that was accepted."""

    offset: int
    length: int
    crc32c: int


@dataclass(frozen=True)
class Begin:
    """Replace the journal by this record, then empty the partial file: a crash in between leaves no claim."""

    record: bytes


@dataclass(frozen=True)
class Write:
    """Write into the partial file."""

    offset: int
    data: Buffer = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """Make the partial file durable, then append the record to the journal and make that durable."""

    record: bytes


@dataclass(frozen=True)
class Commit:
    """Make the partial file durable and give it the name of a snapshot, in one step."""


@dataclass(frozen=True)
class Discard:
    """Remove journal and partial file, in this order."""


Action: TypeAlias = Begin | Write | Checkpoint | Commit | Discard


@dataclass(frozen=True)
class SessionState:
    """What is known of one snapshot.

    Attributes:
        begun: Whether a first chunk was accepted.
        offset: Bytes accepted; the next chunk begins here.
        crc: CRC32C of the accepted bytes.
        durable: The offset of the last checkpoint.
        unreported: Bytes since the last progress report.
        first: The chunk at offset 0.
        recent: The last chunks, oldest first.
        committed: The snapshot is whole and has its final name.
        following: The snapshot was imported.
    """

    id: SnapshotId
    total_bytes: int = 0
    total_crc32c: int = 0
    begun: bool = False
    offset: int = 0
    crc: int = 0
    durable: int = 0
    unreported: int = 0
    first: Chunk | None = None
    recent: tuple[Chunk, ...] = ()
    committed: bool = False
    following: bool = False
    cursor: Cursor = None

    @property
    def status(self) -> ReceiverStatus:
        return Following(self.cursor) if self.following else Bootstrapping(self.offset, self.total_bytes)

    def __str__(self) -> str:
        if self.following:
            return f"following {self.id.database}"
        return f"bootstrapping {self.id.database}, {self.offset} of {self.total_bytes} bytes"


class Step(NamedTuple):
    """The next step of the machine.

    Attributes:
        actions: To be performed in order.
        state: Valid once all actions are performed.
        reports: Passed to `on_progress` after the actions.
        error: Raised after the actions.
    """

    state: SessionState
    actions: tuple[Action, ...] = ()
    reports: tuple[ReceiverStatus, ...] = ()
    error: BlobflowError | None = None


def receive(state: SessionState, envelope: SnapshotEnvelope, *, checkpoint_bytes: int) -> Step:
    """Accept a chunk.

    Raises:
        OffsetRegressionError, SizeMismatch, ChecksumMismatch, KeyConflict: it is refused, and nothing changes.
    """
    chunk = Chunk(envelope.offset, len(envelope.data), crc32c(envelope.data))
    if chunk.crc32c != envelope.crc32c:
        raise ChecksumMismatch(
            f"the chunk of {envelope.id} at {envelope.offset} was damaged on its way",
            hint="send it again",
            what="chunk",
            offset=envelope.offset,
            expected=envelope.crc32c,
            actual=chunk.crc32c,
        )
    agrees = (state.total_bytes, state.total_crc32c) == (envelope.total_bytes, envelope.total_crc32c)
    if state.committed:
        if not agrees:
            raise KeyConflict(f"{envelope.id} is complete, and declared another size or checksum", key=str(envelope.id))
        return Step(state)
    _check_size(envelope)
    actions: list[Action] = []
    agrees = agrees and state.begun
    taken = agrees and chunk.length > 0 and (chunk in state.recent or chunk == state.first)
    if not taken:
        if envelope.offset == 0 and not (agrees and state.offset == 0):
            state = SessionState(envelope.id, envelope.total_bytes, envelope.total_crc32c, begun=True)
            actions.append(Begin(_header(state)))
        elif envelope.offset != state.offset:
            raise OffsetRegressionError(
                f"the chunk of {envelope.id} begins at {envelope.offset}, {state.offset} is expected",
                expected=state.offset,
                actual=envelope.offset,
            )
        elif not agrees:
            raise KeyConflict(f"the chunk of {envelope.id} declares another size or checksum", key=str(envelope.id))
        if chunk.length:
            actions.append(Write(chunk.offset, envelope.data))
            state = _appended(state, chunk)
    if envelope.done:
        return _finished(state, actions)
    reports: tuple[ReceiverStatus, ...] = ()
    if state.unreported >= REPORT_EVERY_BYTES:
        state = replace(state, unreported=0)
        reports = (state.status,)
    if state.offset - state.durable >= checkpoint_bytes:
        checkpoint = vouch(state)
        return Step(checkpoint.state, (*actions, *checkpoint.actions), reports)
    return Step(state, tuple(actions), reports)


def vouch(state: SessionState) -> Step:
    """Have the journal vouch for all accepted bytes."""
    if not state.begun or state.committed or state.offset == state.durable:
        return Step(state)
    first = state.first and (state.first.length, state.first.crc32c)
    record = _line({"offset": state.offset, "crc32c": state.crc, "first": first})
    return Step(replace(state, durable=state.offset), (Checkpoint(record),))


def follow(state: SessionState, cursor: Cursor) -> Step:
    """Note that the snapshot was imported and that its mirror follows the source from `cursor` on.

    Raises:
        IntegrityError: it is not complete.
    """
    if not state.committed:
        raise IntegrityError(f"{state.id} is not complete: {state.offset} of {state.total_bytes} bytes are there")
    following = replace(state, following=True, cursor=cursor)
    return Step(following, (Checkpoint(_line({"following": cursor})),), (following.status,))


def abort(state: SessionState) -> Step:
    """Drop an incomplete snapshot; a complete one stays."""
    return Step(state) if state.committed else Step(SessionState(state.id), (Discard(),))


def restore(
    snapshot: SnapshotId, journal: bytes, *, partial_bytes: int | None, committed: bool
) -> tuple[SessionState, int]:
    """The state that a journal vouches for. The caller cuts off the bytes of the partial file beyond `offset`.

    Args:
        partial_bytes: Length of the partial file: a record beyond it does not count. None: there is no such file, so
            nothing has begun.
        committed: The snapshot has its final name.

    Returns:
        The state, and the length of the journal up to its last whole record.
    """
    state, length = SessionState(snapshot), 0
    if partial_bytes is None and not committed:
        return state, length
    for record, end in _records(journal):
        try:
            state = _replayed(state, record, partial_bytes=partial_bytes or 0, committed=committed)
        except (KeyError, TypeError, ValueError):  # of the right checksum, and another shape
            break
        length = end
    return state, length


def identify(journal: bytes) -> SnapshotId | None:
    """The id of the snapshot that a journal belongs to; None if the journal cannot be read."""
    for record, _ in _records(journal):
        try:
            source, database, position, digest = (record[name] for name in SnapshotId._fields)
            return SnapshotId(_text(source), _text(database), _number(position), _text(digest)).checked()
        except (KeyError, TypeError, ValueError, BlobflowError):
            break
    return None


def _check_size(envelope: SnapshotEnvelope) -> None:
    end, total = envelope.end, envelope.total_bytes
    if end > total or (envelope.done and end != total):
        raise SizeMismatch(
            f"{envelope.id} {'ends' if envelope.done else 'goes on'} at byte {end}, it was declared with {total}",
            what="snapshot",
            expected=total,
            actual=end,
        )


def _appended(state: SessionState, chunk: Chunk) -> SessionState:
    return replace(
        state,
        offset=chunk.offset + chunk.length,
        crc=combine_crc32c(state.crc, chunk.crc32c, chunk.length),
        unreported=state.unreported + chunk.length,
        first=state.first or chunk,
        recent=(*state.recent[1 - REMEMBERED_CHUNKS :], chunk),
    )


def _finished(state: SessionState, actions: Iterable[Action]) -> Step:
    if state.crc != state.total_crc32c:
        error = ChecksumMismatch(
            f"{state.id} arrived with CRC32C {state.crc:08x}, it was declared with {state.total_crc32c:08x}",
            hint="every chunk was right: the source declared another snapshot than it sent",
            what="snapshot",
            expected=state.total_crc32c,
            actual=state.crc,
        )
        return Step(SessionState(state.id), (Discard(),), error=error)
    committed = replace(state, committed=True, durable=state.offset, unreported=0)
    return Step(committed, (*actions, Commit()), (committed.status,))


def _header(state: SessionState) -> bytes:
    declared = {"total_bytes": state.total_bytes, "total_crc32c": state.total_crc32c}
    return _line({"format": JOURNAL_FORMAT, **state.id._asdict(), **declared})


def _line(record: dict[str, Any]) -> bytes:
    """A record with its checksum, so that a torn record is not taken for a whole one."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %b\n" % (crc32c(text), text)


def _records(journal: bytes) -> Iterable[tuple[dict[str, Any], int]]:
    """The whole records from the beginning, each with the offset of its end."""
    for end, line in whole_lines(io.BytesIO(journal)):
        told, _, text = line.partition(b" ")
        if told != b"%08x" % crc32c(text[:-1]):
            return
        try:
            record = read_object(text, "record")
        except BlobflowError:
            return
        yield record, end


def _replayed(state: SessionState, record: dict[str, Any], *, partial_bytes: int, committed: bool) -> SessionState:
    if "format" in record:
        if record["format"] != JOURNAL_FORMAT:
            raise ValueError("of another format")
        total, crc = _number(record["total_bytes"]), _number(record["total_crc32c"], 1 << 32)
        begun = SessionState(state.id, total, crc, begun=True)
        return replace(begun, offset=total, crc=crc, durable=total, committed=True) if committed else begun
    if not state.begun:
        raise ValueError("no header")
    if "following" in record:
        return replace(state, following=committed, cursor=record["following"])
    offset, crc = _number(record["offset"]), _number(record["crc32c"], 1 << 32)
    if committed or offset > partial_bytes:
        return state
    first = None
    if record["first"]:
        length, first_crc = record["first"]
        first = Chunk(0, _number(length), _number(first_crc, 1 << 32))
    return replace(state, offset=offset, durable=offset, crc=crc, first=first)


def _number(value: object, limit: int = 1 << 64) -> int:
    if not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError("not a number of that many bits")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
