"""The five steps of a pipeline: functions of the context, the pipeline's spec, its resource and the step's input.

| step | takes | gives |
|---|---|---|
| `export_snapshot` | | the materialization of the snapshot; its value is a `SnapshotHandle` |
| `upload_snapshot` | | an `UploadHandle` |
| `verify_remote` | the `UploadHandle` | the check `verified` and the materialization of the remote |
| `download_remote` | | a `StagedHandle` |
| `import_mirror` | the `StagedHandle` | the materialization of the mirror |

A step finds its input, calls the core and turns the result into metadata. The core continues interrupted transfers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import dagster as dg
from pydantic import JsonValue

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.manifest import Manifest
from blobflow.backends import Exporter, ExportResult, Importer
from blobflow.coordination.rounds import ExportRound, RoundToken, check_name, content_key
from blobflow.dagster import metadata as md, scratch as rounds
from blobflow.dagster.checkpoints import StepJournal, step_journal
from blobflow.dagster.failures import error_metadata
from blobflow.dagster.handles import (
    MirrorHandle,
    RemoteHandle,
    SnapshotHandle,
    StagedHandle,
    UploadHandle,
    check_pinned,
)
from blobflow.dagster.resource import BlobflowResource
from blobflow.dagster.spec import PipelineSpec
from blobflow.dagster.upstream import Upstream, lineage, snapshot_is_gone
from blobflow.errors import (
    ArtifactNotFound,
    BlobflowError,
    IntegrityError,
    NotFoundError,
    PermissionMissing,
    RefusedError,
    ReplacementInProgress,
    TransferBusy,
)
from blobflow.mirror.update import stage_artifact, update_mirror
from blobflow.stores import Store
from blobflow.stores.base import check_readable, key_segment
from blobflow.transport import (
    PROOF_MEANS,
    DownloadResult,
    Healed,
    VerifyResult,
    read_manifest_file,
    upload,
    verify_or_heal,
)
from blobflow.uploads.progress import transfer_id

CHECK_NAME: Final = "verified"

_UNPARTITIONED: Final = "-"
Backend = TypeVar("Backend", Exporter, Importer)


@dataclass(frozen=True)
class Step:
    """A running step: its context, its pipeline for the partition of this run, and its journal."""

    context: dg.OpExecutionContext
    spec: PipelineSpec
    blobflow: BlobflowResource
    journal: StepJournal

    @cached_property
    def store(self) -> Store:
        """The store; nothing is sent before it is used."""
        return self.blobflow.get_store()

    @property
    def log(self) -> dg.DagsterLogManager:
        """The log of the step."""
        return self.context.log

    @property
    def partition(self) -> str | None:
        """The key of the run's partition."""
        return self.context.partition_key if self.context.has_partition_key else None

    @property
    def prefix(self) -> str:
        """Prefix of the keys, the lease and the ref."""
        return self.spec.name if self.partition is None else f"{self.spec.name}/{key_segment(self.partition)}"

    @property
    def ref(self) -> str | None:
        """The full name of the ref that names the newest artifact."""
        return f"{self.prefix}/{self.spec.ref}" if self.spec.ref is not None else None

    @property
    def scratch_root(self) -> Path:
        """The directory of the rounds' scratch directories, which are named after their runs."""
        segment = _UNPARTITIONED if self.partition is None else key_segment(self.partition)
        return self.blobflow.scratch_path(self.spec.name, segment)

    @property
    def exporter(self) -> Exporter:
        """The exporter of the partition."""
        assert self.spec.exporter is not None, "another deployment exports"
        return self._chosen(self.spec.exporter)

    @property
    def importer(self) -> Importer:
        """The importer of the partition."""
        return self._chosen(self.spec.importer)

    @property
    def transfer(self) -> dict[str, Any]:
        """The arguments that every transfer of the core takes."""
        return {
            "profile": self.blobflow.get_profile(),
            "on_progress": self.journal.progress,
            "on_checkpoint": self.journal.save,
        }

    @property
    def upstream(self) -> Upstream:
        """The places in which the step looks for its input."""
        # If there is only a mirror, with partitions, each partition is an artifact's key.
        key = self.partition if self.spec.exporter is None else None
        return Upstream(self.context, self.store, self.prefix, self.ref, key)

    def _chosen(self, backend: Backend | Callable[[str], Backend]) -> Backend:
        if hasattr(backend, "backend"):
            return backend  # pyright: ignore[reportReturnType]
        return backend(self.context.partition_key)  # pyright: ignore[reportCallIssue]


