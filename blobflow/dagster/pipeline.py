"""`artifact_pipeline`: export, upload, verify, download and import as three assets.

| asset | nodes | materialized means |
|---|---|---|
| `[name, "snapshot"]` | export | an artifact lies in the scratch directory |
| `[name, "remote"]` | upload, verify | the artifact is whole in the store, and the ref names it |
| `[name, "mirror"]` | download, import | the target shows the artifact |

With `lanes`, upload and download are graphs of several steps (`blobflow.dagster.lanes`).

All three carry the artifact's digest as their data version. The steps only read their inputs, call the core and turn
its result into metadata; that a step continues where an earlier one stopped is the core's doing.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import dagster as dg

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.manifest import Manifest, artifact_digest
from blobflow.backends import Exporter, Importer, import_artifact
from blobflow.coordination.lease import Lease, record_completion
from blobflow.coordination.refs import check_round, name_artifact, read_ref
from blobflow.coordination.rounds import (
    DEFAULT_SILENCE_S,
    DEFAULT_TTL_S,
    check_name,
    content_key,
    kept_alive,
    round_number,
)
from blobflow.dagster import metadata as md
from blobflow.dagster.automation import export_schedule
from blobflow.dagster.checkpoints import StepJournal, transfer_journal
from blobflow.dagster.failures import dagster_errors, error_metadata
from blobflow.dagster.handles import (
    PIN,
    MirrorHandle,
    RemoteHandle,
    SnapshotHandle,
    StagedHandle,
    UploadHandle,
    check_pinned,
)
from blobflow.dagster.lanes import MAX_LANES, download_in_lanes, upload_in_lanes
from blobflow.dagster.resource import BlobflowResource
from blobflow.dagster.translator import BlobflowAssetProps, BlobflowTranslator, Stage
from blobflow.dagster.upstream import Upstream, leave_handle, lineage, snapshot_is_gone
from blobflow.errors import (
    ArtifactNotFound,
    BlobflowError,
    IntegrityError,
    NotFoundError,
    PermissionMissing,
    RefusedError,
    ReplacementInProgress,
    TransferBusy,
    UsageError,
    writing,
)
from blobflow.fields import check_choice
from blobflow.private import PrivateDirectory
from blobflow.stores import Store
from blobflow.stores.base import check_readable, key_segment
from blobflow.transport import PROOF_MEANS, VerifyMode, download, read_manifest_bytes, upload, verify_or_heal
from blobflow.uploads.progress import transfer_id

CHECK_NAME: Final = "verified"
DEFAULT_RETRY_POLICY: Final = dg.RetryPolicy(
    max_retries=3, delay=10, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS
)

_UNPARTITIONED: Final = "-"
_USER_MARK: Final = "run-"

Backend = TypeVar("Backend", Exporter, Importer)
ExporterOf: TypeAlias = Exporter | Callable[[str], Exporter]
ImporterOf: TypeAlias = Importer | Callable[[str], Importer]


@dataclass(frozen=True)
class ArtifactPipeline:
    """The Dagster definitions of one pipeline, to be taken together (`definitions`) or one by one."""

    name: str
    snapshot: dg.AssetsDefinition
    remote: dg.AssetsDefinition
    mirror: dg.AssetsDefinition
    job: Any
    """Materializes all three: what `dg.define_asset_job` returns."""
    schedules: Sequence[dg.ScheduleDefinition] = field(default=())

    @property
    def assets(self) -> list[dg.AssetsDefinition]:
        """Snapshot, remote, mirror."""
        return [self.snapshot, self.remote, self.mirror]

    @property
    def jobs(self) -> list[Any]:
        return [self.job]

    @cached_property
    def definitions(self) -> dg.Definitions:
        """All of it but the resource, which is the code location's to configure."""
        return dg.Definitions(assets=self.assets, jobs=self.jobs, schedules=self.schedules)


