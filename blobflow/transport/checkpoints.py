"""Journals of transfers: the progress of each, over all attempts, on any machine.

A journal is a hint, never the truth. Every attempt checks what the store (or the stage of a download) holds, and that
wins. So a record that is lost, old or false costs a log line and no byte. A journal adds the history: that this is the
third attempt, that run 5f2c had reached 61 GB, that it has been running for two hours.

`TransferJournal` decides what is written and when. A `CheckpointStore` keeps it: `LocalCheckpointStore` here, Dagster's
event log in `blobflow.dagster.checkpoints`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from pydantic import BaseModel, ConfigDict, Field

from blobflow.durable import append_lines, whole_lines
from blobflow.errors import ArtifactInvalid, UsageError, writing
from blobflow.owner import process_owner
from blobflow.private import PrivateDirectory
from blobflow.untrusted import Counter, Timestamp, as_model, read_object
from blobflow.uploads.progress import TransferRecord

log = logging.getLogger(__name__)

VERSION: Final = 1
INTERVAL_S: Final = 10.0
"""Seconds between two checkpoints of a running transfer: rows of an event log are never removed."""

_TRANSFER_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,200}")


class Checkpoint(BaseModel):
    """A transfer's record at one moment, and its place in the chain of attempts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = VERSION
    record: TransferRecord
    attempt: int = Field(
        ge=1, lt=1 << 63, description="Processes that worked on the transfer so far, including this one."
    )
    sequence: int = Field(ge=1, lt=1 << 63, description="Checkpoints so far, over all attempts.")
    writer: str = Field(description="The writer: a run id, or host and process.")
    continues: str = Field(default="", description="The writer of the attempt before this one.")
    began_at: Timestamp = Field(description="When this attempt began; Unix time in seconds.")
    saved_at: Timestamp = Field(description="When this was written; Unix time in seconds.")

    @property
    def bytes_moved(self) -> int:
        """Bytes moved by this attempt."""
        return self.record.bytes_done - self.record.bytes_resumed

    @property
    def bytes_per_s(self) -> float:
        """Average rate of this attempt; 0.0 at its beginning."""
        seconds = self.saved_at - self.began_at
        return self.bytes_moved / seconds if seconds > 0 else 0.0

    def to_json(self) -> str:
        """One line of JSON, under 2 KB with any key that S3 allows."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Checkpoint:
        """The checkpoint in `text`, also from older versions; the inverse of `to_json`.

        Raises:
            UsageError: it is not a checkpoint, or a newer version wrote it.
        """
        try:
            document = read_object(text, "checkpoint")
            version = as_model(_Versioned, document, "checkpoint").version
            if version <= VERSION:
                return as_model(cls, document, "checkpoint")
        except ArtifactInvalid as error:
            raise UsageError(f"not a checkpoint: {error.message}") from error
        raise UsageError(
            f"the checkpoint has version {version}, this blobflow reads up to {VERSION}",
            hint="a newer blobflow wrote it; use that one, or let the transfer continue from what the store holds",
        )


class _Versioned(BaseModel):
    """The only field that may be read of a checkpoint before its version is known."""

    model_config = ConfigDict(extra="ignore")

    version: Counter


class CheckpointStore(Protocol):
    """Keeps the checkpoints of transfers."""

    def read(self, transfer_id: str) -> str | None:
        """The newest checkpoint of a transfer as it was written; None if there is none."""
        ...

    def append(self, checkpoint: Checkpoint) -> None:
        """Keep another checkpoint. On return, it survives the death of the process."""
        ...


class TransferJournal:
    """Loads, saves and settles the checkpoints of transfers; one object per process, used by one thread.

    `save` fits as the `on_checkpoint` of `upload`, `download` and `verify`. It writes the first record of an attempt,
    at most one per `interval_s` while it runs, and always the last one (`done` or `failed`).

    Args:
        writer: The writer that the checkpoints name; by default this process.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        home: CheckpointStore,
        *,
        writer: str | None = None,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home = home
        self._writer = writer or process_owner()
        self._interval_s = interval_s
        self._clock = clock
        self._last: dict[str, Checkpoint] = {}
        """The last checkpoint of each transfer that this process has written."""

    def __repr__(self) -> str:
        return f"<TransferJournal of {self._writer}, {len(self._last)} transfers>"

    def load(self, transfer_id: str) -> Checkpoint | None:
        """The newest checkpoint of a transfer, from any writer; None if there is none.

        Raises:
            UsageError: a newer blobflow wrote it, or it is damaged.
        """
        text = self._home.read(transfer_id)
        return Checkpoint.from_json(text) if text is not None else None

    def written(self, transfer_id: str) -> Checkpoint | None:
        """The last checkpoint of a transfer that this process wrote."""
        return self._last.get(transfer_id)

    def save(self, record: TransferRecord) -> Checkpoint | None:
        """Write a record; None if none was due, or if another process has written since and continues the transfer."""
        mine = self._last.get(record.transfer_id)
        now = self._clock()
        if mine is None:
            checkpoint = self._first(record, now)
        elif record.state == "running" and 0 <= now - mine.saved_at < self._interval_s:
            return None
        else:
            latest = self._readable(record.transfer_id)
            if latest is not None and latest.sequence > mine.sequence:
                return None
            checkpoint = mine.model_copy(update={"record": record, "sequence": mine.sequence + 1, "saved_at": now})
        self._home.append(checkpoint)
        self._last[record.transfer_id] = checkpoint
        return checkpoint

    def done(self, transfer_id: str) -> Checkpoint | None:
        """Record that a transfer is complete, as the store shows, if the journal still has it under way.

        This is for a transfer whose process completed it and died before it could write its last checkpoint.
        """
        latest = self._readable(transfer_id)
        if latest is None or latest.record.state == "done":
            return None
        record = latest.record
        whole = {"parts_done": record.parts_total, "bytes_done": record.bytes_total, "state": "done"}
        return self.save(record.model_copy(update=whole))

    def _first(self, record: TransferRecord, now: float) -> Checkpoint:
        """The first checkpoint of an attempt, which continues the chain of earlier attempts."""
        before = self._readable(record.transfer_id)
        again = before is not None and before.record.state != "done"
        if before is not None and again:
            log.info(
                "journal.continued transfer=%s attempt=%d after=%s journal_bytes=%d found_bytes=%d",
                *(record.transfer_id, before.attempt + 1, before.writer, before.record.bytes_done, record.bytes_done),
            )
        return Checkpoint(
            record=record,
            attempt=before.attempt + 1 if before and again else 1,
            sequence=before.sequence + 1 if before else 1,
            writer=self._writer,
            continues=before.writer if before and again else "",
            began_at=now,
            saved_at=now,
        )

    def _readable(self, transfer_id: str) -> Checkpoint | None:
        """The newest checkpoint; None if it is unreadable, because the store has the truth anyway."""
        try:
            return self.load(transfer_id)
        except UsageError as error:
            log.warning("journal.refused transfer=%s error=%r", transfer_id, error.message)
            return None


