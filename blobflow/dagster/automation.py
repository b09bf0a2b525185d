"""Schedules for export rounds."""

from typing import TYPE_CHECKING

import dagster as dg

from blobflow.errors import UsageError

if TYPE_CHECKING:
    from blobflow.dagster.pipeline import ArtifactPipeline


def export_schedule(
    pipeline: "ArtifactPipeline",
    cron_schedule: str,
    *,
    name: str | None = None,
    execution_timezone: str | None = None,
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED,
) -> dg.ScheduleDefinition:
    """A schedule of export rounds, each brought all the way to the mirror.

    Of a pipeline that is partitioned by time, a tick materializes the last partition that is over.

    Args:
        cron_schedule: For example `0 * * * *`.
        name: By default `<pipeline>_schedule`.
        execution_timezone: Of the cron string; by default UTC.

    Raises:
        UsageError: the pipeline is partitioned by something else than time, so that a time names no partition.
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
            f"a schedule cannot tell which partition of {pipeline.name!r} is due",
            hint="write a schedule or a sensor that requests runs of the pipeline's job with a partition_key",
        )

    @dg.schedule(
        name=name,
        job=pipeline.job,
        cron_schedule=cron_schedule,
        execution_timezone=execution_timezone,
        default_status=default_status,
    )
    def last_partition(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        with dg.partition_loading_context(effective_dt=context.scheduled_execution_time):
            due = partitions.get_last_partition_key()
        return dg.RunRequest(run_key=due, partition_key=due) if due else dg.SkipReason("no partition is over yet")

    return last_partition