def artifact_pipeline(
    name: str,
    exporter: ExporterOf,
    importer: ImporterOf,
    *,
    partitions_def: dg.PartitionsDefinition[str] | None = None,
    lanes: int = 1,
    schedule: str | None = None,
    ref: str | None = "latest",
    verify_mode: VerifyMode = "auto",
    deps: Sequence[dg.AssetKey | Sequence[str] | str] = (),
    freshness_policy: dg.FreshnessPolicy | None = None,
    group_name: str | None = None,
    translator: BlobflowTranslator | None = None,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    pool: str | None = None,
    ttl_s: float = DEFAULT_TTL_S,
    max_silence_s: float = DEFAULT_SILENCE_S,
    resource_key: str = "blobflow",
) -> ArtifactPipeline:
    """Assets that take snapshots of a source, keep them in a store, and bring them to life at a target.

    The artifact goes to `<name>/<content digest>.tar`, and once it is verified, the ref `<name>/<ref>` names it. With
    partitions, `<name>/<partition>` stands for `<name>`. What is unchanged is neither sent, fetched nor imported
    again; what lies in the store is verified in every run.

    Args:
        name: Letters, digits and `_`.
        exporter: Of the source; or a function of the partition key that returns one.
        importer: Of the target; or a function of the partition key. A fixed importer of a partitioned pipeline shows
            the partition that was materialized last.
        lanes: Among how many steps each upload and download is divided, for executors that spread them over machines.
            All of them have to see the scratch directory, and the lanes of a download the target as well. One step
            is as fast on one machine, which it can fill by itself.
        schedule: Cron string; see `export_schedule`.
        ref: None: no ref is moved.
        verify_mode: `deep` reads every byte (`proven`), `shallow` compares sizes, manifests and the store's own
            checksum (`attested`, or `unproven` where it has none), `auto` is deep except where the store attests a
            checksum. The check `verified` says which of these words is true.
        deps: Assets that the export waits for.
        freshness_policy: Of the mirror: how old it may be before the UI and alerts say so. It is materialized in every
            run, also where the content has not changed.
        group_name: Of the three assets; by default `name`.
        translator: Decides keys, groups, descriptions, tags and so on.
        retry_policy: For every step. Errors that pass (a store that is down, a busy round) are retried, others fail
            the step at once.
        pool: Concurrency pool of which uploads and downloads take a slot.
        ttl_s: Seconds without a sign of life of an export after which another run may take its round over.
        max_silence_s: Seconds without progress of an export after which its round is no longer held.
        resource_key: Under which the `BlobflowResource` is found.

    Raises:
        UsageError: an argument makes no sense; the message says which.
    """
    check_plan(name, lanes)
    check_choice("verify_mode", verify_mode, VerifyMode)
    if partitions_def is None and not (_is_backend(exporter) and _is_backend(importer)):
        raise UsageError("an exporter or importer that depends on the partition needs a partitions_def")

    def spec(stage: Stage, backend: object) -> dg.AssetSpec:
        known = str(getattr(backend, "backend", "")) or None
        made = (translator or BlobflowTranslator()).get_asset_spec(BlobflowAssetProps(name, stage, known))
        return made.replace_attributes(group_name=group_name) if group_name else made

    plan = _Plan(name, ref, verify_mode, partitions_def, retry_policy, pool, resource_key, lanes, ttl_s, max_silence_s)
    snapshot_spec = spec("snapshot", exporter).merge_attributes(deps=deps)
    remote_spec = spec("remote", None)
    snapshot = _snapshot_asset(plan, snapshot_spec, exporter)
    remote = _remote_asset(plan, remote_spec, snapshot_spec.key)
    mirror_spec = spec("mirror", importer)
    if freshness_policy is not None:
        mirror_spec = mirror_spec.replace_attributes(freshness_policy=freshness_policy)
    mirror = _mirror_asset(plan, mirror_spec, remote_spec.key, importer)
    job = dg.define_asset_job(
        f"{name}_job",
        selection=dg.AssetSelection.assets(snapshot, remote, mirror),
        description=f"Exports {name}, keeps it in the store, and brings the mirror up to date.",
    )
    pipeline = ArtifactPipeline(name, snapshot, remote, mirror, job)
    return replace(pipeline, schedules=[export_schedule(pipeline, schedule)]) if schedule else pipeline