@contextmanager
def open_step(context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource) -> Iterator[Step]:
    """Yields the step; raises the core's errors as Dagster's."""
    with step_journal(context, spec.retry_policy) as journal:
        yield Step(context, spec, blobflow, journal)


# -------------------------------------------------------------------------------------------------------------- export


def export_snapshot(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource
) -> dg.MaterializeResult[SnapshotHandle] | None:
    """Export the source into this run's scratch directory; return None if another run is exporting it.

    In that case the step has no output, and Dagster skips the steps after it.
    """
    with open_step(context, spec, blobflow) as step:
        store = step.store
        check_name(step.prefix)  # before the export, not after it
        check_readable(store)
        leases = blobflow.get_leases(store)
        held = ExportRound.begin(store, step.prefix, ref=step.ref, leases=leases, ttl_s=spec.ttl_s)
        if held is None:
            _skip_export(step)
            return None
        result, snapshot = _exported(step, held)
        artifact, manifest = result.artifact, result.artifact.manifest
        stored = stored_digest(store, snapshot.key, manifest)
        status = "unchanged" if stored else "exported"
        context.log.info(
            "export.done status=%s members=%d bytes=%d excluded=%d symlinks_skipped=%d seconds=%.1f",
            *(status, result.members, result.bytes, result.excluded, result.symlinks_skipped, result.seconds),
        )
        return dg.MaterializeResult(
            asset_key=spec.snapshot.key,
            value=snapshot,
            # Content that is already in the store keeps its digest there.
            data_version=dg.DataVersion(stored or artifact.digest),
            metadata={
                md.STATUS: status,
                md.SIZE: manifest.bytes,
                md.MEMBERS: result.members,
                **md.left_out(result, context.log),
                md.EXPORT_SECONDS: round(result.seconds, 3),
                md.ARTIFACT_DIGEST: stored or artifact.digest,
                md.CONTENT_DIGEST: manifest.content_digest,
                md.BACKEND: manifest.backend,
                **md.cursor(manifest.cursor),
                md.KEY: snapshot.key,
                **({md.ROUND: snapshot.round_number} if snapshot.round_number is not None else {}),
                md.SCRATCH: dg.MetadataValue.path(snapshot.path.parent),
                **md.largest_members(artifact),
            },
        )


def _exported(step: Step, held: ExportRound) -> tuple[ExportResult, SnapshotHandle]:
    """Export while the round is held; a failure removes the scratch directory and releases the round."""
    scratch = step.scratch_root / step.context.run_id
    progress = step.journal.watch("export")
    try:
        with held.kept_alive(step.spec.max_silence_s) as alive:

            def report(done: int, total: int) -> None:
                alive()
                progress(done, total)

            token = held.take_number()
            rounds.discard_all(step.scratch_root, step.context)
            rounds.mark_used(scratch, step.context)
            result = step.exporter.export(scratch / rounds.ARTIFACT, on_progress=report)
        held.hand_over()
        rounds.leave_note(scratch, token.number, token.generation)
    except BaseException:
        rounds.remove(scratch)
        held.abandon()
        raise
    artifact = result.artifact
    key = content_key(token.name, artifact)
    return result, SnapshotHandle(key, str(scratch), artifact.manifest_bytes, token.number, token.generation)


