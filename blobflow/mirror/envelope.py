"""What a push sends to a receiver: snapshots, cut into chunks, each in one frame.

A frame names the snapshot and the database that it belongs to, and the size and CRC32C of the whole snapshot. So frames
of several snapshots may share a connection, and a broken connection leaves nothing to remember. The byte tables are
in docs/mirror.md, "A frame".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from blobflow.checksum import Buffer, crc32c
from blobflow.config import MIB
from blobflow.errors import ChecksumMismatch, IntegrityError, ObjectTooLarge, RefusedError
from blobflow.untrusted import quoted

MAGIC: Final = b"BFMS"
VERSION: Final = 1
MAX_PAYLOAD_BYTES: Final = 16 * MIB
"""Largest payload of one frame: a receiver holds this much in memory for each connection."""

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_FIXED: Final = struct.Struct(">4sHHHIQQQII32s")
_CRC: Final = struct.Struct(">I")
_DONE: Final = 1
_MAX_NAMES_BYTES: Final = 2 * (1 + 128)


class SnapshotId(NamedTuple):
    """Identifies a snapshot in a receiver."""

    source: str
    """The cluster that it comes from."""
    database: str
    position: int
    """Where in the source's history it was taken (a log sequence number, a time); 0 to 2**64 - 1, greater is newer."""
    digest: str
    """`sha256:...` of the artifact's manifest, or of the bytes if the snapshot is a file."""

    def checked(self) -> SnapshotId:
        """This id, if it is well-formed.

        Raises:
            RefusedError: a part of it is not well-formed; both names become names of files.
        """
        for what, name in (("source", self.source), ("database", self.database)):
            if not _ID.fullmatch(name):
                raise RefusedError(
                    f"{quoted(name)} is not the id of a {what}",
                    hint="ids are 1 to 128 letters, digits, '.', '_' and '-', and begin with a letter or digit",
                    what=what,
                )
        if not 0 <= self.position < 1 << 64:
            raise RefusedError(f"position {quoted(self.position)} is not a number of 64 bits", what="position")
        if not _DIGEST.fullmatch(self.digest):
            raise RefusedError(f"{quoted(self.digest)} is not a digest: 'sha256:' and 64 digits", what="digest")
        return self

    def __str__(self) -> str:
        return f"{self.database} at {self.position} from {self.source}"


@dataclass(frozen=True)
class SnapshotEnvelope:
    """A chunk of a snapshot, with the size and checksum that the source declares for the whole snapshot.

    Attributes:
        total_bytes: Size of the snapshot.
        total_crc32c: CRC32C of the snapshot; 0 if it is empty.
        offset: Where `data` begins in the snapshot.
        data: May be a view of a buffer that is used again: valid until the next envelope is asked for.
        crc32c: CRC32C of `data`, as the source computed it.
        done: This is the last chunk.
    """

    id: SnapshotId
    total_bytes: int
    total_crc32c: int
    offset: int
    data: Buffer
    crc32c: int
    done: bool = False

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.offset + len(self.data)

    def head(self) -> bytes:
        """The frame without its payload, which is `data`."""
        source, database = self.id.source.encode(), self.id.database.encode()
        names = bytes((len(source),)) + source + bytes((len(database),)) + database
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            _DONE * self.done,
            len(names),
            len(self.data),
            self.offset,
            self.total_bytes,
            self.id.position,
            self.total_crc32c,
            self.crc32c,
            bytes.fromhex(self.id.digest.removeprefix("sha256:")),
        )
        return fixed + names + _CRC.pack(crc32c(names, crc32c(fixed)))

    def encode(self) -> bytes:
        """The whole frame."""
        return self.head() + bytes(self.data)

    @classmethod
    def decode(cls, frame: Buffer) -> SnapshotEnvelope:
        """The envelope in a frame. The receiver, not this method, compares the payload with its CRC32C.

        Raises:
            IntegrityError: not exactly one frame, or a damaged one.
        """
        decoder = FrameDecoder()
        envelopes = list(decoder.feed(frame))
        if len(envelopes) != 1 or decoder.pending:
            raise IntegrityError("not exactly one frame")
        return envelopes[0]