def mirror_alone(
    name: str,
    importer: ImporterOf,
    remote: dg.AssetSpec,
    spec: dg.AssetSpec,
    *,
    partitions_def: dg.PartitionsDefinition[str] | None,
    ref: str | None,
    digest: str | None,
    lanes: int,
    retry_policy: dg.RetryPolicy | None,
    pool: str | None,
    resource_key: str,
) -> dg.AssetsDefinition:
    """The last asset of a pipeline whose other assets belong to another deployment.

    Args:
        remote: The asset that it follows.
        spec: Of the mirror.
        partitions_def: Whose keys are those of artifacts in the store.
        digest: Refuse every other artifact.

    Raises:
        UsageError: an argument makes no sense.
    """
    check_plan(name, lanes)
    if partitions_def is None and not _is_backend(importer):
        raise UsageError("an importer that depends on the partition needs partitions, which are for `ref=None`")
    plan = _Plan(
        name,
        ref,
        "auto",
        partitions_def,
        retry_policy,
        pool,
        resource_key,
        lanes,
        digest=digest,
        partition_is_key=partitions_def is not None,
    )
    return _mirror_asset(plan, spec, remote.key, importer)


def check_plan(name: str, lanes: int) -> None:
    """Refuse a name or number of lanes that makes no sense, before anything is made of it."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise UsageError(f"invalid pipeline name {name!r}", hint="use letters, digits and underscores")
    if not 1 <= lanes <= MAX_LANES:
        raise UsageError(f"{lanes} lanes", hint=f"give 1 to {MAX_LANES}")


@dataclass(frozen=True)
class _Plan:
    """What the steps of one pipeline share."""

    name: str
    ref: str | None
    verify_mode: VerifyMode
    partitions_def: dg.PartitionsDefinition[str] | None
    retry_policy: dg.RetryPolicy | None
    pool: str | None
    resource_key: str
    lanes: int = 1
    ttl_s: float = DEFAULT_TTL_S
    max_silence_s: float = DEFAULT_SILENCE_S
    digest: str | None = None
    """Of the only artifact that the mirror may show."""
    partition_is_key: bool = False
    """Whether a partition is an artifact's key in the store."""

    def op(
        self, node: str, *, waits: Iterable[str] = (), pool: bool = False, **options: Any
    ) -> Callable[[Callable[..., Any]], dg.OpDefinition]:
        """The decorator of a step. The op's name is unique in the code location, the node's is not.

        Args:
            waits: Names of inputs without data.
        """
        return dg.op(
            name=f"{self.name}__{node}",
            ins={each: dg.In(dg.Nothing) for each in waits},
            required_resource_keys={self.resource_key},
            retry_policy=self.retry_policy,
            pool=self.pool if pool else None,
            **options,
        )

    @contextmanager
    def step(self, context: dg.OpExecutionContext) -> Iterator[tuple[BlobflowResource, StepJournal]]:
        """Gives the resource and the step's journal, and raises the core's errors as Dagster's."""
        journal = transfer_journal(context)
        with dagster_errors(context, self.retry_policy, journal.metadata, fence=journal.fence):
            yield getattr(context.resources, self.resource_key), journal

    def prefix(self, context: dg.OpExecutionContext) -> str:
        """What keys, lease and ref of this run begin with."""
        return f"{self.name}/{_segment(context)}" if context.has_partition_key else self.name

    def round_name(self, context: dg.OpExecutionContext) -> str:
        """The name of the lease for one export at a time."""
        return f"{self.prefix(context)}/round"

    def rounds(self, context: dg.OpExecutionContext, blobflow: BlobflowResource) -> Path:
        """The directory of the scratch directories, which have the names of runs."""
        return blobflow.scratch_path(self.name, _segment(context))

    def upstream(self, context: dg.OpExecutionContext, store: Store) -> Upstream:
        """Where a step finds what it works on."""
        key = context.partition_key if self.partition_is_key else None
        return Upstream(context, store, self.prefix(context), self.ref_name(context), key)

    def ref_name(self, context: dg.OpExecutionContext) -> str | None:
        """The ref that names the newest artifact."""
        return f"{self.prefix(context)}/{self.ref}" if self.ref is not None else None


