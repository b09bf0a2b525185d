"""One transfer by several processes: begin it once, move its parts in any number of lanes, then make the whole once.

| | begin | lanes | the whole |
|---|---|---|---|
| upload | `begin_upload` | `send_parts` | `commit_upload` |
| download | `begin_download` | `fetch_lane` | `download` |

Each may be called again after a crash: parts that are there are not moved twice, and a finished step stays finished.

The lanes of an upload share only the store. They run on any machine that has the artifact or has exported the same
content again. Nothing is visible before `commit_upload` has proven that every part of the plan is there, and that
together they are the payload of the manifest. So a lane that was skipped, or died, is always noticed.

The lanes of a download see one file system: on one machine, or a shared one. They land parts in one stage beside the
destination, share its lock, and keep a journal each. `download` takes the lock alone afterwards. It takes over their
notes, fetches what is missing, reads back every member that spans several parts, and publishes by one rename. So a
lane that was skipped, or died, costs only time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from typing_extensions import Self, override

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.landing import Landing, Stage
from blobflow.config import ChunkProfile
from blobflow.engine.plan import TransferPlan
from blobflow.errors import BlobflowError, DestinationNotEmpty, NoSuchUpload, Unsupported, UploadIncomplete, UsageError
from blobflow.stores.base import ObjectMeta, Reader, Store, check_object_size, check_readable
from blobflow.transport.catalog import check_artifact_key
from blobflow.transport.reading import failures_noted, land_parts, landing_plan
from blobflow.transport.remote import RemoteArtifact
from blobflow.transport.uploading import MultipartUpload, UploadRequest, UploadResult, busy, look
from blobflow.untrusted import plain
from blobflow.uploads.progress import OnProgress, OnRecord, PartStats, TransferProgress
from blobflow.uploads.session import CLAIM_ATTEMPTS

_OWNER: Final = "lanes"
"""The owner in their intent: that one lane's process has ended does not mean that the others have."""


@dataclass(frozen=True)
class _Ticket:
    _KIND: ClassVar[str]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json_dict(cls, document: dict[str, Any]) -> Self:
        """The ticket in `document`; the inverse of `to_json_dict`.

        Raises:
            UsageError: it is not a ticket.
        """
        try:
            return cls(**document)
        except TypeError as error:
            raise UsageError(f"not the ticket of {cls._KIND}: {plain(str(error))}") from error


@dataclass(frozen=True)
class UploadTicket(_Ticket):
    """An upload that was begun: what a lane needs besides the store and the artifact."""

    _KIND = "an upload"

    key: str
    upload_id: str
    """Empty if there is nothing to send, because the key holds the artifact already."""
    artifact_digest: str
    """Digest of the artifact that will be under the key; it may be an older export of equal content."""
    part_size: int
    parts: int
    """Number of parts; they are numbered from 1."""
    bytes_total: int

    def numbers(self, lane: int, lanes: int) -> range:
        """The parts of one of `lanes` lanes, which count from 0; every part belongs to exactly one lane."""
        if not 0 <= lane < lanes:
            raise UsageError(f"there is no lane {lane} of {lanes}")
        return range(lane + 1, self.parts + 1, lanes)


@dataclass(frozen=True)
class DownloadTicket(_Ticket):
    """A download that was begun: what a lane needs besides the store and the destination."""

    _KIND = "a download"

    key: str
    artifact_digest: str
    lanes: int
    part_size: int
    parts: int
    """Number of parts; 0 if there is nothing to fetch, because the destination holds the artifact already."""
    bytes_total: int


@dataclass(frozen=True)
class LaneResult(PartStats):
    """The result of a lane; `parts`, `bytes_total` and `bytes_resumed` are those of this lane."""

    status: Literal["moved", "unchanged"]
    """`unchanged`: the whole artifact is in place already."""
    bytes_moved: int = 0


