"""At-most-once export rounds: lease, number, export, upload, ref, completion.

`run_export_round` does a whole round in one process. If its steps are processes, one after the other, the first one
holds an `ExportRound` during the export, and passes a `RoundToken` to those that publish and complete it.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from blobflow.artifact.artifact import Artifact
from blobflow.backends.base import Exporter
from blobflow.config import ChunkProfile
from blobflow.coordination.lease import Lease, record_completion
from blobflow.coordination.lease_store import LeaseStore, ObjectLeaseStore
from blobflow.coordination.refs import RefState, fence_ref, name_artifact, newest_round
from blobflow.errors import BlobflowError, TransferBusy
from blobflow.stores.base import Store, check_key
from blobflow.transport import ProgressEvent, UploadResult, upload
from blobflow.transport.catalog import MANIFEST_SUFFIX, check_artifact_key
from blobflow.trees import remove_tree

log = logging.getLogger(__name__)

DEFAULT_TTL_S: Final = 60.0
DEFAULT_SILENCE_S: Final = 3600.0
"""Longer than exporters that report no progress usually take; shorter than a night."""
TAKING_TTL_S: Final = 10.0
"""Time to live of a lease that is held for three requests."""

_TAKING_WAIT_S: Final = 0.1


@dataclass(frozen=True)
class RoundResult:
    """A round that was won and published."""

    upload: UploadResult
    generation: int
    ref: RefState | None


def check_name(name: str) -> str:
    """`name`, if the keys of contents (`content_key`) may begin with it; this can be checked before there is content.

    Raises:
        InvalidKey: it breaks a rule; the message names the rule.
    """
    longest = f"{name}/{'0' * 16}-{'0' * 8}-{'0' * 8}.tar"
    check_key(check_artifact_key(longest) + MANIFEST_SUFFIX)
    return name


def content_key(name: str, artifact: Artifact) -> str:
    """The immutable key of an artifact: the same content always has the same key, other content another one.

    Executable and private files are content as well (`Manifest.same_content`), but the content digest does not cover
    them.
    """
    manifest = artifact.manifest
    content, executables = (
        (digest or "").removeprefix("sha256:") for digest in (manifest.content_digest, manifest.executables_digest)
    )
    private = f"-{hashlib.sha256(manifest.private.encode()).hexdigest()[:8]}" if manifest.private is not None else ""
    return f"{name}/{content[:16]}-{executables[:8]}{private}.tar"


@dataclass(frozen=True)
class RoundToken:
    """Identifies a round after its export, so that another process can publish and complete it.

    It consists of plain JSON values: `RoundToken(**token.to_json_dict())` is an equal token.
    """

    name: str
    """The lease of the round is `<name>/round`."""
    ref: str | None = None
    """The full name of the ref that the round moves, e.g. `orders/latest`; None if it moves none."""
    number: int | None = None
    """The ref refuses rounds with a lower number than its own. None if there are no leases; then nothing is refused."""
    generation: int | None = None
    """Generation of the round's lease, whose record receives the completion; None if there are no leases."""

    def to_json_dict(self) -> dict[str, str | int | None]:
        """The fields as JSON values."""
        return asdict(self)

    def publish(self, store: Store, key: str, digest: str) -> RefState | None:
        """Point the ref of the round at its artifact, and return the ref; None if the round moves no ref.

        May be called again after a crash.

        Raises:
            LeaseLost: a later round has moved or fenced the ref; its artifact is the newer one.
            TransferBusy: `prune` removes this artifact at the same moment.
        """
        if self.ref is None:
            return None
        return name_artifact(store, self.ref, key, digest, round_number=self.number)

    def complete(self, leases: LeaseStore | None, cursor: JsonValue) -> bool:
        """Record the cursor of a round whose lease was handed over. May be called again after a crash.

        Returns:
            False if a later round has begun; then its completion is the newer one. True also if there are no leases.
        """
        if leases is None or self.generation is None:
            return True
        return record_completion(leases, _lease_name(self.name), self.generation, cursor)


