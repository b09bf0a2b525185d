"""The checkpoint of a stream: its progress, in a form that survives the process."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from blobflow.errors import ArtifactInvalid, UsageError
from blobflow.untrusted import Counter, read_model

CHECKPOINT_VERSION: Final = 1


class TransferCheckpoint(BaseModel):
    """The progress of a stream. `transfer` advances it in place; save it with `to_json`.

    Only bytes that the target has acknowledged count.
    """

    model_config = ConfigDict(extra="ignore", validate_assignment=True)

    version: Counter = CHECKPOINT_VERSION
    session_id: str
    digest: str = Field(default="", description="Expected `sha256:<hex>` of the whole; empty if unknown.")
    total_size: int | None = Field(
        default=None, ge=0, lt=1 << 63, description="Total bytes; None for a stream of unknown length."
    )
    offset: int = Field(default=0, ge=0, lt=1 << 63, description="Bytes acknowledged by the target.")
    chunks_completed: int = Field(default=0, ge=0, lt=1 << 63)
    prefix_crc32c: int = Field(default=0, ge=0, lt=1 << 32, description="CRC32C of the bytes before `offset`.")
    upload_session_url: str | None = Field(default=None, description="The target's own name for the session, if any.")
    source_version: str | None = Field(default=None, description="Version of a pinned source, still required.")

    @classmethod
    def new(cls, session_id: str, digest: str = "", total_size: int | None = None) -> TransferCheckpoint:
        """The checkpoint of a transfer that has not begun."""
        return cls(session_id=session_id, digest=digest, total_size=total_size)

    def restart(self) -> None:
        """Go back to the first byte: the target holds nothing any more."""
        self.offset = self.chunks_completed = self.prefix_crc32c = 0
        self.upload_session_url = None

    @property
    def is_complete(self) -> bool:
        """Whether everything has arrived; never true while the length is unknown."""
        return self.total_size is not None and self.offset >= self.total_size

    @property
    def progress(self) -> float:
        """Fraction done, 0.0 to 1.0; 1.0 if there is nothing to move, 0.0 if the length is unknown."""
        if self.total_size is None:
            return 0.0
        return min(1.0, self.offset / self.total_size) if self.total_size else 1.0

    @property
    def remaining(self) -> int:
        """Bytes still to move, never negative; 0 while the length is unknown."""
        return max(0, (self.total_size or 0) - self.offset)

    def to_json(self) -> str:
        """The checkpoint as JSON."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> TransferCheckpoint:
        """The checkpoint in `text`; the inverse of `to_json`. Unknown fields are ignored.

        Raises:
            UsageError: it is not a checkpoint, or a newer version wrote it.
        """
        try:
            checkpoint = read_model(cls, text, "checkpoint")
        except ArtifactInvalid as error:
            raise UsageError(f"not a checkpoint: {error.message}") from error
        if checkpoint.version > CHECKPOINT_VERSION:
            raise UsageError(
                f"the checkpoint has version {checkpoint.version}, this blobflow reads up to {CHECKPOINT_VERSION}",
                hint="continue this transfer with the newer blobflow that began it",
            )
        return checkpoint
