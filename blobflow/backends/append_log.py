"""Append logs: a keyed state as JSON lines, its snapshots, and mirrors that continue where a snapshot ends.

A log is a directory with one file, `<base>.log.jsonl`, and a lock:

| line | means |
|---|---|
| `{"log":1,"base":7,"records":3,...}` | the head: the next 3 records are all that is left of the first 7 |
| `{"seq":5,"key":"a","value":{...},...}` | record 5 set the key |
| `{"seq":8,"key":"a","deleted":true,...}` | record 8 removed it |

Every line ends with `"crc32c"`, the checksum of the bytes before it. A killed process leaves at most its last line
torn, and a torn line is not a record; anything else that does not fit is damage. Sequence numbers start at 1 and have
no gaps after the base. Once more than `compact_threshold` bytes were appended, the newest record of each key is
written to a new file with its old sequence number. A rename then replaces the old file.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from pydantic import ConfigDict, Field, JsonValue
from typing_extensions import override

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.privacy import directory_is_private, file_is_private
from blobflow.backends.base import ExportResult, OnBytes
from blobflow.backends.files import export_files
from blobflow.backends.versioned_importer import VersionedImporter
from blobflow.checksum import crc32c
from blobflow.durable import append_at, fsync_directory, take_lock_file, whole_lines
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    ChecksumMismatch,
    HostileArtifact,
    NotFoundError,
    RefusedError,
    UsageError,
    expanded,
    setting,
    writing,
)
from blobflow.fields import KnownFields
from blobflow.untrusted import quoted

log = logging.getLogger(__name__)

BACKEND: Final = "append-log"

DEFAULT_COMPACT_THRESHOLD: Final = 4 * 1024 * 1024
"""Bytes appended between two compactions; replaying as many takes about 0.1 s."""

_FORMAT: Final = 1
_LOCK_NAME: Final = "lock"
_NAME: Final = re.compile(r"(\d{20})\.log\.jsonl")
_OURS: Final = re.compile(r"\d{20}\.log\.jsonl|\.\d{20}\.log\.jsonl\.partial")
_SEAL: Final = re.compile(rb',"crc32c":(\d{1,10})\}\n\Z')
_MAX_SEAL_BYTES: Final = 24
_ATTEMPTS: Final = 20
"""Attempts to open the newest file, which a compaction may remove between its listing and its opening."""


@dataclass(frozen=True)
class LogRecord:
    """One change of the state."""

    seq: int
    key: str
    value: JsonValue = None
    deleted: bool = False


@dataclass(frozen=True)
class _Head:
    """The first line of a file."""

    base: int
    records: int


@dataclass(frozen=True)
class LogState:
    """The state of a log after all its records."""

    cursor: int
    """Sequence number of the last record; 0 if there was none."""
    items: dict[str, JsonValue]


@dataclass
class _Replay:
    """The content of a log file's whole lines, applied one after the other."""

    base: int = 0
    cursor: int = 0
    """Sequence number of the last record."""
    compacted: int = 0
    """Records of the compacted state that are still to come."""
    compacted_end: int = 0
    """Bytes up to the end of the compacted state."""
    end: int = 0
    """Bytes up to the end of the last whole line."""
    state: dict[str, LogRecord] = field(default_factory=dict[str, LogRecord])

    def take(self, record: LogRecord | _Head) -> bool:
        """Apply one line; False if it does not follow the lines before."""
        if isinstance(record, _Head):
            fits = self.end == 0 and record.records <= record.base
            self.base = self.cursor = record.base
            self.compacted = record.records
        elif self.compacted:
            last = next(reversed(self.state.values())).seq if self.state else 0
            fits = last < record.seq <= self.base and not record.deleted and record.key not in self.state
            self.compacted -= 1
            self.state[record.key] = record
        else:
            fits = self.end > 0 and record.seq == self.cursor + 1
            self.fold(record)
        return fits

    def fold(self, record: LogRecord) -> None:
        """Apply the next record to the state."""
        if record.deleted:
            self.state.pop(record.key, None)
        else:
            self.state[record.key] = record
        self.cursor = record.seq

    def items(self) -> dict[str, JsonValue]:
        return {key: record.value for key, record in self.state.items()}


