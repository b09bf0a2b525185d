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

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import dagster as dg

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.manifest import Manifest, artifact_digest
from blobflow.backends import ExportResult, Importer, import_artifact
from blobflow.coordination.lease import Lease, record_completion
from blobflow.coordination.refs import check_round, name_artifact, read_ref
from blobflow.coordination.rounds import check_name, content_key, kept_alive, round_number
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
from blobflow.stores import Store
from blobflow.stores.base import check_readable
from blobflow.transport import (
    PROOF_MEANS,
    Healed,
    VerifyResult,
    download,
    read_manifest_bytes,
    upload,
    verify_or_heal,
)
from blobflow.uploads.progress import transfer_id

CHECK_NAME: Final = "verified"


# -------------------------------------------------------------------------------------------------------------- export


def export_snapshot(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource
) -> dg.MaterializeResult[SnapshotHandle] | None:
    """Export the source into this run's scratch directory; None if another run exports it at this moment.

    The step has no output then, and Dagster skips the steps after it.
    """
    with step_journal(context, spec.retry_policy) as journal:
        prefix = spec.prefix(context)
        check_name(prefix)  # before the export, not after it
        store = blobflow.get_store()
        check_readable(store)
        leases = blobflow.get_leases(store)
        lease = Lease(leases, f"{prefix}/round", ttl_s=spec.ttl_s) if leases else None
        if lease is not None and not lease.try_acquire():
            _skip_export(context, spec)
            return None
        result, snapshot = _exported(context, spec, blobflow, store, lease, journal)
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
            # Content that the store has keeps the identity that it has there.
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


def _exported(
    context: dg.OpExecutionContext,
    spec: PipelineSpec,
    blobflow: BlobflowResource,
    store: Store,
    lease: Lease | None,
    journal: StepJournal,
) -> tuple[ExportResult, SnapshotHandle]:
    """Export as one round: while the lease is held, and into a directory that a failure leaves empty."""
    prefix = spec.prefix(context)
    root = spec.scratch_root(context, blobflow)
    scratch = root / context.run_id
    progress = journal.watch("export")
    number: int | None = None
    generation = lease.generation if lease is not None else None
    try:
        with kept_alive(lease, spec.max_silence_s) if lease else nullcontext() as alive:

            def report(done: int, total: int) -> None:
                if alive is not None:
                    alive()
                progress(done, total)

            if lease is not None:
                number = round_number(store, lease, spec.ref_name(context) or prefix)
            rounds.discard_all(root, context)
            rounds.mark_used(scratch, context)
            result = spec.exporter_for(context).export(scratch / rounds.ARTIFACT, on_progress=report)
        if lease is not None:
            # A round that was lost meanwhile ends here: what it exported is not handed on. Its completion is recorded
            # once it is published.
            lease.release()
        rounds.leave_note(scratch, number, generation)
    except BaseException:
        rounds.remove(scratch)
        if lease is not None:
            lease.abandon()
        raise
    artifact = result.artifact
    key = content_key(prefix, artifact)
    return result, SnapshotHandle(key, str(scratch), artifact.manifest_bytes, number, generation)


def _skip_export(context: dg.OpExecutionContext, spec: PipelineSpec) -> None:
    """Tell that another run exports the same snapshot.

    Raises:
        TransferBusy: a process that is no run exports it.
    """
    prefix = spec.prefix(context)
    other = _run_that_exports(context, spec.snapshot.key)
    if other is None:
        raise TransferBusy(
            f"another process is exporting {prefix!r} at this moment",
            hint="let it end; this run takes the round over if it does not",
            key=prefix,
        )
    reason = f"nothing to do: run {other} is exporting {prefix!r} at this moment"
    context.log.info("export.skipped reason=%r", reason)
    context.log_event(
        dg.AssetObservation(
            spec.snapshot.key,
            partition=context.partition_key if context.has_partition_key else None,
            description=reason,
            metadata={md.STATUS: "skipped", md.REASON: reason},
        )
    )