class LocalCheckpointStore:
    """One file per transfer in a directory: a line of JSON per checkpoint, fsynced.

    Several processes may append to one file; a line torn by a crash is skipped.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def __repr__(self) -> str:
        return f"<LocalCheckpointStore {self._directory}>"

    def read(self, transfer_id: str) -> str | None:
        path = self._path(transfer_id)
        try:
            with (
                PrivateDirectory.at(self._directory, make=False) as directory,
                os.fdopen(directory.open(path.name, os.O_RDONLY), "rb") as file,
            ):
                # A torn line that the newline of the next write ended is not a record either.
                records = [line for _, line in whole_lines(file) if line.startswith(b"{") and line.endswith(b"}\n")]
        except FileNotFoundError:
            return None
        return records[-1].decode(errors="replace").rstrip("\n") if records else None

    def append(self, checkpoint: Checkpoint) -> None:
        path = self._path(checkpoint.record.transfer_id)
        with writing(path), PrivateDirectory.at(self._directory) as directory:
            descriptor = directory.open(path.name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                append_lines(descriptor, [checkpoint.to_json()])
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            directory.sync()

    def _path(self, transfer_id: str) -> Path:
        if not _TRANSFER_ID.fullmatch(transfer_id):
            raise UsageError(f"invalid transfer id {transfer_id!r}", hint="use letters, digits, `_` and `-`")
        return self._directory / f"{transfer_id}.jsonl"