def _snapshot_asset(plan: _Plan, spec: dg.AssetSpec, exporter: ExporterOf) -> dg.AssetsDefinition:
    ins = _waits(spec)

    @plan.op("export", waits=ins, out={"result": dg.Out(is_required=False)})
    def export(context: dg.OpExecutionContext):
        with plan.step(context) as (blobflow, journal):
            prefix = plan.prefix(context)
            check_name(prefix)  # not only after the export, as what follows
            store = blobflow.get_store()
            check_readable(store)
            scratch = plan.rounds(context, blobflow) / context.run_id
            progress = journal.watch("export")
            leases = blobflow.get_leases(store)
            lease = Lease(leases, plan.round_name(context), ttl_s=plan.ttl_s) if leases else None
            if lease is not None and not lease.try_acquire():
                other = _run_that_exports(context, spec.key)
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
                        spec.key,
                        partition=context.partition_key if context.has_partition_key else None,
                        description=reason,
                        metadata={md.STATUS: "skipped", md.REASON: reason},
                    )
                )
                return  # without an output, what comes after is skipped as well
            number: int | None = None
            generation = lease.generation if lease is not None else None
            try:
                with kept_alive(lease, plan.max_silence_s) if lease else nullcontext() as alive:

                    def report(done: int, total: int) -> None:
                        if alive is not None:
                            alive()
                        progress(done, total)

                    if lease is not None:
                        number = round_number(store, lease, plan.ref_name(context) or prefix)
                    _discard_all(scratch.parent, context)
                    _mark_used(scratch, context)
                    result = _chosen(exporter, context).export(scratch / "artifact", on_progress=report)
                if lease is not None:
                    # A round that was lost meanwhile ends here: what it exported is not handed on. Its completion is
                    # recorded once it is published.
                    lease.release()
                leave_handle(scratch, number, generation)
            except BaseException:
                _remove(scratch)
                if lease is not None:
                    lease.abandon()
                raise
            artifact, manifest = result.artifact, result.artifact.manifest
            key = content_key(prefix, artifact)
            handle = SnapshotHandle(key, str(scratch), artifact.manifest_bytes, number, generation)
            stored = _stored_digest(store, handle.key, manifest)
            status = "unchanged" if stored else "exported"
            context.log.info(
                "export.done status=%s members=%d bytes=%d excluded=%d symlinks_skipped=%d seconds=%.1f",
                *(status, result.members, result.bytes, result.excluded, result.symlinks_skipped, result.seconds),
            )
            yield dg.MaterializeResult(
                asset_key=spec.key,
                value=handle,
                # Content that is stored already keeps the identity under which it is stored.
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
                    md.KEY: handle.key,
                    **({md.ROUND: number} if number is not None else {}),
                    md.SCRATCH: dg.MetadataValue.path(scratch),
                    **md.largest_members(artifact),
                },
            )

    def snapshot(**after: Any):
        return export.alias("export")(**after)

    return _graph_asset(plan, spec, snapshot, ins)


