"""Transfer profiles: the chunk size, the checkpoint interval, and the timeouts on silence."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from blobflow.fields import KnownFields

KIB = 1024
MIB = 1024 * KIB


class ChunkProfile(KnownFields):
    """How a transfer is cut and paced. Ints are bytes or counts, floats are seconds.

    `tests/unit/test_profiles.py` holds the numbers of the three presets:

    | preset | chunk | checkpoint every | idle timeout | for |
    |---|---|---|---|---|
    | `datacenter` | 32 MiB | 128 chunks (4 GiB) | 60 s | fast, reliable networks |
    | `tactical` (default) | 8 MiB | 64 chunks (512 MiB) | 120 s | everything else |
    | `edge` | 1 MiB | 32 chunks (32 MiB) | 300 s | slow and broken links |

    Memory: a transfer holds at most `chunk_size * workers` bytes of payload, whatever the size of the object.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk_size: int = Field(
        default=8 * MIB, gt=0, description="Bytes per chunk; one chunk is one part of a multipart upload."
    )
    checkpoint_interval: int = Field(
        default=64, gt=0, description="Chunks between two saved checkpoints; a power cut moves at most these again."
    )
    verify_digest: bool = Field(default=True, description="Compare the final digest with the expected one.")
    read_timeout: float = Field(
        default=120.0, gt=0, description="Seconds without a single byte from the source before an attempt fails."
    )
    write_timeout: float = Field(
        default=120.0, gt=0, description="Seconds without a single byte to the target before an attempt fails."
    )
    workers: int = Field(default=4, ge=1, le=256, description="Chunks in flight; threads of one transfer.")

    @classmethod
    def datacenter(cls) -> ChunkProfile:
        """Large chunks for fast, reliable networks."""
        return cls(chunk_size=32 * MIB, checkpoint_interval=128, read_timeout=60.0, write_timeout=60.0)

    @classmethod
    def tactical(cls) -> ChunkProfile:
        """The default."""
        return cls()

    @classmethod
    def edge(cls) -> ChunkProfile:
        """Small chunks and long timeouts for slow and broken links."""
        return cls(chunk_size=MIB, checkpoint_interval=32, read_timeout=300.0, write_timeout=300.0)

    @classmethod
    def custom(cls, chunk_size: int, checkpoint_interval: int, **options: Any) -> ChunkProfile:
        """A profile with your own chunk size (bytes) and checkpoint interval (chunks); other fields by name.

        Raises:
            pydantic.ValidationError: a size or an interval is below 1.
            UsageError: an option is unknown; the message names the nearest known one.
        """
        return cls(chunk_size=chunk_size, checkpoint_interval=checkpoint_interval, **options)

    @classmethod
    def named(cls, name: str) -> ChunkProfile:
        """The preset called `name`: `datacenter`, `tactical` or `edge`.

        Raises:
            ValueError: there is no such preset.
        """
        presets = {"datacenter": cls.datacenter, "tactical": cls.tactical, "edge": cls.edge}
        if name not in presets:
            raise ValueError(f"unknown profile {name!r}: one of {', '.join(presets)}")
        return presets[name]()

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes between two checkpoints."""
        return self.chunk_size * self.checkpoint_interval
