"""Operations from a file, their results as a Parquet table; a run that was killed or had failures can be continued.

While a batch runs, each result is a line of a journal beside the table. At the end the journal becomes the table, in
one step. A later run of the same file executes operations that are in neither, and those that failed.
"""
# pyarrow has no types
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from blobflow.artifact.pages import DELTA_BYTE_ARRAY, DICTIONARY, FileBytes, check_foreign_footer, column_chunks, pages
from blobflow.batch.operations import PIECE_BYTES, BatchResult, Delete, Get, Got, Insert, Inserted, Operation
from blobflow.batch.stream import BatchExecutor
from blobflow.durable import append_at, names_file, try_lock, whole_lines
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    InvalidOperation,
    ObjectTooLarge,
    ResultsConflict,
    TransferBusy,
    UsageError,
    writing,
)
from blobflow.private import open_own
from blobflow.stores.base import ObjectMeta
from blobflow.untrusted import quoted

FORMAT: Final = "blobflow.batch-results/1"
SCHEMA: Final = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),  # position in the file of operations, from 0
        pa.field("kind", pa.string()),  # insert, get, delete; null if the entry is not an operation
        pa.field("key", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # done, absent (a get of a missing object), failed
        pa.field("size", pa.int64()),  # bytes that were put or read
        pa.field("e_tag", pa.string()),
        pa.field("error", pa.string()),  # type of the error
        pa.field("message", pa.string()),
        pa.field("hint", pa.string()),
        pa.field("retryable", pa.bool_()),
        pa.field("payload", pa.binary()),  # of gets, if requested
    ]
)

_JOURNAL_SUFFIX: Final = ".journal"
_FLUSH_ROWS: Final = 100
_FLUSH_S: Final = 1.0
"""Seconds of results that a kill may lose; the next run repeats them, which is safe."""
_TABLE_ROWS: Final = 1000
"""Rows per row group: with payloads of 1 MiB, at most a gibibyte."""
_PAGE_ROWS: Final = 4
"""Rows after which a page may end: with payloads of 1 MiB it has 5 MiB, which `_measured` accepts."""
_MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""A payload of 1 MiB in base64, or with every character escaped, and room for the rest."""
_SAMPLE: Final = 20
_MAX_PAGE_BYTES: Final = 8 << 20
_MAX_RATIO: Final = 8
"""Pages above the limit must have at least an eighth of their size in the file, so that a small file stays cheap."""
_BATCH_ROWS: Final = 256
_BATCH_BYTES: Final = 8 << 20
_UNREADABLE: Final = (pa.ArrowException, ArtifactInvalid, KeyError, OSError, RuntimeError, TypeError, ValueError)
"""What pyarrow raises for a file that is not Parquet, or has other columns."""
_TEXTS: Final = ("kind", "key", "e_tag", "error", "message", "hint", "payload")
_STATUSES: Final = ("done", "absent", "failed")

OnOperations = Callable[[int, int], None]
"""`on_progress(done, total)` counts operations."""


@dataclass(frozen=True)
class Failure:
    """One failed operation."""

    index: int
    kind: str | None
    key: str | None
    error: str
    message: str
    retryable: bool


@dataclass(frozen=True)
class BatchReport:
    """The state of a file's operations after all runs."""

    operations: int
    executed: int
    """Operations executed by this run."""
    resumed: int
    """Operations done by earlier runs."""
    done: int
    absent: int
    failed: int
    kinds: dict[str, int]
    failures: list[Failure]
    """The first failures."""
    retryable: bool
    """Whether all failed operations may succeed in another run."""
    results: Path
    seconds: float


@dataclass
class _Counts:
    statuses: Counter[str] = field(default_factory=Counter[str])
    kinds: Counter[str] = field(default_factory=Counter[str])
    failures: list[Failure] = field(default_factory=list[Failure])
    retryable: bool = True


def default_results(operations: Path) -> Path:
    """The default path for the results of a file."""
    return operations.with_name(operations.name + ".results.parquet")