def _skip_export(step: Step) -> None:
    """Report that another run exports the same snapshot.

    Raises:
        TransferBusy: a process outside of Dagster's runs exports it.
    """
    asset = step.spec.snapshot.key
    other = _run_that_exports(step.context, asset)
    if other is None:
        raise TransferBusy(
            f"another process is exporting {step.prefix!r} at this moment",
            hint="wait until it ends; if it does not, this run takes over the round",
            key=step.prefix,
        )
    reason = f"nothing to do: run {other} is exporting {step.prefix!r} at this moment"
    step.log.info("export.skipped reason=%r", reason)
    metadata = {md.STATUS: "skipped", md.REASON: reason}
    step.context.log_event(dg.AssetObservation(asset, partition=step.partition, description=reason, metadata=metadata))


def _run_that_exports(context: dg.OpExecutionContext, snapshot: dg.AssetKey) -> str | None:
    """The id of another run under way that makes the same snapshot, except runs that this one continues; or None."""
    own = lineage(context)
    partition = context.partition_key if context.has_partition_key else None
    under_way = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
    for run in context.instance.get_runs(filters=under_way):
        if run.run_id in own or run.tags.get("dagster/partition") != partition:
            continue
        planned = context.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
        if any(entry.dagster_event and entry.dagster_event.asset_key == snapshot for entry in planned):
            return run.run_id
    return None


# -------------------------------------------------------------------------------------------------------------- upload


def upload_snapshot(context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource) -> UploadHandle:
    """Upload the newest snapshot to the store, under the key of its content."""
    with open_step(context, spec, blobflow) as step:
        store, journal = step.store, step.journal
        snapshot = find_snapshot(step)
        metadata = snapshot_facts(store, snapshot)
        digest = digest_if_gone(step, snapshot)
        if digest is not None:
            status, sent, resumed = "unchanged", 0, 0
        else:
            result = upload(store, snapshot.key, snapshot.path, **step.transfer)
            digest, status = result.artifact_digest, result.status
            if status == "unchanged":
                journal.done(transfer_id(store, snapshot.key, digest, "upload"))
            sent, resumed = result.bytes_sent, result.bytes_resumed
            metadata |= {md.UPLOAD_SECONDS: round(result.seconds, 3), md.CHECKPOINTS: result.checkpoints_saved}
            metadata |= journal.metadata() | md.throughput(sent, result.seconds)
        metadata |= {md.STATUS: status, md.BYTES_SENT: sent, md.BYTES_RESUMED: resumed}
        context.log.info(
            "upload.done status=%s key=%s bytes_sent=%d bytes_resumed=%d", status, snapshot.key, sent, resumed
        )
        context.add_output_metadata(metadata)
        return UploadHandle.of(snapshot, digest, status, metadata)


def find_snapshot(step: Step) -> SnapshotHandle:
    """The snapshot to upload."""
    return step.upstream.snapshot(step.spec.snapshot.key, step.scratch_root)


def digest_if_gone(step: Step, snapshot: SnapshotHandle) -> str | None:
    """None if the snapshot is on the disk, otherwise the digest of the artifact with its content in the store.

    Raises:
        ArtifactNotFound: the content is neither on the disk nor in the store.
    """
    if snapshot.scratch and Artifact.is_artifact(snapshot.path):
        rounds.mark_used(Path(snapshot.scratch), step.context)
        return None
    # An earlier verification removed it, and now only this asset is materialized again.
    digest = stored_digest(step.store, snapshot.key, snapshot.manifest)
    if digest is None:
        raise snapshot_is_gone(step.store, step.spec.snapshot.key, snapshot.key, snapshot.scratch)
    return digest


def stored_digest(store: Store, key: str, manifest: Manifest) -> str | None:
    """The digest of the artifact under `key`, if it has the content that `manifest` describes."""
    try:
        stored = read_manifest_file(store, key)
    except (ArtifactNotFound, ReplacementInProgress):
        return None
    return stored.digest if stored.manifest.same_content(manifest) else None


def snapshot_facts(store: Store, snapshot: SnapshotHandle) -> dict[str, Any]:
    """The metadata of the remote that depends only on the snapshot."""
    manifest = snapshot.manifest
    return {
        md.URI: f"{store.url}/{snapshot.key}",
        md.KEY: snapshot.key,
        md.MEMBERS: manifest.members,
        md.CONTENT_DIGEST: manifest.content_digest,
        md.BACKEND: manifest.backend,
        md.CREATED_AT: dg.MetadataValue.timestamp(manifest.created_at),
    }