def _remote_asset(plan: _Plan, spec: dg.AssetSpec, snapshot_key: dg.AssetKey) -> dg.AssetsDefinition:
    def found(context: dg.OpExecutionContext, blobflow: BlobflowResource, store: Store) -> SnapshotHandle:
        """The snapshot that is to be brought into the store."""
        return plan.upstream(context, store).snapshot(snapshot_key, plan.rounds(context, blobflow))

    def stored(context: dg.OpExecutionContext, store: Store, snapshot: SnapshotHandle) -> str | None:
        """The digest under which the store has the snapshot, if it is gone from the disk; None if it is at hand."""
        if snapshot.scratch and Artifact.is_artifact(snapshot.path):
            _mark_used(Path(snapshot.scratch), context)
            return None
        # It was removed after an earlier verification, and only this asset is materialized again.
        digest = _stored_digest(store, snapshot.key, snapshot.manifest)
        if digest is None:
            raise snapshot_is_gone(store, snapshot_key, snapshot.key, snapshot.scratch)
        return digest

    def facts(store: Store, snapshot: SnapshotHandle) -> dict[str, Any]:
        manifest = snapshot.manifest
        return {
            md.URI: f"{store.url}/{snapshot.key}",
            md.KEY: snapshot.key,
            md.MEMBERS: manifest.members,
            md.CONTENT_DIGEST: manifest.content_digest,
            md.BACKEND: manifest.backend,
            md.CREATED_AT: dg.MetadataValue.timestamp(manifest.created_at),
        }

    ins = _waits(spec, snapshot=snapshot_key)

    @plan.op("upload", waits=ins, pool=True)
    def upload_artifact(context: dg.OpExecutionContext) -> UploadHandle:
        with plan.step(context) as (blobflow, journal):
            store = blobflow.get_store()
            snapshot = found(context, blobflow, store)
            metadata = facts(store, snapshot)
            digest = stored(context, store, snapshot)
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

    check_spec = dg.AssetCheckSpec(
        CHECK_NAME,
        asset=spec.key,
        blocking=True,
        description="Nothing is wrong with the artifact in the store, as far as it was looked at: the evaluation says"
        " whether it is proven, sampled, attested or unproven.",
    )

    @plan.op("verify", out={"result": dg.Out(), CHECK_NAME: dg.Out(is_required=False)})
    def verify_artifact(context: dg.OpExecutionContext, uploaded: UploadHandle):
        with plan.step(context) as (blobflow, journal):
            store = blobflow.get_store()
            at_hand = _artifact_in(uploaded.scratch)
            try:
                with _about(store, uploaded.key):
                    result, healed = verify_or_heal(
                        store,
                        uploaded.key,
                        at_hand,
                        mode=plan.verify_mode,
                        expected_digest=uploaded.digest,
                        profile=blobflow.get_profile(),
                        on_progress=journal.progress,
                        on_checkpoint=journal.save,
                        on_damage=lambda found: context.log.warning(
                            "verify.damaged key=%s error=%r: its content is at hand and is uploaded again",
                            *(uploaded.key, found.message),
                        ),
                    )
            except PermissionMissing:
                raise  # which says nothing of the artifact
            except (IntegrityError, RefusedError, NotFoundError) as error:
                if at_hand is None:
                    error.advise(
                        f"{error.hint + '; or ' if error.hint else ''}materialize {snapshot_key.to_user_string()} and"
                        f" {spec.key.to_user_string()} in one run, which heals it if the source still has this content"
                    )
                yield dg.AssetCheckResult(
                    passed=False,
                    asset_key=spec.key,
                    check_name=CHECK_NAME,
                    description=f"{error.message} (hint: {error.hint})" if error.hint else error.message,
                    metadata=error_metadata(error),
                )
                raise
            metadata = {
                **uploaded.metadata,
                md.SIZE: result.bytes_total,
                md.ARTIFACT_DIGEST: result.artifact_digest,
                md.PROOF: result.proof,
                md.VERIFY_SECONDS: round(result.seconds, 3),
            }
            if healed is not None:
                metadata |= {
                    md.STATUS: "healed",
                    md.DAMAGE: f"{type(healed.found).__name__}: {healed.found.message}",
                    md.BYTES_SENT: healed.upload.bytes_sent,
                    md.BYTES_RESUMED: healed.upload.bytes_resumed,
                }
            if (ref := plan.ref_name(context)) is not None:
                journal.fence.check(now=True)
                name_artifact(store, ref, uploaded.key, result.artifact_digest, round_number=uploaded.round_number)
                metadata[md.REF] = ref
            _complete_round(plan, context, blobflow, store, uploaded)
            if uploaded.scratch:
                _discard(Path(uploaded.scratch), context)
            context.log.info(
                "verify.done proof=%s mode=%s bytes_read=%d seconds=%.1f uri=%s",
                *(result.proof, result.mode_used, result.bytes_read, result.seconds, uploaded.metadata[md.URI]),
            )
            yield dg.MaterializeResult(
                asset_key=spec.key,
                value=RemoteHandle(uploaded.key, result.artifact_digest, uploaded.round_number),
                data_version=dg.DataVersion(result.artifact_digest),
                metadata=metadata,
                check_results=[
                    dg.AssetCheckResult(
                        passed=True,
                        asset_key=spec.key,
                        check_name=CHECK_NAME,
                        description=f"{result.proof}: {PROOF_MEANS[result.proof]}"
                        + (f"; healed: it was damaged ({healed.found.message})" if healed else ""),
                        metadata={
                            md.PROOF: result.proof,
                            md.VERIFY_MODE: result.mode_used,
                            md.BYTES_VERIFIED: result.bytes_read,
                        },
                    )
                ],
            )

    def remote(**after: Any):
        if plan.lanes == 1:
            uploaded = upload_artifact.alias("upload")(**after)
        else:
            uploading = upload_in_lanes(plan, plan.lanes, list(after), found, stored, facts)
            uploaded = uploading.alias("upload")(**after)
        result, verified = verify_artifact.alias("verify")(uploaded)
        return {"result": result, check_spec.get_python_identifier(): verified}

    return _graph_asset(plan, spec, remote, ins, check_specs=[check_spec])


