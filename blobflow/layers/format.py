"""A layer as bytes (docs/layers.md): frames, the seek table after them, and the metadata object. No I/O happens here.

Frames are zstd frames (RFC 8878). The seek table is that of zstd's seekable format (contrib/seekable_format in its
repository). It is in a skippable frame, so `zstd -dc` reads the whole as one stream.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from array import array
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cached_property
from itertools import accumulate
from typing import Any, Final

import zstandard
from pydantic import BaseModel, ConfigDict, Field

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import INDEX_NAME, ByteCount, Crc32c, Manifest, Sha256Digest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.tarmap import member_length
from blobflow.checksum import Buffer, crc32c
from blobflow.config import MIB
from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import ArtifactInvalid, UsageError
from blobflow.layers.names import layer_key
from blobflow.untrusted import as_model, read_object

FORMAT: Final = "blobflow.layer/1"
CONTENT_TYPE: Final = "application/zstd"

DEFAULT_LEVEL: Final = 3
"""zstd's default."""
MIN_FRAME_BYTES: Final = 2 * MIB
"""Within half a percent of the ratio of one stream (design note 015)."""
MAX_FRAME_BYTES: Final = 1 << 31
MAX_FRAMES: Final = 65_536
"""Limits the intent's record of the frames to half a megabyte."""
MAX_META_BYTES: Final = 4 * MAX_MANIFEST_BYTES

_PRODUCER: Final = "blobflow.layer/1"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_SKIPPABLE: Final = 0x184D2A5E
_SEEKABLE: Final = 0x8F92EAB1
_RUN: Final = 1
"""The type of a block that is one repeated byte."""
_HEADER: Final = struct.Struct("<II")
_FOOTER: Final = struct.Struct("<IBI")


class Codec:
    """Compresses and decompresses whole frames; thread-safe, and releases the interpreter lock meanwhile."""

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        if not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise UsageError(
                f"zstd has no level {level}",
                hint=f"give 1 to {zstandard.MAX_COMPRESSION_LEVEL}; {DEFAULT_LEVEL} is usual",
            )
        self.level = level
        self.name = f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))} level {level}"
        """Equal names give equal bytes."""
        self._contexts = threading.local()

    def __repr__(self) -> str:
        return f"<Codec {self.name}>"

    def compress(self, data: Buffer) -> bytes:
        """One frame, with the size and the checksum of its content."""
        context = getattr(self._contexts, "compressor", None)
        if context is None:
            context = zstandard.ZstdCompressor(level=self.level, write_checksum=True, write_content_size=True)
            self._contexts.compressor = context
        return context.compress(data)

    @classmethod
    def bound(cls, size: int) -> int:
        """The maximum bytes of a frame with `size` bytes of content (ZSTD_COMPRESSBOUND, and the checksum)."""
        return size + (size >> 8) + 128


def decompress(frame: Buffer, into: memoryview) -> None:
    """Fill `into` with the content of a frame.

    Raises:
        ArtifactInvalid: it is not a frame, is damaged, or has another size.
    """
    try:
        # The frame declares its size: a false one must not take more memory, or less time, than allowed.
        told = zstandard.frame_content_size(frame)
        if told == len(into):
            _check_whole(frame)
            decompressor: Any = zstandard.ZstdDecompressor()  # its stub leaves the type of a buffer open
            with decompressor.stream_reader(frame) as reader:
                told = 0  # directly into place: zstd decompresses a frame that fits in one call
                while told < len(into) and (count := reader.readinto(into[told:])):
                    told += count
                reader.readinto(bytearray(1))  # to the end of the frame, where its checksum is compared
    except zstandard.ZstdError as error:
        raise ArtifactInvalid(f"a frame of the layer is damaged: {error}", what="frame") from error
    if told != len(into):
        raise ArtifactInvalid(
            "a frame of the layer has another size than the layout", expected=len(into), actual=told, what="frame"
        )


