"""A layer in a store: whether it is complete, and its tar as if it were a separate object."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from typing_extensions import override

from blobflow.checksum import crc32c
from blobflow.errors import (
    ArtifactInvalid,
    ArtifactNotFound,
    IntegrityError,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    SizeMismatch,
)
from blobflow.layers.format import (
    MAX_META_BYTES,
    LayerMeta,
    decompress,
    frame_starts,
    parse_seek_table,
    seek_table_size,
)
from blobflow.layers.names import meta_key
from blobflow.stores.base import Capabilities, ObjectMeta, Reader, StoredObject
from blobflow.transport.remote import RemoteArtifact


def read_meta(store: Reader, key: str) -> LayerMeta | None:
    """The metadata of the layer `key`; None if there is none.

    Raises:
        ArtifactInvalid: it is damaged, or belongs to another layer.
    """
    try:
        data = store.get(meta_key(key), max_bytes=MAX_META_BYTES).data
    except ObjectNotFound:
        return None
    except ObjectTooLarge as error:
        raise ArtifactInvalid(
            f"the metadata of the layer {key!r} exceeds {MAX_META_BYTES} bytes", key=key, what="metadata"
        ) from error
    meta = LayerMeta.parse(data)
    if meta.key != key:
        raise ArtifactInvalid(f"{meta_key(key)!r} has the metadata of {meta.key!r}", key=key, what="metadata")
    return meta


@dataclass(frozen=True)
class RemoteLayer:
    """A complete layer, pinned."""

    store: Reader
    meta: LayerMeta
    object: ObjectMeta

    @classmethod
    def find(cls, store: Reader, key: str) -> RemoteLayer | None:
        """The layer `key` if it is complete; None if it has no metadata, or lost its bytes.

        Raises:
            ArtifactInvalid: its metadata is damaged.
        """
        meta = read_meta(store, key)
        if meta is None:
            return None
        try:
            found = store.head(key)
        except ObjectNotFound:
            return None
        return cls(store, meta, found) if found.size == meta.object_size else None

    @classmethod
    def open(cls, store: Reader, key: str) -> RemoteLayer:
        """The layer `key`.

        Raises:
            ArtifactNotFound: it has no metadata.
            ArtifactInvalid: the metadata is damaged, or the layer is missing.
            SizeMismatch: metadata and layer do not belong together.
        """
        meta = read_meta(store, key)
        if meta is None:
            raise ArtifactNotFound(
                f"no complete layer {key!r}", hint="list what there is with `blobflow layer ls`", key=key
            )
        try:
            found = store.head(key)
        except ObjectNotFound as error:
            raise ArtifactInvalid(f"the layer {key!r} has metadata but no bytes", key=key, what="layer") from error
        if found.size != meta.object_size:
            raise SizeMismatch(
                f"the layer {key!r} has {found.size} bytes, its metadata says {meta.object_size}",
                hint="sync its directory again",
                what=key,
                expected=meta.object_size,
                actual=found.size,
            )
        return cls(store, meta, found)

    @cached_property
    def frame_sizes(self) -> array[int]:
        """The compressed sizes of the frames, from the seek table.

        Raises:
            ArtifactInvalid: it differs from the metadata, or contradicts the layer's size.
        """
        size = seek_table_size(self.meta.frames)
        if size >= self.object.size:
            raise ArtifactInvalid(
                f"the layer {self.meta.key!r} is too small for its seek table", key=self.meta.key, what="seek table"
            )
        table = self.store.get_range(self.meta.key, self.object.size - size, size, e_tag=self.object.e_tag)
        if crc32c(table) != self.meta.seek_table_crc32c:
            raise ArtifactInvalid(
                f"the seek table of {self.meta.key!r} is damaged", key=self.meta.key, what="seek table"
            )
        sizes = parse_seek_table(table, self.meta.plan)
        if sum(sizes) + size != self.object.size:
            raise ArtifactInvalid(
                f"the seek table of {self.meta.key!r} belongs to another object", key=self.meta.key, what="seek table"
            )
        return sizes

    def artifact(self) -> RemoteArtifact:
        """The artifact in the layer; it is read through a view of its tar."""
        meta = self.meta
        tar = ObjectMeta(meta.key, meta.tar_size, self.object.e_tag)
        return RemoteArtifact(
            store=_TarView(self),
            key=meta.key,
            manifest_file=meta.manifest_file,
            payload=tar,
        )


class _TarView(Reader):
    """A store in which the tar of one layer is an object under the layer's key."""

    def __init__(self, layer: RemoteLayer) -> None:
        self.store = layer.store
        self.url = layer.store.url
        self._layer = layer
        self._plan = layer.meta.plan
        self._starts = frame_starts(layer.frame_sizes)
        self._scratch = threading.local()

    @override
    def capabilities(self) -> Capabilities:
        return self.store.capabilities()

    @override
    def head(self, key: str) -> ObjectMeta:
        return self.store.head(key)

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        return self.store.list(prefix, start_after=start_after)

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        if not buffer:
            return
        frames = self._plan.frames_of(offset, len(buffer))
        start, stop = self._starts[frames.start - 1], self._starts[frames.stop - 1]
        compressed = self._compressed(stop - start)
        self.store.get_range_into(key, start, compressed, e_tag=e_tag)
        for number in frames:
            frame = self._plan.frame(number)
            data = compressed[self._starts[number - 1] - start : self._starts[number] - start]
            skip, end = max(0, offset - frame.offset), min(frame.length, offset + len(buffer) - frame.offset)
            target = buffer[frame.offset + skip - offset : frame.offset + end - offset]
            if len(target) == frame.length:
                decompress(data, target)
            else:
                whole = memoryview(bytearray(frame.length))
                decompress(data, whole)
                target[:] = whole[skip:end]

    def _compressed(self, size: int) -> memoryview:
        """A buffer of this thread: fresh memory for every range would cost more than the decompression saves."""
        buffer: memoryview | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._scratch.buffer = memoryview(bytearray(size + size // 4))
        return buffer[:size]

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        """The sibling manifest, from the layer's metadata; requested if something does not fit."""
        meta = read_meta(self.store, self._layer.meta.key)
        if meta is None:
            raise ObjectNotFound(f"the layer {self._layer.meta.key!r} is gone", key=key)
        return StoredObject(meta.manifest_file.data, self._layer.object)


def find_bytes(store: Reader, key: str, like: LayerMeta) -> LayerMeta | None:
    """The metadata for a layer without metadata: its writer died before, or the response was lost.

    The bytes prove themselves: the seek table fits the object, and the head is the manifest and the index of this
    content. The process that made the object had proven everything before.

    Args:
        like: Metadata from the same content; sizes and codec may differ.
    """
    try:
        found = store.head(key)
        size = seek_table_size(like.frames)
        table = store.get_range(key, found.size - size, size, e_tag=found.e_tag) if found.size > size else b""
        meta = like.model_copy(update={"object_size": found.size, "seek_table_crc32c": crc32c(table)})
        RemoteLayer(store, meta, found).artifact().open_layout()
    except (ObjectNotFound, ObjectChanged, IntegrityError):
        return None
    return meta
