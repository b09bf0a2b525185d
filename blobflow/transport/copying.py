"""Copies an artifact from store to store, without a local disk, with the claim, proof and publication of an upload.

Parts stream through this process: a ranged GET of the pinned source, a PUT of the part. If both stores are on one
server (with one identity there), the server copies the payload itself. The result is checked before the manifest makes
it visible.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Final, Literal

from typing_extensions import override

from blobflow.artifact.manifest import Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.checksum import combine_all, crc32c
from blobflow.config import ChunkProfile
from blobflow.engine.plan import Part
from blobflow.engine.pool import move_parts
from blobflow.errors import ArtifactInvalid, StoreConfigurationError, Unsupported, UsageError
from blobflow.stores.base import ObjectMeta, Reader, Store
from blobflow.stores.optional import address_of, copy_from, server_of
from blobflow.transport.catalog import check_artifact_key
from blobflow.transport.remote import RemoteArtifact
from blobflow.transport.uploading import MultipartUpload, UploadRequest, run
from blobflow.uploads.progress import OnProgress, OnRecord, PartStats

_log = logging.getLogger(__name__)

_DAMAGED: Final = "the source is damaged: `blobflow verify --deep` names the member; restore it from another copy"


@dataclass(frozen=True)
class CopyResult(PartStats):
    """The result of a copy."""

    status: Literal["copied", "unchanged"]
    source_key: str
    key: str
    artifact_digest: str
    """Digest of the artifact that is now under the key; with `unchanged` it may be an older one of equal content."""
    manifest: Manifest
    server_side: bool
    """Whether the server copied the payload; then its bytes did not pass through here, except for checks."""
    bytes_received: int
    bytes_sent: int


def copy_artifact(
    source_store: Reader,
    source_key: str,
    target_store: Store,
    target_key: str,
    *,
    profile: ChunkProfile | None = None,
    overwrite: bool = False,
    expected_digest: str | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> CopyResult:
    """Copy the artifact `source_key` of one store to `target_key` of another, or of the same one.

    The payload is compared with its CRC32C before the sibling manifest, which comes last, makes it visible. So a
    damaged source is refused. (If you do not trust the source's manifest either, check every SHA-256 with `verify`.)

    May be called again after a crash, from any machine. Parts that the target holds are not sent again. They are not
    fetched again either if their checksums are known, from the target or from a checkpoint. If the target has the
    artifact already, the result is `unchanged`, also if it was uploaded and not copied.

    Within one store, and between buckets or prefixes of one S3 endpoint with the same credentials, the server copies
    the payload itself, in one step that starts again after a crash. The result is compared with the checksum that the
    store attests; if it attests none, the copy is read back. A copy that replaces another artifact is always streamed,
    because its bytes must be checked before the old payload is removed.

    Memory: `profile.chunk_size * profile.workers` bytes.

    Args:
        overwrite: Replace another artifact under the key. Readers see the old, the new, or a retryable error.
        expected_digest: Refuse every artifact except this one. The payload under its manifest is still checked by
            CRC32C here, and by SHA-256 when it is read.
        on_progress: Called in the calling thread about twice a second; an exception from it stops the copy cleanly.
        on_checkpoint: Called in the calling thread after each saved checkpoint, at the end and on failure.

    Raises:
        ArtifactNotFound: there is no artifact under the source key.
        DigestMismatch: another artifact than `expected_digest` is there; nothing was sent.
        ArtifactInvalid, SizeMismatch, ChecksumMismatch: the source is damaged; nothing was published.
        ObjectChanged: the source was replaced meanwhile; try again.
        KeyConflict: the target key holds another artifact.
        TransferBusy: another process is uploading other content to the target key.
    """
    check_artifact_key(target_key)
    profile = profile or ChunkProfile()
    in_place = _is_same_place(source_store, target_store)
    if in_place and source_key == target_key:
        raise UsageError(f"{source_key!r} cannot be copied to itself", key=source_key)
    in_place = in_place or _is_same_server(source_store, source_key, target_store, target_key)
    payload = RemotePayload(RemoteArtifact.open(source_store, source_key, expected_digest))
    request = UploadRequest(
        target_store, target_key, payload, profile, overwrite, on_progress, on_checkpoint, "copy", _DAMAGED
    )
    result = run(request, _ServerCopy if in_place else MultipartUpload)
    meter = payload.meter
    return CopyResult(
        status="unchanged" if result.status == "unchanged" else "copied",
        source_key=source_key,
        key=target_key,
        artifact_digest=result.artifact_digest,
        manifest=result.manifest,
        server_side=meter.server_side,
        bytes_total=result.bytes_total,
        bytes_received=meter.bytes_received,
        bytes_sent=0 if meter.server_side else result.bytes_sent,
        bytes_resumed=result.bytes_resumed,
        seconds=result.seconds,
        parts=result.parts,
        checkpoints_saved=result.checkpoints_saved,
    )


def _is_same_place(source: Reader, target: Store) -> bool:
    """Whether the target store can copy the source's objects. Buckets of two servers may have the same name."""
    return source.url == target.url and server_of(source).endpoint == server_of(target).endpoint


def _is_same_server(source: Reader, source_key: str, target: Store, target_key: str) -> bool:
    """Whether both are on one server, which may be asked to copy from bucket to bucket."""
    here, there = address_of(source, source_key), address_of(target, target_key)
    return here is not None and there is not None and here[:2] == there[:2]


class _Meter:
    """The counters of one copy, over all threads and all manifests that it adopted."""

    def __init__(self) -> None:
        self.bytes_received = 0
        self.server_side = False
        self._lock = threading.Lock()

    def received(self, count: int) -> None:
        with self._lock:
            self.bytes_received += count


class RemotePayload:
    """The payload of an artifact in a store, pinned to one version, as a source for uploads.

    Its head, the entry of the manifest, is made from the manifest's bytes and never fetched. So the embedded manifest
    equals the published one, whatever the source holds.
    """

    def __init__(
        self, remote: RemoteArtifact, manifest_file: ManifestFile | None = None, meter: _Meter | None = None
    ) -> None:
        self.remote = remote
        self.meter = meter or _Meter()
        self.manifest_file = manifest_file or remote.manifest_file
        self.size = self.manifest_file.payload_size
        self._head = self.manifest_file.entry
        self._shift = len(remote.manifest_file.entry) - len(self._head)

    def __repr__(self) -> str:
        return f"<RemotePayload {self.manifest_file.digest[:19]} of {self.remote.key!r} in {self.remote.store.url}>"

    @property
    def is_as_stored(self) -> bool:
        """Whether this is the stored payload in every byte, including its manifest."""
        return self.manifest_file == self.remote.manifest_file

    def adopt(self, manifest_file: ManifestFile) -> RemotePayload:
        """The same body with another manifest: the one whose upload is continued."""
        if not manifest_file.manifest.same_body(self.manifest_file.manifest):
            raise ArtifactInvalid(
                f"{self!r} and the manifest {manifest_file.digest} describe different payloads", what="payload"
            )
        return RemotePayload(self.remote, manifest_file, self.meter)

    def source(self) -> RemotePayload:
        """This payload: nothing has to be opened."""
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the payload's bytes from `offset`.

        Raises:
            ObjectChanged: the source was replaced; try again.
        """
        own = self._head[offset : offset + len(buffer)]
        buffer[: len(own)] = own
        rest = buffer[len(own) :]
        if rest:
            remote = self.remote
            remote.store.get_range_into(remote.key, offset + len(own) + self._shift, rest, e_tag=remote.payload.e_tag)
            self.meter.received(len(rest))

    def copy_by_server(self, target: Store, key: str) -> ObjectMeta:
        """Have the server that source and target share make the target's object.

        Raises:
            StoreConfigurationError, Unsupported: the server does not copy with these credentials.
        """
        remote = self.remote
        address = None if _is_same_place(remote.store, target) else address_of(remote.store, remote.key)
        return target.copy(remote.key, key) if address is None else copy_from(target, address, remote.payload, key)


class _ServerCopy(MultipartUpload):
    """The server that source and target share copies the payload; if it refuses, the parts are sent.

    It is claimed like an upload, with an upload id that holds no part. A process that takes the intent over sends the
    parts, or has the server copy again. The upload is aborted only after the copy is checked: without the upload, an
    object that begins with the right manifest would count as complete.
    """

    @override
    def make(self) -> ObjectMeta:
        payload = self.payload
        if not isinstance(payload, RemotePayload):
            raise AssertionError("a copy brings what is in a store")
        if self.replaces is not None or not payload.is_as_stored:
            return super().make()
        payload.meter.server_side = True
        self.delete_old_manifest()
        with self.progress.failure_saved():
            self.progress.begin()
            copied = self._copied(payload)
        if not copied:
            return super().make()
        with self.progress.failure_saved():
            made = self.store.head(self.key)
            attested = self.session.attested(made)
            actual = self._read_back(made, payload.meter) if attested is None else attested
        if actual != self.payload.manifest_file.payload_crc32c:
            self.store.delete(self.key)
            self.session.abandon()
            raise self.differs(actual)
        self.store.abort_multipart(self.key, self.session.upload_id)
        return made

    def _copied(self, payload: RemotePayload) -> bool:
        """Have the server copy. False if it refuses: it may lack access to what this process can read and write."""
        try:
            move_parts(
                [Part(1, 0, self.plan.size)],
                lambda _part, _buffer: payload.copy_by_server(self.store, self.key),
                workers=1,
                buffer_size=1,
                on_moved=lambda _part, _made: None,
                on_tick=self.tick,
            )
        except (StoreConfigurationError, Unsupported) as refused:
            if _is_same_place(payload.remote.store, self.store):
                raise
            _log.info("copy.streamed key=%s refused=%s", self.key, refused)
            payload.meter.server_side = False
            return False
        return True

    def _read_back(self, made: ObjectMeta, meter: _Meter) -> int:
        """The CRC32C of the copy's bytes."""
        crcs: dict[int, int] = {}

        def move(part: Part, buffer: memoryview) -> int:
            crc = 0
            for offset in range(0, part.length, len(buffer)):
                view = buffer[: part.length - offset]
                self.store.get_range_into(self.key, part.offset + offset, view, e_tag=made.e_tag)
                meter.received(len(view))
                crc = crc32c(view, crc)
            return crc

        def moved(part: Part, crc: int) -> None:
            crcs[part.number] = crc
            self.progress.moved(part.length)

        move_parts(
            self.plan,
            move,
            workers=self.profile.workers,
            buffer_size=min(self.plan.part_size, self.profile.chunk_size),
            on_moved=moved,
            on_tick=self.tick,
        )
        return combine_all((crcs[part.number], part.length) for part in self.plan)