def run_batch_file(
    executor: BatchExecutor,
    operations: Path,
    results: Path | None = None,
    *,
    payloads: bool = False,
    fresh: bool = False,
    on_progress: OnOperations | None = None,
) -> BatchReport:
    """Execute the operations of a file and write their results; may be called again after a crash, and for failures.

    Args:
        operations: JSON lines or, with the ending `.parquet`, a table; see docs/batch.md. An insert without a key gets
            one from the file's content and its position, so that repeating it inserts nothing twice.
        results: The table; it belongs to this content of the file.
        payloads: Keep the payloads of gets in the table. Objects above 1 MiB fail then.
        fresh: Forget earlier results and execute everything.

    Raises:
        ResultsConflict: the results belong to other operations.
        TransferBusy: another process works on them now.
        AtCapacity: see `BatchExecutor.stream`.
    """
    started = time.monotonic()
    results = default_results(operations) if results is None else results
    source = _Source(operations)
    with _Journal(results, source.digest, payloads=payloads, fresh=fresh) as journal:
        before = frozenset(journal.done)
        positions: dict[int, int] = {}
        """Index in the stream -> index in the file, for operations under way."""

        def undone() -> Iterator[Operation | BlobflowError]:
            ours = (pair for pair in enumerate(source) if pair[0] not in before)
            for number, (index, item) in enumerate(ours):
                positions[number] = index
                yield item

        with executor.stream(undone()) as stream:
            for result in stream:
                journal.add(_row(positions.pop(result.index), result, payloads=payloads))
                if on_progress is not None:
                    on_progress(len(journal.done) + journal.failed, source.count)
        executed = len(journal.done) - len(before) + journal.failed
        counts = journal.publish()
    return BatchReport(
        operations=source.count,
        executed=executed,
        resumed=len(before),
        done=counts.statuses["done"],
        absent=counts.statuses["absent"],
        failed=counts.statuses["failed"],
        kinds=dict(counts.kinds),
        failures=counts.failures,
        retryable=counts.retryable,
        results=results,
        seconds=time.monotonic() - started,
    )


def _row(index: int, result: BatchResult, *, payloads: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index, "kind": result.kind or None, "key": result.key, "status": "done"}
    error, response = result.error, result.response
    if isinstance(response, Got):
        if response.payload is None:
            return row | {"status": "absent"}
        with response.payload as payload:
            if payload.is_open and payloads:
                message = f"{result.key!r} has {payload.size} bytes, too many for a table"
                error = ObjectTooLarge(message, key=result.key, limit=PIECE_BYTES)
            else:
                row |= _about(payload.meta)
                if payloads:
                    row["payload"] = base64.b64encode(payload.read()).decode()
    elif isinstance(response, Inserted):
        row |= _about(response.meta)
    if error is None:
        return row
    said = error if isinstance(error, BlobflowError) else None
    return row | {
        "status": "failed",
        "error": type(error).__name__,
        "message": str(error),
        "hint": (said.hint if said else "") or None,
        "retryable": said is not None and said.retryable,
    }


def _about(meta: ObjectMeta) -> dict[str, Any]:
    return {"size": meta.size, "e_tag": meta.e_tag}


# Operations


