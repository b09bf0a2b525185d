"""Verify and download: everything is checked, and nothing lands before all of it is proven."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.checker import PayloadChecker
from blobflow.artifact.landing import Landing, Stage
from blobflow.artifact.manifest import Manifest
from blobflow.artifact.members import verify_members
from blobflow.artifact.tarmap import TarMap
from blobflow.config import ChunkProfile
from blobflow.engine.plan import Part, TransferPlan
from blobflow.engine.pool import move_parts
from blobflow.errors import BlobflowError, ChecksumMismatch, DestinationNotEmpty, DigestMismatch, UsageError, setting
from blobflow.fields import check_choice
from blobflow.stores.base import ObjectMeta, Reader
from blobflow.transport.remote import RemoteArtifact
from blobflow.uploads.progress import OnProgress, OnRecord, PartStats, TransferProgress, TransferStats

VerifyMode: TypeAlias = Literal["auto", "shallow", "deep"]

Proof: TypeAlias = Literal["attested", "unproven", "sampled", "proven"]
"""The result of a verification; no content of a bucket can turn one value into another."""

PROOF_MEANS: Final[Mapping[Proof, str]] = {
    "attested": "sizes, manifests and the server's own checksum agree: this finds accidents, but not changes"
    " by someone who may write to the store",
    "unproven": "sizes and manifests agree: nothing of the content was checked",
    "sampled": "a share of the content was read and compared with its digests",
    "proven": "every byte was read and compared with digests that the artifact digest covers",
}
"""Each proof, and what it means."""


@dataclass(frozen=True)
class VerifyResult(TransferStats):
    """What a verification read; a failed one raises."""

    status: Literal["verified"]
    key: str
    artifact_digest: str
    manifest: Manifest
    mode_used: Literal["shallow", "deep", "sample"]
    proof: Proof
    """The proof; see `PROOF_MEANS`."""
    bytes_read: int


@dataclass(frozen=True)
class DownloadResult(PartStats):
    """Where the artifact landed, and the counters."""

    status: Literal["downloaded", "unchanged"]
    key: str
    path: Path
    artifact_digest: str
    manifest: Manifest
    bytes_received: int = 0


def verify(
    store: Reader,
    key: str,
    *,
    mode: VerifyMode = "auto",
    sample: tuple[int, int] | None = None,
    expected_digest: str | None = None,
    profile: ChunkProfile | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> VerifyResult:
    """Check that the artifact under `key` is whole; the `proof` of the result says how far that is known.

    | mode | proof | protects against |
    |---|---|---|
    | `deep` | `proven` | everybody who cannot forge the digest that you expected |
    | `sample` | `sampled` | accidents and tampering, with the probability that the share gives |
    | `shallow`, a CRC32C is attested | `attested` | accidents; whoever may write to the store can forge a CRC32C |
    | `shallow`, none is attested | `unproven` | nothing |

    Args:
        mode: `shallow` compares sizes, the embedded manifest with the sibling, and the CRC32C of the whole payload if
            the store attests one, i.e. has computed it itself as this user's probe has shown
            (`Capabilities.attests_crc32c`). `deep` reads every byte and compares every member with its SHA-256. `auto`
            is shallow if there is an attested CRC32C, and deep otherwise.
        sample: `(n, t)` reads the n-th of t slices of the members, as `deep` reads them all, and compares the rest as
            `shallow` does. So an artifact that is too large for a daily reading is read once in t days.
        expected_digest: The digest of the expected artifact.
        on_progress: Called in the calling thread about twice a second; an exception from it stops the verification.
        on_checkpoint: Called in the calling thread from time to time while every byte is read. A verification that
            failed starts again from the beginning, because bytes that were good may be damaged by then.

    Raises:
        IntegrityError, HostileArtifact: it is not whole; the message says what differs.
        ArtifactNotFound: there is no such artifact.
        UsageError: there is no such slice, or it would contain nothing.
    """
    started = time.monotonic()
    check_choice("mode", mode, VerifyMode)
    if sample is not None and (mode == "shallow" or not 1 <= sample[0] <= sample[1]):
        raise UsageError(
            f"no sample {sample[0]}/{sample[1]} can be read in mode {mode!r}",
            hint=f"give {setting('sample')} as n/t with n from 1 to t, and never for a shallow verification",
        )
    remote = RemoteArtifact.open(store, key, expected_digest)
    attested = None if mode == "deep" else _attested_crc32c(store, remote.payload)
    promised = remote.manifest_file.payload_crc32c
    if attested is not None and attested != promised:
        raise ChecksumMismatch(
            f"the store attests CRC32C {attested:08x} for {key!r}, its manifest says {promised:08x}",
            what=key,
            expected=promised,
            actual=attested,
        )
    mode_used: Literal["shallow", "deep", "sample"]
    proof: Proof
    if mode == "shallow" or (mode == "auto" and attested is not None and sample is None):
        mode_used = "shallow"
        proof = "unproven" if attested is None else "attested"
        remote.check_embedded()
        bytes_read = len(remote.head)
    else:
        mode_used = "sample" if sample else "deep"
        proof = "sampled" if sample and sample[1] > 1 else "proven"
        bytes_read = _read_members(remote, sample or (1, 1), profile or ChunkProfile(), on_progress, on_checkpoint)
    return VerifyResult(
        status="verified",
        key=key,
        artifact_digest=remote.digest,
        manifest=remote.manifest,
        mode_used=mode_used,
        proof=proof,
        bytes_total=remote.payload.size,
        bytes_read=bytes_read,
        seconds=time.monotonic() - started,
    )


def _attested_crc32c(store: Reader, payload: ObjectMeta) -> int | None:
    """The CRC32C that the store reports, if it can be trusted; finding that out may cost requests."""
    return payload.crc32c if payload.crc32c is not None and store.capabilities().attests_crc32c else None


class _Turnstile:
    """Lets numbered parts through in order, so that members spanning several can be hashed as they pass."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next = 1
        self._error: BaseException | None = None

    @contextmanager
    def turn(self, number: int) -> Generator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._error or self._next == number)
            if self._error:
                raise self._error  # every waiter reports the first error, not that another part failed
        yield
        with self._condition:
            self._next += 1
            self._condition.notify_all()

    def break_down(self, error: BaseException) -> None:
        """Let nobody through any more, and wake all waiters."""
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()


