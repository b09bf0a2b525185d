"""Sends a layer: compressed on the way, resumable by any process, visible once its metadata is put, which comes last.

The steps are those of every upload (`blobflow.uploads.session`), with one difference: the size of the object is
unknown before the last frame is compressed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.checksum import combine_all, crc32c
from blobflow.config import ChunkProfile
from blobflow.engine.plan import Part, TransferPlan
from blobflow.engine.pool import move_parts
from blobflow.errors import (
    ArtifactInvalid,
    ChecksumMismatch,
    NoSuchUpload,
    PreconditionFailed,
    TransferBusy,
    UploadIncomplete,
)
from blobflow.forks import reset_after_fork_of
from blobflow.layers.cutting import Cut, PartCutter, known_size
from blobflow.layers.format import (
    CONTENT_TYPE,
    Codec,
    FramePlan,
    LayerMeta,
    encode_seek_table,
    layer_digest,
    meta_of,
    plan_of,
    seek_table_size,
)
from blobflow.layers.names import layer_key, meta_key
from blobflow.layers.remote import find_bytes, read_meta
from blobflow.stores.base import Body, ObjectMeta, PutMode, Store, check_put_size, check_readable
from blobflow.uploads.intent import FrameLog, Intent
from blobflow.uploads.progress import OnProgress, OnRecord, TransferProgress
from blobflow.uploads.session import CLAIM_ATTEMPTS, ClaimedUpload, HeldParts, upload_part_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerRequest:
    """A layer to send: store, content, options, callbacks."""

    store: Store
    artifact: Artifact
    codec: Codec
    profile: ChunkProfile
    frame_size: int | None = None
    on_progress: OnProgress | None = None
    on_checkpoint: OnRecord | None = None
    on_begin: Callable[[str, int], None] = lambda _upload_id, _part_size: None
    """Called with upload id and part size before the first part is sent."""


@dataclass
class Sent:
    """What sending a layer took; the fields are those of a `LayerSyncResult`."""

    layer: LayerMeta
    parts: int = 1
    parts_resumed: int = 0
    bytes_sent: int = 0
    bytes_resumed: int = 0
    """Bytes of the layer that the store held already."""
    checkpoints_saved: int = 0


class _PartDone(NamedTuple):
    number: int
    length: int
    crc: int
    was_sent: bool


def send_layer(request: LayerRequest) -> Sent:
    """Send the layer to the store; may be called again after a crash, from any machine that has the same content.

    Raises:
        TransferBusy: another process sends this layer now.
        SourceChanged, ChecksumMismatch: the files differ from the scan; nothing was published.
        Unsupported: the layer might have more parts than the store allows; nothing was sent.
    """
    sending = _Sending(request)
    with _busy.sending(request.store, sending.key):
        return sending.run()


class _Busy:
    """Layers that this process is sending: store and key."""

    def __init__(self) -> None:
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self._lock = threading.Lock()
        self._layers: set[tuple[str, str]] = set()

    def __contains__(self, layer: tuple[str, str]) -> bool:
        with self._lock:
            return layer in self._layers

    @contextmanager
    def sending(self, store: Store, key: str) -> Generator[None]:
        """Hold a layer for one thread of this process."""
        layer = store.url, key
        with self._lock:
            if layer in self._layers:
                raise TransferBusy(f"this process is sending the layer {key!r} already", key=key)
            self._layers.add(layer)
        try:
            yield
        finally:
            with self._lock:
                self._layers.discard(layer)


_busy = _Busy()


def _session(store: Store, key: str, *, private: bool = False) -> ClaimedUpload:
    """The session of a layer: one process sends it at a time, because its compressed sizes decide where parts begin."""
    return ClaimedUpload(store, key, content_type=CONTENT_TYPE, private=private, exclusive=True)


def _is_idle(session: ClaimedUpload) -> bool:
    """Whether no process, including this one, works on the loaded upload."""
    return (session.store.url, session.key) not in _busy and session.is_idle()


def finish_layer(store: Store, key: str) -> Sent | None:
    """Complete an upload whose parts are all in the store; its source is not needed for that.

    It returns None if there is no such upload, if parts are missing, or if a process works on it.
    """
    session = _session(store, key)
    intent = session.load()
    if intent is None or intent.frames is None or not _is_idle(session):
        return None
    layer = _Layer(store, intent.manifest_file, intent.frames.frame_size)
    layer.session = session
    size = known_size(intent.frames.sizes, layer.plan)
    if size is None or layer.key != key:
        return None
    plan = TransferPlan(size, intent.part_size)
    session.take_up(intent.upload_id, intent.part_size)
    try:
        session.crcs = session.held().proven(plan)
        if plan.missing(session.crcs):
            return None
        meta, made = layer.complete(plan, intent.frames)
    except (NoSuchUpload, UploadIncomplete, ChecksumMismatch):
        return None
    layer.publish(meta, made)
    session.close()
    log.info("layer.finished key=%s bytes=%d parts=%d", key, meta.object_size, len(plan))
    return Sent(meta, parts=len(plan), parts_resumed=len(plan), bytes_resumed=meta.object_size)


def abandon_layer(store: Store, key: str, upload_id: str) -> None:
    """Abort an upload that nobody can or will continue, with its intent; one that a process works on stays."""
    session = _session(store, key)
    intent = session.load()
    if intent is None or intent.upload_id != upload_id:
        store.abort_multipart(key, upload_id)
    elif _is_idle(session):
        session.take_up(upload_id, intent.part_size)
        session.abandon()
    else:
        return
    log.info("layer.abandoned key=%s upload_id=%s", key, upload_id)


class _Layer:
    """The end of every layer's upload, whichever process began it: prove, complete, publish."""

    def __init__(self, store: Store, manifest_file: ManifestFile, frame_size: int) -> None:
        self.store = store
        self.manifest_file = manifest_file
        self.plan: FramePlan = plan_of(manifest_file, frame_size)
        manifest = manifest_file.manifest
        self.digest = layer_digest(manifest)
        self.is_private = manifest.private is not None
        """Whether only its owner may read the layer, if the store keeps it as a file."""
        self.key = layer_key(self.digest)
        self.session = _session(store, self.key, private=self.is_private)

    def complete(self, plan: TransferPlan, frames: FrameLog) -> tuple[LayerMeta, ObjectMeta]:
        """Prove that the parts are the layer, and complete the upload."""
        try:
            self.check_contents(frames)
        except ChecksumMismatch:
            self.session.abandon()
            raise
        made = self.session.complete(self.session.prove(plan))
        return meta_of(self.manifest_file, frames.codec, self.plan, frames.sizes), made

    def check_contents(self, frames: FrameLog) -> None:
        """Compare the compressed contents with the manifest.

        Raises:
            ChecksumMismatch: they differ.
        """
        expected = self.manifest_file.payload_crc32c
        lengths = (self.plan.frame(number).length for number in range(1, len(self.plan) + 1))
        actual = combine_all(zip(frames.crcs, lengths, strict=True))
        if actual != expected:
            raise ChecksumMismatch(
                f"the layer {self.key!r} has contents with CRC32C {actual:08x}, its manifest says {expected:08x}",
                hint="a source file changed, or was damaged, while it was sent: sync again",
                what=self.key,
                expected=expected,
                actual=actual,
            )

    def publish(self, meta: LayerMeta, made: ObjectMeta) -> None:
        """Put the metadata, which makes the layer visible.

        Raises:
            UploadIncomplete: the layer has another size in the store.
            TransferBusy: another process replaced it by another layer of the same content meanwhile.
        """
        if made.size != meta.object_size:
            raise UploadIncomplete(
                f"the layer {self.key!r} has {made.size} bytes in the store, not {meta.object_size}",
                key=self.key,
                expected=meta.object_size,
                actual=made.size,
            )
        mode = PutMode.CREATE if self.store.capabilities().conditional else PutMode.OVERWRITE
        try:
            self._put(meta, mode)
        except PreconditionFailed:
            try:
                equal = read_meta(self.store, self.key) == meta
            except ArtifactInvalid:
                equal = False
            if not equal:  # damaged, or of a layer from another codec that this one has replaced
                self._put(meta, PutMode.OVERWRITE)
        if self.store.head(self.key).e_tag != made.e_tag:
            raise TransferBusy(f"another process sent the layer {self.key!r} at the same time", key=self.key)

    def _put(self, meta: LayerMeta, mode: PutMode) -> None:
        self.store.put(
            meta_key(self.key), meta.encode(), mode=mode, content_type="application/json", private=self.is_private
        )


