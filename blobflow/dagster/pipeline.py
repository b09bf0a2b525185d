"""`artifact_pipeline`: export, upload, verify, download and import as three assets.

| asset | nodes | materialized means |
|---|---|---|
| `[name, "snapshot"]` | export | an artifact is in the scratch directory |
| `[name, "remote"]` | upload, verify | the artifact is complete in the store, and the ref names it |
| `[name, "mirror"]` | download, import | the target shows the artifact |

With `lanes`, upload and download are graphs of several steps (`blobflow.dagster.lanes`).

The data version of all three is the artifact's digest. The code of the nodes is in `blobflow.dagster.steps`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import dagster as dg

from blobflow.coordination.rounds import DEFAULT_SILENCE_S, DEFAULT_TTL_S
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY
from blobflow.dagster.handles import PIN, StagedHandle, UploadHandle
from blobflow.dagster.lanes import download_graph, upload_graph
from blobflow.dagster.spec import BlobflowTranslator, ExporterOf, ImporterOf, PipelineSpec, resource_of, step_op
from blobflow.dagster.steps import (
    CHECK_NAME,
    download_remote,
    export_snapshot,
    import_mirror,
    upload_snapshot,
    verify_remote,
)
from blobflow.errors import UsageError
from blobflow.transport import VerifyMode


@dataclass(frozen=True)
class ArtifactPipeline:
    """The Dagster definitions of one pipeline, to use together (`definitions`) or one by one."""

    name: str
    snapshot: dg.AssetsDefinition
    remote: dg.AssetsDefinition
    mirror: dg.AssetsDefinition
    job: Any
    """Job that materializes all three assets, made by `dg.define_asset_job`."""
    schedules: Sequence[dg.ScheduleDefinition] = field(default=())

    @property
    def assets(self) -> list[dg.AssetsDefinition]:
        """The assets snapshot, remote and mirror, in this order."""
        return [self.snapshot, self.remote, self.mirror]

    @property
    def jobs(self) -> list[Any]:
        return [self.job]

    @cached_property
    def definitions(self) -> dg.Definitions:
        """All definitions except the resource, which the code location must configure."""
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
    """Assets that take snapshots of a source, keep them in a store, and import them at a target.

    The artifact goes to `<name>/<content digest>.tar`. After its verification, the ref `<name>/<ref>` names it. With
    partitions, `<name>/<partition>` replaces `<name>`. Unchanged content is not sent, fetched or imported again, but
    the artifact in the store is verified in every run.

    Args:
        name: Name of the pipeline: letters, digits and `_`.
        exporter: Exporter of the source, or a function of the partition key that returns one.
        importer: Importer of the target, or a function of the partition key that returns one. With partitions, a
            fixed importer shows the partition that was materialized last.
        lanes: Number of steps that share each upload and download, for executors that spread steps over machines.
            All of them must see the scratch directory, and the lanes of a download the target as well. On one machine,
            a single step is as fast.
        schedule: Cron string; see `export_schedule`.
        ref: Last segment of the ref that moves to each verified artifact; None for no ref.
        verify_mode: `deep` reads every byte (`proven`). `shallow` compares sizes, manifests and the store's checksum
            (`attested`, or `unproven` without a checksum). `auto` is deep unless the store attests a checksum. The
            check `verified` reports which of these words applies.
        deps: Assets that the export waits for.
        freshness_policy: Freshness policy of the mirror. The mirror is materialized in every run, even if the content
            has not changed.
        group_name: Group of the three assets; by default `name`.
        translator: Chooses keys, groups, descriptions, tags and so on.
        retry_policy: Retries of every step after temporary errors, such as a store that is down or a busy round. Other
            errors fail the step at once.
        pool: Concurrency pool; each upload and download takes a slot.
        ttl_s: Seconds without a heartbeat of an export after which another run may take over its round.
        max_silence_s: Seconds without progress of an export after which its round is no longer held.
        resource_key: Key of the `BlobflowResource` among the resources.

    Raises:
        UsageError: an argument is invalid; the message names it.
    """
    spec = PipelineSpec(
        name=name,
        exporter=exporter,
        importer=importer,
        partitions_def=partitions_def,
        lanes=lanes,
        ref=ref,
        verify_mode=verify_mode,
        deps=deps,
        freshness_policy=freshness_policy,
        group_name=group_name,
        translator=translator,
        retry_policy=retry_policy,
        pool=pool,
        ttl_s=ttl_s,
        max_silence_s=max_silence_s,
        resource_key=resource_key,
    )
    pipeline = build_pipeline(spec)
    return replace(pipeline, schedules=[export_schedule(pipeline, schedule)]) if schedule else pipeline


def build_pipeline(spec: PipelineSpec) -> ArtifactPipeline:
    """The Dagster definitions of the pipeline that `spec` describes; see `artifact_pipeline`."""
    snapshot, remote, mirror = snapshot_asset(spec), remote_asset(spec), mirror_asset(spec)
    job = dg.define_asset_job(
        f"{spec.name}_job",
        selection=dg.AssetSelection.assets(snapshot, remote, mirror),
        description=f"Exports {spec.name}, uploads it to the store, and updates the mirror.",
    )
    return ArtifactPipeline(spec.name, snapshot, remote, mirror, job)


def export_schedule(
    pipeline: ArtifactPipeline,
    cron_schedule: str,
    *,
    name: str | None = None,
    execution_timezone: str | None = None,
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED,
) -> dg.ScheduleDefinition:
    """A schedule of runs that export, upload and update the mirror.

    If the pipeline is partitioned by time, a tick materializes the last complete partition, unless an earlier tick has
    requested it: the run key is the partition. Failed runs are started again by retries, or by hand.

    Args:
        cron_schedule: Cron string, for example `0 * * * *`.
        name: Name of the schedule; by default `<pipeline>_schedule`.
        execution_timezone: Time zone of the cron string; by default that of the partitions, otherwise UTC.

    Raises:
        UsageError: the pipeline has partitions that are not time windows, so a time does not name a partition.
    """
    name = name or f"{pipeline.name}_schedule"
    partitions = pipeline.snapshot.partitions_def
    if partitions is None:
        return dg.ScheduleDefinition(
            name=name,
            job=pipeline.job,
            cron_schedule=cron_schedule,
            execution_timezone=execution_timezone,
            default_status=default_status,
        )
    if not isinstance(partitions, dg.TimeWindowPartitionsDefinition):
        raise UsageError(
            f"a schedule does not know which partition of {pipeline.name!r} is due",
            hint="write a schedule or a sensor that requests runs of the pipeline's job with a partition_key",
        )

    @dg.schedule(
        name=name,
        job=pipeline.job,
        cron_schedule=cron_schedule,
        # A day in Tokyo is over at 15:00 UTC: "0 1 * * *" must mean an hour after that.
        execution_timezone=execution_timezone or partitions.timezone,
        default_status=default_status,
    )
    def last_partition(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        with dg.partition_loading_context(effective_dt=context.scheduled_execution_time):
            due = partitions.get_last_partition_key()
        return dg.RunRequest(run_key=due, partition_key=due) if due else dg.SkipReason("no partition is over yet")

    return last_partition


def snapshot_asset(spec: PipelineSpec) -> dg.AssetsDefinition:
    """The asset of exported snapshots; its node is export."""
    ins = _waits(spec.snapshot)

    @step_op(spec, "export", waits=ins, out={"result": dg.Out(is_required=False)})
    def export(context: dg.OpExecutionContext):
        result = export_snapshot(context, spec, resource_of(context, spec))
        if result is not None:  # without an output, Dagster skips the steps after it
            yield result

    def snapshot(**after: Any):
        return export.alias("export")(**after)

    return _graph_asset(spec, spec.snapshot, snapshot, ins)


def remote_asset(spec: PipelineSpec) -> dg.AssetsDefinition:
    """The asset of artifacts in the store; its nodes are upload and verify."""
    ins = _waits(spec.remote, snapshot=spec.snapshot.key)
    check_spec = dg.AssetCheckSpec(
        CHECK_NAME,
        asset=spec.remote.key,
        blocking=True,
        description="The verification found no damage in the stored artifact. The evaluation reports whether it is"
        " proven, sampled, attested or unproven.",
    )

    @step_op(spec, "upload", waits=ins, pool=True)
    def upload(context: dg.OpExecutionContext) -> UploadHandle:
        return upload_snapshot(context, spec, resource_of(context, spec))

    @step_op(spec, "verify", out={"result": dg.Out(), CHECK_NAME: dg.Out(is_required=False)})
    def verify(context: dg.OpExecutionContext, uploaded: UploadHandle):
        yield from verify_remote(context, spec, resource_of(context, spec), uploaded)

    uploading = upload if spec.lanes == 1 else upload_graph(spec, list(ins))

    def remote(**after: Any):
        result, verified = verify.alias("verify")(uploading.alias("upload")(**after))
        return {"result": result, check_spec.get_python_identifier(): verified}

    return _graph_asset(spec, spec.remote, remote, ins, check_specs=[check_spec])


def mirror_asset(spec: PipelineSpec) -> dg.AssetsDefinition:
    """The asset of the mirror; its nodes are download and import."""
    ins = _waits(spec.mirror, remote=spec.remote.key)

    @step_op(spec, "download", waits=ins, pool=True, config_schema=PIN)
    def download(context: dg.OpExecutionContext) -> StagedHandle:
        return download_remote(context, spec, resource_of(context, spec))

    @step_op(spec, "import")
    def import_(context: dg.OpExecutionContext, staged: StagedHandle):
        return import_mirror(context, spec, resource_of(context, spec), staged)

    downloading = download if spec.lanes == 1 else download_graph(spec, list(ins))

    def mirror(**after: Any):
        # `import` is a Python keyword, which Dagster does not allow as a name.
        return import_.alias("import_")(downloading.alias("download")(**after))

    return _graph_asset(spec, spec.mirror, mirror, ins)


def _waits(spec: dg.AssetSpec, **follows: dg.AssetKey) -> dict[str, dg.AssetIn]:
    """The inputs of an asset, which carry no data.

    A value in Dagster's storage would decide instead of the store (see `blobflow.dagster.upstream`). Each input has a
    separate name, because an asset with a blocking check is two sources, and Dagster accepts no list of such assets.

    Args:
        follows: The previous asset in the pipeline, by the name of its input.
    """
    before = {name: dg.AssetIn(key, dagster_type=dg.Nothing) for name, key in follows.items()}
    after = {
        f"after_{number}": dg.AssetIn(dep.asset_key, dagster_type=dg.Nothing, partition_mapping=dep.partition_mapping)
        for number, dep in enumerate(spec.deps)
    }
    return {**before, **after}


def _graph_asset(
    spec: PipelineSpec,
    asset: dg.AssetSpec,
    compose: Callable[..., Any],
    ins: Mapping[str, dg.AssetIn],
    *,
    check_specs: Sequence[dg.AssetCheckSpec] = (),
) -> dg.AssetsDefinition:
    """The graph asset that `compose` describes, with the attributes of `asset`."""
    decorate = dg.graph_asset(key=asset.key, ins=ins, partitions_def=spec.partitions_def, check_specs=list(check_specs))
    return decorate(compose).map_asset_specs(
        lambda own: asset.replace_attributes(
            deps=own.deps, partitions_def=own.partitions_def, metadata={**own.metadata, **asset.metadata}
        )
    )