def _read_members(
    remote: RemoteArtifact,
    sample: tuple[int, int],
    profile: ChunkProfile,
    on_progress: OnProgress | None,
    on_checkpoint: OnRecord | None,
) -> int:
    """Read manifest, index and a slice of the members, compare their checksums, and return the number of bytes read."""
    layout = remote.open_layout()
    start, size = layout.slice_of_members(*sample)
    plan = TransferPlan(size, profile.chunk_size, start=start)
    progress = remote.progress(plan, profile, "verify", lambda: None, on_progress, on_checkpoint)
    progress.begin()
    checker = PayloadChecker(layout)
    turnstile = _Turnstile()

    def move(part: Part, buffer: memoryview) -> int:
        try:
            view = remote.fetch(part, buffer)
            with turnstile.turn(part.number):
                checker.consume(part.offset, view)
        except BaseException as error:
            turnstile.break_down(error)
            raise
        return part.length

    try:
        move_parts(
            plan if size else [],
            move,
            workers=profile.workers,
            buffer_size=min(profile.chunk_size, size),
            on_moved=lambda _, length: progress.moved(length),
            on_tick=progress.tick,
        )
        checker.settle()
    except BaseException:
        progress.failed()
        raise
    progress.done()
    return len(remote.head) + size


def download(
    store: Reader,
    key: str,
    dest: str | Path,
    *,
    profile: ChunkProfile | None = None,
    expected_digest: str | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> DownloadResult:
    """Land the artifact under `key` at `dest`: every byte checked, then one rename.

    May be called again after a crash: it fetches what is missing. Until it returns, nothing is at `dest`. If `dest`
    holds this artifact already, its members are verified in place and nothing is fetched (`unchanged`).

    If `dest` cannot be replaced, because it is a mount point or its parent is not writable, the artifact is first
    proven in a hidden directory inside. Then its entries are moved to `dest` one by one, the manifest last.

    Args:
        dest: A path that does not exist or is an empty directory; its parents are created.
        expected_digest: The digest of the expected artifact.
        on_progress: Called in the calling thread about twice a second; an exception from it stops the download cleanly.
        on_checkpoint: Called in the calling thread once it is known what is on disk already, after each saved
            checkpoint, at the end and on failure.

    Raises:
        DiskTooSmall: there is less room than the rest of the artifact needs; nothing was fetched.
        DestinationNotEmpty: `dest` holds something else, which stays unchanged.
        ArtifactNotFound: there is no artifact under the key.
        IntegrityError, HostileArtifact: the artifact is damaged or dangerous; nothing is at `dest`.
        ObjectChanged: it was replaced meanwhile; try again.
        TransferBusy: another process lands the same artifact at the same place.
    """
    started = time.monotonic()
    profile = profile or ChunkProfile()
    dest = Path(dest).absolute()
    remote = RemoteArtifact.open(store, key, expected_digest)
    size = remote.payload.size
    result = partial(DownloadResult, key=key, path=dest, artifact_digest=remote.digest, manifest=remote.manifest)
    stage = Stage(dest, remote.digest)
    try:
        stage.check_destination()
    except DestinationNotEmpty:
        if not _holds(dest, remote.digest):
            raise
        stage.sweep()
        return result("unchanged", bytes_total=size, seconds=time.monotonic() - started)
    layout = remote.open_layout()
    with stage.held():
        if stage.is_moving:
            stage.publish()
            return result("downloaded", bytes_total=size, bytes_resumed=size, seconds=time.monotonic() - started)
        if stage.part_size is None:
            stage.begin(profile.chunk_size)
        plan = landing_plan(layout, stage)
        stage.check_room(layout, plan, remote.manifest.holes)
        landing = Landing(stage, layout, plan, digests=profile.verify_digest)
        progress = remote.progress(plan, profile, "download", landing.sync, on_progress, on_checkpoint)
        with failures_noted(landing, progress):
            land_parts(remote, landing, plan.numbers, progress, workers=profile.workers)
            landing.finish(remote.head, remote.manifest_file, remote.index_bytes, progress.tick)
    progress.done()
    received = progress.bytes_moved + len(remote.head)
    return result("downloaded", bytes_received=received, **progress.counters(started))


def landing_plan(layout: TarMap, stage: Stage) -> TransferPlan:
    """The parts of a download into a stage that was begun: everything after manifest and index."""
    if stage.part_size is None:
        raise AssertionError("a stage that was not begun has no parts")
    return TransferPlan(layout.size - layout.data_start, stage.part_size, start=layout.data_start)


def land_parts(
    remote: RemoteArtifact, landing: Landing, numbers: range, progress: TransferProgress, *, workers: int
) -> None:
    """Fetch and land the parts among `numbers` that the stage lacks."""
    rest = landing.plan.rest(numbers, landing.stage.done)
    for number in rest.done:
        progress.resumed(landing.plan.part(number).length)
    progress.begin()

    def move(part: Part, buffer: memoryview) -> int:
        landing.landed(part, landing.land(part, remote.fetch(part, buffer)))
        return part.length

    move_parts(
        rest,
        move,
        workers=workers,
        buffer_size=min(landing.plan.part_size, landing.plan.size),
        on_moved=lambda _, length: progress.moved(length),
        on_tick=progress.tick,
    )


@contextmanager
def failures_noted(landing: Landing, progress: TransferProgress) -> Generator[None]:
    """Save what has landed if the block fails, and forget parts that were wrong, so that they are fetched again."""
    try:
        yield
    except DigestMismatch as error:
        progress.failed()
        landing.forget(error)
        raise
    except BaseException:
        progress.failed()
        raise


def _holds(dest: Path, digest: str) -> bool:
    """Whether `dest` is the artifact `digest`, every member verified."""
    try:
        artifact = Artifact.open(dest)
    except BlobflowError:
        return False
    if artifact.digest != digest:
        return False
    verify_members(artifact)
    return True