def begin_upload(
    store: Store,
    key: str,
    artifact: Artifact | str | Path,
    *,
    profile: ChunkProfile | None = None,
    overwrite: bool = False,
) -> UploadTicket:
    """Claim `key` for an artifact; no part is sent yet. An upload of the same content that is under way is joined.

    The claim blocks other content until two minutes after the last sign of life of a lane. Then another upload may take
    the key, and the lanes fail with an error.

    Raises:
        Unsupported: the store has no multipart uploads.
        KeyConflict, TransferBusy, ArtifactNotFound, ArtifactInvalid: as `upload`.
    """
    check_artifact_key(key)
    if not store.capabilities().multipart:
        raise Unsupported(
            f"{store.url} has no reliable multipart uploads, and lanes need them",
            hint="send it in one lane, as a single request; `blobflow probe` shows what the server can do",
            store=store.url,
            capability="multipart uploads",
        )
    check_readable(store)
    started = time.monotonic()
    request = _request(store, key, artifact, profile, overwrite=overwrite)
    for _ in range(CLAIM_ATTEMPTS):
        found = look(request, started)
        if isinstance(found, UploadResult):
            return UploadTicket(key, "", found.artifact_digest, request.profile.chunk_size, 0, found.bytes_total)
        check_object_size(store, key, request.payload.manifest_file.payload_size)
        upload = MultipartUpload(request, found, owner=_OWNER)
        if upload.claim():
            session, plan = upload.session, upload.plan
            if not session.is_new:
                session.save()
            return UploadTicket(
                key, session.upload_id, upload.payload.manifest_file.digest, plan.part_size, len(plan), plan.size
            )
    raise busy(request)