# -------------------------------------------------------------------------------------------------------------- verify


def verify_remote(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource, uploaded: UploadHandle
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[RemoteHandle]]:
    """Verify the artifact in the store, move the ref to it, and remove the snapshot from the disk.

    If the artifact is damaged and its content is still on the disk, it is uploaded again.
    """
    with open_step(context, spec, blobflow) as step:
        store = step.store
        at_hand = rounds.artifact_in(uploaded.scratch)
        try:
            result, healed = _proven(step, uploaded, at_hand)
        except PermissionMissing:
            raise  # it says nothing about the artifact
        except (IntegrityError, RefusedError, NotFoundError) as error:
            if at_hand is None:
                error.advise(
                    f"{error.hint + '; or ' if error.hint else ''}materialize {spec.snapshot.key.to_user_string()} and"
                    f" {spec.remote.key.to_user_string()} in one run, which heals the artifact if the source still has"
                    " this content"
                )
            yield _failed_check(spec, error)
            raise
        token = RoundToken(step.prefix, step.ref, uploaded.round_number, uploaded.generation)
        if token.ref is not None:
            step.journal.fence.check(now=True)
        token.publish(store, uploaded.key, result.artifact_digest)
        _complete_round(step, token, uploaded.cursor)
        if uploaded.scratch:
            rounds.discard(Path(uploaded.scratch), context)
        context.log.info(
            "verify.done proof=%s mode=%s bytes_read=%d seconds=%.1f uri=%s",
            *(result.proof, result.mode_used, result.bytes_read, result.seconds, uploaded.metadata[md.URI]),
        )
        yield dg.MaterializeResult(
            asset_key=spec.remote.key,
            value=RemoteHandle(uploaded.key, result.artifact_digest, uploaded.round_number),
            data_version=dg.DataVersion(result.artifact_digest),
            metadata={
                **uploaded.metadata,
                md.SIZE: result.bytes_total,
                md.ARTIFACT_DIGEST: result.artifact_digest,
                md.PROOF: result.proof,
                md.VERIFY_SECONDS: round(result.seconds, 3),
                **md.healing(healed),
                **({md.REF: token.ref} if token.ref is not None else {}),
            },
            check_results=[_passed_check(spec, result, healed)],
        )


def _proven(step: Step, uploaded: UploadHandle, at_hand: Artifact | None) -> tuple[VerifyResult, Healed | None]:
    with _about(step.store, uploaded.key):
        return verify_or_heal(
            step.store,
            uploaded.key,
            at_hand,
            mode=step.spec.verify_mode,
            expected_digest=uploaded.digest,
            on_damage=lambda found: step.log.warning(
                "verify.damaged key=%s error=%r: its content is on the disk and is uploaded again",
                *(uploaded.key, found.message),
            ),
            **step.transfer,
        )


def _failed_check(spec: PipelineSpec, error: BlobflowError) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=False,
        asset_key=spec.remote.key,
        check_name=CHECK_NAME,
        description=f"{error.message} (hint: {error.hint})" if error.hint else error.message,
        metadata=error_metadata(error),
    )


def _passed_check(spec: PipelineSpec, result: VerifyResult, healed: Healed | None) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=True,
        asset_key=spec.remote.key,
        check_name=CHECK_NAME,
        description=f"{result.proof}: {PROOF_MEANS[result.proof]}"
        + (f"; healed: it was damaged ({healed.found.message})" if healed else ""),
        metadata={
            md.PROOF: result.proof,
            md.VERIFY_MODE: result.mode_used,
            md.BYTES_VERIFIED: result.bytes_read,
        },
    )


def _complete_round(step: Step, token: RoundToken, cursor: JsonValue) -> None:
    """Record that the round is published; a failure loses only the record."""
    leases = step.blobflow.get_leases(step.store) if token.generation is not None else None
    try:
        if not token.complete(leases, cursor):
            step.log.info("round.superseded generation=%d", token.generation)
    except BlobflowError as error:
        step.log.warning("round.completion_failed error=%r", error.message)


