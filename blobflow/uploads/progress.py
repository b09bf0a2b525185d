"""What the calling thread keeps while parts move: progress, checkpoints, and a last record when something fails."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeAlias

from blobflow.stores.base import Store
from blobflow.streams.checkpoint import TransferRecord

log = logging.getLogger(__name__)

_PROGRESS_S: Final = 0.5


class ProgressEvent(NamedTuple):
    """How far a transfer is; bytes count the payload."""

    phase: Literal["upload", "verify", "download", "copy"]
    bytes_done: int
    bytes_total: int
    bytes_resumed: int
    """Of `bytes_done`, what an earlier process had moved."""


OnProgress: TypeAlias = Callable[[ProgressEvent], None]
OnRecord: TypeAlias = Callable[[TransferRecord], object]


_KEY_CHARACTERS: Final = 100
"""Of a key, in the name of a transfer, which is that of a file as well."""


def transfer_id(store: Store, key: str, digest: str, kind: str) -> str:
    """The name under which every process finds the same transfer again.

    It begins with the kind and the end of the key, for people who look for one of many; the rest makes it the only one.
    """
    unique = hashlib.sha256("\n".join((store.url, key, digest, kind)).encode()).hexdigest()[:32]
    return f"{kind}-{re.sub(r'[^A-Za-z0-9]+', '_', key[-_KEY_CHARACTERS:]).strip('_')}-{unique}"


class TransferProgress:
    """The books of one transfer; used by one thread.

    Args:
        record: How it stands at the beginning.
        interval: Parts between two checkpoints.
        save: Makes the parts that were moved so far durable.
        on_progress: Told about twice a second.
        on_checkpoint: Told at the beginning, after each `save`, and at the end.
    """

    def __init__(
        self,
        record: TransferRecord,
        *,
        interval: int,
        save: Callable[[], None],
        on_progress: OnProgress | None,
        on_checkpoint: OnRecord | None,
    ) -> None:
        self.record = record
        self.saved = 0
        self.bytes_moved = 0
        self._interval = interval
        self._save = save
        self._on_progress = on_progress
        self._on_checkpoint = on_checkpoint
        self._unsaved = 0
        self._shown_at = 0.0

    @property
    def bytes_resumed(self) -> int:
        """What was done before, by another process."""
        return self.record.bytes_resumed

    def resumed(self, length: int) -> None:
        """A part was done before, by another process."""
        self._count(length)
        record = self.record
        self.record = record.model_copy(
            update={"parts_resumed": record.parts_resumed + 1, "bytes_resumed": record.bytes_resumed + length}
        )

    def begin(self) -> None:
        """Tell what is done already, now that it is known."""
        if self._on_checkpoint:
            self._on_checkpoint(self.record)

    def moved(self, length: int) -> None:
        """A part is done; save every `interval` parts."""
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
        """Make the progress durable, then tell of it."""
        self._save()
        self._unsaved = 0
        self.saved += 1
        if self._on_checkpoint:
            self._on_checkpoint(self.record)

    def tick(self) -> None:
        """Show the progress if it is time."""
        now = time.monotonic()
        if self._on_progress and now - self._shown_at >= _PROGRESS_S:
            self._shown_at = now
            self.show()

    def show(self) -> None:
        """Show the progress now."""
        if self._on_progress:
            done, total = self.record.bytes_done, self.record.bytes_total
            self._on_progress(ProgressEvent(self.record.kind, done, total, self.bytes_resumed))

    def done(self) -> None:
        """The terminal record."""
        self.record = self.record.model_copy(update={"state": "done", "bytes_done": self.record.bytes_total})
        self.show()
        if self._on_checkpoint:
            self._on_checkpoint(self.record)

    def failed(self) -> None:
        """Save what can be saved while an error is on its way; it must not be hidden by another one."""
        self.record = self.record.model_copy(update={"state": "failed"})
        try:
            self.save()
        except Exception as error:  # noqa: BLE001  # the first error is the one to report
            log.warning("transfer.last_checkpoint_failed key=%s error=%r", self.record.key, error)
