"""Upload: numbered parts that any process can continue, published by the sibling manifest, which comes last."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from typing_extensions import Self

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.manifest import Manifest, artifact_digest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.checksum import crc32c
from blobflow.config import ChunkProfile
from blobflow.engine.plan import Part, TransferPlan
from blobflow.engine.pool import move_parts
from blobflow.errors import (
    ArtifactInvalid,
    ChecksumMismatch,
    KeyConflict,
    NoSuchUpload,
    ObjectNotFound,
    PreconditionFailed,
    TransferBusy,
    UploadIncomplete,
)
from blobflow.stores.base import Body, ObjectMeta, PutMode, Store, check_object_size, check_put_size, check_readable
from blobflow.stores.optional import check_room_for
from blobflow.transport.catalog import MANIFEST_SUFFIX, check_artifact_key, find_manifest_bytes, read_manifest_bytes
from blobflow.uploads.intent import Intent, IntentKeeper
from blobflow.uploads.progress import OnProgress, OnRecord, PartStats, TransferProgress
from blobflow.uploads.session import CLAIM_ATTEMPTS, ClaimedUpload, md5_in, upload_part_size

log = logging.getLogger(__name__)

CONTENT_TYPE: Final = "application/x-tar"


class PayloadReader(Protocol):
    """Any range of a payload, for any number of threads."""

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the payload's bytes from `offset`."""
        ...


class Payload(Protocol):
    """The content of an upload: the payload of an `Artifact` here, or of one in another store."""

    @property
    def manifest_file(self) -> ManifestFile:
        """The manifest; before the bytes sent become an object, they are compared with its checksum."""
        ...

    def source(self) -> PayloadReader: ...

    def adopt(self, manifest_file: ManifestFile) -> Self:
        """The same body with another manifest (see `Manifest.same_body`)."""
        ...


@dataclass(frozen=True)
class UploadRequest:
    """An upload request: store, key, payload, options, callbacks."""

    store: Store
    key: str
    payload: Payload
    profile: ChunkProfile
    overwrite: bool = False
    on_progress: OnProgress | None = None
    on_checkpoint: OnRecord | None = None
    kind: Literal["upload", "copy"] = "upload"
    if_differs: str = "a source file changed, or was damaged, after the export: export again"
    """The hint if the bytes that were sent do not match the manifest."""
    damaged: str | None = None
    """Entity tag of a payload that is damaged: it is sent again, although the key holds this content."""


@dataclass(frozen=True)
class UploadResult(PartStats):
    """The result of an upload."""

    status: Literal["uploaded", "unchanged"]
    key: str
    artifact_digest: str
    """Digest of the artifact that is now under the key; with `unchanged` it may be an older one of equal content."""
    manifest: Manifest
    bytes_sent: int = 0