def _check_whole(frame: Buffer) -> None:
    """Refuse anything that is not exactly one frame with its checksum (RFC 8878, 3.1.1)."""
    view = memoryview(frame)
    position, last = zstandard.frame_header_size(frame), 0
    while not last:
        header = int.from_bytes(view[position : position + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == _RUN else size)
        if position > len(view):
            raise ArtifactInvalid("a frame of the layer is cut off", what="frame")
    if not zstandard.get_frame_parameters(frame).has_checksum or position + 4 != len(view):
        raise ArtifactInvalid("a frame of the layer has no checksum, or extra bytes after it", what="frame")


class FramePlan:
    """How the tar is cut into frames: those of the head first, then those of the members and the end blocks.

    Args:
        head: Bytes of the tar before the first member.
        size: Bytes of the tar.
        frame_size: Bytes of all frames except the last of the head and the last of all.
    """

    def __init__(self, head: int, size: int, frame_size: int) -> None:
        self.head = head
        self.size = size
        self.frame_size = frame_size
        self._head = TransferPlan(head, frame_size)
        self._body = TransferPlan(size - head, frame_size, start=head)

    @staticmethod
    def frame_size_for(size: int, wanted: int | None = None) -> int:
        """The frame size for a tar of that size: the wanted or default one, enlarged if needed to limit the frames."""
        needed = -(-size // (MAX_FRAMES // 2))
        return max(wanted or MIN_FRAME_BYTES, needed if wanted else -(-needed // MIB) * MIB)

    def __len__(self) -> int:
        return len(self._head) + len(self._body)

    def frame(self, number: int) -> Part:
        """Frame `number`, from 1: its range of the tar."""
        if number <= len(self._head):
            return self._head.part(number)
        return self._body.part(number - len(self._head))._replace(number=number)

    def frames_of(self, offset: int, length: int) -> range:
        """The numbers of the frames that overlap a range of the tar."""
        if offset + length <= self._body.start:
            return self._head.parts_of(offset, length)
        last = self._body.parts_of(max(offset, self._body.start), offset + length - max(offset, self._body.start))
        first = self._head.parts_of(offset, 1).start if offset < self._body.start else last.start + len(self._head)
        return range(first, last.stop + len(self._head))


def encode_seek_table(sizes: Sequence[int], plan: FramePlan) -> bytes:
    """The skippable frame after the frames.

    Args:
        sizes: Compressed sizes of the frames.
    """
    entries = array("I")
    for number, size in enumerate(sizes, 1):
        entries.extend((size, plan.frame(number).length))
    body = struct.pack(f"<{len(entries)}I", *entries)
    return _HEADER.pack(_SKIPPABLE, len(body) + _FOOTER.size) + body + _FOOTER.pack(len(sizes), 0, _SEEKABLE)


def seek_table_size(frames: int) -> int:
    """Bytes of the skippable frame."""
    return _HEADER.size + 8 * frames + _FOOTER.size


def parse_seek_table(data: bytes, plan: FramePlan) -> array[int]:
    """The compressed sizes of the frames; the inverse of `encode_seek_table`.

    Raises:
        ArtifactInvalid: it is not a seek table, or not that of `plan`.
    """
    if len(data) != seek_table_size(len(plan)):
        raise ArtifactInvalid("the seek table of the layer has another size", actual=len(data), what="seek table")
    sizes = array("I", struct.unpack_from(f"<{2 * len(plan)}I", data, _HEADER.size)[::2])
    if data != encode_seek_table(sizes, plan):
        raise ArtifactInvalid("the seek table of the layer is damaged, or of another layout", what="seek table")
    return sizes


class LayerMeta(BaseModel):
    """The metadata object, `<digest>.layer.json`: it exists if and only if the layer is complete."""

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    digest: Sha256Digest = Field(description="The name of the layer; follows from the manifest.")
    object_size: ByteCount = Field(description="Bytes of the layer.")
    tar_size: ByteCount = Field(description="Bytes of the tar in it.")
    head_size: ByteCount = Field(description="Bytes of the tar before the first member.")
    frame_size: int = Field(gt=0, le=MAX_FRAME_BYTES, description="Bytes of the tar in a frame.")
    frames: int = Field(gt=0, le=2 * MAX_FRAMES)
    seek_table_crc32c: Crc32c
    codec: str = Field(description="The codec that compressed it.")
    manifest: str = Field(description="The exact manifest in the tar.")

    @cached_property
    def manifest_file(self) -> ManifestFile:
        return ManifestFile.parse(self.manifest.encode())

    @property
    def plan(self) -> FramePlan:
        return FramePlan(self.head_size, self.tar_size, self.frame_size)

    @property
    def key(self) -> str:
        """The key of the layer."""
        return layer_key(self.digest)

    def encode(self) -> bytes:
        """The JSON document."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> LayerMeta:
        """The metadata in `data`; the inverse of `encode`.

        Raises:
            ArtifactInvalid: it has another format, or contradicts itself.
        """
        if len(data) > MAX_META_BYTES:
            raise ArtifactInvalid(
                f"the metadata of a layer exceeds {MAX_META_BYTES} bytes", actual=len(data), what="metadata"
            )
        document = read_object(data, "metadata of a layer")
        if document.get("format") != FORMAT:
            raise ArtifactInvalid(f"not the metadata of a layer of format {FORMAT!r}", what="metadata")
        meta = as_model(cls, document, "the metadata of a layer is damaged:")
        plan = plan_of(meta.manifest_file, meta.frame_size)
        if (layer_digest(meta.manifest_file.manifest), plan.head, plan.size, len(plan)) != (
            *(meta.digest, meta.head_size, meta.tar_size, meta.frames),
        ):
            raise ArtifactInvalid(f"the metadata of the layer {meta.digest} contradicts itself", what="metadata")
        return meta


def plan_of(manifest_file: ManifestFile, frame_size: int) -> FramePlan:
    """The frames of the layer with that manifest, which has the sizes of head and tar."""
    size = manifest_file.payload_size
    head = len(manifest_file.entry) + member_length(INDEX_NAME, manifest_file.manifest.index.size)
    if head > size:
        raise ArtifactInvalid(
            "the manifest of a layer declares an index that is larger than the body that contains it", what="manifest"
        )
    return FramePlan(head, size, frame_size)


def meta_of(manifest_file: ManifestFile, codec: str, plan: FramePlan, sizes: Sequence[int]) -> LayerMeta:
    """The metadata of a layer whose frames have these sizes."""
    table = encode_seek_table(sizes, plan)
    return LayerMeta(
        digest=layer_digest(manifest_file.manifest),
        object_size=sum(sizes) + len(table),
        tar_size=plan.size,
        head_size=plan.head,
        frame_size=plan.frame_size,
        frames=len(plan),
        seek_table_crc32c=crc32c(table),
        codec=codec,
        manifest=manifest_file.data.decode(),
    )


def layer_digest(manifest: Manifest) -> str:
    """The name of a layer, from its files' content and which are executable or private. Times do not count."""
    content = f"{manifest.content_digest}\n{manifest.executables_digest}\n"
    if manifest.private is not None:
        content += f"{manifest.private}\n"
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def tree_digest(manifest: Manifest) -> str:
    """A digest to compare directories restored under any umask: it ignores who may read a file."""
    return layer_digest(manifest.model_copy(update={"private": None}))


def as_layer(artifact: Artifact) -> Artifact:
    """The same members with a manifest that does not depend on time and host."""
    anywhere = artifact.manifest.model_copy(update={"created_at": _EPOCH, "producer": _PRODUCER, "holes": None})
    return artifact.adopt(ManifestFile.of(anywhere))


def manifest_digest(meta: LayerMeta) -> str:
    """The artifact's digest, as a ref names it."""
    return meta.manifest_file.digest


def frame_starts(sizes: Sequence[int]) -> list[int]:
    """The offset of each frame in the object, and the end of the last one."""
    return list(accumulate(sizes, initial=0))