def send_parts(
    store: Store,
    ticket: UploadTicket,
    artifact: Artifact | str | Path,
    numbers: Collection[int],
    *,
    profile: ChunkProfile | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> LaneResult:
    """Send the parts among `numbers` that the store does not hold.

    Progress and records count only these parts. The records have a separate transfer id, which depends on the numbers;
    the next attempt at the same numbers has the same id.

    Raises:
        NoSuchUpload: the upload is gone, and was not completed: begin again.
        TransferBusy: other content was uploaded to the key meanwhile.
        SourceChanged: the files differ from those that were exported.
    """
    started = time.monotonic()
    unknown = sorted(number for number in numbers if not 1 <= number <= ticket.parts)
    if unknown:
        raise UsageError(f"the upload has parts 1 to {ticket.parts}, not {unknown[0]}", key=ticket.key)
    if not ticket.upload_id:
        return LaneResult("unchanged", bytes_total=0, seconds=time.monotonic() - started)
    request = _request(store, ticket.key, artifact, profile, on_progress=on_progress, on_checkpoint=on_checkpoint)
    upload = _LanesUpload(request, ticket)
    progress = upload.progress
    _narrow(progress, upload.plan, numbers, ",".join(map(str, numbers)))
    try:
        upload.check_intent()
        upload.send(numbers)
    except NoSuchUpload:
        # A commit came before this call, which is then superfluous.
        if upload.settle() is None:
            raise
        there = upload.plan.bytes_of(numbers)
        seconds = time.monotonic() - started
        return LaneResult("unchanged", bytes_total=there, seconds=seconds, parts=len(numbers))
    progress.done()
    return LaneResult("moved", bytes_moved=progress.bytes_moved, **progress.counters(started))


def commit_upload(
    store: Store,
    ticket: UploadTicket,
    artifact: Artifact | str | Path,
    *,
    lanes: int | None = None,
    profile: ChunkProfile | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> UploadResult:
    """Prove that every part is there and right, complete the payload, and publish the artifact.

    `bytes_resumed` counts what the lanes sent. It reads and sends no payload, except of parts with an unknown checksum.
    (The store reports none, and has lost the lanes' notes, because it has no conditional writes.) These are compared
    with the source, and sent again if that proves nothing.

    Args:
        lanes: Number of lanes that sent the parts (`UploadTicket.numbers`), to name those whose parts are missing.

    Raises:
        UploadIncomplete: parts are missing: run their lanes again. Fields: lanes (as `1,4`), first (a part's number).
        ChecksumMismatch: the parts are not the payload; nothing was published, and the upload is gone.
        NoSuchUpload: the upload is gone, and was not completed: begin again.
        KeyConflict, TransferBusy: as `upload`.
    """
    started = time.monotonic()
    request = _request(store, ticket.key, artifact, profile, on_progress=on_progress, on_checkpoint=on_checkpoint)
    found = look(request, started)
    if isinstance(found, UploadResult):
        return found
    if not ticket.upload_id:
        raise _gone(ticket)
    upload = _LanesUpload(request, ticket, lanes)
    if not upload.run():
        raise _gone(ticket)
    return upload.result(started)


def _request(
    store: Store,
    key: str,
    artifact: Artifact | str | Path,
    profile: ChunkProfile | None,
    *,
    overwrite: bool = True,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> UploadRequest:
    """The request of a lane. The intent records whether the key may be overwritten, as decided at the beginning."""
    if not isinstance(artifact, Artifact):
        artifact = Artifact.open(artifact)
    return UploadRequest(store, key, artifact, profile or ChunkProfile(), overwrite, on_progress, on_checkpoint)


class _LanesUpload(MultipartUpload):
    """The upload of a ticket, with the manifest that it was begun with."""

    def __init__(self, request: UploadRequest, ticket: UploadTicket, lanes: int | None = None) -> None:
        super().__init__(request, None, owner=_OWNER)  # the intent records what may be replaced
        self._ticket = ticket
        self._lanes = lanes
        intent = self.session.load()
        if intent is not None and intent.upload_id == ticket.upload_id:
            self.adopt(intent)
        elif request.payload.manifest_file.digest != ticket.artifact_digest:
            raise _gone(ticket)
        self.session.take_up(ticket.upload_id, ticket.part_size)
        self.begin()

    def check_intent(self) -> None:
        """Check that the intent is there; without it another process may use the key."""
        if not self.session.owns_intent:
            raise _gone(self._ticket)

    @override
    def make(self) -> ObjectMeta:
        """Complete the payload from the lanes' parts; only those with an unknown checksum are read again."""
        self.check_intent()
        held = self.session.held()
        self.session.crcs = held.proven(self.plan)
        missing = [part.number for part in self.plan.missing(self.session.crcs) if not held.has(part)]
        if missing:
            raise _incomplete(self._ticket, missing, self._lanes)
        if len(self.session.crcs) < len(self.plan):
            self.send(self.plan.numbers)
        else:
            for part in self.plan:
                self.progress.resumed(part.length)
            self.progress.begin()
        return self.complete()


def _incomplete(ticket: UploadTicket, missing: list[int], lanes: int | None) -> UploadIncomplete:
    theirs = sorted({(number - 1) % lanes for number in missing}) if lanes else []
    named = ",".join(map(str, theirs))
    of_lanes = f", of {'lane' if len(theirs) == 1 else 'lanes'} {named}" if named else ""
    return UploadIncomplete(
        f"{len(missing)} of {ticket.parts} parts of {ticket.key!r} are missing{of_lanes}; the first is {missing[0]}",
        hint="run the lanes again; they send what is missing",
        key=ticket.key,
        expected=ticket.parts,
        actual=ticket.parts - len(missing),
        lanes=named or None,
        first=missing[0],
    )


def _gone(ticket: UploadTicket) -> NoSuchUpload:
    return NoSuchUpload(
        f"the upload of {ticket.key!r} is gone",
        hint="begin it again; parts of another upload of the same content are used",
        key=ticket.key,
        upload_id=ticket.upload_id,
    )


def begin_download(
    store: Reader,
    key: str,
    dest: str | Path,
    *,
    lanes: int,
    profile: ChunkProfile | None = None,
    expected_digest: str | None = None,
) -> DownloadTicket:
    """Divide the missing parts of the artifact under `key` among lanes; no part is fetched yet.

    A killed download to `dest` is continued, whether it had these lanes, other lanes, or none.

    Raises:
        TransferBusy: another process is landing the artifact there, perhaps lanes from an earlier call.
        DestinationNotEmpty, ArtifactNotFound, IntegrityError, HostileArtifact: as `download`.
    """
    if lanes < 1:
        raise UsageError(f"lanes must be 1 or more, not {lanes}")
    profile = profile or ChunkProfile()
    dest = Path(dest).absolute()
    remote = RemoteArtifact.open(store, key, expected_digest)
    size = remote.payload.size
    stage = Stage(dest, remote.digest)
    there = DownloadTicket(key, remote.digest, lanes, profile.chunk_size, 0, size)
    try:
        stage.check_destination()
    except DestinationNotEmpty:
        if not _is_there(dest, remote.digest):
            raise
        return there
    layout = remote.open_layout()
    with stage.held():
        if stage.is_moving:
            stage.publish()
            return there
        if stage.part_size is None:
            stage.begin(profile.chunk_size)
        plan = landing_plan(layout, stage)
        stage.check_room(layout, plan, remote.manifest.holes)
        stage.divide(lanes)
    return DownloadTicket(key, remote.digest, lanes, plan.part_size, len(plan), size)


def fetch_lane(
    store: Reader,
    ticket: DownloadTicket,
    dest: str | Path,
    lane: int,
    *,
    profile: ChunkProfile | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> LaneResult:
    """Land every `ticket.lanes`-th part, from part `lane + 1` on, unless it has landed already.

    May be called again after a crash, on any machine that sees the destination. Progress and records count only this
    lane, as those of `send_parts` do.

    Raises:
        NotFoundError: nothing of the download is there any more: begin it again.
        TransferBusy: another process runs this lane, or is landing the artifact alone.
        ObjectChanged, DigestMismatch: the artifact was replaced meanwhile.
        DestinationNotEmpty, IntegrityError, HostileArtifact: as `download`.
    """
    started = time.monotonic()
    if not 0 <= lane < ticket.lanes:
        raise UsageError(f"there is no lane {lane} of {ticket.lanes}")
    if not ticket.parts:
        return LaneResult("unchanged", bytes_total=0, seconds=time.monotonic() - started)
    profile = profile or ChunkProfile()
    dest = Path(dest).absolute()
    stage = Stage(dest, ticket.artifact_digest)
    try:
        stage.check_destination()
    except DestinationNotEmpty:
        if not _is_there(dest, ticket.artifact_digest):
            raise
        return LaneResult("unchanged", bytes_total=0, seconds=time.monotonic() - started)
    remote = RemoteArtifact.open(store, ticket.key, ticket.artifact_digest)
    layout = remote.open_layout()
    with stage.lane(lane, ticket.lanes):
        landing = Landing(stage, layout, landing_plan(layout, stage), digests=profile.verify_digest)
        numbers = landing.plan.numbers[lane :: ticket.lanes]
        progress = remote.progress(landing.plan, profile, "download", landing.sync, on_progress, on_checkpoint)
        _narrow(progress, landing.plan, numbers, f"{lane} of {ticket.lanes}")
        with failures_noted(landing, progress):
            land_parts(remote, landing, numbers, progress, workers=profile.workers)
            progress.save()  # the next process may be on another machine, and trusts only what is synced
    progress.done()
    return LaneResult("moved", bytes_moved=progress.bytes_moved, **progress.counters(started))


def _narrow(progress: TransferProgress, plan: TransferPlan, numbers: Collection[int], name: str) -> None:
    """Restrict the progress of a transfer to some of its parts.

    It gets a separate id, because the checkpoints of concurrent lanes are separate histories.
    """
    record = progress.record
    progress.record = record.model_copy(
        update={
            "transfer_id": f"{record.transfer_id}-{hashlib.sha256(name.encode()).hexdigest()[:8]}",
            "parts_total": len(numbers),
            "bytes_done": 0,
            "bytes_total": plan.bytes_of(numbers),
        }
    )


def _is_there(dest: Path, digest: str) -> bool:
    """Whether `dest` claims to be the artifact; `download` proves it."""
    try:
        return Artifact.open(dest).digest == digest
    except BlobflowError:
        return False