def upload(
    store: Store,
    key: str,
    artifact: Artifact | str | Path,
    *,
    profile: ChunkProfile | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> UploadResult:
    """Upload an artifact to `key`, payload first, sibling manifest last.

    May be called again after a crash, from any machine: it sends what is missing. Uploading an artifact that is there
    already is a no-op (`unchanged`).

    Args:
        overwrite: Replace another artifact under the key. Readers see the old, the new, or a retryable error.
        on_progress: Called in the calling thread about twice a second; an exception from it stops the upload cleanly.
        on_checkpoint: Called in the calling thread once it is known what the store holds already, after each saved
            checkpoint, at the end and on failure.

    Raises:
        ArtifactNotFound, ArtifactInvalid: the local artifact is missing or invalid; no request was sent.
        Unsupported: the store cannot keep it, or nobody could read it there; nothing was sent.
        KeyConflict: the key holds another artifact.
        TransferBusy: another process is uploading other content to this key.
        SourceChanged, ChecksumMismatch: the files differ from those that were exported; nothing was published.
    """
    check_artifact_key(key)
    if not isinstance(artifact, Artifact):
        artifact = Artifact.open(artifact)
    return run(UploadRequest(store, key, artifact, profile or ChunkProfile(), overwrite, on_progress, on_checkpoint))


def run(request: UploadRequest, multipart: type[MultipartUpload] | None = None) -> UploadResult:
    """Upload the payload to its key, unless it is there already.

    Args:
        multipart: The class for stores with multipart uploads, if not the usual one.
    """
    started = time.monotonic()
    store = request.store
    replaces: str | None = None
    for _ in range(CLAIM_ATTEMPTS):
        found = look(request, started)
        if isinstance(found, UploadResult):
            return found
        replaces = found or replaces
        check_readable(store)
        check_object_size(store, request.key, request.payload.manifest_file.payload_size)
        if not store.capabilities().multipart:
            return _StreamUpload(request, replaces).run(started)
        upload = (multipart or MultipartUpload)(request, replaces)
        if upload.claim() and upload.run():
            return upload.result(started)
    raise busy(request)


def look(request: UploadRequest, started: float) -> UploadResult | str | None:
    """The result, if all of it is there; otherwise the digest of the artifact that the upload will replace, if any."""
    store, key = request.store, request.key
    existing_bytes = find_manifest_bytes(store, key)
    if existing_bytes is None:
        return None
    existing = _same_content(existing_bytes, request)
    # A manifest that lost its payload is repaired by uploading again.
    if existing is None or not _payload_is_there(request, existing):
        return artifact_digest(existing_bytes)
    _remove_leftover(store, key, existing)
    size, seconds = existing.payload_size, time.monotonic() - started
    return UploadResult("unchanged", key, existing.digest, existing.manifest, bytes_total=size, seconds=seconds)


def busy(request: UploadRequest) -> TransferBusy:
    """The error if other processes publish under the key, or take the upload away, again and again."""
    return TransferBusy(f"other uploads to {request.key!r} were faster {CLAIM_ATTEMPTS} times", key=request.key)


def _same_content(existing_bytes: bytes, request: UploadRequest) -> ManifestFile | None:
    """The manifest under the key if it has the same content; None if it may be replaced.

    Raises:
        KeyConflict: it has other content, and replacing it was not allowed.
        ArtifactInvalid: it is damaged, and replacing it was not allowed.
    """
    try:
        existing = ManifestFile.parse(existing_bytes, request.key)
    except ArtifactInvalid:
        if not request.overwrite:
            raise
        return None
    mine = request.payload.manifest_file.manifest
    if existing.manifest.same_content(mine):
        return existing
    if request.overwrite:
        return None
    modes_alone = existing.manifest.model_copy(update={"private": mine.private}).same_content(mine)
    raise KeyConflict(
        f"key {request.key!r} holds another artifact"
        + (": the same files, of which others are private" if modes_alone else ""),
        key=request.key,
        expected=request.payload.manifest_file.digest,
        actual=existing.digest,
    )


def _payload_is_there(request: UploadRequest, existing: ManifestFile) -> bool:
    try:
        found = request.store.head(request.key)
    except ObjectNotFound:
        return False
    return found.e_tag != request.damaged and found.size == existing.payload_size


def _remove_leftover(store: Store, key: str, published: ManifestFile) -> None:
    """Remove the intent of a process that died after it had published this manifest.

    If its owner is alive after all, it is about to remove the intent, and a process that joined it finds the payload
    complete. An intent that replaces this manifest by the same one belongs to an upload that repairs a damaged payload;
    it stays.
    """
    keeper = IntentKeeper(store, key)
    intent = keeper.load()
    is_healing = intent is not None and intent.replaces == published.digest
    if intent is not None and intent.manifest_file == published and not is_healing:
        log.info("upload.leftover_intent key=%s upload_id=%s", key, intent.upload_id)
        store.abort_multipart(key, intent.upload_id)
        keeper.remove(intent.upload_id)


class _Upload:
    """What all kinds of uploads share: publishing, and the result."""

    def __init__(self, request: UploadRequest, replaces: str | None) -> None:
        self.request = request
        self.store = request.store
        self.key = request.key
        self.payload = request.payload
        self.profile = request.profile
        self.replaces = replaces
        self.is_private = request.payload.manifest_file.manifest.private is not None
        """Whether only its owner may read the payload, if the store keeps it as a file."""

    def new_progress(self, plan: TransferPlan, upload_id: str | None, save: Callable[[], None]) -> TransferProgress:
        return TransferProgress(
            *(self.store, self.key, self.payload.manifest_file.digest, self.request.kind),
            part_size=plan.part_size,
            parts=len(plan),
            size=plan.size,
            profile=self.profile,
            upload_id=upload_id,
            save=save,
            on_progress=self.request.on_progress,
            on_checkpoint=self.request.on_checkpoint,
        )

    def delete_published_manifest(self) -> None:
        """Delete the old manifest before the payload is replaced: a manifest means that its payload is complete.

        Raises:
            KeyConflict: another artifact was published under this key meanwhile; it stays.
        """
        found = find_manifest_bytes(self.store, self.key)
        if found is None:
            return
        actual = artifact_digest(found)
        if actual == self.replaces:
            self.store.delete(self.key + MANIFEST_SUFFIX)
        elif found != self.payload.manifest_file.data:  # equal bytes: a joined uploader was faster
            raise KeyConflict(
                f"another artifact was published under {self.key!r} meanwhile",
                key=self.key,
                expected=self.payload.manifest_file.digest,
                actual=actual,
            )

    def publish(self, made: ObjectMeta) -> None:
        """Put the sibling manifest, which makes the artifact visible.

        Raises:
            KeyConflict: another artifact was published under this key meanwhile.
        """
        manifest_file = self.payload.manifest_file
        if made.size != (expected := manifest_file.payload_size):
            raise UploadIncomplete(
                f"the payload {self.key!r} has {made.size} bytes in the store, not {expected}",
                key=self.key,
                expected=expected,
                actual=made.size,
            )
        mode = PutMode.CREATE if self.store.capabilities().conditional else PutMode.OVERWRITE
        try:
            self.store.put(
                self.key + MANIFEST_SUFFIX,
                manifest_file.data,
                mode=mode,
                content_type="application/json",
                private=self.is_private,
            )
        except PreconditionFailed:
            found = read_manifest_bytes(self.store, self.key)
            if found != manifest_file.data:
                raise KeyConflict(
                    f"another artifact was published under {self.key!r} meanwhile",
                    key=self.key,
                    expected=manifest_file.digest,
                    actual=artifact_digest(found),
                ) from None
        now = self.store.head(self.key)
        if now.e_tag != made.e_tag:
            raise KeyConflict(
                f"the payload of {self.key!r} was replaced while its manifest was published",
                hint="upload again, and find out who else writes to this key",
                key=self.key,
                expected=made.e_tag,
                actual=now.e_tag,
            )

    def differs(self, actual: int) -> ChecksumMismatch:
        """The error for sent bytes with the CRC32C `actual` instead of the manifest's."""
        expected = self.payload.manifest_file.payload_crc32c
        return ChecksumMismatch(
            f"the payload of {self.payload!r} has CRC32C {actual:08x}, its manifest says {expected:08x}",
            hint=self.request.if_differs,
            what="payload",
            expected=expected,
            actual=actual,
        )

    def result_of(self, progress: TransferProgress, started: float) -> UploadResult:
        return UploadResult(
            status="uploaded",
            key=self.key,
            artifact_digest=self.payload.manifest_file.digest,
            manifest=self.payload.manifest_file.manifest,
            bytes_sent=progress.bytes_moved,
            **progress.counters(started),
        )


class _StreamUpload(_Upload):
    """The upload for stores without multipart uploads: one request, from the beginning each time."""

    def run(self, started: float) -> UploadResult:
        source = self.payload.source()
        check_put_size(self.store, self.key, source.size)
        check_room_for(self.store, source.size)
        plan = TransferPlan(source.size, self.profile.chunk_size)
        progress = self.new_progress(plan, None, save=lambda: None)
        progress.begin()
        expected = self.payload.manifest_file.payload_crc32c

        def chunks() -> Iterator[memoryview]:
            nonlocal progress
            progress = self.new_progress(plan, None, save=lambda: None)
            crc = 0
            for chunk in _chunks(source, 0, source.size, memoryview(bytearray(self.profile.chunk_size))):
                crc = crc32c(chunk, crc)
                if progress.bytes_moved + len(chunk) == source.size:
                    if crc != expected:
                        raise self.differs(crc)
                    # Checked before the transfer, and once more before it replaces anything.
                    self.delete_published_manifest()
                yield chunk
                progress.moved(len(chunk))
                progress.tick()

        self.delete_published_manifest()
        made = self.store.put(
            self.key, Body(source.size, chunks, expected), content_type=CONTENT_TYPE, private=self.is_private
        )
        self.publish(made)
        progress.done()
        return self.result_of(progress, started)


class MultipartUpload(_Upload):
    """Numbered parts of a multipart upload that any process can continue.

    Args:
        owner: The owner that the intent names; None for this process.

    Attributes:
        plan, progress: Those of the upload that was claimed or continued.
    """

    plan: TransferPlan
    progress: TransferProgress

    def __init__(self, request: UploadRequest, replaces: str | None, *, owner: str | None = None) -> None:
        super().__init__(request, replaces)
        self.session = ClaimedUpload(
            self.store, self.key, content_type=CONTENT_TYPE, private=self.is_private, owner=owner
        )

    def claim(self) -> bool:
        """Begin an upload, or join one of the same payload. False if the key was published meanwhile."""
        mine, session = self.payload.manifest_file, self.session
        part_size = upload_part_size(self.store, mine.payload_size, self.profile.chunk_size)
        intent = session.claim(
            mine,
            part_size,
            lambda intent: intent.manifest.same_body(mine.manifest),
            replaces=self.replaces,
        )
        self.adopt(intent)
        if session.is_new:
            # The previous holder of the intent may have published and removed it since the key was checked.
            found = find_manifest_bytes(self.store, self.key)
            if found is not None and artifact_digest(found) != self.replaces:
                log.info("upload.overtaken key=%s", self.key)
                session.abandon()
                return False
        self.begin()
        return True

    def adopt(self, intent: Intent) -> None:
        """Take the intent's manifest as the one to publish at the end."""
        self.replaces = self.replaces or intent.replaces
        if intent.manifest_file != self.payload.manifest_file:
            self.payload = self.payload.adopt(intent.manifest_file)

    def begin(self) -> None:
        """Plan the session's parts, and count them."""
        self.plan = TransferPlan(self.payload.manifest_file.payload_size, self.session.part_size)
        self.progress = self.new_progress(self.plan, self.session.upload_id, save=self.session.save)

    def run(self) -> bool:
        """Make the payload and publish it. False if the upload is gone, and nobody completed it."""
        with self.session as session:
            try:
                made = self.make()
            except NoSuchUpload as error:
                settled = self.settle()
                if settled is None:
                    log.info("upload.vanished key=%s upload_id=%s error=%s", self.key, session.upload_id, error)
                    session.abandon()
                    return False
                made = settled
                for part in self.plan.missing(session.crcs):
                    self.progress.resumed(part.length)  # sent by the process that completed the upload
            self.publish(made)
        session.close()
        self.progress.done()
        return True

    def settle(self) -> ObjectMeta | None:
        """The payload, if another process completed this upload; its embedded manifest identifies it."""
        head = self.payload.manifest_file.entry
        return self.session.settle(self.plan.size, begins_with=head, other_than=self.request.damaged)

    def make(self) -> ObjectMeta:
        """Send what is missing, prove it, and complete the payload."""
        self.send(self.plan.numbers)
        return self.complete()

    def send(self, numbers: Collection[int]) -> None:
        """Send the parts that the store does not hold, and save their checksums."""
        session, progress = self.session, self.progress
        held = session.held()
        session.crcs, unproven = held.proven(self.plan), held.unproven(self.plan)
        for number in session.crcs.keys() & set(numbers):
            progress.resumed(self.plan.part(number).length)
        progress.begin()
        with progress.failure_saved():
            missing = [part for part in self.plan.missing(session.crcs) if part.number in numbers]
            check_room_for(self.store, sum(part.length for part in missing if part.number not in unproven))
            self._send(missing, unproven)
        progress.save()

    def complete(self) -> ObjectMeta:
        """Prove that the parts, whose checksums are all known, are the payload, and complete it."""
        actual = self.session.crc32c(self.plan)
        if actual != self.payload.manifest_file.payload_crc32c:
            # Nothing of this upload can be used again: its files have changed since they were read.
            self.session.abandon()
            raise self.differs(actual)
        parts = self.session.prove(self.plan)
        self.delete_old_manifest()
        return self.session.complete(parts)

    def delete_old_manifest(self) -> None:
        """Call `delete_published_manifest`; if it is refused, abandon this upload."""
        try:
            self.delete_published_manifest()
        except KeyConflict:
            self.session.abandon()
            raise

    def _send(self, missing: list[Part], unproven: dict[int, str]) -> None:
        if not missing:
            return
        session, source = self.session, self.payload.source()

        def move(part: Part, buffer: memoryview) -> tuple[int, bool]:
            if part.number in unproven:
                crc = _crc_if_same(source, part, buffer, unproven[part.number])
                if crc is not None:
                    return crc, False
            return session.put(part.number, _part_body(source, part, buffer)), True

        def moved(part: Part, outcome: tuple[int, bool]) -> None:
            session.crcs[part.number], sent = outcome
            if sent:
                self.progress.moved(part.length)
            else:
                self.progress.resumed(part.length)

        move_parts(
            missing,
            move,
            workers=self.profile.workers,
            buffer_size=min(self.plan.part_size, self.profile.chunk_size),
            on_moved=moved,
            on_tick=self.tick,
        )

    def tick(self) -> None:
        """Report the progress and renew the intent, each when it is due."""
        self.progress.tick()
        self.session.renew()

    def result(self, started: float) -> UploadResult:
        """The result after publication."""
        return self.result_of(self.progress, started)


def _chunks(source: PayloadReader, offset: int, length: int, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a range, one buffer at a time; each is valid until the next."""
    while length:
        chunk = buffer[: min(length, len(buffer))]
        source.read_into(offset, chunk)
        yield chunk
        offset += len(chunk)
        length -= len(chunk)


def _part_body(source: PayloadReader, part: Part, buffer: memoryview) -> Body:
    """The bytes of a part, through `buffer`: read once if it fits, otherwise once for the checksum and once to send."""
    if part.length <= len(buffer):
        view = buffer[: part.length]
        source.read_into(part.offset, view)
        return Body.of(view)
    crc = 0
    for chunk in _chunks(source, part.offset, part.length, buffer):
        crc = crc32c(chunk, crc)
    return Body(part.length, lambda: _chunks(source, part.offset, part.length, buffer), crc)


def _crc_if_same(source: PayloadReader, part: Part, buffer: memoryview, e_tag: str) -> int | None:
    """The CRC32C of a part that an earlier process sent, if its e_tag proves that it sent these bytes."""
    expected = md5_in(e_tag)
    if expected is None:
        return None
    md5, crc = hashlib.md5(usedforsecurity=False), 0
    for chunk in _chunks(source, part.offset, part.length, buffer):
        md5.update(chunk)
        crc = crc32c(chunk, crc)
    return crc if md5.hexdigest() == expected else None