class ExportRound:
    """The right to export under a name, held by this process from `begin` until `complete` or `hand_over`.

    Without leases (None) no other process is blocked, and all methods succeed without doing anything.

    | step | `run_export_round` | several processes, one after the other |
    |---|---|---|
    | `begin` | yes | the first one |
    | within `kept_alive`: number the round | `fence` | `take_number` |
    | within `kept_alive`: export | yes | the first one |
    | `hand_over` | no | the first one |
    | `RoundToken.publish` | within `kept_alive` | a later one |
    | complete | `complete` | `RoundToken.complete`, a later one |
    """

    def __init__(self, store: Store, name: str, ref: str | None, lease: Lease | None) -> None:
        self._store = store
        self._lease = lease
        self.token = RoundToken(name, ref, generation=lease.generation if lease else None)

    def __repr__(self) -> str:
        return f"<ExportRound {self.token.name} number {self.token.number}, {self._lease!r}>"

    @classmethod
    def begin(
        cls, store: Store, name: str, *, ref: str | None, leases: LeaseStore | None, ttl_s: float = DEFAULT_TTL_S
    ) -> ExportRound | None:
        """Begin a round; None if another process is in the middle of one.

        Args:
            ref: The full name of the ref that is moved at the end, e.g. `orders/latest`.
            ttl_s: Seconds without a sign of life from this process after which others may take the round over.
        """
        lease = Lease(leases, _lease_name(name), ttl_s=ttl_s) if leases else None
        if lease is not None and not lease.try_acquire():
            return None
        return cls(store, name, ref, lease)

    @contextmanager
    def kept_alive(self, max_silence_s: float = DEFAULT_SILENCE_S) -> Generator[Callable[..., None]]:
        """Renew the lease during the block while its work makes progress.

        Yields a function that the work calls as it progresses, with any arguments; it raises `LeaseLost` once another
        process has the lease. If the block raises, the lease is released at once.
        """
        lease = self._lease
        if lease is None:
            yield lambda *_: None
            return
        progressed_at = time.monotonic()

        def progress(*_: object) -> None:
            nonlocal progressed_at
            progressed_at = time.monotonic()
            lease.check()

        try:
            with lease.heartbeat(lambda: time.monotonic() - progressed_at < max_silence_s):
                yield progress
        except BaseException:
            self.abandon()
            raise

    def take_number(self) -> RoundToken:
        """Give the round a number above that of every round that has moved or fenced the ref.

        Earlier rounds may still move the ref until this one does.
        """
        if self._lease is not None:
            # The lease's generation, unless its record was removed and the count began again.
            newest = newest_round(self._store, self.token.ref) if self.token.ref else 0
            self.token = replace(self.token, number=max(self._lease.generation, newest + 1))
        return self.token

    def fence(self) -> RoundToken:
        """Give the round its number, and keep all earlier rounds from moving the ref from now on.

        Raises:
            LeaseLost: another process has taken the round over.
        """
        if self._lease is not None and self.token.ref:
            number = fence_ref(self._store, self.token.ref, self._lease.generation, still_ours=self._lease.renew)
            self.token = replace(self.token, number=number)
        return self.token

    def renew(self) -> None:
        """Hold the round for another `ttl_s` seconds.

        Raises:
            LeaseLost: another process has taken the round over.
        """
        if self._lease is not None:
            self._lease.renew()

    def hand_over(self) -> None:
        """Release the lease after the export; another process publishes and completes the round with its token.

        Raises:
            LeaseLost: another process has taken the round over; the exported artifact must not be passed on.
        """
        if self._lease is not None:
            self._lease.release()

    def abandon(self) -> None:
        """End a round that publishes nothing. Best effort: if the lease cannot be released, it expires."""
        if self._lease is not None:
            self._lease.abandon()

    def complete(self, cursor: JsonValue) -> None:
        """Record the cursor of the published round and release the lease.

        Raises:
            LeaseLost: another process has taken the round over.
        """
        if self._lease is not None:
            self._lease.complete(cursor)