def _mirror_asset(
    plan: _Plan, spec: dg.AssetSpec, remote_key: dg.AssetKey, importer_of: ImporterOf
) -> dg.AssetsDefinition:
    def fetch(
        context: dg.OpExecutionContext,
        blobflow: BlobflowResource,
        journal: StepJournal,
        importer: Importer,
        key: str,
        digest: str,
    ) -> dict[str, Any]:
        """Land the artifact where the importer takes it from; what landed before is not fetched again."""
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

    def found(context: dg.OpExecutionContext, store: Store) -> RemoteHandle:
        """The artifact that the mirror is to show."""
        remote = plan.upstream(context, store).remote(remote_key)
        check_pinned(plan.digest, remote)
        check_pinned(context.op_config["digest"], remote)
        return remote

    ins = _waits(spec, remote=remote_key)

    @plan.op("download", waits=ins, pool=True, config_schema=PIN)
    def download_artifact(context: dg.OpExecutionContext) -> StagedHandle:
        with plan.step(context) as (blobflow, journal):
            remote = found(context, blobflow.get_store())
            importer = _chosen(importer_of, context)
            alive = importer.current()
            if alive is not None and alive.digest == remote.digest:
                context.log.info("download.done status=unchanged key=%s alive=%s", remote.key, alive.path)
                metadata: dict[str, Any] = {md.STATUS: "unchanged", md.BYTES_RECEIVED: 0, md.BYTES_RESUMED: 0}
            else:
                metadata = fetch(context, blobflow, journal, importer, remote.key, remote.digest)
            context.add_output_metadata(metadata)
            return StagedHandle(remote.key, remote.digest, metadata, remote.round_number)

    @plan.op("import")
    def import_staged(context: dg.OpExecutionContext, staged: StagedHandle):
        with plan.step(context) as (blobflow, journal):
            importer = _chosen(importer_of, context)
            metadata = staged.metadata
            artifact = importer.current()
            if artifact is None or artifact.digest != staged.digest:
                landed = importer.staging(staged.digest)
                if not Artifact.is_artifact(landed):
                    # An import that was killed may have moved it away; or this step runs on another machine.
                    metadata = fetch(context, blobflow, journal, importer, staged.key, staged.digest)
                artifact = Artifact.open(landed)
            journal.fence.check(now=True)
            if (ref := plan.ref_name(context)) is not None:
                found, alive = read_ref(blobflow.get_store(), ref), importer.current()
                # Like the ref, a mirror that shows the newest never goes back because somebody wakes up late.
                if found and alive and alive.digest == found.manifest_sha256 != staged.digest:
                    check_round(ref, found, staged.round_number)
            result = import_artifact(
                artifact, importer, consume=True, on_progress=journal.watch("import"), key=staged.key
            )
            context.log.info(
                "import.done status=%s members=%d bytes=%d seconds=%.1f path=%s",
                *(result.status, result.members, result.bytes, result.seconds, result.path),
            )
            return dg.MaterializeResult(
                asset_key=spec.key,
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

    def mirror(**after: Any):
        # `import` is a word of Python's, which Dagster does not allow as a name.
        if plan.lanes == 1:
            staged = download_artifact.alias("download")(**after)
        else:
            choose = partial(_chosen, importer_of)
            downloading = download_in_lanes(plan, plan.lanes, list(after), found, choose, fetch)
            staged = downloading.alias("download")(**after)
        return import_staged.alias("import_")(staged)

    return _graph_asset(plan, spec, mirror, ins)


def _waits(spec: dg.AssetSpec, **follows: dg.AssetKey) -> dict[str, dg.AssetIn]:
    """The inputs of an asset: none carries data.

    A value in Dagster's storage would decide instead of the store (see `blobflow.dagster.upstream`). Each has a name of
    its own, because an asset with a blocking check is two sources, and Dagster takes no list of such.

    Args:
        follows: The asset before it in the pipeline.
    """
    before = {name: dg.AssetIn(key, dagster_type=dg.Nothing) for name, key in follows.items()}
    after = {
        f"after_{number}": dg.AssetIn(dep.asset_key, dagster_type=dg.Nothing, partition_mapping=dep.partition_mapping)
        for number, dep in enumerate(spec.deps)
    }
    return {**before, **after}


def _graph_asset(
    plan: _Plan,
    spec: dg.AssetSpec,
    compose: Callable[..., Any],
    ins: Mapping[str, dg.AssetIn],
    *,
    check_specs: Sequence[dg.AssetCheckSpec] = (),
) -> dg.AssetsDefinition:
    """The graph asset that `compose` describes, looking like `spec`."""
    decorate = dg.graph_asset(key=spec.key, ins=ins, partitions_def=plan.partitions_def, check_specs=list(check_specs))
    return decorate(compose).map_asset_specs(
        lambda own: spec.replace_attributes(
            deps=own.deps, partitions_def=own.partitions_def, metadata={**own.metadata, **spec.metadata}
        )
    )


def _is_backend(candidate: object) -> bool:
    return hasattr(candidate, "backend")


def _chosen(backend: Backend | Callable[[str], Backend], context: dg.OpExecutionContext) -> Backend:
    if _is_backend(backend):
        return backend  # pyright: ignore[reportReturnType]
    return backend(context.partition_key)  # pyright: ignore[reportCallIssue]


def _segment(context: dg.OpExecutionContext) -> str:
    """The partition as one segment of a key or a path."""
    if not context.has_partition_key:
        return _UNPARTITIONED
    return key_segment(context.partition_key)


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


def _complete_round(
    plan: _Plan, context: dg.OpExecutionContext, blobflow: BlobflowResource, store: Store, uploaded: UploadHandle
) -> None:
    """Record that the round is published; if that fails, nothing is lost but the record."""
    leases = blobflow.get_leases(store) if uploaded.generation is not None else None
    if leases is None or uploaded.generation is None:
        return
    try:
        if not record_completion(leases, plan.round_name(context), uploaded.generation, uploaded.cursor):
            context.log.info("round.superseded generation=%d", uploaded.generation)
    except BlobflowError as error:
        context.log.warning("round.completion_failed error=%r", error.message)


def _stored_digest(store: Store, key: str, manifest: Manifest) -> str | None:
    """The digest of the artifact under `key`, if it has the content that `manifest` describes."""
    try:
        data = read_manifest_bytes(store, key)
    except (ArtifactNotFound, ReplacementInProgress):
        return None
    return artifact_digest(data) if Manifest.parse(data).same_content(manifest) else None


@contextmanager
def _about(store: Store, key: str) -> Iterator[None]:
    """Has every error of the core say which artifact it is about: a damaged member knows only its own name."""
    try:
        yield
    except BlobflowError as error:
        error.fields.setdefault("store", store.url)
        error.fields.setdefault("key", key)
        raise


def _artifact_in(scratch: str | None) -> Artifact | None:
    """The artifact that lies in a scratch directory, if any does."""
    if scratch is None:
        return None
    try:
        return Artifact.open(Path(scratch) / "artifact")
    except (NotFoundError, IntegrityError):
        return None


def _mark_used(scratch: Path, context: dg.OpExecutionContext) -> None:
    """Say that this run needs the directory, so that no other run takes it for abandoned."""
    with writing(scratch), PrivateDirectory.at(scratch) as directory:
        os.close(directory.open(f"{_USER_MARK}{context.run_id}", os.O_WRONLY | os.O_CREAT))


def _remove(scratch: Path) -> None:
    """Remove a scratch directory as well as it can be done; a later round tries again."""
    with suppress(OSError), PrivateDirectory.at(scratch.parent, make=False) as rounds:
        rounds.remove(scratch.name)


def _discard(scratch: Path, context: dg.OpExecutionContext) -> None:
    """Remove a scratch directory, unless another run that is not finished needs it."""
    users = {mark.name.removeprefix(_USER_MARK) for mark in scratch.glob(f"{_USER_MARK}*")} - {context.run_id}
    runs = [context.instance.get_run_by_id(user) for user in users]
    if all(run is None or run.is_finished for run in runs):
        _remove(scratch)


def _discard_all(rounds: Path, context: dg.OpExecutionContext) -> None:
    """Remove what earlier rounds, and earlier attempts of this step, left behind.

    A failed run keeps its artifact for its retry only until a newer round begins: published after that, an old
    snapshot would take the place of a newer one.
    """
    for scratch in rounds.iterdir() if rounds.is_dir() else ():
        _discard(scratch, context)