def _run_that_exports(context: dg.OpExecutionContext, snapshot: dg.AssetKey) -> str | None:
    """Another run that is under way and makes the same snapshot; not one that this run continues."""
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
    """Bring the newest snapshot into the store, under the key of its content."""
    with step_journal(context, spec.retry_policy) as journal:
        store = blobflow.get_store()
        snapshot = find_snapshot(context, spec, blobflow, store)
        metadata = snapshot_facts(store, snapshot)
        digest = digest_if_gone(context, spec, store, snapshot)
        if digest is not None:
            status, sent, resumed = "unchanged", 0, 0
        else:
            result = upload(
                store,
                snapshot.key,
                snapshot.path,
                profile=blobflow.get_profile(),
                on_progress=journal.progress,
                on_checkpoint=journal.save,
            )
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


def find_snapshot(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource, store: Store
) -> SnapshotHandle:
    """The snapshot that is to be brought into the store."""
    return _upstream(context, spec, store).snapshot(spec.snapshot.key, spec.scratch_root(context, blobflow))


def digest_if_gone(
    context: dg.OpExecutionContext, spec: PipelineSpec, store: Store, snapshot: SnapshotHandle
) -> str | None:
    """The digest under which the store has a snapshot that is not on the disk any more; None if it is on the disk.

    Raises:
        ArtifactNotFound: neither has it.
    """
    if snapshot.scratch and Artifact.is_artifact(snapshot.path):
        rounds.mark_used(Path(snapshot.scratch), context)
        return None
    # It was removed after an earlier verification, and only this asset is materialized again.
    digest = stored_digest(store, snapshot.key, snapshot.manifest)
    if digest is None:
        raise snapshot_is_gone(store, spec.snapshot.key, snapshot.key, snapshot.scratch)
    return digest


def stored_digest(store: Store, key: str, manifest: Manifest) -> str | None:
    """The digest of the artifact under `key`, if it has the content that `manifest` describes."""
    try:
        data = read_manifest_bytes(store, key)
    except (ArtifactNotFound, ReplacementInProgress):
        return None
    return artifact_digest(data) if Manifest.parse(data).same_content(manifest) else None


def snapshot_facts(store: Store, snapshot: SnapshotHandle) -> dict[str, Any]:
    """Metadata of the remote that the snapshot alone decides."""
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
    """Prove that the artifact in the store is whole, let the ref name it, and remove the snapshot from the disk.

    A damaged artifact whose content is on the disk is uploaded again.
    """
    with step_journal(context, spec.retry_policy) as journal:
        store = blobflow.get_store()
        at_hand = rounds.artifact_in(uploaded.scratch)
        try:
            result, healed = _proven(context, spec, blobflow, store, uploaded, at_hand, journal)
        except PermissionMissing:
            raise  # it says nothing of the artifact
        except (IntegrityError, RefusedError, NotFoundError) as error:
            if at_hand is None:
                error.advise(
                    f"{error.hint + '; or ' if error.hint else ''}materialize {spec.snapshot.key.to_user_string()} and"
                    f" {spec.remote.key.to_user_string()} in one run, which heals it if the source still has this"
                    " content"
                )
            yield _failed_check(spec, error)
            raise
        ref = spec.ref_name(context)
        if ref is not None:
            journal.fence.check(now=True)
            name_artifact(store, ref, uploaded.key, result.artifact_digest, round_number=uploaded.round_number)
        _complete_round(context, spec, blobflow, store, uploaded)
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
                **({md.REF: ref} if ref is not None else {}),
            },
            check_results=[_passed_check(spec, result, healed)],
        )


