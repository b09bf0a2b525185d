"""Snapshots to push: any object of a store or any file, as chunks from any offset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from typing_extensions import override

from blobflow.checksum import crc32c
from blobflow.config import MIB
from blobflow.errors import NotFoundError, SourceChanged, SourceTruncated, UsageError, reading
from blobflow.mirror.envelope import MAX_PAYLOAD_BYTES, SnapshotEnvelope, SnapshotId
from blobflow.stores.base import Reader
from blobflow.streams.ends import BEGIN_AGAIN, ObjectSource, OpenedSource, Pin, PinnedSource
from blobflow.transport.remote import RemoteArtifact

DEFAULT_CHUNK_BYTES: Final = 4 * MIB
"""Takes half the processor time of 1 MiB in the receiver, which hands each chunk to a thread."""


class FileSource(PinnedSource):
    """A local file, pinned to its inode, size and time of modification."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._pin: Pin | None = None

    def __repr__(self) -> str:
        return f"<FileSource {self.path}>"

    @override
    def pin(self) -> Pin:
        opened = self._open()
        try:
            self._pin = _pin_of(opened)
        finally:
            os.close(opened)
        return self._pin

    @override
    def open(self, offset: int) -> OpenedSource:
        pin = self._pin or self.pin()
        return _OpenedFile(self.path, self._open(), pin, offset)

    def _open(self) -> int:
        try:
            with reading(self.path):
                return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except SourceChanged as error:
            raise NotFoundError(f"no file {self.path}", path=str(self.path)) from error


class _OpenedFile:
    def __init__(self, path: Path, descriptor: int, pin: Pin, offset: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._pin = pin
        self._offset = offset

    def readinto(self, view: memoryview) -> int:
        with reading(self._path):
            count = os.preadv(self._descriptor, [view], self._offset)
        self._offset += count
        if (now := _pin_of(self._descriptor)) != self._pin:  # looked at after the bytes were read
            raise SourceChanged(
                f"{self._path} changed while it was read",
                hint=BEGIN_AGAIN,
                path=str(self._path),
                what="version",
                expected=self._pin.version,
                actual=now.version,
            )
        return count

    def close(self) -> None:
        os.close(self._descriptor)


def _pin_of(descriptor: int) -> Pin:
    found = os.fstat(descriptor)
    return Pin(f"{found.st_ino}-{found.st_mtime_ns}", found.st_size)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot to push: its id, size and checksum, and the source of its bytes."""

    id: SnapshotId
    total_bytes: int
    total_crc32c: int
    bytes: PinnedSource

    @classmethod
    def of_artifact(
        cls,
        store: Reader,
        key: str,
        *,
        source: str,
        database: str,
        position: int | None = None,
        expected_digest: str | None = None,
    ) -> Snapshot:
        """The payload of an artifact. Only its manifest is read, which has the checksum.

        Args:
            position: By default the microsecond in which the artifact was made.
            expected_digest: Refuse every artifact but this one.
        """
        remote = RemoteArtifact.open(store, key, expected_digest)
        if position is None:
            position = int(remote.manifest.created_at.timestamp() * 1_000_000)
        return cls(
            SnapshotId(source, database, position, remote.digest).checked(),
            remote.payload.size,
            remote.manifest_file.payload_crc32c,
            ObjectSource(store, key, e_tag=remote.payload.e_tag),
        )

    @classmethod
    def of_object(cls, store: Reader, key: str, *, source: str, database: str, position: int) -> Snapshot:
        """Any object of a store, which is read once for its digest and checksum."""
        return cls._of(ObjectSource(store, key), source, database, position)

    @classmethod
    def of_file(
        cls, path: str | os.PathLike[str], *, source: str, database: str, position: int | None = None
    ) -> Snapshot:
        """A local file, which is read once for its digest and checksum.

        Args:
            position: By default the nanosecond in which the file was modified.
        """
        if position is None:
            try:
                with reading(path):
                    position = os.stat(path).st_mtime_ns
            except SourceChanged as error:
                raise NotFoundError(f"no file {path}", path=str(path)) from error
        return cls._of(FileSource(path), source, database, position)

    @classmethod
    def _of(cls, pinned: PinnedSource, source: str, database: str, position: int) -> Snapshot:
        size = pinned.pin().size or 0
        crc, digest, position_read = 0, hashlib.sha256(), 0
        opened = pinned.open(0)
        try:
            buffer = memoryview(bytearray(MIB))
            while position_read < size and (count := opened.readinto(buffer)):
                crc = crc32c(buffer[:count], crc)
                digest.update(buffer[:count])
                position_read += count
        finally:
            opened.close()
        return cls(SnapshotId(source, database, position, f"sha256:{digest.hexdigest()}").checked(), size, crc, pinned)

    def envelopes(
        self, offset: int = 0, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, end: int | None = None
    ) -> Iterator[SnapshotEnvelope]:
        """The chunks from `offset` on, at least one; each is valid until the next one is asked for.

        Args:
            end: Where to stop; by default at the end of the snapshot. Only the chunk that reaches that is `done`.

        Raises:
            SourceChanged, SourceTruncated: the bytes are not those that were declared.
        """
        if not 0 < chunk_bytes <= MAX_PAYLOAD_BYTES:
            raise UsageError(f"a chunk has 1 to {MAX_PAYLOAD_BYTES} bytes, not {chunk_bytes}")
        end = self.total_bytes if end is None else min(end, self.total_bytes)
        buffer = memoryview(bytearray(min(chunk_bytes, max(0, end - offset))))
        opened = self.bytes.open(offset)
        try:
            while True:
                data = buffer[: end - offset]
                self._fill(opened, data, offset)
                following = offset + len(data)
                done = following == self.total_bytes
                yield SnapshotEnvelope(self.id, self.total_bytes, self.total_crc32c, offset, data, crc32c(data), done)
                offset = following
                if offset >= end:
                    return
        finally:
            opened.close()

    def _fill(self, opened: OpenedSource, view: memoryview, offset: int) -> None:
        filled = 0
        while filled < len(view):
            count = opened.readinto(view[filled:])
            if not count:
                raise SourceTruncated(
                    f"{self.bytes} ended at byte {offset + filled} of {self.total_bytes}",
                    at=offset + filled,
                    want=self.total_bytes,
                    expected=self.total_bytes,
                    actual=offset + filled,
                )
            filled += count
