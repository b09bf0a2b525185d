"""What runs by itself: schedules of export rounds, and the automation condition of mirrors."""

from typing import TYPE_CHECKING, Any

import dagster as dg

from blobflow.errors import UsageError

if TYPE_CHECKING:
    from blobflow.dagster.pipeline import ArtifactPipeline


def mirror_condition() -> dg.AutomationCondition[Any]:
    """A mirror that follows: run for every artifact that it has not brought to life, and whenever one is replaced.

    It differs from `AutomationCondition.eager()` in two ways. Artifacts that were there before the condition was first
    evaluated count as well, so a mirror that is set up late catches up, in one backfill. And no partition is too old:
    an artifact that was exported late for an early day is followed, too.

    A run that failed is not requested again before its artifact changes: that is the retries' business.
    """
    condition = dg.AutomationCondition
    is_due = condition.missing().newly_true() | condition.any_deps_updated()
    is_handled = condition.newly_requested() | condition.newly_updated()
    return (
        is_due.since(is_handled)
        & ~condition.any_deps_missing()
        & ~condition.any_deps_in_progress()
        & ~condition.in_progress()
    ).with_label("mirror_condition")


def export_schedule(
    pipeline: "ArtifactPipeline",
    cron_schedule: str,
    *,
    name: str | None = None,
    execution_timezone: str | None = None,
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED,
) -> dg.ScheduleDefinition:
    """A schedule of export rounds, each brought all the way to the mirror.

    Of a pipeline that is partitioned by time, a tick materializes the last partition that is over, unless an earlier
    tick has requested it: the run key is the partition. What failed is started again by retries, or by hand.

    Args:
        cron_schedule: For example `0 * * * *`.
        name: By default `<pipeline>_schedule`.
        execution_timezone: Of the cron string; by default that of the partitions, else UTC.

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
        # A day in Tokyo is over at 15:00 UTC: "0 1 * * *" means an hour after it is over, there.
        execution_timezone=execution_timezone or partitions.timezone,
        default_status=default_status,
    )
    def last_partition(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        with dg.partition_loading_context(effective_dt=context.scheduled_execution_time):
            due = partitions.get_last_partition_key()
        return dg.RunRequest(run_key=due, partition_key=due) if due else dg.SkipReason("no partition is over yet")

    return last_partition
