"""Batches as assets and ops: operations come from a file, results go to a table, and only failures run again."""

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
"""Placeholder for the partition key in the path of operations or results."""
DEFAULT_WINDOW: Final = 32


class BatchConfig(KnownFields, dg.Config):
    """Run config of a batch: which operations to execute; see `blobflow batch`."""

    operations: str | None = Field(
        default=None, description="File of operations for this run, instead of the usual one."
    )
    fresh: bool = Field(default=False, description="Ignore earlier results and execute everything.")


class BatchOptions(TypedDict, total=False):
    """How a batch is executed; see `BatchExecutor` and `run_batch_file`."""

    window: int
    """Operations that run at once; 32 by default."""
    deadline_s: float | None
    """Seconds for one operation; 300 by default."""
    ordered: bool
    """Run the operations on one key one after the other, in the order of the file."""
    allow: Collection[Permission]
    """Kinds of operations that are allowed; all by default."""
    payloads: bool
    """Keep the bytes read by `get` operations in the table."""


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

    Counts are metadata; the check `no_failures` shows what failed. If the file is unchanged, the next materialization
    executes only operations that failed or were not reached. A retry after temporary errors does the same. The asset's
    value is the path of the table.

    Args:
        name: Name of the asset.
        operations: Path of JSON lines or, if it ends in `.parquet`, of a table. `{partition}` stands for the partition
            key.
        results: Path of the table of results, with the same placeholder; by default in the resource's scratch
            directory.
        key_prefix, group_name, description, deps, partitions_def: Passed to the asset.
        severity: Severity of the check if an operation failed.
        retry_policy: Retries after temporary errors.
        resource_key: Key of the `BlobflowResource` among the resources.
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
                description="Every operation of the file succeeded; a get of a missing object is not a failure.",
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

    If an operation failed, the op executes all others, writes the table, and then fails. The next run executes only
    the failed operations. The arguments are those of `batch_asset`.
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
    """Return the report of a batch; if all failures are temporary, ask Dagster for a retry instead."""
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
            # Only the first attempt ignores earlier results; a retry continues it.
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
    """A table of the first failures; empty if there are none."""
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