class AppendLog:
    """A keyed state in memory, with every change on disk. One process writes at a time; readers need no lock.

    Args:
        path: The directory; it is created if it is missing.
        compact_threshold: Bytes that are appended before the log is compacted.
        sync: Whether a change is on disk, and not only in the kernel, before its call returns.

    Raises:
        TransferBusy: another process, or another object of this one, has it open.
        ChecksumMismatch: the log is damaged, beyond a torn end.
        UsageError: the threshold is not positive.
    """

    def __init__(
        self, path: str | Path, *, compact_threshold: int = DEFAULT_COMPACT_THRESHOLD, sync: bool = True
    ) -> None:
        if compact_threshold < 1:
            raise UsageError(f"the compaction threshold must be positive, not {compact_threshold}")
        self.path = Path(path)
        self._threshold = compact_threshold
        self._sync = sync
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock_file(self.path / _LOCK_NAME, f"another process writes to the log {self.path}")
        try:
            newest = _newest(self.path)
            if newest is None:
                self._replay = _Replay()
                self._file = self._write_whole()
            else:
                with open(newest, "rb") as stream:
                    self._replay = _replay(stream)
                with writing(self.path):
                    self._file = open(newest, "r+b", buffering=0)  # noqa: SIM115 - `close` closes it
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._clear_away()
            self._compact_if_due()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<AppendLog {self.path.name} at {self.cursor}, {len(self._replay.state)} keys>"

    def __enter__(self) -> AppendLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the log, so that another process can write."""
        if not self._file.closed:
            self._file.close()
            os.close(self._lock)

    @property
    def cursor(self) -> int:
        """The sequence number of the last record; 0 if there was none."""
        return self._replay.cursor

    def get(self, key: str) -> JsonValue:
        """The value of a key; None if it has none."""
        record = self._replay.state.get(key)
        return record.value if record else None

    def items(self) -> dict[str, JsonValue]:
        """The whole state."""
        return self._replay.items()

    def append(self, key: str, value: JsonValue) -> int:
        """Set a key; returns the sequence number of the record."""
        self._write([LogRecord(self.cursor + 1, key, value)])
        return self.cursor

    def delete(self, key: str) -> int:
        """Remove a key, which may be missing; returns the sequence number of the record."""
        self._write([LogRecord(self.cursor + 1, key, deleted=True)])
        return self.cursor

    def apply(self, records: Iterable[LogRecord]) -> int:
        """Apply records of the log that this one follows; may be called again with the same records.

        Records up to `cursor` are skipped. All records of a call are written at once; after a crash the first of them
        may be there without the rest.

        Returns:
            The number of new records.

        Raises:
            RefusedError: a record is missing before one of these (fields `expected`, `actual`); none was applied.
        """
        fresh: list[LogRecord] = []
        expected = self.cursor + 1
        for record in records:
            if record.seq > expected:
                raise RefusedError(
                    f"record {record.seq} does not follow record {expected - 1}",
                    hint=f"send the records from {expected} on, or bootstrap again from a newer artifact",
                    expected=expected,
                    actual=record.seq,
                )
            if record.seq == expected:
                fresh.append(record)
                expected += 1
        self._write(fresh)
        return len(fresh)

    def compact(self) -> None:
        """Keep only the newest record of each key; the cursor stays the same.

        Raises:
            DiskFull, RefusedError: the log is unchanged, and can still be written to.
        """
        if self._replay.base == self.cursor:
            return
        before = self._replay.end
        replaced = self._file
        self._file = self._write_whole()
        replaced.close()
        self._clear_away()
        log.info("log.compacted cursor=%d bytes_before=%d bytes=%d", self.cursor, before, self._replay.end)

    def _compact_if_due(self) -> None:
        if self._replay.end - self._replay.compacted_end > self._threshold:
            try:
                self.compact()
            except BlobflowError as error:
                # The records that triggered it are written: their writer must not assume that they failed.
                log.warning("log.not_compacted path=%s error=%s", self.path, error)

    def _write(self, records: list[LogRecord]) -> None:
        lines = [_encode(record) for record in records]
        data = b"".join(lines)
        if not data:
            return
        with writing(self.path):
            end = append_at(self._file.fileno(), self._replay.end, data, durable=self._sync)
        for line in lines:
            # Parsed as a reader would do it, so that the state shares no objects with the caller.
            self._replay.fold(cast("LogRecord", _parsed(line)))
        self._replay.end = end
        self._compact_if_due()

    def _write_whole(self) -> io.FileIO:
        """Write the whole state to a new file, which is then the newest of the log and open for appending."""
        replay = self._replay
        records = sorted(replay.state.values(), key=lambda record: record.seq)
        path = self.path / f"{replay.cursor:020}.log.jsonl"
        partial = self.path / f".{path.name}.partial"
        before = _newest(self.path)
        with writing(self.path):
            # Not readable by more users than the file that it replaces, which may be private and from another machine.
            mode = before.stat().st_mode & 0o666 if before else 0o666
            file = open(partial, "wb", buffering=0, opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115 - it becomes the log's own
            try:
                head = _sealed({"log": _FORMAT, "base": replay.cursor, "records": len(records)})
                end = append_at(file.fileno(), 0, head + b"".join(map(_encode, records)))
                os.rename(partial, path)
            except BaseException:
                file.close()
                partial.unlink()
                raise
        replay.base = replay.cursor
        replay.end = replay.compacted_end = end
        # Sorted as in the file.
        replay.state = {record.key: record for record in records}
        return file

    def _clear_away(self) -> None:
        """Remove incomplete files, and those that the newest one has replaced."""
        with writing(self.path):
            fsync_directory(self.path)
            newest = _newest(self.path)
            for entry in self.path.iterdir():
                if entry != newest and _OURS.fullmatch(entry.name):
                    entry.unlink()


def read_state(path: str | Path) -> LogState:
    """The present state of a log up to its last whole record; others may write to it meanwhile.

    Raises:
        NotFoundError: there is no log.
        ChecksumMismatch: the log is damaged.
    """
    with _open_newest(Path(path)) as stream:
        replay = _replay(stream)
    return LogState(replay.cursor, replay.items())


def read_records(path: str | Path, *, after: int = 0) -> list[LogRecord]:
    """The records of a log after the sequence number `after`, in order; others may write to it meanwhile.

    Raises:
        NotFoundError: there is no log; or a compaction has dropped some of these records, so that only a newer
            snapshot leads further (field `base`).
        ChecksumMismatch: the log is damaged.
    """
    records: list[LogRecord] = []
    with _open_newest(Path(path)) as stream:
        replay = _replay(stream, on_change=records.append)
    if after < replay.base:
        raise NotFoundError(
            f"the log {path} was compacted at {replay.base}: it no longer has all records after {after}",
            hint="bootstrap again from a newer artifact",
            path=str(path),
            base=replay.base,
        )
    return [record for record in records if record.seq > after]


class AppendLogExporter(KnownFields):
    """Exports an append log at one moment, up to its last whole record, while other processes continue to write to it.

    The cursor is that record's sequence number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="The directory of the log.")

    @property
    def backend(self) -> str:
        return BACKEND

    def export(self, dest: Path, *, on_progress: OnBytes | None = None) -> ExportResult:
        """Write an artifact of the log into `dest`; see `Exporter.export`.

        Raises:
            NotFoundError: there is no log.
            ChecksumMismatch: the log is damaged; there is no artifact then.
            DestinationNotEmpty: `dest` holds something.
            DiskFull: there is no room at `dest`.
        """
        path = expanded(self.path)
        with _open_newest(path) as stream:
            private = file_is_private(os.fstat(stream.fileno()).st_mode) or directory_is_private(path.stat().st_mode)

            def write(data: Path) -> JsonValue:
                with writing(dest), open(data / Path(stream.name).name, "wb") as copy:
                    return _replay(stream, on_line=copy.write).cursor

            return export_files(dest, backend=BACKEND, write=write, on_progress=on_progress, private=private)


