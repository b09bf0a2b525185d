"""Batches as assets and ops: operations from a file, results as a table, failures as a check, and only those again."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dagster as dg
from pydantic import Field
from typing_extensions import TypedDict, Unpack

from blobflow.batch import BatchExecutor, Permission
from blobflow.batch.operations import ALL_PERMISSIONS
from blobflow.batch.stream import DEFAULT_DEADLINE_S
from blobflow.dagster import metadata as md
from blobflow.dagster.checkpoints import count_log
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY, dagster_errors
from blobflow.dagster.fencing import RunFence
from blobflow.errors import StoreUnavailable
from blobflow.fields import KnownFields

if TYPE_CHECKING:
    from blobflow.batch.tables import BatchReport

CHECK: Final = "no_failures"
PARTITION: Final = "{partition}"
"""Stands for the partition key in the path of operations or results."""
DEFAULT_WINDOW: Final = 32


class BatchConfig(KnownFields, dg.Config):
    """Which operations to execute; see `blobflow batch`."""

    operations: str | None = Field(default=None, description="Another file of operations, for this run.")
    fresh: bool = Field(default=False, description="Forget earlier results and execute everything.")


class BatchOptions(TypedDict, total=False):
    """How a batch is executed; see `BatchExecutor` and `run_batch_file`."""

    window: int
    """Operations at once; 32."""
    deadline_s: float | None
    """Seconds for one operation; 300."""
    ordered: bool
    """Operations on one key run one after the other, in the order of the file."""
    allow: Collection[Permission]
    """What operations may do; everything."""
    payloads: bool
    """Keep what gets read in the table."""


def batch_asset(
    name: str,
    operations: str | Path,
    *,
    results: str | Path | None = None,
    key_prefix: Sequence[str] | None = None,
    group_name: str | None = None,
    description: str | None = None,
    deps: Sequence[Any] | None = None,
    partitions_def: dg.PartitionsDefinition[str] | None = None,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
    **options: Unpack[BatchOptions],
) -> dg.AssetsDefinition:
    """An asset whose materialization executes the operations of a file and keeps their results as a Parquet table.

    Counts are metadata; the check `no_failures` shows what failed. Materialized again, it executes only what failed or
    was not reached, as long as the file is the same; what fails for a passing reason is retried by the policy in the
    same way. The asset's value is the path of the table.

    Args:
        name: Of the asset.
        operations: JSON lines or, with the ending `.parquet`, a table; `{partition}` stands for the partition key.
        results: The table, likewise; by default in the resource's scratch directory.
        key_prefix, group_name, description, deps, partitions_def: Of the asset.
        severity: Of the check where something failed.
        retry_policy: For what fails for a passing reason.
        resource_key: Under which the `BlobflowResource` is found.
        options: See `BatchOptions`.
    """

    @dg.asset(
        name=name,
        key_prefix=key_prefix,
        group_name=group_name,
        description=description or "The results of a batch of operations on the store.",
        kinds={"blobflow", "parquet"},
        deps=deps,
        partitions_def=partitions_def,
        retry_policy=retry_policy,
        required_resource_keys={resource_key},
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=dg.AssetKey([*(key_prefix or ()), name]),
                description="Every operation of the file succeeded; a get of a missing object is no failure.",
            )
        ],
    )
    def batch(context: dg.AssetExecutionContext, config: BatchConfig):
        partition = context.partition_key if context.has_partition_key else None
        report = _executed(
            context.op_execution_context,
            config,
            resource_key=resource_key,
            name="/".join([*(key_prefix or ()), name]),
            operations=_placed(operations, partition),
            results=None if results is None else _placed(results, partition),
            partition=partition,
            retry_policy=retry_policy,
            options=options,
        )
        return dg.MaterializeResult(
            value=str(report.results),
            metadata=_metadata(report),
            check_results=[
                dg.AssetCheckResult(
                    passed=not report.failed,
                    check_name=CHECK,
                    severity=severity,
                    metadata={md.BATCH_FAILED: report.failed, **_failures(report)},
                )
            ],
        )

    return batch


def batch_op(
    name: str,
    operations: str | Path,
    *,
    results: str | Path | None = None,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
    **options: Unpack[BatchOptions],
) -> dg.OpDefinition:
    """An op that executes the operations of a file; its output is the path of the table of results.

    It fails if an operation failed, after all others were executed and the table was written; run again, it executes
    only those that failed. The arguments are those of `batch_asset`.
    """

    @dg.op(name=name, required_resource_keys={resource_key}, retry_policy=retry_policy, out=dg.Out(str))
    def batch(context: dg.OpExecutionContext, config: BatchConfig):
        report = _executed(
            context,
            config,
            resource_key=resource_key,
            name=name,
            operations=Path(operations),
            results=None if results is None else Path(results),
            partition=None,
            retry_policy=retry_policy,
            options=options,
        )
        if report.failed:
            raise dg.Failure(
                f"{report.failed} of {report.operations} operations failed, for example {report.failures[0].message!r}."
                " Hint: run it again for those alone.",
                metadata={**_metadata(report), **_failures(report)},
                allow_retries=False,
            )
        context.add_output_metadata(_metadata(report))
        return str(report.results)

    return batch


def _placed(path: str | Path, partition: str | None) -> Path:
    return Path(str(path).replace(PARTITION, partition)) if partition is not None else Path(path)


def _executed(
    context: dg.OpExecutionContext,
    config: BatchConfig,
    *,
    resource_key: str,
    name: str,
    operations: Path,
    results: Path | None,
    partition: str | None,
    retry_policy: dg.RetryPolicy | None,
    options: BatchOptions,
) -> "BatchReport":
    """The report of a batch; what failed for a passing reason only is retried by Dagster first."""
    from blobflow.batch.tables import run_batch_file  # pyarrow is slow to import

    fence = RunFence(context.instance, context.run_id)
    lines = count_log(context.log.info, "batch")

    def watch(done: int, total: int) -> None:
        fence.check()
        lines(done, total)

    with dagster_errors(context, retry_policy, fence=fence):
        resource = getattr(context.resources, resource_key)
        if results is None:
            results = Path(f"{resource.scratch_path('batches', *filter(None, [name, partition]))}.parquet")
        window = options.get("window", DEFAULT_WINDOW)
        executor = BatchExecutor(
            resource.get_store(),
            permits=window,
            window=window,
            deadline_s=options.get("deadline_s", DEFAULT_DEADLINE_S),
            ordered=options.get("ordered", False),
            allow=options.get("allow", ALL_PERMISSIONS),
        )
        report = run_batch_file(
            executor,
            Path(config.operations) if config.operations else operations,
            results,
            payloads=options.get("payloads", False),
            # A retry continues what its first attempt began afresh.
            fresh=config.fresh and not context.retry_number,
            on_progress=watch,
        )
        context.log.info(
            "batch.done operations=%d executed=%d done=%d absent=%d failed=%d results=%s",
            *(report.operations, report.executed, report.done, report.absent, report.failed, report.results),
        )
        more = retry_policy is not None and context.retry_number < retry_policy.max_retries
        if report.failed and report.retryable and more:
            raise StoreUnavailable(f"{report.failed} operations failed for passing reasons", operation="batch")
    return report


def _metadata(report: "BatchReport") -> dict[str, Any]:
    return {
        md.BATCH_RESULTS: dg.MetadataValue.path(str(report.results)),
        md.ROW_COUNT: report.operations,
        md.BATCH_EXECUTED: report.executed,
        md.BATCH_RESUMED: report.resumed,
        md.BATCH_DONE: report.done,
        md.BATCH_ABSENT: report.absent,
        md.BATCH_FAILED: report.failed,
        **{md.BATCH_KIND + kind: count for kind, count in report.kinds.items()},
        md.BATCH_SECONDS: round(report.seconds, 3),
    }


def _failures(report: "BatchReport") -> dict[str, Any]:
    """A table of the first failures; nothing where there are none."""
    if not report.failures:
        return {}
    records = [
        dg.TableRecord(
            {"index": f.index, "kind": f.kind or "", "key": f.key or "", "error": f.error, "what": f.message}
        )
        for f in report.failures
    ]
    columns = [dg.TableColumn("index", "int"), *map(dg.TableColumn, ("kind", "key", "error", "what"))]
    return {md.BATCH_FAILURES: dg.MetadataValue.table(records, dg.TableSchema(columns))}