def take_token(
    store: Store, name: str, *, ref: str, leases: LeaseStore | None, ttl_s: float = TAKING_TTL_S
) -> RoundToken:
    """The token of a round without an export: numbered above every earlier one, with its lease released again.

    Take it before the artifact is made: of two processes that publish, the one that began later has the newer
    artifact.

    Args:
        ttl_s: Time to live of the lease, which is held for three requests; half of the time to wait for others.

    Raises:
        TransferBusy: a round under this name is in progress and did not end in time.
    """
    deadline = time.monotonic() + 2 * ttl_s
    while (taken := ExportRound.begin(store, name, ref=ref, leases=leases, ttl_s=ttl_s)) is None:
        if time.monotonic() > deadline:
            raise TransferBusy(f"a round of {name!r} is under way", key=name)
        time.sleep(_TAKING_WAIT_S)
    try:
        return taken.take_number()
    finally:
        taken.abandon()


def run_export_round(
    store: Store,
    name: str,
    exporter: Exporter,
    *,
    scratch_dir: Path | None = None,
    ref: str | None = "latest",
    profile: ChunkProfile | None = None,
    ttl_s: float = DEFAULT_TTL_S,
    max_silence_s: float = DEFAULT_SILENCE_S,
    leases: LeaseStore | str | None = None,
    on_progress: Callable[[ProgressEvent], None] | None = None,
) -> RoundResult | None:
    """Export and publish once, however many processes try; None if another process is doing it.

    The artifact goes to `<name>/<content digest>.tar`, then the ref `<name>/<ref>` is moved to it. A heartbeat renews
    the lease; winning it keeps every earlier round from moving the ref. The local artifact is deleted in any case, and
    after every failure the lease is released at once.

    Args:
        scratch_dir: Directory in which the artifact is made; the system's temporary directory by default.
        ttl_s: Seconds without a sign of life from the process after which others may take the round over.
        max_silence_s: Seconds without progress of the export or the upload after which the lease is no longer
            renewed, so that a process that hangs does not hold the round for ever.
        leases: The lease store, or the SQLAlchemy URL of a database for leases; the store by default.

    Raises:
        LeaseLost: this process was silent for too long, and another process took over; the ref is the other's.
        TransferBusy: `prune` removes this artifact now; the next round uploads it again.
        Unsupported: the store has no conditional writes, and no other lease store was given.
    """
    with _opened(store, leases) as opened:
        held = ExportRound.begin(store, name, ref=f"{name}/{ref}" if ref else None, leases=opened, ttl_s=ttl_s)
        if held is None:
            return None
        scratch: Path | None = None
        try:
            with held.kept_alive(max_silence_s) as progress:

                def report(event: ProgressEvent) -> None:
                    progress()
                    if on_progress:
                        on_progress(event)

                token = held.fence()
                scratch = Path(tempfile.mkdtemp(prefix=".blobflow-round-", dir=scratch_dir))
                artifact = exporter.export(scratch / "artifact", on_progress=progress).artifact
                held.renew()
                uploaded = upload(store, content_key(name, artifact), artifact, profile=profile, on_progress=report)
                held.renew()
                moved = token.publish(store, uploaded.key, uploaded.artifact_digest)
        finally:
            if scratch is not None:
                with suppress(OSError):
                    remove_tree(scratch)
        try:
            held.complete(artifact.manifest.cursor)
        except BlobflowError as error:
            # The artifact is published: losing the completion record costs observability, not correctness.
            log.warning("round.completion_failed name=%s error=%s", name, error)
        assert token.generation is not None, "this round has a lease"
        return RoundResult(upload=uploaded, generation=token.generation, ref=moved)


def _lease_name(name: str) -> str:
    return f"{name}/round"


@contextmanager
def _opened(store: Store, leases: LeaseStore | str | None) -> Generator[LeaseStore]:
    """The lease store; it is closed at the end of the block if it was opened here."""
    if isinstance(leases, str):
        # SQLAlchemy takes a quarter of a second to import.
        from blobflow.coordination.sql_lease_store import SqlLeaseStore

        opened: LeaseStore = SqlLeaseStore(leases)
    else:
        opened = leases or ObjectLeaseStore(store)
    try:
        yield opened
    finally:
        if opened is not leases:
            opened.close()