class _Source:
    """A file of operations, read once for its digest and once more for its entries."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_table = path.suffix == ".parquet"
        digest, lines, last = hashlib.sha256(), 0, b"\n"
        try:
            with path.open("rb") as file:
                while chunk := file.read(1024 * 1024):
                    digest.update(chunk)
                    lines += chunk.count(b"\n")
                    last = chunk[-1:]
            self.count: int = _count_rows(path) if self._is_table else lines + (last != b"\n")
        except _UNREADABLE as error:
            raise self._unreadable(error) from error
        self.digest = digest.hexdigest()

    def __iter__(self) -> Iterator[Operation | BlobflowError]:
        for index, entry in enumerate(self._entries()):
            yield self._operation(index, entry)

    def _entries(self) -> Iterator[Any]:
        if not self._is_table:
            with self._path.open("rb") as file:
                while line := file.readline(_MAX_LINE_BYTES):
                    yield line
                    while not line.endswith(b"\n") and (line := file.readline(_MAX_LINE_BYTES)):
                        pass  # the rest of a line that is too long
            return
        try:
            with _measured(self._path) as (table, rows):
                known = [name for name in ("op", "key", "payload", "metadata") if name in table.schema_arrow.names]
                for batch in table.iter_batches(batch_size=rows, columns=known):
                    yield from batch.to_pylist(maps_as_pydicts="strict")
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UsageError:
        return UsageError(f"{self._path} cannot be read as operations: {quoted(error)}", path=str(self._path))

    def _operation(self, index: int, entry: Any) -> Operation | BlobflowError:
        def refuse(reason: str) -> InvalidOperation:
            return InvalidOperation(
                f"{self._path.name}, entry {index}: {reason}",
                hint='an entry is like {"op": "insert", "key": "a/b", "payload": "text"}; op: insert, get, delete',
                path=str(self._path),
                index=index,
            )

        if isinstance(entry, bytes):
            try:
                entry = json.loads(entry)
            except (ValueError, RecursionError):
                return refuse("it is not JSON")
        if not isinstance(entry, dict):
            return refuse("it is not an object")
        given = {name: value for name, value in cast("dict[str, Any]", entry).items() if value is not None}
        kind, key = given.pop("op", None), given.pop("key", None)
        if kind == "insert" and (key is None or isinstance(key, str)):
            return self._insert(index, key, given, refuse)
        if not isinstance(key, str):
            return refuse("it has no key")
        if kind not in ("get", "delete"):
            return refuse(f"{quoted(kind)} is not an op")
        if given:
            return refuse(f"a {kind} has no {quoted(min(given))}")
        return Get(key) if kind == "get" else Delete(key)

    def _insert(
        self, index: int, key: str | None, given: dict[str, Any], refuse: Callable[[str], InvalidOperation]
    ) -> Operation | BlobflowError:
        payload, encoded = given.pop("payload", None), given.pop("payload_base64", None)
        metadata = given.pop("metadata", None)
        if given:
            return refuse(f"an insert has no {quoted(min(given))}")
        if (payload is None) == (encoded is None):
            return refuse("an insert has either a payload or a payload_base64")
        if isinstance(encoded, str):
            try:
                payload = base64.b64decode(encoded, validate=True)
            except ValueError:
                return refuse("its payload_base64 is not base64")
        if isinstance(payload, str):
            payload = payload.encode("utf-8", "surrogatepass")
        if not isinstance(payload, bytes):
            return refuse("its payload is not text")
        texts: list[Any] = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [metadata or ""]
        if not all(isinstance(text, str) for text in texts) or (metadata and not isinstance(metadata, dict)):
            return refuse("its metadata are not names and texts")
        if key is None:
            key = hashlib.sha256(f"{self.digest}/{index}".encode()).hexdigest()[:32]
        return Insert(key, payload, metadata or None)


@contextmanager
def _measured(path: Path, *, own: bool = False) -> Generator[tuple[pq.ParquetFile, int]]:
    """A table whose pages are no larger than its file justifies, and how many of its rows may be decoded at once.

    Args:
        own: Whether it must be a file of this user.

    Raises:
        ArtifactInvalid: its pages are too large, or it is not a Parquet file.
        RefusedError: it belongs to another user, or is a link.
    """
    with os.fdopen(open_own(path, os.O_RDONLY, 0o666), "rb") if own else path.open("rb") as file:
        footer = check_foreign_footer(file)
        with pq.ParquetFile(file) as table:
            largest, data = 1, FileBytes(file)
            for start, stop in (chunk for group in column_chunks(data, footer, data.size - 8) for chunk in group):
                if not 4 <= start <= stop <= footer:
                    raise ArtifactInvalid("a column lies outside of the file", what="table")
                for page in pages(data, start, stop):
                    if page.size > max(_MAX_PAGE_BYTES, _MAX_RATIO * page.stored):
                        raise ArtifactInvalid(
                            f"a page has {page.size} bytes, of which {page.stored} are in the file", what="table"
                        )
                    if page.encoding == DELTA_BYTE_ARRAY:
                        raise ArtifactInvalid(
                            "a page is encoded as DELTA_BYTE_ARRAY, which may stand for any size", what="table"
                        )
                    if page.kind == DICTIONARY:  # one value of it may stand for every row
                        largest = max(largest, page.size)
            yield table, max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest))


def _count_rows(path: Path) -> int:
    with _measured(path) as (table, _):
        return table.metadata.num_rows


# Results


class _Journal:
    """The results so far, one line for each; the last line of an index counts.

    Attributes:
        done: Indexes that need not be executed.
        failed: Failures added by this run.
    """

    def __init__(self, results: Path, digest: str, *, payloads: bool, fresh: bool) -> None:
        self.done: set[int] = set()
        self.failed = 0
        self._table = results
        self._path = results.with_name(results.name + _JOURNAL_SUFFIX)
        self._digest = digest
        self._payloads = payloads
        self._fresh = fresh
        self._end = 0
        """Offset after the last whole line."""
        self._rows: list[str] = []
        self._flushed_at = 0.0

    def __enter__(self) -> _Journal:
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_own(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._file = os.fdopen(self._descriptor, "rb")
        # A process that just ended may have removed the journal.
        if not try_lock(self._descriptor) or not names_file(self._path, self._descriptor):
            self._file.close()
            hint = "wait for it to end"
            raise TransferBusy(f"another process works on {self._table}", hint=hint, path=str(self._table))
        try:
            self._begin()
        except BaseException:
            if not os.fstat(self._descriptor).st_size:
                self._path.unlink(missing_ok=True)
            self._file.close()
            raise
        return self

    def _begin(self) -> None:
        if self._fresh:
            os.ftruncate(self._descriptor, 0)
            self._table.unlink(missing_ok=True)
        _, header = next(whole_lines(self._file), (0, b""))
        if header:
            self._check(self._parsed(header).get("operations_sha256"))
            for _, row in self._read():
                self._learn(row)
            return
        os.ftruncate(self._descriptor, 0)
        head = json.dumps({"format": FORMAT, "operations_sha256": self._digest})
        before = self._of_table() if self._table.exists() else ()
        rows = (json.dumps(row) for row in before if self._learn(row))
        first = next(rows, None)  # reads the table before anything is written
        self._write([head, *filter(None, [first])])
        for row in rows:
            self._write([row])

    def _check(self, digest: Any) -> None:
        if digest != self._digest:
            raise ResultsConflict(f"{self._table} has the results of other operations", path=str(self._table))

    def _of_table(self) -> Iterator[dict[str, Any]]:
        try:
            with _measured(self._table, own=True) as (table, rows):
                if table.schema_arrow.remove_metadata() != SCHEMA:
                    raise TypeError("another schema")
                about: dict[bytes, bytes] = table.schema_arrow.metadata or {}
                self._check(about.get(b"blobflow.operations_sha256", b"").decode("ascii", "replace"))
                for batch in table.iter_batches(batch_size=rows):
                    for row in batch.to_pylist():
                        if row["payload"] is not None:
                            row["payload"] = base64.b64encode(row["payload"]).decode()
                        yield {name: value for name, value in row.items() if name == "kind" or value is not None}
        except _UNREADABLE as error:
            raise ResultsConflict(f"{self._table} is not a table of results", path=str(self._table)) from error

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Offset and content of each whole line after the first."""
        for end, line in whole_lines(self._file):
            if end > len(line):
                yield end - len(line), self._row_in(line)
            self._end = end

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise ResultsConflict(f"{self._path} is not a journal of results", path=str(self._path))
        return cast("dict[str, Any]", parsed)

    def _row_in(self, line: bytes) -> dict[str, Any]:
        """A row as this module writes it; anything else comes from another program."""
        row = self._parsed(line)
        numbers = [row.get("index"), row.get("size", 0)]
        right = (
            all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
            and all(isinstance(row.get(name, ""), str | None) for name in _TEXTS)
            and {"kind", *(("error", "message") if row.get("status") == "failed" else ())} <= row.keys()
            and row.get("status") in _STATUSES
            and isinstance(row.get("retryable", False), bool)
            and row.keys() <= set(SCHEMA.names)
        )
        try:
            base64.b64decode(row.get("payload") or "", validate=True)
            "".join(row.get(name) or "" for name in _TEXTS).encode()
        except (TypeError, ValueError):
            right = False
        if not right:
            raise ResultsConflict(f"{self._path} is not a journal of results", path=str(self._path))
        return row

    def _learn(self, row: dict[str, Any]) -> bool:
        """Record a row; returns whether its operation need not be executed again."""
        wants_payload = self._payloads and row["kind"] == "get" and row["status"] == "done"
        if row["status"] == "failed" or (wants_payload and "payload" not in row):
            self.done.discard(row["index"])
            return False
        self.done.add(row["index"])
        return True

    def add(self, row: dict[str, Any]) -> None:
        """Record a result."""
        if row["status"] == "failed":
            self.failed += 1
        else:
            self.done.add(row["index"])
        kept = {n: _told(value) for n, value in row.items() if n == "kind" or value is not None}
        self._rows.append(json.dumps(kept))
        if len(self._rows) >= _FLUSH_ROWS or time.monotonic() - self._flushed_at >= _FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        if self._rows:
            self._write(self._rows)
            self._rows = []

    def _write(self, lines: list[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        with writing(self._path):
            self._end = append_at(self._descriptor, self._end, data, durable=False)

    def publish(self) -> _Counts:
        """Turn the journal into the table, which appears as a whole."""
        self._flush()
        offsets = {row["index"]: offset for offset, row in self._read()}
        counts = _Counts()
        making = self._table.with_name(f".{self._table.name}.{os.getpid()}")
        schema = SCHEMA.with_metadata({"blobflow.format": FORMAT, "blobflow.operations_sha256": self._digest})
        try:
            with writing(self._table):
                making.unlink(missing_ok=True)  # of a killed process, or planted: O_EXCL follows no link
                descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                with (
                    os.fdopen(descriptor, "wb") as file,
                    pq.ParquetWriter(file, schema, compression="zstd", write_batch_size=_PAGE_ROWS) as table,
                ):
                    places = [offsets[index] for index in sorted(offsets)]
                    for at in range(0, max(1, len(places)), _TABLE_ROWS):
                        rows = [self._row_at(place) for place in places[at : at + _TABLE_ROWS]]
                        for row in rows:
                            _count(counts, row)
                        table.write_table(pa.Table.from_pylist(rows, schema))
                making.replace(self._table)
        finally:
            making.unlink(missing_ok=True)
        self._path.unlink()
        return counts

    def _row_at(self, offset: int) -> dict[str, Any]:
        self._file.seek(offset)
        row = self._row_in(self._file.readline())
        if row.get("payload") is not None:
            row["payload"] = base64.b64decode(row["payload"])
        return row

    def __exit__(self, *_: object) -> None:
        try:
            self._flush()
        finally:
            self._file.close()


def _told(value: Any) -> Any:
    """A value as the table can hold it: a refused key may not have been text."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _count(counts: _Counts, row: dict[str, Any]) -> None:
    counts.statuses[row["status"]] += 1
    counts.kinds[row["kind"] or "invalid"] += 1
    if row["status"] == "failed":
        counts.retryable = counts.retryable and row.get("retryable", False)
        if len(counts.failures) < _SAMPLE:
            counts.failures.append(
                Failure(row["index"], row["kind"], row.get("key"), row["error"], row["message"], row["retryable"])
            )