class AppendLogImporter(VersionedImporter):
    """Keeps a mirror of an append log: `<path>/current` is a log that continues where the snapshot ended.

    If the log has followed its source further than an artifact, the artifact does not replace it, unless `rewind` is
    set.
    """

    compact_threshold: int = Field(
        default=DEFAULT_COMPACT_THRESHOLD, ge=1, description="Bytes appended between two compactions of the live log."
    )
    rewind: bool = Field(default=False, description="Whether an artifact may replace a log that is ahead of it.")

    @property
    @override
    def backend(self) -> str:
        return BACKEND

    @override
    def cursor(self) -> JsonValue:
        """The sequence number of the last record of the live log; None before the first import."""
        return read_state(self.data).cursor if self.data.exists() else None

    def open(self, *, sync: bool = True) -> AppendLog:
        """The live log for further records; nothing can be imported while it is open.

        Raises:
            NotFoundError: nothing was imported yet.
            TransferBusy: another process has it open.
        """
        if self.current() is None:
            raise NotFoundError(f"mirror {self.path} is empty", hint="import an artifact first", path=str(self.path))
        while True:
            shown = os.path.realpath(self.data)
            live = AppendLog(shown, compact_threshold=self.compact_threshold, sync=sync)
            # Only the holder of the log's lock may swap it: the log that is shown now stays until it is closed.
            if os.path.realpath(self.data) == shown:
                return live
            live.close()

    @override
    def prepare(self, artifact: Artifact) -> None:
        paths = artifact.index.paths
        if len(paths) != 1 or not _NAME.fullmatch(paths[0]):
            # A second file could be newer than the one that the cursor belongs to.
            raise HostileArtifact(
                f"{artifact!r} is not a log: it has members {', '.join(map(quoted, paths[:3]))}",
                path=str(artifact.path),
                reason="members",
            )
        self._check_order(artifact.manifest.cursor)

    @override
    def verify_open(self, artifact: Artifact) -> None:
        with _open_newest(artifact.data) as stream:
            found = _replay(stream)
        promised = artifact.manifest.cursor
        if found.cursor != promised or found.end != artifact.manifest.bytes:
            raise ArtifactInvalid(
                f"the log in {artifact!r} ends at record {found.cursor}, the manifest says {quoted(promised)}",
                path=str(artifact.path),
                what="cursor",
                expected=str(promised),
                actual=found.cursor,
            )

    @override
    def swap(self, version: Path) -> None:
        if self.data.exists():
            lock = take_lock_file(self.data / _LOCK_NAME, f"another process writes to the log {self.data}")
            try:
                # Another process may have appended since the import began.
                self._check_order(Artifact.open(version).manifest.cursor)
                super().swap(version)
            finally:
                os.close(lock)
        else:
            super().swap(version)

    def _check_order(self, offered: JsonValue) -> None:
        alive = self.cursor()
        if not self.rewind and isinstance(alive, int) and isinstance(offered, int) and alive > offered:
            raise RefusedError(
                f"the log in {self.path} is at {alive}, the artifact only reaches to {offered}",
                hint=f"import a newer artifact, or discard the later records with {setting('rewind')}",
                expected=alive,
                actual=offered,
            )