# ------------------------------------------------------------------------------------------------- download and import


def download_remote(context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource) -> StagedHandle:
    """Download the artifact that the mirror must show into the importer's staging directory."""
    with open_step(context, spec, blobflow) as step:
        remote = find_remote(step)
        metadata = stage(step, remote.key, remote.digest)
        context.add_output_metadata(metadata)
        return StagedHandle(remote.key, remote.digest, metadata, remote.round_number)


def import_mirror(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource, staged: StagedHandle
) -> dg.MaterializeResult[MirrorHandle]:
    """Import the artifact at the target, unless the target already shows a later round's artifact."""
    with open_step(context, spec, blobflow) as step:
        metadata = staged.metadata
        # A killed import may have moved the artifact away, or this step may run on another machine.
        landed = _land(step, staged.key, staged.digest)
        if landed.status != "unchanged":
            metadata = _download_facts(step, landed)
        step.journal.fence.check(now=True)
        result = update_mirror(
            step.store,
            staged.key,
            staged.digest,
            step.importer,
            ref=step.ref,
            round_number=staged.round_number,
            on_import=step.journal.watch("import"),
            **step.transfer,
        ).imported
        context.log.info(
            "import.done status=%s members=%d bytes=%d seconds=%.1f path=%s",
            *(result.status, result.members, result.bytes, result.seconds, result.path),
        )
        return dg.MaterializeResult(
            asset_key=spec.mirror.key,
            value=MirrorHandle(str(result.path), result.artifact_digest),
            data_version=dg.DataVersion(result.artifact_digest),
            metadata={
                **metadata,
                md.STATUS: result.status,
                md.MIRROR_STATUS: "Following",
                md.MIRROR_PATH: dg.MetadataValue.path(result.path),
                **md.cursor(result.cursor),
                md.SIZE: result.bytes,
                md.MEMBERS: result.members,
                md.IMPORT_SECONDS: round(result.seconds, 3),
                md.ARTIFACT_DIGEST: result.artifact_digest,
                md.KEY: staged.key,
            },
        )


def find_remote(step: Step) -> RemoteHandle:
    """The artifact that the mirror must show.

    Raises:
        DigestMismatch: the pipeline, or the run's config, allows only another artifact.
    """
    remote = step.upstream.remote(step.spec.remote.key)
    check_pinned(step.spec.digest, remote)
    check_pinned(step.context.op_config["digest"], remote)
    return remote


def stage(step: Step, key: str, digest: str) -> dict[str, Any]:
    """Download an artifact for the importer, unless it is there or imported already; return the metadata."""
    landed = _land(step, key, digest)
    if landed.status == "unchanged":
        step.journal.done(transfer_id(step.store, key, digest, "download"))
    return _download_facts(step, landed)


def _land(step: Step, key: str, digest: str) -> DownloadResult:
    with _about(step.store, key):
        return stage_artifact(step.store, key, digest, step.importer, **step.transfer)


def _download_facts(step: Step, result: DownloadResult) -> dict[str, Any]:
    step.log.info(
        "download.done status=%s key=%s bytes_received=%d bytes_resumed=%d",
        *(result.status, result.key, result.bytes_received, result.bytes_resumed),
    )
    return {
        md.STATUS: result.status,
        md.BYTES_RECEIVED: result.bytes_received,
        md.BYTES_RESUMED: result.bytes_resumed,
        **({md.DOWNLOAD_SECONDS: round(result.seconds, 3)} if result.status != "unchanged" else {}),
        **step.journal.metadata(),
        **md.throughput(result.bytes_received, result.seconds),
    }


@contextmanager
def _about(store: Store, key: str) -> Iterator[None]:
    """Adds store and key to every error of the core; the error of a damaged member names only the member."""
    try:
        yield
    except BlobflowError as error:
        error.belongs_to(store=store.url, key=key)
        raise