class _Sending(_Layer):
    progress: TransferProgress

    def __init__(self, request: LayerRequest) -> None:
        frame_size = FramePlan.frame_size_for(request.artifact.layout.size, request.frame_size)
        super().__init__(request.store, request.artifact.manifest_file, frame_size)
        self.request = request
        self.artifact = request.artifact
        self.codec = request.codec

    def run(self) -> Sent:
        if (there := self._settled()) is not None:
            return there
        check_readable(self.store)
        # The size is not known yet, so the parts are large enough for content that does not shrink at all.
        bound = Codec.bound(self.plan.size) + 128 * len(self.plan) + seek_table_size(len(self.plan))
        part_size = upload_part_size(self.store, bound, self.request.profile.chunk_size)
        if not self.store.capabilities().multipart or bound <= part_size:
            return self._send_whole()
        for _ in range(CLAIM_ATTEMPTS):
            sent = self._send_in_parts(self._claim(part_size))
            if sent is not None:
                return sent
        raise TransferBusy(f"the upload of {self.key!r} was taken away {CLAIM_ATTEMPTS} times", key=self.key)

    def _settled(self) -> Sent | None:
        """Publish the layer now, if its bytes are there and only its metadata is missing.

        Raises:
            TransferBusy: another process is sending it.
        """
        intent = self.session.load()
        self.session.check_idle()
        codec = intent.frames.codec if intent is not None and intent.frames else self.codec.name
        like = meta_of(self.manifest_file, codec, self.plan, [0] * len(self.plan))
        meta = find_bytes(self.store, self.key, like)
        if meta is None:
            return None
        log.info("layer.settled key=%s bytes=%d", self.key, meta.object_size)
        self.publish(meta, self.store.head(self.key))
        if intent is not None:
            self.session.take_up(intent.upload_id, intent.part_size)
            self.session.abandon()
        return Sent(meta, bytes_resumed=meta.object_size)

    # In one request

    def _send_whole(self) -> Sent:
        """Send a layer of one part, or any layer (compressed twice) to a store without multipart uploads."""
        frames, kept = FrameLog(self.codec.name, self.plan.frame_size), bytearray()
        in_memory = self.store.capabilities().multipart
        crc = 0
        progress = self._progress(None, lambda: None)
        progress.begin()
        for number, frame, content_crc in self._frames():
            frames.sizes.append(len(frame))
            frames.crcs.append(content_crc)
            crc = crc32c(frame, crc)
            if in_memory:
                kept += frame
            progress.moved(self.plan.frame(number).length)
            progress.tick()
        self.check_contents(frames)
        table = encode_seek_table(frames.sizes, self.plan)
        meta = meta_of(self.manifest_file, frames.codec, self.plan, frames.sizes)
        check_put_size(self.store, self.key, meta.object_size)
        body = Body(
            meta.object_size,
            lambda: (kept, table) if in_memory else self._again(table),
            crc32c(table, crc),
        )
        mode = PutMode.CREATE if self.store.capabilities().conditional else PutMode.OVERWRITE
        try:
            made = self.store.put(self.key, body, mode=mode, content_type=CONTENT_TYPE, private=self.is_private)
        except PreconditionFailed:
            # Another process was faster, or the object is not a layer of this content.
            if (there := self._settled()) is not None:
                return there
            made = self.store.put(self.key, body, content_type=CONTENT_TYPE, private=self.is_private)
        self.publish(meta, made)
        progress.done()
        return Sent(meta, bytes_sent=meta.object_size)

    def _frames(self) -> Iterator[tuple[int, bytes, int]]:
        """All frames in order: number, bytes, and the CRC32C of their contents."""
        source = self.artifact.source()
        buffer = memoryview(bytearray(self.plan.frame_size))
        for number in range(1, len(self.plan) + 1):
            frame = self.plan.frame(number)
            view = buffer[: frame.length]
            source.read_into(frame.offset, view)
            yield number, self.codec.compress(view), crc32c(view)

    def _again(self, table: bytes) -> Iterator[bytes]:
        for _, frame, _ in self._frames():
            yield frame
        yield table

    # In parts

    def _claim(self, part_size: int) -> FrameLog:
        """Begin an upload, or continue one of an earlier process; returns what is known of its frames."""
        session = self.session
        new = FrameLog(self.codec.name, self.plan.frame_size)
        intent = session.claim(self.manifest_file, part_size, self._would_continue, frames=new)
        if session.is_new:
            self._abort_others(session.upload_id)
        elif intent.manifest_file != self.manifest_file:
            self.artifact = self.artifact.adopt(intent.manifest_file)
            self.manifest_file = intent.manifest_file
        self.request.on_begin(session.upload_id, session.part_size)
        return new.longer(intent.frames)

    def _abort_others(self, upload_id: str) -> None:
        """Abort uploads of other processes: one without the intent by now will not get it, and gives up."""
        if not self.store.capabilities().conditional:
            return
        for upload in self.store.list_uploads(self.key):
            if upload.key == self.key and upload.upload_id != upload_id:
                log.info("layer.superseded key=%s upload_id=%s", self.key, upload.upload_id)
                self.store.abort_multipart(self.key, upload.upload_id)

    def _would_continue(self, intent: Intent) -> bool:
        """Whether this process would make the frames and parts that the intent records."""
        frames = intent.frames
        return (
            frames is not None
            and (frames.codec, frames.frame_size) == (self.codec.name, self.plan.frame_size)
            and len(frames.sizes) <= len(self.plan)
            and intent.manifest.same_body(self.artifact.manifest)
            # The manifest is in the first frame: another length would move everything after it.
            and len(intent.manifest_file.data) == len(self.manifest_file.data)
        )

    def _send_in_parts(self, frames: FrameLog) -> Sent | None:
        """Send what is missing and publish; None if the upload is gone, and nobody completed it."""
        with self.session as session:
            try:
                sent, made = self._send(frames)
            except NoSuchUpload as error:
                log.info("layer.vanished key=%s upload_id=%s error=%s", self.key, session.upload_id, error)
                session.abandon()
                return self._settled()
            self.publish(sent.layer, made)
        session.close()
        self.progress.done()
        return sent

    def _send(self, frames: FrameLog) -> tuple[Sent, ObjectMeta]:
        session, part_size = self.session, self.session.part_size
        held = session.held()
        size = known_size(frames.sizes, self.plan)
        # While the layer's size is unknown, no part may count as the last one.
        plan = TransferPlan(size or part_size * (sum(frames.sizes) // part_size), part_size)
        session.crcs = held.proven(plan) if size or sum(frames.sizes) >= part_size else {}
        first_part = next(number for number in range(1, len(session.crcs) + 2) if number not in session.crcs)
        window = 2 * self.request.profile.workers
        cutter = PartCutter(self.plan, frames, first_part=first_part, part_size=part_size, window=window)
        progress = self.progress = self._progress(session.upload_id, lambda: session.save(cutter.log()))
        for number in range(1, cutter.first_frame):
            progress.resumed(self.plan.frame(number).length)
        sent = Sent(meta_of(self.manifest_file, frames.codec, self.plan, [0] * len(self.plan)))
        for number in range(1, first_part):
            sent.parts_resumed += 1
            sent.bytes_resumed += plan.part(number).length
        progress.begin()
        if size is None or first_part <= len(plan):
            with progress.failure_saved():
                self._compress(cutter, held, sent)
            frames = cutter.log()
            progress.save()
        plan = TransferPlan(sum(frames.sizes) + seek_table_size(len(self.plan)), part_size)
        sent.layer, made = self.complete(plan, frames)
        sent.parts, sent.checkpoints_saved = len(plan), progress.saved
        return sent, made

    def _compress(self, cutter: PartCutter, held: HeldParts, sent: Sent) -> None:
        """Compress the frames from the start of the first missing part, and send the parts that the store lacks."""
        table_number = len(self.plan) + 1
        items = [self.plan.frame(number) for number in range(cutter.first_frame, table_number)]
        items.append(Part(table_number, self.plan.size, 0))
        source = self.artifact.source()

        def move(item: Part, buffer: memoryview) -> list[_PartDone]:
            try:
                cutter.admit(item.number)
                if item.number == table_number:
                    data, crc = cutter.seek_table(), 0
                else:
                    view = buffer[: item.length]
                    source.read_into(item.offset, view)
                    data, crc = self.codec.compress(view), crc32c(view)
                return [self._send_part(cut, held) for cut in cutter.add(item.number, data, crc)]
            except BaseException as error:
                cutter.break_down(error)
                raise

        def moved(item: Part, parts: list[_PartDone]) -> None:
            for part in parts:
                self.session.crcs[part.number] = part.crc
                if part.was_sent:
                    sent.bytes_sent += part.length
                else:
                    sent.parts_resumed += 1
                    sent.bytes_resumed += part.length
            if item.number != table_number:
                self.progress.moved(item.length)

        def tick() -> None:
            self.progress.tick()
            self.session.renew(cutter.log)

        move_parts(
            items,
            move,
            workers=self.request.profile.workers,
            # Besides its frame, room for the part that a worker completes: taken from the budget, never touched.
            buffer_size=self.plan.frame_size + cutter.part_size,
            on_moved=moved,
            on_tick=tick,
        )

    def _send_part(self, cut: Cut, held: HeldParts) -> _PartDone:
        body = Body.of(cut.data)
        crc = body.crc32c or 0
        if held.holds(cut.number, cut.data, crc):
            return _PartDone(cut.number, len(cut.data), crc, was_sent=False)
        self.session.put(cut.number, body)
        return _PartDone(cut.number, len(cut.data), crc, was_sent=True)

    def _progress(self, upload_id: str | None, save: Callable[[], None]) -> TransferProgress:
        """Counts frames, because the parts are not known beforehand, and the bytes of the tar."""
        return TransferProgress(
            *(self.store, self.key, self.manifest_file.digest, "upload"),
            part_size=self.plan.frame_size,
            parts=len(self.plan),
            size=self.plan.size,
            profile=self.request.profile,
            upload_id=upload_id,
            save=save,
            on_progress=self.request.on_progress,
            on_checkpoint=self.request.on_checkpoint,
        )