def _newest(path: Path) -> Path | None:
    try:
        names = [name for name in os.listdir(path) if _NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return None
    # A compaction removes the previous file only after its new file is whole.
    return path / max(names) if names else None


def _open_newest(path: Path) -> io.BufferedReader:
    """The newest file of a log; appends and compactions do not disturb the reading."""
    for _ in range(_ATTEMPTS):
        file = _newest(path)
        if file is None:
            break
        try:
            return open(file, "rb")
        except FileNotFoundError:
            continue
    raise NotFoundError(f"there is no log in {path}", path=str(path))


def _records(stream: io.BufferedReader) -> Iterator[tuple[bytes, LogRecord | _Head]]:
    """Every whole line with its content: the head first, then records. A torn end is left out."""
    size = os.fstat(stream.fileno()).st_size
    read_to = 0
    for end, line in whole_lines(stream):
        record = _parsed(line)
        if record is not None:
            yield line, record
        elif not read_to or end < size:
            raise _damaged(stream.name, read_to)
        else:
            break  # a power cut may leave a gap in the middle of the last write
        read_to = end
    if read_to < size:
        log.info("log.torn file=%s offset=%d bytes=%d", stream.name, read_to, size - read_to)


def _parsed(line: bytes) -> LogRecord | _Head | None:
    """The content of a line; None if the line is not whole."""
    seal = _SEAL.search(line, max(0, len(line) - _MAX_SEAL_BYTES))
    if seal is None or crc32c(line[: seal.start()]) != int(seal[1]):
        return None
    try:
        match json.loads(line):
            case {"log": 1, "base": int(base), "records": int(records)}:
                return _Head(base, records)
            case {"seq": int(seq), "key": str(key), "deleted": True}:
                return LogRecord(seq, key, deleted=True)
            case {"seq": int(seq), "key": str(key), "value": value}:
                return LogRecord(seq, key, value)
            case _:
                return None
    except (ValueError, RecursionError):
        return None


def _replay(
    stream: io.BufferedReader,
    *,
    on_line: Callable[[bytes], object] | None = None,
    on_change: Callable[[LogRecord], object] | None = None,
) -> _Replay:
    """The content of a file; every whole line goes to `on_line`, every record after the base to `on_change`."""
    replay = _Replay()
    for line, record in _records(stream):
        if not replay.take(record):
            raise _damaged(stream.name, replay.end)
        replay.end += len(line)
        if replay.cursor == replay.base:
            replay.compacted_end = replay.end
        elif on_change and isinstance(record, LogRecord):
            on_change(record)
        if on_line:
            on_line(line)
    if not replay.end or replay.compacted:
        raise _damaged(stream.name, replay.end)
    return replay


def _damaged(file: str, offset: int) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"the log {file} is damaged at byte {offset}", hint="restore it from a snapshot", what=file, offset=offset
    )


def _encode(record: LogRecord) -> bytes:
    if not isinstance(record.key, str):  # pyright: ignore[reportUnnecessaryIsInstance] - nobody could read it back
        raise UsageError(f"the key of a record is a string, not {record.key!r}")
    document: dict[str, JsonValue] = {"seq": record.seq, "key": record.key}
    document |= {"deleted": True} if record.deleted else {"value": record.value}
    return _sealed(document)


def _sealed(document: dict[str, JsonValue]) -> bytes:
    try:
        body = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))[:-1].encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the record cannot be encoded as JSON: {error}") from error
    return body + b',"crc32c":%d}\n' % crc32c(body)