def head_bytes(snapshot: SnapshotId) -> int:
    """Bytes in the head of each frame of this snapshot."""
    return _FIXED.size + 2 + len(snapshot.source) + len(snapshot.database) + _CRC.size


class FrameDecoder:
    """Reads frames from a stream that arrives in pieces of any size; holds at most one payload.

    Args:
        max_payload_bytes: A frame that announces a larger payload is refused before a byte of it is kept.
    """

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._head = bytearray()
        self._buffer = bytearray()
        self._announced: SnapshotEnvelope | None = None
        self._filled = 0

    @property
    def pending(self) -> bool:
        """Whether the stream stopped inside a frame."""
        return bool(self._head) or self._announced is not None

    def feed(self, piece: Buffer) -> Iterator[SnapshotEnvelope]:
        """The envelopes that `piece` completes. The data of each is valid until the next one is asked for.

        Raises:
            IntegrityError: this is not a frame of this version, or its head is damaged. The stream ends here, because
                the beginning of the next frame is not known.
            ObjectTooLarge: a payload is larger than `max_payload_bytes`.
        """
        rest = memoryview(piece)
        while rest or (self._announced is not None and self._filled == len(self._announced.data)):
            if self._announced is None:
                rest = self._take_head(rest)
                continue
            payload = memoryview(self._announced.data)
            part = rest[: len(payload) - self._filled]
            payload[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == len(payload):
                envelope, self._announced, self._filled = self._announced, None, 0
                yield envelope

    def _take_head(self, rest: memoryview) -> memoryview:
        """Consume the rest of a head; when it is whole, prepare a buffer for the payload."""
        lacking = self._head_length() - len(self._head)
        self._head += rest[:lacking]
        if len(self._head) >= _FIXED.size and len(self._head) == self._head_length():
            self._announced = self._parsed()
            self._head.clear()
        return rest[lacking:]

    def _head_length(self) -> int:
        if len(self._head) < _FIXED.size:
            return _FIXED.size
        magic, version, _, names_length = struct.unpack_from(">4sHHH", self._head)
        if magic != MAGIC:
            raise IntegrityError("the stream is not at a frame of a snapshot")
        if version != VERSION:
            raise IntegrityError(f"the frame has version {version}, this blobflow reads {VERSION}")
        if names_length > _MAX_NAMES_BYTES:
            raise IntegrityError(f"the frame announces {names_length} bytes of names")
        return _FIXED.size + names_length + _CRC.size

    def _parsed(self) -> SnapshotEnvelope:
        head = bytes(self._head)
        told = int.from_bytes(head[-_CRC.size :], "big")
        actual = crc32c(head[: -_CRC.size])
        if told != actual:
            raise ChecksumMismatch("the head of a frame is damaged", what="frame", expected=told, actual=actual)
        _, _, flags, _, length, offset, total_bytes, position, total_crc, crc, digest = _FIXED.unpack_from(head)
        if flags & ~_DONE:
            raise IntegrityError(f"the frame has unknown flags {flags:#06x}")
        if length > self._max_payload_bytes:
            raise ObjectTooLarge(
                f"the frame announces {length} bytes, {self._max_payload_bytes} are allowed",
                limit=self._max_payload_bytes,
            )
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        source, database = _names(head[_FIXED.size : -_CRC.size])
        return SnapshotEnvelope(
            SnapshotId(source, database, position, f"sha256:{digest.hex()}").checked(),
            total_bytes,
            total_crc,
            offset,
            memoryview(self._buffer)[:length],
            crc,
            bool(flags & _DONE),
        )


def _names(data: bytes) -> tuple[str, str]:
    first = 1 + data[0] if data else 0
    source, second = data[1:first], data[first:]
    if not second or len(second) != 1 + second[0]:
        raise IntegrityError("the names in a frame do not have their declared length")
    return source.decode("latin-1"), second[1:].decode("latin-1")
