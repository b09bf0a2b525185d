"""The progress of a transfer in parts: counted by the calling thread, saved as checkpoints, reported to callbacks."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from blobflow.config import ChunkProfile
from blobflow.errors import NoSuchUpload
from blobflow.stores.base import Reader
from blobflow.untrusted import Counter

log = logging.getLogger(__name__)

_PROGRESS_S: Final = 0.5


TransferKind: TypeAlias = Literal["upload", "verify", "download", "copy"]


class TransferRecord(BaseModel):
    """The record of an artifact's transfer at each checkpoint. It is only a hint; the truth is in the store."""

    model_config = ConfigDict(frozen=True)

    transfer_id: str = Field(description="The same on every machine for the same store, key, artifact and direction.")
    kind: TransferKind
    key: str
    artifact_digest: str
    upload_id: str | None = None
    part_size: Counter
    parts_total: Counter
    parts_done: Counter
    bytes_done: Counter
    bytes_total: Counter
    parts_resumed: Counter = Field(default=0, description="Parts that the store or the stage held before.")
    bytes_resumed: Counter = Field(default=0, description="Bytes that the store or the stage held before.")
    state: Literal["running", "done", "failed"]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")


_COUNTERS: Final = (
    *("bytes_total", "bytes_received", "bytes_sent", "bytes_moved", "bytes_resumed"),
    *("parts", "parts_resumed", "checkpoints_saved", "seconds"),
)


@dataclass(frozen=True, kw_only=True)
class TransferStats:
    """The counters of a transfer; each kind of result adds the direction of its bytes."""

    bytes_total: int
    """Bytes of the whole, including those that were there before."""
    bytes_resumed: int = 0
    """Bytes that an earlier attempt had moved."""
    seconds: float

    def to_dict(self) -> dict[str, int | float]:
        """The counters of this result by name, as `--json` prints them."""
        return {name: getattr(self, name) for name in _COUNTERS if hasattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class PartStats(TransferStats):
    """The counters of a transfer in numbered parts."""

    parts: int = 0
    """All parts, including those of an earlier attempt."""
    checkpoints_saved: int = 0


class ProgressEvent(NamedTuple):
    """The state of a transfer; bytes count the payload."""

    phase: TransferKind
    bytes_done: int
    bytes_total: int
    bytes_resumed: int
    """The part of `bytes_done` that an earlier process had moved."""


OnProgress: TypeAlias = Callable[[ProgressEvent], None]
OnRecord: TypeAlias = Callable[[TransferRecord], object]


_KEY_CHARACTERS: Final = 100
"""Maximum characters of a key in a transfer's name, which is also a file name."""


def transfer_id(store: Reader, key: str, digest: str, kind: str) -> str:
    """The name of a transfer, the same in every process.

    It begins with the kind and the end of the key, for people who look for one of many; the rest makes it unique.
    """
    unique = hashlib.sha256("\n".join((store.url, key, digest, kind)).encode()).hexdigest()[:32]
    return f"{kind}-{re.sub(r'[^A-Za-z0-9]+', '_', key[-_KEY_CHARACTERS:]).strip('_')}-{unique}"


class TransferProgress:
    """Counts, saves and reports the progress of one transfer; used by one thread.

    Args:
        digest: Digest of the artifact.
        parts: Number of parts.
        size: Bytes to move.
        head_size: Bytes, beyond `size`, that are there when the transfer begins.
        save: Makes the parts moved so far durable; called every `profile.checkpoint_interval` parts.
        on_progress: Called about twice a second.
        on_checkpoint: Called at the beginning, after each `save`, and at the end.
    """

    def __init__(
        self,
        store: Reader,
        key: str,
        digest: str,
        kind: TransferKind,
        *,
        part_size: int,
        parts: int,
        size: int,
        profile: ChunkProfile,
        head_size: int = 0,
        upload_id: str | None = None,
        save: Callable[[], None] = lambda: None,
        on_progress: OnProgress | None,
        on_checkpoint: OnRecord | None,
    ) -> None:
        self.record = TransferRecord(
            transfer_id=transfer_id(store, key, digest, kind),
            kind=kind,
            key=key,
            artifact_digest=digest,
            upload_id=upload_id,
            part_size=part_size,
            parts_total=parts,
            parts_done=0,
            bytes_done=head_size,
            bytes_total=head_size + size,
            state="running",
        )
        self.saved = 0
        self.bytes_moved = 0
        self._interval = profile.checkpoint_interval
        self._save = save
        self._on_progress = on_progress
        self._on_checkpoint = on_checkpoint
        self._unsaved = 0
        self._shown_at = 0.0

    @property
    def bytes_resumed(self) -> int:
        """Bytes that another process had moved before."""
        return self.record.bytes_resumed

    def resumed(self, length: int) -> None:
        """Count a part that another process had moved before."""
        self._count(length)
        record = self.record
        self.record = record.model_copy(
            update={"parts_resumed": record.parts_resumed + 1, "bytes_resumed": record.bytes_resumed + length}
        )

    def begin(self) -> None:
        """Report what is done already, once it is known."""
        if self._on_checkpoint:
            self._on_checkpoint(self.record)

    def moved(self, length: int) -> None:
        """Count a moved part; saves every `interval` parts."""
        self._count(length)
        self.bytes_moved += length
        self._unsaved += 1
        if self._unsaved >= self._interval:
            self.save()

    def _count(self, length: int) -> None:
        record = self.record
        self.record = record.model_copy(
            update={"parts_done": record.parts_done + 1, "bytes_done": record.bytes_done + length}
        )

    def save(self) -> None:
        """Make the progress durable, then report it."""
        self._save()
        self._unsaved = 0
        self.saved += 1
        if self._on_checkpoint:
            self._on_checkpoint(self.record)

    def tick(self) -> None:
        """Report the progress if it is due."""
        now = time.monotonic()
        if self._on_progress and now - self._shown_at >= _PROGRESS_S:
            self._shown_at = now
            self.show()

    def show(self) -> None:
        """Report the progress now."""
        if self._on_progress:
            done, total = self.record.bytes_done, self.record.bytes_total
            self._on_progress(ProgressEvent(self.record.kind, done, total, self.bytes_resumed))

    def done(self) -> None:
        """Write the final record."""
        self.record = self.record.model_copy(update={"state": "done", "bytes_done": self.record.bytes_total})
        self.show()
        if self._on_checkpoint:
            self._on_checkpoint(self.record)

    def failed(self) -> None:
        """Save what can be saved while another error propagates; an error from here must not hide that one."""
        self.record = self.record.model_copy(update={"state": "failed"})
        try:
            self.save()
        except Exception as error:  # noqa: BLE001  # the first error is the one to report
            log.warning("transfer.last_checkpoint_failed key=%s error=%r", self.record.key, error)

    @contextmanager
    def failure_saved(self) -> Generator[None]:
        """Call `failed` if the block fails, except for an upload that is gone: then there is nothing to save."""
        try:
            yield
        except NoSuchUpload:
            raise
        except BaseException:
            self.failed()
            raise

    def counters(self, started: float) -> dict[str, Any]:
        """The fields of a `PartStats`; the transfer started at `started`, by the monotonic clock."""
        return {
            "bytes_total": self.record.bytes_total,
            "bytes_resumed": self.bytes_resumed,
            "seconds": time.monotonic() - started,
            "parts": self.record.parts_total,
            "checkpoints_saved": self.saved,
        }