def _proven(
    context: dg.OpExecutionContext,
    spec: PipelineSpec,
    blobflow: BlobflowResource,
    store: Store,
    uploaded: UploadHandle,
    at_hand: Artifact | None,
    journal: StepJournal,
) -> tuple[VerifyResult, Healed | None]:
    with _about(store, uploaded.key):
        return verify_or_heal(
            store,
            uploaded.key,
            at_hand,
            mode=spec.verify_mode,
            expected_digest=uploaded.digest,
            profile=blobflow.get_profile(),
            on_progress=journal.progress,
            on_checkpoint=journal.save,
            on_damage=lambda found: context.log.warning(
                "verify.damaged key=%s error=%r: its content is at hand and is uploaded again",
                *(uploaded.key, found.message),
            ),
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


def _complete_round(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource, store: Store, uploaded: UploadHandle
) -> None:
    """Record that the round is published; a failure loses only the record."""
    leases = blobflow.get_leases(store) if uploaded.generation is not None else None
    if leases is None or uploaded.generation is None:
        return
    try:
        if not record_completion(leases, f"{spec.prefix(context)}/round", uploaded.generation, uploaded.cursor):
            context.log.info("round.superseded generation=%d", uploaded.generation)
    except BlobflowError as error:
        context.log.warning("round.completion_failed error=%r", error.message)


# ------------------------------------------------------------------------------------------------- download and import


def download_remote(context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource) -> StagedHandle:
    """Land the artifact that the mirror is to show where its importer takes it from."""
    with step_journal(context, spec.retry_policy) as journal:
        remote = find_remote(context, spec, blobflow.get_store())
        importer = spec.importer_for(context)
        alive = importer.current()
        if alive is not None and alive.digest == remote.digest:
            context.log.info("download.done status=unchanged key=%s alive=%s", remote.key, alive.path)
            metadata: dict[str, Any] = {md.STATUS: "unchanged", md.BYTES_RECEIVED: 0, md.BYTES_RESUMED: 0}
        else:
            metadata = stage(context, blobflow, importer, remote.key, remote.digest, journal)
        context.add_output_metadata(metadata)
        return StagedHandle(remote.key, remote.digest, metadata, remote.round_number)


def import_mirror(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource, staged: StagedHandle
) -> dg.MaterializeResult[MirrorHandle]:
    """Bring the artifact to life at the target, unless a later round's artifact lives there."""
    with step_journal(context, spec.retry_policy) as journal:
        importer = spec.importer_for(context)
        metadata = staged.metadata
        artifact = importer.current()
        if artifact is None or artifact.digest != staged.digest:
            landed = importer.staging(staged.digest)
            if not Artifact.is_artifact(landed):
                # An import that was killed may have moved it away; or this step runs on another machine.
                metadata = stage(context, blobflow, importer, staged.key, staged.digest, journal)
            artifact = Artifact.open(landed)
        journal.fence.check(now=True)
        if (ref := spec.ref_name(context)) is not None:
            found, alive = read_ref(blobflow.get_store(), ref), importer.current()
            # Like the ref, a mirror that shows the newest never goes back because somebody wakes up late.
            if found and alive and alive.digest == found.manifest_sha256 != staged.digest:
                check_round(ref, found, staged.round_number)
        result = import_artifact(artifact, importer, consume=True, on_progress=journal.watch("import"), key=staged.key)
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


def find_remote(context: dg.OpExecutionContext, spec: PipelineSpec, store: Store) -> RemoteHandle:
    """The artifact that the mirror is to show.

    Raises:
        DigestMismatch: it is not the one that the pipeline, or the run's configuration, allows.
    """
    remote = _upstream(context, spec, store).remote(spec.remote.key)
    check_pinned(spec.digest, remote)
    check_pinned(context.op_config["digest"], remote)
    return remote


def stage(
    context: dg.OpExecutionContext,
    blobflow: BlobflowResource,
    importer: Importer,
    key: str,
    digest: str,
    journal: StepJournal,
) -> dict[str, Any]:
    """Land an artifact in the importer's staging; gives metadata. What an earlier attempt landed is kept."""
    store = blobflow.get_store()
    with _about(store, key):
        result = download(
            store,
            key,
            importer.staging(digest),
            profile=blobflow.get_profile(),
            expected_digest=digest,
            on_progress=journal.progress,
            on_checkpoint=journal.save,
        )
    if result.status == "unchanged":
        journal.done(transfer_id(store, key, digest, "download"))
    context.log.info(
        "download.done status=%s key=%s bytes_received=%d bytes_resumed=%d",
        *(result.status, key, result.bytes_received, result.bytes_resumed),
    )
    return {
        md.STATUS: result.status,
        md.BYTES_RECEIVED: result.bytes_received,
        md.BYTES_RESUMED: result.bytes_resumed,
        md.DOWNLOAD_SECONDS: round(result.seconds, 3),
        **journal.metadata(),
        **md.throughput(result.bytes_received, result.seconds),
    }


def _upstream(context: dg.OpExecutionContext, spec: PipelineSpec, store: Store) -> Upstream:
    """Where a step finds its input."""
    return Upstream(context, store, spec.prefix(context), spec.ref_name(context), spec.artifact_key(context))


@contextmanager
def _about(store: Store, key: str) -> Iterator[None]:
    """Has every error of the core say which artifact it is about: a damaged member knows only its own name."""
    try:
        yield
    except BlobflowError as error:
        error.belongs_to(store=store.url, key=key)
        raise
